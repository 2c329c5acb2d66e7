"""Tables of rows to be answered, read and written with every cell as it was."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from extensions.data.faults import Fault
from extensions.data.tables import SUFFIXES, class_names, columns_of, format_of, scan
from extensions.errors import UserError
from extensions.files import write_bytes
from extensions.tasks import Source, Task

STDIN = "-"


@dataclass(frozen=True)
class Table:
    """The rows of a file."""

    name: str  # as messages call the file
    format: str  # csv, tsv, jsonl or parquet
    columns: list[str]
    rows: list[dict[str, Any]]  # in order; empty in the place of a malformed row
    faults: dict[int, str]  # row -> what is wrong with it
    source: Any = None  # parquet: the pyarrow table, whose types are kept
    classes: list[str] | None = None  # parquet: names of the numbers in the task's label column


def read_table(path: str, task: Task, kind: str | None) -> Table:
    """The rows of a file, or of standard input.

    Args:
        path: the file; "-": standard input, CSV where `kind` does not say otherwise.
        task: whose training files say encoding and quoting.
        kind: in place of the suffix.

    Raises:
        UserError: the file cannot be read, its suffix says nothing, or it has no rows.
    """
    if path == STDIN:
        with tempfile.TemporaryDirectory() as folder:
            copy = Path(folder) / f"standard input.{kind or 'csv'}"
            copy.write_bytes(sys.stdin.buffer.read())
            try:
                return replace(_read(copy, task, kind or "csv"), name="standard input")
            except UserError as error:
                raise UserError(str(error).replace(str(copy), "standard input")) from error
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    return _read(Path(path), task, kind)


def _read(path: Path, task: Task, kind: str | None) -> Table:
    given = task.source
    source = Source.model_validate({"format": kind or "auto", "encoding": given.encoding})
    found = format_of(path, source)
    if found in ("csv", "tsv"):
        # A quote is a character in GLUE's TSV files alone; a table of one's own is written by a spreadsheet or pandas.
        quoting = given.quoting if found == "tsv" else "csv"
        separator = given.separator if found == "csv" else None
        source = source.model_copy(update={"quoting": quoting, "separator": separator})
    columns = columns_of(path, source)
    rows: list[dict[str, Any]] = []
    faults: dict[int, str] = {}
    for where, row in scan(path, source):
        if isinstance(row, Fault):
            faults[len(rows)] = f"{where.rpartition(', ')[2]}{row.detail}"
        rows.append({} if isinstance(row, Fault) else {str(name): cell for name, cell in row.items()})
    if not rows:
        raise UserError(f"{path}: no rows; expected at least one")
    table, classes = None, None
    if found == "parquet":
        import pyarrow.parquet

        table, classes = pyarrow.parquet.read_table(path), class_names(path, str(given.label))
    return Table(str(path), found, columns, rows, faults, table, classes)


def output_format(out: Path | None, kind: str | None) -> str:
    """Of the answers: by the suffix of the file; on standard output `kind`, else CSV.

    Raises:
        UserError: the suffix says nothing, the folder is not there, or parquet is to go to standard output.
    """
    if out is None:
        if kind == "parquet":
            raise UserError("--format: parquet cannot go to standard output; name a file with --out")
        return kind or "csv"
    found = SUFFIXES.get(out.suffix.lower())
    if found is None:
        raise UserError(f"--out: {str(out)!r}: its suffix says no format; allowed: {', '.join(SUFFIXES)}")
    if not out.parent.is_dir():
        raise UserError(f"--out: {str(out)!r}: its folder is not there; make it, or name another file")
    return found


def render(table: Table, added: Mapping[str, Sequence[Any]], kind: str) -> bytes:
    """The table with columns after its own, as the content of a file.

    Args:
        added: name -> values, one for each row; None where there is none.

    Raises:
        UserError: parquet cannot hold a column whose values are of several types.
    """
    if kind == "parquet":
        return _parquet(table, added)
    if kind == "jsonl":
        lines = []
        for k, row in enumerate(table.rows):
            line = json.dumps(
                row | {name: values[k] for name, values in added.items()}, ensure_ascii=False, default=str
            )
            with suppress(UnicodeEncodeError):
                lines.append(line.encode())
                continue
            lines.append(json.dumps(json.loads(line)).encode())  # half of a surrogate pair, which JSON alone can spell
        return b"".join(line + b"\n" for line in lines)
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t" if kind == "tsv" else ",", lineterminator="\n")
    writer.writerow([*table.columns, *added])
    for k, row in enumerate(table.rows):
        cells = [cell_text(row.get(name)) for name in table.columns]
        writer.writerow([*cells, *(cell_text(values[k]) for values in added.values())])
    return text.getvalue().encode("utf-8", "backslashreplace")


def cell_text(value: Any) -> str:
    """A value as a cell of CSV: text as it is, nothing for none, JSON for what is neither text nor a number."""
    if value is None:
        return ""
    if isinstance(value, (bool, dict, list)):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)


def _parquet(table: Table, added: Mapping[str, Sequence[Any]]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    def column(name: str, values: Sequence[Any]) -> Any:
        try:
            return pyarrow.array(values)
        except (pyarrow.ArrowException, ValueError, TypeError) as error:
            raise UserError(
                f"--out: column {name!r} cannot stand in parquet ({str(error)[:100]}); write .jsonl instead"
            ) from error

    whole = table.source
    if whole is None:
        whole = pyarrow.table({name: column(name, [row.get(name) for row in table.rows]) for name in table.columns})
    for name, values in added.items():
        whole = whole.append_column(name, column(name, values))
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(whole, sink)
    return bytes(sink.getvalue().to_pybytes())


def write_table(out: Path | None, content: bytes) -> None:
    """Whole to a file, or to standard output.

    Raises:
        UserError: the file cannot be written.
    """
    if out is None:
        try:
            sys.stdout.buffer.write(content)
            sys.stdout.buffer.flush()
        except BrokenPipeError:  # the reader has what it wants (head)
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    try:
        write_bytes(out, content)
    except OSError as error:
        raise UserError(
            f"--out: {str(out)!r} cannot be written ({error.strerror or error}); name another file"
        ) from error
