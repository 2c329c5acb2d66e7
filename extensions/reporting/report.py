"""What `nlu report` writes: the paper's tables with our rows, what stands behind them, pictures, a model card."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from urllib.parse import quote

from huggingface_hub import ModelCard

from extensions.common.errors import UserError
from extensions.reporting.comparison import FinishedRun, Row, differing_keys, rows_of
from extensions.reporting.model_card import model_card
from extensions.reporting.plots import Curve, Panel, Points, accuracy_curves, reward_curves, smoothed_over_a_tenth
from extensions.reporting.scores import cell_text
from extensions.reporting.tables import (
    PAPER_TABLES,
    ResultTable,
    bias,
    costs,
    csv_text,
    intervals,
    latex,
    markdown,
    other_tasks,
    paper_table,
    time_ratios,
)

TITLE = "# Results"  # begins report.md
WRITTEN = ("report.md", "model_card.md", "reward_curves.png", "accuracy.png")  # and the tables, in three forms


def write_report(runs: Sequence[FinishedRun], out: Path, only: str | None = None) -> list[Path]:
    """Tables, pictures and card of finished runs, in a folder; an earlier report there is replaced.

    Args:
        only: key of `PAPER_TABLES`; None: each table that a run has a task of.

    Returns:
        The files, report.md first.

    Raises:
        UserError: two runs claim one cell, no run has a task of the table, or the folder cannot be written.
    """
    rows = rows_of(runs)
    tables = _tables(rows, only)
    try:
        out.mkdir(parents=True, exist_ok=True)
        _clear(out)
        (out / "report.md").write_text(f"{TITLE}\n", encoding="utf-8")  # should this end half-way, it is still ours
        for table in tables:
            for ending, form in (("md", markdown), ("tex", latex), ("csv", csv_text)):
                (out / f"{table.name}.{ending}").write_text(form(table), encoding="utf-8")
        curves = _reward_points(rows)
        if curves:
            reward_curves(curves, out / "reward_curves.png")
        panels = _panels(rows)
        if panels:
            accuracy_curves(panels, out / "accuracy.png")
        best = best_trained(rows)
        if best is not None:
            _card_of_row(best).save(out / "model_card.md")
        pictures = [name for name in WRITTEN if name.endswith(".png") and (out / name).exists()]
        text = _report_text(rows, tables, pictures, best, out)
        (out / "report.md").write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out: cannot write to {out} ({error.strerror or error}); choose another folder") from error
    return [out / name for name in _names() if (out / name).exists()]


def _tables(rows: Sequence[Row], only: str | None) -> list[ResultTable]:
    if only is None:
        return [t for t in (*(paper_table(which, rows) for which in PAPER_TABLES.values()), other_tasks(rows)) if t]
    table = paper_table(PAPER_TABLES[only], rows)
    if table is None:
        found = ", ".join(dict.fromkeys(name for row in rows for name in row.results))
        raise UserError(f"--table {only}: no run has a result of a task of this table (they have: {found})")
    return [table]


def _names() -> list[str]:
    tables = [*(which.name for which in PAPER_TABLES.values()), "tasks"]
    return [*WRITTEN, *(f"{table}.{ending}" for table in tables for ending in ("md", "tex", "csv"))]


def _clear(out: Path) -> None:
    """Remove what an earlier report wrote, so that no table of other runs stays.

    Raises:
        UserError: files of those names are there, but no report: they are somebody else's.
    """
    there = [name for name in _names() if (out / name).exists()]
    report = out / "report.md"
    if there and not (report.exists() and report.read_text(encoding="utf-8").startswith(TITLE)):
        raise UserError(f"--out: {out / there[0]} is there and not of an earlier report; choose another folder")
    for name in _names():
        (out / name).unlink(missing_ok=True)


def _report_text(
    rows: Sequence[Row], tables: Sequence[ResultTable], pictures: Sequence[str], best: Row | None, out: Path
) -> str:
    parts = [TITLE]
    for table in tables:
        files = ", ".join(f"[{ending}]({table.name}.{ending})" for ending in ("md", "tex", "csv"))
        parts += [f"## {table.title}", markdown(table), *table.notes, f"The same as files: {files}."]
    parts += [
        "## Our rows with intervals",
        intervals(rows),
        "In percent (mae, rmse and r2 as they are), with 95% bootstrap intervals.",
    ]
    shares = bias(rows)
    if shares is not None:
        parts += ["## Bias", shares, "In percent: shares of the answers, in brackets those of the gold labels."]
    times, ratios = costs(rows), time_ratios(rows)
    if times is not None:
        parts += ["## Costs", times]
    if ratios is not None:
        parts += [
            "Training time of PPO over that of SFT:",
            ratios,
            "The paper gives one figure, of trainings to convergence. SFT + PPO counts PPO alone.",
        ]
    titles = {"reward_curves.png": "Reward curves", "accuracy.png": "Scores against samples and time"}
    for picture in pictures:
        parts += [f"## {titles[picture]}", f"![{titles[picture]}]({picture})"]
    parts += ["## Runs", _run_list(rows, out)]
    if best is not None:
        parts.append(
            f"[model_card.md](model_card.md) describes {cell_text(best.name)}, the trained row with the most tasks "
            "and, among those, the best mean."
        )
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def _run_list(rows: Sequence[Row], out: Path) -> str:
    lines = []
    for row in rows:
        for run in row.runs:
            card = run.folder / "adapter" / "README.md"
            link = f", [card of its adapter]({_link(card, out)})" if card.exists() else ""
            lines.append(f"- {cell_text(row.name)}: [{cell_text(run.folder.name)}]({_link(run.folder, out)}){link}")
        different = differing_keys(row.runs)
        if different:
            lines.append(f"- The runs of {cell_text(row.name)} differ in {', '.join(f'`{key}`' for key in different)}.")
    return "\n".join(lines)


def _link(target: Path, out: Path) -> str:
    return quote(Path(os.path.relpath(target.resolve(), out.resolve())).as_posix())


def best_trained(rows: Sequence[Row]) -> Row | None:
    """The row of LoRA adapters with the most tasks and, among those, the best mean score."""
    trained = [row for row in rows if all(run.is_trained for run in row.runs)]
    return max(trained, key=lambda row: (len(row.results), row.mean), default=None)


def _card_of_row(row: Row) -> ModelCard:
    """One card for the adapters of a row."""
    runs, first = row.runs, row.runs[0]
    tasks = [result.task for result in row.results.values()]
    recipe = first.recipe.model_copy(
        update={
            "name": first.recipe.name if len(runs) == 1 else row.name,
            "data": first.recipe.data.model_copy(update={"tasks": tasks}),
        }
    )
    splits = {name: result.split for name, result in row.results.items()}
    scores = {
        "splits": splits,
        "before": {name: score.model_dump() for run in runs for name, score in run.evaluated.before.items()},
        "after": {name: result.score.model_dump() for name, result in row.results.items()},
    }
    trainings = [run.training for run in runs if run.training is not None]
    return model_card(
        recipe,
        scores,
        " and ".join(dict.fromkeys(splits.values())),
        sum(training.samples for training in trainings),
        sum(training.steps for training in trainings),
        sum(training.seconds for training in trainings),
        adapters=len(runs),
    )


# ------------------------------------------------------------------------------------- what the pictures show


def _run_labels(rows: Sequence[Row], with_tasks: bool) -> dict[Path, str]:
    """Folder of each run -> its name in a legend: what all have in common is left out."""
    several = len({row.model for row in rows if row.model is not None}) > 1
    labels = {}
    for row in rows:
        for run in row.runs:
            label = row.name if several else row.label
            labels[run.folder] = f"{label}, {_shortened(run.trained_titles)}" if with_tasks else label
    return labels


def _shortened(titles: str) -> str:
    """Names of tasks, or their number where they would be long."""
    count = titles.count(", ") + 1
    return titles if count <= 3 else f"{count} tasks"


def _reward_points(rows: Sequence[Row]) -> dict[str, Points]:
    """Label -> iterations and mean rewards of each PPO run."""
    runs = [run for row in rows for run in row.runs if run.recipe.method == "ppo"]
    labels = _run_labels(rows, with_tasks=True)
    taken = Counter(labels[run.folder] for run in runs)
    found: dict[str, Points] = {}
    for run in runs:
        points = [(i.step, i.reward_mean) for i in run.iterations if i.reward_mean is not None]
        if points:
            label = labels[run.folder]
            name = label if taken[label] == 1 else f"{label} ({run.folder.name})"
            found[name] = ([step for step, _ in points], [reward for _, reward in points])
    return found


def _panels(rows: Sequence[Row]) -> list[Panel]:
    """The adapters' runs by the tasks that they were trained on, each with what prompting and encoders reach there."""
    labels = _run_labels(rows, with_tasks=False)
    by_tasks: dict[tuple[str, ...], list[FinishedRun]] = {}
    for row in rows:
        for run in row.runs:
            if run.is_trained:
                by_tasks.setdefault(tuple(sorted(run.trained_tasks)), []).append(run)
    panels = []
    for runs in by_tasks.values():
        curves = [curve for run in runs if (curve := _curve(run, labels[run.folder])) is not None]
        if curves:
            panels.append(Panel(_shortened(runs[0].trained_titles), curves, _levels(rows, runs, labels)))
    return panels


def _curve(run: FinishedRun, label: str) -> Curve | None:
    """The validations of a run, or the accuracy of the samples that PPO learned from; None without either."""
    if run.validations:
        means = [v.mean for v in run.validations]
        minutes = [v.seconds / 60 for v in run.validations]
        return Curve(label, [v.samples for v in run.validations], minutes, means, on_training=False)
    points = [(i.samples, i.elapsed_s / 60, i.accuracy) for i in run.iterations if i.accuracy is not None]
    if run.recipe.method != "ppo" or not points:
        return None
    samples, times, accuracies = map(list, zip(*points, strict=True))
    return Curve(label, samples, times, smoothed_over_a_tenth(accuracies), on_training=True)


def _other_split(row: Row, names: Iterable[str]) -> str:
    """Which split a level is of, where it is not that of the curves."""
    splits = sorted({row.results[name].split for name in names})
    return "" if splits == ["validation"] else f" ({' and '.join(splits)} split)"


def _levels(rows: Sequence[Row], runs: Sequence[FinishedRun], labels: Mapping[Path, str]) -> dict[str, float]:
    """Mean score of each row without an adapter of ours, over the tasks that `runs` were validated on.

    Encoders are here, too: they see whole training sets, so that their curves would leave no room for the others.
    """
    names = {name for run in runs for v in run.validations[-1:] for name in v.tasks} or set(runs[0].trained_tasks)
    return {
        f"{labels[row.runs[0].folder]}{_other_split(row, names)}": sum(row.results[name].score.score for name in names)
        / len(names)
        for row in rows
        if not any(run.is_trained for run in row.runs) and names <= row.results.keys()
    }
