"""Plots: the paper's figure 2 for one run and for several, SFT losses, scores against samples and time."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

DPI = 150
DASHES = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (5, 1.5, 1.2, 1.5)))
MARKERS = "os^Dv*PX"
CLOSE = 0.7  # points: levels that are closer than this would hide each other
LEAST_POINTS, LEAST_REWARD = 10.0, 0.2  # the smallest range that an axis of scores, of rewards shows
Points = tuple[Sequence[float], Sequence[float]]  # xs, ys


@dataclass(frozen=True)
class Level:
    """A score without a curve, 0 to 1."""

    score: float
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Curve:
    """Scores of a run while it trains."""

    label: str
    samples: Sequence[float]
    minutes: Sequence[float]
    scores: Sequence[float]  # 0 to 1
    on_training: bool  # accuracy on the training samples, since the run has no validations
    before: Level | None = None  # the evaluation before training


@dataclass(frozen=True)
class Panel:
    """Runs that were trained on the same tasks, with the scores of other rows on these tasks for comparison."""

    title: str
    curves: Sequence[Curve]
    levels: Mapping[str, Level]


def reward_curve(metrics: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Figure 2 of the paper: reward per iteration, mean and per task, smoothed, over the raw mean with its interval."""
    steps, means = [record["step"] for record in metrics], [record["reward_mean"] for record in metrics]
    tasks = sorted({task for record in metrics for task in record["reward_by_task"]})
    colors = _colors(1 + len(tasks))
    several = len(tasks) > 1
    figure, axes = _figure(10 if several else 8, 4.5)
    _smooth_over_raw(axes, (steps, means), "mean of the batch", colors[0])
    half = [_half_interval(record) for record in metrics]
    if None not in half:
        _interval(axes, steps, means, half, colors[0])
    for k, task in enumerate(tasks if several else [], start=1):
        rewards = [(record["step"], record["reward_by_task"].get(task)) for record in metrics]
        xs, ys = zip(*[(step, reward) for step, reward in rewards if reward is not None], strict=True)
        averages = smoothed(ys, smoothing_weight(len(steps)))
        axes.plot(xs, averages, label=task, color=colors[k], linestyle=DASHES[k % 4], marker=_marker(xs), zorder=3)
    axes.set(xlabel="PPO iteration", ylabel="mean reward", title=title)
    _whole_steps(axes, LEAST_REWARD)
    _legend(axes, smoothing_weight(len(steps)) > 0, beside=several)
    _save(figure, path)


def loss_curve(metrics: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Loss per SFT step, over all target tokens and over the answers alone; or of scores, and their correlation."""
    steps = [record["step"] for record in metrics]
    figure, axes = _figure(8, 4.5)
    of_tokens = "answer_loss" in metrics[0]
    names = {"loss": "all targets, which are trained", "answer_loss": "answers and closing tags alone"}
    if not of_tokens:
        names = {"loss": "loss", "correlation": "correlation with the gold scores in the batch"}
    for k, ((name, label), color) in enumerate(zip(names.items(), _colors(2), strict=True)):
        _smooth_over_raw(axes, (steps, [record[name] for record in metrics]), label, color, k)
    axes.set(xlabel="SFT step", ylabel="loss (nats per token)" if of_tokens else "", title=title)
    _whole_steps(axes)
    _legend(axes, smoothing_weight(len(steps)) > 0)
    _save(figure, path)


def reward_curves(runs: Mapping[str, Points], path: Path) -> None:
    """Figure 2 of the paper for several runs.

    Args:
        runs: label -> iterations, mean rewards.
    """
    _curves_of_runs(runs, path, LEAST_REWARD, xlabel="PPO iteration", ylabel="mean reward", title="Reward of PPO")


def loss_curves(runs: Mapping[str, Points], path: Path) -> None:
    """Loss over the answer tokens of several SFT runs.

    Args:
        runs: label -> steps, losses in nats per token.
    """
    _curves_of_runs(
        runs, path, None, xlabel="SFT step", ylabel="loss of the answers (nats per token)", title="Loss of SFT"
    )


def _curves_of_runs(runs: Mapping[str, Points], path: Path, least: float | None, **texts: str) -> None:
    figure, axes = _figure(9, 4.5)
    for k, ((label, points), color) in enumerate(zip(runs.items(), _colors(len(runs)), strict=True)):
        _smooth_over_raw(axes, points, label, color, k)
    axes.set(**texts)
    _whole_steps(axes, least)
    _legend(axes, any(smoothing_weight(len(xs)) > 0 for xs, _ in runs.values()), beside=True)
    _save(figure, path)


def accuracy_curves(panels: Sequence[Panel], path: Path) -> None:
    """Scores against training samples and against training minutes: one row of two plots per panel."""
    figure, rows = _figure(12, 0.6 + 3.4 * len(panels), len(panels), 2, sharey="row", squeeze=False)
    labels = dict.fromkeys(curve.label for panel in panels for curve in panel.curves)
    labels |= dict.fromkeys(label for panel in panels for label in panel.levels)
    colors = dict(zip(labels, _colors(len(labels)), strict=True))  # a label has one colour in all panels
    figure.get_layout_engine().set(h_pad=0.12)
    for panel, (left, right) in zip(panels, rows, strict=True):
        for axes, unit in ((left, "samples"), (right, "minutes")):
            for k, curve in enumerate(panel.curves):
                _score_curve(axes, curve, getattr(curve, unit), colors[curve.label], k, len(panel.curves))
            _draw_levels(axes, panel.levels, colors)
            axes.set(xlabel=f"training {unit}", title=panel.title)
            axes.set_xlim(left=0)
            _whole_numbers(axes, unit == "samples")
            _widen(axes, LEAST_POINTS, highest=100.0)
        left.set_ylabel("validation score (%)")
        _legend(right, smooth=False, beside=True, before=any(curve.before for curve in panel.curves))
    _save(figure, path)


def _score_curve(axes: Any, curve: Curve, xs: Sequence[float], color: Any, k: int, count: int) -> None:
    """A curve; its evaluation before training is a hollow marker at 0. Lines and markers below others are wider."""
    ys, below = [100 * score for score in curve.scores], max(0, min(3, count - 1 - k))
    marker, size = MARKERS[k % len(MARKERS)], 5 + 2.5 * below
    axes.plot(
        xs,
        ys,
        color=color,
        linestyle=DASHES[k % len(DASHES)],
        linewidth=1.5 + 0.8 * below,
        marker=marker if len(xs) == 1 or not curve.on_training else None,
        markersize=size,
        label=f"{curve.label} (training accuracy, smoothed)" if curve.on_training else curve.label,
    )
    if curve.before is not None:
        start = 100 * curve.before.score
        low, high = (100 * end for end in curve.before.interval or (curve.before.score,) * 2)
        ends = [[max(0.0, start - low)], [max(0.0, high - start)]]
        style = {"color": color, "marker": marker, "markersize": size, "markerfacecolor": "none", "capsize": 3}
        axes.errorbar([0], [start], yerr=ends, clip_on=False, zorder=5, **style)
        axes.plot([0, xs[0]], [start, ys[0]], color=color, linewidth=1, alpha=0.6)


def _draw_levels(axes: Any, levels: Mapping[str, Level], colors: Mapping[str, Any]) -> None:
    """Horizontal lines, with their intervals as bands. The dashes of lines that would hide each other alternate."""
    names = sorted(levels, key=lambda label: levels[label].score)
    groups: list[list[str]] = []
    for name in names:
        near = groups and 100 * (levels[name].score - levels[groups[-1][-1]].score) < CLOSE
        groups[-1].append(name) if near else groups.append([name])
    for group in groups:
        for k, name in enumerate(group):
            dashes = (3 * k, (3, 3 * (len(group) - 1))) if len(group) > 1 else (0, (1.2, 1.2))
            level = levels[name]
            axes.axhline(100 * level.score, color=colors[name], linestyle=dashes, linewidth=2.0, label=name)
            if level.interval is not None:
                axes.axhspan(*(100 * end for end in level.interval), color=colors[name], alpha=0.08, linewidth=0)


def smoothed(values: Sequence[float], weight: float) -> list[float]:
    """Exponential moving average, corrected for its start at 0 (TensorBoard's debiased smoothing)."""
    averages = accumulate(values, lambda average, value: weight * average + (1 - weight) * value, initial=0.0)
    return [average / (1 - weight**n) for n, average in enumerate(averages) if n]


def smoothing_weight(num_steps: int) -> float:
    """The weight that averages over about a tenth of a run."""
    return 1 - min(1.0, 10 / num_steps)


def _half_interval(record: Mapping[str, Any]) -> float | None:
    """Half of the 95% interval of an iteration's mean reward, by the normal approximation."""
    deviation, samples = record.get("reward_std"), record.get("samples", 0) / record["step"]
    return None if deviation is None or samples < 2 else 1.96 * deviation / math.sqrt(samples)


def _interval(axes: Any, xs: Sequence[float], ys: Sequence[float], half: Sequence[Any], color: Any) -> None:
    """A band around a curve, or a bar at its only point."""
    label = "95% interval, per iteration"
    if len(xs) == 1:
        axes.errorbar(xs, ys, yerr=half, color=color, alpha=0.4, capsize=4, label=label)
    else:
        low, high = ([y + sign * h for y, h in zip(ys, half, strict=True)] for sign in (-1, 1))
        axes.fill_between(xs, low, high, color=color, alpha=0.12, linewidth=0, label=label)


def _smooth_over_raw(axes: Any, points: Points, label: str, color: Any, k: int = 0) -> None:
    xs, ys = points
    weight = smoothing_weight(len(ys))
    style = {"color": color, "linewidth": 2.2, "linestyle": DASHES[k % len(DASHES)], "marker": _marker(xs)}
    axes.plot(xs, smoothed(ys, weight), label=label, zorder=3, **style)
    if weight > 0:
        axes.plot(xs, ys, color=color, alpha=0.3, linewidth=1, zorder=1)


def _marker(xs: Sequence[float]) -> str | None:
    """Of a curve of few points: a single one has no line."""
    return "." if len(xs) <= 10 else None


def _figure(width: float, height: float, *grid: int, **options: Any) -> tuple[Any, Any]:
    """A figure (size in inches) and its axes, with a light grid."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["text.parse_math"] = False  # names may contain $
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(*grid, figsize=(width, height), layout="constrained", **options)
    for each in figure.axes:
        each.grid(alpha=0.3)
    return figure, axes


def _whole_steps(axes: Any, least: float | None = None) -> None:
    """Steps from 0 in whole numbers; values over at least a range of `least`, None: from 0."""
    _whole_numbers(axes, True)
    axes.set_xlim(left=0)
    if least is None:
        axes.set_ylim(0, max(axes.get_ylim()[1], 0) * 1.02 or 1)
    else:
        _widen(axes, least)


def _whole_numbers(axes: Any, whole: bool) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=whole, min_n_ticks=1))


def _widen(axes: Any, least: float, highest: float | None = None) -> None:
    """Let the y axis span at least `least`, so that noise does not fill the plot."""
    low, high = axes.get_ylim()
    more = max(0.0, least - (high - low)) / 2
    low, high = low - more, high + more
    if highest is not None and high > 1.01 * highest:
        low, high = min(low, 1.01 * highest - least), 1.01 * highest
    axes.set_ylim(low, high)


def _colors(count: int) -> list[Any]:
    """Distinct colours: ten strong, then ten pale; for more than 20, a gradient."""
    import matplotlib

    if count > 20:
        return [matplotlib.colormaps["turbo"](i / (count - 1)) for i in range(count)]
    return [matplotlib.colormaps["tab20"](i) for i in (*range(0, 20, 2), *range(1, 20, 2))][:count]


def _legend(axes: Any, smooth: bool, beside: bool = False, before: bool = False) -> None:
    """A legend that also says what thick and thin lines and hollow markers are, where there are any."""
    from matplotlib.lines import Line2D

    handles, labels = axes.get_legend_handles_labels()
    if smooth:
        handles += [Line2D([], [], color="gray", linewidth=2.2), Line2D([], [], color="gray", alpha=0.4, linewidth=1)]
        labels += ["smoothed over a tenth of the run", "per iteration"]
    if before:
        handles.append(Line2D([], [], color="gray", linestyle="", marker="o", markerfacecolor="none"))
        labels.append("before training, on the rows of the evaluation table")
    place = {"loc": "upper left", "bbox_to_anchor": (1.02, 1.0), "borderaxespad": 0.0} if beside else {}
    axes.legend(handles, [textwrap.fill(label, 40) for label in labels], fontsize="small", handlelength=3.5, **place)


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    figure.savefig(path, dpi=DPI)
    pyplot.close(figure)
