"""Activation memory and kernel counts of a model, traced with fake tensors: shapes without values."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.polynomial import Polynomial
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.integrations.sdpa_attention import repeat_kv

from extensions.planner.flops import meta_model
from extensions.prefix.attention import NAME as PACKED
from extensions.prefix.attention import Scores, Visible, attending
from extensions.recipe import Lora

LENGTHS = 64, 128, 256  # tokens of the traced forwards
NO_KERNEL = {torch.ops.aten._unsafe_view.default, torch.ops.aten.empty_like.default}


@dataclass(frozen=True)
class Trace:
    """A training forward of the decoder: per layer, and outside the layers."""

    layer_bytes: Polynomial  # saved for the backward pass, as a function of the pack's tokens
    other_bytes: Polynomial
    layer_kernels: float
    other_kernels: float


def trace_model(config: Any, lora: Lora, attention: str, dtype: torch.dtype, trust_remote_code: bool) -> Trace:
    """Trace forwards of the model truncated to one and to two layers.

    Args:
        config: transformers' configuration.
        attention: `attn_implementation`.
    """
    one, two = (_trace_layers(n, config, lora, attention, dtype, trust_remote_code) for n in (1, 2))
    # The second layer is like all later ones; the first saves less, since no trained parameters precede it.
    layer, other = two - one, 2 * one - two
    # Bytes are polynomials of degree 2 in the length, so three lengths suffice.
    layer_bytes, other_bytes = (Polynomial.fit(LENGTHS, counts[:, 0], 2) for counts in (layer, other))
    return Trace(layer_bytes, other_bytes, float(layer[-1, 1]), float(other[-1, 1]))


def _trace_layers(num_layers: int, config: Any, lora: Lora, attention: str, *model_arguments: Any) -> np.ndarray:
    """(len(LENGTHS), 2): bytes saved and kernels launched by a forward of the model's first layers."""
    config = copy.deepcopy(config)
    config.get_text_config().num_hidden_layers = num_layers
    model = meta_model(config, lora, attention, *model_arguments)
    packed = attention == PACKED
    found = []
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu").train()  # fake, not meta: attention then uses a fused kernel, as on a GPU
        for tokens in LENGTHS:
            shape = (1, tokens) if packed else (1, 1, tokens, tokens)
            inputs = {
                "input_ids": torch.zeros(1, tokens, dtype=torch.long),
                "position_ids": torch.arange(tokens)[None],
                "attention_mask": torch.zeros(shape, dtype=model.dtype),
            }
            with attending(_fused) if packed else nullcontext(), _KernelCounter() as kernels:
                kept = kept_bytes(model, partial(model.base_model, **inputs, use_cache=False))
            found.append((kept, kernels.count))
    return np.array(found)


def _fused(layer: int, query: Tensor, key: Tensor, value: Tensor, scores: Scores, visible: Visible) -> Tensor:
    """A fused kernel of torch, which keeps no pairs, in the place of the packed attention."""
    key, value = (repeat_kv(x, query.shape[1] // x.shape[1]) for x in (key, value))
    out = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scores.scaling)
    return out.transpose(1, 2)


class _KernelCounter(TorchDispatchMode):
    """Counts the operations that launch a kernel: all except views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.namespace == "aten" and not func.is_view and func not in NO_KERNEL
        return func(*args, **(kwargs or {}))


def kept_bytes(model: nn.Module, forward: Callable[[], Any]) -> int:
    """Bytes of all storages that autograd saves in a forward, without the model's weights."""
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage  # keeps a reference, so that no other storage reuses its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for storage in kept.values())
