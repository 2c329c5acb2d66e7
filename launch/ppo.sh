#!/usr/bin/env bash
''':'
# Train by PPO.
# This one file is valid as shell and as Python, so both of these work and mean the same; the second finds the .venv of
# the repo by itself, and NPROC=2 in front of it starts two ranks:
#
#     deepspeed launch/ppo.sh recipes/quickstart.yaml ppo.batch_size=8
#     bash launch/ppo.sh recipes/quickstart.yaml ppo.batch_size=8
set -euo pipefail
source "$(dirname "$0")/launch.sh"
'''

# From here on Python: DeepSpeed runs this file once a rank, as `python -u launch/ppo.sh --local_rank=k RECIPE ...`.
# (No apostrophes below: the shell reads it as one quoted string, up to the last line.)
import sys
from pathlib import Path

# Python puts launch/ first on the path; what is wanted is the repo, also when it is not installed.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

# Guarded, since a spawned data worker loads this file a second time.
if __name__ == "__main__":
    from extensions.cli.launch import main

    sys.exit(main("ppo", sys.argv[1:]))
# '
