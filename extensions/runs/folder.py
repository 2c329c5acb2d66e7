"""The run folder: what a run leaves.

recipe.yaml        the resolved recipe
versions.json      packages, platform, git commit; hashes of what the run reads
metrics.jsonl      one line an iteration
rollouts.jsonl     some responses of each iteration
validation.jsonl   scores of the validations
eval.json          before and after, per task; what was trained. A finished run has "after" in it
reward_curve.png   the paper's figure 2
tensorboard/       event files
adapter/           PEFT adapter and model card
critic/            value head, and the critic's adapter if it has one
checkpoints/       resume points (`extensions.runs.checkpoint`)
failed/            batches with numbers that are none (`extensions.distributed.nonfinite`)
run.lock           who writes here, as long as it does
"""

from __future__ import annotations

import fcntl
import importlib
import importlib.metadata
import os
import secrets
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from extensions.common.errors import UserError
from extensions.common.files import JsonlAppender, filter_jsonl, read_json, write_json, write_text
from extensions.common.versions import versions
from extensions.recipe import MAY_CHANGE, Recipe, dump_recipe
from extensions.runs.checkpoint import folders, recover

LOCK = "run.lock"
RECORDS = ("metrics.jsonl", "rollouts.jsonl", "validation.jsonl")  # each line has its step


class RunFolder:
    """Writes the records of a run; made by rank 0 alone.

    Opening a folder in which a run stopped goes on from its last checkpoint, if the recipe and what it reads are the
    same. A folder with a finished run, or one that left no checkpoint, is set aside under a new name: nothing is
    overwritten.

    Args:
        inputs: name -> hash of what the run reads outside the recipe; None where it has none.
        warn: is told what the disk refuses.
    """

    def __init__(
        self, root: Path, recipe: Recipe, inputs: Mapping[str, str | None], warn: Callable[[str], None] = print
    ) -> None:
        self.root, self._warn, self._stops = root, warn, recipe.checkpoint.on_error == "stop"
        self.set_aside: Path | None = None
        self._lines: dict[str, JsonlAppender] = {}
        self._trackers: list[_Tracker] = []
        self._refused = False  # the disk, the last time
        known = versions() | {"inputs": dict(inputs), "run_id": secrets.token_hex(4)}
        try:
            lock = _lock(root) if (root / "recipe.yaml").exists() else None
            if lock is not None and self._continues(recipe, known):
                known["run_id"] = read_json(root / "versions.json").get("run_id", known["run_id"])
                self._lock = lock
            else:
                if lock is not None:
                    self.set_aside = _free_name(root)
                    root.rename(self.set_aside)
                root.mkdir(parents=True, exist_ok=True)
                self._lock = _lock(root)
                if lock is not None and self.set_aside is not None:
                    (self.set_aside / LOCK).unlink(missing_ok=True)
                    lock.close()
            write_text(root / "recipe.yaml", dump_recipe(recipe))
            write_json(root / "versions.json", known)
        except OSError as error:
            raise UserError(
                f"output_dir: cannot write to {root} ({error.strerror or error}); choose another folder"
            ) from error
        self._run_id = known["run_id"]

    def _continues(self, recipe: Recipe, now: Mapping[str, Any]) -> bool:
        """Whether the run in the folder is to be resumed. Refuses another one, since its bits would differ."""
        if is_finished(self.root):
            return False
        recover(self.root)
        # Of evaluations, and of encoders: tasks that are finished, epochs of the one that is not.
        patterns = ("*.part-*.jsonl", "tasks/*.json", "checkpoints/*/checkpoint-*")
        parts = [path for pattern in patterns for path in self.root.glob(pattern)]
        if not folders(self.root) and not parts:
            return False
        try:
            old = yaml.safe_load((self.root / "recipe.yaml").read_text(encoding="utf-8"))
        except (yaml.YAMLError, ValueError) as error:
            old = error
        if not isinstance(old, dict):
            raise UserError(
                f"{self.root / 'recipe.yaml'} is damaged, so the run cannot be resumed; put the recipe that ran back, "
                "or choose another output_dir"
            )
        before = read_json(self.root / "versions.json")
        if not isinstance(before, dict) or not isinstance(before.get("inputs"), dict):
            raise UserError(
                f"{self.root / 'versions.json'} is damaged, so the run cannot be resumed; choose another output_dir"
            )
        new = yaml.safe_load(dump_recipe(recipe))
        changed = [f"  {key}: was {a!r}, is {b!r}" for key, a, b in _differences(old, new) if not _may_change(key)]
        if changed:
            raise UserError(
                f"{self.root} holds an unfinished run of another recipe; to resume it, use the same recipe, and to "
                "start afresh, choose another output_dir. Changed keys:\n"
                + "\n".join(changed)
                + f"\nThese may change: {', '.join(MAY_CHANGE)}"
            )
        other = [name for name, digest in now["inputs"].items() if before["inputs"].get(name) != digest]
        if other:
            raise UserError(
                f"{self.root} holds an unfinished run, and what it read has changed since (sha256): "
                f"{', '.join(other)}. Put the old one back to go on, or choose another output_dir"
            )
        packages = [
            f"{name} was {before.get('packages', {}).get(name)}, is {version}"
            for name, version in now["packages"].items()
            if before.get("packages", {}).get(name) != version
        ]
        if packages:
            self._warn(f"other versions than when the run began, so its bits may differ: {'; '.join(packages)}")
        return True

    # ------------------------------------------------------------------------------------------------- records

    def append(self, name: str, records: Sequence[dict[str, Any]]) -> None:
        """Add lines to a JSONL file of the folder. What a full disk refuses is written later, with what comes next.

        Raises:
            OSError: the disk refuses, and the recipe says that the run then stops.
        """
        if name not in self._lines:
            self._lines[name] = JsonlAppender(self.root / name)
        try:
            self._lines[name].append(records)
        except OSError as error:
            if self._stops:
                raise
            if not self._refused:
                self._warn(
                    f"{self.root / name} cannot be written ({error.strerror}); the run goes on and keeps its records "
                    "in memory. Free some space"
                )
            self._refused = True
        else:
            if self._refused:
                self._warn(f"{self.root / name} can be written again; nothing is missing from it")
            self._refused = False

    def sync(self) -> None:
        """Bring all records to the disk itself. Raises OSError where it refuses."""
        for lines in self._lines.values():
            lines.sync()

    def cut_back(self, step: int, validated: int) -> None:
        """Drop what was recorded after a checkpoint, and lines that are damaged, before a run resumes from it.

        Args:
            validated: step of the last validation that the checkpoint knows of.
        """
        for name in RECORDS:
            if not (self.root / name).exists():
                continue
            steps: list[int] = []
            last = validated if name == "validation.jsonl" else step

            def wanted(record: dict[str, Any], steps: list[int] = steps, last: int = last) -> bool:
                if isinstance(record.get("step"), int) and record["step"] <= last:
                    steps.append(record["step"])
                    return True
                return False

            filter_jsonl(self.root / name, wanted)
            if name == "metrics.jsonl" and steps != list(range(1, step + 1)):
                self._warn(f"{self.root / name} was changed: it has {len(steps)} of {step} steps before the checkpoint")

    def start_trackers(self, recipe: Recipe, step: int) -> None:
        """TensorBoard, and those that the recipe asks for.

        Args:
            step: where the run goes on; a tracker that shows later ones of a killed session hides them if it can.
        """
        config = recipe.model_dump(mode="json")
        if recipe.logging.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            folder = str(self.root / "tensorboard")
            self._trackers.append(_TensorBoard(SummaryWriter(folder, purge_step=step + 1 if step else None)))
        for name in ("wandb", "trackio"):
            if getattr(recipe.logging, name):
                try:
                    tracker = importlib.import_module(name)
                except ImportError as error:
                    raise UserError(f"logging.{name}: true, but {name} is not installed: pip install {name}") from error
                own = {"id": f"{recipe.name}-{self._run_id}"} if name == "wandb" else {}
                tracker.init(project="nlu-ppo", name=recipe.name, config=config, resume="allow", **own)
                self._trackers.append(tracker)

    def metrics(self, record: dict[str, Any]) -> None:
        """One line of metrics.jsonl, and the same numbers to the trackers; one that fails is left out from then on."""
        self.append("metrics.jsonl", [record])
        numbers = {k: v for k, v in _flat(record) if isinstance(v, (int, float)) and k != "step"}
        for tracker in list(self._trackers):
            try:
                tracker.log(numbers, step=record["step"])
            except Exception as error:
                self._warn(f"{_name(tracker)} failed and gets nothing more: {type(error).__name__}: {error}")
                self._trackers.remove(tracker)

    def close(self) -> None:
        """Raises OSError where a full disk refuses the last records."""
        for lines in self._lines.values():
            lines.close()
        self._lines.clear()
        for tracker in self._trackers:
            try:
                tracker.finish()
            except Exception as error:
                self._warn(f"{_name(tracker)} did not finish: {type(error).__name__}: {error}")
        self._trackers.clear()
        (self.root / LOCK).unlink(missing_ok=True)
        self._lock.close()


class _TensorBoard:
    """TensorBoard behind the two calls that wandb and trackio share."""

    def __init__(self, writer: Any) -> None:
        self.writer = writer

    def log(self, numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name.replace(".", "/"), value, step)

    def finish(self) -> None:
        self.writer.close()


_Tracker = Any  # _TensorBoard, or the module wandb or trackio


def _name(tracker: _Tracker) -> str:
    return "TensorBoard" if isinstance(tracker, _TensorBoard) else str(tracker.__name__)


def _lock(root: Path) -> Any:
    """Hold the run folder for this process; another one that writes there would tear its files.

    Raises:
        UserError: another process holds it.
    """
    file = (root / LOCK).open("a+", encoding="utf-8")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not (root / LOCK).exists() or os.fstat(file.fileno()).st_ino != (root / LOCK).stat().st_ino:
            file.close()  # its holder has just ended and removed it
            return _lock(root)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "unknown"
        file.close()
        raise UserError(
            f"{root}: another run is writing there ({holder}); wait for it, stop it, or choose another output_dir"
        ) from None
    except OSError:  # a file system without locks
        return file
    file.seek(0)
    file.truncate()
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def is_finished(root: Path) -> bool:
    """Whether the run in a folder came to its end: it has scores after training, or of its evaluation."""
    try:
        scores = read_json(root / "eval.json")
    except (FileNotFoundError, UserError):
        return False
    return isinstance(scores, dict) and "after" in scores


def _may_change(key: str) -> bool:
    return any(key == allowed or key.startswith(f"{allowed}.") for allowed in MAY_CHANGE)


def _free_name(path: Path) -> Path:
    number = 1
    while (other := path.with_name(f"{path.name}.old{number}")).exists():
        number += 1
    return other


def _flat(record: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in record.items():
        pairs += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
    return pairs


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    a, b = dict(_flat(old)), dict(_flat(new))
    return [(key, a.get(key), b.get(key)) for key in sorted({*a, *b}) if a.get(key) != b.get(key)]
