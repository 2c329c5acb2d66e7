"""The arithmetic of a job in the shared-prefix form: its FLOPs, from the model's shape and numbers of tokens.

These are the FLOPs that the job cannot avoid: the prefix once in each pack, logits at predicting places only, and
attention over the query-key pairs that the mask lets through. A multiplication and an addition are two FLOPs; only
matrix products are counted, as torch's `FlopCounterMode` does.

A linear layer of P weights does 2 P FLOPs a token forward. Its weights are frozen, so its backward pass is as much
again (gradients of the inputs alone); LoRA matrices are trained, and cost twice their forward. Attention does 4 x heads
x head size FLOPs a pair and layer forward (scores, weighted values), and twice that backward (2.5 times in kernels that
compute the scores again, which could be avoided and is not counted).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from extensions.model.adapters import lora_config
from extensions.recipe import Lora


@dataclass(frozen=True)
class ModelShape:
    """What the arithmetic needs to know of a model with LoRA adapters; numbers of weights without biases, but for
    `parameters`."""

    linear: int  # of the decoder's linear layers, that every token passes
    linear_idle: int  # of these, those with nothing trained before them: their inputs need no gradient
    lora: int  # of the LoRA matrices of one adapter
    lora_idle: int  # of these, those with nothing trained before them
    lora_tensors: int  # matrices of one adapter
    head: int  # vocab x hidden
    parameters: int  # all of the base, embeddings and biases included
    layers: int
    attention_width: int  # heads x head size
    kv_width: int  # key-value heads x head size
    hidden: int
    vocab: int

    @property
    def value_head(self) -> int:
        """Weights of the critic's MLP (extensions.model.policy.ValueHead)."""
        return self.hidden * self.hidden + self.hidden

    @property
    def trained(self) -> int:
        """Everything that PPO with a shared critic trains, biases included."""
        return self.lora + self.value_head + self.hidden + 1

    @staticmethod
    def of(config: Any, lora: Lora, trust_remote_code: bool = False) -> ModelShape:
        """The shape of a model, counted on its modules; no weights are read or made.

        Args:
            config: of transformers.

        Raises:
            UserError: the model has no layers of the names that `lora` asks for.
        """
        model = meta_model(config, lora, trust_remote_code=trust_remote_code)
        trunk = model.base_model
        linears = {name: module for name, module in trunk.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
        idle = _without_input_gradient(trunk, linears)
        numbers = {name: module.weight.numel() for name, module in linears.items()}
        text = config.get_text_config()
        heads = text.num_attention_heads
        head_size = getattr(text, "head_dim", None) or text.hidden_size // heads
        kv_heads = getattr(text, "num_key_value_heads", None) or heads

        def total(adapter: bool, names: set[str]) -> int:
            return sum(n for name, n in numbers.items() if ("lora_" in name) == adapter and name in names)

        return ModelShape(
            linear=total(False, set(linears)),
            linear_idle=total(False, idle),
            lora=total(True, set(linears)),
            lora_idle=total(True, idle),
            lora_tensors=sum("lora_" in name for name in linears),
            head=model.get_output_embeddings().weight.numel(),
            parameters=sum(p.numel() for name, p in model.named_parameters() if "lora_" not in name),
            layers=text.num_hidden_layers,
            attention_width=heads * head_size,
            kv_width=kv_heads * head_size,
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
    """The causal LM with LoRA adapters, on the meta device: modules and shapes without numbers."""
    config._experts_implementation = "eager"  # transformers' grouped products (5.15) have none without numbers
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attention, trust_remote_code=trust_remote_code
        )
        model.requires_grad_(False)
        model.add_adapter(lora_config(model, lora))  # transformers' own way to peft; float32, as in training
    return model


def _without_input_gradient(trunk: nn.Module, linears: Mapping[str, nn.Module]) -> set[str]:
    """Names of the layers whose input needs no gradient, found by a forward of one token."""
    idle: set[str] = set()

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            if not inputs[0].requires_grad:
                idle.add(name)

        return hook

    handles = [module.register_forward_pre_hook(watch(name)) for name, module in linears.items()]
    one = torch.zeros(1, 1, dtype=torch.long, device="meta")
    trunk(input_ids=one, attention_mask=one, use_cache=False)
    for handle in handles:
        handle.remove()
    return idle


# ------------------------------------------------------------------------------------------------- amounts of work


@dataclass(frozen=True)
class Batch:
    """Token numbers of B rows of one task."""

    prefix: int  # tokens that all prompts begin with
    suffixes: Sequence[int]  # (B) tokens of each prompt after the prefix
    responses: Sequence[int]  # (B) tokens written after each prompt

    @property
    def rows(self) -> int:
        return len(self.suffixes)


@dataclass(frozen=True)
class Work:
    """Amounts that FLOPs are proportional to."""

    tokens: int = 0  # that pass the decoder
    pairs: int = 0  # query-key pairs in a layer
    predicting: int = 0  # places with logits or values

    def __add__(self, other: Work) -> Work:
        return Work(self.tokens + other.tokens, self.pairs + other.pairs, self.predicting + other.predicting)


def packs(batches: Sequence[Batch], size: int) -> list[list[Batch]]:
    """The rows in packs of at most `size`, one task per pack, as `extensions.prefix.tree.micro_batches` cuts them.

    Args:
        batches: one for each task in the batch.
    """
    rows = [(k, i) for k, batch in enumerate(batches) for i in range(batch.rows)]
    found = []
    for first in range(0, len(rows), size):
        chunk = rows[first : first + size]
        members = {k: [i for group, i in chunk if group == k] for k, _ in chunk}
        found.append(
            [
                Batch(batches[k].prefix, [batches[k].suffixes[i] for i in own], [batches[k].responses[i] for i in own])
                for k, own in members.items()
            ]
        )
    return found


def pack_work(pack: Sequence[Batch], sequence: bool = False, dense: bool = False) -> Work:
    """One pack: each task's prefix once, then its rows, without the last response token, which predicts nothing.

    Args:
        sequence: targets are all tokens but each sample's first (SFT), not the response tokens alone; where the rows
            part, each continuation is counted as another.
        dense: all pairs, as masked attention computes them, not those that see each other.
    """
    tokens = pairs = predicting = 0
    for batch in pack:
        tokens += batch.prefix
        pairs += _triangle(batch.prefix)
        predicting += max(batch.prefix - 1, 0) + (batch.rows if batch.prefix else 0) if sequence else 0
        for suffix, response in zip(batch.suffixes, batch.responses, strict=True):
            own = suffix + max(response - 1, 0)
            tokens += own
            pairs += own * batch.prefix + _triangle(own)
            predicting += own if sequence else max(response, 1)
    return Work(tokens, tokens**2 if dense else pairs, predicting)


def prompt_work(batches: Sequence[Batch], micro_batch_size: int, dense: bool = False) -> Work:
    """The packed forwards over the prompts of a rollout; their logits are counted with the written tokens."""
    prompts = [Batch(batch.prefix, batch.suffixes, [0] * batch.rows) for batch in batches]
    read = sum((pack_work(pack, dense=dense) for pack in packs(prompts, micro_batch_size)), Work())
    return Work(read.tokens, read.pairs, 0)


def decode_work(batches: Sequence[Batch]) -> Work:
    """One forward for each written token but a row's last, and logits for each."""
    work = Work()
    for batch in batches:
        for suffix, response in zip(batch.suffixes, batch.responses, strict=True):
            steps = max(response - 1, 0)
            work += Work(steps, steps * (batch.prefix + suffix) + _triangle(steps), response)
    return work


def _triangle(n: int) -> int:
    return n * (n + 1) // 2


# ----------------------------------------------------------------------------------------------------------- FLOPs


def forward_flops(shape: ModelShape, work: Work, adapter: bool = True, head: bool = True, value: bool = False) -> float:
    """A forward pass.

    Args:
        adapter: LoRA on; off for the base as reference.
        head: logits at the predicting places.
        value: the value head there.
    """
    trunk = 2 * work.tokens * (shape.linear + (shape.lora if adapter else 0))
    places = 2 * work.predicting * ((shape.head if head else 0) + (shape.value_head if value else 0))
    return float(trunk + places + 4 * shape.layers * shape.attention_width * work.pairs)


def backward_flops(shape: ModelShape, work: Work, head: bool = True, value: bool = False) -> float:
    """The backward pass of it: gradients of LoRA, of the value head, and of every input that leads to LoRA."""
    trunk = 2 * work.tokens * (shape.linear - shape.linear_idle + 2 * shape.lora - shape.lora_idle)
    places = 2 * work.predicting * ((shape.head if head else 0) + (2 * shape.value_head if value else 0))
    return float(trunk + places + 8 * shape.layers * shape.attention_width * work.pairs)


def ppo_flops(
    shape: ModelShape,
    batches: Sequence[Batch],
    epochs: int,
    micro_batch_size: int,
    mini_batch_size: int | None = None,
    critic: Literal["shared", "adapter"] = "shared",
    reference: bool = True,
    reference_adapter: bool = False,
    recompute: bool = False,
    checkpointing: bool = False,
    dense: bool = False,
) -> dict[str, float]:
    """FLOPs of one PPO iteration over the rows of `batches` (one for each task), by phase; the order is that of time.

    Args:
        micro_batch_size: rows of a pack.
        mini_batch_size: rows of an optimizer step on this rank; None: all.
        reference: whether there is a KL penalty, so a forward of the reference.
        reference_adapter: the reference is an adapter, not the base.
        recompute: old logprobs by a forward of their own (bfloat16).
        checkpointing: activations are computed again in the backward pass.
        dense: attention over all pairs of a pack.
    """
    passes = [pack_work(pack, dense=dense) for pack in packs(batches, micro_batch_size)]
    whole = sum(passes, Work())
    cut = min(micro_batch_size, mini_batch_size or micro_batch_size)
    learning = sum((pack_work(pack, dense=dense) for pack in packs(batches, cut)), Work())
    shared = critic == "shared"
    phases = {
        "rollout": forward_flops(
            shape, prompt_work(batches, micro_batch_size, dense) + decode_work(batches), value=True
        )
    }
    if recompute:
        phases["old logprobs"] = forward_flops(shape, whole, value=shared)
    if not shared:
        phases["values"] = forward_flops(shape, whole, head=False, value=True)
    if reference:
        phases["reference"] = forward_flops(shape, whole, adapter=reference_adapter)
    update = _step(shape, learning, checkpointing, head=True, value=shared)
    if not shared:
        update += _step(shape, learning, checkpointing, head=False, value=True)
    phases["update"] = epochs * update
    return phases


def sft_flops(
    shape: ModelShape,
    batches: Sequence[Batch],
    micro_batch_size: int,
    sequence: bool = True,
    checkpointing: bool = False,
    dense: bool = False,
) -> dict[str, float]:
    """FLOPs of one SFT step; see `ppo_flops`. `sequence`: the loss is over whole sequences."""
    work = sum((pack_work(pack, sequence, dense) for pack in packs(batches, micro_batch_size)), Work())
    return {"update": _step(shape, work, checkpointing, head=True, value=False)}


def _step(shape: ModelShape, work: Work, checkpointing: bool, head: bool, value: bool) -> float:
    again = Work(work.tokens, work.pairs, 0)  # the decoder's layers alone are checkpointed
    return (
        forward_flops(shape, work, head=head, value=value)
        + backward_flops(shape, work, head=head, value=value)
        + (forward_flops(shape, again) if checkpointing else 0.0)
    )
