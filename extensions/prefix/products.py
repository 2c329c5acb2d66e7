"""Products with frozen weights, by oneDNN where torch would take a slower library.

torch multiplies float32 matrices by MKL, which on AMD's processors with AVX-512 reaches half of oneDNN's rate, or a
third for the few rows of a decoding step (tests/bench/BENCHMARKS.md). torch carries oneDNN, but by itself calls it in
bfloat16 only; the operator here is the one that torch.compile emits. It is private (checked with torch 2.13); without
it, and everywhere else, torch's own product is taken. Which one depends on the processor and the weights only, so a
resumed run takes the same.
"""

from __future__ import annotations

from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

LEAST = 2**16  # weights: the time of smaller products is that of the call
CPUINFO = Path("/proc/cpuinfo")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias without a gradient of the weight: (..., in), (out, in) -> (..., out)."""
    if not _by_onednn(weight):
        return nn.functional.linear(x, weight, bias)
    if torch.is_grad_enabled() and x.requires_grad:
        out: Tensor = _Linear.apply(x, weight, bias)
        return out
    return _onednn(x, weight, bias)


def times(x: Tensor, weight: Tensor) -> Tensor:
    """x weight without a gradient: (N, out), (out, in) -> (N, in)."""
    return _onednn(x, weight.t(), None) if _by_onednn(weight) else x @ weight


def use_fast_products(model: nn.Module) -> None:
    """Let the frozen linear layers of a model compute by `linear`."""
    for module in model.modules():
        if type(module) is nn.Linear and not module.weight.requires_grad:
            module.forward = partial(_forward, module)  # type: ignore[method-assign]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return _onednn(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return _onednn(grads[0], weight.t(), None), None, None


def _forward(module: nn.Linear, x: Tensor) -> Tensor:
    if hasattr(module.weight, "ds_id"):  # under ZeRO 3 the weight exists only while the module is called
        return nn.functional.linear(x, module.weight, module.bias)
    return linear(x, module.weight, module.bias)


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


def _by_onednn(weight: Tensor) -> bool:
    return (
        weight.dtype == torch.float32
        and weight.device.type == "cpu"
        and weight.numel() >= LEAST
        and not weight.requires_grad
        and onednn_is_faster()
    )


@lru_cache(maxsize=1)
def onednn_is_faster() -> bool:
    """Whether this machine's processor is one on which oneDNN is faster in float32, and torch has the operator."""
    try:
        amd = "AuthenticAMD" in CPUINFO.read_text(encoding="utf-8")
    except OSError:
        return False
    has_operator = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return amd and has_operator and torch.backends.cpu.get_cpu_capability() == "AVX512"
