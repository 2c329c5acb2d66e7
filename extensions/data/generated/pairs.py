"""Minimal pairs from templates: drawing words, expanding both sentences of a pair, balanced rows of a split."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, TypeVar

import yaml

Pair = tuple[str, str]  # sentences of label 1 and label 0
Row = dict[str, str]

SIZES = {"train": 4000, "validation": 200, "test": 400}  # rows; two make a pair


@cache
def read_words(task: str) -> dict[str, dict[str, Any]]:
    """Split -> kind of word -> its entries, from `TASK.yaml` in this folder."""
    content = (Path(__file__).parent / f"{task}.yaml").read_text(encoding="utf-8")
    return dict(yaml.safe_load(content))


class Words:
    """Random words of one split."""

    def __init__(self, rng: Random, entries: Mapping[str, Any]) -> None:
        self.rng, self.entries = rng, entries

    def pick(self, *options: Any) -> Any:
        return self.rng.choice(options)

    def one(self, kind: str) -> Any:
        """An entry of this kind."""
        return self.rng.choice(self.entries[kind])


AnyWords = TypeVar("AnyWords", bound=Words)


def article(word: str) -> str:
    return ("an " if word[0] in "aeiou" else "a ") + word


def minimal_pair(template: str) -> Pair:
    """Both sentences of "she [is/are] here": one with the texts before the slashes, one with those after."""
    return _sentence(re.sub(r"\[(.*?)/.*?\]", r"\1", template)), _sentence(re.sub(r"\[.*?/(.*?)\]", r"\1", template))


def _sentence(text: str) -> str:
    text = " ".join(text.split())
    return text[0].upper() + text[1:] + "."


def generate(
    task: str, words: type[AnyWords], phenomena: Mapping[str, Callable[[AnyWords], Pair]], split: str, seed: int = 0
) -> list[Row]:
    """Rows {"sentence", "label": "1" or "0", "phenomenon", "pair"}; the two members of a pair share its id.

    Phenomena alternate, labels are exactly balanced, and no sentence occurs twice. The rows depend only on `split` and
    `seed`.

    Args:
        task: name of the lexicon file.
        words: class that draws its words.
        phenomena: name -> function that generates a pair.

    Raises:
        ValueError: unknown split.
    """
    lexicons = read_words(task)
    if split not in lexicons:
        raise ValueError(f"unknown split {split!r}; allowed: {', '.join(lexicons)}")
    rng, names = Random(f"{seed}/{split}"), list(phenomena)  # nosec B311 # reproducible rows, no secrets
    drawn = words(rng, lexicons[split])
    rows: list[Row] = []
    seen: set[str] = set()
    while len(rows) < SIZES[split]:
        number = len(rows) // 2
        phenomenon = names[number % len(names)]
        pair = phenomena[phenomenon](drawn)
        if seen.intersection(pair):
            continue
        seen.update(pair)
        for text, label in zip(pair, ("1", "0"), strict=True):
            rows.append({"sentence": text, "label": label, "phenomenon": phenomenon, "pair": f"{split}-{number}"})
    rng.shuffle(rows)
    return rows
