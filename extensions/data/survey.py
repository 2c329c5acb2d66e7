"""The tables of `nlu tasks`: rows and labels of the benchmark files in a folder, and the lengths of their prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from rich.table import Table

from extensions.common.errors import UserError
from extensions.data.examples import load_examples
from extensions.data.locate import is_labelled, is_present, looked_for
from extensions.data.sampling import subsample_evenly
from extensions.prefix.tree import common_prefix
from extensions.prompts import PromptEncoder
from extensions.tasks import SPLITS, SUITES, TASKS, Task

SAMPLE = 500  # rows per task whose prompts are tokenized


@dataclass(frozen=True)
class SplitSurvey:
    """One split of one task."""

    task: Task
    split: str
    rows: int | None  # None: could not be read
    labels: dict[str, int]  # answer -> rows; classification only
    problems: list[str]


@dataclass(frozen=True)
class Lengths:
    """Prompt tokens of a task by one tokenizer, over `SAMPLE` evenly spaced rows."""

    mean: float
    p95: float
    prefix_share: float  # common prefix of all prompts / mean prompt


def survey(task: Task, root: str | None) -> list[SplitSurvey]:
    """Every split of `task` whose files exist; for an unreadable one, `problems` holds the error."""
    found = []
    for split in SPLITS:
        if not is_present(task, split, root):
            continue
        problems: list[str] = []
        try:
            examples = load_examples(task, split, root, warn=problems.append)
        except UserError as error:
            found.append(SplitSurvey(task, split, None, {}, [str(error)]))
            continue
        labels: dict[str, int] = {}
        if is_labelled(task, split) and not task.is_regression:
            counts = Counter(example.label for example in examples)
            labels = {task.answer(label): counts[label] for label in task.labels}
        found.append(SplitSurvey(task, split, len(examples), labels, problems))
    return found


def lengths(task: Task, root: str | None, encoders: Sequence[PromptEncoder]) -> list[Lengths] | None:
    """Prompt lengths by each encoder, of the first split that exists (training, validation, test); None without any."""
    split = next((split for split in SPLITS if is_present(task, split, root)), None)
    if split is None:
        return None
    examples = subsample_evenly(load_examples(task, split, root), SAMPLE)
    found = []
    for encoder in encoders:
        prompts = [encoder.encode(task, example.fields)[0] for example in examples]
        counts = np.array([len(prompt) for prompt in prompts])
        shared = common_prefix(prompts) if len(prompts) > 1 else 0
        found.append(Lengths(float(counts.mean()), float(np.percentile(counts, 95)), shared / float(counts.mean())))
    return found


def task_table() -> Table:
    """The built-in tasks and their official sizes."""
    table = Table("name", "suite", "fields", "answers", "metrics", "train / validation / test rows")
    for task in TASKS.values():
        answers = " / ".join(words[0] for words in task.labels.values())
        if task.score_range is not None:
            answers = "{:g} to {:g}".format(*task.score_range)
        sizes = " / ".join(str(task.source.sizes.get(split, "-")) for split in SPLITS) if task.source.sizes else ""
        table.add_row(task.name, task.suite, ", ".join(task.fields), answers, ", ".join(task.metrics), sizes)
    return table


def survey_tables(root: str, encoders: Mapping[str, PromptEncoder]) -> Iterator[Table | str]:
    """Contents and problems of a folder, and prompt lengths by each encoder, to be printed without markup."""
    contents = Table("task", "split", "rows", "labels", title="What was found", title_justify="left")
    columns = [f"{name}: mean, p95 tokens; prefix" for name in encoders]
    prompts = Table("task", *columns, title="Prompts", title_justify="left")
    absent, problems = [], []
    for task in (task for suite in SUITES.values() for task in suite):
        found = survey(task, root)
        if not found:
            absent.append(f"{task.name}: no {' or '.join(map(str, looked_for(task, root)))}")
        for k, part in enumerate(found):
            labels = ", ".join(f"{word} {count}" for word, count in part.labels.items())
            rows = "-" if part.rows is None else str(part.rows)
            contents.add_row(task.name if k == 0 else "", part.split, rows, labels)
            problems += part.problems
        if found and all(part.rows is not None for part in found):
            measured = lengths(task, root, list(encoders.values())) or []
            prompts.add_row(task.name, *(f"{m.mean:.0f}, {m.p95:.0f}; {m.prefix_share:.0%}" for m in measured))
    yield contents
    if absent:
        yield "\n".join(["not there:", *(f"  {line}" for line in absent)])
    yield from (f"- {problem}" for problem in problems)
    yield prompts
