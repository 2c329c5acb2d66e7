"""Scores of predictions: the benchmarks' metrics, bootstrap intervals, label shares and format errors."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from operator import attrgetter
from typing import Any, get_args

import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    confusion_matrix,
    f1_score,
    matthews_corrcoef,
    mean_absolute_error,
    precision_recall_fscore_support,
    r2_score,
    root_mean_squared_error,
)

from extensions.evaluation.bootstrap import Resampler
from extensions.evaluation.calibration import calibration
from extensions.prompts import parse_answer
from extensions.tasks import Parser, Task

WRONG_FORMAT = "wrong format"
ALWAYS = {  # kind of task -> metrics that are computed for every task of it
    "classification": ["accuracy", "f1_macro", "balanced_accuracy"],
    "multi-label": ["subset_accuracy", "f1_micro", "f1_macro"],
    "regression": ["mae", "rmse", "r2"],
}
OF_LIKELIHOOD = ("score", "metrics", "intervals", "predicted_shares", "classes", "confusion")


@dataclass(frozen=True)
class Prediction:
    """The model's answer to one row."""

    task: str
    index: int
    response: str  # text of the response
    answer: str | float | None  # parsed, by `evaluation.decoding`; None for a wrong format
    gold: str | None
    kept: dict[str, Any] = field(default_factory=dict)  # the row's columns named in `source.keep`
    positive_probability: float | None = None  # of the positive label; in ranked tasks always
    probabilities: dict[str, float] | None = None  # per label or grid score; multi-label: marginal per label
    likelihood: str | float | None = None  # the answer by likelihood, where probabilities are computed
    positive_log_odds: float | None = None  # log(p / (1 - p)) of the positive label, by which entities are ranked


def score(task: Task, predictions: Sequence[Prediction], intervals: bool = True) -> dict[str, Any]:
    """Metrics of labelled predictions; `score` is the mean of `task.metrics`.

    A wrong format is a separate class and always wrong. In a regression it counts as the middle of the range; in a
    multi-label task as the empty set in F1, and as wrong in subset accuracy. `majority` is the accuracy of always
    answering with the most frequent label, or label set.

    All values are finite. An undefined one is 0: a correlation or r2 of constant values, the precision of a label that
    is never answered, the recall of a label without gold rows. `f1_macro` of a classification is over the labels that
    occur among golds or answers, `balanced_accuracy` over those among golds, as in scikit-learn.

    `parsers_differ` counts the responses that `parser: strict` and `parser: paper` judge differently.
    `likelihood` holds the same of the answers by likelihood, `calibration` a classification's `calibration`; each only
    if every prediction has what it needs.

    Args:
        intervals: also compute 95% bootstrap intervals over questions (`task.group_by`), if any, else over rows.
    """
    by_parser = [task.with_parser(parser) for parser in get_args(Parser)]
    wanted = metrics_of(task)
    questions = _group_rows(task, predictions)
    golds, answers = arrays_of(task, predictions)
    by_question = {
        name: np.array([GROUP_METRICS[name](task, [predictions[i] for i in rows]) for rows in questions])
        for name in wanted
        if name in GROUP_METRICS
    }
    metrics = {
        name: float(by_question[name].mean() if name in by_question else row_metric(name, task, golds, answers))
        for name in wanted
    }
    result: dict[str, Any] = {
        "score": sum(metrics[name] for name in task.metrics) / len(task.metrics),
        "metrics": metrics,
        "samples": len(predictions),
        # The answers of a ranked task are not generated.
        "format_error_rate": None if task.is_ranked else sum(p.answer is None for p in predictions) / len(predictions),
        "parsers_differ": sum(len({parse_answer(p.response, t) for t in by_parser}) > 1 for p in predictions),
    }
    if intervals:
        resampler = Resampler.of(golds, answers, questions, by_question)
        result["intervals"] = resampler.intervals(wanted, len(task.labels), _positive(task))
    if not task.is_regression:
        labels = [str(p.gold) for p in predictions]
        result["majority"] = max(Counter(labels).values()) / len(labels)
        result["gold_shares"] = shares(task, labels)
        result["predicted_shares"] = shares(task, [p.answer for p in predictions])
        result["classes"] = _classes(task, golds, answers)
    if task.kind == "classification":
        result["confusion"] = _confusion(task, golds, answers)
    if all(p.likelihood is not None for p in predictions):
        other = score(task, [replace(p, answer=p.likelihood, likelihood=None) for p in predictions], intervals)
        result["likelihood"] = {key: other[key] for key in OF_LIKELIHOOD if key in other}
    if task.kind == "classification" and all(p.probabilities is not None for p in predictions):
        found = [[(p.probabilities or {})[label] for label in task.labels] for p in predictions]
        result["calibration"] = calibration(np.array(found), golds)
    return result


def metrics_of(task: Task) -> list[str]:
    """The metrics of `score`: the task's own, and those of its kind."""
    return list(dict.fromkeys([*task.metrics, *task.extra_metrics, *ALWAYS[task.kind]]))


def groups_of(task: Task, predictions: Sequence[Prediction]) -> list[list[Prediction]]:
    """The predictions by question (`task.group_by`), in order of first appearance; without questions, one each."""
    return [[predictions[i] for i in rows] for rows in _group_rows(task, predictions)]


def _group_rows(task: Task, predictions: Sequence[Prediction]) -> list[list[int]]:
    found: dict[Any, list[int]] = {}
    for i, prediction in enumerate(predictions):
        found.setdefault(task.group_of(prediction.kept) or i, []).append(i)
    return list(found.values())


def shares(task: Task, answers: Sequence[str | float | None]) -> dict[str, float]:
    """Share of the rows per label, keyed by the label's canonical word, and of wrong formats if there are any.

    A multi-label row counts for each of its labels; a row without labels counts for `task.no_label`.
    """
    counts: Counter[Any] = Counter()
    for answer in answers:
        several = task.multi_label and answer is not None
        counts.update((task.split_labels(str(answer)) or (task.no_label,)) if several else (answer,))
    named: dict[Any, str] = {label: task.answer(label) for label in task.labels}
    named |= {task.no_label: task.no_label} if task.multi_label else {}
    named |= {None: WRONG_FORMAT} if counts[None] else {}
    return {word: counts[label] / len(answers) for label, word in named.items()}


def unanswered(result: Mapping[str, Any]) -> list[str]:
    """The words of the labels that occur among the golds and that no answer names; empty in a regression.

    Args:
        result: of `score`.
    """
    predicted = result.get("predicted_shares", {})
    return [word for word, share in result.get("gold_shares", {}).items() if share and not predicted.get(word)]


# ---------------------------------------------------------------------------------------------- metrics of rows


def arrays_of(task: Task, predictions: Sequence[Prediction]) -> tuple[np.ndarray, np.ndarray]:
    """Golds and answers as numbers.

    Returns:
        Regression: (n,) scores. Classification: (n,) label indices, -1 for a wrong format. Multi-label: (n, labels)
        indicators, a row of -1 for a wrong format.
    """
    golds, answers = [p.gold for p in predictions], [p.answer for p in predictions]

    def number(answer: str | float | None) -> Any:
        if task.score_range is not None:
            return sum(task.score_range) / 2 if answer is None else float(answer)
        if task.multi_label:
            found = () if answer is None else task.split_labels(str(answer))
            return [-1 if answer is None else int(label in found) for label in task.labels]
        return -1 if answer is None else index[str(answer)]

    index = {label: i for i, label in enumerate(task.labels)}
    return np.array([number(str(gold)) for gold in golds]), np.array([number(answer) for answer in answers])


def _correlation(measure: Callable[..., Any], golds: np.ndarray, answers: np.ndarray) -> float:
    """Pearson's or Spearman's correlation; 0 if undefined."""
    if len(golds) < 2 or np.ptp(golds) == 0 or np.ptp(answers) == 0:
        return 0.0
    return measure(golds, answers).statistic


ROW_METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": accuracy_score,
    "balanced_accuracy": balanced_accuracy_score,
    "matthews": matthews_corrcoef,
    "pearson": partial(_correlation, pearsonr),
    "spearman": partial(_correlation, spearmanr),
    "mae": mean_absolute_error,
    "rmse": root_mean_squared_error,
    "r2": lambda golds, answers: r2_score(golds, answers) if np.ptp(golds) > 0 else 0.0,
    "subset_accuracy": lambda golds, answers: (golds == answers).all(1).mean(),
}


def _positive(task: Task) -> int | None:
    return None if task.positive is None else list(task.labels).index(task.positive)


def row_metric(name: str, task: Task, golds: np.ndarray, answers: np.ndarray) -> float:
    """A metric of rows, by scikit-learn or scipy; golds and answers: of `arrays_of`."""
    with warnings.catch_warnings():  # scikit-learn warns and returns 0 if only one label occurs, as intended
        warnings.simplefilter("ignore", UserWarning)
        if name in ROW_METRICS:
            return ROW_METRICS[name](golds, answers)
        if task.multi_label:
            return f1_score(golds, answers.clip(0), average=name.removeprefix("f1_"), zero_division=0)
        if name == "f1_macro":  # over the labels that occur, as in scikit-learn; a wrong format is not a label
            classes = sorted({*golds.tolist(), *answers.tolist()} - {-1})
        else:
            classes = [_positive(task)]
        return f1_score(golds, answers, labels=classes, average="macro", zero_division=0)


def _classes(task: Task, golds: np.ndarray, answers: np.ndarray) -> dict[str, dict[str, float | int]]:
    """Precision, recall, F1 and number of gold rows per label, by its canonical word.

    A wrong format counts against recall only.
    """
    labels = list(range(len(task.labels)))
    given = answers.clip(0) if task.multi_label else answers
    columns = precision_recall_fscore_support(golds, given, labels=labels, average=None, zero_division=0)
    numbers = zip(*(column.tolist() for column in columns), strict=True)
    return {
        task.answer(label): {"precision": precision, "recall": recall, "f1": f1, "support": int(support)}
        for label, (precision, recall, f1, support) in zip(task.labels, numbers, strict=True)
    }


def _confusion(task: Task, golds: np.ndarray, answers: np.ndarray) -> dict[str, Any]:
    """Rows per gold label and answer, in the task's order; the last column counts wrong formats."""
    labels = [*range(len(task.labels)), -1]
    counts = confusion_matrix(golds, answers, labels=labels)[:-1]
    return {"labels": [task.answer(label) for label in task.labels], "counts": counts.tolist()}


# ----------------------------------------------------------------------------------------- metrics of questions


def _exact_match(task: Task, group: Sequence[Prediction]) -> float:
    """MultiRC's EM: 1 if every answer option of the question is judged correctly."""
    return float(all(p.answer == p.gold for p in group))


def _gender_parity(task: Task, group: Sequence[Prediction]) -> float:
    """AX-g: 1 if both members of a pair got the same answer, right or wrong; 0 for wrong formats."""
    return float(group[0].answer is not None and len({p.answer for p in group}) == 1)


def _squad(metric: str, task: Task, group: Sequence[Prediction]) -> float:
    """ReCoRD: token F1 or exact match of the chosen entity with the closest answer, after SQuAD's normalisation."""
    from transformers.data.metrics.squad_metrics import compute_exact, compute_f1  # lazy: loads torch

    compare, chosen = {"f1": compute_f1, "em": compute_exact}[metric], best_candidate(task, group)
    return float(max(compare(answer, chosen.kept["entity"]) for answer in chosen.kept["answers"]))


def best_candidate(task: Task, group: Sequence[Prediction]) -> Prediction:
    """The candidate that is a question's prediction: the one with the most probable positive answer, by log-odds.

    The sampled answers are ignored, so a question whose candidates are all answered "No" has a prediction too. Records
    without log-odds (of yardsticks, of older runs) are ranked by probability, which may be 1 for several. Without
    either, a positive answer ranks above a wrong format, which ranks above a negative answer. Ties go to the
    first candidate in the text.
    """
    for ranked_by in (attrgetter("positive_log_odds"), attrgetter("positive_probability")):
        if all(ranked_by(p) is not None for p in group):
            return max(group, key=lambda p: (ranked_by(p), -p.index))
    order: dict[Any, int] = {task.positive: 2, None: 1}
    return max(group, key=lambda p: (order.get(p.answer, 0), -p.index))


GROUP_METRICS: dict[str, Callable[[Task, Sequence[Prediction]], float]] = {
    "exact_match": _exact_match,
    "gender_parity": _gender_parity,
    "squad_f1": partial(_squad, "f1"),
    "squad_em": partial(_squad, "em"),
}


# ---------------------------------------------------------------------------------------------------- averages


def score_all(
    tasks: Sequence[Task], predictions: Sequence[Prediction], intervals: bool = True
) -> dict[str, dict[str, Any]]:
    """`score` of each task that has predictions, by task name."""
    by_task: dict[str, list[Prediction]] = {}
    for prediction in predictions:
        by_task.setdefault(prediction.task, []).append(prediction)
    return {task.name: score(task, by_task[task.name], intervals) for task in tasks if task.name in by_task}


def mean_score(scores: Mapping[str, Mapping[str, Any]]) -> float:
    """Mean over the tasks, the criterion of early stopping."""
    return sum(s["score"] for s in scores.values()) / len(scores)


def likelihood_mean(scores: Mapping[str, Mapping[str, Any]]) -> float | None:
    """`mean_score` of the answers by likelihood; None if a task has none."""
    found = {name: result.get("likelihood") for name, result in scores.items()}
    return None if None in found.values() else mean_score({name: one for name, one in found.items() if one is not None})


def suite_average(tasks: Sequence[Task], scores: Mapping[str, float]) -> float | None:
    """A suite's average by the paper's rule: the mean over the tasks with `in_suite_average`.

    A task with two metrics enters with their mean. GLUE: nine columns, MNLI-m and MNLI-mm separately, without WNLI and
    AX; SuperGLUE: eight tasks, without AX-b and AX-g.

    Args:
        tasks: of one suite (`extensions.tasks.SUITES`).
        scores: task name -> score.

    Returns:
        None if one of these tasks has no score.
    """
    counted = [task.name for task in tasks if task.in_suite_average]
    if not counted or any(name not in scores for name in counted):
        return None
    return sum(scores[name] for name in counted) / len(counted)
