#!/usr/bin/env bash
# Install Ray and vLLM for CPUs beside the rest into .venv-ray (once: 4.5 GB and some minutes), then run the tests of the
# Ray engine, which `bash launch/test.sh` skips. On GPUs activate an environment with '.[gpu,vllm,dev]' and run
# `python -m pytest tests/ray` there.
#     bash launch/test_ray.sh [pytest arguments]
set -euo pipefail
NLU_WITH_RAY=1
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$root"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec python -m pytest -q tests/ray "$@"
