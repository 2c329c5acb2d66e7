"""Regression by correlation: a loss of SFT on a row's score over all answers, not on one written answer.

The next-token loss on a written score such as " 3.8" takes 3.7 for as wrong as 0.2. Here a row's score is the
probability-weighted mean over the task's grid of answers (`Task.score_grid`), the leaves of its prompt's node in the
prefix tree, and the loss of a batch is

    mean of -log p(any answer of the grid)  +  1 - Pearson(scores, gold)  +  LEVEL x mean squared error

with scores in units of the range. The first term teaches the format; the second the order, however small the spread of
the scores is; the third their level. Not in the paper. Only answers by likelihood, which are these means, rank rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from extensions.data import Example
from extensions.distributed import watchdog
from extensions.model.policy import Role
from extensions.prefix.tree import Sample, micro_batches
from extensions.recipe import Sft
from extensions.tasks import GRID_POINTS, Task
from extensions.training.sft import SftTrainer
from extensions.training.trainer import mixed_seed

LEVEL = 0.5  # weight of the squared error
LEAST_NORM = 1e-3  # of a batch's scores around their mean, in units of the range; a smaller one counts as this


def correlation_loss(scores: Tensor, gold: Tensor, tasks: Sequence[str]) -> tuple[Tensor, Tensor]:
    """The loss's second and third term, and the correlation: Pearson's of each task, weighted by its rows.

    Args:
        scores, gold: (B,) in units of the task's range.
        tasks: B names. A task with a single row has no correlation; it counts as 0.
    """
    correlation = scores.new_zeros(())
    for task in dict.fromkeys(tasks):
        rows = torch.tensor([k for k, name in enumerate(tasks) if name == task], device=scores.device)
        a, b = (values[rows] - values[rows].mean() for values in (scores, gold))
        correlation = correlation + cosine_similarity(a, b, dim=0, eps=LEAST_NORM) * len(rows) / len(tasks)
    return 1 - correlation + LEVEL * (scores - gold).square().mean(), correlation


def answer_logprobs(logprobs: Tensor, lengths: Sequence[int]) -> Tensor:
    """(N,) token log-probabilities of the answers of each row -> (rows, GRID_POINTS) of whole answers."""
    return torch.stack([tokens.sum() for tokens in logprobs.split(list(lengths))]).view(-1, GRID_POINTS)


def grid_scores(answers: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of any answer of the grid, and the mean score in units of the range: (rows,) each.

    Args:
        answers: (rows, GRID_POINTS) log-probabilities.
        grid: (rows, GRID_POINTS) scores of the answers, NaN where one repeats another.
    """
    answers = answers.masked_fill(grid.isnan(), -torch.inf)
    return answers.logsumexp(1), (answers.softmax(1) * grid.nan_to_num()).sum(1)


def unit_grid(task: Task) -> list[float]:
    """The scores of `Task.score_grid` in units of the range; NaN for one that its decimals make equal to another."""
    texts = task.score_grid
    return [math.nan if text in texts[:k] else unit_score(task, text) for k, text in enumerate(texts)]


def unit_score(task: Task, label: str) -> float:
    """A label of a regression in units of its range."""
    assert task.score_range is not None
    low, high = task.score_range
    return (float(label) - low) / (high - low)


class CorrelationTrainer(SftTrainer):
    """`SftTrainer` with the loss above. All tasks are regressions."""

    def encode(self, example: Example) -> list[Sample]:
        """The prompt with each answer of the grid."""
        ids, text = self.encoder.encode(example.task, example.fields)
        return [Sample(ids, self.encoder.answer_ids(ids, text, score)) for score in example.task.score_grid]

    def summary_lines(self, metrics: dict[str, Any]) -> tuple[str, str]:
        """Loss, correlation with the gold scores within the batch, and throughput."""
        line = f"loss {metrics['loss']:.3f}  correlation {metrics['correlation']:.3f}"
        return line, f"{metrics['samples_per_s']:.1f} samples/s"

    def update(self, samples: Sequence[Sample], step: int) -> dict[str, Tensor]:
        """Gradients over the micro-batches, then one update. Returns the metrics of its loss, the same on all ranks."""
        self.policy.train()
        return self.limits.attempt(partial(self._step, samples, step), partial(self.strategy.discard, self.engine))

    def _step(self, samples: Sequence[Sample], step: int) -> dict[str, Tensor]:
        """One update.

        The derivative of the loss by a row's score depends on the scores of the whole batch. So the micro-batches are
        computed without gradients, and then again with them, but for the last, whose one forward serves both.
        """
        examples, device = self._batch[0], self.policy.device
        chunks = micro_batches(
            samples, range(len(examples)), self.limits.of(self.sft.micro_batch_size), self.sft.samples_per_example
        )
        log_masses, scores = torch.zeros(2, len(examples), device=device)
        for k, chunk in enumerate(chunks):
            with torch.set_grad_enabled(k + 1 == len(chunks)):
                log_mass, score = self._forward(samples, chunk, step, k)
            log_masses[list(chunk)], scores[list(chunk)] = log_mass.detach(), score.detach()

        own = [(example.task.name, unit_score(example.task, str(example.label))) for example in examples]
        of_ranks = self.strategy.gather((own, log_masses.tolist(), scores.tolist()))
        named = [one for rows, _, _ in of_ranks for one in rows]
        values = torch.tensor([value for _, _, values in of_ranks for value in values], device=device)
        gold = torch.tensor([value for _, value in named], device=device)
        with torch.enable_grad():
            loss, correlation = correlation_loss(values.requires_grad_(), gold, [name for name, _ in named])
            (slopes,) = torch.autograd.grad(loss, values)
        first = sum(len(rows) for rows, _, _ in of_ranks[: self.strategy.rank])
        slopes = slopes[first : first + len(examples)]

        for k in range(len(chunks) - 1, -1, -1):
            if k + 1 < len(chunks):
                log_mass, score = self._forward(samples, chunks[k], step, k)
            part = (slopes[list(chunks[k])] * score).sum() - log_mass.sum() / len(named)
            self.strategy.update(self.engine, part * self.strategy.world_size, k == 0)
        format_loss = -sum(sum(masses) for _, masses, _ in of_ranks) / len(named)
        return {
            "loss": loss.detach() + format_loss,
            "correlation": correlation.detach(),
            "format_loss": torch.tensor(format_loss),
        }

    def _forward(self, samples: Sequence[Sample], chunk: Sequence[int], step: int, k: int) -> tuple[Tensor, Tensor]:
        """`grid_scores` of the rows of micro-batch `k`."""
        grid = torch.tensor([unit_grid(self._batch[0][slot].task) for slot in chunk], device=self.policy.device)
        watchdog.heartbeat()
        packed = self._pack(samples, chunk)
        self.strategy.nonfinite.samples(chunk)
        self.limits.running(len(packed.lengths), packed.input_ids.shape[1])
        torch.manual_seed(mixed_seed(self.seed, step, k, self.strategy.rank))  # of the dropout masks
        with self.policy.role("actor"):
            logprobs = self.engine(packed, values=False, temperature=1.0)["logprobs"]
        return grid_scores(answer_logprobs(logprobs, packed.lengths), grid)

    def debug_snapshot(self) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
        """With the token ids of all answers of the grid."""
        records, tensors = super().debug_snapshot()
        for k, record in enumerate(records):
            own = self._batch[1][k * self.sft.samples_per_example : (k + 1) * self.sft.samples_per_example]
            record["grid_ids"] = [list(sample.response) for sample in own]
        return records, tensors

    def restore_snapshot(self, records: Sequence[dict[str, Any]], tensors: dict[str, Tensor]) -> None:
        self._batch = [], [Sample(record["prompt_ids"], ids) for record in records for ids in record["grid_ids"]]

    def per_sample_losses(self, slot: int) -> dict[Role, Callable[[], Tensor]]:
        """What the loss is computed from, for one row alone: its score, and its log-probability of any answer."""
        packed = self._pack(self._batch[1], [slot])

        def actor() -> Tensor:
            logprobs = self.policy(packed, values=False, temperature=1.0)["logprobs"]
            answers = answer_logprobs(logprobs, packed.lengths)
            log_mass, score = grid_scores(answers, torch.linspace(0, 1, GRID_POINTS, device=answers.device)[None])
            return (score - log_mass).sum()

        return {"actor": actor}

    def _losses(self, sums: dict[str, Tensor]) -> dict[str, float]:
        return {name: float(value) for name, value in sums.items()}


def sft_trainer(sft: Sft) -> type[SftTrainer]:
    """The training loop of a loss."""
    return CorrelationTrainer if sft.loss == "correlation" else SftTrainer
