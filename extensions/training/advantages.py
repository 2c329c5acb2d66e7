"""Advantages and value targets, as pure functions of tensors.

Shapes: B samples, T response tokens of the longest. Masks are 1 at response tokens and 0 at padding; padding never
changes a result.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from extensions.recipe import AdvantageEstimator


def compared_scores(scores: Tensor, samples_per_prompt: int, estimator: AdvantageEstimator) -> Tensor:
    """Scores (B,) against those of the other responses to the same prompt (OpenRLHF 0.11.2, experience_maker.py).

    rloo: less the mean of the others; reinforce_baseline and dr_grpo: less the mean of all; group_norm: the same, in
    standard deviations (of a sample, as in GRPO); gae and reinforce: unchanged.

    Args:
        scores: prompt by prompt, each with `samples_per_prompt` responses.
    """
    groups = scores.view(-1, samples_per_prompt)
    if estimator == "rloo":
        groups = groups - (groups.sum(-1, keepdim=True) - groups) / (samples_per_prompt - 1)
    elif estimator in ("reinforce_baseline", "dr_grpo", "group_norm"):
        centred = groups - groups.mean(-1, keepdim=True)
        groups = centred / (groups.std(-1, keepdim=True) + 1e-9) if estimator == "group_norm" else centred
    return groups.flatten()


def equal_groups(scores: Tensor, samples_per_prompt: int) -> Tensor:
    """Whether all responses to a prompt have the same score: (B,) -> (B / samples_per_prompt,) bool."""
    groups = scores.view(-1, samples_per_prompt)
    return (groups == groups[:, :1]).all(-1)


def cumulative_returns(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    """Sum of the discounted rewards from each token on (REINFORCE): (B, T)."""
    return gae(rewards, torch.zeros_like(rewards), mask, gamma, 1.0)[0]


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
