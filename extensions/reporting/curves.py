"""The data of the report's plots: rewards of PPO, losses of SFT, scores of adapters by the tasks they trained on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from extensions.reporting.finished_runs import FinishedRun, Iteration, Score
from extensions.reporting.plots import Curve, Level, Panel, Points, smoothed, smoothing_weight
from extensions.reporting.rows import Row


def reward_points(rows: Sequence[Row]) -> dict[str, Points]:
    """Label -> iterations and mean rewards, per PPO run."""
    return _points(rows, "ppo", lambda iteration: iteration.reward_mean)


def loss_points(rows: Sequence[Row]) -> dict[str, Points]:
    """Label -> steps and losses of the answer tokens, per SFT run: comparable whatever the run's targets are."""
    return _points(rows, "sft", lambda iteration: iteration.answer_loss)


def _points(rows: Sequence[Row], method: str, value: Callable[[Iteration], float | None]) -> dict[str, Points]:
    names = _run_names(rows)
    found = []
    for run in [run for row in rows for run in row.runs if run.recipe.method == method]:
        label = f"{names[run.folder]}, {_shortened(run.trained_titles)}"
        points = [(i.step, y) for i in run.iterations if (y := value(i)) is not None]
        found.append((label, run.folder.name, points))
    taken = Counter(label for label, _, _ in found)
    return {
        label if taken[label] == 1 else f"{label} ({folder})": ([x for x, _ in points], [y for _, y in points])
        for label, folder, points in found
        if points
    }


def score_panels(rows: Sequence[Row]) -> list[Panel]:
    """One panel per set of trained tasks: the adapters' curves, and as levels what prompting and encoders reach."""
    names = _run_names(rows)
    by_tasks: dict[tuple[str, ...], list[FinishedRun]] = {}
    for run in [run for row in rows for run in row.runs if run.trained_adapter]:
        by_tasks.setdefault(tuple(sorted(run.training.tasks)), []).append(run)
    panels = []
    for runs in by_tasks.values():
        curves = [curve for run in runs if (curve := _score_curve(run, names[run.folder])) is not None]
        if curves:
            panels.append(Panel(_shortened(runs[0].trained_titles), curves, _levels(rows, runs, names)))
    return panels


def _score_curve(run: FinishedRun, label: str) -> Curve | None:
    """The validations of a run, else the training accuracy of PPO; None without either."""
    if run.validations:
        points = [(v.samples, v.seconds / 60, v.mean) for v in run.validations]
    else:
        points = [(i.samples, i.elapsed_s / 60, i.accuracy) for i in run.iterations if i.accuracy is not None]
        if run.recipe.method != "ppo" or not points:
            return None
    samples, minutes, scores = map(list, zip(*points, strict=True))
    if not run.validations:
        scores = smoothed(scores, smoothing_weight(len(scores)))
    tasks = set(run.validations[-1].tasks) if run.validations else set(run.training.tasks)
    return Curve(label, samples, minutes, scores, not run.validations, _level(run.scores.before, tasks))


def _level(results: Mapping[str, Score], tasks: set[str]) -> Level | None:
    """The mean score over `tasks`, with its interval if it is one metric of one task; None if a result is missing."""
    if not tasks or not tasks <= results.keys():
        return None
    found = [results[name] for name in tasks]
    interval = next(iter(found[0].intervals.values())) if len(found) == 1 and len(found[0].metrics) == 1 else None
    return Level(sum(result.score for result in found) / len(found), interval)


def _levels(rows: Sequence[Row], runs: Sequence[FinishedRun], names: Mapping[Path, str]) -> dict[str, Level]:
    """Mean score of each row without a trained adapter, over the tasks that `runs` were validated on.

    Encoders are levels, too: they see whole training sets, so that their curves would leave no room for the others.
    """
    tasks = {name for run in runs for v in run.validations[-1:] for name in v.tasks} or set(runs[0].training.tasks)
    levels = {}
    for row in rows:
        if tasks <= row.results.keys() and not any(run.trained_adapter for run in row.runs):
            splits = sorted({row.results[name].split for name in tasks})
            note = "" if splits == ["validation"] else f" ({' and '.join(splits)} split)"  # the curves' is validation
            level = _level({name: result.score for name, result in row.results.items()}, tasks)
            if level is not None:
                levels[f"{names[row.runs[0].folder]}{note}"] = level
    return levels


def _run_names(rows: Sequence[Row]) -> dict[Path, str]:
    """Run folder -> its name in a legend, without the model if all rows have the same."""
    several = len({row.model for row in rows if row.model is not None}) > 1
    return {run.folder: row.name if several else row.label for row in rows for run in row.runs}


def _shortened(titles: str) -> str:
    """The tasks' names, or their number if there are more than three."""
    count = titles.count(", ") + 1
    return titles if count <= 3 else f"{count} tasks"
