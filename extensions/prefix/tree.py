"""The shared-prefix form of a batch: one row, no padding.

All prompts of a task begin with the same tokens, and some go on alike: demonstrations, a passage with several
questions, a prompt with several answers. A pack holds what samples share once, as a tree: the tokens that all share,
then those that some share, then the rest of each sample. Each token sees what lies on its own way from the root, and
its position is that in its own sample. One ordinary forward then computes what a forward over each whole sample would.
Samples of several tasks may stand in one pack; a batch that shares nothing is a pack of whole samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

# Shared tokens are worth a place of their own in the tree where they save at least so many: each place costs some
# kernel launches a layer.
MIN_SAVED = 32


@dataclass(frozen=True)
class Sample:
    """Token ids of one sample: a prompt and what was (or should be) written after it."""

    prompt: Sequence[int]
    response: Sequence[int]
    weight: float = 1.0  # of its targets in a loss over the whole pack (SFT)


@dataclass(frozen=True)
class Span:
    """Consecutive tokens of a pack."""

    first: int
    length: int


@dataclass(frozen=True)
class AttentionGroup:
    """Spans of a pack that attend alike: each sees all of `seen`, and itself causally."""

    seen: tuple[Span, ...]
    rows: tuple[Span, ...]


@dataclass(frozen=True)
class Pack:
    """One packed row of L tokens holding B samples with N response tokens."""

    input_ids: Tensor  # (1, L)
    position_ids: Tensor  # (1, L) place of each token in its own sample
    blocks: list[AttentionGroup]  # who sees whom; each token stands in one row of one block
    predicting: Tensor  # (N,) places in the pack whose next token is a target: a response token, sample by sample
    targets: Tensor  # (N,) those tokens
    weights: Tensor  # (N,) float32, how many samples each target stands for: their weights, mostly 1
    lengths: list[int]  # B numbers of response tokens; of the targets these come first, and mostly they are all
    chains: list[tuple[Span, ...]]  # B: the spans of each sample's tokens in their order, the last its own, maybe empty
    prefix_tokens: int  # tokens that stand once for several samples

    @cached_property
    def places(self) -> list[Tensor]:
        """B tensors: the places in the pack of each sample's tokens, shared ones included."""
        device = self.input_ids.device
        return [
            torch.cat([torch.arange(span.first, span.first + span.length, device=device) for span in chain])
            for chain in self.chains
        ]

    @cached_property
    def layout(self) -> Layout:
        """The blocks with their rows padded to the longest; made once, for every pass over the pack."""
        return Layout(self)

    @cached_property
    def mask(self) -> Tensor:
        """(1, 1, L, L) bool, true where a query (row) may see a key (column): for models that need it dense."""
        size = self.input_ids.shape[1]
        mask = torch.zeros(size, size, dtype=torch.bool)
        for block in self.blocks:
            for row in block.rows:
                own = slice(row.first, row.first + row.length)
                for span in block.seen:
                    mask[own, span.first : span.first + span.length] = True
                mask[own, own] = torch.ones(row.length, row.length, dtype=torch.bool).tril()
        return mask[None, None].to(self.input_ids.device)


class Layout:
    """Where the tokens of a pack stand among the padded rows of its blocks: M places in all, block by block."""

    def __init__(self, pack: Pack) -> None:
        device = pack.input_ids.device
        spread: list[int] = []  # (M,) place in the pack; that of the row's first token at padding
        padded: list[int] = []  # padding among the M
        collect = [0] * pack.input_ids.shape[1]  # (L,) place among the M
        self.blocks: list[tuple[AttentionGroup, Tensor]] = []
        for block in pack.blocks:
            width = block.rows[0].length  # the longest
            for row in block.rows:
                for offset in range(row.length):
                    collect[row.first + offset] = len(spread) + offset
                spread += range(row.first, row.first + row.length)
                padded += range(len(spread), len(spread) + width - row.length)
                spread += [row.first] * (width - row.length)
            self.blocks.append((block, _mask(block, device)))
        self.spread, self.collect = torch.tensor(spread, device=device), torch.tensor(collect, device=device)
        self.padding = torch.tensor(padded, device=device) if padded else None


def _mask(block: AttentionGroup, device: torch.device) -> Tensor:
    """(width, keys) float32 to be added to the scores of each row of a block; padding sees the row before it."""
    seen, width = sum(span.length for span in block.seen), block.rows[0].length
    own = torch.ones(width, width, dtype=torch.bool, device=device).tril()
    visible = torch.cat([torch.ones(width, seen, dtype=torch.bool, device=device), own], 1)
    return torch.zeros(visible.shape, device=device).masked_fill_(~visible, torch.finfo(torch.float32).min)


@dataclass
class _Tree:
    """The tokens of a pack as they are laid out."""

    samples: Sequence[Sample]
    min_saved: int
    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    blocks: list[AttentionGroup] = field(default_factory=list)
    chains: dict[int, tuple[Span, ...]] = field(default_factory=dict)  # of each sample, its own span last
    shared: int = 0

    def add(self, tokens: Sequence[int], position: int) -> Span:
        span = Span(len(self.tokens), len(tokens))
        self.tokens += tokens
        self.positions += range(position, position + len(tokens))
        return span

    def grow(self, members: list[int], depth: int, seen: tuple[Span, ...]) -> list[int]:
        """Lay out what samples share whose prompts agree in the first `depth` tokens, which `seen` holds.

        Args:
            members: in the lexicographic order of their prompts, so that alike ones stand together.

        Returns:
            those that share no more than `seen`, and are still to be placed.
        """
        prompts = [self.samples[i].prompt for i in members]
        end = common_prefix([prompts[0], prompts[-1]])
        worth = (len(members) - 1) * (end - depth) >= self.min_saved
        if worth:
            span = self.add(prompts[0][depth:end], depth)
            self.blocks.append(AttentionGroup(seen, (span,)))
            self.shared += span.length
            seen, depth = (*seen, span), end
        rest: list[int] = []
        for alike in _by_token(members, prompts, end):
            goes_on = len(alike) > 1 and len(self.samples[alike[0]].prompt) > end
            rest += self.grow(alike, depth, seen) if goes_on else alike
        if worth:
            self.place(rest, depth, seen)
            return []
        return rest

    def place(self, members: list[int], depth: int, seen: tuple[Span, ...]) -> None:
        """Lay out what samples have of their own, in blocks of rows of like length."""
        rows: list[Span] = []
        own = {i: [*self.samples[i].prompt[depth:], *self.samples[i].response[:-1]] for i in members}
        for i in sorted(members, key=lambda i: -len(own[i])):
            span = self.add(own[i], depth)
            self.chains[i] = (*seen, span)
            if rows and 2 * span.length < rows[0].length:  # padded to the longest, it would mostly be padding
                self.blocks.append(AttentionGroup(seen, tuple(rows)))
                rows = []
            if span.length:
                rows.append(span)
        if rows:
            self.blocks.append(AttentionGroup(seen, tuple(rows)))


def common_prefix(rows: Sequence[Sequence[int]]) -> int:
    """Number of tokens with which all rows begin."""
    first, last = min(map(list, rows)), max(map(list, rows))  # the two that differ most
    shared, limit = 0, min(len(first), len(last))
    while shared < limit and first[shared] == last[shared]:
        shared += 1
    return shared


def _by_token(members: list[int], prompts: list[Sequence[int]], at: int) -> Iterator[list[int]]:
    """Neighbours whose prompts have the same token at place `at`, or all end before it."""
    last: int | None = -1
    alike: list[int] = []
    for i, prompt in zip(members, prompts, strict=True):
        token = prompt[at] if len(prompt) > at else None
        if alike and token != last:
            yield alike
            alike = []
        alike.append(i)
        last = token
    yield alike


def pack(samples: Sequence[Sample], device: torch.device | str = "cpu", min_saved: int = MIN_SAVED) -> Pack:
    """Pack samples, in any order: what is shared is found.

    The last response token predicts nothing that is wanted, so it is a target but no input. With empty responses each
    sample's last prompt token is its one predicting place, and its target is 0.

    Sharing ids, not text, keeps the tokenization that of the whole prompt.

    Args:
        min_saved: tokens that sharing must save.
    """
    tree = _Tree(samples, min_saved)
    tree.place(tree.grow(sorted(range(len(samples)), key=lambda i: list(samples[i].prompt)), 0, ()), 0, ())
    predicting: list[int] = []
    targets: list[int] = []
    weights: list[float] = []
    for i, sample in enumerate(samples):
        places = [place for span in tree.chains[i] for place in range(span.first, span.first + span.length)]
        predicting += places[len(sample.prompt) - 1 :]
        targets += sample.response or [0]
        weights += [sample.weight] * (len(sample.response) or 1)
    return Pack(
        input_ids=torch.tensor([tree.tokens], device=device),
        position_ids=torch.tensor([tree.positions], device=device),
        blocks=tree.blocks,
        predicting=torch.tensor(predicting, device=device),
        targets=torch.tensor(targets, device=device),
        weights=torch.tensor(weights, dtype=torch.float32, device=device),
        lengths=[len(sample.response) or 1 for sample in samples],
        chains=[tree.chains[i] for i in range(len(samples))],
        prefix_tokens=tree.shared,
    )


def micro_batches(samples: Sequence[Sample], slots: Sequence[int], size: int) -> list[tuple[int, ...]]:
    """Slots in chunks of at most `size`, those with like prompts together so that they share what they begin with."""
    ordered = sorted(slots, key=lambda slot: list(samples[slot].prompt))
    return [tuple(ordered[i : i + size]) for i in range(0, len(ordered), size)]


def with_sequence_targets(packed: Pack, samples: Sequence[Sample]) -> Pack:
    """The same pack with every token of each sample but its first as a target, for the loss on whole sequences.

    A shared token stands once in the pack but in several samples, so its weight is the sum of theirs, mostly their
    number: the weighted sum over the targets is that over all samples' own tokens. After the last prefix token each
    sample goes its own way; there the targets are one for each different continuation. The response tokens stay the
    first targets.

    Args:
        samples: those that were packed, in that order.
    """
    responses = zip(packed.predicting.tolist(), packed.targets.tolist(), strict=True)
    weights = dict.fromkeys(responses, 0.0)  # of (place, token that follows it)
    for sample, at in zip(samples, packed.places, strict=True):
        for target in zip(at.tolist(), [*sample.prompt, *sample.response][1:], strict=True):
            weights[target] = weights.get(target, 0.0) + sample.weight
    device = packed.input_ids.device
    return replace(
        packed,
        predicting=torch.tensor([place for place, _ in weights], device=device),
        targets=torch.tensor([token for _, token in weights], device=device),
        weights=torch.tensor(list(weights.values()), dtype=torch.float32, device=device),
    )
