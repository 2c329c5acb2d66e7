"""launch/setup.sh and the pinned sets, without network: installs go to stub interpreters that count their calls."""

import os
import re
import subprocess
from pathlib import Path

import pytest
from launch_tree import VENV_PYTHON_STUB, Tree, run, write_stub


def fails_with(result: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert result.returncode == 1, result.stderr
    message = result.stderr.strip().splitlines()[-1]
    assert message.startswith("setup: ")
    for part in parts:
        assert part in message


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


def test_setup_recreates_a_moved_environment(tree: Tree):
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


def test_setup_uses_the_users_compiler(tree: Tree):
    (tree.bin / "c++").rename(tree.bin / "clang++")
    assert tree.setup(CXX="clang++").returncode == 0


def test_setup_without_python(tree: Tree):
    (tree.bin / "python3.11").unlink()
    fails_with(tree.setup(), "Python 3.11 or 3.12 is needed", "found: none", "PYTHON=")


@pytest.mark.parametrize("version", ["3.10", "3.13"])
def test_setup_with_another_python(tree: Tree, version: str):
    (tree.bin / "python3.11").rename(tree.bin / "python3")
    fails_with(tree.setup(STUB_VERSION=version), "Python 3.11 or 3.12 is needed", f"python3 ({version})")


def test_setup_uses_only_the_python_that_is_set(tree: Tree):
    fails_with(tree.setup(PYTHON="/nowhere/python"), "Python 3.11 or 3.12 is needed", "found: none")
    (tree.bin / "python3.11").rename(tree.bin / "my python")
    assert tree.setup(PYTHON=str(tree.bin / "my python")).returncode == 0


def test_setup_skips_a_python_that_does_not_run(tree: Tree):
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
    "pip_output",
    [
        "WARNING: Retrying after connection broken by 'NewConnectionError(...)'",
        "ERROR: Could not find a version that satisfies the requirement torch==2.13.0 (from versions: none)",
    ],
    ids=["no network", "empty registry"],
)
def test_setup_without_registry(tree: Tree, pip_output: str):
    result = tree.setup(STUB_PIP_SAYS=pip_output)
    fails_with(result, "registry could not be reached", "PIP_INDEX_URL", ".venv/install.log")
    assert pip_output in (tree.root / ".venv/install.log").read_text()


def test_setup_picks_the_gpu_set(tree: Tree):
    write_stub(tree.bin / "nvidia-smi", "#!/usr/bin/env bash\necho 'GPU 0: Some GPU (UUID: GPU-1)'\n")
    write_stub(tree.bin / "nvcc", "#!/usr/bin/env bash\n")
    assert tree.setup().returncode == 0
    # flash-attn needs torch for its build, so it is installed last.
    assert tree.pip_installs()[-1].endswith("flash-attn==2.8.3")
    packages = (tree.root / ".venv/requirements.txt").read_text()
    assert "\nvllm==" in packages
    assert "\nflash-attn==" not in packages


def test_setup_installs_deepspeeds_launcher_without_its_noise(tree: Tree):
    assert tree.setup().returncode == 0
    script = tree.root / ".venv/bin/deepspeed"
    assert os.access(script, os.X_OK)
    lines = script.read_text().splitlines()
    assert lines[0] == f"#!{tree.root}/.venv/bin/python" and f"'{tree.root}'" in lines[2]
    assert "extensions.distributed.launcher" in lines[3]


def test_setup_without_nvcc_reports_that_flash_attn_is_left_out(tree: Tree):
    result = tree.setup(NLU_DEVICE="gpu")
    assert result.returncode == 0
    assert "flash-attn is left out" in result.stderr
    assert not any("flash-attn" in call for call in tree.pip_installs())


@pytest.mark.parametrize(
    "machine, installed",
    [("x86_64-pc-linux-gnu", True), ("aarch64-unknown-linux-gnu", False), ("arm64-apple-darwin23", False)],
)
def test_atheris_is_installed_on_platforms_with_wheels(tree: Tree, machine: str, installed: bool):
    assert tree.setup(MACHTYPE=machine).returncode == 0
    assert ("\natheris==" in (tree.root / ".venv/requirements.txt").read_text()) == installed


def test_setup_rejects_an_unknown_device(tree: Tree):
    fails_with(tree.setup(NLU_DEVICE="tpu"), "NLU_DEVICE=tpu", "cpu or gpu")


def test_a_driver_without_gpus_is_a_cpu_machine(tree: Tree):
    write_stub(tree.bin / "nvidia-smi", "#!/usr/bin/env bash\necho 'No devices found.'\nexit 6\n")
    assert tree.setup().returncode == 0
    assert "\nvllm==" not in (tree.root / ".venv/requirements.txt").read_text()


@pytest.mark.parametrize("finished, status", [(True, 0), (False, 0), (False, 2)])
def test_the_quickstart_prints_the_next_commands(tree: Tree, tmp_path: Path, finished: bool, status: int):
    """They need the adapter, which a stopped or failed run does not have."""
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
