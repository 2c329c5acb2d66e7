"""A batch of PPO between sampling and update: the map of its data, and its advantages.

Notation: B samples of this rank, T tokens of the longest response, N response tokens of all samples. Tensors over
tokens are flat, (N,), sample by sample in batch order. Only advantages run over the steps of a response: (B, T).
The responses to a prompt are consecutive samples: slot k is of prompt k // samples_per_prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from extensions.data import Example
from extensions.distributed.nonfinite import NonFiniteCheck
from extensions.distributed.openrlhf import compute_reward
from extensions.prefix.limits import PackLimit
from extensions.prefix.tree import Pack, Sample, micro_batches, pack
from extensions.recipe import Ppo
from extensions.training.advantages import (
    compared_scores,
    cumulative_returns,
    equal_groups,
    gae,
    td_targets,
    whiten,
)

# Tensors that a failed batch is written with, each padded to (B, ...).
EXPERIENCE_TENSORS = ("scores", "logprobs", "values", "kl", "sampled", "reference", "kept", "advantages", "returns")
OF_SAMPLES = ("scores", "weights")  # tensors (B,); the others are (N,)


class TokenIndex:
    """Indices of the response tokens of B samples in flat (N,) and padded (B, T) tensors; made once per batch."""

    def __init__(self, lengths: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.lengths = list(lengths)
        counts = torch.tensor(self.lengths)
        self.first: list[int] = (counts.cumsum(0) - counts).tolist()  # flat index of each sample's first token
        sample = torch.arange(len(counts)).repeat_interleave(counts)
        column = torch.arange(len(sample)) - torch.tensor(self.first)[sample]
        self.sample, self.column = sample.to(device), column.to(device)  # (N,) each: row and column in (B, T)
        self.mask = (torch.arange(max(self.lengths)) < counts.unsqueeze(-1)).to(device)  # (B, T) bool

    def pad(self, flat: Tensor) -> Tensor:
        """(N,) -> (B, T), 0 beyond each response."""
        padded = flat.new_zeros(self.mask.shape)
        padded[self.sample, self.column] = flat
        return padded

    def flatten(self, padded: Tensor) -> Tensor:
        """(B, T) -> (N,)."""
        return padded[self.sample, self.column]

    def sums(self, flat: Tensor) -> Tensor:
        """Sum over each response: (N,) -> (B,)."""
        return torch.zeros(len(self.lengths), dtype=flat.dtype, device=flat.device).index_add_(0, self.sample, flat)

    def tokens_of(self, slots: Sequence[int]) -> Tensor:
        """Flat indices of the tokens of some samples, in the order of `slots`."""
        spans = [torch.arange(self.first[slot], self.first[slot] + self.lengths[slot]) for slot in slots]
        return torch.cat(spans).to(self.sample.device)


@dataclass(frozen=True)
class MicroBatch:
    """Samples that one forward computes."""

    slots: tuple[int, ...]  # of the experience, in the order of the pack's targets
    pack: Pack
    tokens: Tensor  # (n,) flat indices of its response tokens in the experience

    def sums(self, flat: Tensor) -> Tensor:
        """Sum over each response, in the order of `slots`: (n,) -> (len(slots),)."""
        return torch.stack([part.sum() for part in flat.detach().split(self.pack.lengths)])


def _empty() -> Tensor:
    return torch.empty(0)


@dataclass
class Experience:
    """One rank's share of a batch."""

    examples: list[Example]  # one per sample
    prompts: list[str]
    samples: list[Sample]  # token ids of prompts and responses
    texts: list[str]  # responses
    answers: list[str | float | None]  # parsed from the texts, once; None: wrong format
    index: TokenIndex
    logprobs: Tensor  # (N,) log pi_old(a_t|s_t)
    values: Tensor  # (N,) V_old(s_t); 0 without a critic
    kl: Tensor  # (N,) log pi_old - log pi_ref
    weights: Tensor  # (B,) weight of each sample
    samples_per_prompt: int = 1
    sampled: Tensor = field(default_factory=_empty)  # (N,) logprobs by the engine that sampled, if not the trainer's
    reference: Tensor = field(default_factory=_empty)  # (N,) log pi_ref(a_t|s_t), if the KL is a loss
    scores: Tensor = field(default_factory=_empty)  # (B,) reward of each response, without its weight
    kept: Tensor = field(default_factory=_empty)  # (N,) 1: the token is in the losses; 0: its group is dropped
    advantages: Tensor = field(default_factory=_empty)  # (N,) whitened if the recipe says so
    returns: Tensor = field(default_factory=_empty)  # (N,) targets of the values
    # Keyed by their prompts and limit.
    _micro_batches: dict[tuple[tuple[int, ...], PackLimit], list[MicroBatch]] = field(default_factory=dict, init=False)

    @property
    def num_prompts(self) -> int:
        return len(self.samples) // self.samples_per_prompt

    @property
    def equal_groups(self) -> Tensor:
        """(num_prompts,) bool: all responses to the prompt have the same reward."""
        return equal_groups(self.scores, self.samples_per_prompt)

    def slots(self, prompts: Sequence[int]) -> list[int]:
        """Slots of all responses to some prompts."""
        k = self.samples_per_prompt
        return [prompt * k + response for prompt in prompts for response in range(k)]

    def micro_batch(self, slots: Sequence[int]) -> MicroBatch:
        """Samples at `slots` in one pack."""
        packed = pack([self.samples[slot] for slot in slots], self.index.sample.device)
        return MicroBatch(tuple(slots), packed, self.index.tokens_of(slots))

    def micro_batches(self, prompts: Sequence[int], limit: PackLimit) -> list[MicroBatch]:
        """All responses to `prompts` in packs within `limit`, whose rows are prompts.

        Made once, for the reference and every epoch.
        """
        key = (tuple(prompts), limit)
        if key not in self._micro_batches:
            chunks = micro_batches(self.samples, prompts, limit, self.samples_per_prompt)
            self._micro_batches[key] = [self.micro_batch(self.slots(chunk)) for chunk in chunks]
        return self._micro_batches[key]

    def replaced(self, prompts: Sequence[int], others: Experience) -> Experience:
        """The experience after sampling, with the responses to `prompts` replaced by `others`, in that order."""
        order = list(range(self.num_prompts))
        for place, prompt in enumerate(prompts):
            order[prompt] = self.num_prompts + place
        slots = self.slots(order)
        index = TokenIndex([*self.index.lengths, *others.index.lengths], self.index.sample.device)
        tokens = index.tokens_of(slots)
        chosen: dict[str, Any] = {}
        for name in (one.name for one in fields(self) if one.init):
            ours, theirs = getattr(self, name), getattr(others, name)
            if isinstance(ours, list):
                both = [*ours, *theirs]
                chosen[name] = [both[slot] for slot in slots]
            elif isinstance(ours, Tensor) and len(ours):
                chosen[name] = torch.cat([ours, theirs])[tokens if name not in OF_SAMPLES else slots]
            else:
                chosen[name] = ours
        chosen["index"] = TokenIndex([index.lengths[slot] for slot in slots], self.index.sample.device)
        return Experience(**chosen)

    def estimate_advantages(
        self, ppo: Ppo, kl_coef: float, sum_over_ranks: Callable[[Tensor], Tensor] = lambda x: x
    ) -> None:
        """Token rewards (KL penalty everywhere, the weighted score at the last token), then advantages and returns.

        Groups of equal rewards are dropped if the recipe says so, and some rank has another group.
        """
        index, k = self.index, self.samples_per_prompt
        kept = torch.ones_like(self.scores)
        if ppo.drop_equal_groups:
            differing = (~self.equal_groups).repeat_interleave(k).to(kept)
            kept = differing if bool(sum_over_ranks(differing.sum()[None])) else kept
        self.kept = kept[index.sample]
        scores = compared_scores(self.scores, k, ppo.advantage_estimator) * self.weights
        penalty = 0.0 if ppo.kl.use_loss else kl_coef
        rewards = compute_reward(scores, penalty, index.pad(self.kl), index.mask)
        if ppo.advantage_estimator == "gae":
            values = index.pad(self.values)
            advantages, returns = gae(rewards, values, index.mask, ppo.gamma, ppo.lam)
            if ppo.value_target == "td":
                returns = td_targets(rewards, values, index.mask, ppo.gamma)
        else:
            advantages = returns = cumulative_returns(rewards, index.mask, ppo.gamma)
        self.advantages, self.returns = index.flatten(advantages), index.flatten(returns)
        if ppo.whitens:
            self.advantages = whiten(self.advantages, self.kept, sum_over_ranks, ppo.whiten_min_std)

    def watch(self, nonfinite: NonFiniteCheck) -> None:
        """Record every tensor of the rollout for the check before the update."""
        nonfinite.samples(range(len(self.samples)))
        for name, tensor in self._known().items():
            nonfinite.watch(f"{name} of the rollout", tensor if name == "scores" else self.index.sums(tensor))

    def padded(self) -> dict[str, Tensor]:
        """The tensors computed so far, one row per sample: scores (B,), the others and the mask (B, T)."""
        known = self._known().items()
        rows = {name: tensor if name == "scores" else self.index.pad(tensor) for name, tensor in known}
        return rows | {"mask": self.index.mask}

    def _known(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in EXPERIENCE_TENSORS if len(getattr(self, name))}
