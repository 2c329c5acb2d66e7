"""What is odd about data that load: rows on both sides of a split, doubled rows, classes without rows, texts cut."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby

from extensions.data.example import Example
from extensions.data.partition import label_set
from extensions.prompts import SPECIAL_TOKENS, PromptEncoder
from extensions.tasks import PLACEHOLDER, Task, fold

COUNTED = 2000  # rows of a task that are tokenized at most, to say how many are cut


def check_rows(
    task: Task, train: Sequence[Example], others: Mapping[str, Sequence[Example]], warn: Callable[[str], None]
) -> None:
    """Warn of what makes a score too good or a training poor, counted, a line for each kind.

    Args:
        train: the rows that are trained on.
        others: split -> its rows.
    """
    if not train or task.source.generator is not None:
        return
    name = task.display_name
    labels: dict[int, set[str]] = {}  # of each row, by the hash of its texts
    doubled = 0
    for example in train:
        key, label = _key(example), str(example.label)
        doubled += label in labels.get(key, ())
        labels.setdefault(key, set()).add(label)
    conflicting = sum(len(labels[_key(example)]) > 1 for example in train)
    for split, rows in others.items():
        keys = {_key(example) for example in rows}
        shared = sum(_key(example) in keys for example in train)
        if shared:
            remedy = "; take them out of one, or let source.split draw the split" if task.suite == "own" else ""
            warn(f"{name}: {shared} of {len(train)} training rows also stand in {split} (equal texts){remedy}")
    if doubled:
        warn(f"{name}: {doubled} of {len(train)} training rows repeat another one, with its label")
    if conflicting:
        warn(f"{name}: {conflicting} of {len(train)} training rows have the texts of another one and another label")
    if not task.is_regression:
        _check_classes(task, train, others, warn)


def _check_classes(
    task: Task, train: Sequence[Example], others: Mapping[str, Sequence[Example]], warn: Callable[[str], None]
) -> None:
    name = task.display_name
    for split, rows in {"train": train, **others}.items():
        counts = Counter(label for row in rows if row.label is not None for label in label_set(task, row.label))
        lacking = [label for label in task.labels if not counts[label]]
        if len(counts) == 1:
            warn(f"{name}: all {len(rows)} rows of {split} have the label {next(iter(counts))!r}")
        elif counts and lacking:
            warn(f"{name}: no row of {split} has the label {', '.join(map(repr, lacking))}")


def _key(example: Example) -> int:
    return hash(tuple(fold(text) for text in example.fields.values()))


def check_lengths(encoder: PromptEncoder, examples: Sequence[Example], what: str, warn: Callable[[str], None]) -> None:
    """Warn of how many rows lose the end of a text, since their prompt is too long.

    Args:
        examples: rows of one or more tasks, those of a task after each other.
        what: they are, such as "training rows".
    """
    for _, group in groupby(examples, key=lambda example: example.task.name):
        rows = list(group)
        task = rows[0].task
        # A token holds at least a byte: most rows need no tokenizer.
        frame = len(encoder.text(task, dict.fromkeys(task.fields, "")).encode()) + SPECIAL_TOKENS
        uses = Counter(match[1] for match in PLACEHOLDER.finditer(task.question) if match[1])
        long = [
            row
            for row in rows
            if frame + sum(uses[name] * len(text.encode()) for name, text in row.fields.items()) > encoder.max_tokens
        ]
        looked_at = _some(long)
        cut = sum(encoder.is_cut(task, row.fields) for row in looked_at)
        if cut:
            count = f"{cut}" if len(looked_at) == len(long) else f"about {round(cut * len(long) / len(looked_at))}"
            texts = task.truncate or task.fields
            which = f"the longest text ({', '.join(texts)})" if len(texts) > 1 else texts[0]
            warn(
                f"{task.display_name}: {count} of {len(rows)} {what} are cut to {encoder.max_tokens} tokens "
                f"(prompt.max_tokens, the model's context): the end of {which} is lost"
            )


def _some(rows: Sequence[Example]) -> Sequence[Example]:
    return rows if len(rows) <= COUNTED else [rows[i * len(rows) // COUNTED] for i in range(COUNTED)]
