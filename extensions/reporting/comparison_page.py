"""report.html of several runs: tables in the paper's form, curves laid over each other, classes, costs, differences."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import markupsafe

from extensions.common.errors import UserError
from extensions.common.files import write_text
from extensions.recipe import all_keys, value_at
from extensions.reporting.charts import Chart, Mark, Series, color, overview, raw_and_smoothed, training_chart
from extensions.reporting.finished_runs import FinishedRun
from extensions.reporting.page import PAGE, render, run_page
from extensions.reporting.rows import make_rows, writes_answers
from extensions.reporting.run_charts import at, series_of
from extensions.reporting.run_view import METHODS, RunView, duration, plain_value, read_view
from extensions.reporting.tables import Markup, ResultTable, all_tables, block_rows
from extensions.tasks import Task

NOT_COMPARED = ("name", "output_dir")


def write_pages(runs: Sequence[FinishedRun], out: Path, warn: Callable[[str], None]) -> list[Path]:
    """report.html of each run in its folder, and report.html in `out`: the comparison; of a single run its page.

    Args:
        warn: receives a message per run folder that cannot be written.

    Returns:
        The files.

    Raises:
        UserError: `out` cannot be written.
    """
    written = []
    views = [read_view(run.folder) for run in runs]
    pages = [run_page(view) for view in views]
    for run, page in zip(runs, pages, strict=True):
        try:
            write_text(run.folder / PAGE, page)
            written.append(run.folder / PAGE)
        except OSError as error:
            warn(f"{run.folder / PAGE} cannot be written ({error.strerror or error}); the comparison has no link to it")
    try:
        if out.resolve() not in [run.folder.resolve() for run in runs]:
            write_text(out / PAGE, comparison_page(runs, views, out) if len(runs) > 1 else pages[0])
            written.insert(0, out / PAGE)
    except OSError as error:
        raise UserError(f"--out: cannot write to {out} ({error.strerror or error}); choose another folder") from error
    return written


def comparison_page(runs: Sequence[FinishedRun], views: Sequence[RunView], out: Path) -> str:
    """The page of several runs.

    Args:
        views: of the same runs.
        out: its folder, for links to the pages of the runs.
    """
    names = run_names(runs)
    colors = {name: color(i) for i, name in enumerate(names)}
    rows = make_rows(runs)
    return render(
        "page_comparison.html.j2",
        title=f"{len(runs)} runs",
        runs=[_facts(name, view, out) for name, view in zip(names, views, strict=True)],
        tables=[(table, html_rows(table)) for table in all_tables(rows)],
        overview=_overview(names, views, colors),
        training=_curves(names, views, colors),
        intervals=_intervals(names, views),
        classes=_classes(names, views),
        differences=_differences(views),
        names=names,
    )


def run_names(runs: Sequence[FinishedRun]) -> list[str]:
    """A unique name per run: its label in the tables, with the model or the folder where labels do not suffice."""
    rows = make_rows(runs)
    several = len({row.model for row in rows}) > 1
    labels = {run.folder: row.name if several else row.label for row in rows for run in row.runs}
    taken = Counter(labels.values())
    names = [
        labels[r.folder] if taken[labels[r.folder]] == 1 else f"{labels[r.folder]} ({r.folder.name})" for r in runs
    ]
    return [name if names.count(name) == 1 else f"{name} {i}" for i, name in enumerate(names, start=1)]


def html_rows(table: ResultTable) -> list[tuple[str, list[markupsafe.Markup]]]:
    """The rows of a table: kind (block, model or line) and cells."""
    form = Markup(lambda text: str(markupsafe.escape(text)), "<b>{}</b>", "<u>{}</u>", "{}")
    found = []
    for block in table.blocks:
        for i, cells in enumerate(block_rows(table, block, form)):
            kind = "block" if i == 0 else "model" if len(cells) == 1 else "line"
            found.append((kind, [markupsafe.Markup(cell) for cell in cells]))  # nosec B704 # escaped above
    return found


def _facts(name: str, view: RunView, out: Path) -> dict[str, Any]:
    page, training = view.folder / PAGE, view.training
    link = quote(Path(os.path.relpath(page.resolve(), out.resolve())).as_posix()) if page.exists() else None
    costs = (
        [str(training["samples"]), str(training["steps"]), duration(training["seconds"])] if training["samples"] else []
    )
    speed = f"{training['samples'] / training['seconds']:.2f}" if training["samples"] and training["seconds"] else ""
    folder, method = view.folder.name, METHODS[view.recipe.method]
    return {"name": name, "folder": folder, "link": link, "method": method, "costs": [*costs, speed] if costs else []}


def _shared(views: Sequence[RunView]) -> list[Task]:
    """The tasks with a result in at least two runs."""
    count = Counter(name for view in views for name in view.scores["after"])
    tasks = {task.name: task for view in views for task in view.tasks}
    return [task for name, task in tasks.items() if count[name] > 1]


def _overview(names: Sequence[str], views: Sequence[RunView], colors: Mapping[str, str]) -> Chart:
    marks = []
    for name, view in zip(names, views, strict=True):
        after = {task.display_name: (task, view.scores["after"][task.name]) for task in view.tasks}
        values = {title: result["score"] for title, (_, result) in after.items()}
        intervals = {
            title: result["intervals"][task.metrics[0]]
            for title, (task, result) in after.items()
            if len(task.metrics) == 1 and "intervals" in result
        }
        marks.append(Mark(name, "circle", colors[name], values, intervals))
    return overview(list(dict.fromkeys(title for mark in marks for title in mark.values)), marks, apart=True)


def _curves(names: Sequence[str], views: Sequence[RunView], colors: Mapping[str, str]) -> list[Chart]:
    scores: list[Series] = []
    rewards: list[Series] = []
    losses: list[Series] = []
    for name, view in zip(names, views, strict=True):
        if view.recipe.method == "encoder":  # its validations and losses are of one task each
            continue
        found = [series_of(view.validations, name, at("mean"), colors[name], "marks")]
        likely = f"{name}, by likelihood"
        found.append(series_of(view.likelihood_validations, likely, at("likelihood_mean"), colors[name], "dash"))
        scores += [one for one in found if one.values]
        for key, series in (("reward_mean", rewards), ("loss", losses)):
            one = series_of(view.iterations, name, at(key), colors[name])
            series += raw_and_smoothed(one)[-1:] if one.values else []
    charts = []
    if scores:
        charts.append(training_chart("Validation score", scores, note="mean over the run's tasks", percent=True))
    if rewards:
        charts.append(training_chart("Reward", rewards, "reward", note="smoothed"))
    if losses:
        charts.append(training_chart("SFT loss", losses, "nats per token", note="smoothed"))
    return charts


def _intervals(names: Sequence[str], views: Sequence[RunView]) -> list[dict[str, Any]]:
    """Per task, metric and decoding: run -> value and interval; where they are in a result; whether by likelihood."""
    tasks = {task.name: task for view in views for task in view.tasks}
    found = []
    for task in tasks.values():
        after = {n: v.scores["after"].get(task.name) for n, v in zip(names, views, strict=True)}
        sampled = {name: result for name, result in after.items() if result}
        likely = {
            name: after[name]["likelihood"]
            for name, view in zip(names, views, strict=True)
            if (after[name] or {}).get("likelihood") and writes_answers(view.recipe)
        }
        for metric in dict.fromkeys(metric for result in sampled.values() for metric in result["metrics"]):
            for results, path in ((sampled, ""), (likely, "/likelihood")):
                cells = {
                    name: (result["metrics"][metric], result.get("intervals", {}).get(metric))
                    for name, result in results.items()
                    if metric in result["metrics"]
                }
                if cells:
                    found.append({"task": task, "metric": metric, "cells": cells, "path": path})
    return found


def _classes(names: Sequence[str], views: Sequence[RunView]) -> list[tuple[Task, dict[str, dict[str, Any]], list[str]]]:
    """Per shared task: class -> run -> its numbers; the runs that have them."""
    found = []
    for task in _shared(views):
        by_run = {
            name: view.scores["after"][task.name]["classes"]
            for name, view in zip(names, views, strict=True)
            if view.scores["after"].get(task.name, {}).get("classes")
        }
        words = dict.fromkeys(word for classes in by_run.values() for word in classes)
        if len(by_run) > 1:
            table = {word: {n: c[word] for n, c in by_run.items() if word in c} for word in words}
            found.append((task, table, list(by_run)))
    return found


def _differences(views: Sequence[RunView]) -> list[tuple[str, list[str]]]:
    """The recipe keys in which the runs differ: key, value per run."""
    found = []
    for key in all_keys():
        values = [value_at(view.recipe, key) for view in views]
        if key == "data.tasks":
            values = [[task.name for task in value] for value in values]
        if key not in NOT_COMPARED and any(value != values[0] for value in values):
            found.append((key, [plain_value(value) for value in values]))
    return found
