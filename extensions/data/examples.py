"""From benchmark files, generated rows or the user's own files to checked examples.

Every file is read and checked whole before training starts: an error names the file, the line, the field and what
was expected.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from extensions.common.errors import UserError
from extensions.data.example import Example, by_question
from extensions.data.faults import Fault, Faults
from extensions.data.generated import GENERATORS
from extensions.data.partition import hold_out, sample
from extensions.data.readers import (
    HUB,
    AbsentSplit,
    FaultyRow,
    IncompleteRow,
    SplitReader,
    UnlabelledRow,
    absent,
    download,
    find_files,
    kept_of,
    label_of,
    number_of,
    on_hub,
    open_split,
)
from extensions.prompts import dedup_key
from extensions.tasks import SPLITS, Task


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
    if task.source.split is not None and (split == "train" or task.source.is_held_out(split)):
        examples = _held_out(task, split, open_split(task, "train", root), warn)
    else:
        examples = _read(open_split(task, split, root), warn)
    return sample_candidate_pair(examples, seed) if task.is_ranked and split == "train" else examples


def load_training(
    task: Task,
    root: str | None,
    limit: int | None,
    seed: int = 0,
    warn: Callable[[str], None] = lambda message: None,
) -> list[Example]:
    """The rows that a run trains on: the training split, or a stratified sample of it.

    Args:
        limit: most rows (recipe key data.max_train_samples); None: all.
        seed: of the sample, and see `load_examples`.

    Raises:
        UserError: see `load_examples`.
    """
    return sample(load_examples(task, "train", root, seed, warn), limit, seed)


def _held_out(task: Task, split: str, reader: SplitReader, warn: Callable[[str], None]) -> list[Example]:
    """The rows of a split that is drawn from the training file, in its order."""
    states = tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in reader.files)
    examples, chosen, warnings = _drawn(reader, task.model_dump_json(), states)
    for message in warnings:
        warn(message)
    if not chosen[split]:
        raise UserError(
            f"task {task.name}: source.split leaves no rows for {split} of {len(examples)} rows, since no label has as "
            "many different texts as there are splits; give larger shares, more rows, or files"
        )
    return [replace(examples[i], index=k) for k, i in enumerate(chosen[split])]


@dataclass
class _Last:
    """The file that was read last: its splits are asked for one after the other."""

    key: Any = None
    found: Any = None


_last = _Last()


def _drawn(
    reader: SplitReader, task: str, states: tuple[Any, ...]
) -> tuple[list[Example], dict[str, Sequence[int]], list[str]]:
    """All rows of the training file, the places of each split's rows among them, and what there is to warn of.

    Args:
        task, states: what the result depends on.
    """
    if _last.key != (task, states):
        source, warnings = reader.task.source, list[str]()
        assert source.split is not None
        examples = _read(reader, warnings.append)
        shares = {name: getattr(source.split, name) for name in SPLITS if source.is_held_out(name)}
        chosen = hold_out(examples, shares, source.split.seed) if shares else {"train": range(len(examples))}
        _last.key, _last.found = (task, states), (examples, chosen, warnings)
    return _last.found


def _read(reader: SplitReader, warn: Callable[[str], None]) -> list[Example]:
    """All rows of the files of a split, checked; `kept` says the row of the file, from 0, where `index` may differ."""
    task, split, source = reader.task, reader.split, reader.source
    examples: list[Example] = []
    faults = Faults(reader.path)
    left_out: Counter[str] = Counter()
    unknown: Counter[str] = Counter()
    lacking: Counter[str | int] = Counter()  # columns that an object leaves out
    names: dict[str | int, None] = {}  # of those objects' own
    number = -1
    # Where rows may be left out or drawn, `index` is not the row of the file.
    numbered = reader.own and (source.split or source.incomplete != "error" or source.unknown_labels != "error")
    # skip: metrics and the evaluation server count every row
    may_lack = source.incomplete == "keep" or (source.incomplete == "skip" and split != "train")
    for number, (where, row) in enumerate(reader.rows()):
        try:
            if isinstance(row, Fault):
                raise FaultyRow(row)
            for column in reader.needed:
                if column not in row:
                    lacking[column] += 1
                    names |= dict.fromkeys(row)
            fields = reader.cells(row, where, may_lack)
            if source.incomplete == "keep" and not any(fields.values()):
                raise IncompleteRow(Fault(where, "rows without any text", ": all texts are empty"))
            label = label_of(row, reader.label_column, where) if reader.labelled else None
            kept = kept_of(row, task, where)
        except FaultyRow as error:
            if isinstance(error, IncompleteRow) and source.incomplete != "error":
                left_out["lack a text or a column" if source.incomplete == "skip" else "have no text at all"] += 1
            elif isinstance(error, UnlabelledRow) and source.unknown_labels == "skip":
                left_out["have no label of the task"] += 1
                unknown[error.fault.value or ""] += 1
            elif reader.passes_ragged(error.fault):
                left_out["lack a text or a column"] += 1
            else:
                faults.add(error.fault)
            continue
        if "idx" in kept and not reader.own:
            kept["idx"] = number_of(kept["idx"])
        if numbered:
            kept = {"row": number} | kept
        examples.append(Example(task, len(examples), fields, label, None, kept))
    for column, count in lacking.items():
        if count == number + 1:
            raise UserError(f"{reader.path}{absent(names, column)}")
    faults.check()
    if not examples:
        raise UserError(f"{reader.path}: no rows; expected at least one for task {task.name}, split {split}")
    for what, count in left_out.items():
        values = ", ".join(f"{value!r} ({n})" for value, n in unknown.most_common(8)) if "label" in what else ""
        warn(f"{reader.path}: left out {count} rows that {what}" + (f": {values}" if values else ""))
    found, official = len(by_question(examples)) if task.is_ranked else len(examples), source.sizes.get(split)
    found += left_out.total()
    if official is not None and found != official:
        what = "queries" if task.is_ranked else "rows"
        warn(f"{reader.path}: {found} {what}; the official {split} set of {task.display_name} has {official}")
    return examples


def sample_candidate_pair(examples: list[Example], seed: int) -> list[Example]:
    """For each question one right and one wrong candidate, chosen at random, as a pair of the same batch."""
    kept: list[Example] = []
    for number, group in enumerate(by_question(examples)):
        rng = np.random.default_rng([seed, number])
        for label in dict.fromkeys(example.label for example in group):
            options = [example for example in group if example.label == label]
            chosen = options[rng.integers(len(options))]
            kept.append(replace(chosen, index=len(kept), pair=str(number)))
    return kept


def subsample_evenly(examples: list[Example], limit: int | None) -> list[Example]:
    """About `limit` examples at equal distances, so that a sorted file still gives a fair sample.

    Questions stay whole: where several rows make one, as many questions are taken as fit in `limit`, at least one.
    """
    if limit is None or limit >= len(examples):
        return examples
    groups = by_question(examples)
    count = max(1, limit * len(groups) // len(examples))
    return [example for i in range(count) for example in groups[i * len(groups) // count]]


def has_split(task: Task, split: str) -> bool:
    """Whether a task has a split: by a generator, a file, a share of the training file, or on the hub.

    Raises:
        UserError: the task is one's own, and the hub, where its rows are, cannot be read.
    """
    source = task.source
    if source.generator is not None or split in source.files:
        return True
    return source.is_held_out(split) or on_hub(task, split)


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
        split = "train" if task.source.is_held_out(split) else split
        return split not in task.source.files or find_files(task, split, None if root == HUB else root) is not None
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
                found.setdefault(dedup_key(task, rows[place].fields), rows[place])
    return list(found.values())
