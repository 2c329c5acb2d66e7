"""Which examples make up the batch of a step: mixing of tasks, epochs, balance."""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Mapping
from functools import cache, lru_cache
from typing import Literal

import numpy as np

from extensions.data.example import Example


def rows_of_epoch(
    sizes: Mapping[str, int],
    mixing: Literal["proportional", "capped", "temperature", "uniform"],
    cap: int,
    temperature: float,
) -> dict[str, int]:
    """Rows of each task in an epoch of multi-task training.

    proportional: all of them; capped: at most `cap`; temperature: in proportion to size ** (1 / temperature), and
    uniform: the same of each, both of as many rows in all as there are, so that small tasks repeat and large ones wait.
    """
    if mixing == "proportional":
        return dict(sizes)
    if mixing == "capped":
        return {name: min(size, cap) for name, size in sizes.items()}
    power = 1 / temperature if mixing == "temperature" else 0.0
    weights = {name: size**power for name, size in sizes.items()}
    scale = sum(sizes.values()) / sum(weights.values())
    return {name: max(1, round(scale * weight)) for name, weight in weights.items()}


class BatchOrder:
    """Which examples make up the batch of a step: a pure function of (seed, step), so a resumed run needs no state.

    An epoch is one random order of the examples: tasks are mixed in proportion to their size, or as `rows` says.
    Minimal pairs stay next to each other. With `balanced`, the labels of each task take turns in that order, so that
    every batch holds about as many of each: a constant answer then earns the same in every batch, and no gradient.

    Args:
        rows: task name -> its rows in an epoch (`rows_of_epoch`); None: all. A task that gives fewer than it has goes
            on in the next epoch where it stopped, so each of its rows is seen before one is seen again.
    """

    def __init__(
        self,
        examples: list[Example],
        batch_size: int,
        seed: int,
        balanced: bool,
        rows: Mapping[str, int] | None = None,
    ) -> None:
        self.examples, self.batch_size, self.seed, self.balanced = examples, batch_size, seed, balanced
        groups: dict[str, list[int]] = {}
        for i, example in enumerate(examples):
            groups.setdefault(f"pair {example.task.name} {example.pair}" if example.pair else f"row {i}", []).append(i)
        self._units: dict[str, list[list[int]]] = {}
        for unit in groups.values():
            self._units.setdefault(examples[unit[0]].task.name, []).append(unit)
        sizes = Counter(example.task.name for example in examples)
        self._shares = {name: rows[name] / size for name, size in sizes.items()} if rows is not None else {}
        self._order = lru_cache(maxsize=4)(self._shuffled)  # a batch is of one epoch, or of two or three
        self._ends: list[int] = []  # number of positions up to the end of each epoch that was looked at

    def batch(self, step: int) -> list[Example]:
        """The `batch_size` examples of step `step` (from 0)."""
        return [self._at(p) for p in range(step * self.batch_size, (step + 1) * self.batch_size)]

    def _at(self, position: int) -> Example:
        while not self._ends or self._ends[-1] <= position:
            self._ends.append((self._ends[-1] if self._ends else 0) + len(self._order(len(self._ends))))
        epoch = bisect.bisect_right(self._ends, position)
        start = self._ends[epoch - 1] if epoch else 0
        return self.examples[self._order(epoch)[position - start]]

    def _shuffled(self, epoch: int) -> list[int]:
        rng = np.random.default_rng([self.seed, epoch])
        units = [unit for name in self._units for unit in self._drawn(name, epoch)]
        if not self.balanced:
            return [i for unit in rng.permutation(len(units)) for i in units[unit]]
        return _interleave(self.examples, units, rng)

    def _drawn(self, name: str, epoch: int) -> list[list[int]]:
        """The units of a task in an epoch."""
        units, share = self._units[name], self._shares.get(name, 1)
        if share == 1:
            return units
        number, count = list(self._units).index(name), max(1, round(share * len(units)))
        passes = cache(lambda n: np.random.default_rng([self.seed, number, n, 1]).permutation(len(units)))
        places = range(epoch * count, (epoch + 1) * count)
        return [units[passes(place // len(units))[place % len(units)]] for place in places]


def _interleave(examples: list[Example], units: list[list[int]], rng: np.random.Generator) -> list[int]:
    """A random order in which each class of units is spread evenly.

    The k-th of n units of a class gets the place (k + u) / n, u uniform in [0, 1), and places are sorted.
    """
    classes: dict[tuple[str, ...], list[list[int]]] = {}
    for unit in units:
        first = examples[unit[0]]
        labels = () if first.task.is_regression else sorted(str(examples[i].label) for i in unit)
        classes.setdefault((first.task.name, *labels), []).append(unit)
    placed: list[tuple[float, list[int]]] = []
    for members in classes.values():
        for rank, unit in enumerate(rng.permutation(len(members))):
            placed.append(((rank + rng.random()) / len(members), members[unit]))
    placed.sort(key=lambda pair: pair[0])
    return [i for _, unit in placed for i in unit]
