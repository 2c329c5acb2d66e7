"""The examples of each step's batch: mixing of tasks, epochs, balance."""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from functools import cache, lru_cache
from typing import Literal

import numpy as np

from extensions.data.balance import epoch_sizes, oversampled, spread_copies
from extensions.data.example import Example


def rows_of_epoch(
    sizes: Mapping[str, int],
    mixing: Literal["proportional", "capped", "temperature", "uniform"],
    cap: int,
    temperature: float,
) -> dict[str, int]:
    """Rows of each task in an epoch of multi-task training.

    proportional: all; capped: at most `cap`; temperature: in proportion to size ** (1 / temperature); uniform: equal
    numbers. The last two keep the total, so small tasks repeat and large ones span several epochs.
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
    """The examples of each step's batch: a pure function of (seed, step), so a resumed run needs no state.

    An epoch is one random order of the examples. Tasks are mixed in proportion to their size, or by `rows`. Minimal
    pairs stay adjacent. With `balanced`, the labels of each task are spread evenly over that order, so every batch has
    about equal numbers of each; a constant answer then has the same mean reward in every batch, and gets no gradient.
    With `oversample`, rows of rare labels are repeated (`balance.oversampled`), and the copies of a row are spread.

    Args:
        rows: task name -> its rows in an epoch (`rows_of_epoch`); None: all. A task that contributes only
            part of its rows continues in the next epoch, so each of its rows is used once before any is repeated.
        weights: (task name, label) -> weight of such a row (`balance.class_weights`); None: 1.
    """

    def __init__(
        self,
        examples: list[Example],
        batch_size: int,
        seed: int,
        balanced: bool,
        rows: Mapping[str, int] | None = None,
        oversample: bool = False,
        weights: Mapping[tuple[str, str], float] | None = None,
    ) -> None:
        self.examples, self.batch_size, self.seed, self.balanced = examples, batch_size, seed, balanced
        self.oversample, self.weights = oversample, weights
        groups: dict[str, list[int]] = {}
        for i, example in enumerate(examples):
            groups.setdefault(f"pair {example.task.name} {example.pair}" if example.pair else f"row {i}", []).append(i)
        self._groups: dict[str, list[list[int]]] = {}  # task name -> rows that stay together, one or a pair
        for group in groups.values():
            self._groups.setdefault(examples[group[0]].task.name, []).append(group)
        sizes = epoch_sizes(examples, oversample)
        self._shares = {name: rows[name] / size for name, size in sizes.items()} if rows is not None else {}
        self._order = lru_cache(maxsize=4)(self._shuffled)  # a batch spans one epoch, or two or three
        self._ends: list[int] = []  # position of the end of each epoch so far

    def batch(self, step: int) -> list[Example]:
        """The `batch_size` examples of step `step` (from 0)."""
        return [self._at(p) for p in range(step * self.batch_size, (step + 1) * self.batch_size)]

    def rows_until(self, steps: int) -> list[Example]:
        """The distinct examples of the first `steps` batches, in the order of `examples`."""
        left, epoch, used = steps * self.batch_size, 0, set[int]()
        while left > 0 and len(used) < len(self.examples):
            part = self._order(epoch)[:left]
            used.update(part)
            left, epoch = left - len(part), epoch + 1
        return [self.examples[i] for i in sorted(used)]

    def weight(self, example: Example) -> float:
        """The factor of a row's loss (SFT) or reward (PPO)."""
        return 1.0 if self.weights is None else self.weights[example.task.name, str(example.label)]

    def _at(self, position: int) -> Example:
        while not self._ends or self._ends[-1] <= position:
            self._ends.append((self._ends[-1] if self._ends else 0) + len(self._order(len(self._ends))))
        epoch = bisect.bisect_right(self._ends, position)
        start = self._ends[epoch - 1] if epoch else 0
        return self.examples[self._order(epoch)[position - start]]

    def _shuffled(self, epoch: int) -> list[int]:
        rng = np.random.default_rng([self.seed, epoch])
        groups = [group for name in self._groups for group in self._of_epoch(name, epoch)]
        if self.oversample:
            groups = spread_copies(groups, rng)
        if self.balanced:
            groups = _interleave(self.examples, groups, rng, shuffle=not self.oversample)
        elif not self.oversample:
            groups = [groups[i] for i in rng.permutation(len(groups))]
        return [i for group in groups for i in group]

    def _of_epoch(self, name: str, epoch: int) -> list[list[int]]:
        """The groups of a task in an epoch."""
        share = self._shares.get(name, 1)
        if share == 1:
            return self._pass(name, epoch)
        number, size = list(self._groups).index(name), len(self._pass(name, 0))
        count = max(1, round(share * size))

        @cache
        def shuffled(n: int) -> list[list[int]]:
            groups = self._pass(name, n)
            return [groups[i] for i in np.random.default_rng([self.seed, number, n, 1]).permutation(size)]

        return [shuffled(place // size)[place % size] for place in range(epoch * count, (epoch + 1) * count)]

    def _pass(self, name: str, n: int) -> list[list[int]]:
        """The groups of the n-th pass over a task."""
        if not self.oversample:
            return self._groups[name]
        rng = np.random.default_rng([self.seed, list(self._groups).index(name), n, 2])
        return oversampled(self.examples, self._groups[name], rng)


def _interleave(
    examples: list[Example], groups: list[list[int]], rng: np.random.Generator, shuffle: bool
) -> list[list[int]]:
    """A random order over which the groups of each class are spread evenly.

    The k-th of n groups of a class gets the sort key (k + u) / n, with u uniform in [0, 1).

    Args:
        shuffle: shuffle the groups of each class first.
    """
    classes: dict[tuple[str, ...], list[list[int]]] = {}
    for group in groups:
        task = examples[group[0]].task
        labels = () if task.is_regression else sorted(str(examples[i].label) for i in group)
        classes.setdefault((task.name, *labels), []).append(group)
    placed: list[tuple[float, list[int]]] = []
    for members in classes.values():
        for rank, i in enumerate(rng.permutation(len(members)) if shuffle else range(len(members))):
            placed.append(((rank + rng.random()) / len(members), members[i]))
    return [group for _, group in sorted(placed, key=lambda pair: pair[0])]
