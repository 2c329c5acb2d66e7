"""Tables of rows to answer: read like the training files, written with every input cell unchanged."""

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
from extensions.data.load_table import Table, load_table
from extensions.data.tables import SUFFIXES, class_names, format_of, has_bom, separator_of
from extensions.tasks import Source, Task

STDIN = "-"


@dataclass(frozen=True)
class InputTable(Table):
    """The rows to answer, and the format of their file."""

    name: str  # in messages
    format: str  # csv, tsv, jsonl or parquet
    parquet: Any = None  # the pyarrow table, which preserves types
    classes: list[str] | None = None  # parquet: names of the class numbers in the task's label column
    separator: str = ","  # CSV and TSV only
    byte_order_mark: bool = False  # tells Excel that the file is UTF-8
    quoted: bool = True  # TSV: whether quotes enclose texts


def read_input(path: str, task: Task, kind: str | None) -> InputTable:
    """The rows of a file, or of standard input.

    Args:
        path: the file; "-": standard input, CSV unless `kind` is given.
        task: sets encoding and quoting, as in its training files.
        kind: format of standard input, and of a file with another suffix.

    Raises:
        UserError: the file cannot be read, its format is unknown, or it has no rows.
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
    training = task.source
    source = Source.model_validate({"format": kind or "auto", "encoding": training.encoding})
    found = format_of(path, source)
    if found in _formats(training):
        source = source.model_copy(update={"quoting": training.quoting, "separator": training.separator})
    table, parquet, classes = load_table(path, source, keep_malformed=True), None, None
    if found == "parquet":
        import pyarrow.parquet

        parquet, classes = pyarrow.parquet.read_table(path), class_names(path, str(training.label))
    return InputTable(
        **vars(table),
        name=str(path),
        format=found,
        parquet=parquet,
        classes=classes,
        separator=separator_of(path, source) if found in ("csv", "tsv") else ",",
        byte_order_mark=has_bom(path),
        quoted=source.quoting == "csv",
    )


def _formats(source: Source) -> set[str]:
    """Formats of the training files."""
    paths = [Path(name) for name in source.files.values()]
    return {format_of(path, source) for path in paths if source.format != "auto" or path.suffix.lower() in SUFFIXES}


def output_format(out: Path | None, kind: str | None) -> str:
    """Format of the answers: that of `out`'s suffix; on standard output `kind`, or CSV.

    Raises:
        UserError: unknown suffix, missing folder, or parquet on standard output.
    """
    if out is None:
        if kind == "parquet":
            raise UserError("--format: parquet cannot go to standard output; name a file with --out")
        return kind or "csv"
    found = SUFFIXES.get(out.suffix.lower())
    if found is None:
        raise UserError(f"--out: {str(out)!r}: its suffix is not a known format; allowed: {', '.join(SUFFIXES)}")
    if not out.parent.is_dir():
        raise UserError(f"--out: {str(out)!r}: its folder is not there; make it, or name another file")
    return found


def render_table(table: InputTable, added: Mapping[str, Sequence[Any]], kind: str) -> bytes:
    """Content of a file with the table's columns followed by the added ones.

    Args:
        added: name -> values, one per row; None for an empty cell.

    Raises:
        UserError: parquet cannot hold a column with values of several types.
    """
    if kind == "parquet":
        return _parquet(table, added)
    if kind == "jsonl":
        rows = (row | {name: values[k] for name, values in added.items()} for k, row in enumerate(table.rows))
        return b"".join(map(_json_line, rows))
    line_of = _line_of(table, kind)
    lines = [line_of([*table.columns, *added])]
    for k, row in enumerate(table.rows):
        cells = [*(row.get(name) for name in table.columns), *(values[k] for values in added.values())]
        lines.append(line_of(list(map(_cell_text, cells))))
    mark = codecs.BOM_UTF8 if table.byte_order_mark else b""
    return mark + "".join(lines).encode("utf-8", "backslashreplace")


def _json_line(row: Mapping[Any, Any]) -> bytes:
    with suppress(UnicodeEncodeError):
        return json.dumps(row, ensure_ascii=False, default=str).encode() + b"\n"
    return json.dumps(row, default=str).encode() + b"\n"  # a lone surrogate, which must be escaped


def _line_of(table: InputTable, kind: str) -> Callable[[list[str]], str]:
    """A function that writes one line of CSV or TSV, in the input's dialect if it has the same format."""
    same = kind == table.format
    if same and kind == "tsv" and not table.quoted:
        return lambda cells: "\t".join(" ".join(cell.splitlines()).replace("\t", " ") for cell in cells) + "\n"
    separator = "\t" if kind == "tsv" else table.separator if same else ","

    def line(cells: list[str]) -> str:
        text = io.StringIO()  # csv quotes a cell with a CR only if lines end with one
        csv.writer(text, delimiter=separator, lineterminator="\r\n").writerow(cells)
        return text.getvalue().removesuffix("\r\n") + "\n"

    return line


def _cell_text(value: Any) -> str:
    """A value as a cell of CSV: text unchanged, JSON for booleans, lists and objects."""
    if isinstance(value, (bool, dict, list)):
        return json.dumps(value, ensure_ascii=False, default=str)
    return "" if value is None else str(value)


def _parquet(table: InputTable, added: Mapping[str, Sequence[Any]]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    def column(name: str, values: Sequence[Any]) -> Any:
        try:
            return pyarrow.array(values)
        except (pyarrow.ArrowException, ValueError, TypeError) as error:
            raise UserError(
                f"--out: parquet cannot hold the column {name!r} ({str(error)[:100]}); write .jsonl instead"
            ) from error

    whole = table.parquet
    if whole is None:
        whole = pyarrow.table({name: column(name, [row.get(name) for row in table.rows]) for name in table.columns})
    for name, values in added.items():
        whole = whole.append_column(name, column(name, values))
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(whole, sink)
    return bytes(sink.getvalue().to_pybytes())


def write_output(out: Path | None, content: bytes) -> None:
    """Write to a file atomically, or to standard output.

    Raises:
        UserError: the file cannot be written.
    """
    if out is None:
        try:
            sys.stdout.buffer.write(content)
            sys.stdout.buffer.flush()
        except BrokenPipeError:  # the reader, such as head, has closed the pipe
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    try:
        write_bytes(out, content)
    except OSError as error:
        raise UserError(
            f"--out: {str(out)!r} cannot be written ({error.strerror or error}); name another file"
        ) from error
