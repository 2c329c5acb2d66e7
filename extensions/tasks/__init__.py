"""The tasks, one declarative entry each; no other code refers to a task by name.

To add a task to the project, add an entry to the module of its suite; for your own data, write the same keys in a
recipe under `data.tasks`.
"""

from __future__ import annotations

import difflib

from extensions.common.errors import UserError
from extensions.tasks import generated, glue, superglue
from extensions.tasks.rules import PLACEHOLDER
from extensions.tasks.schema import GRID_POINTS, Parser, Task
from extensions.tasks.source import SPLITS, Hub, Source, SplitFormat, Submission
from extensions.tasks.words import cell_label, fold, is_blank, nfc, normalize_answer, number_text

__all__ = [
    "GRID_POINTS",
    "PLACEHOLDER",
    "SPLITS",
    "SUITES",
    "TASKS",
    "Hub",
    "Parser",
    "Source",
    "SplitFormat",
    "Submission",
    "Task",
    "cell_label",
    "find_task",
    "fold",
    "is_blank",
    "nfc",
    "normalize_answer",
    "number_text",
]

_ENTRIES = {"generated": generated.ENTRIES, "glue": glue.ENTRIES, "superglue": superglue.ENTRIES}
TASKS: dict[str, Task] = {
    entry["name"]: Task.model_validate({"suite": suite, **entry}) for suite in _ENTRIES for entry in _ENTRIES[suite]
}
SUITES: dict[str, list[Task]] = {
    suite: [task for task in TASKS.values() if task.suite == suite] for suite in ("glue", "superglue")
}


def find_task(name: str) -> Task:
    """The built-in task called `name`; `UserError` with the nearest names otherwise."""
    if name in TASKS:
        return TASKS[name]
    near = difflib.get_close_matches(name.lower().replace("-", ""), TASKS, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise UserError(f"unknown task {name!r}{hint} Built-in tasks: {', '.join(TASKS)}. Or describe your own task here.")
