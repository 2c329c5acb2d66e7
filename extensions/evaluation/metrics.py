"""Scores of predictions: the benchmarks' metrics, their intervals, and what one needs to see through them."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    f1_score,
    matthews_corrcoef,
    mean_absolute_error,
    r2_score,
    root_mean_squared_error,
)

from extensions.tasks import Task

WRONG_FORMAT = "wrong format"
RESAMPLES = 200


@dataclass(frozen=True)
class Prediction:
    """What the model answered to one row."""

    task: str
    index: int
    text: str
    answer: str | float | None  # parsed; None for a wrong format
    gold: str | None
    kept: dict[str, Any] = field(default_factory=dict)  # columns of the row that its task keeps (`source.keep`)
    positive_probability: float | None = None  # probability of the positive answer, of the candidates of a ranked task
    probabilities: dict[str, float] | None = None  # by label or number, where answers were compared by likelihood


def score(task: Task, predictions: Sequence[Prediction], intervals: bool = True) -> dict[str, Any]:
    """Metrics of labelled predictions.

    A wrong format is its own class, always wrong. In a regression it counts as the middle of the range; of a
    multi-label task it holds no label, and is never the right set. `score` is the mean of the task's metrics.
    `intervals` are 95% bootstrap intervals: questions are resampled where several rows make one, else rows;
    `intervals=False` saves their time. `majority` is the accuracy of always giving the commonest label, or label set.
    """
    wanted: list[str] = list(dict.fromkeys((*task.metrics, *task.extra_metrics)))
    right = "subset_accuracy" if task.multi_label else "accuracy"
    if not task.is_regression and right not in wanted:
        wanted.append(right)
    rows_of = [np.array(rows) for rows in _rows_of_units(task, predictions)]
    groups = [[predictions[i] for i in rows] for rows in rows_of]
    golds, answers = _arrays(task, predictions)
    by_unit = {
        name: np.array([GROUP_METRICS[name](task, group) for group in groups])
        for name in wanted
        if name in GROUP_METRICS
    }

    def compute(picked: np.ndarray) -> dict[str, float]:
        """The metrics of the groups at `picked`."""
        rows = picked if len(groups) == len(predictions) else np.concatenate([rows_of[i] for i in picked])
        with warnings.catch_warnings():  # of a single label: sklearn warns, and 0 is what is meant
            warnings.simplefilter("ignore", UserWarning)
            return {
                name: float(by_unit[name][picked].mean())
                if name in by_unit
                else float(_row_metric(name, task, golds[rows], answers[rows]))
                for name in wanted
            }

    metrics = compute(np.arange(len(groups)))
    wrong = sum(p.answer is None for p in predictions)
    result: dict[str, Any] = {
        "score": sum(metrics[name] for name in task.metrics) / len(task.metrics),
        "metrics": metrics,
        "samples": len(predictions),
        "format_error_rate": wrong / len(predictions),
    }
    if intervals:
        result["intervals"] = _bootstrap(compute, len(groups))
    if not task.is_regression:
        labels = [str(p.gold) for p in predictions]
        result["majority"] = max(Counter(labels).values()) / len(labels)
        result["gold_shares"] = shares(task, labels)
        result["predicted_shares"] = shares(task, [p.answer for p in predictions])
    return result


def groups_of(task: Task, predictions: Sequence[Prediction]) -> list[list[Prediction]]:
    """The predictions by question (`task.group_by`), in order of first appearance; single ones without groups."""
    return [[predictions[i] for i in rows] for rows in _rows_of_units(task, predictions)]


def _rows_of_units(task: Task, predictions: Sequence[Prediction]) -> list[list[int]]:
    found: dict[Any, list[int]] = {}
    for i, prediction in enumerate(predictions):
        found.setdefault(task.group_of(prediction.kept) or i, []).append(i)
    return list(found.values())


def shares(task: Task, answers: Sequence[str | float | None]) -> dict[str, float]:
    """Share of the rows with each label, by the word that the model should write, and of wrong formats where there are
    any. Of a multi-label task those of one row are counted each, and rows without a label too."""
    counts: Counter[Any] = Counter(answers)
    if task.multi_label:
        sets = [task.split_labels(str(answer)) for answer in answers if answer is not None]
        counts = Counter(label for labels in sets for label in labels or (task.no_label,)) + Counter(
            {None: counts[None]}
        )
    named = {task.answer(label): counts[label] / len(answers) for label in task.labels}
    if task.multi_label:
        named[task.no_label] = counts[task.no_label] / len(answers)
    return named | ({WRONG_FORMAT: counts[None] / len(answers)} if counts[None] else {})


# ---------------------------------------------------------------------------------------------- metrics of rows


def _arrays(task: Task, predictions: Sequence[Prediction]) -> tuple[np.ndarray, np.ndarray]:
    """Golds and answers as numbers: scores; class numbers with -1 for a wrong format, (n,); or of a multi-label task 1
    for each label of a row, (n, labels), with -1 in the whole row for a wrong format."""
    if task.score_range is not None:
        middle = sum(task.score_range) / 2
        answers = [middle if p.answer is None else float(p.answer) for p in predictions]
        return np.array([float(str(p.gold)) for p in predictions]), np.array(answers)
    if task.multi_label:

        def row(labels: str | float | None) -> list[int]:
            found = task.split_labels(str(labels))
            return [-1 if labels is None else int(label in found) for label in task.labels]

        return np.array([row(p.gold) for p in predictions]), np.array([row(p.answer) for p in predictions])
    number = {label: i for i, label in enumerate(task.labels)}
    return (
        np.array([number[str(p.gold)] for p in predictions]),
        np.array([-1 if p.answer is None else number[str(p.answer)] for p in predictions]),
    )


ERRORS = {"mae": mean_absolute_error, "rmse": root_mean_squared_error}


def _row_metric(name: str, task: Task, golds: np.ndarray, answers: np.ndarray) -> float:
    if name in ("pearson", "spearman"):
        if len(golds) < 2 or np.ptp(golds) == 0 or np.ptp(answers) == 0:  # undefined; no relation
            return 0.0
        return (pearsonr if name == "pearson" else spearmanr)(golds, answers).statistic
    if name == "r2":
        return r2_score(golds, answers) if len(golds) > 1 else 0.0
    if name in ERRORS:
        return ERRORS[name](golds, answers)
    if task.multi_label:
        if name == "subset_accuracy":
            return float((golds == answers).all(1).mean())
        return f1_score(golds, answers.clip(0), average=name.removeprefix("f1_"), zero_division=0)
    if name == "accuracy":
        return accuracy_score(golds, answers)
    if name == "balanced_accuracy":
        return balanced_accuracy_score(golds, answers)
    if name == "matthews":
        return matthews_corrcoef(golds, answers)
    if name == "f1_macro":  # over the labels that occur, as sklearn's own; a wrong format is no label
        classes = sorted({*golds.tolist(), *answers.tolist()} - {-1})
    else:
        classes = [list(task.labels).index(str(task.positive))]
    return f1_score(golds, answers, labels=classes, average="macro", zero_division=0)


# ----------------------------------------------------------------------------------------- metrics of questions


def exact_match(task: Task, group: Sequence[Prediction]) -> float:
    """MultiRC's EM: 1 if every answer to the question was judged right."""
    return float(all(p.answer == p.gold for p in group))


def gender_parity(task: Task, group: Sequence[Prediction]) -> float:
    """AX-g: 1 if both members of a pair got the same answer, right or wrong; a wrong format is no answer."""
    return float(group[0].answer is not None and len({p.answer for p in group}) == 1)


def squad_f1(task: Task, group: Sequence[Prediction]) -> float:
    """ReCoRD: token F1 of the chosen entity with the answer that fits best, after SQuAD's normalisation."""
    from transformers.data.metrics.squad_metrics import compute_f1  # here, since it imports torch: seconds

    chosen = best_candidate(task, group)
    return float(max(compute_f1(answer, chosen.kept["entity"]) for answer in chosen.kept["answers"]))


def squad_em(task: Task, group: Sequence[Prediction]) -> float:
    """ReCoRD: 1 if the chosen entity is an answer, after SQuAD's normalisation."""
    from transformers.data.metrics.squad_metrics import compute_exact

    chosen = best_candidate(task, group)
    return float(max(compute_exact(answer, chosen.kept["entity"]) for answer in chosen.kept["answers"]))


def best_candidate(task: Task, group: Sequence[Prediction]) -> Prediction:
    """The candidate that a question's prediction is.

    The one whose positive answer is most probable, whatever was sampled: so there is always one, also where no
    candidate got a "Yes". Without probabilities: one with the positive answer before one with a wrong format before one
    with the negative answer. Of equals the first in the text.
    """
    if all(p.positive_probability is not None for p in group):
        return max(group, key=lambda p: (p.positive_probability, -p.index))
    order: dict[Any, int] = {task.positive: 2, None: 1}
    return max(group, key=lambda p: (order.get(p.answer, 0), -p.index))


GROUP_METRICS: dict[str, Callable[[Task, Sequence[Prediction]], float]] = {
    "exact_match": exact_match,
    "gender_parity": gender_parity,
    "squad_f1": squad_f1,
    "squad_em": squad_em,
}


# -------------------------------------------------------------------------------------- intervals and averages


def _bootstrap(compute: Callable[[np.ndarray], dict[str, float]], count: int) -> dict[str, list[float]]:
    """95% percentile intervals from seeded resamples of `count` groups."""
    rng = np.random.default_rng(0)
    samples = [compute(rng.integers(count, size=count)) for _ in range(RESAMPLES)]
    intervals = {}
    for name in samples[0]:
        finite = [sample[name] for sample in samples if math.isfinite(sample[name])] or [math.nan]
        low, high = np.percentile(finite, [2.5, 97.5])
        intervals[name] = [float(low), float(high)]
    return intervals


def score_all(
    tasks: Sequence[Task], predictions: Sequence[Prediction], intervals: bool = True
) -> dict[str, dict[str, Any]]:
    """`score` of each task that has predictions, by task name."""
    by_task: dict[str, list[Prediction]] = {}
    for prediction in predictions:
        by_task.setdefault(prediction.task, []).append(prediction)
    return {task.name: score(task, by_task[task.name], intervals) for task in tasks if task.name in by_task}


def mean_score(scores: Mapping[str, Mapping[str, Any]]) -> float:
    """Mean over the tasks: what early stopping compares."""
    return sum(s["score"] for s in scores.values()) / len(scores)


def suite_average(tasks: Sequence[Task], scores: Mapping[str, float]) -> float | None:
    """A suite's average by the paper's rule: over its averaged tasks, of which each counts once.

    A task with two metrics counts with their mean. GLUE: nine columns, MNLI-m and MNLI-mm apart, without WNLI and AX;
    SuperGLUE: eight tasks, without AX-b and AX-g.

    Args:
        tasks: of one suite (`extensions.tasks.SUITES`).
        scores: task name -> score.

    Returns:
        None if a task that counts has no score.
    """
    counted = [task.name for task in tasks if task.in_suite_average]
    if not counted or any(name not in scores for name in counted):
        return None
    return sum(scores[name] for name in counted) / len(counted)
