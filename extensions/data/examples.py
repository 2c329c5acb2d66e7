"""The examples of a task: from benchmark files, generated rows or the user's own files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from extensions.common.errors import UserError
from extensions.data.example import Example
from extensions.data.generated import GENERATORS
from extensions.data.locate import files_of
from extensions.data.partition import hold_out, stratified_sample
from extensions.data.reader import SplitReader
from extensions.data.sampling import sample_candidate_pair
from extensions.tasks import SPLITS, Task

Warn = Callable[[str], None]


def load_examples(
    task: Task, split: str, root: str | None, seed: int = 0, warn: Warn = lambda message: None
) -> list[Example]:
    """All rows of `split`, checked.

    Args:
        root: folder of the official download, or of the hub's parquet files, or "hub" to download those (recipe key
            data.root); None: file names are relative to the current folder.
        seed: seed for drawing one right and one wrong candidate per training query of ReCoRD.
        warn: called for non-fatal findings: rows left out, a size that differs from the benchmark's.

    Raises:
        UserError: a file is missing or empty, or a row is malformed.
    """
    if task.source.generator is not None:
        rows = GENERATORS[task.source.generator](split)
        return [
            Example(task, i, {f: row[f] for f in task.fields}, row["label"], row["pair"]) for i, row in enumerate(rows)
        ]
    if task.source.split is not None and (split == "train" or task.source.is_held_out(split)):
        examples = _held_out(task, split, root, warn)
    else:
        examples = SplitReader(task, split, *files_of(task, split, root)).read(warn)
    return sample_candidate_pair(examples, seed) if task.is_ranked and split == "train" else examples


def load_training(
    task: Task, root: str | None, limit: int | None, seed: int = 0, warn: Warn = lambda message: None
) -> list[Example]:
    """The rows that a run trains on: the training split, or a stratified sample of it.

    Args:
        limit: maximum number of rows (recipe key data.max_train_samples); None: all.
        seed: seed of the sample and of `load_examples`.

    Raises:
        UserError: see `load_examples`.
    """
    return stratified_sample(load_examples(task, "train", root, seed, warn), limit, seed)


_last: dict[Any, Any] = {}  # cache of the last training file; its splits are loaded in succession


def _held_out(task: Task, split: str, root: str | None, warn: Warn) -> list[Example]:
    """The rows of a split that is held out of the training file, in file order."""
    reader = SplitReader(task, "train", *files_of(task, "train", root))
    states = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in reader.files]
    key = (task.model_dump_json(), *states)
    if key not in _last:
        warnings: list[str] = []
        examples = reader.read(warnings.append)
        shares = {name: getattr(task.source.split, name) for name in SPLITS if task.source.is_held_out(name)}
        assert task.source.split is not None
        chosen = hold_out(examples, shares, task.source.split.seed) if shares else {"train": range(len(examples))}
        _last.clear()
        _last[key] = examples, chosen, warnings
    examples, chosen, warnings = _last[key]
    for message in warnings:
        warn(message)
    if not chosen[split]:
        raise UserError(
            f"task {task.name}: source.split leaves no rows for {split} of {len(examples)} rows, since no label has as "
            "many different texts as there are splits; give larger shares, more rows, or files"
        )
    return [replace(examples[i], index=k) for k, i in enumerate(chosen[split])]
