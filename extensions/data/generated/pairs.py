"""Rows of minimal pairs, from one maker of pairs for each phenomenon."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from random import Random
from typing import TypeVar

Pair = tuple[str, str]  # label 1, label 0
Row = dict[str, str]
Lexicon = TypeVar("Lexicon")

SIZES = {"train": 4000, "validation": 200, "test": 400}  # rows; two make a pair


def generate(
    makers: Mapping[str, Callable[[Random, Lexicon], Pair]], lexicons: Mapping[str, Lexicon], split: str, seed: int
) -> list[Row]:
    """Rows {"sentence", "label": "1" or "0", "phenomenon", "pair"}; the two members of a pair share its id.

    Phenomena take turns, labels are exactly balanced, no sentence occurs twice. The same on every machine.

    Args:
        makers: phenomenon -> function of (generator, lexicon) that makes a pair.
        lexicons: split -> the words that it may use.

    Raises:
        ValueError: unknown split.
    """
    if split not in lexicons:
        raise ValueError(f"unknown split {split!r}; allowed: {', '.join(lexicons)}")
    rng, phenomena = Random(f"{seed}/{split}"), list(makers)  # nosec B311 # rows to be made again, no secrets
    rows: list[Row] = []
    seen: set[str] = set()
    while len(rows) < SIZES[split]:
        number = len(rows) // 2
        phenomenon = phenomena[number % len(phenomena)]
        pair = makers[phenomenon](rng, lexicons[split])
        if seen.intersection(pair):
            continue
        seen.update(pair)
        for text, label in zip(pair, ("1", "0"), strict=True):
            rows.append({"sentence": text, "label": label, "phenomenon": phenomenon, "pair": f"{split}-{number}"})
    rng.shuffle(rows)
    return rows
