#!/usr/bin/env bash
# Install the dependencies (once), then run the tests, up to four files in parallel.
#     bash launch/test.sh [pytest arguments]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$root"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # for tiny models more threads are slower
exec python -m pytest -q -n auto --maxprocesses 4 --dist loadfile "$@"
