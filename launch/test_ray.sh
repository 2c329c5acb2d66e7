#!/usr/bin/env bash
# The tests of the Ray backend, which `bash launch/test.sh` skips: some minutes.
#     bash launch/test_ray.sh [pytest arguments]
# On a CPU, Ray and vLLM are installed with the other packages into .venv-ray (once: 4.5 GB); on GPUs .venv has them.
set -euo pipefail
case "${NLU_DEVICE:-$(nvidia-smi -L 2>/dev/null || true)}" in
gpu | "GPU "*) ;;
*) export NLU_WITH_RAY=1 ;;
esac
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$root"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec python -m pytest -q tests/ray_backend "$@"
