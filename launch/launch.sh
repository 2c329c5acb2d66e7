# shellcheck shell=bash
# Sourced by ppo.sh, sft.sh, eval.sh and encoder.sh when they run as shell scripts: finds deepspeed and starts the same
# file under it, which runs it as Python once per rank.
#
#     NPROC=2        ranks on this machine; default: DeepSpeed's, one per GPU, or on a CPU one per NUMA node
#     MASTER_PORT=N  port of the ranks' rendezvous; default: a free one (extensions/distributed/rendezvous.py)
#
# For more than one machine, call deepspeed directly, with its own options (--hostfile, --no_ssh --node_rank 0 ...).

script=$(cd "$(dirname "$0")" && pwd)/${0##*/}
root=$(dirname "$(dirname "$script")")
if [ -x "$root/.venv/bin/deepspeed" ]; then
    # An active environment that has deepspeed takes precedence.
    if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] || ! command -v deepspeed >/dev/null; then
        export PATH="$root/.venv/bin:$PATH" VIRTUAL_ENV="$root/.venv"
    fi
elif ! command -v deepspeed >/dev/null; then
    echo "${0##*/}: deepspeed is not installed; run 'bash launch/quickstart.sh' once, or activate the environment" >&2
    exit 1
fi

# On a signal DeepSpeed's launcher kills its ranks after 30 seconds and exits with status 1. Here it runs in its own
# process group, which Ctrl-C does not reach, and the ranks get SIGTERM: they finish the step, save and exit with status
# 0.
port=${MASTER_PORT:-0}
if [ -z "${MASTER_PORT:-}" ] && [ -e /job/hostfile ]; then port=; fi # DeepSpeed's default hostfile: several nodes
set -m
deepspeed --quiet ${NPROC:+--num_accelerators "$NPROC"} ${port:+--master_port "$port"} "$script" "$@" &
launcher=$!
set +m
asked=0
stop() {
    asked=$((asked + 1))
    if [ "$asked" -gt 1 ]; then
        kill -KILL -- "-$launcher" 2>/dev/null
    else
        echo "${0##*/}: stopping after this step; a second signal kills the run" >&2
        # Without ranks on this machine, or without pkill, the launcher gets it; its ranks stop when it is gone.
        pkill -TERM -g "$launcher" -f -- '--local_rank=' 2>/dev/null || kill -TERM "$launcher" 2>/dev/null
    fi
}
trap stop INT TERM HUP
while kill -0 "$launcher" 2>/dev/null; do wait "$launcher" || true; done # a signal ends a wait
status=0
wait "$launcher" || status=$?
exit "$status"
