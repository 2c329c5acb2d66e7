"""The rows of one split, as its files have them: where the files are, how they are read, what a cell may hold."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from extensions.data.nested import ROWS
from extensions.errors import UserError
from extensions.prompts import is_label
from extensions.tasks import Hub, Task

HUB = "hub"  # value of data.root: download from the hub


def find_files(task: Task, split: str, root: str | None) -> tuple[list[Path], bool] | None:
    """Files of a split and whether they are the hub's parquet files; None where there are none.

    In `root` itself, or in its folder named as the suite, so that one folder may hold GLUE and SuperGLUE.

    Raises:
        UserError: a name is too long for the file system, or no pattern.
    """
    for folder in [Path(root or ".")] + ([Path(root) / task.suite] if root is not None else []):
        path = folder / task.source.files[split]
        try:
            if path.is_file():
                return [path], False
            found = _parquet_files(task.source.hub, split, folder) if task.source.hub is not None else []
        except (OSError, ValueError, NotImplementedError) as error:
            raise UserError(
                f"{path}: cannot be looked up (task {task.name}, split {split}: {error}); check data.root and the "
                "task's source"
            ) from error
        if found:
            return found, True
    return None


def _parquet_files(hub: Hub, split: str, folder: Path) -> list[Path]:
    return next((found for pattern in hub.patterns(split) if (found := sorted(folder.glob(pattern)))), [])


class AbsentSplit(UserError):
    """The hub's data set lacks the split."""


def download(task: Task, split: str) -> list[Path]:
    """Parquet files of a split, from the hub or its local cache."""
    from huggingface_hub import snapshot_download

    hub = task.source.hub
    if hub is None:
        raise UserError(f"task {task.name} is not on the hub; set data.root to the folder of its files")
    patterns = list(hub.patterns(split))
    problem: Exception | None = None
    kind = UserError
    for revision in ("main", "refs/convert/parquet"):  # the second is the hub's own conversion of script data sets
        try:
            folder = snapshot_download(hub.repo, repo_type="dataset", revision=revision, allow_patterns=patterns)
        except Exception as error:
            problem = error
            continue
        found = _parquet_files(hub, split, Path(folder))
        if found:
            return found
        kind = AbsentSplit
    raise kind(
        f"data.root: hub, but {hub.repo} could not be read from the hub (task {task.name}, split {split}: "
        f"{' '.join(str(problem or 'no parquet files there').split())[:300]}). Check the network, or set data.root to "
        "a folder with the official download"
    ) from problem


def open_split(task: Task, split: str, root: str | None) -> SplitReader:
    if split not in task.source.files:
        raise UserError(f"task {task.name} has no {split} split: give its file as source.files.{split}")
    if root == HUB:
        if task.suite != "own":
            return SplitReader(task, split, download(task, split), True)
        root = None  # one's own files stand by themselves beside tasks of the hub
    if root is None and task.suite != "own":
        raise UserError(
            f"task {task.name} needs data.root, the folder that holds {task.source.files[split]} of the official "
            f"download, for example data.root=path/to/{task.suite}; data.root=hub downloads the rows"
        )
    found = find_files(task, split, root)
    if found is None and root is not None and not Path(root).is_dir():
        raise UserError(f"data.root: {root!r} is not a folder; it should hold {task.source.files[split]}")
    if found is None:
        path = Path(root or ".") / task.source.files[split]
        raise UserError(f"{path}: no such file (task {task.name}, split {split}); check data.root and source.files")
    return SplitReader(task, split, *found)


class IncompleteRow(UserError):
    """A row without one of its texts."""


class SplitReader:
    """The rows of one split, with the columns of its layout."""

    def __init__(self, task: Task, split: str, files: list[Path], from_hub: bool) -> None:
        self.task, self.files, self.path = task, files, files[0]
        self.source = task.source.in_split(split)
        self.skipped = 0
        hub = self.source.hub if from_hub else None
        self.labelled = split not in self.source.unlabelled
        self.columns: dict[str, Any] = self.source.columns if hub is None else dict(hub.columns)
        self.label: str | int | None = self.source.label if hub is None else "label"
        self.classes = None if hub is None else hub.labels
        self._read = _read_parquet if hub is not None else _read_tsv if self.source.format == "tsv" else _read_jsonl

    def rows(self) -> Iterator[tuple[str, dict[str | int, Any]]]:
        """(where it stands, row), flat."""
        for path in self.files:
            for where, row in self._read(path, self):
                if self.source.rows is None:
                    yield where, row
                    continue
                try:
                    flat = list(ROWS[self.source.rows](row))  # type: ignore[arg-type]
                except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
                    raise UserError(
                        f"{where}: not an object of {self.task.display_name}'s format ({type(error).__name__}: {error})"
                    ) from error
                for one in flat:
                    yield where, one  # type: ignore[misc]


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines, split at line feeds alone: the texts hold other characters that str.splitlines would split at."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                bad = raw[error.start : error.end].hex(" ")
                raise UserError(
                    f"{path}, line {number}: not valid UTF-8 at byte {error.start + 1} of the line ({bad}); "
                    "convert the file to UTF-8"
                ) from error
            text = text.rstrip("\r\n")
            if text:
                yield number, text


def _read_tsv(path: Path, reader: SplitReader) -> Iterator[tuple[str, dict[str | int, Any]]]:
    """Rows of a TSV file without quoting, as GLUE has it: a quote is a character like any other."""
    source = reader.source
    header: list[str] | None = None
    expected = source.num_columns
    for number, line in _lines(path):
        cells = line.split("\t")
        if header is None and source.header:
            header, expected = cells, len(cells)
            continue
        if expected is not None and len(cells) != expected:
            if source.incomplete == "skip" and reader.labelled:
                reader.skipped += 1
                continue
            raise UserError(
                f"{path}, line {number}: {len(cells)} columns, expected {expected}"
                + (f" ({', '.join(header)})" if header else "")
                + f"; the line begins {line[:60]!r}"
            )
        yield f"{path}, line {number}", dict(zip(header, cells, strict=True)) if header else dict(enumerate(cells))


def _read_jsonl(path: Path, reader: SplitReader) -> Iterator[tuple[str, dict[str | int, Any]]]:
    for number, line in _lines(path):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: not valid JSON ({error}); expected one object a line") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: expected a JSON object, got {type(row).__name__}")
        yield f"{path}, line {number}", row


def _read_parquet(path: Path, reader: SplitReader) -> Iterator[tuple[str, dict[str | int, Any]]]:
    """Rows of the hub's form: labels are class numbers, -1 where there is none."""
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: cannot be read as parquet ({error}); download it again") from error
    number = 0
    try:
        for batch in file.iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", row
    except (OSError, ValueError, OverflowError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: cannot be read after row {number} ({error}); download it again") from error


def _cell(row: dict[str | int, Any], column: str | int, where: str) -> Any:
    if column not in row:
        have = ", ".join(map(str, row))
        raise UserError(f"{where}: no field {column!r}; the row has: {have[:200]}")
    return row[column]


SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell them, no tokenizer reads them


def text_of(row: dict[str | int, Any], column: str | int, where: str, may_lack: bool) -> str:
    value = _cell(row, column, where)
    if value is None or (isinstance(value, str) and not value.strip()):
        if may_lack:
            return ""
        raise IncompleteRow(f"{where}, field {column!r}: expected text, got {value!r}")
    if not isinstance(value, str):
        raise UserError(f"{where}, field {column!r}: expected text, got {value!r}")
    if SURROGATE.search(value):
        raise UserError(f"{where}, field {column!r}: {value[:60]!r} holds half of a surrogate pair, which is not text")
    return value.strip()


def label_of(row: dict[str | int, Any], reader: SplitReader, where: str) -> str:
    column, task = reader.label, reader.task
    assert column is not None, f"task {task.name} has a labelled split and no label column"
    value = _cell(row, column, where)
    if task.multi_label:
        try:
            return task.label_set_of(value)
        except ValueError as error:
            raise UserError(f"{where}, field {column!r}: {error} (task {task.name})") from error
    if reader.classes and isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(reader.classes):
        value = reader.classes[value]
    if reader.classes is not None and isinstance(value, float):
        value = f"{value:g}"  # the hub has scores in 32 bits, where 3.8 is 3.799999952316284
    text = str(value).lower() if isinstance(value, bool) else str(value).strip()
    if task.score_range is None:
        label = task.label_of(text)
        if label is None:
            allowed = ", ".join(map(repr, task.labels))
            raise UserError(f"{where}, field {column!r}: label {text!r} is not one of {allowed} (task {task.name})")
        return label
    number = isinstance(value, (str, int, float)) and not isinstance(value, bool)
    if not number or not is_label(text, task):
        low, high = task.score_range
        raise UserError(f"{where}, field {column!r}: expected a number from {low:g} to {high:g}, got {text!r}")
    return text


def kept_of(row: dict[str | int, Any], task: Task, where: str) -> dict[str, Any]:
    """The columns that stand beside a prediction, in JSON; those that tell questions apart must be there."""
    kept: dict[str, Any] = {}
    for name, column in task.source.keep.items():
        if column not in row and name not in task.unit:
            continue
        value = _cell(row, column, where)
        try:
            if type(value) is not int:
                json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise UserError(
                f"{where}, field {column!r}: {repr(value)[:60]} cannot stand in a file of predictions ({error}); "
                "expected text, numbers or lists of them"
            ) from error
        kept[name] = value
    return kept


def number_of(value: Any) -> Any:
    """Row numbers are text in TSV and in some JSONL files."""
    return int(value) if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,18}", value) else value
