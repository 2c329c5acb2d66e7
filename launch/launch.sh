# shellcheck shell=bash
# Sourced by ppo.sh, sft.sh, eval.sh and encoder.sh when they run as shell scripts: finds deepspeed and starts the same
# file under it, which runs it as Python once a rank.
#
#     NPROC=2        ranks on this machine; else DeepSpeed decides: one a GPU, on CPU one a NUMA node
#     MASTER_PORT=N  port of the ranks' rendezvous
#
# For more than one machine call deepspeed yourself, with its own options (--hostfile, --no_ssh --node_rank 0 ...).

script=$(cd "$(dirname "$0")" && pwd)/$(basename "$0")
root=$(dirname "$(dirname "$script")")
if [ -x "$root/.venv/bin/deepspeed" ]; then
    # Another environment is left alone if it is active and can run this.
    if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] || ! command -v deepspeed >/dev/null; then
        export PATH="$root/.venv/bin:$PATH" VIRTUAL_ENV="$root/.venv"
    fi
elif ! command -v deepspeed >/dev/null; then
    echo "$(basename "$0"): deepspeed is not installed; run 'bash launch/quickstart.sh' once, or activate the environment" >&2
    exit 1
fi
exec deepspeed --quiet ${NPROC:+--num_accelerators "$NPROC"} ${MASTER_PORT:+--master_port "$MASTER_PORT"} "$script" "$@"
