"""Result tables: the paper's with our rows below, and our own tasks; as Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pylatexenc.latexencode import unicode_to_latex

from extensions.evaluation.metrics import suite_average
from extensions.reporting.finished_runs import DecodedScore, Score, YardstickScore
from extensions.reporting.rows import PROMPTING, Result, Row
from extensions.reporting.scores import NO_VALUE, NOT_IN_PERCENT, cell_text, markdown_table, metric_text, percent
from extensions.reporting.yardstick_lines import missing_yardstick, yardstick_name
from extensions.tasks import SUITES, Task

PAPER: dict[str, Any] = json.loads((Path(__file__).parent / "paper_tables.json").read_text(encoding="utf-8"))
PAPER_TABLES = {"glue": "table1_glue", "superglue": "table2_superglue", "models": "table3_models"}  # name in PAPER
LABELS = dict(zip(("zero-shot", "few-shot"), PROMPTING, strict=True))  # name in PAPER -> printed
AVERAGE = "average"
BY_LIKELIHOOD = "by likelihood"
CSV_COLUMNS = ("block", "row", "task", "metric", "value", "low", "high", "samples", "split", "run", "decoding")


@dataclass(frozen=True)
class Line:
    """A row as it is printed. In percent, except mae, rmse and r2."""

    name: str  # in the CSV file
    model: str | None  # the heading above it
    label: str
    cells: dict[str, list[str]]  # column -> one text per metric; without columns that have no result
    records: list[tuple[Any, ...]]  # its CSV lines: the values of `CSV_COLUMNS` from "task" on, which may end early


@dataclass(frozen=True)
class TableBlock:
    """Lines that are comparable: the best and second-best numbers are marked among them."""

    source: str  # in the CSV file
    title: str
    lines: list[Line]
    unmarked: frozenset[str] = frozenset()  # columns whose numbers come from different rows of the task


@dataclass(frozen=True)
class ResultTable:
    name: str  # of its files
    title: str
    columns: dict[str, str]  # task name or "average" -> heading
    blocks: list[TableBlock]
    notes: list[str]


# ------------------------------------------------------------------------------------------------------ contents


def paper_table(name: str, rows: Sequence[Row]) -> ResultTable | None:
    """A table of the paper with our rows below; None if no row has a task of it.

    Args:
        name: in paper_tables.json.
    """
    source = PAPER[name]
    tasks = [task for suite in source["suites"] for task in SUITES[suite] if task.title in source["columns"]]
    suite = SUITES[source["suites"][0]] if len(source["suites"]) == 1 else []  # averaged
    columns = {task.name: task.title for task in tasks} | ({AVERAGE: "Average"} if suite else {})
    ours = [kept for row in rows if (kept := row.restricted_to(tasks)).results]
    if not ours:
        return None
    theirs = [_paper_line(row, entry, tasks) for row, entry in source["rows"].items()]
    block, origin, unmarked = _our_block(ours, columns, suite)
    notes = [
        f"The paper's numbers are from the evaluation servers (test splits). {origin}",
        "In percent; two metrics of a task as first/second. Best in bold, second best underlined, within "
        f"each block.{unmarked}",
    ]
    if suite:
        counted = sum(task.in_suite_average for task in suite)
        notes.append(f"Average: over {counted} columns by the paper's rule; the paper's averages as printed.")
    paper = TableBlock("paper", "The paper, on the evaluation servers", theirs)
    blocks = [block for block in (paper, block, yardstick_block(ours, suite, block.unmarked)) if block]
    return ResultTable(name, source["title"], columns, blocks, notes)


def other_tasks(rows: Sequence[Row]) -> ResultTable | None:
    """The tasks outside GLUE and SuperGLUE, our rows alone; None without such a task."""
    tasks = {r.task.name: r.task for row in rows for r in row.results.values() if r.task.suite not in SUITES}
    ours = [kept for row in rows if (kept := row.restricted_to(tasks.values())).results]
    if not ours:
        return None
    columns = {task.name: task.display_name for task in tasks.values()}
    block, origin, unmarked = _our_block(ours, columns, [])
    unit = "In percent; R2 as it is" if any("r2" in task.metrics for task in tasks.values()) else "In percent"
    notes = [origin, f"{unit}. Best in bold, second best underlined.{unmarked}"]
    blocks = [block for block in (block, yardstick_block(ours, [], block.unmarked)) if block]
    return ResultTable("tasks", "Tasks", columns, blocks, notes)


def all_tables(rows: Sequence[Row]) -> list[ResultTable]:
    """The paper's tables, and that of the other tasks, each if a row has a result for it."""
    return [t for t in (*(paper_table(name, rows) for name in PAPER_TABLES.values()), other_tasks(rows)) if t]


def _paper_line(name: str, entry: dict[str, Any], tasks: Iterable[Task]) -> Line:
    cells: dict[str, list[str]] = {}
    records: list[tuple[Any, ...]] = []
    for task in tasks:
        value = entry["scores"][task.title]
        values = value if isinstance(value, list) else [value] * (value is not None)
        if values:
            cells[task.name] = [f"{one:.1f}" for one in values]
            metrics = zip(task.metrics, values, strict=True)
            records += [(task.name, metric, one, None, None, None, "test") for metric, one in metrics]
    if entry["average"] is not None:
        cells[AVERAGE] = [str(entry["average"])]
        records.append((AVERAGE, AVERAGE, entry["average"], None, None, None, "test"))
    model, _, method = name.rpartition(" ")
    return Line(name, model or None, LABELS.get(method, method), cells, records)


def _our_lines(row: Row, suite: Sequence[Task]) -> list[Line]:
    """The line of a row, and below it that of its answers by likelihood, as far as its runs have them."""
    results = row.results.items()
    sampled: dict[str, DecodedScore] = {name: result.score for name, result in results}
    likely = {name: other for name, result in results if (other := result.by_likelihood) is not None}
    lines = [_our_line(row, sampled, suite)]
    return [*lines, _our_line(row, likely, suite, f", {BY_LIKELIHOOD}")] if likely else lines


def _our_line(row: Row, scores: Mapping[str, DecodedScore], suite: Sequence[Task], remark: str = "") -> Line:
    cells: dict[str, list[str]] = {}
    records: list[tuple[Any, ...]] = []
    for name, score in scores.items():
        result = row.results[name]
        origin = (result.score.samples, result.split, str(result.run.folder), _decoding(result, score))
        cells[name] = [metric_text(metric, score.metrics[metric]) for metric in result.task.metrics]
        for metric, value in score.metrics.items():
            scale = 1 if metric in NOT_IN_PERCENT else 100
            numbers = (round(scale * number, 6) for number in (value, *score.intervals[metric]))
            records.append((name, metric, *numbers, *origin))
    average = suite_average(suite, {name: score.score for name, score in scores.items()})
    if average is not None:
        cells[AVERAGE] = [percent(average)]
        records.append((AVERAGE, AVERAGE, round(100 * average, 6)))
    return Line(f"{row.name}{remark}", row.model, f"{row.label}{remark}", cells, records)


def _decoding(result: Result, score: DecodedScore) -> str | None:
    """Recipe key evaluation.decoding of a score; None for an encoder or a yardstick."""
    recipe = result.run.recipe
    if recipe.method == "encoder" or isinstance(score, YardstickScore):
        return None
    return recipe.evaluation.decoding if score is result.score else "likelihood"


def _our_block(ours: Sequence[Row], columns: Mapping[str, str], suite: Sequence[Task]) -> tuple[TableBlock, str, str]:
    """Our rows; a note on the data they were scored on, which may differ between them; a note on unmarked columns."""
    scored: dict[str, dict[str, set[int]]] = {}  # task name -> split -> numbers of rows
    for row in ours:
        for name, result in row.results.items():
            scored.setdefault(name, {}).setdefault(result.split, set()).add(result.score.samples)
    splits = sorted({split for by_split in scored.values() for split in by_split})
    title = f"Ours, {' and '.join(splits)} split{'s' if len(splits) > 1 else ''}"
    unmarked = {name for name, by_split in scored.items() if sum(map(len, by_split.values())) > 1}
    unmarked |= {AVERAGE} if unmarked else set()
    parts = []
    for name, by_split in scored.items():
        counts = [f"{split} split, {_range_text(numbers)} rows" for split, numbers in by_split.items()]
        parts.append(f"{columns[name]}: {' and '.join(counts)}")
    origin = (
        f"Ours are from labelled rows, scored locally ({'; '.join(parts)}). Where a validation split also chose "
        "checkpoints, epochs or grid cells, its scores are optimistic."
    )
    shown = ", ".join(title for name, title in columns.items() if name in unmarked)
    note = f" Not marked, since our lines were scored on different rows: {shown}." if shown else ""
    kinds = {kind: scores for row in ours for run in row.runs for kind, scores in run.scores.yardsticks.items()}
    note += f" Yardsticks: {missing}." if (missing := missing_yardstick(kinds)) else ""
    lines = [line for row in ours for line in _our_lines(row, suite)]
    if any(result.by_likelihood for row in ours for result in row.results.values()):
        origin += f" Lines {BY_LIKELIHOOD} count the most probable of a task's answers instead of the written one."
    return TableBlock("ours", title, lines, frozenset(unmarked)), origin, note


def yardstick_block(ours: Sequence[Row], suite: Sequence[Task], unmarked: frozenset[str]) -> TableBlock | None:
    """The yardsticks of our rows: one line per kind, or several where runs have other training rows for a task."""
    lines: list[tuple[str, dict[str, YardstickScore], dict[str, Result]]] = []  # kind, scores and results by task
    for name, result in ((name, result) for row in ours for name, result in row.results.items()):
        for kind, by_task in result.run.scores.yardsticks.items():
            if kind == "majority" or (score := by_task.get(name)) is None:
                continue
            fitting = [line for line in lines if line[0] == kind and _is_same(line[1].get(name, score), score)]
            if not fitting:
                lines.append((kind, {}, {}))
            of_rows = {score.train_rows}  # if possible, all of a line have the same number of training rows
            line = min(fitting or lines[-1:], key=lambda line: {s.train_rows for s in line[1].values()} != of_rows)
            line[1].setdefault(name, score)
            line[2].setdefault(name, result)
    printed = []
    for group, scores, results in sorted(lines, key=lambda line: line[0] == "embeddings"):
        title = yardstick_name(group, next(iter(results.values())).task)
        used = f"{_range_text({score.train_rows for score in scores.values()})} training rows"
        seconds = sum(score.seconds for score in scores.values())
        row = Row(None, f"{title[0].upper()}{title[1:]} ({used}, {seconds:.1f} s)", results)
        printed.append(_our_line(row, scores, suite))
    return TableBlock("yardsticks", "Yardsticks, simple models of these rows", printed, unmarked) if printed else None


def _is_same(one: Score, other: Score) -> bool:
    return one.model_dump(exclude={"seconds"}) == other.model_dump(exclude={"seconds"})


def _range_text(numbers: set[int]) -> str:
    return str(min(numbers)) if len(numbers) == 1 else f"{min(numbers)} to {max(numbers)}"


def marks(lines: Sequence[Line], columns: Iterable[str]) -> dict[tuple[int, str, int], str]:
    """The best and second-best numbers of a block, per metric of a column.

    Numbers that are printed alike share a mark; if two are best, there is no second, as in the paper (ReCoRD). A number
    without another to compare with has no mark.

    Returns:
        (line, column, metric) -> "best" or "second".
    """
    found = {}
    for column in columns:
        cells = [line.cells.get(column, []) for line in lines]
        for k in range(max(map(len, cells), default=0)):
            numbers = {i: float(cell[k]) for i, cell in enumerate(cells) if k < len(cell)}
            for i, number in numbers.items():
                better = sum(other > number for other in numbers.values())
                if len(numbers) > 1 and better < 2:
                    found[i, column, k] = "second" if better else "best"
    return found


# --------------------------------------------------------------------------------------------------------- forms


@dataclass(frozen=True)
class Markup:
    escape: Callable[[str], str]
    best: str
    second: str
    below_heading: str


MARKDOWN = Markup(cell_text, "**{}**", "<u>{}</u>", "*{}*")  # Markdown itself cannot underline
LATEX = Markup(unicode_to_latex, r"\textbf{{{}}}", r"\underline{{{}}}", r"\quad \textit{{{}}}")


def block_rows(table: ResultTable, block: TableBlock, markup: Markup) -> list[list[str]]:
    """The cells of a block, row by row; a row of one cell is a heading."""
    styles = marks(block.lines, [column for column in table.columns if column not in block.unmarked])
    rows = [[markup.best.format(markup.escape(block.title))]]
    heading = None
    for i, line in enumerate(block.lines):
        if line.model is not None and line.model != heading:
            rows.append([markup.escape(line.model)])
        heading = line.model
        cells = [(markup.below_heading if heading is not None else "{}").format(markup.escape(line.label))]
        for column in table.columns:
            texts = enumerate(line.cells.get(column, []))
            forms = (getattr(markup, styles.get((i, column, k), ""), "{}").format(text) for k, text in texts)
            cells.append("/".join(forms) or NO_VALUE)
        rows.append(cells)
    return rows


def markdown(table: ResultTable) -> str:
    rows = [row for block in table.blocks for row in block_rows(table, block, MARKDOWN)]
    return markdown_table(["Model", *table.columns.values()], rows)


def latex(table: ResultTable) -> str:
    r"""A `table*` that looks like the paper's; needs `\usepackage{booktabs}`."""
    body = []
    for block in table.blocks:
        body.append(r"\midrule")
        for row in block_rows(table, block, LATEX):
            heading = rf"\multicolumn{{{len(table.columns) + 1}}}{{l}}{{{row[0]}}}"
            body.append(rf"{heading if len(row) == 1 else ' & '.join(row)} \\")
    lines = [
        r"% needs \usepackage{booktabs}",
        r"\begin{table*}",
        r"\centering",
        r"\footnotesize",
        r"\setlength{\tabcolsep}{3pt}",
        rf"\begin{{tabular}}{{l{'c' * len(table.columns)}}}",
        r"\toprule",
        rf"{' & '.join(['Models', *map(unicode_to_latex, table.columns.values())])} \\",
        *body,
        r"\bottomrule",
        r"\end{tabular}",
        rf"\caption{{{unicode_to_latex(' '.join([f'{table.title}.', *table.notes]))}}}",
        rf"\label{{tab:{table.name}}}",
        r"\end{table*}",
    ]
    return "\n".join(lines) + "\n"


def csv_text(table: ResultTable) -> str:
    """One line per number; low and high are the ends of its 95% interval."""
    file = io.StringIO()
    writer = csv.DictWriter(file, CSV_COLUMNS, lineterminator="\n")
    writer.writeheader()
    for block in table.blocks:
        for line in block.lines:
            records = ((block.source, line.name, *record) for record in line.records)
            writer.writerows(dict(zip(CSV_COLUMNS, record, strict=False)) for record in records)
    return file.getvalue()
