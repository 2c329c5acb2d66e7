"""Cells of a table as text: numbers, lists and encodings in the format of another program."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_WITH_COMMA = re.compile(  # 1,5 or 1.234,5 or 1 234,5; 2,250 or 1,234,567.5
    r"[+-]?(?:(?:[0-9]+|[0-9]{1,3}(?:[. '\u00a0\u202f][0-9]{3})+),[0-9]+|[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]*)?)"
)
_LIST = re.compile(  # JSON, or str() of a Python list, tuple, set or numpy array
    r"\[\s*\]|\[\s*(['\"]).*\1\s*\]|\[\s*[-+0-9][-+0-9.,\s]*\]|[({]\s*(['\"]).*\2\s*,?\s*[)}]", re.DOTALL
)
_RUN = re.compile(r"[^\x00-\x7f]{2,}")  # a single one is an accent or a sign
_MISREAD = 0.5, 20, 4  # least share of the letters in such runs, number of these letters, and of distinct ones


def shortened(value: str, width: int = 40) -> str:
    """A text in one line of at most `width` characters."""
    line = " ".join(value.split())
    return line if len(line) <= width else f"{line[: width - 3]}..."


def most(matches: Iterable[Any]) -> bool:
    """Whether at least 95% match."""
    found = [bool(match) for match in matches]
    return sum(found) >= 0.95 * len(found)


def is_number(cell: str) -> bool:
    """Whether a cell is a number, with a point or a comma."""
    return bool(NUMBER.fullmatch(cell) or _WITH_COMMA.fullmatch(cell))


def number_with_comma(texts: Sequence[str]) -> str | None:
    """A number with a decimal comma or thousands commas, if nearly all cells are numbers; else None."""
    found = next((one for one in texts if _WITH_COMMA.fullmatch(one)), None)
    return found if found is not None and most(map(is_number, texts)) else None


def are_lists_as_text(texts: Sequence[str]) -> bool:
    """Whether nearly all cells are lists as Python or JSON writes them, such as "['blue', 'red']"."""
    return most(map(_LIST.fullmatch, texts))


def commas_in_names(texts: Sequence[str]) -> bool:
    """Whether commas are part of labels: cells with commas have equally many parts, and no part occurs as a cell."""
    cells = {one: [part.strip() for part in one.split(",")] for one in set(texts)}
    joined = [parts for parts in cells.values() if len(parts) > 1]
    return len({len(parts) for parts in joined}) == 1 and not any(part in cells for parts in joined for part in parts)


def misread(rows: Sequence[Mapping[Any, Any]]) -> str | None:
    """A cell of a column of mostly non-ASCII letters, which no cp1252 text has; None without such a column."""
    share, count, distinct = _MISREAD
    for column in rows[0] if rows else ():
        cells = [cell for row in rows if isinstance(cell := row.get(column), str)]
        letters = sum(c.isalpha() or not c.isascii() for cell in cells for c in cell)
        beyond = [c for cell in cells for run in _RUN.findall(cell) for c in run]
        if len(beyond) >= max(count, share * letters) and len(set(beyond)) >= distinct:
            return shortened(next(filter(_RUN.search, cells)))
    return None
