"""The kinds of a table's columns: pure functions of the rows."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from extensions.common.errors import UserError
from extensions.scaffold.cells import is_number, most, shortened
from extensions.tasks import cell_label, fold, is_blank

Row = Mapping[Any, Any]

MAX_CLASSES = 50  # a longer list of labels does not fit a prompt
_DATE = re.compile(
    r"[0-9]{4}[-/.][0-9]{1,2}[-/.][0-9]{1,2}([T ][0-9:.]+(Z|[+-][0-9:]+)?)?|[0-9]{1,2}[-/.][0-9]{1,2}[-/.][0-9]{2,4}"
    r"( [0-9:]+)?|[0-9]{1,2}:[0-9]{2}(:[0-9]{2})?"
)
_ADDRESS = re.compile(r"(https?://|www\.|mailto:)\S+|[^\s@]+@[^\s@]+\.[^\s@]+", re.IGNORECASE)
_ID_NAME = re.compile(r"(^|[\W_])(id|idx|index|uuid|guid|key|nr|no|number|row)$|^unnamed: ?\d+$|[a-z]I[Dd]$", re.I)
_LABEL_NAME = re.compile(r"label|labels|class|target|category|y|gold|answer|sentiment|rating|score", re.IGNORECASE)


@dataclass(frozen=True)
class Column:
    """One column, by its non-empty cells."""

    name: Any  # its name, or its index without a header
    kind: Literal["text", "category", "number", "id", "date", "address", "constant", "empty", "list", "object"]
    why: str  # the reason for the kind, with its numbers

    @property
    def is_text(self) -> bool:
        """Whether the prompt shows it by default."""
        return self.kind in ("text", "category")


def describe(name: Any, rows: Sequence[Row]) -> Column:
    """The kind of a column."""
    cells = [cell for row in rows if not is_blank(cell := row.get(name))]
    if not cells:
        return Column(name, "empty", "no cell is filled")
    if any(isinstance(cell, (list, tuple)) for cell in cells):
        return Column(name, "list", "cells are lists")
    if any(isinstance(cell, (dict, bytes)) for cell in cells):
        return Column(name, "object", "cells are objects")
    texts = [cell_label(cell) for cell in cells]
    distinct, count, example = len(set(texts)), len(texts), repr(shortened(texts[0]))
    unique = distinct >= 0.9 * count and count > 1  # some rows may be duplicates
    words = sum(len(one.split()) for one in texts) / count
    named_id = bool(_ID_NAME.search(str(name)))
    if distinct == 1 and count > 1:
        return Column(name, "constant", f"always {example}")
    if most(map(is_number, texts)) or all(isinstance(cell, (int, float)) for cell in cells):
        if unique and (named_id or are_consecutive(texts)):
            return Column(name, "id", "numbers, another in each row")
        return Column(name, "number", f"{distinct} distinct numbers")
    if most(map(_DATE.fullmatch, texts)):
        return Column(name, "date", f"dates or times, such as {texts[0]!r}")
    if most(map(_ADDRESS.fullmatch, texts)):
        return Column(name, "address", f"web or mail addresses, such as {example}")
    with_digits = sum(any(map(str.isdigit, one)) for one in texts) / count
    if unique and words < 1.5 and count > 2 and (named_id or with_digits > 0.9):
        return Column(name, "id", f"one word, another in each row, such as {example}")
    if words < 4 and distinct <= min(MAX_CLASSES, count / 4):
        return Column(name, "category", f"{distinct} distinct values")
    if not isinstance(cells[0], str):
        return Column(name, "object", f"cells are {type(cells[0]).__name__}")
    return Column(name, "text", f"{words:.0f} word{'s' if round(words) != 1 else ''} on average")


def are_ids(name: Any, texts: Sequence[str]) -> bool:
    """Whether distinct whole numbers are row ids: by the column's name, or because they are consecutive."""
    return len(set(texts)) == len(texts) and (bool(_ID_NAME.search(str(name))) or are_consecutive(texts))


def are_consecutive(texts: Sequence[str]) -> bool:
    """Whether whole numbers form a range without gaps."""
    try:
        numbers = [int(one) for one in texts]
    except ValueError:
        return False
    return max(numbers) - min(numbers) == len(numbers) - 1


def nearest(name: str, columns: Sequence[Any], option: str) -> Any:
    """The column of a name.

    Raises:
        UserError: there is none; the message suggests the nearest one.
    """
    exact = [column for column in columns if str(column) == name]
    # A shell easily drops the spaces around a name, and two Unicode forms look alike.
    alike = [column for column in columns if fold(str(column)) == fold(name)]
    if exact or len(alike) == 1:
        return (exact or alike)[0]
    near = difflib.get_close_matches(name.lower(), [str(column).lower() for column in columns], n=1, cutoff=0.5)
    guess = [repr(str(column)) for column in columns if str(column).lower() in near]
    hint = f"; did you mean {guess[0]}?" if guess else "."
    raise UserError(f"{option}: no column {name!r}{hint} The columns are: {', '.join(map(repr, map(str, columns)))}")


def suggested_label(described: Sequence[Column], rows: Sequence[Row]) -> Any | None:
    """The most likely label column: by its name, else the last one with few values; None if there is none."""
    able = [c for c in described if c.kind not in ("empty", "constant", "id", "date", "address", "object")]
    named = [c.name for c in able if _LABEL_NAME.fullmatch(str(c.name))]
    few = [c.name for c in able if c.kind in ("category", "list", "number")]
    if named or few:
        return named[0] if named else few[-1]
    small = [c.name for c in able if 1 < len({cell_label(row.get(c.name)) for row in rows}) <= max(2, len(rows) // 2)]
    return small[-1] if small else None
