"""Plots of runs, and their smoothing."""

import json
import random

import pytest
from run_folders import runs_of, size_of, write_run

from extensions.reporting import plots
from extensions.reporting.curves import loss_points
from extensions.reporting.plots import (
    Curve,
    Level,
    Panel,
    accuracy_curves,
    loss_curve,
    loss_curves,
    reward_curve,
    reward_curves,
    smoothed,
)
from extensions.reporting.rows import make_rows


def test_smoothed():
    assert smoothed([], 0.9) == []
    assert smoothed([3.0], 0.9) == [pytest.approx(3.0)]
    assert smoothed([2.0] * 50, 0.9) == pytest.approx([2.0] * 50), "not biased by the start"
    # weight 0.5, values 0 and 1: the average is 0.5 * 1 / (1 - 0.25)
    assert smoothed([0.0, 1.0], weight=0.5) == [0.0, pytest.approx(2 / 3)]
    values = [random.Random(0).random() for _ in range(30)]
    weights = [0.9 ** (29 - k) for k in range(30)]
    assert smoothed(values, 0.9)[-1] == pytest.approx(
        sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
    )


@pytest.mark.parametrize("tasks", [("cola",), ("cola", "sst2")], ids=["one task", "two tasks"])
def test_reward_curve(tmp_path, tasks):
    metrics = [
        {"step": k, "reward_mean": k / 10 - 1, "reward_by_task": {t: k / 10 for t in tasks if (k + len(t)) % 3}}
        for k in range(1, 12)
    ]
    reward_curve(metrics, tmp_path / "curve.png", "A title with $ and _")
    content = (tmp_path / "curve.png").read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) > 5000


def test_many_runs_and_names_with_dollar_signs(tmp_path):
    """More runs than the colour map has colours; $...$ is not parsed as mathematics."""
    reward_curves({f"$run_{i}$": ([1, 2, 3], [0.0, 0.1 * i, 0.2]) for i in range(23)}, tmp_path / "r.png")
    loss_curve([{"step": k, "loss": 2.0 / k, "answer_loss": 1.0 / k} for k in (1, 2)], tmp_path / "l.png", "$ and $")
    assert size_of(tmp_path / "r.png")[0] == 9 * 150 and size_of(tmp_path / "l.png") == (1200, 675)


@pytest.fixture
def figures(monkeypatch):
    """The axes of each figure that is saved."""
    kept = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: kept.append(figure.axes))
    yield kept
    from matplotlib import pyplot

    pyplot.close("all")


@pytest.mark.parametrize("steps", [1, 2, 30, 1000])
@pytest.mark.parametrize("tasks", [1, 9])
def test_iterations_are_whole_numbers_from_0(figures, tmp_path, steps, tasks):
    by_task = {f"t{k}": 0.0 for k in range(tasks)}
    own = {"reward_mean": 0.0, "reward_std": 0.5, "reward_by_task": by_task, "loss": 2.0, "answer_loss": 1.0}
    metrics = [own | {"step": k, "samples": 16 * k} for k in range(1, steps + 1)]
    reward_curve(metrics, tmp_path / "-", "x")
    loss_curve(metrics, tmp_path / "-", "x")
    for (axes,) in figures:
        assert axes.get_xlim()[0] == 0 and all(tick == int(tick) for tick in axes.get_xticks())
    rewards, losses = (axes.get_legend() for (axes,) in figures)
    named = [text.get_text() for text in rewards.get_texts()]
    assert named[0] == "mean of the batch" and any("95% interval" in name for name in named)
    assert (named[-1] == "per iteration") == (steps > 10)
    assert [name for name in named if name.startswith("t")] == (list(by_task) if tasks > 1 else [])
    assert len(losses.get_texts()) == 2 + 2 * (steps > 10)


def test_scores_start_before_training_and_are_not_zoomed_to_a_hair(figures, tmp_path):
    before = Level(0.97, (0.96, 0.98))
    curves = [Curve(f"run {k}", [16, 32], [1.0, 2.0], [0.981, 0.982], False, before) for k in range(3)]
    levels = {"one": Level(0.97), "two": Level(0.972), "three": Level(0.9)}
    accuracy_curves([Panel("Reviews", curves, levels)], tmp_path / "-")
    ((left, right),) = figures
    for axes in (left, right):
        low, high = axes.get_ylim()
        assert high - low >= 10 and high <= 101 and axes.get_xlim()[0] == 0
        lines = {line.get_label(): line for line in axes.get_lines()}
        assert [float(lines[name].get_ydata()[0]) for name in levels] == pytest.approx([97.0, 97.2, 90.0])
        offsets = [lines[name]._unscaled_dash_pattern[0] for name in ("one", "two")]
        assert offsets == [0, 3], "their dashes alternate"
        widths = [lines[f"run {k}"].get_linewidth() for k in range(3)]
        assert widths == sorted(set(widths), reverse=True), "equal curves show behind each other"
        starts = [line for line in axes.get_lines() if list(line.get_xdata()) == [0] and line.get_marker() in "os^"]
        assert [float(line.get_ydata()[0]) for line in starts] == pytest.approx([97.0] * 3)
    assert any("before training" in text.get_text() for text in right.get_legend().get_texts())


def test_losses_of_sft_runs(figures, tmp_path):
    folder = write_run(tmp_path / "x", "sft", {"sst2": (0.5,)}, rewards=[2.0, 1.0])
    assert loss_points(make_rows(runs_of(folder))) == {}, "the metrics of an earlier version"
    lines = [{"step": k, "samples": k, "elapsed_s": k, "answer_loss": 1.0 / k} for k in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    points = loss_points(make_rows(runs_of(folder)))
    assert points == {"SFT-ST, SST-2": ([1, 2], [1.0, 0.5])}
    loss_curves(points, tmp_path / "-")
    (((axes,)),) = figures
    assert list(axes.get_lines()[0].get_ydata()) == pytest.approx([1.0, 0.5]) and axes.get_ylim()[0] == 0
