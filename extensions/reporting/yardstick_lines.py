"""Yardsticks as text: their scores, and whether a model beats the best of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from extensions.reporting.scores import best_yardsticks, percent
from extensions.tasks import Task

DECODED = {None: "", "sample": "sampled", "greedy": "greedy", "likelihood": "by likelihood"}


def yardstick_name(kind: str, task: Task) -> str:
    """Name of a yardstick, as `extensions.evaluation.yardsticks` fits it to a task."""
    if kind == "majority":
        return "mean" if task.is_regression else "majority"
    features = {"tfidf": "TF-IDF", "embeddings": "sentence embeddings"}[kind]
    return f"{features} + {'ridge' if task.is_regression else 'logistic'} regression"


def yardstick_lines(tasks: Sequence[Task], yardsticks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One line per task that has yardsticks: their scores, with 95% intervals but for the majority."""
    return [_line(task, yardsticks) for task in tasks if task.name in yardsticks.get("majority", {})]


def _line(task: Task, yardsticks: Mapping[str, Mapping[str, Any]]) -> str:
    parts = []
    for kind, results in yardsticks.items():
        if task.name in results:
            low, high = score_interval(task, results[task.name])
            interval = "" if kind == "majority" else f" [{100 * low:.0f}, {100 * high:.0f}]"
            parts.append(f"{yardstick_name(kind, task)} {percent(results[task.name]['score'])}{interval}")
    return f"{task.display_name}: {', '.join(parts)}"


def comparison_lines(
    tasks: Sequence[Task],
    yardsticks: Mapping[str, Mapping[str, Any]],
    after: Mapping[str, Any],
    decoding: str | None = None,
) -> list[str]:
    """One line per task whose best yardstick the model does not beat in every decoding that was scored.

    Args:
        after: task name -> result of `score`.
        decoding: recipe key evaluation.decoding, of the scores in `after`; None: the model is an encoder.
    """
    lines, best = [], best_yardsticks(yardsticks)
    for task in [task for task in tasks if task.name in best and task.name in after]:
        kind, bar = best[task.name]
        answers = {DECODED[decoding]: after[task.name]}
        if decoding in ("sample", "greedy") and after[task.name].get("likelihood"):
            answers[DECODED["likelihood"]] = after[task.name]["likelihood"]
        if all(result["score"] > bar["score"] for result in answers.values()):
            continue
        found = [
            f"{percent(r['score'])} ({name}{': ' if name else ''}{_verdict(task, r, bar)})"
            for name, r in answers.items()
        ]
        lines.append(
            f"{task.display_name}: {yardstick_name(kind, task)} reaches {percent(bar['score'])}, this model "
            f"{', '.join(found)}"
        )
    return lines


def _verdict(task: Task, result: Mapping[str, Any], bar: Mapping[str, Any]) -> str:
    (low, high), (bar_low, bar_high) = score_interval(task, result), score_interval(task, bar)
    if result["score"] > bar["score"]:
        return "clearly above it" if low > bar["score"] and bar_high < result["score"] else "not clearly above it"
    if high < bar["score"] and result["score"] < bar_low:
        return "clearly below it"
    return "does not beat it, not distinguishable"


def score_interval(task: Task, result: Mapping[str, Any]) -> tuple[float, float]:
    """95% interval of a score: the mean of its metrics' intervals, which is exact for a single metric."""
    ends = [result["intervals"][metric] for metric in task.metrics]
    return sum(low for low, _ in ends) / len(ends), sum(high for _, high in ends) / len(ends)
