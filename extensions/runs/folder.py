"""The run folder: the records of a run, and the lock that keeps a second process out.

recipe.yaml          the resolved recipe
versions.json        packages, platform, git commit; hashes of the run's inputs
model.json           how the model is computed, and how exactly
metrics.jsonl        one line per iteration
rollouts.jsonl       some responses of each iteration
validation.jsonl     scores of the validations
changes.jsonl        where the run was resumed with changes, extended or forked, and what changed
warnings.jsonl       each distinct warning of the run once, with its step (0: before training)
eval.json            scores before and after, per task; what was trained. "after" marks a finished run
eval-step-N.json     those of the finished run of N steps that this one extends
report.html          the page of the run (`extensions.reporting.page`)
predictions_*.jsonl  the answers before and after, and to the test splits
label_suspects.csv   training rows that the trained model contradicts
reward_curve.png     the paper's figure 2; SFT: loss_curve.png
tensorboard/         event files
adapter/             PEFT adapter and model card
critic/              value head, and the critic's adapter if it has one
checkpoints/         resume points (`extensions.runs.checkpoint`)
failed/              batches with non-finite values (`extensions.runs.failed_batch`)
run.lock             the process that writes here, while it runs
status.json          what that process does, and how it ended (`extensions.common.status_file`)
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from extensions.common.console import Reporter
from extensions.common.errors import UserError
from extensions.common.files import (
    JsonlAppender,
    filter_jsonl,
    read_json,
    read_jsonl,
    unused_path,
    write_json,
    write_text,
)
from extensions.common.processes import oom_kills
from extensions.common.run_lock import LOCK, lock_folder
from extensions.common.status_file import StatusFile
from extensions.common.versions import versions
from extensions.distributed import signals, watchdog
from extensions.recipe import Recipe, dump_recipe
from extensions.reporting.page import write_page
from extensions.runs.resume import Continuation, continuation, fork_into, fork_source, scores_at
from extensions.runs.trackers import Trackers

WARNINGS, CHANGES = "warnings.jsonl", "changes.jsonl"
RECORDS = ("metrics.jsonl", "rollouts.jsonl", "validation.jsonl", WARNINGS)  # each line has its step


class RunFolder:
    """Writes the records of a run; made by rank 0 alone.

    A folder whose run goes on (`extensions.runs.resume`) is reused. A folder with a finished run, or one that left
    nothing to resume from, is renamed (`set_aside`): nothing is overwritten.

    Args:
        inputs: name -> hash of what the run reads outside the recipe; None: it reads nothing there.
        reporter: its warnings are recorded, those before the folder was opened included; it prints those of the folder.
        world_size: ranks that train, for versions.json.
        steps: iterations of the whole training; None: the method has none.

    Raises:
        UserError: the folder cannot be written, or holds another unfinished run; or the run to fork cannot be used.
    """

    def __init__(
        self,
        root: Path,
        recipe: Recipe,
        inputs: Mapping[str, str | None],
        reporter: Reporter | None = None,
        world_size: int = 1,
        steps: int | None = None,
    ) -> None:
        self.root, self._stops = root, recipe.checkpoint.on_error == "stop"
        self._reporter = reporter or Reporter(active=True)
        self._warn = warn = self._reporter.warn
        self.set_aside: Path | None = None
        self.trackers = Trackers(warn)
        self._lines: dict[str, JsonlAppender] = {}
        self._refused = False  # whether the last write failed
        self._page_failed = False
        record = versions() | {"world_size": world_size, "inputs": dict(inputs), "run_id": secrets.token_hex(4)}
        try:
            lock = lock_folder(root) if (root / "recipe.yaml").exists() else None
            goes_on = continuation(root, recipe, record, steps, warn) if lock is not None else None
            if lock is not None and goes_on is not None:
                record["run_id"] = read_json(root / "versions.json").get("run_id", record["run_id"])
                self._lock = lock
            else:
                if recipe.fork is not None:
                    fork_source(recipe, record)  # before anything is moved
                if lock is not None:
                    self.set_aside = unused_path(root, ".old")
                    root.rename(self.set_aside)
                root.mkdir(parents=True, exist_ok=True)
                self._lock = lock_folder(root)
                if lock is not None and self.set_aside is not None:
                    (self.set_aside / LOCK).unlink(missing_ok=True)
                    lock.close()
                if recipe.fork is not None:
                    goes_on = fork_into(root, recipe, record, steps)
            if goes_on is not None and goes_on.changes_anything:
                self._record_changes(goes_on)
            write_json(root / "versions.json", record)
            write_text(root / "recipe.yaml", dump_recipe(recipe))
        except OSError as error:
            raise UserError(
                f"output_dir: cannot write to {root} ({error.strerror or error}); choose another folder"
            ) from error
        self._run_id = record["run_id"]
        if self.set_aside is not None:
            self._reporter.info(f"an earlier run was moved to {self.set_aside}")
        if (root / WARNINGS).exists():
            filter_jsonl(root / WARNINGS, lambda record: "text" in record)  # drops a line that a crash left incomplete
        self._warned = self._recorded_warnings()
        for text, step in self._reporter.warnings.items():
            self._record_warning(step, text)
        self._reporter.record = self._record_warning
        self._status = StatusFile(root, self._snapshot)
        self._reporter.changed = self._status.changed

    def _snapshot(self) -> dict[str, Any]:
        return {**self._reporter.status(), "idle_s": watchdog.idle_s(), "oom_kills": oom_kills()}

    def _record_changes(self, goes_on: Continuation) -> None:
        """Before the recipe of the folder is replaced: write what changes, and keep the scores of a finished run."""
        if (self.root / CHANGES).exists():
            filter_jsonl(self.root / CHANGES, lambda record: "kind" in record)  # drops a line that a kill cut
        self.append(CHANGES, [goes_on.record()])
        self.sync()
        if goes_on.kind == "extended":
            (self.root / "eval.json").rename(self.root / scores_at(goes_on.step))
        for line in goes_on.lines():
            self._reporter.warn(line)

    def _recorded_warnings(self) -> set[str]:
        path = self.root / WARNINGS
        return {record["text"] for record in read_jsonl(path)} if path.exists() else set()

    def _record_warning(self, step: int, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            self.append(WARNINGS, [{"step": step, "text": text}])

    def append(self, name: str, records: Sequence[dict[str, Any]]) -> None:
        """Add lines to a JSONL file of the folder. Lines that a full disk refuses are written with the next ones.

        Raises:
            OSError: the disk refuses, and checkpoint.on_error is "stop".
        """
        if name not in self._lines:
            self._lines[name] = JsonlAppender(self.root / name)
        try:
            self._lines[name].append(records)
        except OSError as error:
            if self._stops:
                raise
            first, self._refused = not self._refused, True  # set first: the warning itself is a record
            if first:
                self._warn(
                    f"{self.root / name} cannot be written ({error.strerror}); the run continues and keeps its records "
                    "in memory. Free some space"
                )
        else:
            again, self._refused = self._refused, False
            if again:
                self._warn(f"{self.root / name} can be written again; no record is missing")

    def sync(self) -> None:
        """Flush all records to the disk. Raises OSError where it refuses."""
        for lines in self._lines.values():
            lines.sync()

    def cut_back(self, step: int, validated: int) -> None:
        """Before a run resumes from a checkpoint: drop later records, and damaged lines.

        Args:
            validated: step of the last validation that the checkpoint includes.
        """
        if WARNINGS in self._lines:
            self._lines.pop(WARNINGS).close()  # the filter replaces the file
        for name in RECORDS:
            if (self.root / name).exists():
                last = validated if name == "validation.jsonl" else step
                filter_jsonl(self.root / name, partial(_is_up_to, last))
        self._warned = self._recorded_warnings()
        metrics = self.root / "metrics.jsonl"
        steps = [record["step"] for record in read_jsonl(metrics)] if metrics.exists() else None
        if steps is not None and steps != list(range(1, step + 1)):
            self._warn(f"{metrics} was changed: it has {len(steps)} of {step} steps before the checkpoint")

    def start_trackers(self, recipe: Recipe, step: int) -> None:
        """Start the recipe's trackers at the step where the run starts or resumes."""
        self.trackers.start(recipe, self.root / "tensorboard", self._run_id, step)

    def metrics(self, record: dict[str, Any]) -> None:
        """One line of metrics.jsonl; the trackers log its numbers."""
        self.append("metrics.jsonl", [record])
        self.trackers.log(record)

    def validation(self, record: dict[str, Any]) -> None:
        """One line of validation.jsonl; the trackers log the scores."""
        self.append("validation.jsonl", [record])
        tasks = {name: result["score"] for name, result in record["tasks"].items()}
        means = {key: record[key] for key in ("mean", "likelihood_mean")}
        self.trackers.log({"step": record["step"], "validation": {**means, "tasks": tasks}})

    def write_page(self, last_step: int | None = None, running: bool = True) -> None:
        """Write report.html. No fault of the page ends a run, which may have taken days: the first one is a warning.

        Args:
            last_step: of the whole training.
            running: False before the run stops or ends.
        """
        try:
            write_page(self.root, last_step, running)
        except Exception as error:
            if not self._page_failed:
                self._page_failed = True
                self._warn(f"report.html cannot be written ({type(error).__name__}: {error}); the run is not affected")

    def close(self, state: str = "finished") -> None:
        """Release the folder. Raises OSError where a full disk refuses the last records.

        Args:
            state: how the run ended: finished or stopped.
        """
        self._reporter.record = self._reporter.changed = None
        for lines in self._lines.values():
            lines.close()
        self._lines.clear()
        self.trackers.finish()
        self._status.end(state, 0, signals.requested() if state == "stopped" else None)
        (self.root / LOCK).unlink(missing_ok=True)
        self._lock.close()


def _is_up_to(step: int, record: Mapping[str, Any]) -> bool:
    return isinstance(record.get("step"), int) and record["step"] <= step
