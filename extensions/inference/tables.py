"""Tables of rows to be answered, read and written with every cell as it was."""

from __future__ import annotations

import codecs
import csv
import io
import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from extensions.common.errors import UserError
from extensions.common.files import write_bytes
from extensions.data.row_errors import RowError
from extensions.data.tables import SUFFIXES, class_names, columns_of, format_of, has_bom, scan, separator_of
from extensions.tasks import Source, Task

STDIN = "-"


@dataclass(frozen=True)
class InputTable:
    """The rows of a file."""

    name: str  # as messages call the file
    format: str  # csv, tsv, jsonl or parquet
    columns: list[str]
    rows: list[dict[str, Any]]  # in order; empty in the place of a malformed row
    faults: dict[int, str]  # row -> what is wrong with it
    source: Any = None  # parquet: the pyarrow table, whose types are kept
    classes: list[str] | None = None  # parquet: names of the numbers in the task's label column
    separator: str = ","  # of CSV
    marked: bool = False  # whether a byte order mark begins it, by which Excel knows UTF-8
    quoted: bool = True  # of TSV: whether a quote is no character like any other


def read_table(path: str, task: Task, kind: str | None) -> InputTable:
    """The rows of a file, or of standard input.

    Args:
        path: the file; "-": standard input, CSV where `kind` does not say otherwise.
        task: whose training files say encoding and quoting.
        kind: of standard input, and of a file whose suffix says nothing.

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
    return _read(Path(path), task, None if Path(path).suffix.lower() in SUFFIXES else kind)


def _read(path: Path, task: Task, kind: str | None) -> InputTable:
    given = task.source
    source = Source.model_validate({"format": kind or "auto", "encoding": given.encoding})
    found = format_of(path, source)
    if found in _formats(given):  # written as the training's files are
        source = source.model_copy(update={"quoting": given.quoting, "separator": given.separator})
    columns = columns_of(path, source)
    rows: list[dict[str, Any]] = []
    faults: dict[int, str] = {}
    for where, row in scan(path, source):
        if isinstance(row, RowError):
            faults[len(rows)] = f"{where.rpartition(', ')[2]}{row.detail}"
        cells = row.cells if isinstance(row, RowError) else row
        rows.append({str(name): cell for name, cell in cells.items()})
    if not rows:
        raise UserError(f"{path}: no rows; expected at least one")
    table, classes = None, None
    if found == "parquet":
        import pyarrow.parquet

        table, classes = pyarrow.parquet.read_table(path), class_names(path, str(given.label))
    text = found in ("csv", "tsv")
    separator = separator_of(path, source) if text else ","
    return InputTable(
        str(path), found, columns, rows, faults, table, classes, separator, has_bom(path), source.quoting == "csv"
    )


def _formats(source: Source) -> set[str]:
    """Those of the training's files."""
    paths = [Path(name) for name in source.files.values()]
    return {format_of(path, source) for path in paths if source.format != "auto" or path.suffix.lower() in SUFFIXES}


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


def render(table: InputTable, added: Mapping[str, Sequence[Any]], kind: str) -> bytes:
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
    line_of = _line_of(table, kind)
    text = [line_of([*table.columns, *added])]
    for k, row in enumerate(table.rows):
        cells = [cell_text(row.get(name)) for name in table.columns]
        text.append(line_of([*cells, *(cell_text(values[k]) for values in added.values())]))
    mark = codecs.BOM_UTF8 if table.marked else b""
    return mark + "".join(text).encode("utf-8", "backslashreplace")


def _line_of(table: InputTable, kind: str) -> Callable[[list[str]], str]:
    """What writes the cells of a row: as the input is written, where it is of the same format."""
    same = kind == table.format
    if same and kind == "tsv" and not table.quoted:
        return lambda cells: "\t".join(" ".join(cell.splitlines()).replace("\t", " ") for cell in cells) + "\n"
    separator = "\t" if kind == "tsv" else table.separator if same else ","

    def line(cells: list[str]) -> str:
        text = io.StringIO()  # a CR in a cell is quoted only where lines end with one
        csv.writer(text, delimiter=separator, lineterminator="\r\n").writerow(cells)
        return text.getvalue().removesuffix("\r\n") + "\n"

    return line


def cell_text(value: Any) -> str:
    """A value as a cell of CSV: text as it is, nothing for none, JSON for what is neither text nor a number."""
    if value is None:
        return ""
    if isinstance(value, (bool, dict, list)):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)


def _parquet(table: InputTable, added: Mapping[str, Sequence[Any]]) -> bytes:
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
