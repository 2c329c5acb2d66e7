"""Attention of packed rows: each block of a pack by itself, so that nothing is computed that a mask would hide.

In a pack of 16 short prompts a dense mask hides seven of eight pairs. Here the rows of a block are padded to their
longest, for the attention alone, and see the spans that they share and themselves.

Models take it by transformers' own interface for attention functions, as `attn_implementation` "packed"; called without
`attend=...` it is transformers' sdpa.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from extensions.packing import Pack

NAME = "packed"


class Attend(Protocol):
    """How the tokens of one forward attend."""

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Outputs (1, L, heads, size) for queries (1, heads, L, size), keys and values (1, key heads, L, size)."""


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    attend: Attend | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    if attend is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    return attend(int(module.layer_idx), query, key, value, scaling), None  # type: ignore[arg-type]


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


class PackAttention:
    """Attention within a pack.

    Args:
        remember: keep keys and values, (L, key heads, size) of each layer, for the decoding that follows.
    """

    def __init__(self, pack: Pack, remember: bool = False) -> None:
        self.layout = pack.layout
        self.remembered: dict[int, tuple[Tensor, Tensor]] | None = {} if remember else None

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (L, heads, size)
        if self.remembered is not None:
            self.remembered[layer] = k, v
        layout = self.layout
        own = [_Spread.apply(x, layout.spread, layout.collect) for x in (q, k, v)]
        outputs, first = [], 0
        for block, mask in layout.blocks:
            rows, width = len(block.rows), block.rows[0].length
            bq, bk, bv = (x[first : first + rows * width].unflatten(0, (rows, width)) for x in own)
            if block.seen:
                bk, bv = (
                    torch.cat([*(x[s.first : s.first + s.length].expand(rows, -1, -1, -1) for s in block.seen), y], 1)
                    for x, y in ((k, bk), (v, bv))
                )
            outputs.append(_grouped(bq, bk, bv, mask, scaling).flatten(0, 1))
            first += rows * width
        joined = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
        return _Collect.apply(joined, layout.spread, layout.collect, layout.padding)[None]


def _grouped(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """Attention of (rows, S, heads, size) to (rows, K, key heads, size), masked by (S, K): (rows, S, heads, size).

    The query heads of one key head are taken as further queries of it, so keys are not repeated.
    """
    width, heads = query.shape[1:3]
    groups = heads // key.shape[2]
    q = query.unflatten(2, (-1, groups)).permute(0, 2, 1, 3, 4).flatten(2, 3)  # (rows, key heads, S * groups, size)
    k, v = key.transpose(1, 2), value.transpose(1, 2)
    if q.device.type == "cpu":
        out = _CpuAttention.apply(q, k, v, mask, scaling)
    else:
        full = mask.to(q.dtype).repeat_interleave(groups, 0)
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=full, scale=scaling)
    return out.unflatten(2, (width, groups)).permute(0, 2, 1, 3, 4).flatten(2, 3)


class _CpuAttention(torch.autograd.Function):
    """softmax(q k^T) v by plain matrix products, with the probabilities kept for the backward pass.

    At these sizes twice as fast as torch's kernel for CPU in bfloat16, and not slower in float32. Scores and softmax
    are in float32.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float) -> Tensor:
        scores = (q.float() * scaling) @ k.float().transpose(-1, -2)
        groups = q.shape[-2] // mask.shape[0]
        scores.unflatten(-2, (-1, groups)).add_(mask.unsqueeze(1))
        weights = scores.softmax(-1).to(q.dtype)
        ctx.save_for_backward(q, k, v, weights)
        ctx.scaling = scaling
        return weights @ v

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, weights = ctx.saved_tensors
        (grad,) = grads
        grad_v = weights.transpose(-1, -2) @ grad
        grad_weights = grad @ v.transpose(-1, -2)
        grad_scores = torch.ops.aten._softmax_backward_data(grad_weights.float(), weights.float(), -1, torch.float32)
        grad_scores = grad_scores.mul_(ctx.scaling).to(q.dtype)
        return grad_scores @ k, grad_scores.transpose(-1, -2) @ q, grad_v, None, None


class _Spread(torch.autograd.Function):
    """x[spread]. Each place is taken once, but for padding; so the backward pass is a lookup too, not a sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, spread: Tensor, collect: Tensor) -> Tensor:
        ctx.collect = collect
        return x.index_select(0, spread)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0].index_select(0, ctx.collect), None, None  # padding gets no gradient


class _Collect(torch.autograd.Function):
    """x[collect], the way back of `_Spread`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, spread: Tensor, collect: Tensor, padding: Tensor | None) -> Tensor:
        ctx.spread, ctx.padding = spread, padding
        return x.index_select(0, collect)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        grad = grads[0].index_select(0, ctx.spread)
        if ctx.padding is not None:
            grad.index_fill_(0, ctx.padding, 0.0)
        return grad, None, None, None
