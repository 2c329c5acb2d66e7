#!/usr/bin/env bash
# Install what is needed (once), then train the small recipe on this machine in one process.
#     bash launch/quickstart.sh [key.sub=value ...]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$root"
NPROC=1 exec bash launch/ppo.sh recipes/quickstart.yaml "$@"
