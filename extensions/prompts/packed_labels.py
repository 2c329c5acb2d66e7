"""The `label` string of OpenRLHF's prompt format: task and gold answer, as the reward files read them."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

from extensions.prompts.parser import is_label
from extensions.prompts.template import OPEN
from extensions.tasks import TASKS, Task

KIND = ("labels", "score_range", "multi_label", "no_label", "answer_match")  # what a reward needs to know of a task


def pack_label(task: Task, gold: str) -> str:
    """Task and gold label in one string: the `label` of OpenRLHF's prompt format, read back by the built-in reward."""
    packed: dict[str, Any] = {"task": task.name, "gold": gold}
    if TASKS.get(task.name) != task:  # the user's own: the string must carry what the reward needs to know
        packed |= {"labels": task.labels} if task.labels else {"score_range": task.score_range}
        if task.multi_label:
            packed |= {"multi_label": True, "no_label": task.no_label}
        elif task.labels and not task.is_exact:
            packed["answer_match"] = "keyword"
    return json.dumps(packed, ensure_ascii=False)


@lru_cache(maxsize=4096)
def unpack_label(packed: str) -> tuple[Task, str]:
    """The task and the gold label of `pack_label`'s string; ValueError if it is not one."""
    try:
        record = json.loads(packed)
        task, gold = record["task"], record["gold"]
        if "labels" in record or "score_range" in record:
            kind = {key: record[key] for key in KIND if key in record}
            known = Task(name=task, description="-", question="{text}", **kind)
        else:
            known = TASKS[task]
        if not isinstance(gold, str) or not is_label(gold, known):
            raise ValueError(f"{gold!r} is no label of the task")
        return known, gold
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"label {packed!r} is not of the form that extensions.prompts.pack_label writes "
            '({"task": ..., "gold": ...})'
        ) from error


def response_text(query: str, prompt: str) -> str:
    """The response in OpenRLHF's `query`, the decoded prompt and response with special tokens.

    Decoding may add a BOS or change spaces before the prompt's end, so where the prompt is not found verbatim the
    opening tags are counted: the response begins after as many as the prompt holds.
    """
    start = query.find(prompt)
    if start >= 0:
        return query[start + len(prompt) :]
    parts = query.split(OPEN, prompt.count(OPEN))
    return parts[-1] if len(parts) > prompt.count(OPEN) else query
