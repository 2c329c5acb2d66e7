"""Advantages and value targets, as pure functions of tensors.

Shapes: B samples, T response tokens of the longest. Masks are 1 at response tokens and 0 at padding; padding never
changes a result.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (section 3 of the paper): advantages and returns, each (B, T).

    A_t = r_t + gamma V_{t+1} - V_t + gamma lam A_{t+1}, with V = A = 0 after the last token; returns are A + V.
    """
    rewards, values = torch.where(mask.bool(), rewards, 0.0), torch.where(mask.bool(), values, 0.0)
    advantages = torch.zeros_like(values)
    advantage = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        next_value = values[:, t + 1] if t + 1 < values.shape[1] else torch.zeros_like(advantage)
        advantage = rewards[:, t] + gamma * next_value - values[:, t] + gamma * lam * advantage
        advantages[:, t] = advantage
    return advantages * mask, (advantages + values) * mask


def td_targets(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """r_t + gamma V_{t+1}, the target of equation (1) of the paper: (B, T)."""
    rewards, values = torch.where(mask.bool(), rewards, 0.0), torch.where(mask.bool(), values, 0.0)
    next_values = nn.functional.pad(values[:, 1:], (0, 1))
    return (rewards + gamma * next_values) * mask


def whiten(
    values: Tensor, mask: Tensor, sum_over_ranks: Callable[[Tensor], Tensor] = lambda x: x, min_std: float = 0.0
) -> Tensor:
    """Zero mean and unit (population) variance over the masked entries of all ranks; padding stays 0.

    Two passes in float64, so that the moments do not depend on how the batch is split over ranks.

    Args:
        min_std: lower bound of the divisor. In a batch with equal rewards advantages are noise near 0; scaled to unit
            variance they would move the policy as far as real ones.
    """
    x, m = torch.where(mask.bool(), values, 0.0).double(), mask.double()
    count, total = sum_over_ranks(torch.stack([m.sum(), x.sum()]))
    centred = (x - total / count) * m
    variance = sum_over_ranks(centred.square().sum().unsqueeze(0))[0] / count
    return (centred * variance.clamp(min=max(1e-8, min_std**2)).rsqrt()).to(values.dtype)
