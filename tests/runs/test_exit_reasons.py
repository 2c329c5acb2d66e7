"""Real runs that end for an injected cause: the exit status, the cause that is named, and what status.json says."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from resumable import with_reward
from support import ROOT, environment, write_recipe

from extensions.common.run_lock import lock_folder
from extensions.common.status_file import read_status
from extensions.runs.checkpoint import checkpoint_folders, verify_checkpoint

pytestmark = pytest.mark.slow

NO_MEMORY = ("(out of memory", "lack of memory")  # "possibly", if another program was killed meanwhile
LATE = "calls += 1\nif calls > 40 and os.environ['RANK'] == '1':\n    "


@dataclass(frozen=True)
class Cause:
    """A run of 2 ranks under the `deepspeed` that setup.sh writes, and how it ends."""

    status: int
    says: tuple[str, ...]
    state: str | None = "crashed"  # of status.json
    inject: Callable[["Started"], None] | None = None  # after some steps
    before: Callable[[Path, list[str]], object] | None = None  # the start, with the folder and the launcher's options
    reward: str = "return len(text)"
    recipe: dict = field(default_factory=dict)
    program: str = "deepspeed"
    never: tuple[str, ...] = NO_MEMORY


@dataclass
class Started:
    process: subprocess.Popen
    recipe: Path
    log: Path

    @property
    def folder(self) -> Path:
        return self.recipe.parent / "run"

    def processes(self, word: str = "") -> list[int]:
        found = psutil.process_iter(["cmdline"])
        lines = [(p.pid, p.info["cmdline"] or []) for p in found]
        return [pid for pid, line in lines if str(self.recipe) in line and (not word or word in line)]

    def wait_for_steps(self, number: int = 3) -> None:
        metrics, end = self.folder / "metrics.jsonl", time.monotonic() + 300
        while not metrics.exists() or metrics.read_bytes().count(b"\n") < number:
            assert self.process.poll() is None and time.monotonic() < end, self.log.read_text()
            time.sleep(0.1)

    def end(self) -> str:
        """Kill what is left; the output."""
        for pid in self.processes():
            os.kill(pid, signal.SIGKILL)
        return self.log.read_text()


def start(folder: Path, model: Path, cause: Cause, options: list[str]) -> Started:
    sections = {"evaluation": {"before": False, "max_samples": 2}, "checkpoint": {"every_steps": 2}}
    sections |= {"logging": {"tensorboard": False}, "output_dir": str(folder / "run"), "max_steps": 100000}
    path = write_recipe(folder, model, reward=with_reward(folder, cause.reward), **sections | cause.recipe)
    own = environment() | {"NPROC": "2"}
    programs = folder / "bin"
    programs.mkdir()
    lines = [f"#!{sys.executable}", "import sys", f"sys.path.insert(0, {str(ROOT)!r})"]
    lines += ["from extensions.distributed.launcher import main", "main()", ""]
    (programs / "deepspeed").write_text("\n".join(lines))  # as setup.sh
    (programs / "deepspeed").chmod(0o755)
    own["PATH"] = f"{programs}{os.pathsep}{own['PATH']}"
    words = ["deepspeed", "--num_accelerators", "2", *options] if cause.program == "deepspeed" else [cause.program]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [*words, "launch/ppo.sh", str(path)], stdout=log, stderr=subprocess.STDOUT, env=own, cwd=ROOT,
            start_new_session=True,
        )  # fmt: skip
    return Started(process, path, folder / "log")


def take_port(folder: Path, options: list[str]) -> socket.socket:
    listener = socket.create_server(("127.0.0.1", 0))
    options += ["--master_port", str(listener.getsockname()[1])]
    return listener


def take_folder_and_port(folder: Path, options: list[str]) -> object:
    (folder / "run").mkdir()
    return lock_folder(folder / "run"), take_port(folder, options)


def kill_rank_1(run: Started) -> None:
    (pid,) = run.processes("--local_rank=1")
    os.kill(pid, signal.SIGKILL)


def kill_per_node_launcher(run: Started) -> None:
    (pid,) = run.processes("deepspeed.launcher.launch")
    os.kill(pid, signal.SIGKILL)
    run.process.wait(timeout=300)
    end = time.monotonic() + 300
    while run.processes():  # the ranks save and stop
        assert time.monotonic() < end
        time.sleep(0.1)


CAUSES = {
    "a rank is killed": Cause(
        247,
        ("error: a rank was killed by SIGKILL (", "resume with: deepspeed --num_a"),
        inject=kill_rank_1,
        never=(*NO_MEMORY, "Traceback"),
    ),
    "the per-node launcher is killed": Cause(
        247,
        ("error: DeepSpeed's per-node launcher, the parent of the ranks, was killed by SIGKILL (",),
        "stopped",
        kill_per_node_launcher,
    ),
    "a scheduler stops it": Cause(
        0,
        ("ppo.sh: stopping after this step", "stopped (SIGTERM); resume with: deepspeed --num_accelerators 2 "),
        "stopped",
        lambda run: run.process.send_signal(signal.SIGTERM),
        program="bash",
    ),
    "the port is taken": Cause(2, (f" is in use by process {os.getpid()} (",), None, before=take_port),
    "the folder is in use": Cause(
        2, (f"run: already running (process {os.getpid()} on ",), None, before=take_folder_and_port, never=("port",)
    ),
    "the disk is full": Cause(
        3,
        ("error: the disk is full (", "No space left on device"),
        reward="calls += 1\ndef full(*args): raise OSError(28, os.strerror(28))\n"
        "if calls > 40: os.write = full\nreturn len(text)",
        recipe={"checkpoint": {"every_steps": 0, "on_error": "stop"}},
    ),
    "an exception in rank 1 only": Cause(
        1,
        ("rank 1:\nTraceback", "ArithmeticError: injected"),
        reward=f"{LATE}from extensions.training import ppo\n"
        "    def fail(*args): raise ArithmeticError('injected')\n    ppo.PpoTrainer.iterate = fail\nreturn len(text)",
    ),
    "an invalid reward in rank 1 only": Cause(
        2,
        ("error: rank 1: ", "my_reward.py", "ValueError: injected"),
        reward=f"{LATE}raise ValueError('injected')\nreturn len(text)",
    ),
    "a hung rank": Cause(
        5,
        ("rank 1: no progress for", "my_reward.py"),
        reward=f"{LATE}time.sleep(10000)\nreturn len(text)",
        recipe={"deepspeed": {"timeout": 20}},
    ),
}


@pytest.mark.parametrize("name", CAUSES)
def test_the_cause_is_named(name, tmp_path, tiny_model):
    cause, options = CAUSES[name], []
    held = cause.before(tmp_path, options) if cause.before is not None else None
    run = start(tmp_path, tiny_model("llama"), cause, options)
    try:
        if cause.inject is not None:
            run.wait_for_steps()
            cause.inject(run)
        status = run.process.wait(timeout=300)
        left = run.processes()
    finally:
        output = run.end()
    assert status == cause.status and not left, output[-3000:]
    assert not any(verify_checkpoint(folder) for folder in checkpoint_folders(run.folder))
    assert [part for part in cause.says if part not in output] == [], output[-3000:]
    assert [part for part in cause.never if part in output] == [], output[-3000:]
    assert held is not None or "Traceback" not in output or "Traceback" in "".join(cause.says), output[-3000:]
    found = read_status(run.folder)
    assert (found and found["state"]) == cause.state, found
    assert found is None or found["exit_status"] == (0 if cause.state == "stopped" else cause.status), found


def test_two_runs_side_by_side(tmp_path, tiny_model):
    """Started at once, by both commands and without a port."""
    cause = Cause(0, ())
    runs = []
    try:
        for program in ("bash", "deepspeed"):
            (tmp_path / program).mkdir()
            runs.append(start(tmp_path / program, tiny_model("llama"), Cause(0, (), program=program), []))
        for run in runs:
            run.wait_for_steps()
        for run in runs:
            os.kill(run.processes("--local_rank=0")[0], signal.SIGTERM)
        assert [run.process.wait(timeout=300) for run in runs] == [cause.status] * 2
        for run in runs:
            assert "stopped (SIGTERM)" in run.log.read_text() and read_status(run.folder)["state"] == "stopped"
            assert verify_checkpoint(checkpoint_folders(run.folder)[-1]) == []
    finally:
        for run in runs:
            run.end()
