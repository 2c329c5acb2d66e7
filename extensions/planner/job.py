"""A training job: everything that its memory and time depend on, except the number of ranks and the setting."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from extensions.common.errors import UserError
from extensions.model.loading import attention_of, load_config
from extensions.planner.activations import Trace, trace_model
from extensions.planner.devices import NO_FLASH, PlanOptions, find_device, link_rate
from extensions.planner.flops import ModelShape, SampleTokens, packed_work, ppo_flops, training_flops
from extensions.planner.tokens import count_tokens, typical_batch
from extensions.prefix.attention import NAME as PACKED
from extensions.prefix.limits import Form
from extensions.recipe import Lora, Model, Recipe

BYTES_4BIT = 0.516  # per weight in nf4 with double quantisation (QLoRA, section 3)
USABLE = 0.92  # share of the memory; the rest is lost to fragmentation


@dataclass(frozen=True)
class Setting:
    """The keys that may be chosen without changing the results (beyond rounding)."""

    zero_stage: int
    gradient_checkpointing: bool
    micro_batch_size: int

    def assignments(self, method: str) -> list[str]:
        """`key=value`, for the command line."""
        return [
            f"deepspeed.zero_stage={self.zero_stage}",
            f"model.gradient_checkpointing={str(self.gradient_checkpointing).lower()}",
            f"{method}.micro_batch_size={self.micro_batch_size}",
        ]


@dataclass(frozen=True)
class Estimate:
    """Costs of one rank under one setting."""

    setting: Setting
    memory: dict[str, float]  # part -> GiB, at the peak of a step
    at_load: float  # GiB while the model loads: the whole base, before ZeRO 3 shards it
    seconds: dict[str, float]  # phase -> seconds of one step

    @property
    def total(self) -> float:
        """Peak GiB."""
        return max(sum(self.memory.values()), self.at_load)

    @property
    def step_s(self) -> float:
        return sum(self.seconds.values())


class TrainingJob:
    """A recipe, its model, data and device.

    Args:
        warn: called with each non-fatal finding.

    Raises:
        UserError: the method does not train an LLM, the model's family cannot be traced, or an option is invalid.
    """

    def __init__(self, recipe: Recipe, options: PlanOptions, warn: Callable[[str], None]) -> None:
        if recipe.method not in ("ppo", "sft"):
            raise UserError(f"method: {recipe.method!r} trains no LLM; plan a recipe of ppo or sft (method=ppo)")
        self.recipe, self.options, model, ppo = recipe, options, recipe.model, recipe.ppo
        link_rate(options.link, 1)
        if model.load_in_4bit and options.cpu:
            raise UserError("model.load_in_4bit: true needs a GPU; set it to false, or leave out --cpu")
        config = load_config(model)
        attention = attention_of(model, config)
        auto = "float32" if options.cpu else "bfloat16"
        self.dtype = auto if model.dtype == "auto" else model.dtype
        self.shape, self.trace = measure(
            config, recipe.lora, model.trust_remote_code, attention, getattr(torch, self.dtype)
        )
        self.device = find_device(options, self.dtype, self.shape.hidden)
        self.tokens, self.tokens_source = count_tokens(recipe, config, options, warn)

        self.num_heads = config.get_text_config().num_attention_heads
        self.form = expected_form(attention, config, self.dtype, options)
        self.dense = self.form == "masked"  # attention computes all pairs, most of them masked
        self.value_bytes = 2 if self.dtype == "bfloat16" else 4
        self.base_bytes = base_bytes(model, self.shape, self.value_bytes)

        self.ppo = recipe.method == "ppo"
        self.sequence_loss = not self.ppo and recipe.sft.loss == "sequence"
        self.batch_size = recipe.training_batch
        mini_batch_size = ppo.mini_batch_size if self.ppo else None
        self.optimizer_steps = self.batch_size // (mini_batch_size or self.batch_size)  # per pass over the batch
        self.has_critic = self.ppo and ppo.value_model != "none"
        self.num_adapters = 2 if self.ppo and ppo.value_model == "adapter" else 1
        self.trained = self.num_adapters * self.shape.lora  # parameters; PPO's value head has biases
        self.trained += self.shape.value_head + self.shape.hidden + 1 if self.has_critic else 0
        self.reference_adapter = (
            self.ppo and model.adapter is not None and ppo.kl.reference == "start" and ppo.kl.init > 0
        )
        # Without these, the first update's forward of a single pack also yields the old logprobs (training.ppo).
        separate = bool(recipe.lora.dropout) or mini_batch_size is not None or ppo.value_model == "adapter"
        when = ppo.old_logprobs
        self.recomputes = separate and (when == "recomputed" or (when == "auto" and self.dtype != "float32"))

    def fits(self, estimate: Estimate) -> bool:
        return estimate.total <= USABLE * self.device.memory

    def divides_among(self, ranks: int) -> bool:
        """Whether the ranks get equal shares of an optimizer step, as `extensions.runs.training_run` requires."""
        return self.batch_size // self.optimizer_steps % ranks == 0

    def batch(self, rows: int, longest: bool = False) -> list[SampleTokens]:
        """`rows` rows of a step; see `typical_batch`."""
        rollout, stated = self.recipe.rollout, self.options.response_tokens
        budget = (stated, stated) if stated is not None else (rollout.min_new_tokens, rollout.max_new_tokens)
        if not self.ppo:
            return typical_batch(self.tokens, rows, None, longest, self.recipe.sft.samples_per_example)
        return typical_batch(self.tokens, rows, budget, longest, self.recipe.ppo.samples_per_prompt)

    def flops(self, rows: int, setting: Setting, dense: bool = False) -> dict[str, float]:
        """FLOPs of a step on a rank with `rows` rows, by phase."""
        batch, size, checkpointing = self.batch(rows), setting.micro_batch_size, setting.gradient_checkpointing
        if not self.ppo:
            work = packed_work(batch, size, self.sequence_loss, dense)
            return {"update": training_flops(self.shape, work, checkpointing)}
        ppo = self.recipe.ppo
        return ppo_flops(
            self.shape,
            batch,
            ppo.epochs,
            size,
            rows // self.optimizer_steps or 1,
            ppo.value_model,
            reference=ppo.kl.init > 0,
            reference_adapter=self.reference_adapter,
            recompute=self.recomputes,
            checkpointing=checkpointing,
            dense=dense,
        )


def expected_form(attention: str, config: Any, dtype: str, options: PlanOptions) -> Form:
    """The form of the forwards that `extensions.model.proof` will probably choose."""
    if attention != PACKED:
        return "masked"
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    return "flash" if dtype == "bfloat16" and not (options.cpu or options.gpu in NO_FLASH or capped) else "packed"


def base_bytes(model: Model, shape: ModelShape, value: int) -> float:
    """Bytes of the frozen base, whose numbers have `value` bytes unless they are quantized."""
    quantized = (BYTES_4BIT - value) * shape.linear if model.load_in_4bit else 0.0
    return value * shape.parameters + quantized


def measure(config: Any, lora: Lora, trusted: bool, attention: str, dtype: torch.dtype) -> tuple[ModelShape, Trace]:
    """Shape and trace. Raises UserError for a model family whose code fails without weights."""
    try:
        return ModelShape.of(config, lora, trusted), trace_model(config, lora, attention, dtype, trusted)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"nlu plan cannot count models of the family {config.model_type!r}, whose code does not run without "
            f"weights ({type(error).__name__}: {' '.join(str(error).split())[:99]}); nlu check loads and measures one"
        ) from error
