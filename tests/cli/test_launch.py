"""The launch scripts: valid shell and Python, and the commands that they start."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from launch_tree import run, write_stub
from support import ROOT, write_recipe

from extensions.common.run_lock import lock_folder

SCRIPTS = [*sorted((ROOT / "launch").glob("*.s*")), ROOT / ".ci" / "run"]


def test_all_scripts_are_here():
    methods = {"ppo.sh", "sft.sh", "eval.sh", "encoder.sh", "ppo_ray.sh"}
    others = {"launch.sh", "quickstart.sh", "setup.sh", "test.sh", "test_ray.sh", "slurm.sbatch", "run"}
    assert {path.name for path in SCRIPTS} == methods | others


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_is_valid_shell(script: Path):
    result = run(["bash", "-n", str(script)])
    assert (result.returncode, result.stderr) == (0, "")


# --- ppo.sh -----------------------------------------------------------------------------------------------------

PPO_STUB = """
import os

def main(argv, method, do):
    rank, world = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    print(f"rank {rank} of {world}, threads {os.environ.get('OMP_NUM_THREADS')}, {method} {argv}", flush=True)
    return 7 if argv[-1] == "fail" and rank == "0" else 0
"""
PRINT_ARGUMENTS = '#!/usr/bin/env bash\necho "$0"; printf "%s|" "$@"\n'


@pytest.fixture
def ppo(tmp_path: Path) -> Path:
    """launch/ppo.sh in a tree whose extensions.runs.main only prints its arguments."""
    root = tmp_path / "my project"
    (root / "launch").mkdir(parents=True)
    for script in ("launch.sh", "ppo.sh", "sft.sh", "eval.sh", "encoder.sh"):
        shutil.copy(ROOT / "launch" / script, root / "launch")
    for room in ("cli", "common", "distributed", "encoder", "runs"):
        (root / "extensions" / room).mkdir(parents=True)
    shutil.copy(ROOT / "extensions/cli/launch.py", root / "extensions/cli")
    for module in ("environment.py", "console.py"):
        shutil.copy(ROOT / "extensions/common" / module, root / "extensions/common")
    (root / "extensions/runs/main.py").write_text(PPO_STUB)
    (root / "extensions/encoder/run.py").write_text("run_encoder = None\n")
    (root / "extensions/distributed/run_in_progress.py").write_text("def run_in_progress(script, arguments): ...\n")
    return root / "launch/ppo.sh"


def clean_env(**env: str) -> dict[str, str]:
    dropped = {"VIRTUAL_ENV", "CONDA_PREFIX", "NPROC", "MASTER_PORT", "OMP_NUM_THREADS", "LOCAL_SIZE", "RANK"}
    return {key: value for key, value in os.environ.items() if key not in dropped} | env


@pytest.mark.parametrize("method", ["ppo", "sft", "eval", "encoder"])
def test_every_method_has_a_script_that_is_shell_and_python(ppo: Path, method: str):
    script = ppo.parent / f"{method}.sh"
    result = run([sys.executable, str(script), "--local_rank=1", "r.yaml", "a=b c"], env=clean_env(RANK="1"))
    assert f"{method} ['r.yaml', 'a=b c']" in result.stdout, result.stderr
    write_stub(ppo.parent.parent / ".venv/bin/deepspeed", PRINT_ARGUMENTS)
    result = run(["bash", str(script), "r.yaml"], env=clean_env(PATH="/usr/bin:/bin"))
    assert result.stdout.splitlines()[1] == f"--quiet|--master_port|0|{script}|r.yaml|"


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


def test_a_run_that_is_running_is_refused_before_torch_is_loaded(tmp_path: Path):
    recipe = write_recipe(tmp_path, Path("model"), output_dir=str(tmp_path / "run"))
    (tmp_path / "run").mkdir()
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise RuntimeError('torch was loaded')")
    command = [sys.executable, str(ROOT / "launch/ppo.sh"), "--local_rank=0", str(recipe), "--accept-changes"]
    with lock_folder(tmp_path / "run"):
        result = run(command, env=clean_env(RANK="0", LOCAL_RANK="0", PYTHONPATH=str(tmp_path)))
    expected = f"error: {tmp_path / 'run'}: already running (process {os.getpid()} on {socket.gethostname()}); "
    assert result.returncode == 2 and result.stderr.startswith(expected) and result.stderr.count("\n") == 1
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.lock"]


def test_ppo_as_shell_uses_the_repos_environment(ppo: Path, tmp_path: Path):
    write_stub(ppo.parent.parent / ".venv/bin/deepspeed", PRINT_ARGUMENTS)
    env = clean_env(PATH="/usr/bin:/bin", NPROC="2", MASTER_PORT="29999")
    result = run(["bash", str(ppo), "r.yaml", "run.name=a  b", "x="], env=env, cwd=tmp_path)
    program, arguments = result.stdout.splitlines()
    assert program == str(ppo.parent.parent / ".venv/bin/deepspeed")
    expected = f"--quiet|--num_accelerators|2|--master_port|29999|{ppo}|r.yaml|run.name=a  b|x=|"
    assert arguments == expected


def test_ppo_as_shell_leaves_the_number_of_ranks_to_deepspeed(ppo: Path):
    write_stub(ppo.parent.parent / ".venv/bin/deepspeed", PRINT_ARGUMENTS)
    result = run(["bash", str(ppo), "r.yaml"], env=clean_env(PATH="/usr/bin:/bin"))
    assert result.stdout.splitlines()[1] == f"--quiet|--master_port|0|{ppo}|r.yaml|"


def test_ppo_as_shell_uses_an_active_environment_that_has_deepspeed(ppo: Path, tmp_path: Path):
    write_stub(ppo.parent.parent / ".venv/bin/deepspeed", PRINT_ARGUMENTS)
    active = tmp_path / "active"
    env = clean_env(PATH=f"{active}/bin:/usr/bin:/bin", VIRTUAL_ENV=str(active))
    without = run(["bash", str(ppo), "r.yaml"], env=env)  # it has no deepspeed yet, so the repo's is used
    assert without.stdout.startswith(str(ppo.parent.parent))
    write_stub(active / "bin/deepspeed", PRINT_ARGUMENTS)
    assert run(["bash", str(ppo), "r.yaml"], env=env).stdout.startswith(str(active))


def test_ppo_as_shell_without_deepspeed_names_the_setup_command(ppo: Path):
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
    """The documented command for clusters without passwordless ssh, with both "machines" on this one."""
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
