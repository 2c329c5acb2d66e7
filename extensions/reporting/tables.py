"""The tables of a report: the paper's with our rows beside its own, and what stands behind our numbers.

The paper's tables are written as it prints them (Markdown, LaTeX), and in long form (CSV). The others are Markdown.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pylatexenc.latexencode import unicode_to_latex

from extensions.evaluation.metrics import WRONG_FORMAT, suite_average
from extensions.reporting.comparison import FinishedRun, Result, Row
from extensions.reporting.scores import (
    NO_VALUE,
    NOT_IN_PERCENT,
    cell_text,
    interval_text,
    markdown_table,
    metric_text,
    percent,
)
from extensions.tasks import SUITES, Task

PAPER: dict[str, Any] = json.loads((Path(__file__).parent / "paper_tables.json").read_text(encoding="utf-8"))
METHODS = {"zero-shot": "Zero-shot prompting", "few-shot": "Few-shot prompting"}  # as its tables print them
AVERAGE = "average"


@dataclass(frozen=True)
class PaperTable:
    """Which of the paper's tables."""

    name: str  # in paper_tables.json, and of our files
    title: str
    suites: tuple[str, ...]  # that its columns are from; one: it has an average


PAPER_TABLES = {
    "glue": PaperTable("table1_glue", "GLUE (the paper's Table 1)", ("glue",)),
    "superglue": PaperTable("table2_superglue", "SuperGLUE (the paper's Table 2)", ("superglue",)),
    "models": PaperTable("table3_models", "STS-B and COPA across models (the paper's Table 3)", ("glue", "superglue")),
}


@dataclass(frozen=True)
class Line:
    """A row as it is printed."""

    model: str | None  # the heading that it stands under
    label: str
    cells: dict[str, tuple[str, ...]]  # column -> a percentage for each metric; a column without a result lacks


@dataclass(frozen=True)
class TableBlock:
    """Rows that are comparable with each other: best and second best are marked among them."""

    title: str
    lines: list[Line]
    unmarked: frozenset[str] = frozenset()  # columns whose numbers are of different rows of the task


@dataclass(frozen=True)
class ResultTable:
    """A table of results in the paper's form."""

    name: str
    title: str
    columns: dict[str, str]  # task name or "average" -> heading
    blocks: list[TableBlock]
    notes: list[str]
    records: list[dict[str, Any]]  # the long form


# -------------------------------------------------------------------------------------------------------- making


def paper_table(which: PaperTable, rows: Sequence[Row]) -> ResultTable | None:
    """One of the paper's tables with ours below; None where no row has a task of it."""
    source = PAPER[which.name]
    tasks = [t for suite in which.suites for t in SUITES[suite] if t.title in source["columns"]]
    ours = [(row, _own(row, tasks)) for row in rows]
    ours = [(row, results) for row, results in ours if results]
    if not ours:
        return None
    suite = SUITES[which.suites[0]] if len(which.suites) == 1 else None
    columns = {task.name: task.title for task in tasks} | ({AVERAGE: "Average"} if suite else {})
    names = {task.title: task.name for task in tasks}
    theirs, records = [], []
    for name, entry in source["rows"].items():
        values, average = (entry["scores"], entry["average"]) if suite else (dict(zip(names, entry, strict=True)), None)
        model, _, method = name.rpartition(" ")
        numbers = {names[t]: v if isinstance(v, list) else [v] for t, v in values.items() if v is not None}
        cells = {task: tuple(f"{v:.1f}" for v in found) for task, found in numbers.items()}
        if average is not None:
            cells[AVERAGE] = (str(average),)
        theirs.append(Line(model or None, METHODS.get(method, method), cells))
        for task in tasks:
            records += [
                _record("paper", name, task.name, metric, value, split="test")
                for metric, value in zip(task.metrics, numbers.get(task.name, ()), strict=False)
            ]
        if average is not None:
            records.append(_record("paper", name, AVERAGE, AVERAGE, average, split="test"))
    lines, own_records = _own_lines(ours, suite)
    mixed = _mixed(ours)
    blocks = [TableBlock("The paper, on the evaluation servers", theirs), TableBlock(_own_title(ours), lines, mixed)]
    notes = [
        "The paper's numbers are from the evaluation servers (test splits). " + _own_note(ours),
        "In percent; two metrics of a task as first/second. Best in bold, second best underlined, in each block for "
        "itself." + _mixed_note(mixed, columns),
    ]
    if suite:
        counted = sum(task.in_suite_average for task in suite)
        notes.append(f"Average: over {counted} columns by the paper's rule; the paper's own as it prints them.")
    return ResultTable(which.name, which.title, columns, blocks, notes, records + own_records)


def other_tasks(rows: Sequence[Row]) -> ResultTable | None:
    """The tasks outside GLUE and SuperGLUE: our rows alone; None where there is no such task."""
    found = {r.task.name: r.task for row in rows for r in row.results.values() if r.task.suite not in SUITES}
    ours = [(row, _own(row, found.values())) for row in rows]
    ours = [(row, results) for row, results in ours if results]
    if not ours:
        return None
    lines, records = _own_lines(ours, None)
    columns, mixed = {task.name: task.display_name for task in found.values()}, _mixed(ours)
    unit = "In percent" + "; R2 as it is" * any("r2" in task.metrics for task in found.values())
    notes = [_own_note(ours), f"{unit}. Best in bold, second best underlined." + _mixed_note(mixed, columns)]
    return ResultTable("tasks", "Tasks", columns, [TableBlock(_own_title(ours), lines, mixed)], notes, records)


def _mixed(ours: Ours) -> frozenset[str]:
    """Columns that must not be compared: the rows of the task that were scored are not the same in all lines."""
    scored: dict[str, set[tuple[str, int]]] = {}
    for _, results in ours:
        for name, result in results.items():
            scored.setdefault(name, set()).add((result.split, result.score.samples))
    mixed = frozenset(name for name, kinds in scored.items() if len(kinds) > 1)
    return mixed | {AVERAGE} if mixed else mixed


def _mixed_note(mixed: frozenset[str], columns: Mapping[str, str]) -> str:
    names = ", ".join(columns[name] for name in columns if name in mixed)
    return f" No marks where our lines are of different rows ({names})." if names else ""


def _own(row: Row, tasks: Iterable[Task]) -> dict[str, Result]:
    """The row's results of `tasks`; a recipe's own task of the same name is another task."""
    wanted = {(task.suite, task.name) for task in tasks}
    return {name: r for name, r in row.results.items() if (r.task.suite, name) in wanted}


Ours = Sequence[tuple[Row, dict[str, Result]]]


def _own_lines(ours: Ours, suite: Sequence[Task] | None) -> tuple[list[Line], list[dict[str, Any]]]:
    lines, records = [], []
    for row, results in ours:
        cells = {}
        for name, result in results.items():
            score = result.score
            cells[name] = tuple(metric_text(metric, score.metrics[metric]) for metric in result.task.metrics)
            records += [
                _record(
                    "ours", row.name, name, metric, _scaled(metric, value),
                    [_scaled(metric, end) for end in score.intervals[metric]], score.samples,
                    result.split, str(result.run.folder),
                )
                for metric, value in score.metrics.items()
            ]  # fmt: skip
        average = suite_average(suite, {n: r.score.score for n, r in results.items()}) if suite else None
        if average is not None:
            cells[AVERAGE] = (percent(average),)
            records.append(_record("ours", row.name, AVERAGE, AVERAGE, 100 * average))
        lines.append(Line(row.model, row.label, cells))
    return lines, records


CSV_COLUMNS = ("block", "row", "task", "metric", "value", "low", "high", "samples", "split", "run")


def _record(
    block: str,
    row: str,
    task: str,
    metric: str,
    value: float,
    interval: Sequence[float] = (),
    samples: int | None = None,
    split: str = "",
    run: str = "",
) -> dict[str, Any]:
    low, high = (round(end, 6) for end in interval) if interval else (None, None)
    values = (block, row, task, metric, round(value, 6), low, high, samples, split, run)
    return dict(zip(CSV_COLUMNS, values, strict=True))


def _own_title(ours: Ours) -> str:
    splits = sorted({r.split for _, results in ours for r in results.values()})
    return f"Ours, {' and '.join(splits)} split{'s' if len(splits) > 1 else ''}"


def _own_note(ours: Ours) -> str:
    """Which rows of which split, task by task; rows of the table need not have been evaluated on the same."""
    found: dict[str, dict[str, set[int]]] = {}
    for _, results in ours:
        for result in results.values():
            found.setdefault(result.task.display_name, {}).setdefault(result.split, set()).add(result.score.samples)
    parts = []
    for title, splits in found.items():
        counts = [f"{split} split, {_span(samples)} rows" for split, samples in splits.items()]
        parts.append(f"{title}: {' and '.join(counts)}")
    return (
        f"Ours are of labelled rows, scored here ({'; '.join(parts)}). Where a validation split also chose "
        "checkpoints, epochs or grid cells, its scores are on the high side."
    )


def _span(numbers: set[int]) -> str:
    return str(min(numbers)) if len(numbers) == 1 else f"{min(numbers)} to {max(numbers)}"


def _scaled(metric: str, value: float) -> float:
    return value if metric in NOT_IN_PERCENT else 100 * value


# --------------------------------------------------------------------------------------------------------- marks


def marks(lines: Sequence[Line], columns: Iterable[str]) -> dict[tuple[int, str, int], str]:
    """Which numbers are best and second best of a block, for each metric of a column.

    Equal numbers, as printed, share a mark, and two that are best leave no second, as in the paper (ReCoRD). A number
    without another to compare with has no mark.

    Returns:
        (line, column, metric) -> "best" or "second".
    """
    found = {}
    for column in columns:
        cells = {i: line.cells[column] for i, line in enumerate(lines) if column in line.cells}
        for k in range(max(map(len, cells.values()), default=0)):
            numbers = {i: float(cell[k]) for i, cell in cells.items() if k < len(cell)}
            for i, number in numbers.items():
                better = sum(other > number for other in numbers.values())
                if len(numbers) > 1 and better < 2:
                    found[i, column, k] = "second" if better else "best"
    return found


# --------------------------------------------------------------------------------------------------------- forms


def markdown(table: ResultTable) -> str:
    """As GitHub shows it; underlined by HTML, which Markdown has no sign for."""
    rows = []
    for block in table.blocks:
        rows.append([f"**{cell_text(block.title)}**"])
        rows += [
            [cell_text(text) if is_heading or not under else f"*{cell_text(text)}*", *cells]
            for text, cells, is_heading, under in _printed(table, block, {"best": "**{}**", "second": "<u>{}</u>"})
        ]
    return markdown_table(["Model", *table.columns.values()], rows)


def latex(table: ResultTable) -> str:
    r"""A `table*` for the paper's own look; needs `\usepackage{booktabs}`."""
    width = len(table.columns) + 1
    body = []
    for block in table.blocks:
        body += [r"\midrule", rf"\multicolumn{{{width}}}{{l}}{{\textbf{{{unicode_to_latex(block.title)}}}}} \\"]
        printed = _printed(table, block, {"best": r"\textbf{{{}}}", "second": r"\underline{{{}}}"})
        for text, cells, is_heading, under in printed:
            name = unicode_to_latex(text)
            if is_heading:
                body.append(rf"\multicolumn{{{width}}}{{l}}{{{name}}} \\")
            else:
                body.append(" & ".join([rf"\quad \textit{{{name}}}" if under else name, *cells]) + r" \\")
    heading = " & ".join(["Models", *(unicode_to_latex(title) for title in table.columns.values())])
    lines = [
        r"% needs \usepackage{booktabs}",
        r"\begin{table*}",
        r"\centering",
        r"\footnotesize",
        r"\setlength{\tabcolsep}{3pt}",
        rf"\begin{{tabular}}{{l{'c' * len(table.columns)}}}",
        r"\toprule",
        rf"{heading} \\",
        *body,
        r"\bottomrule",
        r"\end{tabular}",
        rf"\caption{{{unicode_to_latex(' '.join([table.title + '.', *table.notes]))}}}",
        rf"\label{{tab:{table.name}}}",
        r"\end{table*}",
    ]
    return "\n".join(lines) + "\n"


def _printed(
    table: ResultTable, block: TableBlock, styles: Mapping[str, str]
) -> list[tuple[str, list[str], bool, bool]]:
    """(text, cells, whether it is the heading of a model, whether it stands under one), line by line."""
    marked = marks(block.lines, [column for column in table.columns if column not in block.unmarked])
    rows: list[tuple[str, list[str], bool, bool]] = []
    heading = None
    for i, line in enumerate(block.lines):
        if line.model is not None and line.model != heading:
            rows.append((line.model, [], True, False))
        heading = line.model
        cells = []
        for column in table.columns:
            numbers = [
                styles[marked[i, column, k]].format(number) if (i, column, k) in marked else number
                for k, number in enumerate(line.cells.get(column, ()))
            ]
            cells.append("/".join(numbers) or NO_VALUE)
        rows.append((line.label, cells, False, line.model is not None))
    return rows


def csv_text(table: ResultTable) -> str:
    """Long form: a number a line, in percent (mae, rmse and r2 as they are); low and high end its 95% interval."""
    file = io.StringIO()
    writer = csv.DictWriter(file, CSV_COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(table.records)
    return file.getvalue()


# ---------------------------------------------------------------------------------------- behind the numbers


def intervals(rows: Sequence[Row]) -> str:
    """Every metric of every row with its 95% interval."""
    lines = []
    for row in rows:
        for result in row.results.values():
            for metric, value in result.score.metrics.items():
                number = interval_text(metric, value, result.score.intervals[metric])
                cells = (row.name, result.task.display_name, metric, result.split)
                lines.append([*map(cell_text, cells), number, str(result.score.samples)])
    return markdown_table(["Row", "Task", "Metric", "Split", "Value [95%]", "Samples"], lines, 4)


def bias(rows: Sequence[Row]) -> str | None:
    """Whether a row prefers a label: shares of its answers against those of the gold labels; None without any."""
    lines = []
    for row in rows:
        for result in row.results.values():
            gold, predicted = result.score.gold_shares, result.score.predicted_shares
            if not gold.keys() - {WRONG_FORMAT}:
                continue
            shares = [f"{word} {percent(predicted.get(word, 0.0))} ({percent(gold[word])})" for word in gold]
            off = {word: predicted.get(word, 0.0) - gold[word] for word in gold if word != WRONG_FORMAT}
            most = max(off, key=lambda word: abs(off[word]))
            cells = (row.name, result.task.display_name, ", ".join(shares))
            numbers = (percent(result.score.format_error_rate), f"{100 * off[most]:+.1f} ({cell_text(most)})")
            lines.append([*map(cell_text, cells), *numbers])
    header = ["Row", "Task", "Predicted (gold)", "Wrong format", "Largest deviation"]
    return markdown_table(header, lines, 3) if lines else None


def costs(rows: Sequence[Row]) -> str | None:
    """Samples and time of each training; None without one."""
    lines = []
    for row, run in _trainings(rows):
        assert run.training is not None
        samples, seconds, best = run.training.samples, run.training.seconds, run.best_validation
        lines.append(
            [
                cell_text(row.name),
                cell_text(run.trained_titles),
                str(run.training.steps),
                str(samples),
                f"{seconds:.0f}",
                f"{seconds / samples:.3f}" if samples else NO_VALUE,
                NO_VALUE if best is None else f"{best.seconds:.0f}",
            ]
        )
    header = ["Row", "Trained on", "Steps", "Samples", "Seconds", "Seconds a sample", "Seconds to best validation"]
    return markdown_table(header, lines, 2) if lines else None


def time_ratios(rows: Sequence[Row]) -> str | None:
    """Training time of PPO over that of SFT, for runs of one model and the same tasks; None without such a pair."""
    trainings = _trainings(rows)
    lines = []
    for row, ppo in trainings:
        for other, sft in trainings:
            same = row.model == other.model and sorted(ppo.trained_tasks) == sorted(sft.trained_tasks)
            if (ppo.recipe.method, sft.recipe.method) != ("ppo", "sft") or not same:
                continue
            assert ppo.training is not None and sft.training is not None
            times = [(run.training.seconds, run.training.samples) for run in (ppo, sft) if run.training]
            to_best = [run.best_validation.seconds if run.best_validation else None for run in (ppo, sft)]
            ratios = [
                _ratio(*(seconds / samples if samples else None for seconds, samples in times)),
                _ratio(*(seconds for seconds, _ in times)),
                _ratio(*to_best),
            ]
            lines.append([*map(cell_text, (row.name, other.label, ppo.trained_titles)), *ratios])
    if not lines:
        return None
    lines.append(["The paper (LLAMA2-7B, GLUE)", "SFT", "", "", f"{PAPER['ppo_over_sft_time']}", ""])
    return markdown_table(["PPO", "over", "Trained on", "A sample", "Whole training", "To best validation"], lines, 3)


def _trainings(rows: Sequence[Row]) -> list[tuple[Row, FinishedRun]]:
    return [(row, run) for row in rows for run in row.runs if run.training is not None]


def _ratio(above: float | None, below: float | None) -> str:
    return NO_VALUE if above is None or not below else f"{above / below:.2f}"
