"""Selections of rows: even subsamples, candidate pairs of ReCoRD, demonstrations for prompts."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, TypeVar

import numpy as np

from extensions.data.example import Example, by_question
from extensions.prompts import dedup_key
from extensions.tasks import Task

Item = TypeVar("Item")


def evenly(items: Sequence[Item], count: int) -> Sequence[Item]:
    """`count` evenly spaced items, or all if there are no more."""
    return items if len(items) <= count else [items[i * len(items) // count] for i in range(count)]


def subsample_evenly(examples: list[Example], limit: int | None) -> list[Example]:
    """About `limit` evenly spaced examples, so that a sorted file still gives a fair sample.

    Questions with several rows stay whole: as many are taken as fit in `limit`, at least one.
    """
    if limit is None or limit >= len(examples):
        return examples
    groups = by_question(examples)
    count = max(1, limit * len(groups) // len(examples))
    return [example for group in evenly(groups, count) for example in group]


def sample_candidate_pair(examples: list[Example], seed: int) -> list[Example]:
    """One right and one wrong candidate per question, drawn at random, as a pair that shares a batch."""
    kept: list[Example] = []
    for number, group in enumerate(by_question(examples)):
        rng = np.random.default_rng([seed, number])
        for label in dict.fromkeys(example.label for example in group):
            options = [example for example in group if example.label == label]
            kept.append(replace(options[rng.integers(len(options))], index=len(kept), pair=str(number)))
    return kept


def demonstrations(
    task: Task, train: Sequence[Example], count: int, kind: Literal["balanced", "random"], seed: int
) -> list[Example]:
    """Training rows to show before a query (section 5.2 of the paper): up to `count`, drawn by `seed`.

    No two have the same texts. Where a question has several rows (MultiRC, ReCoRD), each is about a different text.

    Args:
        train: training rows of the task, or of its `train_task`.
        kind: "balanced" takes the labels in turn (in a regression the lower and upper halves of the score range),
            "random" takes any rows.
    """
    rng = np.random.default_rng([seed, zlib.crc32(task.name.encode())])
    classes: dict[Any, list[Example]] = {}
    middle = sum(task.score_range) / 2 if task.score_range else 0
    for row in rng.permutation(len(train)):
        label = train[row].label
        kind_of = float(str(label)) > middle if task.is_regression else label
        classes.setdefault(kind_of if kind == "balanced" else "any", []).append(train[row])
    found: dict[tuple[str, ...], Example] = {}
    for place in range(max(map(len, classes.values()), default=0)):
        for rows in classes.values():
            if place < len(rows) and len(found) < count:
                found.setdefault(dedup_key(task, rows[place].fields), rows[place])
    return list(found.values())
