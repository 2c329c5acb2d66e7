#!/usr/bin/env bash
''':'
# Train by PPO. This one file is valid as shell and as Python, so both of these work and mean the same:
#
#     deepspeed launch/ppo.sh recipes/quickstart.yaml ppo.lr=1e-4
#     bash launch/ppo.sh recipes/quickstart.yaml ppo.lr=1e-4
#
# The second finds the repo's .venv by itself, and NPROC=2 in front of it starts two ranks on this machine
# (without it DeepSpeed decides: one rank a GPU; on CPU one rank a NUMA node). For more than one machine use
# the first, with DeepSpeed's own options (--hostfile, --no_ssh --node_rank 0 ...).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ -x "$root/.venv/bin/deepspeed" ]; then
    # Another environment is left alone if it is active and can run this.
    if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] || ! command -v deepspeed >/dev/null; then
        export PATH="$root/.venv/bin:$PATH" VIRTUAL_ENV="$root/.venv"
    fi
elif ! command -v deepspeed >/dev/null; then
    echo "ppo.sh: deepspeed is not installed; run 'bash launch/quickstart.sh' once, or activate the environment" >&2
    exit 1
fi
exec deepspeed --quiet ${NPROC:+--num_accelerators "$NPROC"} ${MASTER_PORT:+--master_port "$MASTER_PORT"} "$root/launch/ppo.sh" "$@"
'''

# From here on Python: DeepSpeed runs this file once a rank, as `python -u launch/ppo.sh --local_rank=k RECIPE ...`.
import os
import sys
from pathlib import Path

# Python puts launch/ first on the path; what is wanted is the repo, also when it is not installed.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

# All before torch loads. DeepSpeed starts N ranks on a machine and leaves each of them all the cores.
ranks_here = int(os.environ.get("LOCAL_SIZE", "1"))
if ranks_here > 1 and hasattr(os, "sched_getaffinity"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks_here)))

# Bars of libraries are for terminals; elsewhere they fill logs.
if not sys.stderr.isatty():
    os.environ.setdefault("TQDM_DISABLE", "1")

# One folder an environment for what DeepSpeed compiles: in the common one under the home directory, environments
# take turns to compile the same thing anew (40 s), each time the other one ran last.
if sys.prefix != sys.base_prefix and os.access(sys.prefix, os.W_OK):
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", os.path.join(sys.prefix, "torch_extensions"))

# Guarded, since a spawned data worker loads this file a second time. (No apostrophes below the shell part: the
# shell reads it as one quoted string, up to the last line.)
if __name__ == "__main__":
    from extensions.train import main

    sys.exit(main(sys.argv[1:]))
# '
