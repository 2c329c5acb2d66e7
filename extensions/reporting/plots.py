"""Plots: the paper's figure 2 for one run and for several, SFT losses, scores against samples and time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

DPI = 150
Points = tuple[Sequence[float], Sequence[float]]  # xs, ys


@dataclass(frozen=True)
class Curve:
    """Scores of a run while it trains."""

    label: str
    samples: Sequence[float]
    minutes: Sequence[float]
    scores: Sequence[float]  # 0 to 1
    on_training: bool  # accuracy on the training samples, since the run has no validations


@dataclass(frozen=True)
class Panel:
    """Runs that were trained on the same tasks, with the scores of other rows on these tasks for comparison."""

    title: str
    curves: Sequence[Curve]
    levels: Mapping[str, float]  # label -> score, 0 to 1


def reward_curve(metrics: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Figure 2 of the paper: reward per iteration, mean and per task, smoothed, with the raw mean behind."""
    steps = [record["step"] for record in metrics]
    figure, axes = _figure(8, 4.5)
    tasks = sorted({task for record in metrics for task in record["reward_by_task"]})
    _smooth_over_raw(axes, (steps, [record["reward_mean"] for record in metrics]), "mean")
    for task in tasks if len(tasks) > 1 else []:
        rewards = [(record["step"], record["reward_by_task"].get(task)) for record in metrics]
        xs, ys = zip(*[(step, reward) for step, reward in rewards if reward is not None], strict=True)
        axes.plot(xs, smoothed(ys, smoothing_weight(len(steps))), label=task, linewidth=1.2, zorder=3)
    axes.set(xlabel="PPO iteration", ylabel="mean reward", title=title)
    if len(tasks) > 1:
        axes.legend(fontsize="small", ncols=2)
    _save(figure, path)


def loss_curve(metrics: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Next-token loss per SFT step, over all target tokens and over the answer tokens alone."""
    steps = [record["step"] for record in metrics]
    figure, axes = _figure(8, 4.5)
    for name, label in (("loss", "all targets"), ("answer_loss", "answers")):
        _smooth_over_raw(axes, (steps, [record[name] for record in metrics]), label)
    axes.set(xlabel="SFT step", ylabel="loss (nats per token)", title=title)
    axes.legend(fontsize="small")
    _save(figure, path)


def reward_curves(runs: Mapping[str, Points], path: Path) -> None:
    """Figure 2 of the paper for several runs.

    Args:
        runs: label -> iterations, mean rewards.
    """
    figure, axes = _figure(9, 4.5)
    for (label, points), color in zip(runs.items(), _colors(len(runs)), strict=True):
        _smooth_over_raw(axes, points, label, color)
    axes.set(xlabel="PPO iteration", ylabel="mean reward", title="Reward of PPO, smoothed over raw")
    _legend_beside(axes)
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
            for curve in panel.curves:
                axes.plot(
                    getattr(curve, unit),
                    [100 * score for score in curve.scores],
                    color=colors[curve.label],
                    linestyle="--" if curve.on_training else "-",
                    marker=None if curve.on_training else "o",
                    markersize=4,
                    label=f"{curve.label}\n(training accuracy, smoothed)" if curve.on_training else curve.label,
                )
            for label, level in panel.levels.items():
                axes.axhline(100 * level, color=colors[label], linestyle=":", linewidth=1.8, label=label)
            axes.set(xlabel=f"training {unit}", title=panel.title)
            axes.set_xlim(left=0)
        left.set_ylabel("validation score (%)")
        _legend_beside(right)
    _save(figure, path)


def smoothed(values: Sequence[float], weight: float) -> list[float]:
    """Exponential moving average, corrected for its start at 0 (TensorBoard's debiased smoothing)."""
    averages = accumulate(values, lambda average, value: weight * average + (1 - weight) * value, initial=0.0)
    return [average / (1 - weight**n) for n, average in enumerate(averages) if n]


def smoothing_weight(num_steps: int) -> float:
    """The weight that averages over about a tenth of a run."""
    return 1 - min(1.0, 10 / num_steps)


def _smooth_over_raw(axes: Any, points: Points, label: str, color: Any = None) -> None:
    xs, ys = points
    (line,) = axes.plot(xs, smoothed(ys, smoothing_weight(len(ys))), label=label, color=color, linewidth=2.2, zorder=3)
    axes.plot(xs, ys, color=line.get_color(), alpha=0.25, linewidth=1, zorder=1)


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


def _colors(count: int) -> list[Any]:
    """Distinct colours: ten strong, then ten pale; for more than 20, a gradient."""
    import matplotlib

    if count > 20:
        return [matplotlib.colormaps["turbo"](i / (count - 1)) for i in range(count)]
    return [matplotlib.colormaps["tab20"](i) for i in (*range(0, 20, 2), *range(1, 20, 2))][:count]


def _legend_beside(axes: Any) -> None:
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.02, 1.0), borderaxespad=0.0)


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    figure.savefig(path, dpi=DPI)
    pyplot.close(figure)
