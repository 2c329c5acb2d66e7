"""Evaluation: an answer for each row, sampled as in training or as the recipe says, over all ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import torch

from extensions.common.console import Reporter
from extensions.common.errors import UserError
from extensions.common.files import jsonl, read_jsonl, write_jsonl
from extensions.data import Example
from extensions.distributed import signals, watchdog
from extensions.distributed.strategy import Strategy
from extensions.evaluation.likelihood import Decision, answer_probabilities, candidates, decide, log_likelihoods
from extensions.evaluation.metrics import Prediction
from extensions.prompts import PromptEncoder, parse_answer
from extensions.recipe import Recipe
from extensions.rollout.sampler import GenerationRequest, Sampler, random_numbers

EVALUATION = 1  # purpose of its random numbers, apart from those of training
Decoding = Literal["sample", "greedy", "likelihood"]


def predict(
    examples: Sequence[Example],
    encoder: PromptEncoder,
    sampler: Sampler,
    batch_size: int,
    max_new_tokens: int,
    seed: int,
    decoding: Decoding = "sample",
) -> list[Prediction]:
    """One answer for each example of one task, in their order.

    Section 5.1 of the paper: a single response, the upper bound of the budget. An example's random numbers come from
    its row number, so in float32 its answer does not depend on `batch_size`; in bfloat16 the rows beside it round it
    differently.

    Args:
        decoding: "likelihood" takes the most probable of the task's answers; see `extensions.evaluation.likelihood`.
    """
    found: dict[int, Prediction] = {}
    for batch in in_batches(examples, batch_size):
        answered = answer(batch, encoder, sampler, max_new_tokens, seed, decoding)
        found |= {prediction.index: prediction for prediction in answered}
    return [found[example.index] for example in examples]


def in_batches(examples: Sequence[Example], batch_size: int) -> list[list[Example]]:
    """The examples of one task in batches of `batch_size`: rows with the same long text, else of like length, together.

    A function of the examples alone, not of what is done already.
    """
    texts = Counter(example.fields[example.task.long_field] for example in examples)

    def place(example: Example) -> tuple[str, int]:
        text = example.fields[example.task.long_field]
        return text if texts[text] > 1 else "", sum(map(len, example.fields.values()))

    ordered = sorted(examples, key=place)
    return [ordered[first : first + batch_size] for first in range(0, len(ordered), batch_size)]


def answer(
    batch: Sequence[Example],
    encoder: PromptEncoder,
    sampler: Sampler,
    max_new_tokens: int,
    seed: int,
    decoding: Decoding,
    seen: Iterable[str] = (),
) -> list[Prediction]:
    """One answer for each row of a batch; see `predict`.

    Args:
        seen: label sets of a multi-label task's training rows; see `likelihood.candidates`.
    """
    task = batch[0].task
    encoded = [encoder.encode(task, row.fields) for row in batch]
    requests = [
        GenerationRequest(
            ids,
            max_new_tokens,
            random_numbers(seed, EVALUATION, 0, row.index, max_new_tokens)[1],
        )
        for row, (ids, _) in zip(batch, encoded, strict=True)
    ]
    positive_probabilities: list[float | None] = [None] * len(batch)
    decisions: list[Decision] = []
    if task.is_ranked or decoding == "likelihood":
        compared = candidates(task, seen)
        logprobs, canonical = log_likelihoods(compared, encoded, encoder, sampler)
        if task.positive is not None and compared.keys:
            positive_probabilities = canonical.softmax(-1)[:, compared.keys.index(task.positive)].tolist()
        if decoding == "likelihood":
            decisions = decide(compared, answer_probabilities(logprobs))
    if decoding == "likelihood":
        return [
            Prediction(
                task.name, row.index, d.text, d.answer, row.label, row.kept, positive_probability, d.probabilities
            )
            for row, d, positive_probability in zip(batch, decisions, positive_probabilities, strict=True)
        ]
    responses = sampler.sample(requests, greedy=decoding == "greedy")
    if not bool(torch.isfinite(torch.cat([response.logprobs for response in responses])).all()):
        broken = [row.index for row, r in zip(batch, responses, strict=True) if not r.logprobs.isfinite().all()]
        raise UserError(
            f"{task.name}, row {broken[0]}: the model's logits are NaN or infinite, so its answers mean nothing. "
            "Its file is broken, its adapter has diverged, or its dtype overflows: try model.dtype=float32"
        )
    return [
        Prediction(task.name, row.index, r.text, parse_answer(r.text, task), row.label, row.kept, positive_probability)
        for row, r, positive_probability in zip(batch, responses, positive_probabilities, strict=True)
    ]


class Evaluator:
    """Predictions over all ranks, by whole batches that are dealt out to them.

    With a file name the predictions are kept as they come, and a run that is started again takes up where it stopped:
    the batches are cut the same way each time, so on as many ranks the answers are those of a run that never stopped,
    bit for bit; on another number of ranks they are in float32.

    Args:
        folder: the run folder. Rank k writes `STEM.part-k.jsonl` there, and rank 0 `STEM.jsonl` in the end.
        seen: task name -> label sets of its training rows, of multi-label tasks.
    """

    def __init__(
        self,
        recipe: Recipe,
        strategy: Strategy,
        reporter: Reporter,
        sampler: Sampler,
        encoder: PromptEncoder,
        folder: Path,
        seen: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.recipe, self.strategy, self.reporter, self.folder = recipe, strategy, reporter, folder
        self.sampler, self.encoder, self.seen = sampler, encoder, seen or {}

    def predict(
        self, examples: list[Example], title: str, file: str | None = None, resumable: bool = False
    ) -> list[Prediction]:
        """An answer to each example, on every rank.

        Args:
            title: what is evaluated, in words.
            file: name of the predictions in the run folder; None: not kept.
            resumable: also keep the part that a killed run had.

        Raises:
            Stopped: on every rank, if one was told to stop.
        """
        strategy, recipe = self.strategy, self.recipe
        self.tell_dropped()  # of training, since the last evaluation
        stem = Path(file).stem if file is not None and resumable else None
        known = self._resumed(stem) if stem is not None else {}
        batches = self._pending(examples, known)
        left = sum(len(batch) for rank in batches for batch in rank)
        done = f"; {len(examples) - left} are done already" if known else ""
        self.reporter.info(f"evaluating {len(examples)} rows {title}{done}")
        part = (self.folder / f"{stem}.part-{strategy.rank}.jsonl").open("a", encoding="utf-8") if stem else None
        found: list[Prediction] = []
        self.reporter.progress(0, left)
        with self.sampler.session():
            for batch in self._in_lockstep(batches) if self.sampler.fixed_decode_steps else self._in_turns(batches):
                watchdog.heartbeat()
                if strategy.stopping():  # asked in each turn, so no rank waits long for another, and all leave together
                    raise signals.Stopped
                if not batch:
                    continue
                tokens, decoding = recipe.rollout.max_new_tokens, recipe.evaluation.decoding
                seen = self.seen.get(batch[0].task.name, ())
                answered = answer(batch, self.encoder, self.sampler, tokens, recipe.seed, decoding, seen)
                found += answered
                if part is not None:
                    part.write(jsonl([asdict(prediction) for prediction in answered]))
                    part.flush()
                self.reporter.progress(len(found) * strategy.world_size, left)
        if part is not None:
            part.close()
        self.tell_dropped()
        by_key = known | {(p.task, p.index): p for part_of in strategy.gather(found) for p in part_of}
        predictions = [by_key[example.task.name, example.index] for example in examples]
        if strategy.is_rank_0() and file is not None:
            write_jsonl(self.folder / file, [asdict(prediction) for prediction in predictions])
        return predictions

    def _pending(self, examples: Sequence[Example], known: Container[tuple[str, int]]) -> list[list[list[Example]]]:
        """The batches of each rank that are not complete in `known`, task by task; dealt out in turn."""
        world_size = self.strategy.world_size
        by_rank: list[list[list[Example]]] = [[] for _ in range(world_size)]
        turn = 0
        for task in dict.fromkeys(example.task.name for example in examples):
            rows = [example for example in examples if example.task.name == task]
            size = min(self.recipe.evaluation.batch_size, -(-len(rows) // world_size))  # work for every rank
            for batch in in_batches(rows, size):
                if any((task, row.index) not in known for row in batch):
                    by_rank[turn % world_size].append(batch)
                    turn += 1
        return by_rank

    def _in_turns(self, by_rank: Sequence[Sequence[list[Example]]]) -> Iterator[list[Example]]:
        """This rank's batches, then empty ones as long as another rank has work."""
        own = by_rank[self.strategy.rank]
        for turn in range(max(map(len, by_rank))):
            yield own[turn] if turn < len(own) else []

    def _in_lockstep(self, by_rank: Sequence[Sequence[list[Example]]]) -> Iterator[list[Example]]:
        """This rank's batches, filled up so that all ranks do the same forwards at the same time (ZeRO 3).

        In each turn the ranks have batches of one task and one size; what is filled up is answered twice.
        """
        tasks = dict.fromkeys(batch[0].task.name for batches in by_rank for batch in batches)
        for task in tasks:
            own = [[b for b in batches if b[0].task.name == task] for batches in by_rank]
            turns, size = max(map(len, own)), max(len(b) for batches in own for b in batches)
            spare = next(b for batches in own for b in batches)
            for turn in range(turns):
                batches = own[self.strategy.rank]
                batch = batches[turn] if turn < len(batches) else spare
                yield [*batch, *[batch[0]] * (size - len(batch))]

    def forget_parts(self) -> None:
        """Remove what only a killed evaluation needs; call it when its result stands."""
        self.strategy.barrier()
        if self.strategy.is_rank_0():
            for path in self.folder.glob("*.part-*.jsonl"):
                path.unlink()

    def _resumed(self, stem: str) -> dict[tuple[str, int], Prediction]:
        """What earlier, killed evaluations had, on every rank; put into one file, since a killed one may end torn."""
        parts = sorted(self.folder.glob(f"{stem}.part-*.jsonl"))
        mine = [Prediction(**record) for path in parts for record in read_jsonl(path, skip_damaged=True)]
        known = {(p.task, p.index): p for part in self.strategy.gather(mine) for p in part}
        self.strategy.barrier()  # all have read
        if self.strategy.is_rank_0() and parts:
            write_jsonl(self.folder / f"{stem}.part-before.jsonl", [asdict(p) for p in known.values()])
            for path in self.folder.glob(f"{stem}.part-[0-9]*.jsonl"):
                path.unlink()
        self.strategy.barrier()
        return known

    def tell_dropped(self) -> None:
        """Warn of prompts that lost demonstrations since the last time. On every rank."""
        dropped = sum((Counter(part) for part in self.strategy.gather(dict(self.encoder.dropped))), Counter())
        self.encoder.dropped.clear()
        for name, count in dropped.items():
            self.reporter.warn(
                f"{name}: {count} prompts show fewer than {self.encoder.shots} demonstrations, since no more fit into "
                f"{self.encoder.max_tokens} tokens (prompt.max_tokens, the model's context)"
            )
