"""Task and gold label in one string: the `label` of OpenRLHF's prompt format, which reward files read."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any, get_args

from extensions.prompts.parser import is_label
from extensions.prompts.template import OPEN
from extensions.tasks import TASKS, Parser, Task

KIND = ("labels", "score_range", "multi_label", "no_label", "answer_match")  # keys of a task that a reward needs


def pack_label(task: Task, gold: str) -> str:
    """Task and gold label as JSON; the keys of a user's own task, and another parser, are included."""
    packed: dict[str, Any] = {"task": task.name, "gold": gold}
    if task.parser != "strict":
        packed["parser"] = task.parser
    if TASKS.get(task.name) != task.with_parser("strict"):
        packed |= {"labels": task.labels} if task.labels else {"score_range": task.score_range}
        if task.multi_label:
            packed |= {"multi_label": True, "no_label": task.no_label}
        elif task.labels and not task.is_exact:
            packed["answer_match"] = "keyword"
    return json.dumps(packed, ensure_ascii=False)


@lru_cache(maxsize=4096)
def unpack_label(packed: str) -> tuple[Task, str]:
    """Inverse of `pack_label`; ValueError for any other string."""
    try:
        record = json.loads(packed)
        task, gold = record["task"], record["gold"]
        if "labels" in record or "score_range" in record:
            kind = {key: record[key] for key in KIND if key in record}
            known = Task(name=task, description="-", question="{text}", **kind)
        else:
            known = TASKS[task]
        parser = record.get("parser", "strict")
        if parser not in get_args(Parser):
            raise ValueError(f"{parser!r} is no parser")
        known = known.with_parser(parser)
        if not isinstance(gold, str) or not is_label(gold, known):
            raise ValueError(f"{gold!r} is not a label of the task")
        return known, gold
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f'label {packed!r} was not written by extensions.prompts.pack_label ({{"task": ..., "gold": ...}})'
        ) from error


def response_text(query: str, prompt: str) -> str:
    """The response in OpenRLHF's `query`, the decoded prompt and response with special tokens.

    Decoding may add a BOS or change spaces, so the prompt may not be found verbatim. Then the response begins after as
    many opening tags as the prompt holds.
    """
    start = query.find(prompt)
    if start >= 0:
        return query[start + len(prompt) :]
    parts = query.split(OPEN, prompt.count(OPEN))
    return parts[-1] if len(parts) > prompt.count(OPEN) else query
