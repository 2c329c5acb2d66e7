"""A whole table in memory: its columns, its rows, and the errors of malformed rows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from extensions.common.errors import UserError
from extensions.data.tables import Row, columns_of, read_rows, scan
from extensions.tasks import Source


@dataclass(frozen=True)
class Table:
    """The rows of one file."""

    path: Path
    columns: list[str]
    rows: list[Row]  # in file order; a malformed row has the cells that can be assigned to columns
    errors: dict[int, str]  # index of a malformed row -> its error message


def load_table(path: Path, source: Source, keep_malformed: bool = False) -> Table:
    """Read a file.

    Args:
        source: format, encoding, separator and quoting of the file.
        keep_malformed: keep malformed rows, with their errors.

    Raises:
        UserError: the file cannot be read or has no rows, or, without `keep_malformed`, rows are malformed.
    """
    rows: list[Row] = []
    errors: dict[int, str] = {}
    for where, row in scan(path, source) if keep_malformed else read_rows(path, source):
        if not isinstance(row, dict):
            errors[len(rows)] = f"{where.rpartition(', ')[2]}{row.detail}"
            row = row.cells
        rows.append(row)
    if not rows:
        raise UserError(f"{path}: no rows; expected at least one")
    return Table(path, columns_of(path, source), rows, errors)
