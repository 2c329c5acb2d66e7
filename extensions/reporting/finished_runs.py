"""Finished run folders, read and checked: recipe, scores, training curves."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, Field, TypeAdapter, ValidationError, model_validator

from extensions.common.errors import UserError
from extensions.common.files import read_json, read_jsonl
from extensions.recipe import Recipe, load_recipe

SET_ASIDE = re.compile(r"\.old\d+$")  # an earlier run, renamed by a later one with the same output_dir

T = TypeVar("T")
Finite = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, lt=2**63)]


class ClassScore(BaseModel):
    """The numbers of one label."""

    precision: Finite
    recall: Finite
    f1: Finite
    support: Count


class Confusion(BaseModel):
    """Rows per gold label (rows) and answer (columns, the last: wrong formats)."""

    labels: list[str]
    counts: list[list[Count]]

    @model_validator(mode="after")
    def _has_a_row_and_a_column_per_label(self) -> Confusion:
        size = len(self.labels)
        if len(self.counts) != size or any(len(row) != size + 1 for row in self.counts):
            raise ValueError(f"counts must have {size} rows of {size + 1} columns: one per label, and wrong formats")
        return self


class ReliabilityBin(BaseModel):
    """The rows whose most probable label has a probability in (low, high]."""

    low: Finite
    high: Finite
    confidence: Finite
    accuracy: Finite
    count: Count


class Calibration(BaseModel):
    """The result of `extensions.evaluation.calibration.calibration`."""

    log_loss: Finite
    brier: Finite
    ece: Finite
    bins: list[ReliabilityBin]


class DecodedScore(BaseModel):
    """The scores of the answers by one decoding."""

    score: Finite
    metrics: dict[str, Finite]
    intervals: dict[str, tuple[Finite, Finite]]
    predicted_shares: dict[str, Finite] = {}
    classes: dict[str, ClassScore] = {}
    confusion: Confusion | None = None

    @model_validator(mode="after")
    def _every_metric_has_an_interval(self) -> Self:
        missing = [name for name in self.metrics if name not in self.intervals]
        if missing:
            raise ValueError(f"the metric {missing[0]} has no interval")
        return self


class Score(DecodedScore):
    """The result of one task, as `extensions.evaluation.metrics.score` returns it."""

    samples: Count
    format_error_rate: Finite | None  # None in a ranked task, whose answers are not generated
    parsers_differ: Count | None = None  # responses that the two parsers judge differently
    majority: Finite | None = None
    gold_shares: dict[str, Finite] = {}
    likelihood: DecodedScore | None = None
    calibration: Calibration | None = None


class YardstickScore(Score):
    """The result of a yardstick on one task (`extensions.evaluation.yardsticks`)."""

    train_rows: Count
    run_rows: Count | None = None  # of which train_rows are a sample
    seconds: Finite


class Training(BaseModel):
    """The tasks, samples and time of a training; empty for an evaluation."""

    tasks: list[str] = []
    steps: Count = 0
    samples: Count = 0
    seconds: Finite = 0.0
    started_from: str | None = None  # method that trained `model.adapter`, if known

    @property
    def seconds_per_sample(self) -> float | None:
        return self.seconds / self.samples if self.samples else None


class RunScores(BaseModel):
    """eval.json of a finished run."""

    split: str
    splits: dict[str, str] = {}
    before: dict[str, Score] = {}
    after: dict[str, Score]
    training: Training = Training()
    yardsticks: dict[Literal["majority", "tfidf", "embeddings"], dict[str, YardstickScore]] = {}
    merged: bool = False  # the evaluated model is a base with a trained adapter merged in


class Iteration(BaseModel):
    """A line of metrics.jsonl."""

    step: Count
    samples: Count
    elapsed_s: Finite
    reward_mean: Finite | None = None
    answer_loss: Finite | None = None
    accuracy: Finite | None = None


class Validation(BaseModel):
    """A line of validation.jsonl."""

    step: Count
    samples: Count
    seconds: Finite
    mean: Finite
    tasks: dict[str, Any]


@dataclass(frozen=True)
class FinishedRun:
    folder: Path
    recipe: Recipe
    scores: RunScores
    iterations: list[Iteration]
    validations: list[Validation]

    @property
    def trained_adapter(self) -> bool:
        return self.recipe.method in ("ppo", "sft")

    @property
    def training(self) -> Training:
        return self.scores.training

    @property
    def trained_titles(self) -> str:
        """The trained tasks by their display names."""
        titles = {task.name: task.display_name for task in self.recipe.data.tasks}
        return ", ".join(titles.get(name, name) for name in self.training.tasks)

    @property
    def seconds_to_best(self) -> float | None:
        """Training time until the first validation with the best mean.

        None without validations, or if they cover different tasks and cannot be compared (an encoder's).
        """
        if len({tuple(v.tasks) for v in self.validations}) != 1:
            return None
        return max(self.validations, key=lambda v: v.mean).seconds


def find_runs(paths: Iterable[Path], warn: Callable[[str], None]) -> list[FinishedRun]:
    """The runs at `paths`, each once, in this order.

    Args:
        paths: run folders; sweep folders, whose best.json lists the runs to take; folders of these.
        warn: receives a message per unfinished run, which is skipped.

    Raises:
        UserError: a path has no run, no run is finished, or one is damaged.
    """
    try:
        paths = list(paths)
        folders = {folder.resolve(): folder for path in paths for folder in _run_folders(path, warn)}
        if not folders:
            raise UserError(f"no run is finished of {', '.join(map(str, paths))}; the command of a run resumes it")
        return [read_run(folder) for folder in folders.values()]
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror}); leave it out") from error


def _run_folders(path: Path, warn: Callable[[str], None]) -> list[Path]:
    if not path.is_dir():
        raise UserError(f"{path} is not a folder; give a folder that a run wrote, such as runs/NAME")
    if (path / "best.json").exists():
        best = _parsed(list[str], path / "best.json", read_json)
        if not best:
            raise UserError(f"{path} is a sweep without a finished run; run the same command again to resume it")
        if any("\0" in name for name in best):
            raise _damaged(path / "best.json", "a folder name contains NUL")
        return [path / name for name in best]
    if (path / "recipe.yaml").exists():
        return _finished(path, warn)
    found = []
    for folder in sorted(path.iterdir()):
        if SET_ASIDE.search(folder.name):
            continue
        if (folder / "best.json").exists():
            found += _run_folders(folder, warn)
        elif (folder / "recipe.yaml").exists():
            found += _finished(folder, warn)
    if not found:
        raise UserError(
            f"{path} has no finished run: a run has recipe.yaml and eval.json, a sweep has best.json. Give a run "
            "folder, such as runs/NAME, or a folder of runs"
        )
    return found


def _finished(folder: Path, warn: Callable[[str], None]) -> list[Path]:
    """The folder, or nothing and a warning."""
    if _is_finished(folder):
        return [folder]
    warn(f"{folder} is skipped: the run is not finished; its command resumes it")
    return []


def _is_finished(folder: Path) -> bool:
    file = folder / "eval.json"
    return file.exists() and "after" in _parsed(dict[str, Any], file, read_json)


def read_run(folder: Path) -> FinishedRun:
    """The run in `folder`.

    Raises:
        UserError: it is not a run folder, or the run is unfinished or damaged.
    """
    if not (folder / "recipe.yaml").exists():
        raise UserError(f"{folder} is not a run folder: it has no recipe.yaml; give a folder such as runs/NAME")
    recipe, file = load_recipe(folder / "recipe.yaml"), folder / "eval.json"
    if not _is_finished(folder):
        raise UserError(
            f"{folder} is not finished: eval.json has no scores after training or evaluation. Run the same command "
            "again to resume it"
        )
    scores = _parsed(RunScores, file, read_json)
    tasks = {task.name: task for task in recipe.data.tasks}
    for name, score in (*scores.after.items(), *scores.before.items()):
        if name not in tasks:
            raise _damaged(file, f"it has scores of {name!r}, which is not in data.tasks")
        missing = [metric for metric in tasks[name].metrics if metric not in score.metrics]
        if missing:
            raise _damaged(file, f"it lacks the metric {missing[0]} of {name}")
    if recipe.method != "eval" and not scores.training.tasks:
        raise _damaged(file, "it does not list the trained tasks")
    if not scores.after:
        raise _damaged(file, "it has no scores")
    iterations, validations = folder / "metrics.jsonl", folder / "validation.jsonl"
    return FinishedRun(
        folder,
        recipe,
        scores,
        _parsed(list[Iteration], iterations, read_jsonl) if iterations.exists() else [],
        _parsed(list[Validation], validations, read_jsonl) if validations.exists() else [],
    )


def _parsed(kind: type[T], file: Path, read: Callable[[Path], Any]) -> T:
    adapter = TypeAdapter(kind)
    try:
        value = adapter.validate_python(read(file))
        adapter.dump_json(value)  # ValueError for an unpaired surrogate, which the report could not encode
        return value
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise _damaged(file, f"{where}: {first['msg']}" if where else first["msg"]) from None
    except (OSError, ValueError) as error:
        raise _damaged(file, str(error)) from None


def _damaged(file: Path, why: str) -> UserError:
    return UserError(f"{file} is damaged: {why}. Leave the run out, or run it again with another output_dir")
