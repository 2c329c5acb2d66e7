"""The rows of one split, as its files have them: where the files are, how they are read, what a cell may hold."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from extensions.common.errors import UserError
from extensions.data.faults import Fault
from extensions.data.nested import ROWS
from extensions.data.tables import RAGGED, Row, class_names, format_of, scan
from extensions.prompts import is_label
from extensions.tasks import Hub, Task, cell_label, is_blank

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
    if task.suite != "own" or source.hub is None or split in source.files or source.is_held_out(split):
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
        drawn = f", or hold rows out of the training file: source.split: {{{split}: 0.1}}" if split != "train" else ""
        raise UserError(f"task {task.name} has no {split} split: give its file as source.files.{split}{drawn}")
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


@dataclass(frozen=True)
class LabelColumn:
    """Where the labels of a task stand."""

    task: Task
    name: str | int | None
    classes: list[str] | None = None  # names of the class numbers; None: the file is no parquet
    split: str = "train"  # in messages

    @property
    def own(self) -> bool:
        return self.task.suite == "own"


class SplitReader:
    """The rows of one split, with the columns of its layout."""

    def __init__(self, task: Task, split: str, files: list[Path], from_hub: bool) -> None:
        self.task, self.split, self.files, self.path = task, split, files, files[0]
        self.source, self.own = task.source.in_split(split), task.suite == "own"
        hub = self.source.hub if from_hub else None
        self.labelled = split not in self.source.unlabelled
        self.columns: dict[str, Any] = self.source.columns
        label, classes = self.source.label, None
        if hub is not None:
            self.columns = (dict(self.columns) if self.own else {}) | hub.columns
            label = self.source.label if self.own else "label"
            self.source = self.source.model_copy(update={"format": "parquet"})
        self.format = format_of(self.path, self.source)
        if self.format == "parquet":
            classes = list(hub.labels) if hub is not None else []
            if self.own and not classes and self.labelled:
                classes = class_names(self.path, str(label))
        self.label_column = LabelColumn(task, label, classes, split)
        self.fields = {name: self.columns.get(name, name) for name in task.fields}  # and the column of each
        needed = [*self.fields.values()]
        if self.labelled and label is not None:
            needed.append(label)
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
        return {name: text_of(row, column, where, may_lack, self.own) for name, column in self.fields.items()}


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
    lacks = own and column not in row  # an object may leave a key out; that no object has it is found by the caller
    value = None if lacks else _cell(row, column, where)
    value = value.item() if own and isinstance(value, np.generic) else value
    if is_blank(value) and (own or value is None or isinstance(value, str)):
        if may_lack:
            return ""
        place = f", field {column!r}"
        detail = absent(row, column) if lacks else f"{place}: expected text, got {value!r}"
        remedy = "source.incomplete: skip leaves such rows out of training, keep makes the text empty" if own else ""
        raise IncompleteRow(Fault(where, f"rows without a text{place}", detail, remedy))
    if own and isinstance(value, (bool, int, float)):
        return str(value).lower() if isinstance(value, bool) else str(value)
    if not isinstance(value, str):
        place = f", field {column!r}"
        raise FaultyRow(Fault(where, f"rows with no text{place}", f"{place}: expected text, got {value!r}"))
    if SURROGATE.search(value):
        place = f", field {column!r}"
        detail = f"{place}: {value[:60]!r} holds half of a surrogate pair, which is not text"
        raise FaultyRow(Fault(where, f"rows with half of a surrogate pair{place}", detail))
    return value.strip()


def label_of(row: Row, column: LabelColumn, where: str) -> str:
    """The label of a row, as the task has it.

    Raises:
        UnlabelledRow: it is empty, no label of the task, or out of the range of its scores.
        FaultyRow: the row has no such column.
    """
    task = column.task
    assert column.name is not None, f"task {task.name} has a labelled split and no label column"
    value = _cell(row, column.name, where)
    named = partial(_named, column=column)
    value = [named(one) for one in value] if isinstance(value, list) else named(value)
    if task.multi_label:
        try:
            return task.parse_label_set(value)
        except ValueError as error:
            raise _unlabelled(column, where, value, str(error)) from error
    text = cell_label(value) if column.own or isinstance(value, bool) else str(value).strip()
    if column.classes is not None and not column.own and isinstance(value, float):
        text = f"{value:g}"  # scores of the hub were 32-bit numbers once
    if task.score_range is None:
        label = task.find_label(text)
        if label is not None:
            return label
    elif isinstance(value, (str, int, float, Decimal)) and not isinstance(value, bool) and is_label(text, task):
        return text
    raise _unlabelled(column, where, value, text)


def _named(value: Any, column: LabelColumn) -> Any:
    """The name of a class number. In one's own file a number whose name is no label of the task stays."""
    classes = column.classes
    if not classes or not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < len(classes):
        return value
    name = classes[value]
    return name if not column.own or column.task.find_label(name) is not None else value


def _unlabelled(column: LabelColumn, where: str, value: Any, text: str) -> UnlabelledRow:
    """What is wrong with a label that is none, and what lets the row pass."""
    task, skip = column.task, ""
    if column.own:
        skip = "source.unknown_labels: skip leaves such rows out"
        if column.split != "train":
            skip += f". source.unlabelled: [{column.split}] if the file has none"
    detail = f", field {column.name!r}: "
    if task.multi_label:
        detail, kind, remedy = f"{detail}{text} (task {task.name})", "rows with an unknown label", "Add it to labels"
    elif task.score_range is None:
        detail += f"label {text!r} is not one of {', '.join(map(repr, task.labels))} (task {task.name})"
        kind, remedy = "rows whose label is none of the task's", "Add it to labels"
    else:
        low, high = task.score_range
        detail += f"expected a number from {low:.15g} to {high:.15g}, got {text!r}"
        kind = f"rows whose score is no number from {low:.15g} to {high:.15g}"
        remedy = "Give score_range the data's range"
    if is_blank(value):
        return UnlabelledRow(Fault(where, "rows without a label", detail, skip))
    return UnlabelledRow(Fault(where, kind, detail, f"{remedy}. {skip}" if column.own else "", text))


def kept_of(row: Row, task: Task, where: str) -> dict[str, Any]:
    """The columns that stand beside a prediction, in JSON; those that tell questions apart must be there."""
    kept: dict[str, Any] = {}
    for name, column in task.source.keep.items():
        if column not in row and name not in task.group_by:
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
