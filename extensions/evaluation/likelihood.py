"""Answers by likelihood: which answers of a task are compared, their log-probabilities, and the most probable one.

The candidates of a classification are its labels, of a regression numbers at equal distances, of a multi-label task
sets of labels. An answer may be written in several ways (the words of a label), which are summed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from extensions.common.errors import UserError
from extensions.prefix.tree import Sample
from extensions.prompts import CLOSE, PromptEncoder
from extensions.rollout.sampler import Sampler
from extensions.tasks import Task, number_text

SCORES = 11  # numbers of a regression's range that are compared, at equal distances
MOST_SETS = 64  # label sets of a multi-label task that are all compared; beyond, those that the training rows have
NEAR = 0.1  # share of a regression's range that counts as the answer, for its confidence


@dataclass(frozen=True)
class Candidates:
    """The C answers of a task that are compared."""

    task: Task
    forms: dict[str, list[str]]  # label, number or label set (`Task.joined`) -> texts that mean it, canonical first

    @property
    def keys(self) -> list[str]:
        return list(self.forms)


@dataclass(frozen=True)
class Decision:
    """The answer to one row."""

    text: str  # as the model would write it, with the closing tag
    answer: str | float  # as `parse_answer` gives it: a label, a score, or a label set joined by ", "
    confidence: float  # see `confidence_of`
    probabilities: dict[str, float]  # by label or number; of a multi-label task the marginal probability of each label


def candidates(task: Task, seen: Iterable[str] = ()) -> Candidates:
    """The answers of a task.

    Args:
        seen: label sets of the training rows, which a multi-label task of more than `MOST_SETS` sets needs: compared
            are these, each label by itself, and none.
    """
    if task.score_range is not None:
        return Candidates(task, {number: [number] for number in _grid(task)})
    if not task.multi_label:
        return Candidates(task, dict(task.labels))
    return Candidates(task, {one: [task.answer(one)] for one in label_sets(task, seen)})


def label_sets(task: Task, seen: Iterable[str] = ()) -> list[str]:
    """The label sets of a multi-label task that are compared, each once; see `candidates`."""
    labels = list(task.labels)
    if 2 ** len(labels) <= MOST_SETS:
        return [task.joined(one) for size in range(len(labels) + 1) for one in combinations(labels, size)]
    return list(dict.fromkeys((task.joined(()), *labels, *seen)))


def seen_sets(task: Task, labels: Iterable[str | None]) -> list[str]:
    """The different label sets of a multi-label task's rows, in order of first appearance; of other tasks none."""
    return list(dict.fromkeys(label for label in labels if label is not None)) if task.multi_label else []


def _grid(task: Task) -> list[str]:
    """Numbers of a regression's range as the task writes them; fewer than `SCORES` where its decimals allow no more."""
    assert task.score_range is not None
    low, high = task.score_range
    values = [low + (high - low) * k / (SCORES - 1) for k in range(SCORES)]
    decimals = grid_decimals(task)
    return list(dict.fromkeys(number_text(value, decimals) for value in values))


def grid_decimals(task: Task) -> int:
    """Decimals of the compared numbers: the task's; where it names none, as many as tell them apart, at least one."""
    assert task.score_range is not None
    if task.score_decimals is not None:
        return task.score_decimals
    low, high = task.score_range
    values = [low + (high - low) * k / (SCORES - 1) for k in range(SCORES)]
    return next((d for d in range(1, 6) if len({f"{value:.{d}f}" for value in values}) == SCORES), 6)


def log_likelihoods(
    compared: Candidates, prompts: Sequence[tuple[list[int], str]], encoder: PromptEncoder, sampler: Sampler
) -> tuple[Tensor, Tensor]:
    """Log-probability of each answer after each prompt, as text with the closing tag.

    The forms of all answers to one prompt are in one pack, so that the prompt is computed once.

    Args:
        prompts: token ids and text of each, from `encoder`.

    Returns:
        (rows, C) float32 summed over the forms of each answer, and (rows, C) of the canonical forms alone.

    Raises:
        UserError: a log-probability is NaN or infinite.
    """
    forms = [form for forms in compared.forms.values() for form in forms]
    samples = [Sample(ids, encoder.answer_ids(list(ids), text, form)) for ids, text in prompts for form in forms]
    found = sampler.logprobs(samples, together=len(forms)).view(len(prompts), len(forms))
    if not bool(torch.isfinite(found).all()):
        raise UserError(
            f"{compared.task.name}: the model's logits are NaN or infinite, so its answers mean nothing. Its file is "
            "broken, its adapter has diverged, or its dtype overflows: try model.dtype=float32"
        )
    parts = found.split([len(forms) for forms in compared.forms.values()], dim=1)
    return torch.stack([part.logsumexp(1) for part in parts], 1), torch.stack([part[:, 0] for part in parts], 1)


def answer_probabilities(logprobs: Tensor, temperature: float = 1.0) -> Tensor:
    """(rows, C) log-probabilities of `log_likelihoods` as probabilities in float64, on the CPU.

    Args:
        temperature: that divides them (calibration).
    """
    return (logprobs.double() / temperature).softmax(-1).cpu()


def decide(compared: Candidates, chances: Tensor, shown: Tensor | None = None) -> list[Decision]:
    """The answer to each row.

    The most probable candidate; of a regression of one's own the probability-weighted mean of the numbers, rounded to
    the task's decimals, one more than its numbers have where it names none. STS-B keeps the most probable number.

    Args:
        chances: (rows, C) of `answer_probabilities`, which decide.
        shown: the same after calibration, for confidence and probabilities, so that it changes no answer.
    """
    return [_decide(compared, row, own) for row, own in zip(chances, chances if shown is None else shown, strict=True)]


def confidence_of(compared: Candidates, chances: Tensor, answer: str | float) -> float:
    """Probability of an answer as `parse_answer` gives it; of a score, of the numbers within `NEAR` of the range of it.

    Args:
        chances: (C,) of one row.
    """
    task = compared.task
    if task.score_range is not None:
        grid = torch.tensor([float(key) for key in compared.keys], dtype=torch.float64)
        near = (grid - float(answer)).abs() <= NEAR * (task.score_range[1] - task.score_range[0]) * (1 + 1e-9)
        return float(chances[near].sum())
    place = label_index(compared, str(answer))
    return 0.0 if place is None else float(chances[place])  # None: a label set that no training row has


def label_index(compared: Candidates, label: str) -> int | None:
    """Place of a gold label among the compared answers: of a regression the nearest number; None if it is none."""
    task = compared.task
    if task.score_range is not None:
        return min(range(len(compared.keys)), key=lambda k: abs(float(compared.keys[k]) - float(label)))
    return compared.keys.index(label) if label in compared.forms else None


def _decide(compared: Candidates, chances: Tensor, shown: Tensor) -> Decision:
    task, keys = compared.task, compared.keys
    best = int(chances.argmax())
    text: str = keys[best]
    answer: str | float = text
    probabilities = dict(zip(keys, shown.tolist(), strict=True))
    if task.score_range is not None:
        if task.suite == "own":
            decimals = grid_decimals(task) + 1 if task.score_decimals is None else task.score_decimals
            mean = sum(chance * float(key) for key, chance in zip(keys, chances.tolist(), strict=True))
            text = number_text(mean, decimals)
        answer = float(text)
    else:
        text = task.answer(text)
    if task.multi_label:
        of_sets = [(chance, task.label_set(one)) for one, chance in probabilities.items()]
        probabilities = {label: sum(chance for chance, one in of_sets if label in one) for label in task.labels}
    return Decision(f"{text}{CLOSE}", answer, confidence_of(compared, shown, answer), probabilities)
