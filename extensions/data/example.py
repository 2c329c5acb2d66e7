"""One row of a task, and groups of rows that belong to one question."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from extensions.tasks import Task


@dataclass(frozen=True)
class Example:
    """One row of a task."""

    task: Task
    index: int  # row number in its split, from 0; seeds its sampling, so results do not depend on the batch layout
    fields: dict[str, str]
    label: str | None  # as in the data; None if the split is unlabelled
    pair: str | None = None  # id of a minimal pair, or of a query's two candidates; both are in the same batch
    kept: dict[str, Any] = field(default_factory=dict)  # columns of `source.keep`, such as official row numbers


def by_question(examples: Sequence[Example]) -> list[list[Example]]:
    """The examples by question (`task.group_by`), in order of first appearance; without `group_by`, one each."""
    found: dict[tuple[Any, ...], list[Example]] = {}
    for example in examples:
        key = example.task.group_of(example.kept) or (example.index,)
        found.setdefault((example.task.name, *key), []).append(example)
    return list(found.values())
