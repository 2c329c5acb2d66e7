"""Attention over the prefix tree, group by group, so that no masked pair is computed.

In a pack of 16 short prompts a dense mask hides seven of eight pairs. Here the spans of a group are padded to their
longest, in the attention only, and attend to their context and to themselves.

Models use it through transformers' attention interface, as `attn_implementation` "packed". Inside `attending`, the
masks that transformers makes are `Visible`: they carry the pairs of positions that a layer attends to (sliding window,
chunks), and the attention to compute. Outside it is transformers' sdpa.
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

from extensions.prefix.flash import EVERYTHING, flash_attention, window_of
from extensions.prefix.tree import Pack

NAME = "packed"
# Arguments of an attention function that change its result and that the packed form does not implement.
UNSUPPORTED_ARGUMENTS = ("position_bias", "sinks", "head_mask")


class CannotPack(Exception):
    """The model's attention needs something that the packed form does not implement; the message says what."""


class Visible:
    """The positions of a sample that a layer attends to, in the place of a mask.

    Args:
        attend: the attention of the forward.
        function: transformers' mask function (batch, head, query position, key position) -> bool, on broadcast tensors.
    """

    def __init__(self, attend: Attend, function: Callable[..., Tensor] = causal_mask_function) -> None:
        self.attend, self.function = attend, function
        self.causal = function is causal_mask_function  # all earlier positions
        self._kept: dict[Any, Any] = {}

    def __call__(self, query: Tensor, key: Tensor) -> Tensor:
        """Bool, for broadcastable positions."""
        return self.function(0, 0, query, key)

    def to(self, *args: Any, **kwargs: Any) -> Visible:
        """Itself: MPT casts its mask."""
        return self

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """The result of `make`, computed once for all layers with this mask in one forward."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]


@dataclass(frozen=True)
class Scores:
    """From q k^T to attention weights, as a layer computes them."""

    scaling: float
    softcap: float | None = None  # scores are softcap * tanh(score / softcap)
    sinks: Tensor | None = None  # (heads,) scores that enter the softmax without a value
    slopes: Tensor | None = None  # (heads,) ALiBi: a score loses slope * distance of its key; the same in all layers

    @property
    def plain(self) -> bool:
        return self.softcap is None and self.sinks is None

    def capped(self, scores: Tensor) -> Tensor:
        return scores if self.softcap is None else self.softcap * torch.tanh(scores / self.softcap)

    def alibi(self, queries: Tensor, keys: int, key_heads: int) -> Tensor:
        """What ALiBi adds to the scores of queries at these places (N,): (N, key heads, groups, keys).

        Args:
            keys: their number; they are at the places 0, 1, ...
        """
        assert self.slopes is not None
        distance = queries[:, None] - torch.arange(keys, device=queries.device)
        return -self.slopes.view(key_heads, -1, 1) * distance[:, None, None]

    def weights(self, scores: Tensor, key_heads: int) -> Tensor:
        """Softmax of masked scores (..., key heads, S * groups, K); `groups` query heads share one key head."""
        if self.sinks is None:
            return scores.softmax(-1)
        sinks = self.sinks.float().view(key_heads, 1, -1)
        sinks = sinks.expand(-1, scores.shape[-2] // sinks.shape[-1], -1).flatten(1).unsqueeze(-1)
        return torch.cat([scores, sinks.expand(*scores.shape[:-1], 1)], -1).softmax(-1)[..., :-1]


class Attend(Protocol):
    """The attention of the tokens of one forward."""

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
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    if not isinstance(attention_mask, Visible):
        if _attend is not None:
            raise CannotPack("it builds its own attention masks")
        if softcap is not None or s_aux is not None:
            raise CannotPack("transformers' sdpa (5.15) ignores capped scores and sinks")
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    unsupported = [name for name in UNSUPPORTED_ARGUMENTS if kwargs.get(name) is not None]
    if unsupported:
        raise CannotPack(f"its attention has {' and '.join(unsupported)}")
    scores = Scores(query.shape[-1] ** -0.5 if scaling is None else scaling, softcap, s_aux)
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    return attention_mask.attend(layer, query, key, value, scores, attention_mask), None


_attend: Attend | None = None  # of the forward that runs


def _mask(*args: Any, mask_function: Callable[..., Tensor] = causal_mask_function, **kwargs: Any) -> Any:
    if _attend is not None:
        return Visible(_attend, mask_function)
    return sdpa_mask(*args, mask_function=mask_function, **kwargs)


@contextmanager
def attending(attend: Attend) -> Iterator[None]:
    """Context of a forward whose attention is `attend`."""
    global _attend
    _attend = attend
    try:
        yield
    finally:
        _attend = None


@contextmanager
def tree_masks(pack: Pack, implementation: str) -> Iterator[None]:
    """Context of a forward of a pack through the model's own attention: its masks become dense masks of the tree.

    Args:
        implementation: the model's, "sdpa" or "eager".
    """

    def tree_mask(
        *args: Any,
        mask_function: Callable[..., Tensor] = causal_mask_function,
        dtype: torch.dtype = torch.float32,
        **kwargs: Any,
    ) -> Tensor:
        visible = pack.mask
        if mask_function is not causal_mask_function:
            position = pack.position_ids[0]
            visible = visible & mask_function(0, 0, position[:, None], position[None, :])
        if implementation == "sdpa":
            return visible
        return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(
            ~visible, torch.finfo(dtype).min
        )

    ALL_MASK_ATTENTION_FUNCTIONS[implementation] = tree_mask  # shadows the global entry until it is deleted
    try:
        yield
    finally:
        del ALL_MASK_ATTENTION_FUNCTIONS[implementation]


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)


class PackAttention:
    """Attention within a pack.

    Args:
        keep_cache: keep keys and values, (L, key heads, size) per layer, for decoding.
        flash: by a flash kernel, where `CannotPack` is raised if it does not implement what a layer computes.
    """

    def __init__(self, pack: Pack, keep_cache: bool = False, flash: bool = False) -> None:
        self.pack, self.flash = pack, flash
        self.cache: dict[int, tuple[Tensor, Tensor]] | None = {} if keep_cache else None

    def __call__(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scores: Scores, visible: Visible
    ) -> Tensor:
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (L, heads, size)
        if self.cache is not None:
            self.cache[layer] = k, v
        if self.flash:
            return self._by_flash(q, k, v, scores, visible)[None]
        layout = self.pack.layout
        own = [_ToRows.apply(x, layout.source, layout.target) for x in (q, k, v)]
        repeats = query.shape[1] // key.shape[1]
        # The CPU path adds its mask by broadcasting; the others need one row per query head, in the scores' dtype.
        on_cpu = q.device.type == "cpu" and scores.plain
        expanded = (
            1 if on_cpu and scores.slopes is None else repeats,
            q.dtype if scores.plain and not on_cpu else torch.float32,
        )
        outputs, first = [], 0
        for number, group in enumerate(layout.groups):
            mask = layout.mask(number, *expanded)
            if not visible.causal:
                mask = visible.once((number, *expanded), partial(_restricted, mask, expanded[0], visible))
            if scores.slopes is not None:
                mask = visible.once(("alibi", number), partial(_with_alibi, mask, scores, k.shape[1]))
            rows, width = len(group.spans), group.spans[0].length
            gq, gk, gv = (x[first : first + rows * width].unflatten(0, (rows, width)) for x in own)
            if group.context:
                gk, gv = (
                    torch.cat(
                        [*(x[s.first : s.first + s.length].expand(rows, -1, -1, -1) for s in group.context), y], 1
                    )
                    for x, y in ((k, gk), (v, gv))
                )
            outputs.append(_attended(gq, gk, gv, mask, scores).flatten(0, 1))
            first += rows * width
        joined = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
        return _FromRows.apply(joined, layout.source, layout.target, layout.padding)[None]

    def _by_flash(self, q: Tensor, k: Tensor, v: Tensor, scores: Scores, visible: Visible) -> Tensor:
        segments, window = self.pack.segments, EVERYTHING
        if not scores.plain:
            raise CannotPack("the flash kernel has no capped scores and no sinks")
        if not visible.causal:
            found = visible.once("window", partial(window_of, visible, segments.most_keys, q.device))
            if found is None:
                raise CannotPack("the flash kernel has no mask but a causal one and a window")
            window = found
        return flash_attention(q, k, v, segments, scores.scaling, window, scores.slopes)


def _restricted(mask: Tensor, repeats: int, visible: Visible) -> Tensor:
    """A group's mask (width * repeats, keys) without the pairs that a layer does not attend to."""
    keys = torch.arange(mask.shape[1], device=mask.device)  # a chain holds the positions 0, 1, ...
    queries = keys[-(mask.shape[0] // repeats) :].repeat_interleave(repeats)
    return mask.masked_fill(~visible(queries[:, None], keys[None, :]), torch.finfo(mask.dtype).min)


def _with_alibi(mask: Tensor, scores: Scores, key_heads: int) -> Tensor:
    """A group's mask (width * repeats, keys) with the biases of the heads: (key heads, width * repeats, keys)."""
    assert scores.slopes is not None
    keys = mask.shape[1]
    queries = torch.arange(keys, device=mask.device)[-(mask.shape[0] * key_heads // len(scores.slopes)) :]
    return mask + scores.alibi(queries, keys, key_heads).transpose(0, 1).flatten(1, 2).to(mask.dtype)


def _attended(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scores: Scores) -> Tensor:
    """Attention of (rows, S, heads, size) to (rows, K, key heads, size): (rows, S, heads, size).

    The query heads of one key head are taken as further queries of it, so keys are not repeated.

    Args:
        mask: (S, K) on the CPU path, else (S * query heads per key head, K); of all heads, or (key heads, ...) of each.
    """
    width, heads = query.shape[1:3]
    repeats = heads // key.shape[2]
    q = query.unflatten(2, (-1, repeats)).permute(0, 2, 1, 3, 4).flatten(2, 3)  # (rows, key heads, S * repeats, size)
    k, v = key.transpose(1, 2), value.transpose(1, 2)
    if not scores.plain:
        product = scores.capped((q.float() * scores.scaling) @ k.float().transpose(-1, -2))
        weights = scores.weights(product + mask, k.shape[1])
        out = weights.to(q.dtype) @ v
    elif q.device.type == "cpu":
        out = _CpuAttention.apply(q, k, v, mask, scores.scaling)
    else:
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scores.scaling)
    return out.unflatten(2, (width, repeats)).permute(0, 2, 1, 3, 4).flatten(2, 3)


class _CpuAttention(torch.autograd.Function):
    """softmax(q k^T) v by matrix products, with the probabilities kept for the backward pass.

    At these sizes twice as fast as torch's CPU kernel in bfloat16, and not slower in float32. Scores and softmax are in
    float32.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float) -> Tensor:
        scores = (q.float() * scaling) @ k.float().transpose(-1, -2)
        groups = q.shape[-2] // mask.shape[-2]
        scores.unflatten(-2, (-1, groups)).add_(mask.unsqueeze(-2))
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


class _ToRows(torch.autograd.Function):
    """x[source]: (L, ...) -> (M, ...). Only padding repeats an index, so backward is a lookup too, not a sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, target: Tensor) -> Tensor:
        ctx.target = target
        return x.index_select(0, source)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0].index_select(0, ctx.target), None, None  # padding gets no gradient


class _FromRows(torch.autograd.Function):
    """x[target]: (M, ...) -> (L, ...), the inverse of `_ToRows`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, target: Tensor, padding: Tensor | None) -> Tensor:
        ctx.source, ctx.padding = source, padding
        return x.index_select(0, target)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        grad = grads[0].index_select(0, ctx.source)
        if ctx.padding is not None:
            grad.index_fill_(0, ctx.padding, 0.0)
        return grad, None, None, None
