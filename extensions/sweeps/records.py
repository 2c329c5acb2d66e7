"""The results of a sweep: the outcome of each cell, the best of each task, the files and the table."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from extensions.common.files import read_json, read_jsonl, write_json, write_text
from extensions.evaluation.metrics import mean_score
from extensions.reporting.scores import percent
from extensions.runs.resume import is_finished
from extensions.sweeps.grid import Cell, Sweep, as_yaml, assignments, learned_tasks


@dataclass(frozen=True)
class Outcome:
    """The result of a cell; scores are fractions of 1."""

    status: str = "open"  # finished; failed (in this session); open: not run yet, or stopped before its end
    validation: float | None = None  # the best cell has the highest
    table: float | None = None  # mean score after training, over the tasks that the cell learns
    split: str | None = None  # of `table`
    samples: int | None = None  # of training
    seconds: float | None = None  # of training


def outcome(cell: Cell) -> Outcome:
    """The result in the run folder of a cell."""
    if not is_finished(cell.folder):
        return Outcome()
    scores = read_json(cell.folder / "eval.json")
    learned = [task.name for task in learned_tasks(cell.recipe.data.tasks)]
    after = {name: scores["after"][name] for name in learned if name in scores["after"]}
    split = " and ".join(sorted({scores["splits"][name] for name in after}))
    table = mean_score(after) if after else None
    by_likelihood = cell.recipe.evaluation.best_by == "likelihood"
    validation = best_validation(cell.folder / "validation.jsonl", learned, by_likelihood)
    if validation is None and split == "validation":
        validation = table
    training = scores.get("training", {})
    return Outcome("finished", validation, table, split, training.get("samples"), training.get("seconds"))


def best_validation(path: Path, learned: Sequence[str], by_likelihood: bool = False) -> float | None:
    """The best mean score of a run's validations; None without any.

    An encoder run learns one task after the other, so each of its lines is of one task: the mean of their bests,
    without the intermediate task.
    """
    best: dict[tuple[str, ...], float] = {}
    for record in read_jsonl(path) if path.exists() else []:
        tasks = tuple(record["tasks"])
        mean = record["likelihood_mean" if by_likelihood else "mean"]
        if mean is not None and set(tasks) <= set(learned):  # non-finite scores are null
            best[tasks] = max(mean, best.get(tasks, mean))
    return sum(len(tasks) * mean for tasks, mean in best.items()) / sum(map(len, best)) if best else None


def choose(cells: Sequence[Cell], outcomes: Sequence[Outcome]) -> list[int]:
    """Indices of the best cells, one per task: by validation, the first of equals; a single cell needs no score."""
    best = []
    for task in dict.fromkeys(cell.task for cell in cells):
        group = [k for k, cell in enumerate(cells) if cell.task == task]
        scored = {k: v for k in group if (v := outcomes[k].validation) is not None}
        if scored:
            best.append(max(scored, key=lambda k: scored[k]))
        elif len(group) == 1 and outcomes[group[0]].status == "finished":
            best += group
    return best


@dataclass
class SweepRecords:
    """The files of a sweep, and its table."""

    sweep: Sweep
    failed: dict[int, int] = field(default_factory=dict)  # index of a cell -> exit status, in this session

    def rows(self) -> list[dict[str, Any]]:
        """One per cell."""
        cells = self.sweep.cells
        outcomes = [Outcome("failed") if k in self.failed else outcome(cell) for k, cell in enumerate(cells)]
        best = choose(cells, outcomes)
        return [
            {
                "task": cell.task,
                "settings": cell.settings,
                "folder": cell.folder.relative_to(self.sweep.out).as_posix(),
                **asdict(result),
                "best": k in best,
            }
            for k, (cell, result) in enumerate(zip(cells, outcomes, strict=True))
        ]

    def write(self) -> None:
        """Replace sweep.json, sweep.md, sweep.csv and best.json, each atomically."""
        out, rows = self.sweep.out, self.rows()
        write_json(out / "sweep.json", {"recipe": str(self.sweep.path), "method": self.sweep.method, "cells": rows})
        write_text(out / "sweep.md", self._markdown())
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, "settings": ",".join(assignments(row["settings"]))} for row in rows)
        write_text(out / "sweep.csv", text.getvalue())
        write_json(out / "best.json", [row["folder"] for row in rows if row["best"]])

    def _blocks(self) -> Iterator[tuple[str, list[str], list[tuple[bool, list[str]]]]]:
        """Per task its name, the column heads, and the lines, each with whether it is the best."""
        for task, group in itertools.groupby(self.rows(), key=lambda row: row["task"]):
            rows = list(group)
            lines = [(row["best"], [*map(as_yaml, row["settings"].values()), *_cells(row)]) for row in rows]
            yield task, [*rows[0]["settings"], "validation", "table", "samples", "seconds", "status"], lines

    def _markdown(self) -> str:
        text = [
            f"# Sweep of {self.sweep.path} by {self.sweep.method}\n\n"
            "Mean scores in percent. The best of each task, in bold, has the highest validation score; `table` is the "
            "score of the split in brackets. Samples and seconds are of training.\n"
        ]
        for task, heads, lines in self._blocks():
            text.append(f"\n## {task}\n\n{_line(heads)}{_line(['---:'] * (len(heads) - 1) + ['---'])}")
            text += [_line([f"**{cell}**" for cell in line] if best else line) for best, line in lines]
        return "".join(text)

    def table(self) -> Table:
        """The same for the console."""
        table = Table("task", title=f"Sweep by {self.sweep.method} (%)", title_justify="left")
        for task, heads, lines in self._blocks():
            for head in heads if len(table.columns) == 1 else []:
                table.add_column(head, justify="right")
            for k, (best, line) in enumerate(lines):
                cells = [task if k == 0 else "", *line]
                table.add_row(*cells, style="bold" if best else None, end_section=k == len(lines) - 1)
        return table


def _cells(row: Mapping[str, Any]) -> list[str]:
    table = percent(row["table"]) + (f" ({row['split']})" if row["split"] else "")
    samples = "-" if row["samples"] is None else str(row["samples"])
    seconds = "-" if row["seconds"] is None else f"{row['seconds']:.0f}"
    return [percent(row["validation"]), table, samples, seconds, row["status"] + (", best" if row["best"] else "")]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"
