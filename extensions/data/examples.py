"""From benchmark files, generated rows or the user's own files to checked examples.

Every file is read and checked whole before training starts: an error names the file, the line, the field and what
was expected.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from extensions.data.readers import (
    HUB,
    AbsentSplit,
    IncompleteRow,
    download,
    find_files,
    kept_of,
    label_of,
    number_of,
    open_split,
    text_of,
)
from extensions.errors import UserError
from extensions.generated import GENERATORS
from extensions.prompts import told_apart
from extensions.tasks import Task


@dataclass(frozen=True)
class Example:
    """One row of a task."""

    task: Task
    index: int  # row number in its split, from 0: seeds its sampling, so that results do not depend on batch layout
    fields: dict[str, str]
    label: str | None  # as it stands in the data; None where the split is unlabelled
    pair: str | None = None  # rows that differ in one thing and in their label share one: drawn into the same batch
    kept: dict[str, Any] = field(default_factory=dict)  # columns of `source.keep`, such as official row numbers


def load_examples(
    task: Task,
    split: str,
    root: str | None,
    seed: int = 0,
    warn: Callable[[str], None] = lambda message: None,
) -> list[Example]:
    """All rows of `split`, checked.

    Args:
        root: folder of the official download, or of the hub's parquet files, or "hub" to download those (recipe key
            data.root); None means that file names stand by themselves.
        seed: of the candidates that a training query of ReCoRD keeps: one right, one wrong.
        warn: gets what is odd but no error: rows left out, another number of rows than the benchmark has.

    Raises:
        UserError: a file is missing or empty, or a row is malformed.
    """
    if task.source.generator is not None:
        rows = GENERATORS[task.source.generator](split)
        return [
            Example(task, i, {f: row[f] for f in task.fields}, row["label"], row["pair"]) for i, row in enumerate(rows)
        ]
    reader = open_split(task, split, root)
    examples: list[Example] = []
    skip = task.source.incomplete == "skip"
    may_lack = skip and split != "train"  # metrics and the evaluation server count every row
    for where, row in reader.rows():
        try:
            fields = {name: text_of(row, reader.columns.get(name, name), where, may_lack) for name in task.fields}
        except IncompleteRow:
            if not skip:
                raise
            reader.skipped += 1
            continue
        label = label_of(row, reader, where) if reader.labelled else None
        kept = kept_of(row, task, where)
        if "idx" in kept:
            kept["idx"] = number_of(kept["idx"])
        examples.append(Example(task, len(examples), fields, label, None, kept))
    if not examples:
        raise UserError(f"{reader.path}: no rows; expected at least one for task {task.name}, split {split}")
    if reader.skipped:
        warn(f"{reader.path}: left out {reader.skipped} rows that lack a text or a column")
    found, official = len(units(examples)) if task.is_ranked else len(examples), task.source.sizes.get(split)
    found += reader.skipped
    if official is not None and found != official:
        what = "queries" if task.is_ranked else "rows"
        warn(f"{reader.path}: {found} {what}; the official {split} set of {task.display_name} has {official}")
    return one_right_one_wrong(examples, seed) if task.is_ranked and split == "train" else examples


def units(examples: Sequence[Example]) -> list[list[Example]]:
    """The examples by question (`task.unit`), in order of first appearance; single ones where the task has no unit."""
    found: dict[tuple[Any, ...], list[Example]] = {}
    for example in examples:
        key = example.task.unit_of(example.kept) or (example.index,)
        found.setdefault((example.task.name, *key), []).append(example)
    return list(found.values())


def one_right_one_wrong(examples: list[Example], seed: int) -> list[Example]:
    """For each question one right and one wrong candidate, chosen at random, as a pair of the same batch."""
    kept: list[Example] = []
    for number, unit in enumerate(units(examples)):
        rng = np.random.default_rng([seed, number])
        for label in dict.fromkeys(example.label for example in unit):
            options = [example for example in unit if example.label == label]
            chosen = options[rng.integers(len(options))]
            kept.append(replace(chosen, index=len(kept), pair=str(number)))
    return kept


def spread(examples: list[Example], limit: int | None) -> list[Example]:
    """About `limit` examples at equal distances, so that a sorted file still gives a fair sample.

    Questions stay whole: where several rows make one, as many questions are taken as fit in `limit`, at least one.
    """
    if limit is None or limit >= len(examples):
        return examples
    groups = units(examples)
    count = max(1, limit * len(groups) // len(examples))
    return [example for i in range(count) for example in groups[i * len(groups) // count]]


def has_split(task: Task, split: str) -> bool:
    return task.source.generator is not None or split in task.source.files


def check_trainable(tasks: Sequence[Task]) -> None:
    """UserError if none of the tasks has a training split."""
    if not any(has_split(task, "train") for task in tasks):
        names = ", ".join(task.name for task in tasks)
        raise UserError(f"data.tasks: {names} can only be evaluated; add a task that has a training split")


def is_labelled(task: Task, split: str) -> bool:
    return has_split(task, split) and split not in task.source.unlabelled


def is_present(task: Task, split: str, root: str | None) -> bool:
    """Whether the files of a split are there.

    Raises:
        UserError: `root` is the hub, and it cannot be read.
    """
    if not has_split(task, split) or task.source.generator is not None:
        return has_split(task, split)
    if root != HUB or task.suite == "own":
        return find_files(task, split, None if root == HUB else root) is not None
    try:
        return bool(download(task, split))
    except AbsentSplit:
        return False


def demonstrations(
    task: Task, train: Sequence[Example], count: int, kind: Literal["balanced", "random"], seed: int
) -> list[Example]:
    """Training rows to show before a query (section 5.2 of the paper): up to `count`, drawn by `seed`.

    No two have the same texts, and where several rows make one question (MultiRC, ReCoRD) each is about another text.

    Args:
        train: of the task, or of the one that teaches it.
        kind: "balanced" takes the labels in turn (of a regression the lower and upper halves of its scores), "random"
            any rows.
    """
    rng = np.random.default_rng([seed, zlib.crc32(task.name.encode())])
    classes: dict[Any, list[Example]] = {}
    middle = sum(task.score_range) / 2 if task.score_range else 0
    for row in rng.permutation(len(train)):
        label = train[row].label
        kind_of = float(str(label)) > middle if task.is_regression else label
        classes.setdefault(kind_of if kind == "balanced" else "any", []).append(train[row])
    turns = list(classes.values())
    found: dict[tuple[str, ...], Example] = {}
    for place in range(max(map(len, turns), default=0)):
        for rows in turns:
            if place < len(rows) and len(found) < count:
                found.setdefault(told_apart(task, rows[place].fields), rows[place])
    return list(found.values())
