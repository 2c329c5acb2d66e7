"""The numbers of PPO, as pure functions of tensors.

Shapes: B samples, T response tokens (the longest of the batch), N response tokens of all samples, V vocabulary.
Masks are 1 at response tokens and 0 at padding; what stands at padding never changes a result.

The clipped policy and value losses, the token rewards and the KL estimate are OpenRLHF's (`extensions.compat`); here
is what it does not offer as functions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def token_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """log softmax(logits)[target]: (N, V), (N,) -> (N,), in float32."""
    logits = logits.float()
    return logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


def token_entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of softmax(logits): (N, V) -> (N,), in float32."""
    logprobs = logits.float().log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)


def sample_tokens(logits: Tensor, uniforms: Tensor) -> Tensor:
    """One draw a row from softmax(logits) by inverting its distribution function: (B, V), (B,) in [0, 1) -> (B,).

    The draw depends on the row's own uniform number alone, so it is the same in any batch and on any rank. The sum is
    in float64: in float32 the tail of a large vocabulary would be lost.
    """
    cumulative = logits.double().softmax(-1).cumsum(-1)
    total = cumulative[:, -1:]
    # Below the total even where the product rounds up to it: the first place above it then has a positive probability.
    below = torch.minimum(uniforms.double().unsqueeze(-1) * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cumulative, below, right=True).squeeze(-1)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (section 3 of the paper): advantages and returns, each (B, T).

    A_t = r_t + gamma V_{t+1} - V_t + gamma lam A_{t+1}, with V = A = 0 after the last token; returns are A + V.
    """
    rewards, values = torch.where(mask.bool(), rewards, 0.0), torch.where(mask.bool(), values, 0.0)
    advantages = torch.zeros_like(values)
    following = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        next_value = values[:, t + 1] if t + 1 < values.shape[1] else torch.zeros_like(following)
        following = rewards[:, t] + gamma * next_value - values[:, t] + gamma * lam * following
        advantages[:, t] = following
    return advantages * mask, (advantages + values) * mask


def td_targets(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """r_t + gamma V_{t+1}, the target of equation (1) of the paper: (B, T)."""
    rewards, values = torch.where(mask.bool(), rewards, 0.0), torch.where(mask.bool(), values, 0.0)
    next_values = torch.nn.functional.pad(values[:, 1:], (0, 1))
    return (rewards + gamma * next_values) * mask


def whiten(
    values: Tensor, mask: Tensor, sum_over_ranks: Callable[[Tensor], Tensor] = lambda x: x, min_std: float = 0.0
) -> Tensor:
    """Zero mean and unit (population) variance over the masked entries of all ranks; padding stays 0.

    Two passes in float64, so that the moments do not depend on how the batch lies on the ranks.

    Args:
        min_std: least deviation to divide by. A batch in which every answer earns the same has advantages near 0 that
            are noise; at unit variance they would move the policy as far as real ones.
    """
    x, m = torch.where(mask.bool(), values, 0.0).double(), mask.double()
    count, total = sum_over_ranks(torch.stack([m.sum(), x.sum()]))
    centred = (x - total / count) * m
    variance = sum_over_ranks(centred.square().sum().unsqueeze(0))[0] / count
    return (centred * variance.clamp(min=max(1e-8, min_std**2)).rsqrt()).to(values.dtype)


def pad_rows(flat: Tensor, lengths: list[int], width: int) -> Tensor:
    """Rows of different lengths, joined in `flat` (N,), as a matrix (B, width) that is 0 beyond each row's end."""
    padded = flat.new_zeros(len(lengths), width)
    mask = length_mask(lengths, width, flat.device)
    padded[mask] = flat
    return padded


def length_mask(lengths: list[int], width: int, device: torch.device | str = "cpu") -> Tensor:
    """(B, width) bool: true at the first `lengths[i]` places of row i. Masks come from lengths, not token ids."""
    return torch.arange(width, device=device) < torch.tensor(lengths, device=device).unsqueeze(-1)
