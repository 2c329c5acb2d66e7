"""Seeded, stratified parts of a task's rows: splits held out of its training file, and samples of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TypeVar

import numpy as np

from extensions.data.example import Example
from extensions.prompts import dedup_key
from extensions.tasks import fold

Key = TypeVar("Key", bound=Hashable)

_SCORE_BINS = 10  # quantiles of a regression's scores, each a stratum
_MIN_STRATUM = 3  # rows of a score bin, and of a set of labels that forms a stratum


def hold_out(examples: Sequence[Example], shares: Mapping[str, float], seed: int) -> dict[str, list[int]]:
    """Positions of the rows of each split, in order: "train", and the splits that `shares` holds out of it.

    Rows with equal texts (up to case, whitespace and Unicode normal form), of one question or of one pair are in one
    split. Each split gets its share of the distinct texts of every class (in a regression: of every decile of the
    scores). It gets at least one text of every class that has as many texts as there are splits, unless such a text
    also has a rarer label. A text with several labels counts for each of them.

    Args:
        shares: split -> share of the rows, above 0; together below 1.
    """
    groups = _connected_rows(examples)
    names = _strata(examples)
    strata = _grouped((name, group) for group, rows in enumerate(groups) for name in _distinct(names, rows))
    rng = np.random.default_rng(seed)
    split_of: dict[int, str] = {}  # group -> split
    carry = dict.fromkeys(shares, 0.0)
    for members in sorted(strata.values(), key=len):  # rare classes first: common ones would take their groups
        taken = Counter(split_of[group] for group in members if group in split_of)
        free = [members[i] for i in rng.permutation(len(members)) if members[i] not in split_of]
        for split, count in _counts(len(members), shares, carry).items():
            wanted = max(0, count - taken[split])
            split_of |= dict.fromkeys(free[:wanted], split)
            free = free[wanted:]
        split_of |= dict.fromkeys(free, "train")
    found: dict[str, list[int]] = {"train": [], **{split: [] for split in shares}}
    for group, rows in enumerate(groups):
        found[split_of.get(group, "train")] += rows
    return {split: sorted(rows) for split, rows in found.items()}


def stratified_sample(examples: list[Example], limit: int | None, seed: int) -> list[Example]:
    """A stratified sample of at most `limit` rows of one task, drawn by `seed`, in file order.

    Pairs and questions stay whole: as many are taken as fit in `limit`, at least one. Every class is kept if there is
    room for one row of each.
    """
    if limit is None or limit >= len(examples):
        return examples

    def group_of(i: int, example: Example) -> tuple[str, ...]:
        pair = (example.pair,) if example.pair is not None else example.task.group_of(example.kept)
        return pair or ("row", str(i))

    groups = list(_grouped((group_of(i, example), i) for i, example in enumerate(examples)).values())
    of_rows = _strata(examples)
    names = [tuple(sorted(_distinct(of_rows, rows))) for rows in groups]
    # The k-th of n groups of a stratum gets the sort key (k + u) / n, u uniform in [0, 1), so that every prefix of the
    # order holds each stratum in proportion.
    rng = np.random.default_rng(seed)
    places = np.empty(len(groups))
    for members in _grouped((name, number) for number, name in enumerate(names)).values():
        places[members] = (rng.permutation(len(members)) + rng.random(len(members))) / len(members)
    order = np.argsort(places, kind="stable").tolist()
    counts = Counter(name for one in names for name in one)
    first = {name: number for number in reversed(order) for name in names[number]}
    needed = [first[name] for name in sorted(counts, key=lambda name: -counts[name])]
    chosen: list[int] = []
    for number in dict.fromkeys([*needed, *order]):
        if not chosen or limit >= len(groups[number]):
            chosen += groups[number]
            limit -= len(groups[number])
    return [examples[i] for i in sorted(chosen)]


def labels_of(example: Example) -> tuple[str, ...]:
    """The labels of a row; in a multi-label task those of its label set, or the label of the empty set."""
    label = str(example.label)
    return (example.task.split_labels(label) or (label,)) if example.task.multi_label else (label,)


def _counts(size: int, shares: Mapping[str, float], carry: dict[str, float]) -> dict[str, int]:
    """How many of `size` groups each split takes; `carry` is the rounding error of the previous strata."""
    if size <= len(shares):  # too few for each split to have one
        return dict.fromkeys(shares, 0)
    counts = {}
    for split, share in shares.items():
        exact = share * size + carry[split]
        counts[split] = max(1, round(exact))
        carry[split] = min(0.5, max(-0.5, exact - counts[split]))
    while sum(counts.values()) >= size:  # at least one stays for training
        counts[max(counts, key=lambda split: counts[split])] -= 1
    return counts


def _connected_rows(examples: Sequence[Example]) -> list[list[int]]:
    """Positions of the rows that must stay together: connected components by equal texts, questions and pairs."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    first: dict[tuple[str, ...], int] = {}
    edges: list[tuple[int, int]] = []
    for i, example in enumerate(examples):
        keys = [("text", *map(fold, dedup_key(example.task, example.fields)))]
        if group := example.task.group_of(example.kept):
            keys.append(("group", *group))
        if example.pair is not None:
            keys.append(("pair", example.pair))
        edges += [(i, first.setdefault(key, i)) for key in keys]
    graph = coo_matrix((np.ones(len(edges)), tuple(zip(*edges, strict=True))), (len(examples), len(examples)))
    _, components = connected_components(graph, directed=False)
    return list(_grouped((component, i) for i, component in enumerate(components.tolist())).values())


def _strata(examples: Sequence[Example]) -> list[tuple[str, ...]]:
    """The strata of each row, by name: its labels and, if frequent, its label set; in a regression the score's
    quantile."""
    if examples[0].task.is_regression:
        scores = np.array([str(example.label) for example in examples], dtype=float)
        bins = max(1, min(_SCORE_BINS, len(scores) // _MIN_STRATUM))
        edges = np.quantile(scores, np.arange(1, bins) / bins)
        return [(str(place),) for place in np.searchsorted(edges, scores)]
    sets = [labels_of(example) for example in examples]
    common = Counter(sets)
    return [(*one, f"set {', '.join(one)}") if len(one) > 1 and common[one] >= _MIN_STRATUM else one for one in sets]


def _distinct(names: Sequence[tuple[str, ...]], rows: Iterable[int]) -> list[str]:
    return list(dict.fromkeys(name for i in rows for name in names[i]))


def _grouped(pairs: Iterable[tuple[Key, int]]) -> dict[Key, list[int]]:
    found: dict[Key, list[int]] = {}
    for key, value in pairs:
        found.setdefault(key, []).append(value)
    return found
