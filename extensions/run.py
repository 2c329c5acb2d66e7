"""The run folder: what a run leaves, and what it tells while it goes.

recipe.yaml        the resolved recipe
versions.json      packages, platform, git commit
metrics.jsonl      one line an iteration
rollouts.jsonl     some responses of each iteration
validation.jsonl   scores of the validations
eval.json          before and after, per task; what was trained
reward_curve.png   the paper's figure 2
tensorboard/       event files
adapter/           PEFT adapter and model card
critic/            value head, and the critic's adapter if it has one
checkpoints/       resume points
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from extensions import __version__
from extensions.errors import UserError
from extensions.recipe import Recipe, dump_recipe

PACKAGES = ("torch", "transformers", "deepspeed", "openrlhf", "peft", "datasets", "flash-attn", "vllm", "ray", "numpy")


def versions() -> dict[str, Any]:
    """Everything a result may depend on outside the recipe."""
    packages: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = None
    return {
        "extensions": __version__,
        "git": _git("rev-parse", "HEAD"),
        "git_dirty": bool(_git("status", "--porcelain")),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "packages": packages,
    }


def adapter_hash(folder: str | None) -> str | None:
    """sha256 of a PEFT adapter's settings and weights; None without one, or where its files are missing."""
    digest = hashlib.sha256()
    try:
        for name in ("adapter_config.json", "adapter_model.safetensors") if folder is not None else ():
            digest.update((Path(str(folder)) / name).read_bytes())
    except OSError:
        return None
    return digest.hexdigest() if folder is not None else None


def _git(*arguments: str) -> str | None:
    try:
        here = Path(__file__).parent
        done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


class RunFolder:
    """Writes the records of a run; made by rank 0 alone.

    Opening a folder in which a run stopped goes on from its last checkpoint, if the recipe is the same. A folder with
    a finished run, or one that left no checkpoint, is set aside under a new name: nothing is overwritten.
    """

    def __init__(self, root: Path, recipe: Recipe) -> None:
        self.root = root
        self.set_aside: Path | None = None
        try:
            if (root / "recipe.yaml").exists() and not self._continues(recipe):
                self.set_aside = _free_name(root)
                root.rename(self.set_aside)
            root.mkdir(parents=True, exist_ok=True)
            write_text(root / "recipe.yaml", dump_recipe(recipe))
            write_json(root / "versions.json", versions() | {"adapter_sha256": adapter_hash(recipe.model.adapter)})
        except OSError as error:
            raise UserError(
                f"output_dir: cannot write to {root} ({error.strerror or error}); choose another folder"
            ) from error
        self._files: dict[str, IO[str]] = {}
        self._trackers: list[Any] = []

    def _continues(self, recipe: Recipe) -> bool:
        """Whether the run in the folder is to be resumed. Refuses another recipe, since its bits would differ."""
        if is_finished(self.root):
            return False
        # Of evaluations, and of encoders: tasks that are finished, epochs of the one that is not.
        patterns = ("*.part-*.jsonl", "tasks/*.json", "checkpoints/*/checkpoint-*")
        parts = [path for pattern in patterns for path in self.root.glob(pattern)]
        if newest_checkpoint(self.root) is None and not parts:
            return False
        old = yaml.safe_load((self.root / "recipe.yaml").read_text(encoding="utf-8"))
        if not isinstance(old, dict):
            raise UserError(
                f"{self.root / 'recipe.yaml'} is damaged, so the run cannot be resumed; choose another output_dir"
            )
        was, now = read_json(self.root / "versions.json").get("adapter_sha256"), adapter_hash(recipe.model.adapter)
        if was != now:
            raise UserError(
                f"{self.root} holds an unfinished run with another adapter: {recipe.model.adapter} has changed since "
                "(sha256). Put the old one back to go on, or choose another output_dir"
            )
        new = yaml.safe_load(dump_recipe(recipe))
        changed = [f"  {key}: was {a!r}, is {b!r}" for key, a, b in _differences(old, new) if key != "output_dir"]
        if changed:
            raise UserError(
                f"{self.root} holds an unfinished run of another recipe; to resume it, use the same recipe, and to "
                "start afresh, choose another output_dir. Changed keys:\n" + "\n".join(changed)
            )
        return True

    # ------------------------------------------------------------------------------------------------- records

    def append(self, name: str, records: Sequence[dict[str, Any]]) -> None:
        """Add lines to a JSONL file of the folder."""
        if name not in self._files:
            self._files[name] = (self.root / name).open("a", encoding="utf-8")
        file = self._files[name]
        file.write(jsonl(records))
        file.flush()

    def cut_back(self, step: int) -> None:
        """Drop what was recorded after `step`, before a run resumes from its checkpoint."""
        for name in ("metrics.jsonl", "rollouts.jsonl", "validation.jsonl"):
            path = self.root / name
            if path.exists():
                write_jsonl(path, [record for record in read_jsonl(path) if record["step"] <= step])

    def start_trackers(self, recipe: Recipe) -> None:
        """TensorBoard, and those that the recipe asks for."""
        config = recipe.model_dump(mode="json")
        if recipe.logging.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._trackers.append(_TensorBoard(SummaryWriter(str(self.root / "tensorboard"))))
        for name in ("wandb", "trackio"):
            if getattr(recipe.logging, name):
                try:
                    tracker = importlib.import_module(name)
                except ImportError as error:
                    raise UserError(f"logging.{name}: true, but {name} is not installed: pip install {name}") from error
                tracker.init(project="nlu-ppo", name=recipe.name, config=config)
                self._trackers.append(tracker)

    def metrics(self, record: dict[str, Any]) -> None:
        """One line of metrics.jsonl, and the same numbers to the trackers."""
        self.append("metrics.jsonl", [record])
        numbers = {k: v for k, v in _flat(record) if isinstance(v, (int, float)) and k != "step"}
        for tracker in self._trackers:
            tracker.log(numbers, step=record["step"])

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        for tracker in self._trackers:
            tracker.finish()


class _TensorBoard:
    """TensorBoard behind the two calls that wandb and trackio share."""

    def __init__(self, writer: Any) -> None:
        self.writer = writer

    def log(self, numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name.replace(".", "/"), value, step)

    def finish(self) -> None:
        self.writer.close()


def write_text(path: Path, content: str) -> None:
    """Write whole or not at all."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(content, encoding="utf-8")
    temporary.replace(path)


def write_json(path: Path, content: Any) -> None:
    """JSON, whole or not at all; NaN and infinity become null."""
    write_text(path, json.dumps(_finite(content), indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """One record a line, whole or not at all."""
    write_text(path, jsonl(records))


def jsonl(records: Sequence[dict[str, Any]]) -> str:
    """One record a line; NaN and infinity become null."""
    return "".join(json.dumps(_finite(record), ensure_ascii=False) + "\n" for record in records)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The records of a JSONL file; a last line that a killed run left unfinished is dropped."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def is_finished(root: Path) -> bool:
    """Whether the run in a folder came to its end: it has scores after training, or of its evaluation."""
    return (root / "eval.json").exists() and "after" in read_json(root / "eval.json")


def newest_checkpoint(root: Path) -> Path | None:
    """Folder of the last complete checkpoint; unfinished ones have other names."""
    found = _checkpoints(root)
    return found[-1] if found else None


def prune_checkpoints(root: Path, keep: int) -> None:
    for path in _checkpoints(root)[:-keep]:
        shutil.rmtree(path)


def _checkpoints(root: Path) -> list[Path]:
    """Folders of the complete checkpoints of a run, oldest first."""
    return sorted((root / "checkpoints").glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))


def _free_name(path: Path) -> Path:
    number = 1
    while (other := path.with_name(f"{path.name}.old{number}")).exists():
        number += 1
    return other


def _finite(value: Any) -> Any:
    """JSON has no NaN or infinity: null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, (list, tuple)) else value


def _flat(record: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in record.items():
        pairs += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
    return pairs


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    a, b = dict(_flat(old)), dict(_flat(new))
    return [(key, a.get(key), b.get(key)) for key in sorted({*a, *b}) if a.get(key) != b.get(key)]


# ------------------------------------------------------------------------------------------------------- console


class Reporter:
    """What a run prints: a live bar on a terminal, one quiet line an iteration elsewhere. Silent but on rank 0."""

    def __init__(self, active: bool) -> None:
        self.active = active
        width = None if sys.stdout.isatty() else 120
        self.console = Console(file=sys.stdout, width=width, highlight=False, quiet=not active)
        self._bar: Progress | None = None
        self._started = self._spoke = time.monotonic()

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        self.console.print(f"warning: {text}", style="yellow", markup=False, soft_wrap=True)

    def progress(self, done: int, total: int) -> None:
        """How far an evaluation is, at most once a minute."""
        if done == 0:
            self._spoke = time.monotonic()
        elif time.monotonic() - self._spoke >= 60:
            self._spoke = time.monotonic()
            self.say(f"  {done} of {total} rows")

    def begin(self, total: int, first: int) -> None:
        """Start the progress of `total` iterations, of which `first` are done."""
        self._started, self._first, self._total = time.monotonic(), first, total
        if self.active and self.console.is_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
            self._bar = Progress(*columns, console=self.console)
            self._bar.start()
            self._task = self._bar.add_task("", total=total, completed=first)

    def step(self, record: dict[str, Any]) -> None:
        """Show the metrics of one iteration."""
        done = record["step"]
        seconds = time.monotonic() - self._started
        eta = seconds / max(1, done - self._first) * (self._total - done)
        if "reward_mean" not in record:
            self._show(
                done,
                f"loss {record['loss']:.3f}  of the answer {record['answer_loss']:.3f}  "
                f"{record['samples_per_s']:.1f} samples/s  ETA {_clock(eta)}",
            )
            return
        shares = " ".join(f"{name} {share:.0%}" for name, share in record["predicted_shares"].items())
        kl = "-" if record["kl"] is None else f"{record['kl']:.2f}"
        accuracy = "" if record["accuracy"] is None else f"acc {record['accuracy']:.2f}  "
        self._show(
            done,
            f"reward {record['reward_mean']:+.2f}  {accuracy}wrong format {record['format_error_rate']:.0%}  "
            f"kl {kl}  {shares}  {record['samples_per_s']:.1f} samples/s  ETA {_clock(eta)}",
        )

    def _show(self, done: int, line: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=done, description=line)
        else:
            self.say(f"step {done:>4}/{self._total}  {line}")

    def end(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


class CollapseWatch:
    """Notices a policy that gives one answer to everything, while the data do not.

    Looks at the classification answers of the last `window` samples of a task; speaks at most once in `window`.
    """

    def __init__(self, window: int = 160, share: float = 0.95) -> None:
        self.window, self.share = window, share
        self._answers: dict[str, deque[tuple[str, str]]] = {}
        self._quiet_until: Counter[str] = Counter()
        self._seen: Counter[str] = Counter()

    def add(self, task: str, answers: Sequence[tuple[str, str]]) -> str | None:
        """Take (answer, gold) pairs that have the right format; a warning when the task has collapsed."""
        recent = self._answers.setdefault(task, deque(maxlen=self.window))
        recent.extend(answers)
        self._seen[task] += len(answers)
        if len(recent) < self.window or self._seen[task] < self._quiet_until[task]:
            return None
        answer, count = Counter(a for a, _ in recent).most_common(1)[0]
        gold = max(Counter(g for _, g in recent).values())
        if count < self.share * self.window or gold > 0.85 * self.window:
            return None
        self._quiet_until[task] = self._seen[task] + self.window
        return (
            f"{task}: {count / self.window:.0%} of the last {self.window} answers are {answer!r}; the policy may have "
            "collapsed to one class. Try a larger ppo.batch_size, data.balanced: true, a lower optimizer.lr, a higher "
            "ppo.kl.init, or a small ppo.entropy_coef such as 0.01"
        )
