"""Attention over the prefix tree by a variable-length flash kernel: one call per layer, without masks and padding.

Each span of a pack is a segment. Its queries attend to the gathered keys of its ancestors and to its own, causally,
aligned bottom-right: exactly the mask of the tree. The kernel is `torch.nn.attention.varlen.varlen_attn` (torch 2.13;
its flash-attention kernels need compute capability 8.0 and float16 or bfloat16). In float32, where there is no such
kernel, `reference_kernel` computes the same by plain torch: for the proof at load and for tests. ALiBi takes the
package flash-attn (2.4 or later), since `varlen_attn` has no biases.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from extensions.prefix.tree import Sample, Segments, pack

LEAST_CAPABILITY = (8, 0)
DTYPES = (torch.float16, torch.bfloat16)
ROUNDING = 0.05  # of `wrong_by`, allowed
EVERYTHING = -1  # window of a layer that attends to all earlier positions


# (L, heads, size), (K, key heads, size) twice, segments, scaling, window, slopes -> (L, heads, size)
Kernel = Callable[[Tensor, Tensor, Tensor, Segments, float, int, Tensor | None], Tensor]


def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scaling: float,
    window: int,
    slopes: Tensor | None = None,
) -> Tensor:
    """Outputs (L, heads, size) for queries (L, heads, size), keys and values (L, key heads, size).

    Args:
        window: positions that a query attends to, its own included; `EVERYTHING`: all earlier ones.
        slopes: (heads,) of ALiBi, float32: a score loses slope * distance of its key.
    """
    out: Tensor = _TreeAttention.apply(query, key, value, segments, scaling, window, slopes)
    return out


class _TreeAttention(torch.autograd.Function):
    """The kernel on gathered keys and values.

    Backward gathers them again and repeats the kernel's forward, so that a layer keeps its L queries, keys and values,
    not the K >= L gathered ones: attention is a small share of these forwards, and K of many leaves is a large multiple
    of L. The gradients of a key's copies are summed in float32 and in a fixed order.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        segments: Segments,
        scaling: float,
        window: int,
        slopes: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.arguments = segments, scaling, window, slopes
        keys, values = (x.index_select(0, segments.source) for x in (key, value))
        return kernel_for(query, slopes)(query, keys, values, *ctx.arguments)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        segments, slopes = ctx.arguments[0], ctx.arguments[-1]
        keys, values = (x.index_select(0, segments.source) for x in (key, value))
        inputs = [x.detach().requires_grad_() for x in (query, keys, values)]
        with torch.enable_grad():
            out = kernel_for(query, slopes)(inputs[0], inputs[1], inputs[2], *ctx.arguments)
        grad_query, *copies = torch.autograd.grad(out, inputs, grads[0])
        return grad_query, *(_summed(grad, segments) for grad in copies), None, None, None, None


def _summed(copies: Tensor, segments: Segments) -> Tensor:
    """(K, ...) -> (L, ...): the sum over the copies of each place, without atomics."""
    by_place = copies.index_select(0, segments.order).float()
    return torch.segment_reduce(by_place, "sum", lengths=segments.counts, axis=0).to(copies.dtype)


def window_of(visible: Callable[[Tensor, Tensor], Tensor], length: int, device: torch.device) -> int | None:
    """The window of a layer, as in `flash_attention`, at positions below `length`; None if its mask is no window."""
    at = torch.arange(length, device=device)
    found = visible(at[:, None], at).expand(length, length)
    window = int(found[-1].sum())
    wanted = (at <= at[:, None]) & (at > at[:, None] - window)
    if not bool((found == wanted).all()):
        return None
    return EVERYTHING if window == length else window


def torch_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scaling: float,
    window: int,
    slopes: Tensor | None = None,
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # imported where a GPU has it: torch 2.11 lacks enable_gqa

    assert slopes is None
    out = varlen_attn(
        query,
        key,
        value,
        segments.cu_queries,
        segments.cu_keys,
        segments.most_queries,
        segments.most_keys,
        scale=scaling,
        window_size=(EVERYTHING if window == EVERYTHING else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(out, Tensor)
    return out


def package_kernel(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float, window: int, slopes: Tensor | None
) -> Tensor:
    from flash_attn import flash_attn_varlen_func  # an optional package

    out: Tensor = flash_attn_varlen_func(
        query,
        key,
        value,
        segments.cu_queries,
        segments.cu_keys,
        segments.most_queries,
        segments.most_keys,
        softmax_scale=scaling,
        causal=True,  # bottom-right since flash-attn 2.1
        window_size=(EVERYTHING if window == EVERYTHING else window - 1, 0),
        alibi_slopes=slopes,
        deterministic=True,  # of the gradients; the default adds them by atomics
    )
    return out


def reference_kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scaling: float,
    window: int,
    slopes: Tensor | None = None,
) -> Tensor:
    """The same by plain torch, segment by segment, in the dtype of its arguments."""
    repeats, outputs = query.shape[1] // key.shape[1], []
    bounds = [cu.tolist() for cu in (segments.cu_queries, segments.cu_keys)]
    for (q0, q1), (k0, k1) in zip(*map(pairwise, bounds), strict=True):
        q = query[q0:q1].transpose(0, 1)
        k, v = (x[k0:k1].transpose(0, 1).repeat_interleave(repeats, 0) for x in (key, value))
        at = torch.arange(k1 - k0, device=q.device)
        own = at[-(q1 - q0) :, None]  # bottom-right: the last query is at the last key
        visible = at <= own
        if window != EVERYTHING:
            visible &= at > own - window
        scores = q @ k.transpose(-1, -2) * scaling
        if slopes is not None:
            scores = scores - (slopes[:, None, None] * (own - at)).to(scores.dtype)
        scores = scores.masked_fill(~visible, -torch.inf)
        outputs.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outputs)


def missing(device: torch.device, dtype: torch.dtype, alibi: bool = False) -> str | None:
    """Why flash attention cannot be used; None if it can.

    Args:
        alibi: whether the model needs biases.
    """
    if device.type != "cuda":
        return "it needs a CUDA device"
    if torch.cuda.get_device_capability(device) < LEAST_CAPABILITY:
        major, minor = torch.cuda.get_device_capability(device)
        return f"it needs compute capability 8.0 or higher; this device has {major}.{minor}"
    if dtype not in DTYPES:
        return f"it needs bfloat16 or float16, not {str(dtype).removeprefix('torch.')}"
    lacking = _package_lacks() if alibi else _torch_lacks()
    if lacking is not None:
        return lacking
    try:
        wrong = wrong_by(device, dtype, alibi)
    except RuntimeError as error:  # a torch built without it
        return f"its kernel fails here: {' '.join(str(error).split())[:160]}"
    return None if wrong <= ROUNDING else f"its kernel's outputs or gradients are wrong by {wrong:.0%} on this device"


def _torch_lacks() -> str | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return f"torch {torch.__version__} has no varlen_attn"
    if "enable_gqa" not in inspect.signature(varlen_attn).parameters:
        return f"varlen_attn of torch {torch.__version__} has no enable_gqa; it needs torch 2.13"
    return None


def _package_lacks() -> str | None:
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return "its ALiBi needs the package flash-attn, which is not installed"
    if "alibi_slopes" not in inspect.signature(flash_attn_varlen_func).parameters:
        return "its ALiBi needs flash-attn 2.4 or later"
    return None


def kernel_for(query: Tensor, slopes: Tensor | None = None) -> Kernel:
    """The flash kernel, or the reference where it has none: in float32, for the proof."""
    if not query.is_cuda or query.dtype not in DTYPES:
        return reference_kernel
    return torch_kernel if slopes is None else package_kernel


def wrong_by(device: torch.device, dtype: torch.dtype, alibi: bool = False) -> float:
    """Largest error of the kernel's outputs and gradients on a small tree, relative to the largest of each.

    A few milliseconds at load: a wrong alignment of segments of different lengths, or wrong gradients of keys, would be
    an error of the order of 1, where rounding to bfloat16 is one of 0.01.
    """
    prompt = list(range(40))
    packed = pack([Sample([*prompt, *range(k)], [0, 1, 2]) for k in (0, 0, 1, 3, 7)], device, min_saved=1)
    generator = torch.Generator().manual_seed(0)
    shapes = [(packed.input_ids.shape[1], heads, 64) for heads in (4, 2, 2, 4)]
    *inputs, grad = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625], device=device) if alibi else None
    found = []
    for one in (dtype, torch.float32):
        own = [x.to(one).requires_grad_() for x in inputs]
        with torch.enable_grad():
            out = flash_attention(own[0], own[1], own[2], packed.segments, 0.125, EVERYTHING, slopes)
        found.append([out.detach(), *torch.autograd.grad(out, own, grad.to(one))])
    return max(float((a.float() - b).abs().max() / b.abs().max()) for a, b in zip(*found, strict=True))
