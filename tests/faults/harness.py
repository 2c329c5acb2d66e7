"""Small real runs that are forked from this process, ended at any change of their folder, and compared bit for bit.

This process has imported everything, so a run of the tiny model takes seconds.
"""

from __future__ import annotations

import io
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import matplotlib.pyplot  # noqa: E402, F401 # now, not in each child
import torch  # noqa: E402
import yaml  # noqa: E402
from conftest import tiny_config, tiny_tokenizer  # noqa: E402
from resumable import reproducible  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from support import free_port, timeless  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from extensions.common.files import read_json, read_jsonl  # noqa: E402
from extensions.runs.checkpoint import checkpoint_folders, verify_checkpoint  # noqa: E402
from extensions.runs.main import main as run_main  # noqa: E402

STEPS = 4


def make_model(folder: Path) -> Path:
    """The tests' tiny Llama: two layers, random."""
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_config("llama", len(tokenizer)), dtype=torch.float32).save_pretrained(folder)
    return folder


# -------------------------------------------------------------------------------------------------------- one run


@dataclass(frozen=True)
class Job:
    """A small run: what is trained, how, on how many ranks."""

    method: str = "ppo"
    optimizer: str = "adamw"
    critic: str = "shared"
    ranks: int = 1
    zero_stage: int = 0

    @property
    def name(self) -> str:
        critic = f", {self.critic} critic" if self.method == "ppo" else ""
        stage = f", ZeRO {self.zero_stage}" if self.zero_stage else ""
        return f"{self.method}, {self.optimizer}{critic}, {self.ranks} rank{'s' if self.ranks > 1 else ''}{stage}"

    def recipe(self, folder: Path, model: Path, /, **more: Any) -> Path:
        """With everything on that a checkpoint must hold: validation, early stopping, dropout, adaptive KL."""
        content: dict[str, Any] = {
            "name": "faults",
            "max_steps": STEPS,
            "output_dir": str(folder / "run"),
            "model": {"path": str(model)},
            "lora": {"rank": 2, "dropout": 0.1},
            "data": {"tasks": ["acceptability"], "max_train_samples": 64},
            "rollout": {"response_budget": [2, 4]},
            "ppo": {"batch_size": 4, "micro_batch_size": 2, "epochs": 2, "mini_batch_size": 2, "critic": self.critic},
            "sft": {"batch_size": 4, "micro_batch_size": 2, "optimizer": self.optimizer, "max_steps": STEPS},
            "optimizer": {"name": self.optimizer, "lr": 1e-2},
            "deepspeed": {"zero_stage": self.zero_stage, "timeout": 60},
            "evaluation": {"max_samples": 4, "batch_size": 2, "every_steps": 2, "validation_samples": 2, "patience": 9},
            "checkpoint": {"every_steps": 1},
            "logging": {"tensorboard": False},
            "reward": str(Path(__file__).parent / "noisy_reward.py"),
        }
        for key, value in more.items():
            content[key] = {**content.get(key, {}), **value} if isinstance(value, dict) else value
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(content))
        return path


@dataclass
class Running:
    """The ranks of a run, as child processes of this one."""

    pids: list[int]
    log: Path
    statuses: dict[int, int] = field(default_factory=dict)  # rank -> exit status, negative: signal

    def poll(self) -> bool:
        """Whether a rank still runs."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.statuses:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self.statuses[rank] = os.waitstatus_to_exitcode(status)
        return len(self.statuses) < len(self.pids)

    def send(self, number: int) -> None:
        for rank, pid in enumerate(self.pids):
            if rank not in self.statuses:
                with suppress(ProcessLookupError):
                    os.kill(pid, number)

    def wait(self, timeout: float = 600) -> list[int]:
        """Exit status of each rank. A rank that ends otherwise than well takes the others down at once."""
        end = time.monotonic() + timeout
        while self.poll():
            if any(self.statuses.values()):
                self.send(signal.SIGKILL)
            if time.monotonic() > end:
                self.send(signal.SIGKILL)
                raise AssertionError(f"a run hangs; its log:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.005)
        return [self.statuses[rank] for rank in range(len(self.pids))]


def start(recipe: Path, job: Job, prepare: Callable[[int], None] = lambda rank: None) -> Running:
    """Fork the ranks of a run.

    Args:
        prepare: is called in each child, with its rank, before the run.
    """
    port, log, pids = free_port(), recipe.with_name("log.txt"), []
    for rank in range(job.ranks):
        pid = os.fork()
        if pid == 0:
            status = 99
            try:
                _child(log)
                os.environ.update(
                    RANK=str(rank),
                    LOCAL_RANK=str(rank),
                    WORLD_SIZE=str(job.ranks),
                    MASTER_ADDR="127.0.0.1",
                    MASTER_PORT=str(port),
                )
                prepare(rank)
                status = run_main([str(recipe)], job.method)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                with suppress(Exception):
                    from extensions.distributed.openrlhf import remove_shared_memory

                    remove_shared_memory()
                os._exit(status)
        pids.append(pid)
    return Running(pids, log)


def _child(log: Path) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)


# --------------------------------------------------------------------------------------------------- fault points


class FaultPoint:
    """Counts what changes the run folder, and ends the process by SIGKILL at the n-th change.

    A change is an opened file, a rename, a removal or a new folder (Python's audit events, which come before the
    change), an fsync, and the middle of each write of tensors, text and records.
    """

    EVENTS = {"os.rename": 1, "os.remove": 0, "os.rmdir": 0, "os.mkdir": 0, "os.truncate": 0}

    def __init__(self, folder: Path, die_at: int | None, count_to: Path | None = None) -> None:
        self.folder, self.die_at, self.count_to, self.seen = str(folder), die_at, count_to, 0

    def install(self) -> None:
        sys.addaudithook(self._audit)
        save, sync, write = torch.save, os.fsync, os.write

        def torn_save(content: Any, file: Any, *args: Any, **kwargs: Any) -> None:
            if not hasattr(file, "write"):
                return save(content, file, *args, **kwargs)
            whole = io.BytesIO()
            save(content, whole, *args, **kwargs)
            data = whole.getvalue()
            file.write(data[: len(data) // 2])
            file.flush()
            self.change()
            file.write(data[len(data) // 2 :])

        def counted_sync(handle: int) -> None:
            self.change()
            sync(handle)

        def torn_write(handle: int, data: bytes) -> int:
            if len(data) < 2 or handle < 3:
                return write(handle, data)
            written = write(handle, data[: len(data) // 2])
            self.change()
            return written

        torch.save, os.fsync, os.write = torn_save, counted_sync, torn_write  # type: ignore[assignment]

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if (
                isinstance(path, str)
                and path.startswith(self.folder)
                and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            ):
                self.change()
        elif event in self.EVENTS and str(arguments[self.EVENTS[event]]).startswith(self.folder):
            self.change()

    def change(self) -> None:
        self.seen += 1
        if self.seen == self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.count_to is not None:
            with suppress(OSError):
                handle = os.open(self.count_to, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
                os.pwrite(handle, str(self.seen).encode(), 0)
                os.close(handle)


# ------------------------------------------------------------------------------------------------- what it leaves


def fingerprint(run: Path) -> dict[str, Any]:
    """Everything that a finished run leaves, without clocks. Raises where a file is torn."""
    scores = read_json(run / "eval.json")
    scores["training"].pop("seconds")
    # Without clocks; a kill between the record of a change and its effect records it once more.
    told = [{**record, "time": None} for record in scores["training"].pop("changes", [])]
    scores["training"]["changes"] = [record for k, record in enumerate(told) if record not in told[:k]]
    last = checkpoint_folders(run)[-1]
    state = read_json(last / "run.json")
    state.pop("seconds")
    for one in (scores, state["scores"]):
        one["yardsticks"] = reproducible(one["yardsticks"])
    assert verify_checkpoint(last) == [], verify_checkpoint(last)
    left: dict[str, Any] = {
        "metrics": timeless(run / "metrics.jsonl"),
        "rollouts": read_jsonl(run / "rollouts.jsonl") if (run / "rollouts.jsonl").exists() else [],
        "validation": timeless(run / "validation.jsonl"),
        "scores": scores,
        "predictions": {path.name: read_jsonl(path) for path in sorted(run.glob("predictions_*.jsonl"))},
        "adapter": load_file(run / "adapter" / "adapter_model.safetensors"),
        "critic": {path.name: load_file(path) for path in sorted((run / "critic").rglob("*.safetensors"))},
        "last checkpoint": last.name,
        "state": state,
        "suspects": (run / "label_suspects.csv").read_text(),
        "checkpoint": {
            path.name: torch.load(path, weights_only=False, map_location="cpu") for path in sorted(last.glob("*.pt"))
        },
        "best": {path.name: load_file(path) for path in sorted(last.glob("*.safetensors"))},
    }
    for content in left["checkpoint"].values():
        # ZeRO 3 fills its flat weights up to the number of ranks with whatever was in memory, and never reads that. The
        # weights themselves are compared above.
        content.get("optimizer_state_dict", {}).pop("fp32_flat_groups", None)
    steps = [line["step"] for line in left["metrics"]]
    assert steps == list(range(1, len(steps) + 1)), f"steps of metrics.jsonl: {steps}"
    # Files that are written once more, or removed, after the run is finished, and with it what a kill may leave then.
    late = ("status.json.tmp", "report.html.tmp", "predictions_after.part-0.jsonl", "predictions_after.part-1.jsonl")
    for stray in ("*.tmp", "*.part-*", "checkpoints/writing-*"):
        assert all(path.name in late for path in run.glob(stray)), list(run.glob(stray))
    return left


def differences(a: Any, b: Any, place: str = "") -> list[str]:
    """Where two fingerprints differ; tensors must be equal bit for bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = (
            a.dtype == b.dtype
            and a.shape == b.shape
            and torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))
            if a.numel()
            else a.shape == b.shape
        )
        return [] if same else [place]
    if isinstance(a, dict) and isinstance(b, dict):
        if list(a) != list(b):
            return [f"{place}: keys {sorted(map(str, set(a) ^ set(b)))}"]
        return [d for key in a for d in differences(a[key], b[key], f"{place}/{key}")]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        if len(a) != len(b):
            return [f"{place}: {len(a)} against {len(b)}"]
        return [d for k, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{place}[{k}]")]
    if type(a).__module__.partition(".")[0] in ("deepspeed", "torch") and hasattr(a, "__dict__"):
        return differences(vars(a), vars(b), place)
    return [] if a == b or (a != a and b != b) else [f"{place}: {str(a)[:80]} against {str(b)[:80]}"]


# --------------------------------------------------------------------------------------------------------- trials


@dataclass
class Tally:
    """What was done to runs, and what came of it."""

    counts: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)  # what should not have happened

    def add(self, other: Tally) -> None:
        self.counts.update(other.counts)
        self.lost += other.lost


@dataclass
class Bench:
    """A job, its tiny model, and the folder of an undisturbed run."""

    job: Job
    folder: Path
    model: Path
    rng: random.Random

    def __post_init__(self) -> None:
        start_time = time.monotonic()
        whole = self.undisturbed("whole")
        self.seconds = time.monotonic() - start_time
        self.changes = int((whole / "changes").read_text())
        self.whole = fingerprint(whole / "run")

    def undisturbed(self, name: str, **more: Any) -> Path:
        """The folder of a run that nothing disturbs, which may hold a run already."""
        folder = self.folder / name
        recipe = self.job.recipe(folder, self.model, **more)
        counter = FaultPoint(folder / "run", None, folder / "changes")
        statuses = start(recipe, self.job, lambda rank: counter.install() if rank == 0 else None).wait()
        if any(statuses):
            raise AssertionError(f"{self.job.name}, {name}: {statuses}\n{(folder / 'log.txt').read_text()[-3000:]}")
        return folder

    def strike(self, recipe: Path, tally: Tally, changes: int | None = None) -> bool:
        """Start a run and kill it: inside a change of its folder, or at a random moment. False: it ended before.

        Args:
            changes: that the run makes; None: as many as the undisturbed one.
        """
        folder, changes = recipe.parent, changes or self.changes
        if self.rng.random() < 0.7:
            victim, at = self.rng.randrange(self.job.ranks), self.rng.randint(1, changes)
            at = at if victim == 0 else self.rng.randint(1, 20)
            point = FaultPoint(folder / "run", at)
            running = start(recipe, self.job, lambda rank: point.install() if rank == victim else None)
            kind = "in a change"
        else:
            running = start(recipe, self.job)
            time.sleep(self.rng.uniform(0.1, self.seconds * changes / self.changes))
            running.poll()
            running.send(signal.SIGKILL)
            kind = "at a moment"
        statuses = running.wait()
        if not any(statuses):
            return False
        # Others may notice that a rank is gone before they are killed as well.
        if -signal.SIGKILL not in statuses:
            tally.lost.append(f"{self.job.name}: ended with {statuses} ({folder})")
        tally.counts["kills"] += 1
        tally.counts[f"kills {kind}"] += 1
        return True

    def compare(self, folder: Path, tally: Tally, what: str, expected: dict[str, Any] | None = None) -> None:
        """Count whether a run that was disturbed left what one that was not did."""
        try:
            found = differences(self.whole if expected is None else expected, fingerprint(folder / "run"))
        except Exception as error:
            found = [f"{type(error).__name__}: {error}"]
        tally.counts["the same bits in the end"] += not found
        if found:
            tally.lost.append(f"{self.job.name}, {what}: {'; '.join(found[:3])} ({folder})")

    def resume(self, recipe: Path, tally: Tally, what: str) -> bool:
        statuses = start(recipe, self.job).wait()
        tally.counts["resumed"] += 1
        if any(statuses):
            tally.lost.append(f"{self.job.name}, {what}: resuming ended with {statuses} ({recipe.parent})")
        return not any(statuses)


def tidy(folder: Path, tally: Tally) -> None:
    """Keep only what shows a loss."""
    if not any(str(folder) in text for text in tally.lost):
        shutil.rmtree(folder)
