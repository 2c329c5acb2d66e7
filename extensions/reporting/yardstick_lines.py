"""Yardsticks as text: their scores, and whether a model beats the best of them."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from typing import Any

from rich.table import Table

from extensions.common.console import Reporter
from extensions.model.packages import SENTENCE_ENCODER, install_command
from extensions.reporting.scores import best_yardsticks, percent
from extensions.tasks import Task

DECODED = {None: "", "sample": "sampled", "greedy": "greedy", "likelihood": "by likelihood"}


def yardstick_name(kind: str, task: Task) -> str:
    """Name of a yardstick, as `extensions.evaluation.yardsticks` fits it to a task."""
    if kind == "majority":
        return "mean" if task.is_regression else "majority"
    features = {"tfidf": "TF-IDF", "embeddings": "sentence embeddings"}[kind]
    return f"{features} + {'ridge' if task.is_regression else 'logistic'} regression"


def print_yardsticks(tasks: Sequence[Task], yardsticks: Mapping[str, Mapping[str, Any]], reporter: Reporter) -> None:
    """A table with one row per task and yardstick, its training rows and seconds; what is missing in it."""
    if not yardsticks:
        return
    table = Table(title="Yardsticks: simple models of the same training rows", title_justify="left")
    for column in ("task", "yardstick", "score (%)", "training rows", "seconds"):
        table.add_column(column, justify="left" if column in ("task", "yardstick") else "right")
    for task in tasks:
        found = {kind: results[task.name] for kind, results in yardsticks.items() if task.name in results}
        for k, (kind, result) in enumerate(found.items()):
            low, high = score_interval(task, result)
            score = f"{percent(result['score'])} [{100 * low:.0f}, {100 * high:.0f}]"
            cells = (yardstick_name(kind, task), score, rows_text(result), f"{result['seconds']:.1f}")
            table.add_row(task.display_name if k == 0 else "", *cells, end_section=k == len(found) - 1)
    reporter.console.print(table)
    if note := missing_yardstick(yardsticks):
        reporter.info(f"yardsticks: {note}")


def rows_text(result: Mapping[str, Any]) -> str:
    """The training rows of a yardstick, and those of the run if it has more."""
    rows, whole = result["train_rows"], result.get("run_rows")  # absent in older runs
    return str(rows) if whole in (None, rows) else f"{rows} of {whole}"


def missing_yardstick(kinds: Container[str]) -> str | None:
    """A clause on the yardstick whose package was not installed; None if all are there, or none."""
    if "tfidf" not in kinds or "embeddings" in kinds:
        return None
    return f"no sentence embeddings, whose encoder is not installed ({install_command(SENTENCE_ENCODER)})"


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
