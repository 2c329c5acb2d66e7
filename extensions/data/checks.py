"""Warnings about valid data: equal rows in two splits, duplicates, classes without rows, truncated prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby

from extensions.data.example import Example
from extensions.data.partition import labels_of
from extensions.data.sampling import evenly
from extensions.prompts import SPECIAL_TOKENS, PromptEncoder
from extensions.tasks import PLACEHOLDER, Task, fold

NAMED = 3  # truncated rows that are named
MAX_TOKENIZED = 2000  # rows of a task that are tokenized to estimate how many are truncated


def check_rows(
    task: Task, train: Sequence[Example], others: Mapping[str, Sequence[Example]], warn: Callable[[str], None]
) -> None:
    """Warn of leaked, duplicate and contradictory rows and of missing classes, with counts, one line per kind.

    Args:
        train: training rows.
        others: split -> its rows.
    """
    if not train or task.source.generator is not None:
        return
    name, keys = task.display_name, [_key(example) for example in train]
    labels: dict[int, set[str]] = {}  # hash of the texts -> labels of the rows with these texts
    repeated = 0
    for key, example in zip(keys, train, strict=True):
        known = labels.setdefault(key, set())
        repeated += str(example.label) in known
        known.add(str(example.label))
    conflicting = sum(len(labels[key]) > 1 for key in keys)
    for split, rows in others.items():
        in_split = {_key(example) for example in rows}
        shared = sum(key in in_split for key in keys)
        if shared:
            remedy = "; remove them from one, or let source.split draw the split" if task.suite == "own" else ""
            warn(f"{name}: {shared} of {len(train)} training rows are also in {split} (equal texts){remedy}")
    if repeated:
        warn(f"{name}: {repeated} of {len(train)} training rows repeat another one, with its label")
    if conflicting:
        warn(f"{name}: {conflicting} of {len(train)} training rows have the texts of another one and another label")
    for split, rows in {} if task.is_regression else {"train": train, **others}.items():
        counts = Counter(label for row in rows if row.label is not None for label in labels_of(row))
        lacking = [label for label in task.labels if not counts[label]]
        if len(counts) == 1:
            warn(f"{name}: all {len(rows)} rows of {split} have the label {next(iter(counts))!r}")
        elif counts and lacking:
            warn(f"{name}: no row of {split} has the label {', '.join(map(repr, lacking))}")


def _key(example: Example) -> int:
    """Equal for equal texts; in a user's own task, up to case, whitespace and Unicode normal form."""
    texts = example.fields.values()
    return hash(tuple(map(fold, texts) if example.task.suite == "own" else texts))


def check_lengths(encoder: PromptEncoder, examples: Sequence[Example], what: str, warn: Callable[[str], None]) -> None:
    """Warn of the rows whose text is truncated because the prompt is too long: their number, and the first ones.

    Args:
        examples: rows of one or more tasks; the rows of a task are consecutive.
        what: the name of these rows in the warning, such as "training rows".
    """
    for _, group in groupby(examples, key=lambda example: example.task.name):
        rows = list(group)
        task = rows[0].task
        # A token holds at least one byte, so short rows need no tokenizer.
        frame = len(encoder.text(task, dict.fromkeys(task.fields, "")).encode()) + SPECIAL_TOKENS
        uses = Counter(match[1] for match in PLACEHOLDER.finditer(task.question) if match[1])
        long = [
            row
            for row in rows
            if frame + sum(uses[name] * len(text.encode()) for name, text in row.fields.items()) > encoder.max_tokens
        ]
        tokenized = evenly(long, MAX_TOKENIZED)
        lengths = [(row, encoder.length(task, row.fields)) for row in tokenized]
        too_long = [(row, tokens) for row, tokens in lengths if tokens > encoder.max_tokens]
        if cut := len(too_long):
            exact = len(tokenized) == len(long)
            count = f"{cut}" if exact else f"about {round(cut * len(long) / len(tokenized))}"
            texts = task.truncate or task.fields
            which = f"the longest text ({', '.join(texts)})" if len(texts) > 1 else texts[0]
            warn(
                f"{task.display_name}: {count} of {len(rows)} {what} are cut to {encoder.max_tokens} tokens "
                f"(prompt.max_tokens, the model's context): the end of {which} is lost, of row "
                + ", ".join(f"{row.index} ({tokens} tokens)" for row, tokens in too_long[:NAMED])
                + (", ..." if cut > NAMED else "")
            )
