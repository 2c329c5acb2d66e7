"""Tasks with generated rows (`extensions/data/generated/`): nothing to download."""

from __future__ import annotations

from typing import Any

from extensions.tasks.shared import ACCEPTABILITY, NEGATIVE_POSITIVE

ENTRIES: list[dict[str, Any]] = [
    {
        "name": "acceptability",
        "title": "Acceptability",
        **ACCEPTABILITY,
        "metrics": ["accuracy"],
        "extra_metrics": ["matthews"],
        "source": {"generator": "acceptability"},
    },
    {
        "name": "reviews",
        "title": "Reviews",
        "description": "You are an assistant to analyze the sentiment of reviews. The task is to decide whether the "
        "sentiment of a review is positive or negative.",
        "answer_format": NEGATIVE_POSITIVE,
        "question": 'Now judge the sentiment of the review "{sentence}".',
        "labels": {"1": ["Positive"], "0": ["Negative"]},
        "positive": "1",
        "metrics": ["accuracy"],
        "extra_metrics": ["matthews"],
        "source": {"generator": "reviews"},
    },
]
