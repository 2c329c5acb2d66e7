"""Rows of CSV, TSV, JSONL and parquet files, with unchanged cells.

`read_rows` yields the rows of a valid file. `scan` yields a `RowError` in place of each malformed row, so that all
can be reported together, or each in the output of `nlu predict`.
"""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from extensions.common.errors import UserError
from extensions.data.row_errors import RowError, RowErrors
from extensions.tasks import Source

Row = dict[str | int, Any]

SUFFIXES = {".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
SEPARATORS = {",": "comma", ";": "semicolon", "|": "bar", "\t": "tab"}
RAGGED = "rows with too many or too few cells"
_ONE_COLUMN = "\x1f"  # separator of a file with one column; does not occur in texts
_SNIFFED_RECORDS = 50
_BOMS = {  # UTF-32 first: its mark begins with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_LONE_CR = re.compile("\r(?!\n)")
_CR = "\ud800"  # placeholder of a CR that ends no line: half of a surrogate pair, which cannot occur in decoded text
_UNQUOTED = "If quotes are plain characters in this file, set source.quoting: none"
_NO_NUL = "Remove it; in a file of UTF-16 without a byte order mark, set source.encoding: utf-16-le"
csv.field_size_limit(2**31 - 1)  # the default limit of 131072 characters is too low for texts


def format_of(path: Path, source: Source) -> str:
    """csv, tsv, jsonl or parquet: `source.format`, or by the suffix.

    Raises:
        UserError: unknown suffix.
    """
    if source.format != "auto":
        return source.format
    found = SUFFIXES.get(path.suffix.lower())
    if found is None:
        raise UserError(
            f"{path}: the suffix {path.suffix!r} is not a known format; allowed: {', '.join(SUFFIXES)}. Rename the "
            "file, or set source.format to csv, tsv, jsonl or parquet"
        )
    return found


def read_rows(path: Path, source: Source) -> Iterator[tuple[str, Row]]:
    """(file and line, row) of each row. Cells of CSV and TSV are unchanged text, "" if empty.

    Raises:
        UserError: the file cannot be read, has no rows, or has malformed rows, which are reported together after all
            valid rows.
    """
    errors = RowErrors(path)
    for where, row in scan(path, source):
        if isinstance(row, RowError):
            errors.add(row)
        else:
            yield where, row
    errors.check()


def scan(path: Path, source: Source) -> Iterator[tuple[str, Row | RowError]]:
    """As `read_rows`, with a `RowError` in place of each malformed row.

    Raises:
        UserError: the file cannot be read, or has no rows.
    """
    kind = format_of(path, source)
    try:
        if kind == "parquet":
            yield from _parquet(path)
        else:
            yield from _jsonl(path, source) if kind == "jsonl" else _delimited(path, source)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error


def columns_of(path: Path, source: Source) -> list[str]:
    """Names of the columns, in order: all keys of all objects in JSONL; column numbers for a table without a header.

    Raises:
        UserError: the file cannot be read.
    """
    kind = format_of(path, source)
    if kind == "parquet":
        return list(_open_parquet(path).schema_arrow.names)
    if kind == "jsonl" or not source.header:
        return list({str(name): None for _, row in scan(path, source) if isinstance(row, dict) for name in row})
    try:
        return _header(path, source, next(_records(path, source, _separator(path, source)), None))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error


def separator_of(path: Path, source: Source) -> str:
    """The separator of a CSV or TSV file; a comma for a file with one column."""
    found = _separator(path, source)
    return "," if found == _ONE_COLUMN else found


def has_bom(path: Path) -> bool:
    """Whether a file begins with the byte order mark of UTF-8, by which Excel detects the encoding."""
    with path.open("rb") as file:
        return file.read(3) == codecs.BOM_UTF8


def class_names(path: Path, column: str) -> list[str]:
    """Class names of a parquet column of class numbers, from the metadata that `datasets` writes; [] without them."""
    metadata = _open_parquet(path).schema_arrow.metadata or {}
    try:
        feature = json.loads(metadata[b"huggingface"])["info"]["features"][column]
        # A multi-label column is a sequence of class numbers, in one of the two forms that `datasets` has used.
        while isinstance(feature, (list, dict)) and "names" not in feature:
            feature = feature[0] if isinstance(feature, list) else feature["feature"]
        return [str(name) for name in feature["names"]]
    except (KeyError, TypeError, ValueError, IndexError):
        return []


# ------------------------------------------------------------------------------------------------------ CSV and TSV


def _delimited(path: Path, source: Source) -> Iterator[tuple[str, Row | RowError]]:
    separator, quoted = _separator(path, source), source.quoting == "csv"
    records = _records(path, source, separator)
    header = _header(path, source, next(records, None)) if source.header else None
    expected = len(header) if header is not None else source.num_columns
    number = None
    for number, cells in records:
        where = f"{path}, line {number}"
        if isinstance(cells, str):
            yield where, RowError(where, "rows with quotes that do not pair", f": {cells}", _UNQUOTED)
            continue
        if quoted and expected is None:
            expected = len(cells)
        names: Sequence[str | int] = header if header is not None else range(len(cells))
        if expected is not None and len(cells) != expected:
            detail = f": {len(cells)} columns, expected {expected}" + (f" ({', '.join(header)})" if header else "")
            detail += f"; the row begins {separator.join(cells)[:60]!r}"
            name = "none" if separator == _ONE_COLUMN else SEPARATORS.get(separator, repr(separator))
            remedy = f"Put a text that holds the separator (here: {name}) in quotes; source.separator sets another"
            row = dict(zip(names, cells, strict=False))
            yield where, RowError(where, RAGGED, detail, remedy if quoted else "", cells=row)
        elif quoted and any("\0" in cell for cell in cells):
            yield where, RowError(where, "rows with a NUL character", ": a NUL character, which is not text", _NO_NUL)
        else:
            yield where, dict(zip(names, cells, strict=True))
    if number is None:
        raise UserError(f"{path}: no rows" + (" after the header" if header else "") + "; expected at least one")


def _header(path: Path, source: Source, record: tuple[int, list[str] | str] | None) -> list[str]:
    if record is None:
        raise UserError(f"{path}: no rows: the file is empty; expected a header that names the columns, and rows")
    number, cells = record
    where = f"{path}, line {number}"
    if isinstance(cells, str):
        raise UserError(f"{where}: the header: {cells}. {_UNQUOTED}")
    if source.quoting == "none":
        return cells
    names = [cell.strip() for cell in cells]
    _check_distinct(where, names)
    if any("\0" in name for name in names):
        raise UserError(f"{where}: the header holds a NUL character; is this a text file? {_NO_NUL}")
    return names


def _check_distinct(where: str, names: Sequence[str]) -> None:
    twice = sorted({repr(name) for name in names if names.count(name) > 1})
    if twice:
        raise UserError(
            f"{where}: two columns have the same name: {', '.join(twice)}; give each column a distinct name (spaces "
            "around names are ignored)"
        )


def _separator(path: Path, source: Source) -> str:
    """The separator of a table: the one with which most of the first records have as many cells as the header."""
    if source.separator or format_of(path, source) == "tsv":
        return source.separator or "\t"
    if stated := re.fullmatch(r"sep=(.)\s*", next(_text(path, source, any_line_end=True), "")):
        return stated[1]
    best, best_score = _ONE_COLUMN, (0.0, 1)
    for separator in SEPARATORS:
        first = [cells for _, cells in islice(_records(path, source, separator), _SNIFFED_RECORDS)]
        if first and isinstance(first[0], list) and len(first[0]) > 1:
            even = sum(isinstance(cells, list) and len(cells) == len(first[0]) for cells in first)
            score = (even / len(first), len(first[0]))
            if score > best_score:
                best, best_score = separator, score
    return best


def _records(path: Path, source: Source, separator: str) -> Iterator[tuple[int, list[str] | str]]:
    """(first line number, cells) of each record; an error message in place of the cells if its quotes are malformed.

    Without quoting (GLUE's files), a line is a record. With quoting, CR, LF or CRLF ends a line. In a file whose lines
    end with LF, a lone CR is part of a text; pandas and Excel write it without quotes.
    """
    if source.quoting == "none":
        yield from ((number, line.split(separator)) for number, line in _lines(path, source))
        return
    reader = csv.reader(_text(path, source, any_line_end=True), delimiter=separator, strict=True)
    while True:
        start = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "end of data" in str(error):
                yield start, "a quote opens a text in this row and no quote closes it"
                return
            yield start, f"the quote that ends a text is followed by more of it, in line {reader.line_num}"
            continue
        if cells and not (start == 1 and cells == ["sep=", ""]):  # [] is a blank line; sep= is Excel's own first line
            yield start, [cell.replace(_CR, "\r") for cell in cells]


# ------------------------------------------------------------------------------------------------- JSONL and parquet


def _jsonl(path: Path, source: Source) -> Iterator[tuple[str, Row | RowError]]:
    for number, line in _lines(path, source):
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            detail = f": not valid JSON ({error}); expected one object per line"
            yield where, RowError(where, "lines that are not valid JSON", detail)
            continue
        if not isinstance(row, dict):
            detail = f": expected a JSON object, got {type(row).__name__}"
            row = RowError(where, "lines that are not JSON objects", detail)
        yield where, row


def _parquet(path: Path) -> Iterator[tuple[str, Row | RowError]]:
    import pyarrow

    file = _open_parquet(path)
    number = 0
    try:
        short = [column.name for column in file.schema_arrow if pyarrow.types.is_float32(column.type)]
        for batch in file.iter_batches():
            for row in batch.to_pylist():
                number += 1
                # Converted to float64 directly, 3.8 would become 3.799999952316284.
                row |= {name: float(str(np.float32(row[name]))) for name in short if row[name] is not None}
                yield f"{path}, row {number}", row
    except (OSError, ValueError, OverflowError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: cannot be read after row {number} ({error}); download it again") from error


def _open_parquet(path: Path) -> Any:
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: cannot be read as parquet ({error}); download it again") from error
    _check_distinct(str(path), file.schema_arrow.names)
    return file


# -------------------------------------------------------------------------------------------------------------- text


def _lines(path: Path, source: Source) -> Iterator[tuple[int, str]]:
    """Numbered non-blank lines, split at line feeds only; str.splitlines also splits at characters within texts."""
    for number, line in enumerate(_text(path, source, any_line_end=False), start=1):
        if text := line.rstrip("\r\n"):
            yield number, text


def _text(path: Path, source: Source, any_line_end: bool) -> Iterator[str]:
    """The lines of a text file, decoded by its byte order mark, else by `source.encoding`.

    Args:
        any_line_end: lines end with a lone CR if the first one does; else with LF, and `_CR` replaces lone CRs.
    """
    with path.open("rb") as raw:
        start = raw.read(4)
    encoding = next((name for bom, name in _BOMS.items() if start.startswith(bom)), source.encoding)
    if source.quoting == "none" and encoding != "utf-8-sig":
        encoding = source.encoding  # GLUE's files are UTF-8; another mark would be a defect
    try:
        with path.open(encoding=encoding, newline="") as file:
            cr_ends = any_line_end and next(file, "").endswith("\r")
        with path.open(encoding=encoding, newline="" if cr_ends else "\n") as file:
            for line in file:
                yield _LONE_CR.sub(_CR, line) if any_line_end and not cr_ends else line
    except LookupError as error:
        raise UserError(
            f"{path}: source.encoding: {encoding!r} is not a text encoding; for example utf-8, utf-16, cp1252"
        ) from error
    except UnicodeError as error:
        raise UserError(_undecodable(path, encoding.removesuffix("-sig"), any_line_end)) from error


def _undecodable(path: Path, encoding: str, any_line_end: bool) -> str:
    """The error message for the first invalid byte: its line, and its position in the line or file, from 1."""
    data = path.read_bytes()
    start, end = 0, 1
    try:
        data.decode(encoding)
    except UnicodeDecodeError as error:
        start, end = error.start, error.end
    except UnicodeError:  # UTF-16 with an invalid beginning
        pass
    before = data[:start].decode(encoding, errors="ignore")
    line_end = "\r" if any_line_end and b"\n" not in data else "\n"
    wide = encoding.startswith(("utf-16", "utf-32"))
    line_start = 0 if wide else data.rfind(b"\n", 0, start) + 1
    return (
        f"{path}, line {before.count(line_end) + 1}: not valid {'UTF-8' if encoding == 'utf-8' else encoding} at byte "
        f"{start - line_start + 1} of the {'file' if wide else 'line'} ({data[start:end].hex(' ')}); set "
        "source.encoding to the file's (cp1252 for most files of Windows and Excel), or convert the file to UTF-8"
    )
