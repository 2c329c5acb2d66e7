#!/usr/bin/env bash
# Train by PPO on OpenRLHF's Ray + vLLM trainer, from the same recipes:
#
#     bash launch/ppo_ray.sh recipes/smollm2.yaml data.root=path/to/glue
#     bash launch/ppo_ray.sh --print recipes/llama2_glue_mt.yaml    # OpenRLHF's command, and where keys take effect
#
#     RAY_ADDRESS=HOST:PORT   a running Ray cluster (or ray.address in the recipe); else one is started on this machine
#     NLU_RAY_LOGS=1          also show the output of the cluster's processes
#
# It uses .venv-ray if it exists (on a CPU `bash launch/test_ray.sh` creates it), else the active environment or .venv.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
for venv in "$root/.venv-ray" "${VIRTUAL_ENV:-$root/.venv}"; do
    if [ -x "$venv/bin/python" ]; then
        export VIRTUAL_ENV="$venv" PATH="$venv/bin:$PATH"
        break
    fi
done
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" # Ray's processes need the project too
exec python -c 'import sys; from extensions.cli.launch import main; sys.exit(main("ppo_ray", sys.argv[1:]))' "$@"
