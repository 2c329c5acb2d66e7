"""From the cells of a row to texts, labels, and the columns that are kept with predictions."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np

from extensions.data.row_errors import IncompleteRow, RowError, UnlabelledRow
from extensions.data.tables import Row
from extensions.prompts import is_label
from extensions.tasks import Task, cell_label, is_blank

SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can escape them; no tokenizer accepts them


@dataclass(frozen=True)
class LabelColumn:
    """The column of a task's labels."""

    task: Task
    name: str | int | None
    classes: list[str] | None = None  # names of the class numbers; None: not a parquet file
    split: str = "train"  # for messages

    @property
    def own(self) -> bool:
        return self.task.suite == "own"


def no_column(row: Row | Iterable[str | int], column: str | int) -> str:
    """The message that a row lacks a column, with the existing columns and the nearest name."""
    names = [str(name) for name in row]
    near = difflib.get_close_matches(str(column), names, n=1, cutoff=0.6)
    hint = f". Did you mean {near[0]!r}?" if near else ""
    return f": no field {column!r}; the row has: {', '.join(names)[:200]}{hint}"


def _cell(row: Row, column: str | int, where: str) -> Any:
    if column not in row:
        raise RowError(where, f"rows without the field {column!r}", no_column(row, column))
    return row[column]


def text_of(row: Row, column: str | int, where: str, may_lack: bool, own: bool = False) -> str:
    """The text of a cell, stripped of surrounding whitespace.

    Args:
        may_lack: return the empty string for a missing text.
        own: the row belongs to a user's own task, whose numbers and booleans are converted to text.

    Raises:
        IncompleteRow: there is no text.
        RowError: the value is not text.
    """
    lacks = own and column not in row  # JSON objects may omit a key; the caller raises if all of them do
    value = None if lacks else _cell(row, column, where)
    place = f", field {column!r}"
    if own and isinstance(value, np.generic):
        value = value.item()
    if is_blank(value) and (own or value is None or isinstance(value, str)):
        if may_lack:
            return ""
        detail = no_column(row, column) if lacks else f"{place}: expected text, got {value!r}"
        remedy = "source.incomplete: skip leaves such rows out of training, keep makes the text empty" if own else ""
        raise IncompleteRow(where, f"rows without a text{place}", detail, remedy)
    if own and isinstance(value, (bool, int, float)):
        return str(value).lower() if isinstance(value, bool) else str(value)
    if not isinstance(value, str):
        raise RowError(where, f"rows with a value that is not text{place}", f"{place}: expected text, got {value!r}")
    if SURROGATE.search(value):
        detail = f"{place}: {value[:60]!r} holds half of a surrogate pair, which is not text"
        raise RowError(where, f"rows with half of a surrogate pair{place}", detail)
    return value.strip()


def label_of(row: Row, column: LabelColumn, where: str) -> str:
    """The label of a row, in the task's spelling.

    Raises:
        UnlabelledRow: the label is empty, not one of the task's, or out of the range of its scores.
        RowError: the row has no such column.
    """
    task = column.task
    assert column.name is not None, f"task {task.name} has a labelled split and no label column"
    value = _cell(row, column.name, where)
    value = [_named(one, column) for one in value] if isinstance(value, list) else _named(value, column)
    if task.multi_label:
        try:
            return task.parse_label_set(value)
        except ValueError as error:
            raise _unlabelled(column, where, value, str(error)) from error
    text = cell_label(value) if column.own or isinstance(value, bool) else str(value).strip()
    if column.classes is not None and not column.own and isinstance(value, float):
        text = f"{value:g}"  # earlier parquet files of the hub have scores of 32 bits
    if task.score_range is None:
        if (label := task.find_label(text)) is not None:
            return label
    elif isinstance(value, (str, int, float, Decimal)) and not isinstance(value, bool) and is_label(text, task):
        return text
    raise _unlabelled(column, where, value, text)


def _named(value: Any, column: LabelColumn) -> Any:
    """The name of a class number. In a user's own file, a number whose name is not a label of the task is kept."""
    classes = column.classes
    if not classes or not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < len(classes):
        return value
    name = classes[value]
    return name if not column.own or column.task.find_label(name) is not None else value


def _unlabelled(column: LabelColumn, where: str, value: Any, text: str) -> UnlabelledRow:
    """The error of an invalid label, with the keys that accept the row."""
    task, skip = column.task, ""
    if column.own:
        skip = "source.unknown_labels: skip leaves such rows out"
        if column.split != "train":
            skip += f". source.unlabelled: [{column.split}] if the file has none"
    detail, kind, remedy = f", field {column.name!r}: ", "rows with an unknown label", "Add it to labels"
    if task.multi_label:
        detail += f"{text} (task {task.name})"
    elif task.score_range is None:
        detail += f"label {text!r} is not one of {', '.join(map(repr, task.labels))} (task {task.name})"
    else:
        numbers = "a number from {:.15g} to {:.15g}".format(*task.score_range)
        detail += f"expected {numbers}, got {text!r}"
        kind, remedy = f"rows whose score is not {numbers}", "Set score_range to the range of the data"
    if is_blank(value):
        return UnlabelledRow(where, "rows without a label", detail, skip)
    return UnlabelledRow(where, kind, detail, f"{remedy}. {skip}" if column.own else "", text)


def kept_of(row: Row, task: Task, where: str) -> dict[str, Any]:
    """The columns that are kept with a prediction. Those of `group_by` must exist.

    Raises:
        RowError: a column does not exist, or JSON cannot hold its value.
    """
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
                f", field {column!r}: {repr(value)[:60]} cannot be written to a file of predictions ({error}); "
                "expected text, numbers or lists of them"
            )
            raise RowError(where, f"rows whose {column!r} cannot be kept", detail) from error
        kept[name] = value
    return kept
