"""From official GLUE files, generated rows or the user's own JSONL to checked examples, and their order.

Every file is read and checked whole before training starts: an error names the file, the line, the field and what
was expected.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from extensions.errors import UserError
from extensions.generated import GENERATORS
from extensions.prompts import CLOSE, parse_answer
from extensions.tasks import Task


@dataclass(frozen=True)
class Example:
    """One row of a task."""

    task: Task
    index: int  # row number in its split, from 0: seeds its sampling, so that results do not depend on batch layout
    fields: dict[str, str]
    label: str | None  # as it stands in the data; None where the split is unlabelled
    pair: str | None = None  # minimal pairs of the generated task share one: they are drawn into the same batch


def load_examples(task: Task, split: str, root: str | None) -> list[Example]:
    """All rows of `split`, checked.

    Args:
        root: folder of the task's files (recipe key data.root); None means that file names stand by themselves.

    Raises:
        UserError: a file is missing or empty, or a row is malformed.
    """
    if task.source.generator is not None:
        rows = GENERATORS[task.source.generator](split)
        return [
            Example(task, i, {f: row[f] for f in task.fields}, row["label"], row["pair"]) for i, row in enumerate(rows)
        ]
    path = _path(task, split, root)
    labelled = split not in task.source.unlabelled
    reader = _read_tsv if task.source.format == "tsv" else _read_jsonl
    examples: list[Example] = []
    for line, row in reader(path, task, labelled):
        where = f"{path}, line {line}"
        fields = {field: _text(row, task.column(field, split), where) for field in task.fields}
        label = _label(row, task, where) if labelled else None
        examples.append(Example(task, len(examples), fields, label))
    if not examples:
        raise UserError(f"{path}: no rows; expected at least one for task {task.name}, split {split}")
    return examples


def has_split(task: Task, split: str) -> bool:
    return task.source.generator is not None or split in task.source.files


def is_labelled(task: Task, split: str) -> bool:
    return has_split(task, split) and split not in task.source.unlabelled


def _path(task: Task, split: str, root: str | None) -> Path:
    if split not in task.source.files:
        raise UserError(f"task {task.name} has no {split} split: give its file as source.files.{split}")
    if root is None and task.suite != "own":
        raise UserError(
            f"task {task.name} needs data.root, the folder that holds {task.source.files[split]} of the official "
            f"download; for example data.root=path/to/{task.suite}"
        )
    if root is not None and not Path(root).is_dir():
        raise UserError(f"data.root: {root!r} is not a folder; it should hold {task.source.files[split]}")
    path = Path(root or ".") / task.source.files[split]
    if not path.is_file():
        raise UserError(f"{path}: no such file (task {task.name}, split {split}); check data.root and source.files")
    return path


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


def _read_tsv(path: Path, task: Task, labelled: bool) -> Iterator[tuple[int, dict[str | int, Any]]]:
    """Rows of a TSV file without quoting, as GLUE has it: a quote is a character like any other."""
    source = task.source
    header: list[str] | None = None
    expected = source.num_columns
    for number, line in _lines(path):
        cells = line.split("\t")
        if header is None and (source.header if labelled else source.unlabelled_header):
            header, expected = cells, len(cells)
            continue
        if expected is not None and len(cells) != expected:
            raise UserError(
                f"{path}, line {number}: {len(cells)} columns, expected {expected}"
                + (f" ({', '.join(header)})" if header else "")
                + f"; the line begins {line[:60]!r}"
            )
        yield number, dict(zip(header, cells, strict=True)) if header else dict(enumerate(cells))


def _read_jsonl(path: Path, task: Task, labelled: bool) -> Iterator[tuple[int, dict[str | int, Any]]]:
    for number, line in _lines(path):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: not valid JSON ({error}); expected one object a line") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: expected a JSON object, got {type(row).__name__}")
        yield number, row


def _cell(row: dict[str | int, Any], column: str | int, where: str) -> Any:
    if column not in row:
        have = ", ".join(map(str, row))
        raise UserError(f"{where}: no field {column!r}; the row has: {have[:200]}")
    return row[column]


def _text(row: dict[str | int, Any], column: str | int, where: str) -> str:
    value = _cell(row, column, where)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}, field {column!r}: expected text, got {value!r}")
    if any("\ud800" <= character <= "\udfff" for character in value):  # JSON can spell them, no tokenizer reads them
        raise UserError(f"{where}, field {column!r}: {value[:60]!r} holds half of a surrogate pair, which is not text")
    return value.strip()


def _label(row: dict[str | int, Any], task: Task, where: str) -> str:
    column = task.source.label
    assert column is not None, f"task {task.name} has a labelled split and no label column"
    value = _cell(row, column, where)
    text = str(value).lower() if isinstance(value, bool) else str(value).strip()
    if task.score_range is None:
        if text not in task.labels:
            allowed = ", ".join(map(repr, task.labels))
            raise UserError(f"{where}, field {column!r}: label {text!r} is not one of {allowed} (task {task.name})")
        return text
    number = isinstance(value, (str, int, float)) and not isinstance(value, bool)
    if not number or parse_answer(text + CLOSE, task) is None:  # what no answer could be equal to is no label
        low, high = task.score_range
        raise UserError(f"{where}, field {column!r}: expected a number from {low:g} to {high:g}, got {text!r}")
    return text


class BatchOrder:
    """Which examples make up the batch of a step: a pure function of (seed, step), so a resumed run needs no state.

    An epoch is one random order of all examples: tasks are mixed in proportion to their size. Minimal pairs stay
    next to each other. With `balanced`, the labels of each task take turns in that order, so that every batch
    holds about as many of each: a constant answer then earns the same in every batch, and no gradient.
    """

    def __init__(self, examples: list[Example], batch_size: int, seed: int, balanced: bool) -> None:
        self.examples, self.batch_size, self.seed, self.balanced = examples, batch_size, seed, balanced
        self._order = cache(self._shuffled)

    def batch(self, step: int) -> list[Example]:
        """The `batch_size` examples of step `step` (from 0)."""
        positions = range(step * self.batch_size, (step + 1) * self.batch_size)
        size = len(self.examples)
        return [self.examples[self._order(p // size)[p % size]] for p in positions]

    def _shuffled(self, epoch: int) -> list[int]:
        rng = np.random.default_rng([self.seed, epoch])
        groups: dict[str, list[int]] = {}
        for i, example in enumerate(self.examples):
            groups.setdefault(f"pair {example.task.name} {example.pair}" if example.pair else f"row {i}", []).append(i)
        units = list(groups.values())
        if not self.balanced:
            return [i for unit in rng.permutation(len(units)) for i in units[unit]]
        return _interleave(self.examples, units, rng)


def _interleave(examples: list[Example], units: list[list[int]], rng: np.random.Generator) -> list[int]:
    """A random order in which each class of units is spread evenly.

    The k-th of n units of a class gets the place (k + u) / n, u uniform in [0, 1), and places are sorted.
    """
    classes: dict[tuple[str, ...], list[list[int]]] = {}
    for unit in units:
        first = examples[unit[0]]
        labels = () if first.task.is_regression else sorted(str(examples[i].label) for i in unit)
        classes.setdefault((first.task.name, *labels), []).append(unit)
    placed: list[tuple[float, list[int]]] = []
    for members in classes.values():
        for rank, unit in enumerate(rng.permutation(len(members))):
            placed.append(((rank + rng.random()) / len(members), members[unit]))
    placed.sort(key=lambda pair: pair[0])
    return [i for _, unit in placed for i in unit]
