"""Invalid rows: all of a file are reported together, by kind, with the recipe key that accepts each kind."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from extensions.common.errors import UserError

EXAMPLES_PER_KIND = 3
_VALUES_PER_KIND = 12


@dataclass(eq=False)
class RowError(UserError):
    """One invalid row."""

    where: str  # file and line
    kind: str  # heading for such rows, for example "rows with too many or too few cells"
    detail: str  # the error of this row, beginning with ":" or ","
    remedy: str = ""  # how to correct such rows, or the key that accepts them
    value: str | None = None  # the invalid value, if values of this kind are counted
    cells: dict[str | int, Any] = field(default_factory=dict)  # of a ragged row: those that can be assigned to columns

    def __str__(self) -> str:
        return f"{self.where}{self.detail}" + (f". {self.remedy}" if self.remedy else "")


class IncompleteRow(RowError):
    """A row without one of its texts."""


class UnlabelledRow(RowError):
    """A row whose label is empty or not one of the task's."""


class RowErrors:
    """The errors of the rows of one file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._first: dict[tuple[str, str], list[RowError]] = {}  # (kind, remedy) -> the first errors
        self._counts: Counter[tuple[str, str]] = Counter()
        self._values: dict[tuple[str, str], Counter[str]] = {}

    def add(self, error: RowError) -> None:
        key = error.kind, error.remedy
        self._counts[key] += 1
        if self._counts[key] <= EXAMPLES_PER_KIND:
            self._first.setdefault(key, []).append(error)
        if error.value is not None:
            self._values.setdefault(key, Counter())[error.value] += 1

    def check(self) -> None:
        """Raise UserError if there are any: a single row's own message, or a list by kind."""
        if not self._counts:
            return
        if self._counts.total() == 1:
            raise UserError(str(next(iter(self._first.values()))[0]))
        lines = [f"{self.path}: {self._counts.total()} rows cannot be used"]
        for key, count in self._counts.items():
            kind, remedy = key
            lines.append(f"- {kind}: {count}{self._counted_values(key)}" + (f". {remedy}" if remedy else ""))
            lines += [f"    {error.where}{error.detail}" for error in self._first[key]]
            if count > EXAMPLES_PER_KIND:
                lines.append(f"    and {count - EXAMPLES_PER_KIND} more")
        raise UserError("\n".join(lines))

    def _counted_values(self, key: tuple[str, str]) -> str:
        values = self._values.get(key, Counter())
        shown = ", ".join(f"{value!r} ({count})" for value, count in values.most_common(_VALUES_PER_KIND))
        more = f" and {len(values) - _VALUES_PER_KIND} other values" if len(values) > _VALUES_PER_KIND else ""
        return f" ({shown}{more})" if values else ""
