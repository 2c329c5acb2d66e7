"""The results of a sweep: the outcome of each cell, the best of each task, the files and the table."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.table import Table

from extensions.common.files import read_json, write_json, write_text
from extensions.evaluation.metrics import likelihood_mean, mean_score
from extensions.recipe import Recipe
from extensions.reporting.rows import writes_answers
from extensions.reporting.scores import percent
from extensions.runs.resume import EVALUATION_ROWS, is_finished
from extensions.sweeps.grid import Cell, Sweep, as_yaml, assignments, learned_tasks


@dataclass(frozen=True)
class Outcome:
    """The result of a cell; scores are fractions of 1."""

    status: str = "open"  # finished; failed (in this session); open: not run yet, or stopped before its end
    validation: float | None = None  # score after training if the table is of the validation split; see `choose`
    table: float | None = None  # mean score after training, over the tasks that the cell learns
    split: str | None = None  # of `table`
    samples: int | None = None  # of training
    seconds: float | None = None  # of training
    rows: str | None = None  # hash of the evaluated rows
    likelihood: float | None = None  # as `table`, of the answers by likelihood beside others


def outcome(cell: Cell) -> Outcome:
    """The result in the run folder of a cell."""
    if not is_finished(cell.folder):
        return Outcome()
    scores = read_json(cell.folder / "eval.json")
    learned = [task.name for task in learned_tasks(cell.recipe.data.tasks)]
    after = {name: scores["after"][name] for name in learned if name in scores["after"]}
    split = " and ".join(sorted({scores["splits"][name] for name in after}))
    table = mean_score(after) if after else None
    compared = likelihood_mean(after) if _by_likelihood(cell.recipe) else table
    training, versions = scores.get("training", {}), cell.folder / "versions.json"
    rows = read_json(versions)["inputs"].get(EVALUATION_ROWS) if versions.exists() else None
    validation = compared if split == "validation" else None
    beside = likelihood_mean(after) if after and writes_answers(cell.recipe) else None
    costs = training.get("samples"), training.get("seconds")
    return Outcome("finished", validation, table, split, *costs, rows, beside)


def _by_likelihood(recipe: Recipe) -> bool:
    return recipe.evaluation.best_by == "likelihood" and recipe.method != "encoder"  # whose classes are by likelihood


def estimator(recipe: Recipe) -> str:
    """By what the cells of a sweep are compared."""
    kind = "likelihood" if _by_likelihood(recipe) or recipe.method == "encoder" else recipe.evaluation.decoding
    answers = {"sample": "sampled answers", "greedy": "greedy answers", "likelihood": "answers by likelihood"}[kind]
    return f"the score of the kept weights after training, of {answers}, on the validation rows"


def choose(cells: Sequence[Cell], outcomes: Sequence[Outcome]) -> list[int]:
    """Indices of the best cells, one per task: by validation, the first of equals; a single cell needs no score.

    All cells have one estimator, the evaluation after training: the best of a run's validations is higher the more of
    them a cell has had. Cells that were evaluated on other rows than each other are not compared.
    """
    best = []
    for task in dict.fromkeys(cell.task for cell in cells):
        group = [k for k, cell in enumerate(cells) if cell.task == task]
        scored = {k: v for k in group if (v := outcomes[k].validation) is not None}
        if len({outcomes[k].rows for k in scored}) > 1:
            continue
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

    @property
    def compared_by(self) -> str:
        return estimator(self.sweep.cells[0].recipe)

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

    def incomparable(self) -> list[str]:
        """The tasks whose cells were evaluated on different rows."""
        found: dict[str, set[str | None]] = {}
        for row in self.rows():
            if row["validation"] is not None:
                found.setdefault(row["task"], set()).add(row["rows"])
        return [task for task, rows in found.items() if len(rows) > 1]

    def write(self) -> None:
        """Replace sweep.json, sweep.md, sweep.csv and best.json, each atomically."""
        out, rows = self.sweep.out, self.rows()
        head = {"recipe": str(self.sweep.path), "method": self.sweep.method, "compared_by": self.compared_by}
        write_json(out / "sweep.json", head | {"cells": rows})
        write_text(out / "sweep.md", self._markdown())
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, "settings": ",".join(assignments(row["settings"]))} for row in rows)
        write_text(out / "sweep.csv", text.getvalue())
        write_json(out / "best.json", [row["folder"] for row in rows if row["best"]])

    def _blocks(self) -> Iterator[tuple[str, list[str], list[tuple[bool, list[str]]]]]:
        """Per task its name, the column heads, and the lines, each with whether it is the best."""
        found = self.rows()
        beside = any(row["likelihood"] is not None for row in found)
        for task, group in itertools.groupby(found, key=lambda row: row["task"]):
            rows = list(group)
            lines = [(row["best"], [*map(as_yaml, row["settings"].values()), *_cells(row, beside)]) for row in rows]
            scores = ["validation", "table", *(["by likelihood"] if beside else [])]
            yield task, [*rows[0]["settings"], *scores, "samples", "seconds", "status"], lines

    def _markdown(self) -> str:
        text = [
            f"# Sweep of {self.sweep.path} by {self.sweep.method}\n\n"
            "Mean scores in percent. The best of each task, in bold, has the highest `validation`: "
            f"{self.compared_by}. `table` is of the split in brackets. Samples and seconds are of "
            "training.\n"
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


def _cells(row: Mapping[str, Any], beside: bool) -> list[str]:
    """The cells of a row; beside: with its score by likelihood."""
    table = percent(row["table"]) + (f" ({row['split']})" if row["split"] else "")
    scores = [percent(row["validation"]), table, *([percent(row["likelihood"])] if beside else [])]
    samples = "-" if row["samples"] is None else str(row["samples"])
    seconds = "-" if row["seconds"] is None else f"{row['seconds']:.0f}"
    return [*scores, samples, seconds, row["status"] + (", best" if row["best"] else "")]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"
