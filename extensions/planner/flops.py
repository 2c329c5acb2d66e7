"""FLOPs of a job in the shared-prefix form, from the model's shape and token counts.

These are the minimal FLOPs of the job: the prefix once per pack, logits at predicting positions only, and attention
over the query-key pairs that the mask allows. A multiplication and an addition are two FLOPs; only matrix products
count, as in torch's `FlopCounterMode`.

A linear layer of P weights takes 2 P FLOPs per token forward. Its weights are frozen, so its backward pass takes the
same number (gradients of the inputs only). LoRA matrices are trained, so their backward pass takes twice their forward.
Attention takes 4 x heads x head size FLOPs per pair and layer forward (scores, weighted values), and twice that
backward. Kernels that recompute the scores take 2.5 times; this avoidable part is not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from extensions.model.adapters import lora_config
from extensions.recipe import Lora


@dataclass(frozen=True)
class ModelShape:
    """Weights per part of the model, without biases except in `parameters`, and its dimensions."""

    linear: int  # the decoder's linear layers, applied to every token
    linear_idle: int  # part of `linear`: layers whose inputs need no gradient, since no trained parameters precede them
    lora: int  # the LoRA matrices of one adapter
    lora_idle: int  # part of `lora`: matrices whose inputs need no gradient
    lora_tensors: int  # number of matrices of one adapter
    head: int  # vocab x hidden
    parameters: int  # the whole base, embeddings and biases included
    layers: int
    attention_width: int  # heads x head size
    kv_width: int  # key-value heads x head size
    hidden: int
    vocab: int

    @property
    def value_head(self) -> int:
        """Weights of the critic's MLP (extensions.model.policy.ValueHead)."""
        return self.hidden * self.hidden + self.hidden

    @staticmethod
    def of(config: Any, lora: Lora, trust_remote_code: bool = False) -> ModelShape:
        """Count the model's weights on the meta device.

        Args:
            config: transformers' configuration.

        Raises:
            UserError: the model has no modules named in `lora.target_modules`.
        """
        model = meta_model(config, lora, trust_remote_code=trust_remote_code)
        trunk = model.base_model
        linears = {name: module for name, module in trunk.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
        adapter = {name for name in linears if "lora_" in name}
        base, idle = linears.keys() - adapter, _idle_layers(trunk, linears)
        text = config.get_text_config()
        heads = text.num_attention_heads
        head_size = getattr(text, "head_dim", None) or text.hidden_size // heads

        def weights(names: set[str]) -> int:
            return sum(linears[name].weight.numel() for name in names)

        return ModelShape(
            linear=weights(base),
            linear_idle=weights(base & idle),
            lora=weights(adapter),
            lora_idle=weights(adapter & idle),
            lora_tensors=len(adapter),
            head=model.get_output_embeddings().weight.numel(),
            parameters=sum(p.numel() for name, p in model.named_parameters() if "lora_" not in name),
            layers=text.num_hidden_layers,
            attention_width=heads * head_size,
            kv_width=(getattr(text, "num_key_value_heads", None) or heads) * head_size,
            hidden=text.hidden_size,
            vocab=text.vocab_size,
        )


def meta_model(
    config: Any,
    lora: Lora,
    attention: str = "eager",
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The causal LM with LoRA adapters on the meta device: modules and shapes, no weights."""
    config._experts_implementation = "eager"  # transformers' grouped matrix products fail on meta tensors (5.15)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention, trust_remote_code=trust_remote_code
        )
        model.requires_grad_(False)
        model.add_adapter(lora_config(model, lora))  # transformers' interface to peft; float32, as in training
    return model


def _idle_layers(trunk: nn.Module, linears: dict[str, Any]) -> set[str]:
    """Names of the layers whose input needs no gradient, from a forward pass of one token."""
    names = {module: name for name, module in linears.items()}
    idle = set()

    def record(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if not inputs[0].requires_grad:
            idle.add(names[module])

    handles = [module.register_forward_pre_hook(record) for module in names]
    token = torch.zeros(1, 1, dtype=torch.long, device="meta")
    trunk(input_ids=token, attention_mask=token, use_cache=False)
    for handle in handles:
        handle.remove()
    return idle


class SampleTokens(NamedTuple):
    """Token counts of a prompt and its responses."""

    task: int  # index; rows of one task share their prefix
    prefix: int  # tokens that all prompts of the task begin with
    suffix: int  # tokens of the prompt after the prefix
    response: int  # of each response
    responses: int = 1


@dataclass(frozen=True)
class Work:
    """The counts to which FLOPs are proportional."""

    tokens: int = 0  # tokens that pass the decoder
    pairs: int = 0  # query-key pairs per layer
    predicting: int = 0  # positions with logits or values

    def __add__(self, other: Work) -> Work:
        return Work(self.tokens + other.tokens, self.pairs + other.pairs, self.predicting + other.predicting)


def packs(rows: Sequence[SampleTokens], size: int) -> list[Sequence[SampleTokens]]:
    """The rows in packs of at most `size`, as `extensions.prefix.tree.micro_batches` cuts them.

    Args:
        rows: task by task.
    """
    return [rows[first : first + size] for first in range(0, len(rows), size)]


def pack_work(pack: Sequence[SampleTokens], sequence: bool = False, dense: bool = False) -> Work:
    """Work of a pack: each task's prefix once, then each prompt once, then the responses without their last tokens,
    which predict nothing.

    Args:
        sequence: targets are all tokens except each sample's first (SFT), not only response tokens; where rows diverge,
            each continuation is a separate target.
        dense: count all query-key pairs, as masked attention computes them, not only those that the mask allows.
    """
    tokens = pairs = predicting = 0
    for prefix in {row.task: row.prefix for row in pack}.values():
        tokens += prefix
        pairs += _triangle(prefix)
        predicting += max(prefix - 1, 0) if sequence else 0
    for row in pack:
        written = max(row.response - 1, 0)
        own = row.suffix + row.responses * written
        tokens += own
        pairs += own * row.prefix + _triangle(row.suffix)
        pairs += row.responses * (written * row.suffix + _triangle(written))
        predicting += own + (row.prefix > 0) if sequence else row.responses * max(row.response, 1)
    return Work(tokens, tokens**2 if dense else pairs, predicting)


def packed_work(rows: Sequence[SampleTokens], size: int, sequence: bool = False, dense: bool = False) -> Work:
    """All rows in packs of at most `size`; see `pack_work`."""
    return sum((pack_work(pack, sequence, dense) for pack in packs(rows, size)), Work())


def _triangle(n: int) -> int:
    return n * (n + 1) // 2


def forward_flops(shape: ModelShape, work: Work, adapter: bool = True, head: bool = True, value: bool = False) -> float:
    """FLOPs of a forward pass.

    Args:
        adapter: with LoRA; False: the base, as the reference.
        head: with logits at the predicting positions.
        value: with values at the predicting positions.
    """
    trunk = 2 * work.tokens * (shape.linear + (shape.lora if adapter else 0))
    heads = 2 * work.predicting * ((shape.head if head else 0) + (shape.value_head if value else 0))
    return float(trunk + heads + 4 * shape.layers * shape.attention_width * work.pairs)


def backward_flops(shape: ModelShape, work: Work, head: bool = True, value: bool = False) -> float:
    """FLOPs of the backward pass: gradients of LoRA, of the value head, and of all inputs on the path to LoRA."""
    trunk = 2 * work.tokens * (shape.linear - shape.linear_idle + 2 * shape.lora - shape.lora_idle)
    heads = 2 * work.predicting * ((shape.head if head else 0) + (2 * shape.value_head if value else 0))
    return float(trunk + heads + 8 * shape.layers * shape.attention_width * work.pairs)


def training_flops(shape: ModelShape, work: Work, checkpointing: bool, head: bool = True, value: bool = False) -> float:
    """FLOPs of a forward and backward pass; with checkpointing the decoder's layers run forward twice."""
    flops = forward_flops(shape, work, head=head, value=value) + backward_flops(shape, work, head=head, value=value)
    return flops + (forward_flops(shape, replace(work, predicting=0)) if checkpointing else 0.0)


def ppo_flops(
    shape: ModelShape,
    rows: Sequence[SampleTokens],
    epochs: int,
    micro_batch_size: int,
    mini_batch_size: int | None = None,
    critic: Literal["shared", "adapter", "none"] = "shared",
    reference: bool = True,
    reference_adapter: bool = False,
    recompute: bool = False,
    checkpointing: bool = False,
    dense: bool = False,
) -> dict[str, float]:
    """FLOPs of one PPO iteration by phase, in execution order.

    Args:
        rows: one per prompt.
        micro_batch_size: rows per pack.
        mini_batch_size: rows per optimizer step on this rank; None: all.
        reference: a KL penalty needs a forward of the reference.
        reference_adapter: the reference is an adapter, not the base.
        recompute: a separate forward computes the old logprobs (bfloat16).
        checkpointing: activations are recomputed in the backward pass.
        dense: attention over all pairs of a pack.
    """
    work, shared = packed_work(rows, micro_batch_size, dense=dense), critic == "shared"
    # A rollout processes each token once, and attends over the same pairs as the pack of its samples.
    phases = {"rollout": forward_flops(shape, packed_work(rows, micro_batch_size), value=shared)}
    if recompute:
        phases["old logprobs"] = forward_flops(shape, work, value=shared)
    if critic == "adapter":
        phases["values"] = forward_flops(shape, work, head=False, value=True)
    if reference:
        phases["reference"] = forward_flops(shape, work, adapter=reference_adapter)
    update = packed_work(rows, min(micro_batch_size, mini_batch_size or micro_batch_size), dense=dense)
    phases["update"] = epochs * training_flops(shape, update, checkpointing, value=shared)
    if critic == "adapter":
        phases["update"] += epochs * training_flops(shape, update, checkpointing, head=False, value=True)
    return phases
