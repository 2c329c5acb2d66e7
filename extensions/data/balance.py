"""Class imbalance in training: oversampling and class weights, for tasks with one label per row."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from extensions.common.errors import UserError
from extensions.data.example import Example


def check_classes(examples: Sequence[Example]) -> None:
    """Raise UserError if all rows of a task have the same label, which leaves nothing to balance."""
    for task, counts in _label_counts(examples).items():
        if len(counts) == 1:
            raise UserError(
                f"data.oversample and data.class_weights balance labels, but all {counts.total()} training rows of "
                f"task {task} have the label {next(iter(counts))!r}; give rows of other labels, or leave both keys out"
            )


def class_weights(examples: Sequence[Example]) -> dict[tuple[str, str], float]:
    """(task name, label) -> weight of such a row: n / (k * n_label) for the n rows of a task with k labels.

    This is scikit-learn's "balanced": the total weight of each label is the same, and the mean weight of a row is 1.
    """
    return {
        (task, label): counts.total() / (len(counts) * count)
        for task, counts in _label_counts(examples).items()
        for label, count in counts.items()
    }


def epoch_sizes(examples: Sequence[Example], oversample: bool) -> dict[str, int]:
    """Task name -> number of its rows per epoch; with `oversample`, copies included."""
    counts = _label_counts(examples)
    return {task: len(c) * max(c.values()) if oversample else c.total() for task, c in counts.items()}


def oversampled(examples: Sequence[Example], groups: list[list[int]], rng: np.random.Generator) -> list[list[int]]:
    """The groups of a task, with copies, so that each label has as many rows as the most frequent one.

    All rows of a label are repeated equally often, except for a remainder that `rng` draws. Pairs are not repeated.

    Args:
        groups: row numbers that stay together, one or a pair.
    """
    counts = Counter(str(examples[i].label) for group in groups for i in group)
    single: dict[str, list[list[int]]] = defaultdict(list)
    for group in groups:
        if len(group) == 1:
            single[str(examples[group[0]].label)].append(group)
    found = list(groups)
    for label, own in single.items():
        whole, rest = divmod(max(counts.values()) - counts[label], len(own))
        found += own * whole + [own[i] for i in rng.permutation(len(own))[:rest]]
    return found


def spread_copies(groups: list[list[int]], rng: np.random.Generator) -> list[list[int]]:
    """A random order in which the copies of a group are far apart.

    The k-th of n copies gets the sort key (k + u) / n, with u uniform in [0, 1).
    """
    copies, seen = Counter(group[0] for group in groups), Counter[int]()
    places = []
    for group, u in zip(groups, rng.random(len(groups)), strict=True):
        places.append((seen[group[0]] + u) / copies[group[0]])
        seen[group[0]] += 1
    return [groups[i] for i in np.argsort(places, kind="stable")]


def _label_counts(examples: Sequence[Example]) -> Mapping[str, Counter[str]]:
    """Task name -> label -> rows."""
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for example in examples:
        found[example.task.name][str(example.label)] += 1
    return found
