"""The rows of one split, as its files have them: where the files are, how they are read, what a cell may hold."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from extensions.data.faults import Fault
from extensions.data.nested import ROWS
from extensions.data.tables import RAGGED, Row, class_names, format_of, scan
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
        f"{'source.hub' if task.suite == 'own' else 'data.root: hub'}, but {hub.repo} could not be read from the hub "
        f"(task {task.name}, split {split}: {' '.join(str(problem or 'no parquet files there').split())[:300]}). Check "
        + (
            "the network, hub.config and hub.splits, or give the files as source.files"
            if task.suite == "own"
            else "the network, or set data.root to a folder with the official download"
        )
    ) from problem


def on_hub(task: Task, split: str) -> bool:
    """Whether a split of one's own task is read from the hub, and is there.

    Raises:
        UserError: the hub cannot be read.
    """
    source = task.source
    if task.suite != "own" or source.hub is None or split in source.files or source.is_drawn(split):
        return False
    return _is_there(task.model_dump_json(), split)


@cache
def _is_there(task: str, split: str) -> bool:
    try:
        return bool(download(Task.model_validate_json(task, strict=False), split))
    except AbsentSplit:
        return False


def open_split(task: Task, split: str, root: str | None) -> SplitReader:
    own = task.suite == "own"
    if split not in task.source.files:
        if own and task.source.hub is not None:
            return SplitReader(task, split, download(task, split), True)
        raise UserError(f"task {task.name} has no {split} split: give its file as source.files.{split}")
    if root == HUB:
        if not own:
            return SplitReader(task, split, download(task, split), True)
        root = None  # one's own files stand by themselves beside tasks of the hub
    if root is None and not own:
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


class FaultyRow(UserError):
    """A row that cannot be used."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(str(fault))
        self.fault = fault


class IncompleteRow(FaultyRow):
    """A row without one of its texts."""


class UnlabelledRow(FaultyRow):
    """A row whose label is empty or none of the task's."""


class SplitReader:
    """The rows of one split, with the columns of its layout."""

    def __init__(self, task: Task, split: str, files: list[Path], from_hub: bool) -> None:
        self.task, self.split, self.files, self.path = task, split, files, files[0]
        self.source, self.own = task.source.in_split(split), task.suite == "own"
        self.names: dict[str | int, None] = {}  # of the columns of a JSONL file, as far as it has been read
        hub = self.source.hub if from_hub else None
        self.labelled = split not in self.source.unlabelled
        self.columns: dict[str, Any] = self.source.columns
        self.label = self.source.label
        self.classes: list[str] | None = None  # by their numbers; None where the file is no parquet
        if hub is not None:
            self.columns = (dict(self.columns) if self.own else {}) | hub.columns
            self.label = self.source.label if self.own else "label"
            self.source = self.source.model_copy(update={"format": "parquet"})
        self.format = format_of(self.path, self.source)
        if self.format == "parquet":
            self.classes = list(hub.labels) if hub is not None else []
            if self.own and not self.classes and self.labelled:
                self.classes = class_names(self.path, str(self.label))
        needed = [self.columns.get(name, name) for name in task.fields]
        if self.labelled and self.label is not None:
            needed.append(self.label)
        self.needed = list(dict.fromkeys(needed))

    def rows(self) -> Iterator[tuple[str, Row | Fault]]:
        """(where it stands, row), flat.

        Raises:
            UserError: a file cannot be read, or lacks a column that every row needs.
        """
        for path in self.files:
            first = True
            for where, row in scan(path, self.source):
                if isinstance(row, Fault):
                    yield where, row
                    continue
                if self.source.rows is None:
                    if first and self.format != "jsonl":
                        self._check_columns(row, where)
                    first = False
                    if self.format == "jsonl":
                        self.names |= dict.fromkeys(row)
                    yield where, row
                    continue
                try:
                    flat = list(ROWS[self.source.rows](row))  # type: ignore[arg-type]
                except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
                    detail = f": not an object of {self.task.display_name}'s format ({type(error).__name__}: {error})"
                    yield where, Fault(where, "objects that are not of the task's format", detail)
                    continue
                for one in flat:
                    yield where, one  # type: ignore[misc]

    def _check_columns(self, row: Row, where: str) -> None:
        lacking = [column for column in self.needed if column not in row]
        if lacking:
            raise UserError(" ".join(f"{where}{absent(row, column)}." for column in lacking).removesuffix("."))

    def passes_ragged(self, fault: Fault) -> bool:
        """Whether a row with too many or too few cells is left out, as one that lacks a text is: of GLUE alone, whose
        files have such rows. With quotes, or in a file of one's own, texts would be lost."""
        skips = self.source.incomplete == "skip" and self.labelled and not self.own
        return skips and self.source.quoting == "none" and fault.kind == RAGGED

    def cells(self, row: Row, where: str, may_lack: bool) -> dict[str, str]:
        """Field -> its text."""
        return {
            name: text_of(row, self.columns.get(name, name), where, may_lack, self.own) for name in self.task.fields
        }


def absent(row: Row | Iterable[str | int], column: str | int) -> str:
    """That a file has no such column, with those that it has and the nearest."""
    names = [str(name) for name in row]
    near = difflib.get_close_matches(str(column), names, n=1, cutoff=0.6)
    hint = f". Did you mean {near[0]!r}?" if near else ""
    return f": no field {column!r}; the row has: {', '.join(names)[:200]}{hint}"


def _cell(row: Row, column: str | int, where: str) -> Any:
    if column not in row:
        raise FaultyRow(Fault(where, f"rows without the field {column!r}", absent(row, column)))
    return row[column]


SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell them, no tokenizer reads them


def text_of(row: Row, column: str | int, where: str, may_lack: bool, own: bool = False) -> str:
    """The text of a cell, without the space around it.

    Args:
        may_lack: a missing text is empty.
        own: the row is of one's own task, whose numbers and booleans are texts too.

    Raises:
        IncompleteRow: there is no text.
        FaultyRow: what is there is no text.
    """
    remedy = "source.incomplete: skip leaves such rows out of training, keep makes the text empty" if own else ""
    if own and column not in row:  # an object may leave a key out; that no object has it is found by the caller
        if may_lack:
            return ""
        raise IncompleteRow(Fault(where, f"rows without the field {column!r}", absent(row, column), remedy))
    value = _cell(row, column, where)
    place = f", field {column!r}"
    if value is None or (isinstance(value, str) and not value.strip()) or (own and value != value):
        if may_lack:
            return ""
        detail = f"{place}: expected text, got {value!r}"
        raise IncompleteRow(Fault(where, f"rows without a text{place}", detail, remedy))
    if own and isinstance(value, (bool, int, float)):
        return str(value).lower() if isinstance(value, bool) else str(value)
    if not isinstance(value, str):
        raise FaultyRow(Fault(where, f"rows with no text{place}", f"{place}: expected text, got {value!r}"))
    if SURROGATE.search(value):
        detail = f"{place}: {value[:60]!r} holds half of a surrogate pair, which is not text"
        raise FaultyRow(Fault(where, f"rows with half of a surrogate pair{place}", detail))
    return value.strip()


def label_of(row: Row, reader: SplitReader, where: str) -> str:
    """The label of a row, as the task has it.

    Raises:
        UnlabelledRow: it is empty, no label of the task, or out of the range of its scores.
        FaultyRow: the row has no such column.
    """
    column, task = reader.label, reader.task
    assert column is not None, f"task {task.name} has a labelled split and no label column"
    value = _cell(row, column, where)
    numbered = reader.classes and isinstance(value, int) and not (reader.own and str(value) in task.labels)
    if numbered and reader.classes and not isinstance(value, bool) and 0 <= value < len(reader.classes):
        value = reader.classes[value]
    if reader.classes is not None and isinstance(value, float):
        value = f"{value:g}"  # the hub has scores in 32 bits, where 3.8 is 3.799999952316284
    text = str(value).lower() if isinstance(value, bool) else str(value).strip()
    place, skip = f", field {column!r}", ""
    if reader.own:
        unlabelled = f" source.unlabelled: [{reader.split}] if the file has none." if reader.split != "train" else ""
        skip = f"source.unknown_labels: skip leaves such rows out.{unlabelled}".removesuffix(".")
    empty = value is None or not text or value != value
    if task.score_range is None:
        label = task.label_of(text)
        if label is None:
            allowed = ", ".join(map(repr, task.labels))
            detail = f"{place}: label {text!r} is not one of {allowed} (task {task.name})"
            if empty:
                raise UnlabelledRow(Fault(where, "rows without a label", detail, skip))
            remedy = f"Add it to labels. {skip}" if reader.own else ""
            raise UnlabelledRow(Fault(where, "rows whose label is none of the task's", detail, remedy, text))
        return label
    number = isinstance(value, (str, int, float)) and not isinstance(value, bool)
    if not number or not is_label(text, task):
        low, high = task.score_range
        detail = f"{place}: expected a number from {low:g} to {high:g}, got {text!r}"
        if empty:
            raise UnlabelledRow(Fault(where, "rows without a label", detail, skip))
        kind = f"rows whose score is no number from {low:g} to {high:g}"
        remedy = f"Give score_range the range of the data. {skip}" if reader.own else ""
        raise UnlabelledRow(Fault(where, kind, detail, remedy, text))
    return text


def kept_of(row: Row, task: Task, where: str) -> dict[str, Any]:
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
            detail = (
                f", field {column!r}: {repr(value)[:60]} cannot stand in a file of predictions ({error}); expected "
                "text, numbers or lists of them"
            )
            raise FaultyRow(Fault(where, f"rows whose {column!r} cannot be kept", detail)) from error
        kept[name] = value
    return kept


def number_of(value: Any) -> Any:
    """Row numbers are text in TSV and in some JSONL files."""
    return int(value) if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,18}", value) else value
