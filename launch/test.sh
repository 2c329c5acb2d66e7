#!/usr/bin/env bash
# Install what is needed (once), then run the tests.
#     bash launch/test.sh [pytest arguments]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$root"
exec python -m pytest -q "$@"
