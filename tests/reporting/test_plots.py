"""Plots of runs, and their smoothing."""

import random

import pytest
from run_folders import size_of

from extensions.reporting.plots import loss_curve, reward_curve, reward_curves, smoothed


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
