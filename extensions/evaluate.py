"""Evaluation: an answer for each row, sampled as in training or as the recipe says, over all ranks."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Literal

import torch

from extensions.data import Example
from extensions.metrics import Prediction
from extensions.packing import Sample
from extensions.prompts import CLOSE, PromptEncoder, parse_answer
from extensions.recipe import Recipe
from extensions.rollout import Request, Sampler, random_numbers
from extensions.run import Reporter, read_jsonl, write_jsonl
from extensions.strategy import Strategy
from extensions.tasks import Task

EVALUATION = 1  # purpose of its random numbers, apart from those of training
SCORES = 11  # numbers of a regression's range that are compared by likelihood, at equal distances
Decoding = Literal["sample", "greedy", "likelihood"]


def predict(
    examples: Sequence[Example],
    encoder: PromptEncoder,
    sampler: Sampler,
    batch_size: int,
    max_new_tokens: int,
    seed: int,
    decoding: Decoding = "sample",
    on_batch: Callable[[list[Prediction]], None] = lambda done: None,
) -> list[Prediction]:
    """One answer for each example of one task (section 5.1: a single response, the upper bound of the budget).

    Rows with the same long text, else rows of like length, are computed together. An example's random numbers come from
    its row number, so its answer does not depend on `batch_size` or on which rank has it.

    Args:
        decoding: "likelihood" takes the most probable of the task's answers, of a regression of `SCORES` numbers.
        on_batch: gets the predictions of each batch when they are there.
    """
    encoded = [encoder.encode(example.task, example.fields) for example in examples]
    groups = _groups(examples)
    order = sorted(range(len(examples)), key=lambda i: (groups[i], len(encoded[i][0])))
    found: dict[int, Prediction] = {}
    for first in range(0, len(order), batch_size):
        members = order[first : first + batch_size]
        requests = [
            Request(
                encoded[i][0],
                groups[i],
                max_new_tokens,
                random_numbers(seed, EVALUATION, 0, examples[i].index, max_new_tokens)[1],
            )
            for i in members
        ]
        task = examples[members[0]].task
        supports: Sequence[float | None] = [None] * len(members)
        if task.is_ranked or decoding == "likelihood":
            options = _options(task)
            chances = _probabilities(
                list(options.values()), requests, [encoded[i][1] for i in members], encoder, sampler
            )
            if task.positive is not None:
                supports = chances[:, list(options).index(task.positive)].tolist()
        if decoding == "likelihood":
            texts = [f"{list(options.values())[k]}{CLOSE}" for k in chances.argmax(-1).tolist()]
        else:
            texts = [response.text for response in sampler.sample(requests, greedy=decoding == "greedy")]
        for i, text, support in zip(members, texts, supports, strict=True):
            example, answer = examples[i], parse_answer(text, task)
            found[i] = Prediction(task.name, example.index, text, answer, example.label, example.kept, support)
        on_batch([found[i] for i in members])
    return [found[i] for i in range(len(examples))]


def _groups(examples: Sequence[Example]) -> list[str]:
    """What each row's prompt begins with, besides the task's own text: the long field, if others have the same one."""
    texts = [example.fields[example.task.long_field] for example in examples]
    counts = Counter(texts)
    return [
        f"{example.task.name}\n{text}" if counts[text] > 1 else example.task.name
        for example, text in zip(examples, texts, strict=True)
    ]


def _options(task: Task) -> dict[str, str]:
    """The answers that are compared by likelihood: label -> the word that the prompt asks for, or numbers."""
    if task.score_range is None:
        return {label: words[0] for label, words in task.labels.items()}
    low, high = task.score_range
    return {(text := f"{low + (high - low) * k / (SCORES - 1):.1f}"): text for k in range(SCORES)}


def _probabilities(
    words: Sequence[str], requests: Sequence[Request], texts: Sequence[str], encoder: PromptEncoder, sampler: Sampler
) -> torch.Tensor:
    """Probability of each word among `words` after each prompt: (rows, words)."""
    samples = [
        Sample(request.prompt, encoder.answer_ids(list(request.prompt), text, word), request.group)
        for request, text in zip(requests, texts, strict=True)
        for word in words
    ]
    return sampler.logprobs(samples).view(len(requests), len(words)).softmax(dim=-1)


class Evaluator:
    """Predictions over all ranks; each computes its share of each task.

    With a file name the predictions are kept as they come, and a run that is started again takes up where it stopped:
    an answer depends on nothing but its own row, so the number of ranks may differ.

    Args:
        folder: the run folder. Rank k writes `STEM.part-k.jsonl` there, and rank 0 `STEM.jsonl` in the end.
    """

    def __init__(
        self,
        recipe: Recipe,
        strategy: Strategy,
        reporter: Reporter,
        sampler: Sampler,
        encoder: PromptEncoder,
        folder: Path,
    ) -> None:
        self.recipe, self.strategy, self.reporter, self.folder = recipe, strategy, reporter, folder
        self.sampler, self.encoder = sampler, encoder

    def predict(
        self, examples: list[Example], title: str, file: str | None = None, resumable: bool = False
    ) -> list[Prediction]:
        """An answer to each example, on every rank.

        Args:
            title: what is evaluated, in words.
            file: name of the predictions in the run folder; None: not kept.
            resumable: also keep the part that a killed run had.
        """
        strategy, settings = self.strategy, self.recipe.evaluation
        stem = Path(file).stem if file is not None and resumable else None
        known = self._resumed(stem) if stem is not None else {}
        known = {key: known[key] for e in examples if (key := (e.task.name, e.index)) in known}
        self.reporter.say(
            f"evaluating {len(examples)} rows {title}" + (f"; {len(known)} are done already" if known else "")
        )
        part = (self.folder / f"{stem}.part-{strategy.rank}.jsonl").open("a", encoding="utf-8") if stem else None
        found: list[Prediction] = []

        def on_batch(predictions: list[Prediction]) -> None:
            found.extend(predictions)
            if part is not None:
                _append(part, predictions)
            self.reporter.progress(len(known) + len(found) * strategy.world_size, len(examples))

        self.reporter.progress(0, len(examples))
        self.encoder.dropped.clear()
        for task in dict.fromkeys(example.task.name for example in examples):
            rows = [e for e in examples if e.task.name == task and (task, e.index) not in known]
            share = -(-len(rows) // strategy.world_size)
            own = rows[strategy.rank * share : (strategy.rank + 1) * share]
            if self.sampler.lockstep:
                own += rows[:1] * (share - len(own))  # as many forwards on each rank
            if own:
                predict(
                    own,
                    self.encoder,
                    self.sampler,
                    settings.batch_size,
                    self.recipe.rollout.max_new_tokens,
                    self.recipe.seed,
                    settings.decoding,
                    on_batch,
                )
        if part is not None:
            part.close()
        self._tell_dropped()
        by_key = known | {(p.task, p.index): p for part_of in strategy.gather(found) for p in part_of}
        predictions = [by_key[example.task.name, example.index] for example in examples]
        if strategy.is_rank_0() and file is not None:
            write_jsonl(self.folder / file, [asdict(prediction) for prediction in predictions])
        return predictions

    def forget_parts(self) -> None:
        """Remove what only a killed evaluation needs; call it when its result stands."""
        self.strategy.barrier()
        if self.strategy.is_rank_0():
            for path in self.folder.glob("*.part-*.jsonl"):
                path.unlink()

    def _resumed(self, stem: str) -> dict[tuple[str, int], Prediction]:
        """What earlier, killed evaluations had, on every rank; put into one file, since a killed one may end torn."""
        mine: list[Prediction] = []
        for path in sorted(self.folder.glob(f"{stem}.part-*.jsonl")):
            mine += [Prediction(**record) for record in read_jsonl(path)]
        known = {(p.task, p.index): p for part in self.strategy.gather(mine) for p in part}
        self.strategy.barrier()  # all have read
        if self.strategy.is_rank_0() and known:
            write_jsonl(self.folder / f"{stem}.part-before.jsonl", [asdict(p) for p in known.values()])
            for path in self.folder.glob(f"{stem}.part-[0-9]*.jsonl"):
                path.unlink()
        self.strategy.barrier()
        return known

    def _tell_dropped(self) -> None:
        dropped = sum((Counter(part) for part in self.strategy.gather(dict(self.encoder.dropped))), Counter())
        for name, count in dropped.items():
            self.reporter.warn(
                f"{name}: {count} prompts show fewer than {self.encoder.shots} demonstrations, since no more fit into "
                f"{self.encoder.max_tokens} tokens (prompt.max_tokens, the model's context)"
            )


def _append(file: IO[str], predictions: Sequence[Prediction]) -> None:
    file.writelines(json.dumps(asdict(prediction), ensure_ascii=False) + "\n" for prediction in predictions)
    file.flush()
