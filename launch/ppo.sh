#!/usr/bin/env bash
''':'
# Train by PPO.
# This file is valid shell and valid Python, so both commands below do the same. The second one finds the .venv of the
# repository; with NPROC=2 before it, it starts two ranks:
#
#     deepspeed launch/ppo.sh recipes/quickstart.yaml ppo.batch_size=8
#     bash launch/ppo.sh recipes/quickstart.yaml ppo.batch_size=8
set -euo pipefail
source "$(dirname "$0")/launch.sh"
'''

# From here on Python: DeepSpeed runs this file once per rank: `python -u launch/ppo.sh --local_rank=k RECIPE ...`.
# (No apostrophes below: the shell reads it as one quoted string, up to the last line.)
import sys
from pathlib import Path

# Python puts launch/ first on sys.path; the imports need the repository there, installed or not.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

# Guarded, since a spawned data worker loads this file a second time.
if __name__ == "__main__":
    from extensions.cli.launch import main

    sys.exit(main("ppo", sys.argv[1:]))
# '
