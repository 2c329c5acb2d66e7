"""The files of `nlu report`: result tables, supporting tables, plots, the card of the best trained row."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from huggingface_hub import ModelCard

from extensions.common.errors import UserError
from extensions.reporting.curves import loss_points, reward_points, score_panels
from extensions.reporting.finished_runs import FinishedRun
from extensions.reporting.model_card import model_card
from extensions.reporting.plots import accuracy_curves, loss_curves, reward_curves
from extensions.reporting.rows import Row, differing_keys, make_rows
from extensions.reporting.scores import cell_text
from extensions.reporting.supporting_tables import (
    bias_table,
    cost_table,
    interval_table,
    parser_table,
    time_ratio_table,
    yardstick_table,
)
from extensions.reporting.tables import PAPER_TABLES, ResultTable, all_tables, csv_text, latex, markdown, paper_table

TITLE = "# Results"  # the first line of report.md
PLOTS = {
    "reward_curves.png": "Reward curves",
    "loss_curves.png": "Loss curves of SFT",
    "accuracy.png": "Scores against samples and time",
}
FORMS = {"md": markdown, "tex": latex, "csv": csv_text}
FILES = [  # all that a report may consist of
    *("report.md", "report.html", "model_card.md", *PLOTS),
    *(f"{table}.{ending}" for table in (*PAPER_TABLES.values(), "tasks") for ending in FORMS),
]


def write_report(runs: Sequence[FinishedRun], out: Path, only: str | None = None) -> list[Path]:
    """Tables, plots and card of finished runs, in a folder; an earlier report there is replaced.

    Args:
        only: key of `PAPER_TABLES`; None: each table that a run has a task of.

    Returns:
        The files, report.md first.

    Raises:
        UserError: no run has a task of the table, or the folder cannot be written.
    """
    rows = make_rows(runs)
    tables = _tables(rows, only)
    try:
        out.mkdir(parents=True, exist_ok=True)
        _clear(out)
        (out / "report.md").write_text(f"{TITLE}\n", encoding="utf-8")  # marks an incomplete report too
        for table in tables:
            for ending, form in FORMS.items():
                (out / f"{table.name}.{ending}").write_text(form(table), encoding="utf-8")
        if curves := reward_points(rows):
            reward_curves(curves, out / "reward_curves.png")
        if curves := loss_points(rows):
            loss_curves(curves, out / "loss_curves.png")
        if panels := score_panels(rows):
            accuracy_curves(panels, out / "accuracy.png")
        best = best_trained(rows)
        if best is not None:
            _card_of_row(best).save(out / "model_card.md")
        (out / "report.md").write_text(_report_text(rows, tables, best, out), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out: cannot write to {out} ({error.strerror or error}); choose another folder") from error
    return [out / name for name in FILES if (out / name).exists()]


def _tables(rows: Sequence[Row], only: str | None) -> list[ResultTable]:
    if only is None:
        return all_tables(rows)
    table = paper_table(PAPER_TABLES[only], rows)
    if table is None:
        found = ", ".join(dict.fromkeys(name for row in rows for name in row.results))
        raise UserError(f"--table {only}: no run has a result for a task of this table (they have: {found})")
    return [table]


def _clear(out: Path) -> None:
    """Remove an earlier report's files, so that no table of other runs remains.

    Raises:
        UserError: files of those names exist that no report has written.
    """
    existing = [name for name in FILES if (out / name).exists()]
    report = out / "report.md"
    if existing and not (report.exists() and report.read_text(encoding="utf-8").startswith(TITLE)):
        raise UserError(f"--out: {out / existing[0]} exists and is not from an earlier report; choose another folder")
    for name in FILES:
        (out / name).unlink(missing_ok=True)


def _report_text(rows: Sequence[Row], tables: Sequence[ResultTable], best: Row | None, out: Path) -> str:
    parts = [TITLE]
    for table in tables:
        files = ", ".join(f"[{ending}]({table.name}.{ending})" for ending in FORMS)
        parts += [f"## {table.title}", markdown(table), *table.notes, f"As files: {files}."]
    intervals = "In percent (mae, rmse and r2 as they are), with 95% bootstrap intervals."
    ratios = "The paper gives one ratio, for training to convergence. SFT + PPO counts the PPO phase alone."
    parts += [
        *_section(interval_table(rows), "## Our rows with intervals", intervals),
        *_section(
            bias_table(rows), "## Bias", "In percent: shares of the answers and, in parentheses, of the gold labels."
        ),
        *_section(
            parser_table(rows),
            "## Parsers",
            "Responses that `parser: strict` (one keyword or number, no contradiction) and `parser: paper` (the first "
            "one) judge differently.",
        ),
        *_section(
            yardstick_table(rows),
            "## Yardsticks",
            "Simple models of the same training and evaluation rows, in percent.",
        ),
        *_section(cost_table(rows), "## Costs"),
        *_section(time_ratio_table(rows), "Training time of PPO over that of SFT:", ratios),
    ]
    for plot, title in PLOTS.items():
        parts += _section(f"![{title}]({plot})" if (out / plot).exists() else None, f"## {title}")
    parts += ["## Runs", _run_list(rows, out)]
    if best is not None:
        parts.append(
            f"[model_card.md](model_card.md) describes {cell_text(best.name)}, the trained row with the most tasks "
            "and, among those, the best mean score."
        )
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def _section(text: str | None, heading: str, *notes: str) -> list[str]:
    return [] if text is None else [heading, text, *notes]


def _run_list(rows: Sequence[Row], out: Path) -> str:
    def link(target: Path) -> str:
        return quote(Path(os.path.relpath(target.resolve(), out.resolve())).as_posix())

    lines = []
    for row in rows:
        for run in row.runs:
            card = run.folder / "adapter" / "README.md"
            more = f", [card of its adapter]({link(card)})" if card.exists() else ""
            lines.append(f"- {cell_text(row.name)}: [{cell_text(run.folder.name)}]({link(run.folder)}){more}")
        if different := differing_keys(row.runs):
            lines.append(f"- The runs of {cell_text(row.name)} differ in {', '.join(f'`{key}`' for key in different)}.")
    return "\n".join(lines)


def best_trained(rows: Sequence[Row]) -> Row | None:
    """The row of LoRA adapters with the most tasks and, among those, the best mean score."""
    trained = [row for row in rows if all(run.trained_adapter for run in row.runs)]
    return max(trained, key=lambda row: (len(row.results), row.mean(row.results)), default=None)


def _card_of_row(row: Row) -> ModelCard:
    """One card for the adapters of a row."""
    runs, recipe = row.runs, row.runs[0].recipe
    data = recipe.data.model_copy(update={"tasks": [result.task for result in row.results.values()]})
    recipe = recipe.model_copy(update={"name": recipe.name if len(runs) == 1 else row.name, "data": data})
    splits = {name: result.split for name, result in row.results.items()}
    scores = {
        "split": " and ".join(dict.fromkeys(splits.values())),
        "splits": splits,
        "before": {name: score.model_dump() for run in runs for name, score in run.scores.before.items()},
        "after": {name: result.score.model_dump() for name, result in row.results.items()},
        "training": {key: sum(getattr(run.training, key) for run in runs) for key in ("samples", "steps", "seconds")},
    }
    return model_card(recipe, scores, adapters=len(runs))
