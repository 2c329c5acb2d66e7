"""The tables of `nlu tasks`: rows and labels of the benchmark files in a folder, and the lengths of their prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from extensions.common.errors import UserError
from extensions.data.examples import load_examples
from extensions.data.locate import is_labelled, is_present
from extensions.data.sampling import subsample_evenly
from extensions.prefix.tree import common_prefix
from extensions.prompts import PromptEncoder
from extensions.tasks import SPLITS, Task

SAMPLE = 500  # rows whose prompts are tokenized


@dataclass(frozen=True)
class SplitSurvey:
    """One split of one task."""

    task: Task
    split: str
    rows: int | None  # None: could not be read
    labels: dict[str, int]  # of a classification task: answer -> rows
    problems: list[str]


@dataclass(frozen=True)
class Lengths:
    """Prompt tokens of a task by one tokenizer, over `SAMPLE` rows at equal distances."""

    mean: float
    p95: float
    prefix_share: float  # common prefix of all prompts / mean prompt


def survey(task: Task, root: str | None) -> list[SplitSurvey]:
    """Every split of `task` whose files exist; if one cannot be read, its problem is the error."""
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
    """Prompt lengths by each encoder, of the first split that exists (training, validation, test); None if none."""
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
