"""Logprobs, entropies and sampling from logits, as pure functions of tensors.

Shapes: N places whose next token is a target, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from extensions.prefix.products import linear, times


def token_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """log softmax(logits)[target]: (N, V), (N,) -> (N,), in float32."""
    return logits.float().log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def mean_and_worst(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Mean and largest absolute difference of two tensors of one shape, in float64."""
    difference = (a.double() - b.double()).abs()
    return float(difference.mean()), float(difference.max())


def token_entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of softmax(logits): (N, V) -> (N,), in float32."""
    logprobs = logits.float().log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)


Entropy = Literal["none", "number", "differentiable"]  # "number": computed without a gradient


@dataclass(frozen=True)
class LogitTransform:
    """Transform of a linear head's output: cap * tanh(scale * x / cap), or scale * x without a cap."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, x: Tensor) -> Tensor:
        x = x if self.scale == 1.0 else x * self.scale
        return x if self.cap is None else self.cap * torch.tanh(x / self.cap)

    def chain(self, grad: Tensor, logits: Tensor | None) -> Tensor:
        """Gradient with respect to x, in place, from that of the transformed logits; `logits` only with a cap."""
        if self.cap is not None:
            assert logits is not None
            grad = grad.mul_(1 - (logits / self.cap).square_())
        return grad if self.scale == 1.0 else grad.mul_(self.scale)


class FusedLinearLogprob(torch.autograd.Function):
    """`token_logprobs` and `token_entropy` of a linear head, without keeping logits for the backward pass.

    The gradient of a logprob with respect to its state is known in the forward pass up to one factor from the loss, so
    it is computed there, chunk by chunk, and only (N, hidden) is kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        targets: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        temperature: float,
        rows: int,
        entropy: Entropy,
        transform: LogitTransform,
    ) -> tuple[Tensor, Tensor]:
        """Logprobs and entropies, each (N,) float32; entropies are 0 with entropy "none".

        Args:
            states, targets: (N, hidden), (N,).
            weight, bias: of the head, frozen: (V, hidden), (V,).
            temperature: logits are divided by it, after the transform.
            rows: most rows per chunk of logits.
            entropy: "differentiable": gradients flow through the entropies too.
            transform: of the head's output.
        """
        logprob_needs_grad = ctx.needs_input_grad[0]
        entropy_needs_grad = logprob_needs_grad and entropy == "differentiable"
        logprobs, entropies = torch.zeros(2, len(targets), device=states.device)
        grads = [torch.empty_like(states) for _ in range(logprob_needs_grad + entropy_needs_grad)]
        rows = -(-len(targets) // -(-len(targets) // rows))  # chunks of similar size
        for first in range(0, len(targets), rows):
            part = slice(first, first + rows)
            target = targets[part].unsqueeze(-1)
            logits = transform(linear(states[part], weight, bias).float())
            capped = logits.clone() if transform.cap is not None and logprob_needs_grad else None
            logs = (logits if temperature == 1.0 else logits.div_(temperature)).log_softmax(-1)
            del logits
            logprobs[part] = logs.gather(-1, target).squeeze(-1)
            if entropy == "none" and not logprob_needs_grad:
                continue
            p = logs.exp()
            if entropy != "none":
                entropies[part] = -(p.unsqueeze(-2) @ logs.unsqueeze(-1)).flatten()
            if entropy_needs_grad:
                grad = logs.add_(entropies[part].unsqueeze(-1)).mul_(p).div_(-temperature)
                grads[1][part] = times(transform.chain(grad, capped).to(weight.dtype), weight)
            if logprob_needs_grad:
                grad = p.mul_(-1 / temperature)  # one pass over the largest tensor of an update
                grad.scatter_add_(-1, target, torch.full_like(target, 1 / temperature, dtype=p.dtype))
                grads[0][part] = times(transform.chain(grad, capped).to(weight.dtype), weight)
        ctx.save_for_backward(*grads)
        if not entropy_needs_grad:
            ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        total = sum(own * grad.unsqueeze(-1) for own, grad in zip(ctx.saved_tensors, grads, strict=False))
        assert isinstance(total, Tensor)
        return total.to(ctx.saved_tensors[0].dtype), *(None,) * 7


def sample_tokens(logits: Tensor, uniforms: Tensor) -> Tensor:
    """One draw per row from softmax(logits) by its inverse CDF: (B, V), (B,) in [0, 1) -> (B,).

    A draw depends only on the row's own uniform number, so it is the same in any batch and on any rank. Sums are in
    float64 (in float32 the tail of a large vocabulary would be lost), first over chunks of the vocabulary, then within
    the chunk of the draw. NaN logits give some token, whose logprob is NaN.
    """
    size = 256
    p = logits.softmax(-1)
    p = nn.functional.pad(p, (0, -p.shape[-1] % size)).unflatten(-1, (-1, size))  # (B, chunks, size)
    chunks = p.sum(-1, dtype=torch.float64).cumsum(-1)
    below = _first_above(chunks, uniforms.double() * chunks[:, -1])
    inside = p[torch.arange(len(p), device=p.device), below].double().cumsum(-1)
    before = torch.where(below > 0, chunks.gather(-1, (below - 1).clamp(min=0).unsqueeze(-1)).squeeze(-1), 0.0)
    drawn = below * size + _first_above(inside, uniforms.double() * chunks[:, -1] - before)
    return drawn.clamp(max=logits.shape[-1] - 1)


def _first_above(cumulative: Tensor, values: Tensor) -> Tensor:
    """First index (B,) where a cumulative row (B, n) exceeds its value; its last increase if rounding leaves none."""
    total = cumulative[:, -1:]
    values = torch.minimum(values.unsqueeze(-1), total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cumulative, values, right=True).squeeze(-1).clamp(max=cumulative.shape[-1] - 1)
