"""The bounds of micro-batches that a device's memory allows, and the estimate for a single row."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from extensions.common.errors import UserError
from extensions.model.loading import attention_of
from extensions.model.policy import LOGITS_AT_ONCE
from extensions.planner.devices import CPU_CONTEXT, GIB, GPU_CONTEXT
from extensions.planner.flops import ModelShape
from extensions.planner.job import USABLE, base_bytes, measure
from extensions.planner.memory import DEEPSPEED_BUCKET, LOGIT_COPIES, PackMemory, pack_memory
from extensions.prefix.attention import NAME as PACKED
from extensions.prefix.limits import Cost, Form, PackLimit
from extensions.recipe import Lora, Model, Recipe

NEGLIGIBLE = 0.25  # share of the memory below which a rough upper estimate needs no better one
STATE_BYTES = 20  # per trained parameter: itself, a copy, its gradient, two moments, float32


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank: what is always there, and what forwards and caches take."""

    total: float  # of the device
    fixed: float
    training: PackMemory
    forward: PackMemory  # without gradients, with keys and values for decoding
    cache_token: float  # of the KV cache while rows are decoded
    form: Form
    shape: ModelShape
    base: float  # bytes of the base, part of `fixed`

    @property
    def free(self) -> float:
        return max(0.0, USABLE * self.total - self.fixed)

    def limit(self, rows: int, training: bool) -> PackLimit:
        """The most that a pack may hold. Sampling leaves half of the memory to the cache."""
        memory = self.training if training else self.forward
        budget = max(0.0, self.free / (1 if training else 2) - memory.constant)
        return PackLimit(rows, budget / memory.token, memory.pair / memory.token, self.form)

    @property
    def cache_tokens(self) -> float:
        return self.free / 2 / self.cache_token

    def of_row(self, tokens: int, training: bool) -> float:
        """Bytes that a rank needs for a pack of a single row."""
        memory, cost = self.training if training else self.forward, Cost.of_rows(1, tokens, self.form)
        return self.fixed + memory(cost.tokens, cost.pairs)


def rank_memory_of(
    model: Model,
    lora: Lora,
    config: Any,
    on_cpu: bool,
    total: float,
    attention: str | None = None,
    form: Form | None = None,
) -> RankMemory | None:
    """The estimate for a frozen base with adapters on a device with `total` bytes; None if it cannot be traced.

    Args:
        attention, form: of the forward path, once it is known; None: those that the model will probably get, without a
            flash kernel.
    """
    attention = attention or attention_of(model, config)
    dtype = ("float32" if on_cpu else "bfloat16") if model.dtype == "auto" else model.dtype
    try:
        shape, trace = measure(config, lora, model.trust_remote_code, attention, getattr(torch, dtype))
    except UserError:
        return None
    value, heads = 2 if dtype == "bfloat16" else 4, config.get_text_config().num_attention_heads
    form = form or ("packed" if attention == PACKED else "masked")
    fixed = (CPU_CONTEXT if on_cpu else GPU_CONTEXT) * GIB + LOGITS_AT_ONCE * (4 * LOGIT_COPIES + value)

    def memory(layers: int, kept: float) -> PackMemory:
        found = pack_memory(shape, trace, heads, value, form, on_cpu, layers)
        return PackMemory(found.constant, found.token + kept, found.pair)

    base = base_bytes(model, shape, value)
    inputs, cache = shape.layers * shape.hidden * value, 2 * shape.kv_width * value
    return RankMemory(
        total=total,
        fixed=fixed + base,
        training=memory(0, inputs) if model.gradient_checkpointing else memory(shape.layers, 0),
        forward=memory(0, cache * shape.layers),
        cache_token=cache * (shape.layers + 1),  # one layer's twice, while it grows
        form=form,
        shape=shape,
        base=base,
    )


def with_training(memory: RankMemory, recipe: Recipe, ranks: int) -> RankMemory:
    """The estimate with what a recipe's run holds besides: trained parameters and their state, ZeRO's, vLLM."""
    shape, stage, fixed = memory.shape, recipe.deepspeed.zero_stage, memory.fixed
    critic = recipe.ppo.value_model if recipe.method == "ppo" else "none"
    trained = shape.lora * (2 if critic == "adapter" else 1) + (shape.value_head if critic != "none" else 0)
    fixed += STATE_BYTES * trained + (DEEPSPEED_BUCKET if stage else 0)
    fixed -= memory.base * (1 - 1 / ranks) if stage == 3 else 0
    if recipe.rollout.backend == "vllm" and not recipe.vllm.sleep:
        fixed += recipe.vllm.gpu_memory_utilization * memory.total
    return replace(memory, fixed=fixed)


def may_be_large(config: Any, rows: int, tokens: int, total: float, attention: str) -> bool:
    """Whether `rows` rows of `tokens` tokens could take a notable part of the memory: a rough upper estimate.

    It needs no trace of the model, and holds for dense models; for others it is always True.

    Args:
        attention: `PACKED` computes the pairs of each row alone; others those of the whole pack.
    """
    text = config.get_text_config()
    hidden, layers = getattr(text, "hidden_size", None), getattr(text, "num_hidden_layers", None)
    heads = getattr(text, "num_attention_heads", None)
    if not (hidden and layers and heads) or any(
        "expert" in name and isinstance(size, int) for name, size in vars(text).items()
    ):
        return True
    wide = getattr(text, "intermediate_size", None) or 4 * hidden
    per_token = 4 * layers * (40 * hidden + 6 * wide)
    weights = 4 * (layers * (4 * hidden**2 + 3 * hidden * wide) + 2 * hidden * text.vocab_size)
    count = rows * tokens
    pairs = count * (tokens if attention == PACKED else count)
    return weights + per_token * count + 8 * layers * heads * pairs > NEGLIGIBLE * total


def static_rows(limit: PackLimit, tokens: int) -> int:
    """The most rows of `tokens` tokens that a pack may hold without common prefixes; at least one.

    For ranks that must run equally many forwards, which a bound of tokens would not give them.
    """
    rows = limit.rows
    while rows > 1 and not limit.admits(Cost.of_rows(rows, tokens, limit.form)):
        rows //= 2
    return rows if limit.tokens < math.inf else limit.rows
