"""Memory is known before it is needed: the longest rows of a run, and the bounds of its micro-batches."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from extensions.common.console import Reporter
from extensions.common.errors import UserError
from extensions.data import Example
from extensions.data.splits import RunData
from extensions.distributed.strategy import Strategy
from extensions.model.loading import attention_of
from extensions.model.policy import ForwardPath
from extensions.planner.devices import GIB, total_memory
from extensions.planner.limits import RankMemory, may_be_large, rank_memory_of, static_rows, with_training
from extensions.prefix.limits import Form, MemoryLimits, PackLimit
from extensions.prompts import SPECIAL_TOKENS, PromptEncoder
from extensions.recipe import Recipe

COUNTED = 16  # rows with the longest texts that are tokenized to find the one with the most tokens
CERTAIN = 0.75  # an estimate is refused if even this share of it exceeds the device's whole memory


@dataclass(frozen=True)
class LongestRow:
    """The longest row of some splits, as a prompt with its response."""

    example: Example
    split: str
    tokens: int

    def __str__(self) -> str:
        return f"task {self.example.task.name}, {self.split} row {self.example.index}"


def longest_row(splits: Mapping[str, Sequence[Example]], encoder: PromptEncoder, new_tokens: int) -> LongestRow | None:
    """The row with the most tokens, among those with the longest texts; None without rows.

    Args:
        new_tokens: most tokens of a response.
    """
    rows = [(example, split) for split, examples in splits.items() for example in examples]
    rows.sort(key=lambda row: -sum(map(len, row[0].fields.values())))
    dropped, truncated = encoder.dropped.copy(), encoder.truncated.copy()
    found = [
        LongestRow(example, split, len(encoder.encode(example.task, example.fields)[0]) + new_tokens)
        for example, split in rows[:COUNTED]
    ]
    encoder.dropped, encoder.truncated = dropped, truncated  # the run counts its own
    return max(found, key=lambda row: row.tokens, default=None)


def most_tokens(examples: Sequence[Example], encoder: PromptEncoder) -> int:
    """An upper bound on the tokens of the rows' prompts, without a tokenizer: a token has at least one byte."""
    task_bytes = {
        example.task.name: len(encoder.text(example.task, dict.fromkeys(example.task.fields, "")).encode())
        for example in {example.task.name: example for example in examples}.values()
    }
    if encoder.shots:
        return encoder.max_tokens
    texts = max(
        (task_bytes[e.task.name] + 2 * sum(len(t.encode()) for t in e.fields.values()) for e in examples), default=0
    )
    return min(encoder.max_tokens, texts + SPECIAL_TOKENS)


class RunMemory:
    """The memory of a run on one rank: its longest rows, and the bounds that follow.

    Everything depends on the recipe, its data and the device's whole memory only, so a resumed run has the same bounds.

    Args:
        config: of the model.
        total: bytes of the device; the least of the ranks.
        ranks: of the run.
    """

    def __init__(
        self, recipe: Recipe, data: RunData, encoder: PromptEncoder, config: Any, on_cpu: bool, total: float, ranks: int
    ) -> None:
        self.recipe, self.config, self.on_cpu, self.total, self.ranks = recipe, config, on_cpu, total, ranks
        section = recipe.sft if recipe.method == "sft" else recipe.ppo
        new_tokens = recipe.rollout.max_new_tokens
        evaluated = {"evaluation": data.table, "validation": data.validation, "test": data.test}
        if data.splits:
            evaluated = {data.split: data.table} | {k: v for k, v in evaluated.items() if k != "evaluation"}
        settings = recipe.evaluation
        self.rows = {True: section.micro_batch_size, False: settings.micro_batch_size}  # training: yes or no
        self.longest: dict[bool, LongestRow | None] = {True: None, False: None}
        self.keys = {True: f"{'sft' if recipe.method == 'sft' else 'ppo'}.micro_batch_size"}
        self.keys[False] = "evaluation.micro_batch_size"
        every = [*data.train, *data.table, *data.validation, *data.test]
        # All responses to a prompt are in one micro-batch.
        k = recipe.ppo.samples_per_prompt if recipe.method == "ppo" else 1
        most = most_tokens(every, encoder) + k * new_tokens if every else 0
        together = max(*self.rows.values(), settings.batch_size, recipe.training_batch)
        explicit = recipe.model.micro_batch_tokens is not None
        self.attention = attention_of(recipe.model, config)  # once loaded, the model may get another
        large = bool(every) and may_be_large(config, together, most, total, self.attention)
        self.matters = bool(every) and (explicit or large)
        self._traced: dict[tuple[str, bool], RankMemory | None] = {}  # by attention, and whether by a flash kernel
        if self.matters:
            self.longest[False] = longest_row(evaluated, encoder, new_tokens)
            if recipe.method != "eval":
                self.longest[True] = longest_row({"training": data.train}, encoder, k * new_tokens)

    def estimate(self, path: ForwardPath | None = None) -> RankMemory | None:
        """The estimate of `nlu plan`; None where it cannot matter, or the model cannot be traced."""
        if not self.matters:
            return None
        recipe = self.recipe
        attention, flash = (self.attention, False) if path is None else (path.attention, path.flash)
        if (attention, flash) not in self._traced:
            form: Form | None = "flash" if flash else None
            found = rank_memory_of(recipe.model, recipe.lora, self.config, self.on_cpu, self.total, attention, form)
            self._traced[attention, flash] = None if found is None else with_training(found, recipe, self.ranks)
        memory = self._traced[attention, flash]
        return memory if memory is None or path is None else replace(memory, form=path.form)

    def check_longest(self, warn: Callable[[str], None], refuse: bool = True) -> None:
        """Refuse a row that cannot fit into memory even alone, and warn of one that may not.

        Raises:
            UserError: even `CERTAIN` of the estimate exceeds the memory, and `refuse`.
        """
        memory = self.estimate()
        if memory is None or memory.fixed > memory.total:
            return
        for training, row in self.longest.items():
            needed = memory.of_row(row.tokens, training) if row is not None else 0.0
            if needed <= memory.total:
                continue
            model = self.recipe.model
            remedies = ["prompt.max_tokens=N, which cuts longer texts"]
            if training and not model.gradient_checkpointing:
                remedies.append("model.gradient_checkpointing=true")
            if model.dtype == "float32" or (model.dtype == "auto" and self.on_cpu):
                remedies.append("model.dtype=bfloat16")
            if self.on_cpu and memory.form == "packed":
                remedies.append("model.attn_implementation=sdpa")
            if not self.on_cpu and not model.load_in_4bit:
                remedies.append("model.load_in_4bit=true")
            if self.ranks > 1 and self.recipe.deepspeed.zero_stage < 3:
                remedies.append("deepspeed.zero_stage=3 (with optimizer.name=adamw)")
            text = (
                f"{row}: {row.tokens if row else 0} tokens with its response; even alone in a micro-batch, "
                f"{'an update' if training else 'an answer'} needs about {needed / GIB:.1f} GiB, and "
                f"{'this machine gives a rank' if self.on_cpu else 'the GPU has'} {memory.total / GIB:.1f} GiB. Use "
                f"{', or '.join(remedies)}"
            )
            if refuse and CERTAIN * needed > memory.total:
                raise UserError(f"out of memory before it begins: {text}")
            warn(f"memory may not suffice. {text}")

    def limits(
        self, path: ForwardPath, strategy: Strategy, reporter: Reporter
    ) -> tuple[MemoryLimits, MemoryLimits, MemoryLimits]:
        """The bounds of the training's forwards, of its rollouts, and of evaluations; prints those that matter."""
        memory, tokens = self.estimate(path), self.recipe.model.micro_batch_tokens
        stage = self.recipe.deepspeed.zero_stage
        lines, found = [], []
        for training in (True, False):
            limit = memory.limit(2**31, training) if memory is not None else PackLimit(2**31, form=path.form)
            if tokens is not None:
                limit = replace(limit, tokens=float(tokens), pair_cost=0.0)
            row, rows = self.longest[training], self.rows[training]
            if row is not None and limit.tokens < math.inf:
                together = replace(limit, rows=rows)
                if static_rows(together, row.tokens) < rows:
                    bound = f"{limit.longest} tokens"
                    if (stage == 3 or (training and stage > 0)) and self.ranks > 1:
                        # Gradients, or weights, are exchanged in every forward: ranks need equally many.
                        limit = PackLimit(static_rows(together, row.tokens), form=limit.form)
                        bound = f"{limit.rows} rows (the same on all ranks, as ZeRO {stage} needs)"
                    kind = "training" if training else "evaluation"
                    lines.append(f"{kind} at most {rows} rows and {bound}; its longest row has {row.tokens} ({row})")
            found.append(limit)
        if lines:
            source = f"{self.total / GIB:.1f} GiB of memory" if tokens is None else "model.micro_batch_tokens"
            reporter.info(f"micro-batches, by {source}: {'; '.join(lines)}")
        cache = memory.cache_tokens if memory is not None else math.inf

        def warn(text: str) -> None:
            if reporter.active:
                reporter.warn(text)
            else:
                print(f"warning: rank {strategy.rank}: {text}", file=sys.stderr, flush=True)

        retry = stage < 3 or self.ranks == 1
        update, forward = found
        key = self.keys[True]
        return (
            MemoryLimits(update, retry=retry, warn=warn, key=key),
            MemoryLimits(forward, cache, retry, warn, key),
            MemoryLimits(forward, cache, retry, warn, self.keys[False]),
        )


def run_memory(recipe: Recipe, data: RunData, encoder: PromptEncoder, config: Any, strategy: Strategy) -> RunMemory:
    """The memory of a run on its ranks. Call it on every rank."""
    total = min(strategy.gather(total_memory(strategy.device)))
    return RunMemory(recipe, data, encoder, config, strategy.device.type == "cpu", total, strategy.world_size)


def check_memory(
    recipe: Recipe, data: RunData, encoder: PromptEncoder, config: Any, warn: Callable[[str], None]
) -> None:
    """The check of the longest rows before a run. On a machine without a GPU it only warns: the run may have one.

    Raises:
        UserError: a row cannot fit into the memory of this machine's GPU.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    ranks = torch.cuda.device_count() or 1
    memory = RunMemory(recipe, data, encoder, config, device.type == "cpu", total_memory(device), ranks)
    memory.check_longest(warn, refuse=device.type != "cpu")
