"""Log loss, Brier score and expected calibration error against scikit-learn and plain float64 loops."""

import json
import math

import numpy as np
import pytest
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, log_loss
from support import THREE

from extensions.evaluation.calibration import calibration, reliability
from extensions.evaluation.metrics import Prediction, score


def loops(probabilities, golds):
    """(log loss, Brier score, ECE) of lists of floats."""
    n = len(golds)
    nll = -math.fsum(math.log(max(row[gold], 2.0**-52)) for row, gold in zip(probabilities, golds, strict=True)) / n
    brier = (
        math.fsum(
            (p - (k == gold)) ** 2 for row, gold in zip(probabilities, golds, strict=True) for k, p in enumerate(row)
        )
        / n
    )
    bins = {}
    for row, gold in zip(probabilities, golds, strict=True):
        top = max(row)
        number = max(k for k in range(15) if k == 0 or top > k / 15)  # (k / 15, (k + 1) / 15]
        bins.setdefault(number, []).append((top, row.index(top) == gold))
    gaps = [abs(math.fsum(c for c, _ in rows) - sum(right for _, right in rows)) for rows in bins.values()]
    return nll, brier, math.fsum(gaps) / n


@pytest.mark.parametrize("classes", [2, 3, 77])
@pytest.mark.parametrize("sharpness", [0.1, 3, 300])
def test_against_scikit_learn_and_loops(classes, sharpness):
    rng = np.random.default_rng(classes)
    logits = sharpness * rng.normal(size=(500, classes))
    probabilities = np.exp(logits - logits.max(1, keepdims=True))
    probabilities /= probabilities.sum(1, keepdims=True)
    golds = rng.integers(classes, size=500)
    found = calibration(probabilities, golds)
    nll, brier, ece = loops(probabilities.tolist(), golds.tolist())
    assert (
        found["log_loss"] == pytest.approx(nll) == pytest.approx(log_loss(golds, probabilities, labels=range(classes)))
    )
    scikit = brier_score_loss(golds, probabilities, labels=range(classes), scale_by_half=False)
    assert found["brier"] == pytest.approx(brier) == pytest.approx(scikit)
    assert found["ece"] == pytest.approx(ece)
    right, confidence = calibration_curve(probabilities.argmax(1) == golds, probabilities.max(1), n_bins=15)
    assert [b["accuracy"] for b in found["bins"]] == pytest.approx(right.tolist())
    assert [b["confidence"] for b in found["bins"]] == pytest.approx(confidence.tolist())
    assert sum(b["count"] for b in found["bins"]) == 500
    assert all(b["low"] < b["confidence"] <= b["high"] + 1e-12 for b in found["bins"])


def test_expected_calibration_error_by_hand():
    # Bins of width 1/15: 0.61 and 0.63 share (0.6, 0.667]; 0.95 is alone.
    probabilities = np.array([[0.61, 0.39], [0.37, 0.63], [0.95, 0.05]])
    ece, bins = reliability(probabilities, np.array([0, 0, 0]))
    # |0.62 - 0.5| * 2/3 + |0.95 - 1| * 1/3
    assert ece == pytest.approx((0.12 * 2 + 0.05) / 3)
    assert [(b["count"], b["accuracy"]) for b in bins] == [(2, 0.5), (1, 1.0)]
    assert reliability(np.array([[1.0, 0.0]]), np.array([0]))[0] == 0


def test_certain_and_wrong_is_finite():
    found = calibration(np.array([[1.0, 0.0]]), np.array([1]))
    assert found["log_loss"] == pytest.approx(52 * math.log(2)) and found["brier"] == 2 and found["ece"] == 1


def test_rounded_probabilities_are_normalised(recwarn):
    rows = np.array([[0.3333, 0.3333, 0.3333], [1.0000001, 0.0, 0.0]])
    assert calibration(rows, np.array([0, 0]))["log_loss"] == pytest.approx(math.log(3) / 2)
    assert not recwarn.list


def prediction(k, gold, answer, likelihood, chances):
    probabilities = None if chances is None else dict(zip("cab", chances, strict=True))  # not in the task's order
    return Prediction(THREE.name, k, "", answer, gold, probabilities=probabilities, likelihood=likelihood)


def test_scores_by_likelihood():
    made = [
        prediction(0, "a", None, "a", [0.1, 0.8, 0.1]),
        prediction(1, "b", "a", "b", [0.2, 0.2, 0.6]),
        prediction(2, "b", "b", "a", [0.0, 0.9, 0.1]),
    ]
    result = score(THREE, made)
    assert result["metrics"]["accuracy"] == pytest.approx(1 / 3) and result["format_error_rate"] == pytest.approx(1 / 3)
    by_likelihood = score(THREE, [Prediction(THREE.name, p.index, "", p.likelihood, p.gold) for p in made])
    keys = {"score", "metrics", "intervals", "predicted_shares", "classes", "confusion"}
    assert result["likelihood"] == {key: by_likelihood[key] for key in keys}
    assert result["likelihood"]["metrics"]["accuracy"] == pytest.approx(2 / 3)
    nll, brier, ece = loops([[0.8, 0.1, 0.1], [0.2, 0.6, 0.2], [0.9, 0.1, 0.0]], [0, 1, 1])
    found = result["calibration"]
    assert (found["log_loss"], found["brier"], found["ece"]) == pytest.approx((nll, brier, ece))
    assert "intervals" not in score(THREE, made, intervals=False)["likelihood"]
    json.dumps(result, allow_nan=False)
    partly = score(THREE, [*made, prediction(3, "c", "c", None, None)])
    assert not {"likelihood", "calibration"} & partly.keys(), "some rows have none"
