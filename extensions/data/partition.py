"""Seeded, stratified parts of the rows of a task: splits held out of its training file, and samples of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from extensions.data.example import Example
from extensions.prompts import dedup_key
from extensions.tasks import Task, fold

_BINS = 10  # of the scores of a regression, with as many rows in each
_COMMON = 3  # groups of rows that a set of labels needs to form a stratum


def text_key(task: Task, fields: Mapping[str, str]) -> tuple[str, ...]:
    """What is equal for rows of equal texts: Unicode form, case and the width of spaces do not count."""
    return tuple(map(fold, dedup_key(task, fields)))


def label_set(task: Task, label: str) -> tuple[str, ...]:
    """The labels of a row: of a multi-label task those that its answer joins, or that of no label."""
    return (task.split_labels(label) or (label,)) if task.multi_label else (label,)


def hold_out(examples: Sequence[Example], shares: Mapping[str, float], seed: int) -> dict[str, list[int]]:
    """Positions of the rows of each split, in order: "train", and the splits that `shares` holds out of it.

    Rows of equal texts, or of one question, are on one side. Each split has its share of the different texts of every
    class (a regression: of every tenth of its scores), and at least one text of a class that has as many as there are
    splits, unless such a text also has a rarer label. A text with several labels counts for each of them.

    Args:
        shares: split -> share of the rows, above 0; together below 1.
    """
    groups = _groups(examples)
    strata = _strata(examples, groups)
    rng = np.random.default_rng(seed)
    place: dict[int, str] = {}
    carry = dict.fromkeys(shares, 0.0)
    for members in strata:
        taken = Counter(place[group] for group in members if group in place)
        free = [members[i] for i in rng.permutation(len(members)) if members[i] not in place]
        for split, count in _counts(len(members), shares, carry).items():
            wanted = max(0, count - taken[split])
            place |= dict.fromkeys(free[:wanted], split)
            free = free[wanted:]
        place |= dict.fromkeys(free, "train")
    found: dict[str, list[int]] = {"train": [], **{split: [] for split in shares}}
    for group, rows in enumerate(groups):
        found[place.get(group, "train")] += rows
    return {split: sorted(rows) for split, rows in found.items()}


def _counts(size: int, shares: Mapping[str, float], carry: dict[str, float]) -> dict[str, int]:
    """How many of `size` groups each split takes; `carry` is what rounding owes it from the strata before."""
    if size <= len(shares):  # too few for each split to have one
        return dict.fromkeys(shares, 0)
    counts = {}
    for split, share in shares.items():
        exact = share * size + carry[split]
        counts[split] = max(1, round(exact))
        carry[split] = min(0.5, max(-0.5, exact - counts[split]))
    while sum(counts.values()) >= size:  # one stays for training
        most = max(counts, key=lambda split: counts[split])
        counts[most] -= 1
    return counts


def _groups(examples: Sequence[Example]) -> list[list[int]]:
    """Positions of the rows that belong together: of equal texts, of one question, of one pair; chains of them too."""
    first: dict[tuple[str, ...], int] = {}
    parent = list(range(len(examples)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for i, example in enumerate(examples):
        keys = [("text", *text_key(example.task, example.fields))]
        if group := example.task.group_of(example.kept):
            keys.append(("group", *group))
        if example.pair is not None:
            keys.append(("pair", example.pair))
        for key in keys:
            a, b = sorted((root(first.setdefault(key, i)), root(i)))
            parent[b] = a
    groups: dict[int, list[int]] = {}
    for i in range(len(examples)):
        groups.setdefault(root(i), []).append(i)
    return list(groups.values())


def _strata(examples: Sequence[Example], groups: Sequence[Sequence[int]]) -> list[list[int]]:
    """Groups of each class, the rarest class first, so that it has its share before a common one takes its groups.

    A group is in the stratum of each of its labels. Of a multi-label task common sets of labels are strata too.
    """
    names = _stratum_names(examples)
    found: dict[str, list[int]] = {}
    for group, rows in enumerate(groups):
        for name in dict.fromkeys(name for i in rows for name in names[i]):
            found.setdefault(name, []).append(group)
    return sorted(found.values(), key=len)


def _stratum_names(examples: Sequence[Example]) -> list[tuple[str, ...]]:
    """The strata of each row, by name: its labels, the quantile of its score."""
    task = examples[0].task
    labels = [str(example.label) for example in examples]
    if task.is_regression:
        scores = np.array(labels, dtype=float)
        bins = max(1, min(_BINS, len(scores) // _COMMON))
        edges = np.quantile(scores, np.arange(1, bins) / bins)
        return [(str(place),) for place in np.searchsorted(edges, scores)]
    sets = [label_set(task, label) for label in labels]
    common = Counter(sets)
    return [(*one, f"set {', '.join(one)}") if len(one) > 1 and common[one] >= _COMMON else one for one in sets]


def sample(examples: list[Example], limit: int | None, seed: int) -> list[Example]:
    """At most `limit` rows of one task in the order of their file: a stratified sample by `seed`.

    Pairs and questions stay whole: as many are taken as fit in `limit`, at least one. No class is lost where there is
    room for one row of each.
    """
    if limit is None or limit >= len(examples):
        return examples
    found: dict[tuple[str, ...], list[int]] = {}
    for i, example in enumerate(examples):
        group = (example.pair,) if example.pair is not None else example.task.group_of(example.kept)
        found.setdefault(group or ("row", str(i)), []).append(i)
    whole = list(found.values())
    of_rows = _stratum_names(examples)
    names = [tuple(sorted({name for i in rows for name in of_rows[i]})) for rows in whole]
    strata: dict[tuple[str, ...], list[int]] = {}
    for number, name in enumerate(names):
        strata.setdefault(name, []).append(number)
    # The k-th of n groups of a stratum has the place (k + u) / n, u uniform in [0, 1), so that the first places hold of
    # each stratum its share.
    rng = np.random.default_rng(seed)
    places = np.empty(len(whole))
    for members in strata.values():
        places[members] = (rng.permutation(len(members)) + rng.random(len(members))) / len(members)
    order = np.argsort(places, kind="stable").tolist()
    counts = Counter(name for one in names for name in one)
    first = {name: number for number in reversed(order) for name in names[number]}
    needed = [first[name] for name in sorted(counts, key=lambda name: -counts[name])]
    chosen: list[int] = []
    for number in dict.fromkeys([*needed, *order]):
        if not chosen or limit >= len(whole[number]):
            chosen += whole[number]
            limit -= len(whole[number])
    return [examples[i] for i in sorted(chosen)]
