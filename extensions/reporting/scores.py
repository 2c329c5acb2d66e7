"""Scores as text: number formats, Markdown tables, and the table that a run prints on the console."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from extensions.evaluation.metrics import suite_average
from extensions.tasks import SUITES, Task

NOT_IN_PERCENT = ("mae", "rmse", "r2")
NO_VALUE = "-"


def percent(value: float | None) -> str:
    return NO_VALUE if value is None else f"{100 * value:.1f}"


def metric_text(metric: str, value: float | None) -> str:
    """A fraction in percent; mae, rmse and r2, which are not fractions, as they are."""
    return percent(value) if value is None or metric not in NOT_IN_PERCENT else f"{value:.3f}"


def interval_text(metric: str, value: float, interval: Sequence[float]) -> str:
    low, high = (metric_text(metric, end) for end in interval)
    return f"{metric_text(metric, value)} [{low}, {high}]"


def shown_metrics(task: Task, result: Mapping[str, Any]) -> list[str]:
    """The metrics of a task's result in short tables; eval.json has more (`evaluation.metrics.metrics_of`)."""
    shown = [*task.metrics, *task.extra_metrics]
    if task.kind == "classification":
        several = task.suite == "own" or len(task.labels) > 2
        shown += ["accuracy", "f1_macro"] if several else ["accuracy"]
    shown += ["subset_accuracy"] if task.multi_label else []
    return [metric for metric in dict.fromkeys(shown) if metric in result["metrics"]]


def cell_text(text: str) -> str:
    """Text for a Markdown cell, with Markdown's special characters escaped."""
    return re.sub(r"([\\`*|<\[\]])", r"\\\1", " ".join(text.split()))


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int = 1) -> str:
    """A table whose first `text_columns` are left-aligned and the others right-aligned; short rows are padded."""
    rule = [":--" if i < text_columns else "--:" for i in range(len(header))]
    padded = [[*row, *[""] * (len(header) - len(row))] for row in [header, rule, *rows]]
    return "\n".join(f"| {' | '.join(row)} |" for row in padded) + "\n"


def before_after_table(
    tasks: Sequence[Task], before: Mapping[str, Any] | None, after: Mapping[str, Any], split: str
) -> Table:
    """One row per task and metric, with format errors and predicted against gold label shares.

    In percent; mae, rmse and r2 as they are.

    Args:
        before: scores before training; None: the table has a single column of scores.
    """
    names = ["before", "after"] if before is not None else ["score"]
    shown = [task for task in tasks if task.name in after]
    plain = sorted({metric for task in shown for metric in shown_metrics(task, after[task.name])} & {*NOT_IN_PERCENT})
    unit = f"%; {', '.join(plain)} as they are" if plain else "%"
    table = Table(title=f"{' and '.join(names).capitalize()}, {split} split ({unit})", title_justify="left")
    for column in ("task", "metric", "majority", *names, "wrong format", "predicted (gold)"):
        table.add_column(column, justify="left" if column in ("task", "metric", "predicted (gold)") else "right")
    for task in shown:
        new, old = after[task.name], (before or {}).get(task.name)
        for k, metric in enumerate(shown_metrics(task, new)):
            value, interval = new["metrics"][metric], new["intervals"][metric]
            ends = ", ".join(f"{end:.2f}" if metric in NOT_IN_PERCENT else f"{100 * end:.0f}" for end in interval)
            wrong = f"{100 * old['format_error_rate']:.1f} → " if old else ""
            gold, shares = new.get("gold_shares", {}), new.get("predicted_shares", {})
            parts = [f"{word} {100 * share:.0f} ({100 * gold.get(word, 0):.0f})" for word, share in shares.items()]
            table.add_row(
                escape(f"{task.display_name} ({new['samples']})") if k == 0 else "",
                metric,
                percent(new["majority"]) if metric in ("accuracy", "subset_accuracy") else "",
                *([metric_text(metric, old["metrics"].get(metric)) if old else NO_VALUE] if before is not None else []),
                f"{metric_text(metric, value)} [{ends}]",
                f"{wrong}{percent(new['format_error_rate'])}" if k == 0 else "",
                escape("  ".join(parts)) if k == 0 else "",
            )
    for name, suite in SUITES.items():
        moments = [before, after] if before is not None else [after]
        means = [percent(suite_average(suite, {n: r["score"] for n, r in moment.items()})) for moment in moments]
        if means[-1] != NO_VALUE:
            table.add_row(f"average, {name}", "", "", *means, "", "")
    return table
