"""Files of rows: CSV, TSV, JSONL and parquet, each cell exactly as it is written.

`read_rows` gives the rows of a file that is right. `scan` gives the faulty ones in their places, so that all can be
reported at once, or each beside the answers to the others.
"""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from extensions.common.errors import UserError
from extensions.data.faults import Fault, Faults
from extensions.tasks import Source

Row = dict[str | int, Any]

SUFFIXES = {".csv": "csv", ".tsv": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
SEPARATORS = {",": "comma", ";": "semicolon", "|": "bar", "\t": "tab"}
_WHOLE_LINE = "\x1f"  # separator of a file of one column: no text holds it
_SAMPLE = 50  # records that are looked at for the separator
_MARKS = {  # the longest first: UTF-32's begins with UTF-16's
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
RAGGED = "rows with too many or too few cells"
_CR = "\ud800"  # in place of a CR that ends no line: half of a surrogate pair, which no decoded text holds
_QUOTES = "rows with quotes that do not pair"
_NO_QUOTES = "Where a quote is a character like any other, set source.quoting: none"
csv.field_size_limit(2**31 - 1)  # a text may be longer than the 131072 characters that csv takes


def format_of(path: Path, source: Source) -> str:
    """csv, tsv, jsonl or parquet: `source.format`, or what the suffix says.

    Raises:
        UserError: the suffix says nothing.
    """
    if source.format != "auto":
        return source.format
    found = SUFFIXES.get(path.suffix.lower())
    if found is None:
        raise UserError(
            f"{path}: its suffix {path.suffix!r} does not say how it is to be read; allowed: {', '.join(SUFFIXES)}. "
            "Rename it, or set source.format to csv, tsv, jsonl or parquet"
        )
    return found


def read_rows(path: Path, source: Source) -> Iterator[tuple[str, Row]]:
    """(file and line, row) of each row. Cells of CSV and TSV are text as it is written, "" where there is none.

    Raises:
        UserError: the file cannot be read, has no rows, or a row is malformed. All such rows are named at once, after
            the others were given.
    """
    faults = Faults(path)
    for where, row in scan(path, source):
        if isinstance(row, Fault):
            faults.add(row)
        else:
            yield where, row
    faults.check()


def scan(path: Path, source: Source) -> Iterator[tuple[str, Row | Fault]]:
    """As `read_rows`, with a fault in the place of a malformed row.

    Raises:
        UserError: the file cannot be read, or has no rows.
    """
    kind = format_of(path, source)
    try:
        if kind == "parquet":
            yield from _parquet(path)
        elif kind == "jsonl":
            yield from _jsonl(path, source)
        elif source.quoting == "none":
            yield from _unquoted(path, source, "\t" if kind == "tsv" else None)
        else:
            yield from _quoted(path, source, "\t" if kind == "tsv" else None)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error


def columns_of(path: Path, source: Source) -> list[str]:
    """Names of the columns, in order: of JSONL all keys of all objects; numbers where a table has no header.

    Raises:
        UserError: the file cannot be read.
    """
    kind = format_of(path, source)
    if kind == "parquet":
        return list(_open_parquet(path).schema_arrow.names)
    if kind == "jsonl" or not source.header:
        names = {str(name): None for _, row in scan(path, source) if not isinstance(row, Fault) for name in row}
        return list(names)
    separator = "\t" if kind == "tsv" else None
    try:
        if source.quoting == "none":
            line = next((text for _, text in _lines(path, source)), None)
            return line.split(_separator(path, source, separator)) if line is not None else []
        return _header(path, next(_records(path, source, _separator(path, source, separator)), None))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error


def separator_of(path: Path, source: Source) -> str:
    """The separator of a CSV or TSV file; a comma where it has one column."""
    found = _separator(path, source, "\t" if format_of(path, source) == "tsv" else None)
    return "," if found == _WHOLE_LINE else found


def has_mark(path: Path) -> bool:
    """Whether a file begins with the byte order mark of UTF-8, by which Excel knows it."""
    with path.open("rb") as file:
        return file.read(3) == codecs.BOM_UTF8


def class_names(path: Path, column: str) -> list[str]:
    """Names of the class numbers of a parquet column, as `datasets` writes them beside the schema; [] where none."""
    metadata = _open_parquet(path).schema_arrow.metadata or {}
    try:
        feature = json.loads(metadata[b"huggingface"])["info"]["features"][column]
        # A column of several labels is a sequence of class numbers, in either form that datasets has had.
        while isinstance(feature, (list, dict)) and "names" not in feature:
            feature = feature[0] if isinstance(feature, list) else feature["feature"]
        return [str(name) for name in feature["names"]]
    except (KeyError, TypeError, ValueError, IndexError):
        return []


def _separator(path: Path, source: Source, given: str | None) -> str:
    """The separator of a table: the one under which the first records have as many cells as the header, and most."""
    if source.separator or given:
        return source.separator or given or ""
    with _Text(path, source, newline="") as lines:
        stated = re.fullmatch(r"sep=(.)\s*", next(lines, ""))
    if stated:
        return stated[1]
    best, best_score = _WHOLE_LINE, (0.0, 1)
    for separator in SEPARATORS:
        quoted = source.quoting == "csv"
        records = _records(path, source, separator) if quoted else _split(path, source, separator)
        sample = list(islice(records, _SAMPLE))
        header = sample[0][1] if sample else None
        if not isinstance(header, list) or len(header) < 2:
            continue
        even = sum(isinstance(cells, list) and len(cells) == len(header) for _, cells in sample)
        score = (even / len(sample), len(header))
        if score > best_score:
            best, best_score = separator, score
    return best


def _split(path: Path, source: Source, separator: str) -> Iterator[tuple[int, list[str]]]:
    for number, line in _lines(path, source):
        yield number, line.split(separator)


def _quoted(path: Path, source: Source, separator: str | None) -> Iterator[tuple[str, Row | Fault]]:
    separator = _separator(path, source, separator)
    records = _records(path, source, separator)
    header: list[str] | None = None
    expected = source.num_columns
    if source.header:
        header = _header(path, next(records, None))
        expected = len(header)
    number = None
    for number, cells in records:
        where = f"{path}, line {number}"
        if not isinstance(cells, list):
            yield where, Fault(where, _QUOTES, f": {cells}", _NO_QUOTES)
            continue
        expected = expected or len(cells)
        if len(cells) != expected:
            named = f" ({', '.join(header)})" if header else ""
            name = SEPARATORS.get(separator, repr(separator)) if separator != _WHOLE_LINE else "none"
            remedy = f"A text that holds the separator (here: {name}) stands in quotes; source.separator sets another"
            detail = f": {len(cells)} columns, expected {expected}{named}; it begins {separator.join(cells)[:60]!r}"
            yield where, Fault(where, RAGGED, detail, remedy, cells=_as_far(header, cells))
        elif any("\0" in cell for cell in cells):
            remedy = "Remove it; in a file of UTF-16 without a byte order mark, set source.encoding: utf-16-le"
            yield where, Fault(where, "rows with a NUL character", ": a NUL character, which is not text", remedy)
        else:
            yield where, dict(zip(header, cells, strict=True)) if header else dict(enumerate(cells))
    if number is None:
        raise UserError(f"{path}: no rows" + (" after the header" if header else "") + "; expected at least one")


def _as_far(header: list[str] | None, cells: list[str]) -> Row:
    """The cells of a row with too many or too few, as far as there are columns for them."""
    names: list[str | int] = [*header] if header else [*range(len(cells))]
    return dict(zip(names, cells, strict=False))


def _header(path: Path, record: tuple[int, list[str] | str] | None) -> list[str]:
    if record is None:
        raise UserError(f"{path}: the file is empty; expected a header that names the columns, and rows")
    number, cells = record
    if not isinstance(cells, list):
        raise UserError(f"{path}, line {number}: the header: {cells}. {_NO_QUOTES}")
    names = [cell.strip() for cell in cells]
    twice = sorted({repr(name) for name in names if names.count(name) > 1})
    if twice:
        raise UserError(
            f"{path}, line {number}: two columns have the same name: {', '.join(twice)}; give each column a name of "
            "its own (spaces around names do not count)"
        )
    if any("\0" in name for name in names):
        raise UserError(
            f"{path}, line {number}: the header holds a NUL character; is this a text file? In a file of UTF-16 "
            "without a byte order mark, set source.encoding: utf-16-le"
        )
    return names


def _records(path: Path, source: Source, separator: str) -> Iterator[tuple[int, list[str] | str]]:
    """(line where it starts, cells) of each CSV record; in place of the cells what is wrong with its quotes.

    CR, LF or CR LF end a line. Where they are LF, a CR alone is a character, which pandas and Excel leave unquoted.
    """
    with _Text(path, source, newline="") as lines:
        reader = csv.reader(lines, delimiter=separator, strict=True)
        while True:
            start = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                if "end of data" in str(error):
                    yield start, "a quote opens a text in this row and none closes it"
                    return
                yield start, f"the quote that ends a text is followed by more of it, in line {reader.line_num}"
                continue
            if cells and not (start == 1 and cells == ["sep=", ""]):  # none in a blank line; Excel's own first line
                yield (
                    start,
                    [cell.replace(_CR, "\r") for cell in cells] if any(_CR in cell for cell in cells) else cells,
                )


def _unquoted(path: Path, source: Source, separator: str | None) -> Iterator[tuple[str, Row | Fault]]:
    """A line is a row, and a quote is a character: as the files of GLUE are written."""
    separator = _separator(path, source, separator)
    header: list[str] | None = None
    expected = source.num_columns
    for number, line in _lines(path, source):
        cells = line.split(separator)
        if header is None and source.header:
            header, expected = cells, len(cells)
            continue
        where = f"{path}, line {number}"
        if expected is not None and len(cells) != expected:
            named = f" ({', '.join(header)})" if header else ""
            detail = f": {len(cells)} columns, expected {expected}{named}; the line begins {line[:60]!r}"
            yield where, Fault(where, RAGGED, detail, cells=_as_far(header, cells))
        else:
            yield where, dict(zip(header, cells, strict=True)) if header else dict(enumerate(cells))


def _jsonl(path: Path, source: Source) -> Iterator[tuple[str, Row | Fault]]:
    for number, line in _lines(path, source):
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            detail = f": not valid JSON ({error}); expected one object per line"
            yield where, Fault(where, "lines that are not valid JSON", detail)
            continue
        if isinstance(row, dict):
            yield where, row
        else:
            detail = f": expected a JSON object, got {type(row).__name__}"
            yield where, Fault(where, "lines that are no JSON objects", detail)


def _parquet(path: Path) -> Iterator[tuple[str, Row | Fault]]:
    import pyarrow

    file = _open_parquet(path)
    number = 0
    try:
        short = [name for name, kind in zip(*_schema(file), strict=True) if pyarrow.types.is_float32(kind)]
        for batch in file.iter_batches():
            for row in batch.to_pylist():
                number += 1
                # In 64 bits 3.8 would be 3.799999952316284.
                row |= {name: float(str(np.float32(row[name]))) for name in short if row[name] is not None}
                yield f"{path}, row {number}", row
    except (OSError, ValueError, OverflowError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: cannot be read after row {number} ({error}); download it again") from error


def _schema(file: Any) -> tuple[list[str], list[Any]]:
    return file.schema_arrow.names, file.schema_arrow.types


def _open_parquet(path: Path) -> Any:
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: cannot be read as parquet ({error}); download it again") from error
    names = file.schema_arrow.names
    twice = sorted({repr(name) for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"{path}: two columns have the same name: {', '.join(twice)}; give each a distinct name")
    return file


def _lines(path: Path, source: Source) -> Iterator[tuple[int, str]]:
    """Numbered lines, split at line feeds alone: the texts hold other characters that str.splitlines would split at."""
    with _Text(path, source, newline="\n") as lines:
        for number, line in enumerate(lines, start=1):
            text = line.rstrip("\r\n")
            if text:
                yield number, text


class _Text:
    """The lines of a text file, in the encoding that its byte order mark says, else `source.encoding`."""

    def __init__(self, path: Path, source: Source, newline: str) -> None:
        self.path = path
        with path.open("rb") as file:
            start = file.read(4)
        marked = next((encoding for mark, encoding in _MARKS.items() if start.startswith(mark)), None)
        if source.quoting == "none" and marked != "utf-8-sig":
            marked = None  # GLUE's are UTF-8, and what is not is damaged
        self.encoding = marked or source.encoding
        try:
            self.file = path.open(encoding=self.encoding, newline=newline)
            self.newline = newline
        except LookupError as error:
            raise UserError(
                f"{path}: source.encoding: {self.encoding!r} is no text encoding; for example utf-8, utf-16, cp1252"
            ) from error

    def __enter__(self) -> Iterator[str]:
        return self._lines()

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def _lines(self) -> Iterator[str]:
        try:
            if self.newline == "":
                yield from self._universal()
            else:
                yield from self.file
        except UnicodeError as error:
            raise UserError(self._undecodable()) from error

    def _universal(self) -> Iterator[str]:
        first = next(self.file, "")
        if first.endswith("\r"):
            yield first
            yield from self.file
            return
        yield first
        rest = ""
        for part in self.file:  # ends at a CR alone, too
            if part.endswith("\r"):
                rest += part[:-1] + _CR
            else:
                yield rest + part
                rest = ""
        if rest:
            yield rest

    def _undecodable(self) -> str:
        """Where the first byte is that is not of the encoding: line and byte of the line, from 1."""
        data, encoding = self.path.read_bytes(), self.encoding.removesuffix("-sig")
        start, end = 0, 1
        try:
            data.decode(encoding)
        except UnicodeDecodeError as error:
            start, end = error.start, error.end
        except UnicodeError:  # UTF-16 of an odd beginning
            pass
        before = data[:start].decode(encoding, errors="ignore")
        if self.newline == "" and b"\n" not in data:
            before = before.replace("\r\n", "\n").replace("\r", "\n")
        name = "UTF-8" if encoding == "utf-8" else encoding
        wide = encoding.startswith(("utf-16", "utf-32"))
        line_start = 0 if wide else data.rfind(b"\n", 0, start) + 1
        return (
            f"{self.path}, line {before.count(chr(10)) + 1}: not valid {name} at byte {start - line_start + 1} of the "
            f"{'file' if wide else 'line'} ({data[start:end].hex(' ')}); set "
            "source.encoding to the file's (cp1252 for most files of Windows and Excel), or convert the file to UTF-8"
        )
