"""Answers to the rows of an evaluation, computed on all ranks and resumable."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from extensions.common.console import Reporter
from extensions.common.files import jsonl, read_jsonl, write_jsonl
from extensions.data import Example
from extensions.data.sampling import evenly
from extensions.distributed import signals, watchdog
from extensions.distributed.strategy import Strategy
from extensions.evaluation.answers import Decoding, answer_batch, decoding_of, in_batches
from extensions.evaluation.likelihood import candidates, compared_beside_sampled
from extensions.evaluation.metrics import Prediction
from extensions.prompts import PromptEncoder
from extensions.recipe import Recipe
from extensions.rollout.sampler import Sampler


@dataclass
class Evaluator:
    """Answers rows on all ranks; whole batches are distributed round-robin.

    A resumable evaluation writes each answered batch to the run folder. The batches are formed the same way each time,
    so a resumed evaluation is bit-identical to an uninterrupted one on the same number of ranks, and on another number
    of ranks in float32.

    Args:
        folder: the run folder. Rank k appends to `STEM.part-k.jsonl`; rank 0 writes `STEM.jsonl` at the end.
        label_sets: multi-label task -> label sets of its training rows; see `likelihood.candidates`.
    """

    recipe: Recipe
    strategy: Strategy
    reporter: Reporter
    sampler: Sampler
    encoder: PromptEncoder
    folder: Path
    label_sets: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def predict(
        self,
        examples: list[Example],
        title: str,
        file: str | None = None,
        resumable: bool = False,
        decoding: Decoding | None = None,
        probabilities: bool = True,
    ) -> list[Prediction]:
        """One answer per example, in order, on every rank.

        Args:
            title: name of the evaluation, for messages.
            file: file name of the predictions in the run folder; None: they are not written.
            resumable: also write each batch as it is answered, and skip rows that an interrupted evaluation answered.
            decoding: None: `evaluation.decoding`.
            probabilities: also compute those of the labels and the answer by likelihood, if the recipe does.

        Raises:
            Stopped: on every rank, if any rank has a stop request.
        """
        strategy, recipe = self.strategy, self.recipe
        self._warn_dropped()  # demonstrations dropped in training, since the last evaluation
        stem = Path(file).stem if file is not None and resumable else None
        known = self._resume(stem) if stem is not None else {}
        batches = self._pending(examples, known)
        left = sum(len(batch) for rank in batches for batch in rank)
        done = f"; {len(examples) - left} are done already" if known else ""
        self.reporter.info(f"evaluating {len(examples)} rows {title}{done}")
        self.reporter.phase(f"evaluating {title}".strip())
        part = (self.folder / f"{stem}.part-{strategy.rank}.jsonl").open("a", encoding="utf-8") if stem else None
        tasks = {example.task.name: example.task for example in examples}
        compared = {name: candidates(task, self.label_sets.get(name, ())) for name, task in tasks.items()}
        compares = {name: compared_beside_sampled(recipe.evaluation, one) for name, one in compared.items()}
        found: list[Prediction] = []
        chosen = decoding or recipe.evaluation.decoding
        self.reporter.progress(0, left)
        # Likelihoods are the policy's own: no engine wakes up, and no adapter is sent.
        generates = any(decoding_of(task, chosen) != "likelihood" for task in tasks.values())
        with self.sampler.session() if generates else nullcontext():
            for batch in self._own_batches(batches):
                watchdog.heartbeat()
                if strategy.stopping():  # a collective: every rank calls it in each turn, so all stop together
                    raise signals.Stopped
                if not batch:
                    continue
                name = batch[0].task.name
                answered = answer_batch(
                    batch,
                    self.encoder,
                    self.sampler,
                    recipe.rollout.max_new_tokens,
                    recipe.seed,
                    chosen,
                    self.label_sets.get(name, ()),
                    probabilities and compares[name],
                )
                found += answered
                if part is not None:
                    part.write(jsonl([asdict(prediction) for prediction in answered]))
                    part.flush()
                self.reporter.progress(len(found) * strategy.world_size, left)
        if part is not None:
            part.close()
        self._warn_dropped()
        by_key = known | {(p.task, p.index): p for rank in strategy.gather(found) for p in rank}
        predictions = [by_key[example.task.name, example.index] for example in examples]
        if strategy.is_rank_0() and file is not None:
            write_jsonl(self.folder / file, records(predictions, examples))
        return predictions

    def _pending(self, examples: Sequence[Example], known: Container[tuple[str, int]]) -> list[list[list[Example]]]:
        """The batches with unanswered rows of each rank, task by task."""
        world_size = self.strategy.world_size
        pending = []
        for task in dict.fromkeys(example.task.name for example in examples):
            rows = [example for example in examples if example.task.name == task]
            most = max(self.recipe.evaluation.batch_size, self.sampler.queued_rows)
            size = min(most, -(-len(rows) // world_size))  # a batch for every rank
            pending += [b for b in in_batches(rows, size) if any((task, row.index) not in known for row in b)]
        return [pending[rank::world_size] for rank in range(world_size)]

    def _own_batches(self, by_rank: Sequence[Sequence[list[Example]]]) -> Iterator[list[Example]]:
        """This rank's batches, one per turn; every rank has the same number of turns.

        A rank without remaining work gets an empty batch. If all ranks must run the same forwards (ZeRO 3), the batches
        of a turn have one task and one size instead: smaller ones are padded with rows that are answered twice.
        """
        rank = self.strategy.rank
        if not self.sampler.fixed_decode_steps:
            yield from (turn[rank] for turn in zip_longest(*by_rank, fillvalue=[]))
            return
        for task in dict.fromkeys(batch[0].task.name for batches in by_rank for batch in batches):
            of_task = [[batch for batch in batches if batch[0].task.name == task] for batches in by_rank]
            size = max(len(batch) for batches in of_task for batch in batches)
            spare = next(batch for batches in of_task for batch in batches)
            for turn in zip_longest(*of_task, fillvalue=spare):
                yield [*turn[rank], *[turn[rank][0]] * (size - len(turn[rank]))]

    def remove_parts(self) -> None:
        """Remove the files of a resumable evaluation; call it when its result is written."""
        self.strategy.barrier()
        if self.strategy.is_rank_0():
            for path in self.folder.glob("*.part-*.jsonl"):
                path.unlink()

    def _resume(self, stem: str) -> dict[tuple[str, int], Prediction]:
        """Answers of interrupted evaluations, on every rank. They are merged into one file: a part may end mid-line."""
        parts = sorted(self.folder.glob(f"{stem}.part-*.jsonl"))
        own = [Prediction(**record) for path in parts for record in read_jsonl(path, skip_damaged=True)]
        known = {(p.task, p.index): p for rank in self.strategy.gather(own) for p in rank}
        self.strategy.barrier()  # every rank has read the parts
        if self.strategy.is_rank_0() and parts:
            write_jsonl(self.folder / f"{stem}.part-before.jsonl", [asdict(p) for p in known.values()])
            for path in self.folder.glob(f"{stem}.part-[0-9]*.jsonl"):
                path.unlink()
        self.strategy.barrier()
        return known

    def _warn_dropped(self) -> None:
        """Warn of prompts that lost demonstrations since the last call. Call it on every rank."""
        dropped = sum((Counter(counts) for counts in self.strategy.gather(dict(self.encoder.dropped))), Counter())
        self.encoder.dropped.clear()
        for name, count in dropped.items():
            self.reporter.warn(
                f"{name}: {count} prompts show fewer than {self.encoder.shots} demonstrations; no more fit into "
                f"{self.encoder.max_tokens} tokens (prompt.max_tokens, the model's context)"
            )


def records(predictions: Iterable[Prediction], examples: Iterable[Example]) -> list[dict[str, Any]]:
    """Lines of a predictions file: the predictions of examples, with the input texts."""
    pairs = zip(predictions, examples, strict=True)
    return [asdict(prediction) | {"fields": example.fields} for prediction, example in pairs]


def fixed_answers(predictions: Sequence[Prediction], examples: Sequence[Example], count: int) -> list[dict[str, Any]]:
    """Answers to up to `count` evenly spaced rows per task, the same rows at every validation, with input texts."""
    keys = ("task", "index", "fields", "response", "answer", "gold", "probabilities")
    pairs = list(zip(predictions, examples, strict=True))
    by_task = {
        task: [pair for pair in pairs if pair[0].task == task] for task in dict.fromkeys(p.task for p, _ in pairs)
    }
    shown = [pair for found in by_task.values() for pair in evenly(found, count)]
    return [{key: record[key] for key in keys} for record in records(*zip(*shown, strict=True))] if shown else []
