"""Token counts of the training rows, and typical batches of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from extensions.data import (
    Example,
    check_trainable,
    epoch_sizes,
    has_split,
    load_examples,
    load_training,
    rows_of_epoch,
    subsample_evenly,
)
from extensions.model.prompt_encoder import load_recipe_encoder
from extensions.planner.devices import PlanOptions
from extensions.planner.flops import SampleTokens
from extensions.prefix.tree import common_prefix
from extensions.prompts import PromptEncoder
from extensions.recipe import Recipe
from extensions.tasks import SUITES, Task

COUNTED_ROWS = 512  # training rows, over all tasks, that are tokenized
# Without data: about the means of GLUE's tasks (SentencePiece), and a short answer.
PREFIX_TOKENS, SUFFIX_TOKENS, ANSWER_TOKENS = 110, 50, 7


@dataclass(frozen=True)
class TaskTokens:
    """Token counts of one task's training rows."""

    task: str
    rows: int  # per epoch, after mixing
    prefix: int  # tokens that all prompts begin with
    suffixes: list[int]  # tokens after the prefix, of the counted rows
    answers: list[int]  # tokens of gold answer and closing tag, for SFT
    possible: list[int]  # tokens of each right answer and closing tag: no budget of PPO cuts one that fits


def count_tokens(
    recipe: Recipe, config: Any, options: PlanOptions, warn: Callable[[str], None]
) -> tuple[list[TaskTokens], str]:
    """The token counts of each trained task, and a sentence that names their source.

    Raises:
        UserError: no task of the recipe can be trained on, or the data or the tokenizer cannot be read.
    """
    data = recipe.data
    check_trainable(data.tasks)
    tasks = [task for task in data.tasks if has_split(task, "train")]
    stated = options.prefix_tokens is not None and options.suffix_tokens is not None
    absent = data.root is None and any(task.suite in SUITES for task in tasks)
    sizes: dict[str, int] = {}
    counts: dict[str, tuple[int, list[int], list[int], list[int]]] = {}
    if stated or absent:
        prefix = PREFIX_TOKENS if options.prefix_tokens is None else options.prefix_tokens
        suffix, answer = options.suffix_tokens or SUFFIX_TOKENS, options.response_tokens or ANSWER_TOKENS
        for task in tasks:
            rows = task.source.sizes.get("train") or len(load_examples(task, "train", data.root, recipe.seed))
            sizes[task.name] = min(rows, data.max_train_samples or rows)
            counts[task.name] = prefix, [suffix], [answer], [answer]
        origin = "as stated" if stated else "assumed, data.root is not set"
        source = f"{prefix} + {suffix} prompt tokens {origin}; rows of the official training sets"
    else:
        encoder = load_recipe_encoder(recipe, config, tasks, warn)
        for task in tasks:
            examples = load_training(task, data.root, data.max_train_samples, recipe.seed)
            sizes |= epoch_sizes(examples, data.oversample)
            sample = subsample_evenly(examples, max(2, COUNTED_ROWS // len(tasks)))
            sets = {str(example.label) for example in examples} if task.multi_label else ()
            possible = list(encoder.answer_tokens(task, sets).values())
            counts[task.name] = *_count_rows(encoder, task, sample, options), possible
        counted = sum(len(suffixes) for _, suffixes, *_ in counts.values())
        source = f"tokens counted on {counted} training rows with the model's tokenizer"
    mixed = rows_of_epoch(sizes, data.mixing, data.mixing_cap, data.mixing_temperature)
    return [TaskTokens(name, mixed[name], *count) for name, count in counts.items()], source


def _count_rows(
    encoder: PromptEncoder, task: Task, examples: Sequence[Example], options: PlanOptions
) -> tuple[int, list[int], list[int]]:
    """Token counts of prefix, suffixes and answers; the options override them."""
    encoded = [encoder.encode(task, example.fields) for example in examples]
    prompts = [ids for ids, _ in encoded]
    prefix = common_prefix(prompts) if options.prefix_tokens is None else options.prefix_tokens
    suffixes = [options.suffix_tokens or max(1, len(ids) - prefix) for ids in prompts]
    answers = [
        options.response_tokens or len(encoder.answer_ids(ids, text, task.answer(str(example.label))))
        for (ids, text), example in zip(encoded, examples, strict=True)
    ]
    return prefix, suffixes, answers


def typical_batch(
    tokens: Sequence[TaskTokens],
    num_rows: int,
    budget: tuple[int, int] | None,
    longest: bool = False,
    samples_per_prompt: int = 1,
) -> list[SampleTokens]:
    """A typical training batch, task by task.

    Tasks, prompt lengths and response lengths are evenly spaced quantiles of their distributions: a batch of one row
    has the medians, and a large batch the means.

    Args:
        budget: lowest and highest response budget (PPO; every response uses its budget, and a task's lowest one holds
            its right answers); None: gold answers (SFT).
        longest: long rows, for the memory estimate: 95th percentile of prompts, longest responses.
        samples_per_prompt: responses to each prompt.
    """
    shares = np.cumsum([task.rows for task in tokens]) / sum(task.rows for task in tokens)
    task_of = np.searchsorted(shares, (np.arange(num_rows) + 0.5) / num_rows).clip(max=len(tokens) - 1)
    batch = []
    for k, task in enumerate(tokens):
        count = int((task_of == k).sum())
        levels = (np.arange(count) + 0.5) / max(count, 1)
        suffixes = np.quantile(task.suffixes, np.full(count, 0.95) if longest else levels).round()
        ends = np.ones(count) if longest else levels
        if budget is None:
            responses = np.quantile(task.answers, ends).round()
        else:
            high = budget[1]
            low = max([budget[0], *(tokens for tokens in task.possible if tokens <= high)])
            responses = np.minimum(low + np.floor(ends * (high - low + 1)), high)
        batch += [
            SampleTokens(k, task.prefix, int(s), int(r), samples_per_prompt)
            for s, r in zip(suffixes, responses, strict=True)
        ]
    return batch
