"""A batch of PPO between sampling and update: the map of its data.

Notation: B samples of this rank, T tokens of the longest response, N response tokens of all samples. Tensors over
tokens are flat, (N,), sample by sample in batch order. Only GAE runs over the steps of a response and needs (B, T).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from extensions.data import Example
from extensions.prefix.limits import PackLimit
from extensions.prefix.tree import Pack, Sample, micro_batches, pack

# Tensors that a failed batch is written with, each padded to (B, ...).
EXPERIENCE_TENSORS = ("scores", "logprobs", "values", "kl", "advantages", "returns")


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


@dataclass
class Experience:
    """One rank's share of a batch."""

    examples: list[Example]
    prompts: list[str]
    samples: list[Sample]  # token ids of prompts and responses
    texts: list[str]  # responses
    answers: list[str | float | None]  # parsed from the texts, once; None: wrong format
    index: TokenIndex
    logprobs: Tensor  # (N,) log pi_old(a_t|s_t)
    values: Tensor  # (N,) V_old(s_t)
    kl: Tensor  # (N,) log pi_old - log pi_ref
    scores: Tensor = field(default_factory=lambda: torch.empty(0))  # (B,) reward of each response, without its weight
    weights: Tensor = field(default_factory=lambda: torch.ones(1))  # (B,) weight of each sample, or (1,) for all
    advantages: Tensor = field(default_factory=lambda: torch.empty(0))  # (N,) whitened if the recipe says so
    returns: Tensor = field(default_factory=lambda: torch.empty(0))  # (N,) targets of the values
    # Keyed by their slots and limit.
    _micro_batches: dict[tuple[tuple[int, ...], PackLimit], list[MicroBatch]] = field(default_factory=dict, init=False)

    def micro_batches(self, slots: Sequence[int], limit: PackLimit) -> list[MicroBatch]:
        """Samples at `slots` in packs within `limit`; made once, for the reference and every epoch."""
        key = (tuple(slots), limit)
        if key not in self._micro_batches:
            device = self.index.sample.device
            self._micro_batches[key] = [
                MicroBatch(chunk, pack([self.samples[slot] for slot in chunk], device), self.index.tokens_of(chunk))
                for chunk in micro_batches(self.samples, slots, limit)
            ]
        return self._micro_batches[key]

    def padded(self) -> dict[str, Tensor]:
        """The tensors computed so far, one row per sample: scores (B,), the others and the mask (B, T)."""
        known = {name: getattr(self, name) for name in EXPERIENCE_TENSORS if len(getattr(self, name))}
        rows = {name: tensor if name == "scores" else self.index.pad(tensor) for name, tensor in known.items()}
        return rows | {"mask": self.index.mask}
