"""From the files of one split to validated examples. All rows are checked before the errors are reported together."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from extensions.common.errors import UserError
from extensions.data.cells import LabelColumn, kept_of, label_of, no_column, text_of
from extensions.data.example import Example, by_question
from extensions.data.nested import ROWS
from extensions.data.row_errors import IncompleteRow, RowError, RowErrors, UnlabelledRow
from extensions.data.tables import RAGGED, Row, class_names, format_of, scan
from extensions.tasks import Task


class SplitReader:
    """The rows of one split, with the columns of its layout.

    Args:
        from_hub: the files are the hub's parquet files.
    """

    def __init__(self, task: Task, split: str, files: list[Path], from_hub: bool) -> None:
        self.task, self.split, self.files, self.path = task, split, files, files[0]
        self.source, self.own = task.source.in_split(split), task.suite == "own"
        self.labelled = split not in self.source.unlabelled
        hub = self.source.hub if from_hub else None
        columns: dict[str, Any] = self.source.columns
        label, classes = self.source.label, None
        if hub is not None:
            columns = (columns if self.own else {}) | hub.columns
            label = label if self.own else "label"
            self.source = self.source.model_copy(update={"format": "parquet"})
        if format_of(self.path, self.source) == "parquet":
            classes = list(hub.labels) if hub is not None else []
            if self.own and not classes and self.labelled:
                classes = class_names(self.path, str(label))
        self.label_column = LabelColumn(task, label, classes, split)
        self.fields = {name: columns.get(name, name) for name in task.fields}  # field -> column
        labels = [label] if self.labelled and label is not None else []
        self.needed = list(dict.fromkeys([*self.fields.values(), *labels]))
        # Metrics and the evaluation server count every row, so rows are skipped in training only.
        self.may_lack = self.source.incomplete == "keep" or (self.source.incomplete == "skip" and split != "train")
        # `index` differs from the file's row number if rows are left out or held out; `kept` then has the row number.
        settings = (self.source.split, self.source.incomplete, self.source.unknown_labels)
        self.numbered = self.own and settings != (None, "error", "error")

    def read(self, warn: Callable[[str], None]) -> list[Example]:
        """All rows, checked.

        Raises:
            UserError: a file cannot be read or has no rows, a column is missing, or rows are malformed.
        """
        examples: list[Example] = []
        errors, left_out, unknown = RowErrors(self.path), Counter[str](), Counter[str]()
        lacking = Counter[str | int]()  # column -> rows without it
        columns: dict[str | int, None] = {}  # columns of those rows
        number = -1
        for number, (where, row) in enumerate(self._rows()):
            try:
                if isinstance(row, RowError):
                    raise row
                for column in self.needed:
                    if column not in row:
                        lacking[column] += 1
                        columns |= dict.fromkeys(row)
                examples.append(self._example(len(examples), number, row, where))
            except RowError as error:
                if isinstance(error, IncompleteRow) and self.source.incomplete == "keep":
                    left_out["have no text at all"] += 1
                elif (isinstance(error, IncompleteRow) and self.source.incomplete == "skip") or self._skips(error):
                    left_out["lack a text or a column"] += 1
                elif isinstance(error, UnlabelledRow) and self.source.unknown_labels == "skip":
                    left_out["have no label of the task"] += 1
                    unknown[error.value or ""] += 1
                else:
                    errors.add(error)
        for column, count in lacking.items():
            if count == number + 1:
                raise UserError(f"{self.path}{no_column(columns, column)}")
        errors.check()
        if not examples:
            raise UserError(
                f"{self.path}: no rows; expected at least one for task {self.task.name}, split {self.split}"
            )
        for what, count in left_out.items():
            values = ", ".join(f"{value!r} ({n})" for value, n in unknown.most_common(8)) if "label" in what else ""
            warn(f"{self.path}: left out {count} rows that {what}" + (f": {values}" if values else ""))
        self._check_size(examples, left_out.total(), warn)
        return examples

    def _rows(self) -> Iterator[tuple[str, Row | RowError]]:
        """(file and line, flat row or its error) of each row."""
        flatten = ROWS[self.source.rows] if self.source.rows is not None else None
        for path in self.files:
            checks_columns = flatten is None and format_of(path, self.source) != "jsonl"
            for where, row in scan(path, self.source):
                if isinstance(row, RowError) or flatten is None:
                    if checks_columns and not isinstance(row, RowError):
                        self._check_columns(row, where)
                        checks_columns = False
                    yield where, row
                    continue
                try:
                    flat = list(flatten(row))  # type: ignore[arg-type]
                except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
                    detail = f": not an object of {self.task.display_name}'s format ({type(error).__name__}: {error})"
                    yield where, RowError(where, "objects that are not of the task's format", detail)
                    continue
                for one in flat:
                    yield where, one  # type: ignore[misc]

    def _check_columns(self, row: Row, where: str) -> None:
        lacking = [column for column in self.needed if column not in row]
        if lacking:
            raise UserError(" ".join(f"{where}{no_column(row, column)}." for column in lacking).removesuffix("."))

    def _example(self, index: int, number: int, row: Row, where: str) -> Example:
        fields = {field: text_of(row, column, where, self.may_lack, self.own) for field, column in self.fields.items()}
        if self.source.incomplete == "keep" and not any(fields.values()):
            raise IncompleteRow(where, "rows without any text", ": all texts are empty")
        label = label_of(row, self.label_column, where) if self.labelled else None
        kept = kept_of(row, self.task, where)
        idx = kept.get("idx")
        if isinstance(idx, str) and not self.own and re.fullmatch(r"-?[0-9]{1,18}", idx):
            kept["idx"] = int(idx)  # row numbers are text in TSV and in some JSONL files
        return Example(self.task, index, fields, label, None, {"row": number} | kept if self.numbered else kept)

    def _skips(self, error: RowError) -> bool:
        """Whether to skip a ragged row as incomplete: only in GLUE's unquoted files, some of which have such rows. In
        quoted files and in a user's own, skipping would lose texts."""
        skips = self.source.incomplete == "skip" and self.labelled and not self.own
        return skips and self.source.quoting == "none" and error.kind == RAGGED

    def _check_size(self, examples: list[Example], left_out: int, warn: Callable[[str], None]) -> None:
        official, ranked = self.source.sizes.get(self.split), self.task.is_ranked
        found = (len(by_question(examples)) if ranked else len(examples)) + left_out
        if official is not None and found != official:
            what, name = "queries" if ranked else "rows", self.task.display_name
            warn(f"{self.path}: {found} {what}; the official {self.split} set of {name} has {official}")
