"""Evaluation: sample an answer for each row as in training, and score it by the task's metrics."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from extensions.data import Example
from extensions.prompts import PromptEncoder, parse_answer
from extensions.rollout import Request, Response, random_numbers
from extensions.tasks import Task

WRONG_FORMAT = "wrong format"
EVALUATION = 1  # purpose of its random numbers, apart from those of training


@dataclass(frozen=True)
class Prediction:
    """What the model answered to one row."""

    task: str
    index: int
    text: str
    answer: str | float | None  # parsed; None for a wrong format
    gold: str | None


def spread(examples: list[Example], limit: int | None) -> list[Example]:
    """At most `limit` examples at equal distances, so that a sorted file still gives a fair sample."""
    if limit is None or limit >= len(examples):
        return examples
    return [examples[i * len(examples) // limit] for i in range(limit)]


def predict(
    examples: Sequence[Example],
    encoder: PromptEncoder,
    sample: Callable[[Sequence[Request]], list[Response]],
    batch_size: int,
    max_new_tokens: int,
    seed: int,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Prediction]:
    """One sampled answer for each example (section 5.1: a single response, the upper bound of the budget).

    Rows of a task are sampled together, sorted by length. An example's random numbers come from its row number, so
    its answer does not depend on `batch_size` or on which rank has it.
    """
    encoded = [encoder.encode(example.task, example.fields)[0] for example in examples]
    order = sorted(range(len(examples)), key=lambda i: (examples[i].task.name, len(encoded[i])))
    found: dict[int, Prediction] = {}
    for first in range(0, len(order), batch_size):
        members = order[first : first + batch_size]
        requests = [
            Request(
                encoded[i],
                examples[i].task.name,
                max_new_tokens,
                random_numbers(seed, EVALUATION, 0, examples[i].index, max_new_tokens)[1],
            )
            for i in members
        ]
        for i, response in zip(members, sample(requests), strict=True):
            task = examples[i].task
            answer = parse_answer(response.text, task)
            found[i] = Prediction(task.name, examples[i].index, response.text, answer, examples[i].label)
        progress(len(members))
    return [found[i] for i in range(len(examples))]


def score(task: Task, predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Metrics of labelled predictions, with what one needs to see through them.

    A wrong format is its own class, always wrong; in a regression it counts as the middle of the range. `interval` is
    the 95% bootstrap interval of the main metric. `majority` is the accuracy of always giving the commonest label.
    """
    golds = [str(p.gold) for p in predictions]
    parsed = [p.answer for p in predictions]
    compute = _regression_metrics if task.is_regression else _classification_metrics
    metrics = compute(task, golds, parsed)
    main = task.metrics[0]
    result: dict[str, Any] = {
        "main_metric": main,
        "metrics": metrics,
        "interval": _bootstrap(lambda g, a: compute(task, g, a)[main], golds, parsed),
        "samples": len(predictions),
        "format_error_rate": sum(a is None for a in parsed) / len(parsed),
    }
    if not task.is_regression:
        result["majority"] = max(Counter(golds).values()) / len(golds)
        result["gold_shares"] = shares(task, golds)
        result["predicted_shares"] = shares(task, parsed)
    return result


def shares(task: Task, answers: Sequence[str | float | None]) -> dict[str, float]:
    """Share of each label, by the word that the model should write, and of wrong formats where there are any."""
    counts = Counter(answers)
    named = {words[0]: counts[label] / len(answers) for label, words in task.labels.items()}
    return named | ({WRONG_FORMAT: counts[None] / len(answers)} if counts[None] else {})


def _classification_metrics(task: Task, golds: list[str], parsed: list[Any]) -> dict[str, float]:
    answers = [WRONG_FORMAT if a is None else str(a) for a in parsed]
    every = {
        "accuracy": lambda: accuracy_score(golds, answers),
        "matthews": lambda: matthews_corrcoef(golds, answers),
        "f1": lambda: f1_score(golds, answers, labels=[task.positive], average="macro", zero_division=0),
        "f1_macro": lambda: f1_score(golds, answers, labels=list(task.labels), average="macro", zero_division=0),
    }
    return {name: float(every[name]()) for name in dict.fromkeys((*task.metrics, "accuracy"))}


def _regression_metrics(task: Task, golds: list[str], parsed: list[Any]) -> dict[str, float]:
    assert task.score_range is not None
    middle = sum(task.score_range) / 2
    truth, answers = np.array([float(g) for g in golds]), np.array([middle if a is None else a for a in parsed])
    constant = len(truth) < 2 or np.ptp(truth) == 0 or np.ptp(answers) == 0  # correlation undefined: 0, as no relation
    every = {
        "pearson": lambda: 0.0 if constant else pearsonr(truth, answers).statistic,
        "spearman": lambda: 0.0 if constant else spearmanr(truth, answers).statistic,
    }
    return {name: float(every[name]()) for name in task.metrics}


def _bootstrap(metric: Callable[[list[str], list[Any]], float], golds: list[str], parsed: list[Any]) -> list[float]:
    """95% percentile interval from 200 resamples, seeded."""
    rng = np.random.default_rng(0)
    values = []
    with warnings.catch_warnings():  # a resample may hold one label alone; sklearn warns, and 0 is what is meant
        warnings.simplefilter("ignore", UserWarning)
        for _ in range(200):
            picked = rng.integers(len(golds), size=len(golds))
            values.append(metric([golds[i] for i in picked], [parsed[i] for i in picked]))
    low, high = np.percentile([v for v in values if math.isfinite(v)] or [math.nan], [2.5, 97.5])
    return [float(low), float(high)]


def score_all(tasks: Sequence[Task], predictions: Sequence[Prediction]) -> dict[str, dict[str, Any]]:
    """`score` of each task that has predictions, by task name."""
    by_task: dict[str, list[Prediction]] = {}
    for prediction in predictions:
        by_task.setdefault(prediction.task, []).append(prediction)
    return {task.name: score(task, by_task[task.name]) for task in tasks if task.name in by_task}


def mean_main_metric(scores: dict[str, dict[str, Any]]) -> float:
    """Mean of the tasks' main metrics: what early stopping compares."""
    return sum(s["metrics"][s["main_metric"]] for s in scores.values()) / len(scores)


def as_record(prediction: Prediction) -> dict[str, Any]:
    return asdict(prediction)
