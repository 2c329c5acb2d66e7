#!/usr/bin/env bash
''':'
# Supervised fine-tuning, section 4.2 of the paper.
# This file is valid shell and valid Python, so both commands below do the same. The second one finds the .venv of the
# repository; with NPROC=2 before it, it starts two ranks:
#
#     deepspeed launch/sft.sh recipes/smollm2.yaml data.root=path/to/glue
#     bash launch/sft.sh recipes/smollm2.yaml data.root=path/to/glue
set -euo pipefail
source "$(dirname "$0")/launch.sh"
'''

# From here on Python: DeepSpeed runs this file once per rank: `python -u launch/sft.sh --local_rank=k RECIPE ...`.
# (No apostrophes below: the shell reads it as one quoted string, up to the last line.)
import sys
from pathlib import Path

# Python puts launch/ first on sys.path; the imports need the repository there, installed or not.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

# Guarded, since a spawned data worker loads this file a second time.
if __name__ == "__main__":
    from extensions.cli.launch import main

    sys.exit(main("sft", sys.argv[1:]))
# '
