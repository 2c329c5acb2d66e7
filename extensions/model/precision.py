"""A model in low precision, computed in float32, so that rounding hides no difference."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def computing_in_float32(lm: nn.Module) -> Iterator[None]:
    """Each block's weights are in float32 while it is called: only stored weights are rounded, and memory stays low.

    Quantized weights stay as they are. The model's first weight is in float32 throughout: transformers takes its dtype
    for the model's, in masks and caches.
    """
    stored: dict[nn.Parameter, torch.dtype] = {}
    first = next(weight for weight in lm.parameters() if weight.is_floating_point())
    dtype_of_first = first.dtype

    def narrow(value: object) -> bool:
        return isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)

    def widen(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        for weight in filter(narrow, module.parameters()):
            stored[weight] = weight.dtype
            weight.data = weight.data.float()
        return tuple(value.float() if narrow(value) else value for value in inputs)

    def restore(module: nn.Module, *_: object) -> None:
        for weight in module.parameters():
            weight.data = weight.data.to(stored.pop(weight, weight.dtype))

    first.data = first.data.float()
    blocks = list(_blocks(lm))
    handles = [block.register_forward_pre_hook(widen) for block in blocks]
    handles += [block.register_forward_hook(restore) for block in blocks]
    try:
        # TF32 rounds to 10 bits.
        with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
            yield
    finally:
        for handle in handles:
            handle.remove()
        for weight, dtype in (*stored.items(), (first, dtype_of_first)):  # stored: left by a block that raised
            weight.data = weight.data.to(dtype)


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The model's blocks, and the modules beside them: embeddings, norms, head."""
    if not any(isinstance(inner, nn.ModuleList) for inner in module.modules()):
        yield module
        return
    for child in module.children():
        if isinstance(module, nn.ModuleList):
            yield child
        else:
            yield from _blocks(child)
