"""Answers by likelihood: the candidate answers of a task, their log-probabilities, and the most probable one.

The candidates of a classification are its labels, those of a regression equidistant scores, those of a multi-label task
label sets.
An answer with several words gets the sum of their probabilities. The word that the prompt asks for counts in its
surface forms, with and without the space before it and before the closing tag; the others in the instructed form: of
SmolLM2's zero-shot probability on CoLA and RTE, their other forms have less than 1e-5.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, combinations

import torch
from torch import Tensor

from extensions.common.errors import UserError
from extensions.data import Example
from extensions.prefix.tree import Sample
from extensions.prompts import PromptEncoder, written
from extensions.recipe import Evaluation
from extensions.rollout.sampler import Sampler
from extensions.tasks import Task, number_text

MAX_LABEL_SETS = 64  # a multi-label task with more label sets compares only those of its training rows
# Written answers of a task, not their surface forms, that are compared beside sampled ones by default. A row's cost
# grows with them: in tokens of a packed row, SmolLM2's SST-2 (2 answers) 75, CoLA (5) 89, STS-B (11) 391, against 55,
# 59 and 149 for one form of each. The log-odds of the instructed form alone differ by 0.2 nats on CoLA, 0.8 on STS-B.
MAX_BESIDE_SAMPLED = 20
RANKING_DECIMALS = 3  # of answers whose order counts: rounding ties them
CONFIDENCE_RADIUS = 0.1  # a score's confidence is the probability within this share of the score range


@dataclass(frozen=True)
class Candidates:
    """The C candidate answers of a task."""

    task: Task
    forms: dict[str, list[str]]  # label, score or label set (`Task.join_labels`) -> its written forms, canonical first

    @property
    def keys(self) -> list[str]:
        return list(self.forms)

    @property
    def count(self) -> int:
        """Written forms of all candidates."""
        return sum(map(len, self.forms.values()))


@dataclass(frozen=True)
class Decision:
    """The answer to one row."""

    text: str  # as the model would write it, with the closing tag
    answer: str | float  # as `parse_answer` returns it: a label, a score, or a label set joined by ", "
    confidence: float  # see `confidence_of`
    probabilities: dict[str, float]  # per label or score; of a multi-label task the marginal probability per label


def candidates(task: Task, label_sets: Iterable[str] = ()) -> Candidates:
    """The candidate answers of a task.

    Args:
        label_sets: those of the training rows. A multi-label task with more than `MAX_LABEL_SETS` possible sets uses
            these only, each single label, and the empty set.
    """
    if task.score_range is not None:
        return Candidates(task, {text: [text] for text in task.score_grid})
    if not task.multi_label:
        return Candidates(task, dict(task.labels))
    labels = list(task.labels)
    if 2 ** len(labels) <= MAX_LABEL_SETS:
        label_sets = [task.join_labels(one) for size in range(2, len(labels) + 1) for one in combinations(labels, size)]
    return Candidates(task, {one: [task.answer(one)] for one in (task.join_labels(()), *labels, *label_sets)})


def compared_beside_sampled(settings: Evaluation, compared: Candidates) -> bool:
    """Whether labelled rows get probabilities, and the answer by likelihood, beside a sampled or greedy answer."""
    return settings.probabilities and (settings.best_by == "likelihood" or compared.count <= MAX_BESIDE_SAMPLED)


def label_sets_of(examples: Iterable[Example]) -> dict[str, list[str]]:
    """Multi-label task -> the distinct label sets of its rows, in order of first appearance."""
    found: dict[str, dict[str, None]] = {}
    for example in examples:
        if example.task.multi_label and example.label is not None:
            found.setdefault(example.task.name, {})[example.label] = None
    return {name: list(label_sets) for name, label_sets in found.items()}


def log_likelihoods(
    compared: Candidates, prompts: Sequence[tuple[list[int], str]], encoder: PromptEncoder, sampler: Sampler
) -> Tensor:
    """Log-probability of each candidate, with the closing tag, given each prompt: (rows, C) float32.

    It is that of any of the candidate's words: log of the sum over their distinct token sequences. All sequences of one
    prompt are in one pack, so the prompt is computed once.

    Args:
        prompts: token ids and text of each, from `encoder`.

    Raises:
        UserError: a log-probability is NaN or infinite.
    """
    # rows x C x sequences
    found = [
        [
            [*encoder.surface_ids(ids, text, canonical), *(encoder.answer_ids(ids, text, word) for word in others)]
            for canonical, *others in compared.forms.values()
        ]
        for ids, text in prompts
    ]
    sizes = [len(sequences) for sequences in found[0]]
    # A tokenizer may give surface forms the same tokens, in some rows or in all.
    is_first = torch.tensor(
        [[one not in sequences[:k] for sequences in row for k, one in enumerate(sequences)] for row in found]
    )
    kept = is_first.any(0)
    samples = [
        Sample(ids, one)
        for (ids, _), row in zip(prompts, found, strict=True)
        for one, keep in zip(chain(*row), kept.tolist(), strict=True)
        if keep
    ]
    computed = sampler.logprobs(samples, int(kept.sum()), compared.count).view(len(prompts), -1)
    check_finite(computed, compared.task.name)
    logprobs = torch.full(is_first.shape, -torch.inf, device=computed.device)
    logprobs[:, kept] = computed
    logprobs[~is_first] = -torch.inf
    return torch.stack([part.logsumexp(1) for part in logprobs.split(sizes, dim=1)], 1)


def check_finite(logprobs: Tensor, where: str) -> None:
    """Raises UserError, naming `where`, if a log-probability is NaN or infinite."""
    if not bool(torch.isfinite(logprobs).all()):
        raise UserError(
            f"{where}: the model's logits are NaN or infinite, so its answers are meaningless. The weights are "
            "damaged, the adapter has diverged, or the dtype overflows: try model.dtype=float32"
        )


def answer_probabilities(logprobs: Tensor, temperature: float = 1.0) -> Tensor:
    """(rows, C) log-probabilities of `log_likelihoods` as probabilities in float64, on the CPU.

    Args:
        temperature: divides the log-probabilities (calibration).
    """
    return (logprobs.double() / temperature).softmax(-1).cpu()


def log_odds(logprobs: Tensor, index: int) -> Tensor:
    """(rows,) float64 log-odds log(p / (1 - p)) of one candidate, which rank rows whose p rounds to 1.

    Args:
        logprobs: (rows, C) of `log_likelihoods`.
    """
    scores = logprobs.double()
    return scores[:, index] - torch.cat([scores[:, :index], scores[:, index + 1 :]], 1).logsumexp(1)


def decide(compared: Candidates, probabilities: Tensor, calibrated: Tensor | None = None) -> list[Decision]:
    """The answer to each row: the most probable candidate.

    A regression gets the probability-weighted mean of the scores instead, rounded to the task's decimals, or, if it
    sets none, to one more than the candidates have. STS-B, whose metrics rank, keeps three decimals.

    Args:
        probabilities: (rows, C) of `answer_probabilities`; they determine the answers.
        calibrated: the same after calibration, used only for confidence and reported probabilities.
    """
    reported = probabilities if calibrated is None else calibrated
    return [_decide(compared, row, shown) for row, shown in zip(probabilities, reported, strict=True)]


def _decide(compared: Candidates, row: Tensor, reported: Tensor) -> Decision:
    task, keys = compared.task, compared.keys
    text = keys[int(row.argmax())]
    answer: str | float = text
    probabilities = dict(zip(keys, reported.tolist(), strict=True))
    if task.score_range is not None:
        decimals = task.score_decimals if task.suite == "own" else RANKING_DECIMALS
        if decimals is None:
            decimals = len(text.partition(".")[2]) + 1
        mean = sum(probability * float(key) for key, probability in zip(keys, row.tolist(), strict=True))
        answer = float(text := number_text(mean, decimals))
    else:
        text = task.answer(text)
    if task.multi_label:
        of_sets = [(probability, task.split_labels(one)) for one, probability in probabilities.items()]
        probabilities = {label: sum(p for p, labels in of_sets if label in labels) for label in task.labels}
    return Decision(written(text), answer, confidence_of(compared, reported, answer), probabilities)


def confidence_of(compared: Candidates, probabilities: Tensor, answer: str | float) -> float:
    """Probability of an answer as `parse_answer` returns it.

    For a score, that of all candidates within `CONFIDENCE_RADIUS` of it. For a label set that is not a candidate, 0.

    Args:
        probabilities: (C,) of one row.
    """
    task = compared.task
    if task.score_range is not None:
        grid = torch.tensor([float(key) for key in compared.keys], dtype=torch.float64)
        radius = CONFIDENCE_RADIUS * (task.score_range[1] - task.score_range[0]) * (1 + 1e-9)
        return float(probabilities[(grid - float(answer)).abs() <= radius].sum())
    index = label_index(compared, str(answer))
    return 0.0 if index is None else float(probabilities[index])


def label_index(compared: Candidates, label: str) -> int | None:
    """Index of a gold label among the candidates (regression: of the nearest score); None if it is not among them."""
    if compared.task.score_range is not None:
        return min(range(len(compared.keys)), key=lambda k: abs(float(compared.keys[k]) - float(label)))
    return compared.keys.index(label) if label in compared.forms else None
