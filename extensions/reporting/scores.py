"""Scores as text: number formats, Markdown tables, and the table that a run prints on the console."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table

from extensions.evaluation.metrics import WRONG_FORMAT, suite_average
from extensions.tasks import SUITES, Task

NOT_IN_PERCENT = ("mae", "rmse", "r2")
NO_VALUE = "-"
MAX_CLASSES = 12  # rows of a table of classes
MAX_SHARES = 6  # labels whose shares are shown
SHARES_WIDTH = 25  # with it, the table of GLUE has 120 columns


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


def change_text(record: Mapping[str, Any]) -> str:
    """A record of changes.jsonl: where a run was resumed with changes, extended or forked."""
    keys = [f"{key} {was!r} to {now!r}" for key, (was, now) in record["keys"].items()]
    files = [f"other files for {name}" for name in record["inputs"]]
    source = f" from {record['source']}" if record.get("source") else ""
    return (
        f"{record['kind'].capitalize()}{source} after step {record['step']}: {'; '.join([*keys, *files]) or 'no key'}"
    )


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int = 1) -> str:
    """A table whose first `text_columns` are left-aligned and the others right-aligned; short rows are padded."""
    rule = [":--" if i < text_columns else "--:" for i in range(len(header))]
    padded = [[*row, *[""] * (len(header) - len(row))] for row in [header, rule, *rows]]
    return "\n".join(f"| {' | '.join(row)} |" for row in padded) + "\n"


def best_yardsticks(yardsticks: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[str, Any]]:
    """Task name -> kind and result of its yardstick with the highest score; the first of equal ones."""
    best: dict[str, tuple[str, Any]] = {}
    for kind, results in yardsticks.items():
        for name, result in results.items():
            if name not in best or result["score"] > best[name][1]["score"]:
                best[name] = kind, result
    return best


def has_likelihood(results: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether the answers by likelihood have other scores than the answers by `evaluation.decoding`."""
    return any(r["likelihood"]["metrics"] != r["metrics"] for r in results.values() if r.get("likelihood"))


def before_after_table(
    tasks: Sequence[Task],
    before: Mapping[str, Any] | None,
    after: Mapping[str, Any],
    split: str,
    yardsticks: Mapping[str, Mapping[str, Any]] | None = None,
) -> Table:
    """One row per task and metric, with format errors and predicted against gold label shares.

    In percent; mae, rmse and r2 as they are. `by likelihood` is after training, and left out if it equals the scores.

    Args:
        before: scores before training; None: the table has a single column of scores.
        yardsticks: of eval.json; the column shows the one with the best score of each task, but for the majority.
    """
    bars = best_yardsticks({kind: found for kind, found in (yardsticks or {}).items() if kind != "majority"})
    names = ["before", "after"] if before is not None else ["score"]
    by_likelihood = ["by\nlikelihood"] if has_likelihood(after) else []
    shown = [task for task in tasks if task.name in after]
    plain = sorted({metric for task in shown for metric in shown_metrics(task, after[task.name])} & {*NOT_IN_PERCENT})
    unit = f"%; {', '.join(plain)} as they are" if plain else "%"
    table = Table(title=f"{' and '.join(names).capitalize()}, {split} split ({unit})", title_justify="left")
    bar_column = ["yardstick"] if bars else []
    for column in (
        "task",
        "metric",
        "majority",
        *bar_column,
        *names,
        *by_likelihood,
        "wrong format",
        "predicted (gold)",
    ):
        table.add_column(column, justify="left" if column in ("task", "metric", "predicted (gold)") else "right")
    for task in shown:
        new, old = after[task.name], (before or {}).get(task.name)
        other = (new.get("likelihood") or {}).get("metrics", {})
        for k, metric in enumerate(shown_metrics(task, new)):
            value, interval = new["metrics"][metric], new["intervals"][metric]
            ends = ", ".join(f"{end:.2f}" if metric in NOT_IN_PERCENT else f"{100 * end:.0f}" for end in interval)
            wrong = f"{percent(old['format_error_rate'])} → " if old and not task.is_ranked else ""
            table.add_row(
                f"{task.display_name} ({new['samples']})" if k == 0 else "",
                metric,
                percent(new["majority"]) if metric in ("accuracy", "subset_accuracy") else "",
                *(
                    [metric_text(metric, bars[task.name][1]["metrics"].get(metric)) if task.name in bars else ""]
                    if bars
                    else []
                ),
                *([metric_text(metric, old["metrics"].get(metric)) if old else NO_VALUE] if before is not None else []),
                f"{metric_text(metric, value)} [{ends}]",
                *([metric_text(metric, other.get(metric))] if by_likelihood else []),
                f"{wrong}{percent(new['format_error_rate'])}" if k == 0 else "",
                _shares_text(new) if k == 0 else "",
            )
    for name, suite in SUITES.items():
        moments = [before, after] if before is not None else [after]
        found = [{n: r["score"] for n, r in moment.items()} for moment in moments]
        if by_likelihood:
            found.append({n: r["likelihood"]["score"] for n, r in after.items() if r.get("likelihood")})
        means = [percent(suite_average(suite, scores)) for scores in found]
        if means[len(moments) - 1] != NO_VALUE:
            table.add_row(f"average, {name}", "", "", *([""] if bars else []), *means, "", "")
    return table


def _shares_text(result: Mapping[str, Any]) -> str:
    """Predicted and gold shares of the labels, the most predicted if there are many, in lines of SHARES_WIDTH."""
    gold, shares = result.get("gold_shares", {}), dict(result.get("predicted_shares", {}))
    shares.pop(WRONG_FORMAT, None)  # has its own column
    shown = list(shares) if len(shares) <= MAX_SHARES else sorted(shares, key=lambda w: -shares[w])[: MAX_SHARES - 1]
    parts = [f"{word} {100 * shares[word]:.0f} ({100 * gold.get(word, 0):.0f})" for word in shown]
    parts += [f"and {len(shares) - len(shown)} more"] if len(shown) < len(shares) else []
    text = "  ".join(part.replace(" ", "\xa0") for part in parts)  # a label and its numbers stay together
    return textwrap.fill(text, SHARES_WIDTH, break_long_words=False, break_on_hyphens=False).replace("\xa0", " ")


def class_table(task: Task, result: Mapping[str, Any]) -> Table:
    """Precision, recall, F1 (%) and gold rows per label, and the wrong answer that its rows get most often.

    Of more than `MAX_CLASSES` labels, those with the lowest F1.
    """
    classes, confusion = result["classes"], result.get("confusion")
    words = list(classes)
    title = f"{task.display_name}: classes (%)"
    if len(words) > MAX_CLASSES:
        words = sorted(words, key=lambda word: classes[word]["f1"])[:MAX_CLASSES]
        title = f"{task.display_name}: the {MAX_CLASSES} of {len(classes)} classes with the lowest F1 (%)"
    table = Table(title=title, title_justify="left")
    for column in ("class", "precision", "recall", "F1", "rows", *(["most frequent confusion"] if confusion else [])):
        table.add_column(column, justify="left" if column in ("class", "most frequent confusion") else "right")
    for word in words:
        numbers = [percent(classes[word][key]) for key in ("precision", "recall", "f1")]
        cells = [word, *numbers, str(classes[word]["support"])]
        if confusion:
            row = confusion["labels"].index(word)
            wrong = {other: n for k, (other, n) in enumerate(_answers(confusion, row)) if k != row}
            most = max(wrong, key=lambda other: wrong[other])
            cells.append(f"{most} ({wrong[most]})" if wrong[most] else "")
        table.add_row(*cells)
    return table


def _answers(confusion: Mapping[str, Any], row: int) -> list[tuple[str, int]]:
    """Answer -> rows of a gold label; the last is the wrong format."""
    return list(zip([*confusion["labels"], WRONG_FORMAT], confusion["counts"][row], strict=True))


def own_class_tables(tasks: Sequence[Task], results: Mapping[str, Any]) -> list[Table]:
    """`class_table` of a user's own tasks."""
    own = [task for task in tasks if task.suite == "own" and results.get(task.name, {}).get("classes")]
    return [class_table(task, results[task.name]) for task in own]


def calibration_text(result: Mapping[str, Any]) -> str:
    """Log loss, Brier score and expected calibration error of a result's probabilities, in words."""
    found = result["calibration"]
    return (
        f"probabilities: log loss {found['log_loss']:.3f} nats, Brier score {found['brier']:.3f}, expected calibration "
        f"error {percent(found['ece'])}%"
    )
