"""Runs of several ranks by the real launcher: killed, hung, stopped, resumed on another number of ranks."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from resumable import RESUMABLE, with_reward
from support import ROOT, environment, free_port, launch, write_recipe

from extensions.distributed import signals
from extensions.runs.checkpoint import checkpoint_folders
from extensions.runs.main import main


@pytest.fixture
def launched():
    """`launched(recipe, ranks, log)`; processes that remain are killed at the end."""
    started = []

    def start(path: Path, *args) -> subprocess.Popen:
        started.append(path)
        return _launched(path, *args)

    yield start
    for path in started:
        for process in _processes_of(path):
            process.kill()


def _processes_of(path: Path) -> list:
    return [p for p in psutil.process_iter(["cmdline"]) if str(path) in (p.info["cmdline"] or [])]


def _launched(path: Path, ranks: int, log: Path, program: tuple[str, ...] = ()) -> subprocess.Popen:
    """A run by the real launcher, in its own session."""
    port = str(free_port())
    own = environment() | {"NPROC": str(ranks), "MASTER_PORT": port}
    deepspeed = ("deepspeed", "--num_accelerators", str(ranks), "--master_port", port)
    command = [*(program or deepspeed), "launch/ppo.sh", str(path)]
    with log.open("w") as file:
        return subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=own, cwd=ROOT, start_new_session=True
        )


def ranks_of(path: Path) -> dict[int, int]:
    """Rank -> process of the runs of a recipe."""
    found = {}
    for process in _processes_of(path):
        rank = next((part for part in process.info["cmdline"] if part.startswith("--local_rank=")), None)
        if rank:
            found[int(rank.partition("=")[2])] = process.pid
    return found


def wait_for(condition, seconds: float = 300):
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "the condition was not met"
        time.sleep(0.05)
    return value


def steps_of(path: Path) -> int:
    metrics = path.parent / "run" / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def endless(tmp_path, tiny_model, **more):
    return write_recipe(
        tmp_path,
        tiny_model("llama"),
        output_dir=str(tmp_path / "run"),
        max_steps=100000,
        evaluation={"before": False, "max_samples": 2},
        checkpoint={"every_steps": 5},
        logging={"tensorboard": False},
        **more,
    )


@pytest.mark.slow
def test_a_run_killed_at_its_start_does_not_block_later_runs(tmp_path, tiny_model):
    """torch's lock of a C++ op, as left by a process that is killed while it loads the op."""
    path = write_recipe(tmp_path, tiny_model("llama"), output_dir=str(tmp_path / "run"), max_steps=1)
    folder = os.environ.get("TORCH_EXTENSIONS_DIR", os.path.join(sys.prefix, "torch_extensions"))  # as a run sets it
    lock = Path(folder) / "deepspeed_shm_comm" / "lock"
    assert lock.parent.is_dir()
    lock.touch()
    try:
        assert launch(path).returncode == 0
        assert not lock.exists()
    finally:
        lock.unlink(missing_ok=True)


@pytest.mark.slow
def test_ranks_stop_when_their_launcher_is_gone(launched, tmp_path, tiny_model):
    """`kill` of the deepspeed command ends that process alone."""
    path, log = endless(tmp_path, tiny_model), tmp_path / "log"
    run = launched(path, 1, log)
    wait_for(lambda: steps_of(path) > 1)
    run.kill()
    run.wait()
    wait_for(lambda: not ranks_of(path))
    assert "stopped (the launcher has gone); resume with: " in log.read_text()
    assert checkpoint_folders(tmp_path / "run")[-1].name == f"step-{steps_of(path)}"


@pytest.mark.slow
def test_non_finite_values_on_one_rank_stop_all_ranks(tmp_path, tiny_model):
    reward = with_reward(tmp_path, "return (3e38 if os.environ['RANK'] == '1' else 1.0) * (1 - len(text) % 2 / 9)")
    path = write_recipe(tmp_path, tiny_model("llama"), output_dir=str(tmp_path / "run"), reward=reward, **RESUMABLE)
    done = launch(path, "ppo.whiten=false", "ppo.kl.init=0", ranks=2)
    assert done.returncode == 4, done.stdout + done.stderr
    assert "rank 1: infinity in" in done.stderr and "rank 0: infinity" not in done.stderr
    failed = tmp_path / "run" / "failed" / "step-1"
    assert {p.name for p in failed.iterdir()} >= {"rank-0.json", "rank-1.json", "weights.safetensors"}


@pytest.mark.slow
def test_another_number_of_ranks(launched, tmp_path, tiny_model):
    path = endless(tmp_path, tiny_model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(signals, "requested", lambda: "SIGTERM" if steps_of(path) == 2 else None)
        assert main([str(path)]) == 0
    log = tmp_path / "log"
    run = launched(path, 2, log, ("bash",))
    wait_for(lambda: steps_of(path) > 2)
    run.send_signal(signal.SIGTERM)
    assert run.wait(timeout=300) == 0
    where = "ZeRO stage 0 on"
    assert f"was written with {where} 1 rank, this run has {where} 2 ranks: it resumes, but not" in log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("job", [7, 10], ids=["PPO, two ranks, Adafactor, own critic", "SFT, Adafactor"])
def test_killed_stopped_and_damaged_runs_are_bit_identical(job, tmp_path):
    """A fault of each kind; `python tests/faults/faults.py` makes many, with every kind of run."""
    command = [sys.executable, "tests/faults/faults.py", "--jobs", str(job), "--number", "1", "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    counts = dict(line.strip().split(": ", 1) for line in done.stdout.partition("in all")[2].strip().splitlines())
    assert {"kill", "stop", "corrupt"} <= counts.keys()  # fill needs the right to mount a file system
    assert '"kills": 1' in counts["kill"] and '"reported": 1' in counts["corrupt"]
    assert '"resumed with other keys": 1' in counts["change"]
    assert '"extended": 1' in counts["extend"] and '"forked": 1' in counts["fork"]
