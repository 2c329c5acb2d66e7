"""The tasks: one declarative entry each.

To add a task to the project, add an entry to the module of its suite here; to use your own data, write the same keys
in a recipe under `data.tasks`. Nothing else in the code knows a task by name.
"""

from __future__ import annotations

import difflib

from extensions.common.errors import UserError
from extensions.tasks import generated, glue, superglue
from extensions.tasks.schema import PLACEHOLDER, Task
from extensions.tasks.source import SPLITS, Hub, Source, SplitFormat, Submission
from extensions.tasks.words import cell_label, fold, is_blank, nfc, normalize_answer, number_text

__all__ = [
    "PLACEHOLDER",
    "SPLITS",
    "SUITES",
    "TASKS",
    "Hub",
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

_ENTRIES = (*generated.ENTRIES, *glue.ENTRIES, *superglue.ENTRIES)
TASKS: dict[str, Task] = {entry["name"]: Task.model_validate(entry) for entry in _ENTRIES}
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
