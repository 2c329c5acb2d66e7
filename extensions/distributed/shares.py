"""Rows shared out over ranks that must do equally many forwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

Row = TypeVar("Row")


def share(rows: Sequence[Row], rank: int, ranks: int) -> list[Row]:
    """Rows rank, rank + ranks, ...; padded with the first row, so that all shares are equally long."""
    own = list(rows[rank::ranks])
    return own + [rows[0]] * (-(-len(rows) // ranks) - len(own))


def joined(shares: Sequence[Sequence[Row]], count: int) -> list[Row]:
    """The results for `count` rows, in order, from those of each rank's `share`."""
    return [shares[row % len(shares)][row // len(shares)] for row in range(count)]
