#!/usr/bin/env bash
# Install the dependencies (once), train the small recipe on this machine in one process, and print the next commands.
#     bash launch/quickstart.sh [key.sub=value ...]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
cd "$root"
status=0
NPROC=1 bash launch/ppo.sh recipes/quickstart.yaml "$@" || status=$?
if [ "$status" = 0 ] && [ -f runs/quickstart/adapter/nlu.json ] && [ $# = 0 ]; then
    cat <<'NEXT'

Open runs/quickstart/report.html in a browser: scores, curves, confusion, errors with their texts.

Next:
  source .venv/bin/activate
  nlu predict runs/quickstart --text sentence="the plot was thin, but I loved it"    # a sentence of your own
  nlu init tickets.csv --label team                                                  # your own file: writes a recipe
  nlu report runs/quickstart                                                         # tables and curves; several runs: a comparison
NEXT
fi
exit "$status"
