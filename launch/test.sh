#!/usr/bin/env bash
# Install what is needed (once), then run the tests, some files at a time.
#     bash launch/test.sh [pytest arguments]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$root"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # tiny models: threads would only wait for each other
exec python -m pytest -q -n auto --maxprocesses 4 --dist loadfile "$@"
