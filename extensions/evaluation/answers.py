"""One answer per row of a batch: sampled as in training, decoded greedily, or the task's most probable answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np

from extensions.data import Example
from extensions.evaluation.likelihood import (
    Decision,
    answer_probabilities,
    candidates,
    check_finite,
    decide,
    log_likelihoods,
    log_odds,
)
from extensions.evaluation.metrics import Prediction
from extensions.prompts import PromptEncoder, parse_answer
from extensions.rollout.sampler import GenerationRequest, Sampler, random_numbers
from extensions.tasks import Task

EVALUATION = 1  # the random-number stream of evaluations; rollouts use another
Decoding = Literal["sample", "greedy", "likelihood"]


def in_batches(examples: Sequence[Example], batch_size: int) -> list[list[Example]]:
    """Batches of one task's examples. Rows with the same long text are adjacent; the others are sorted by length.

    The batches depend only on the examples, so a resumed evaluation forms the same ones.
    """
    texts = Counter(example.fields[example.task.long_field] for example in examples)

    def key(example: Example) -> tuple[str, int]:
        text = example.fields[example.task.long_field]
        return text if texts[text] > 1 else "", sum(map(len, example.fields.values()))

    ordered = sorted(examples, key=key)
    return [ordered[first : first + batch_size] for first in range(0, len(ordered), batch_size)]


def uniforms_of(row: Example, seed: int, max_new_tokens: int) -> np.ndarray:
    """The random numbers of a row's sampled answer, one per token; independent of those of other tasks' rows."""
    return random_numbers(seed, EVALUATION, 0, row.index, max_new_tokens, row.task.name)[1]


def decoding_of(task: Task, chosen: Decoding) -> Decoding:
    """A ranked task (ReCoRD) is always decided by likelihood: its metrics compare likelihoods."""
    return "likelihood" if task.is_ranked else chosen


def answer_batch(
    batch: Sequence[Example],
    encoder: PromptEncoder,
    sampler: Sampler,
    max_new_tokens: int,
    seed: int,
    decoding: Decoding,
    label_sets: Iterable[str] = (),
    probabilities: bool = False,
) -> list[Prediction]:
    """One answer per row of a batch of one task, in order.

    Section 5.1 of the paper: a single response, with the upper end of the response budget. A row's random numbers are a
    function of its task and index, so its answer does not depend on the other rows of the batch in float32. In bfloat16
    they affect the rounding.

    Args:
        decoding: "likelihood" takes the most probable of the task's answers (`extensions.evaluation.likelihood`), and
            generates nothing; a ranked task is always decided so.
        label_sets: label sets of a multi-label task's training rows; see `likelihood.candidates`.
        probabilities: with sampled or greedy answers, also compute the probabilities of the task's answers, and the
            answer by likelihood.

    Raises:
        UserError: the model's logits are NaN or infinite.
    """
    task = batch[0].task
    encoded = [encoder.encode(task, row.fields) for row in batch]
    positive: list[tuple[float | None, float | None]] = [(None, None)] * len(batch)  # probability, log-odds
    decisions: list[Decision] | None = None
    decoding = decoding_of(task, decoding)
    if probabilities or decoding == "likelihood":
        compared = candidates(task, label_sets)
        logprobs = log_likelihoods(compared, encoded, encoder, sampler)
        if task.positive is not None:
            odds = log_odds(logprobs, compared.keys.index(task.positive))
            positive = list(zip(odds.sigmoid().tolist(), odds.tolist(), strict=True))
        if probabilities or decoding == "likelihood":
            decisions = decide(compared, answer_probabilities(logprobs))
    answers: list[tuple[str, str | float | None]]
    if decoding == "likelihood":
        assert decisions is not None
        answers = [(decision.text, decision.answer) for decision in decisions]
    else:
        requests = [
            GenerationRequest(ids, max_new_tokens, uniforms_of(row, seed, max_new_tokens))
            for row, (ids, _) in zip(batch, encoded, strict=True)
        ]
        responses = sampler.sample(requests, greedy=decoding == "greedy")
        for row, response in zip(batch, responses, strict=True):
            check_finite(response.logprobs, f"{task.name}, row {row.index}")
        answers = [(response.text, parse_answer(response.text, task)) for response in responses]
    by_likelihood = [(d.probabilities, d.answer) for d in decisions] if decisions else [(None, None)] * len(batch)
    return [
        Prediction(task.name, row.index, *answer, row.label, row.kept, probability, *likely, odds)
        for row, answer, (probability, odds), likely in zip(batch, answers, positive, by_likelihood, strict=True)
    ]
