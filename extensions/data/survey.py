"""What a folder of benchmark files holds, and how long its prompts are: the tables of `nlu tasks`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from extensions.common.errors import UserError
from extensions.data import is_labelled, is_present, load_examples, subsample_evenly
from extensions.prefix.tree import common_prefix
from extensions.prompts import PromptEncoder
from extensions.tasks import SPLITS, Task

SAMPLE = 500  # rows whose prompts are counted in tokens


@dataclass(frozen=True)
class SplitSurvey:
    """One split of one task, as it was found."""

    task: Task
    split: str
    rows: int | None  # None: could not be read
    labels: dict[str, int]  # of a classification task, by the word that the model should write
    problems: list[str]


@dataclass(frozen=True)
class Lengths:
    """Prompt tokens of a task by one tokenizer, over `SAMPLE` rows at equal distances."""

    mean: float
    p95: float
    prefix_share: float  # of the mean prompt, that all prompts begin with


def survey(task: Task, root: str | None) -> list[SplitSurvey]:
    """Every split of `task` that is there; a split that cannot be read has its error as its problem."""
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
    """Prompt lengths by each encoder, of the training split if it is there, else of the first that is; None if none."""
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
