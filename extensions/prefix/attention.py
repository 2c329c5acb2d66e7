"""Attention of packed rows: each block of a pack by itself, so that nothing is computed that a mask would hide.

In a pack of 16 short prompts a dense mask hides seven of eight pairs. Here the rows of a block are padded to their
longest, for the attention alone, and attend to the spans that they share and to themselves.

Models take it by transformers' own interface for attention functions, as `attn_implementation` "packed"; called without
`attend=...` it is transformers' sdpa. Which pairs of positions a layer's attention holds (a sliding window, chunks) is
the model's own statement: transformers hands each kind of mask over as a function of two positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function, sdpa_mask

from extensions.prefix.tree import Pack

NAME = "packed"
# Arguments of an attention function that change its result. What is not honoured here must not be ignored.
FOREIGN = ("position_bias", "sinks", "head_mask")


class CannotPack(Exception):
    """The model's attention does what the packed form does not; the message says what."""


class Visible:
    """Which positions of a sample a layer attends to.

    Args:
        function: of transformers' masks: (batch, head, query position, key position) -> bool, on broadcast tensors.
    """

    def __init__(self, function: Callable[..., Tensor] = causal_mask_function) -> None:
        self.function = function
        self.causal = function is causal_mask_function  # all earlier positions
        self._kept: dict[Any, Any] = {}

    def __call__(self, query: Tensor, key: Tensor) -> Tensor:
        """Bool, for positions that broadcast."""
        return self.function(0, 0, query, key)

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` gives, made once for all layers with this mask in one forward."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]


@dataclass(frozen=True)
class Scores:
    """What a layer does to q k^T before it weighs values by their softmax."""

    scaling: float
    softcap: float | None = None  # scores are softcap * tanh(score / softcap)
    sinks: Tensor | None = None  # (heads,) scores that take part in the softmax, and weigh nothing

    @property
    def plain(self) -> bool:
        return self.softcap is None and self.sinks is None

    def capped(self, scores: Tensor) -> Tensor:
        return scores if self.softcap is None else self.softcap * torch.tanh(scores / self.softcap)

    def weights(self, scores: Tensor, key_heads: int) -> Tensor:
        """Softmax of (..., key heads, S * groups, K), masked: the query heads of one key head are its groups."""
        if self.sinks is None:
            return scores.softmax(-1)
        sinks = self.sinks.float().view(key_heads, 1, -1)
        sinks = sinks.expand(-1, scores.shape[-2] // sinks.shape[-1], -1).flatten(1).unsqueeze(-1)
        return torch.cat([scores, sinks.expand(*scores.shape[:-1], 1)], -1).softmax(-1)[..., :-1]


class Attend(Protocol):
    """How the tokens of one forward attend."""

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scores: Scores, visible: Visible
    ) -> Tensor:
        """Outputs (1, L, heads, size) for queries (1, heads, L, size), keys and values (1, key heads, L, size)."""


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    attend: Attend | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    if attend is None:
        if softcap is not None or s_aux is not None:
            raise CannotPack("transformers' sdpa (5.15) leaves out capped scores and sinks")
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    foreign = [name for name in FOREIGN if kwargs.get(name) is not None]
    if foreign:
        raise CannotPack(f"its attention has {' and '.join(foreign)}")
    if attention_mask is not None and not isinstance(attention_mask, Visible):
        raise CannotPack("it makes attention masks of its own")
    visible = attention_mask or Visible()
    scores = Scores(query.shape[-1] ** -0.5 if scaling is None else scaling, softcap, s_aux)
    return attend(int(module.layer_idx), query, key, value, scores, visible), None  # type: ignore[arg-type]


_as_functions = False  # whether masks are handed to the attention as functions of positions


def _mask(*args: Any, mask_function: Callable[..., Tensor] = causal_mask_function, **kwargs: Any) -> Any:
    return Visible(mask_function) if _as_functions else sdpa_mask(*args, mask_function=mask_function, **kwargs)


@contextmanager
def masks_as_functions() -> Iterator[None]:
    """Around a forward with `attend`: the model's masks reach the attention as `Visible`."""
    global _as_functions
    _as_functions = True
    try:
        yield
    finally:
        _as_functions = False


@contextmanager
def tree_masks(pack: Pack, implementation: str) -> Iterator[None]:
    """Around a forward of a pack through the model's own attention: its masks become dense masks of the tree.

    Args:
        implementation: "sdpa" or "eager", what the model runs with.
    """

    def tree_mask(
        *args: Any,
        mask_function: Callable[..., Tensor] = causal_mask_function,
        dtype: torch.dtype = torch.float32,
        **kwargs: Any,
    ) -> Tensor:
        visible = pack.mask
        if mask_function is not causal_mask_function:
            place = pack.position_ids[0]
            visible = visible & mask_function(0, 0, place[:, None], place[None, :])
        if implementation == "sdpa":
            return visible
        return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(
            ~visible, torch.finfo(dtype).min
        )

    ALL_MASK_ATTENTION_FUNCTIONS[implementation] = tree_mask  # of this mapping alone, until it is deleted
    try:
        yield
    finally:
        del ALL_MASK_ATTENTION_FUNCTIONS[implementation]


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)


class PackAttention:
    """Attention within a pack.

    Args:
        remember: keep keys and values, (L, key heads, size) of each layer, for the decoding that follows.
    """

    def __init__(self, pack: Pack, remember: bool = False) -> None:
        self.layout = pack.layout
        self.remembered: dict[int, tuple[Tensor, Tensor]] | None = {} if remember else None

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scores: Scores, visible: Visible
    ) -> Tensor:
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (L, heads, size)
        if self.remembered is not None:
            self.remembered[layer] = k, v
        layout = self.layout
        own = [_Spread.apply(x, layout.spread, layout.collect) for x in (q, k, v)]
        outputs, first = [], 0
        for number, (block, mask) in enumerate(layout.blocks):
            if not visible.causal:
                mask = visible.once(number, partial(_seen, mask, visible))
            rows, width = len(block.rows), block.rows[0].length
            bq, bk, bv = (x[first : first + rows * width].unflatten(0, (rows, width)) for x in own)
            if block.seen:
                bk, bv = (
                    torch.cat([*(x[s.first : s.first + s.length].expand(rows, -1, -1, -1) for s in block.seen), y], 1)
                    for x, y in ((k, bk), (v, bv))
                )
            outputs.append(_grouped(bq, bk, bv, mask, scores).flatten(0, 1))
            first += rows * width
        joined = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
        return _Collect.apply(joined, layout.spread, layout.collect, layout.padding)[None]


def _seen(mask: Tensor, visible: Visible) -> Tensor:
    """A block's mask (width, keys) without the pairs that a layer does not attend to."""
    keys = torch.arange(mask.shape[1], device=mask.device)  # a chain holds the positions 0, 1, ...
    queries = keys[-mask.shape[0] :]
    return mask.masked_fill(~visible(queries[:, None], keys[None, :]), torch.finfo(mask.dtype).min)


def _grouped(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scores: Scores) -> Tensor:
    """Attention of (rows, S, heads, size) to (rows, K, key heads, size), masked by (S, K): (rows, S, heads, size).

    The query heads of one key head are taken as further queries of it, so keys are not repeated.
    """
    width, heads = query.shape[1:3]
    groups = heads // key.shape[2]
    q = query.unflatten(2, (-1, groups)).permute(0, 2, 1, 3, 4).flatten(2, 3)  # (rows, key heads, S * groups, size)
    k, v = key.transpose(1, 2), value.transpose(1, 2)
    if not scores.plain:
        product = scores.capped((q.float() * scores.scaling) @ k.float().transpose(-1, -2))
        weights = scores.weights(product + mask.repeat_interleave(groups, 0), k.shape[1])
        out = weights.to(q.dtype) @ v
    elif q.device.type == "cpu":
        out = _CpuAttention.apply(q, k, v, mask, scores.scaling)
    else:
        full = mask.to(q.dtype).repeat_interleave(groups, 0)
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=full, scale=scores.scaling)
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
