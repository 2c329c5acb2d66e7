"""Calibration of probabilities: log loss, Brier score, expected calibration error with its bins (Guo et al., 2017)."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.metrics import brier_score_loss, log_loss

NUM_BINS = 15  # equal-width bins of the confidence, as in Guo et al.


def calibration(probabilities: np.ndarray, golds: np.ndarray) -> dict[str, Any]:
    """How well the probabilities of a classification agree with its golds.

    Args:
        probabilities: (rows, C). Rows are normalised, since rounding leaves sums other than 1.
        golds: (rows,) label indices.

    Returns:
        log_loss: mean of -log p(gold) in nats; a p of 0 counts as 2.2e-16, so the value is finite. brier: mean of the
        squared errors, summed over the labels (0 to 2). ece and bins: see `reliability`.
    """
    probabilities = probabilities / probabilities.sum(1, keepdims=True)
    labels = range(probabilities.shape[1])
    ece, bins = reliability(probabilities, golds)
    return {
        "log_loss": float(log_loss(golds, probabilities, labels=labels)),
        "brier": float(brier_score_loss(golds, probabilities, labels=labels, scale_by_half=False)),
        "ece": ece,
        "bins": bins,
    }


def reliability(probabilities: np.ndarray, golds: np.ndarray) -> tuple[float, list[dict[str, float | int]]]:
    """Expected calibration error, and its bins: confidence is the probability of the most probable label.

    Args:
        probabilities: (rows, C); golds: (rows,) label indices.

    Returns:
        The mean over rows of |accuracy - confidence| of their bin, and the bins (low, high] that have rows, with mean
        confidence, accuracy and count.
    """
    confidences, right = probabilities.max(1), probabilities.argmax(1) == golds
    edges = np.linspace(0, 1, NUM_BINS + 1)
    which = np.searchsorted(edges[1:-1], confidences)
    bins = []
    for k in np.unique(which):
        inside = which == k
        bins.append(
            {
                "low": float(edges[k]),
                "high": float(edges[k + 1]),
                "confidence": float(confidences[inside].mean()),
                "accuracy": float(right[inside].mean()),
                "count": int(inside.sum()),
            }
        )
    return sum(b["count"] * abs(b["accuracy"] - b["confidence"]) for b in bins) / len(golds), bins
