"""The files of a data set: which file is which split, their encoding and quoting."""

from __future__ import annotations

import codecs
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from extensions.common.errors import UserError
from extensions.data.load_table import Table, load_table
from extensions.data.locate import AbsentSplit, download
from extensions.data.tables import SUFFIXES, class_names, columns_of, format_of, read_rows
from extensions.scaffold.cells import misread
from extensions.scaffold.columns import Row
from extensions.tasks import SPLITS, Source, Task

NAMES = {"train": ("train", "training"), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}
ENCODINGS = ("utf-8", "cp1252", "latin-1")  # tried in this order; the last one reads anything
_BYTE_ORDER_MARKS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # UTF-32's begins with UTF-16's
_BLOCK = 1 << 20


@dataclass(frozen=True)
class SourceTable(Table):
    """The rows of a split, and how its file is read."""

    keys: dict[str, Any] = field(default_factory=dict)  # of `source`, except the defaults
    notes: list[str] = field(default_factory=list)  # on encoding and quoting, for the user


def find_splits(data: str, validation: str | None, test: str | None) -> dict[str, Path]:
    """Split -> file: DATA itself is the training file, or a folder that holds train, validation and test files.

    Raises:
        UserError: a file is missing, or the folder holds no training file, or two of one split.
    """
    path = Path(data)
    found = {"train": path}
    if path.is_dir():
        found = {split: one for split, names in NAMES.items() if (one := _named(path, names))}
        if "train" not in found:
            have = ", ".join(sorted(one.name for one in path.iterdir())[:10]) or "nothing"
            raise UserError(
                f"{path}: no training file; expected train with one of {', '.join(SUFFIXES)} (and validation, test); "
                f"the folder holds {have}. Name the file itself, with --validation FILE and --test FILE for others"
            )
    found |= {split: Path(one) for split, one in (("validation", validation), ("test", test)) if one}
    missing = [str(one) for one in found.values() if not one.is_file()]
    if missing:
        raise UserError(
            f"{', '.join(missing)}: no such file; expected one of {', '.join(SUFFIXES)}, or a folder of them"
        )
    return {split: found[split] for split in SPLITS if split in found}


def _named(folder: Path, names: Sequence[str]) -> Path | None:
    found = [p for p in sorted(folder.iterdir()) if p.stem.lower() in names and p.suffix.lower() in SUFFIXES]
    if len(found) > 1:
        both = " and ".join(one.name for one in found[:2])
        raise UserError(f"{folder}: {both} are of one split; name the files: DATA, --validation FILE, --test FILE")
    return found[0] if found else None


def read_source(path: Path, encoding: str | None = None) -> SourceTable:
    """Read a file, and infer its encoding and quoting.

    Args:
        encoding: the user's choice; None: by the file.

    Raises:
        UserError: the file cannot be read, is not in the encoding, or has no rows.
    """
    kind = format_of(path, Source())
    keys: dict[str, Any] = {}
    notes: list[str] = []
    if encoding is not None:
        _check_encoding(path, kind, encoding)
    if kind != "parquet":
        used = encoding or find_encoding(path)
        if used != "utf-8":
            keys["encoding"] = used
            if encoding is None:
                notes.append(
                    f"{path.name} is not UTF-8: read as {used}; look at the prompts, --encoding NAME sets another"
                )
    try:
        problem = _quoting_problem(path, keys) if kind in ("csv", "tsv") else None
        if problem is not None:
            keys["quoting"] = "none"
            notes.append(f"{path.name}: quotes are characters like others; {problem}")
        table = load_table(path, Source(**keys))
    except UserError as error:
        raise with_notes(error, notes) from error
    odd = misread(table.rows) if encoding is None and keys.get("encoding") in ("cp1252", "latin-1") else None
    if odd is not None:
        raise UserError(
            f"{path}: not UTF-8, and as {keys['encoding']} most letters of a column are beyond ASCII ({odd!r}), as in "
            "a file of another encoding; name it with --encoding, for example cp1251 or koi8-r (Cyrillic), cp1253 "
            "(Greek), shift_jis (Japanese), gb18030 (Chinese), or cp1252 if the cell is right; or save the file as "
            "UTF-8"
        )
    return SourceTable(**vars(table), keys=keys, notes=notes)


def with_notes(error: UserError, notes: Sequence[str]) -> UserError:
    """The error with the notes on how the file was read, which may explain it."""
    return UserError("\n".join([str(error), *(f"note: {note}" for note in notes)]))


def _check_encoding(path: Path, kind: str, encoding: str) -> None:
    if kind == "parquet":
        raise UserError(f"--encoding: {encoding!r}, but {path} is a parquet file, which has none; leave it out")
    try:
        "".encode(encoding)
    except LookupError as error:
        raise UserError(
            f"--encoding: {encoding!r} is no text encoding; for example utf-8, utf-16-le, cp1252, cp1251, shift_jis"
        ) from error
    with path.open("rb") as file:
        marked = file.read(4).startswith(_BYTE_ORDER_MARKS)
    if not marked and not _reads(path, encoding):  # a byte order mark overrides the option
        raise UserError(f"--encoding: {path} has bytes that are not {encoding}; name another, or leave it out")


def hub_tables(name: str) -> tuple[dict[str, SourceTable], dict[str, Any]]:
    """Split -> table of `hub:USER/NAME`, or `hub:USER/NAME:CONFIG`, and the key `source.hub`.

    Raises:
        UserError: the hub cannot be read, or holds no training split.
    """
    repo, _, config = name.removeprefix("hub:").partition(":")
    hub: dict[str, Any] = {"repo": repo} | ({"config": config} if config else {})
    tables: dict[str, SourceTable] = {}
    renamed: dict[str, str] = {}
    for split, there in [(one, name) for one in SPLITS for name in NAMES[one]]:
        if split in tables:
            continue
        source = {"hub": {**hub, "splits": {split: there}}}
        probe = Task.model_validate(
            {"name": "probe", "description": "-", "question": "{x}", "labels": ["a", "b"], "source": source}
        )
        try:
            files = download(probe, split)
        except AbsentSplit:
            continue
        rows = [row for file in files for _, row in read_rows(file, Source())]
        tables[split] = SourceTable(files[0], columns_of(files[0], Source()), rows, {})
        renamed |= {split: there} if there != split else {}
    if "train" not in tables:
        raise UserError(f"{name}: no training split in parquet files; name its configuration, as hub:{repo}:CONFIG")
    return tables, hub | ({"splits": renamed} if renamed else {})


def with_class_names(table: SourceTable, label: Any) -> SourceTable:
    """The table with class names in place of the class numbers of a parquet file's label column."""
    names = class_names(table.path, label) if table.path.suffix.lower() == ".parquet" else []

    def named(cell: Any) -> Any:
        if isinstance(cell, int) and not isinstance(cell, bool):
            return names[cell] if 0 <= cell < len(names) else None  # -1: unlabelled
        return cell

    return replace(table, rows=[{**row, label: named(row.get(label))} for row in table.rows]) if names else table


def find_encoding(path: Path) -> str:
    """utf-8 if the file is, or if it has a byte order mark; else the first encoding that reads it.

    Raises:
        UserError: it holds zero bytes, which text in these encodings does not.
    """
    with path.open("rb") as file:
        start = file.read(4096)
    if start.startswith(_BYTE_ORDER_MARKS):
        return "utf-8"
    even, odd = start[::2].count(0), start[1::2].count(0)
    if max(even, odd) > len(start) / 8:  # in UTF-16 every Latin letter has a zero byte
        return "utf-16-be" if even > odd else "utf-16-le"
    found = next(encoding for encoding in ENCODINGS if _reads(path, encoding))
    if found != "utf-8" and max(even, odd):
        raise UserError(
            f"{path}: not UTF-8, and holds zero bytes, as UTF-16 without a byte order mark does; say --encoding "
            "utf-16-le (most files of Windows) or utf-16-be, or save the file as UTF-8"
        )
    return found


def _reads(path: Path, encoding: str) -> bool:
    decoder = codecs.getincrementaldecoder(encoding)()
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                decoder.decode(block)
        decoder.decode(b"", final=True)
    except UnicodeError:  # UTF-16 raises its own
        return False
    return True


def _quoting_problem(path: Path, keys: dict[str, Any]) -> str | None:
    """Why quotes cannot enclose cells: they do not pair, or would join whole rows. None if they can."""
    try:
        quoted = Source(**keys)
        columns = columns_of(path, quoted)
        if not any(_swallowed(row, len(columns)) for _, row in read_rows(path, quoted)):
            return None
        problem = "read as quoted, cells would hold whole rows"
    except UserError as error:
        problem = f"read as quoted it is faulty ({str(error).splitlines()[0][:120]})"
    try:
        return problem if len(load_table(path, Source(**keys, quoting="none")).columns) > 1 else None
    except UserError:
        return None


def _swallowed(row: Row, columns: int) -> bool:
    """Whether a cell holds a line with as many tabs as a row has separators, which no quoted text does."""
    return columns > 2 and any(
        isinstance(cell, str)
        and "\n" in cell
        and any(len(re.findall("\t", line)) == columns - 1 for line in cell.split("\n")[1:-1])
        for cell in row.values()
    )


def common_keys(tables: Mapping[str, SourceTable]) -> dict[str, Any]:
    """The keys of `source` for reading all files.

    Raises:
        UserError: files need different keys, and a task has one `source`.
    """
    first, *others = tables.values()
    for other in others:
        if other.keys != first.keys:
            raise UserError(
                f"{first.path} and {other.path} are read differently ({first.keys or 'UTF-8, quoted'}; "
                f"{other.keys or 'UTF-8, quoted'}), and one recipe reads all files alike; save them in the same format"
            )
    return first.keys
