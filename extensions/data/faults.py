"""Rows that cannot be used: all of a file are reported at once, by kind, with the key that lets them pass."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from extensions.common.errors import UserError

SHOWN = 3  # places of each kind
_VALUES = 12  # different values of each kind


@dataclass(frozen=True)
class Fault:
    """What is wrong with one row."""

    where: str  # file and line
    kind: str  # what rows of the same fault are: "rows with too many or too few cells"
    detail: str  # of this row alone
    remedy: str = ""  # what lets such rows pass
    value: str | None = None  # what the row has, where rows of the kind are counted by it
    cells: dict[str | int, Any] = field(default_factory=dict)  # of the row, as far as they have columns

    def __str__(self) -> str:
        return f"{self.where}{self.detail}" + (f". {self.remedy}" if self.remedy else "")


class Faults:
    """The faulty rows of one file."""

    def __init__(self, path: Path) -> None:
        self.path, self.count = path, 0
        self._kinds: dict[tuple[str, str], list[Fault]] = {}  # the first of each
        self._counts: Counter[tuple[str, str]] = Counter()
        self._values: dict[tuple[str, str], Counter[str]] = {}

    def add(self, fault: Fault) -> None:
        key = fault.kind, fault.remedy
        self.count += 1
        self._counts[key] += 1
        if self._counts[key] <= SHOWN:
            self._kinds.setdefault(key, []).append(fault)
        if fault.value is not None:
            self._values.setdefault(key, Counter())[fault.value] += 1

    def check(self) -> None:
        """UserError if there are any: the row itself if it is one, else a line for each kind."""
        if not self.count:
            return
        if self.count == 1:
            raise UserError(str(next(iter(self._kinds.values()))[0]))
        lines = [f"{self.path}: {self.count} rows cannot be used"]
        for key, first in self._kinds.items():
            kind, remedy = key
            count = self._counts[key]
            lines.append(f"- {kind}: {count}{self._counted(key)}" + (f". {remedy}" if remedy else ""))
            lines += [f"    {fault.where}{fault.detail}" for fault in first]
            if count > len(first):
                lines.append(f"    and {count - len(first)} more")
        raise UserError("\n".join(lines))

    def _counted(self, key: tuple[str, str]) -> str:
        values = self._values.get(key)
        if not values:
            return ""
        shown = ", ".join(f"{value!r} ({count})" for value, count in values.most_common(_VALUES))
        more = f" and {len(values) - _VALUES} other values" if len(values) > _VALUES else ""
        return f" ({shown}{more})"
