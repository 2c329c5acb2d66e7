"""The prefix tree: a batch as one packed row, shared prefixes once, no padding.

All prompts of a task begin with the same tokens, and some share more: demonstrations, a passage with several questions,
a prompt with several responses. A pack lays these tokens out as a tree: first what all samples share, then what some
share, then the rest of each sample. A token attends to its ancestors in the tree, and its position id is its position
in its own sample; its place is its index in the pack. One forward over the pack equals a forward over each sample.
Samples of several tasks may share a pack; a batch without common prefixes is a pack of whole samples.

    [task description][demonstrations] +-- [passage A] +-- [question 1][response]
                                       |               +-- [question 2][response]
                                       +-- [passage B] ---- [question 3][response]
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from extensions.prefix.limits import Cost, Form, PackLimit

# Tokens that a node of the tree must save: each node costs some kernel launches per layer.
MIN_SAVED = 32


@dataclass(frozen=True)
class Sample:
    """Token ids of one sample: a prompt and its response, sampled or gold."""

    prompt: Sequence[int]
    response: Sequence[int]
    weight: float = 1.0  # of its targets in SFT's loss


@dataclass(frozen=True)
class Span:
    """Consecutive tokens of a pack."""

    first: int
    length: int


@dataclass(frozen=True)
class AttentionGroup:
    """Spans with the same attention context: each attends to all of `context`, and to itself causally."""

    context: tuple[Span, ...]
    spans: tuple[Span, ...]  # the longest first


@dataclass(frozen=True)
class Pack:
    """One packed row of L tokens holding B samples with N response tokens."""

    input_ids: Tensor  # (1, L)
    position_ids: Tensor  # (1, L) position of each token in its own sample
    groups: list[AttentionGroup]  # the attention pattern; each token is in one span of one group
    predicting: Tensor  # (N,) places in the pack whose next token is a target: a response token, sample by sample
    targets: Tensor  # (N,) those tokens
    weights: Tensor  # (N,) float32: summed weight of the samples that share a target
    lengths: list[int]  # B: response tokens per sample; these targets come first, and are all of them but in SFT
    chains: list[tuple[Span, ...]]  # B: the spans from the root to each sample's own, which is last and may be empty
    prefix_tokens: int  # tokens that several samples share

    @cached_property
    def places(self) -> list[Tensor]:
        """B tensors: places in the pack of each sample's tokens, shared ones included."""
        device = self.input_ids.device
        return [
            torch.cat([torch.arange(span.first, span.first + span.length, device=device) for span in chain])
            for chain in self.chains
        ]

    @cached_property
    def layout(self) -> Layout:
        """The groups with their spans padded to the longest; made once per pack."""
        return Layout(self)

    @cached_property
    def segments(self) -> Segments:
        """The pack as a variable-length kernel takes it; made once per pack."""
        return Segments(self)

    @cached_property
    def mask(self) -> Tensor:
        """(1, 1, L, L) bool, true where a query (row) attends to a key (column), for attention that needs it dense."""
        size = self.input_ids.shape[1]
        mask = torch.zeros(size, size, dtype=torch.bool)
        for group in self.groups:
            for span in group.spans:
                own = slice(span.first, span.first + span.length)
                for ancestor in group.context:
                    mask[own, ancestor.first : ancestor.first + ancestor.length] = True
                mask[own, own] = torch.ones(span.length, span.length, dtype=torch.bool).tril()
        return mask[None, None].to(self.input_ids.device)


class Layout:
    """The spans of each group as rows of equal length, padded: M places in all, group by group."""

    def __init__(self, pack: Pack) -> None:
        device = pack.input_ids.device
        source: list[int] = []  # (M,) place in the pack; at padding that of the span's first token
        padding: list[int] = []  # those of the M places that are padding
        target = [0] * pack.input_ids.shape[1]  # (L,) place among the M
        for group in pack.groups:
            for span in group.spans:
                target[span.first : span.first + span.length] = range(len(source), len(source) + span.length)
                source += range(span.first, span.first + span.length)
                fill = group.spans[0].length - span.length
                padding += range(len(source), len(source) + fill)
                source += [span.first] * fill
        self.groups = pack.groups
        self.source, self.target = torch.tensor(source, device=device), torch.tensor(target, device=device)
        self.padding = torch.tensor(padding, device=device) if padding else None
        self._masks: dict[tuple[int, int, torch.dtype], Tensor] = {}

    def mask(self, number: int, repeats: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
        """(width * repeats, keys), added to the scores of each row of a group; made once for all layers.

        Args:
            number: of the group.
            repeats: query heads per key head; the row of each query is repeated so often.
        """
        key = (number, repeats, dtype)
        if key not in self._masks:
            group, device = self.groups[number], self.source.device
            context, width = sum(span.length for span in group.context), group.spans[0].length
            own = torch.ones(width, width, dtype=torch.bool, device=device).tril()
            visible = torch.cat([torch.ones(width, context, dtype=torch.bool, device=device), own], 1)
            mask = torch.zeros(visible.shape, device=device).masked_fill_(~visible, torch.finfo(torch.float32).min)
            self._masks[key] = mask.to(dtype).repeat_interleave(repeats, 0)
        return self._masks[key]


class Segments:
    """The spans of a pack as N segments of L queries and K gathered keys, in the order of their places.

    No segment is empty, and the totals are L and K. Queries and outputs stay at their places.
    """

    def __init__(self, pack: Pack) -> None:
        device, size = pack.input_ids.device, pack.input_ids.shape[1]
        own = {span.first: (span, group.context) for group in pack.groups for span in group.spans}
        chains = [(*context, span) for _, (span, context) in sorted(own.items())]
        source = np.concatenate([np.arange(s.first, s.first + s.length) for chain in chains for s in chain])
        queries = [chain[-1].length for chain in chains]
        keys = [sum(span.length for span in chain) for chain in chains]

        def on_device(numbers: Any, dtype: torch.dtype = torch.long) -> Tensor:
            return torch.as_tensor(numbers, dtype=dtype).to(device)

        self.source = on_device(source)  # (K,) place of each gathered key
        self.order = on_device(np.argsort(source, kind="stable"))  # (K,) gathered keys by place
        self.counts = on_device(np.bincount(source, minlength=size))  # (L,) how often each place was gathered
        # (N + 1,) int32 each: where the segments begin, and the total
        self.cu_queries, self.cu_keys = (
            on_device(np.cumsum([0, *lengths]), torch.int32) for lengths in (queries, keys)
        )
        # The longest, as Python integers: no layer waits for the device. A chain holds the positions 0, 1, ...
        self.most_queries, self.most_keys = max(queries), max(keys)


@dataclass
class _Tree:
    """The tokens of a pack while they are laid out."""

    samples: Sequence[Sample]
    min_saved: int
    tokens: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    groups: list[AttentionGroup] = field(default_factory=list)
    chains: dict[int, tuple[Span, ...]] = field(default_factory=dict)  # of each sample, its own span last
    shared: int = 0  # tokens

    @staticmethod
    def of(samples: Sequence[Sample], min_saved: int) -> _Tree:
        """The tree of samples in any order."""
        tree = _Tree(samples, min_saved)
        tree.place(tree.grow(sorted(range(len(samples)), key=lambda i: list(samples[i].prompt)), 0, ()), 0, ())
        return tree

    def add(self, tokens: Sequence[int], position: int) -> Span:
        span = Span(len(self.tokens), len(tokens))
        self.tokens += tokens
        self.positions += range(position, position + len(tokens))
        return span

    def grow(self, members: list[int], depth: int, context: tuple[Span, ...]) -> list[int]:
        """Lay out the prefixes that samples share beyond `context`, their first `depth` prompt tokens.

        Args:
            members: in the lexicographic order of their prompts, so that common prefixes are neighbours.

        Returns:
            the samples that share nothing more and are still to be placed.
        """
        prompts = [self.samples[i].prompt for i in members]
        end = common_prefix([prompts[0], prompts[-1]])
        saves_enough = (len(members) - 1) * (end - depth) >= self.min_saved
        if saves_enough:
            span = self.add(prompts[0][depth:end], depth)
            self.groups.append(AttentionGroup(context, (span,)))
            self.shared += span.length
            context, depth = (*context, span), end
        rest: list[int] = []
        for branch in _by_token(members, prompts, end):
            shares_more = len(branch) > 1 and len(self.samples[branch[0]].prompt) > end
            rest += self.grow(branch, depth, context) if shares_more else branch
        if saves_enough:
            self.place(rest, depth, context)
            return []
        return rest

    def place(self, members: list[int], depth: int, context: tuple[Span, ...]) -> None:
        """Lay out the leaves of samples, in groups of spans of similar length."""
        spans: list[Span] = []
        own = {i: [*self.samples[i].prompt[depth:], *self.samples[i].response[:-1]] for i in members}
        for i in sorted(members, key=lambda i: -len(own[i])):
            span = self.add(own[i], depth)
            self.chains[i] = (*context, span)
            if spans and 2 * span.length < spans[0].length:  # padded to the longest, it would be mostly padding
                self.groups.append(AttentionGroup(context, tuple(spans)))
                spans = []
            if span.length:
                spans.append(span)
        if spans:
            self.groups.append(AttentionGroup(context, tuple(spans)))


def common_prefix(rows: Sequence[Sequence[int]]) -> int:
    """Number of tokens with which all rows begin."""
    first, last = min(map(list, rows)), max(map(list, rows))  # the two that differ first
    pairs = enumerate(zip(first, last, strict=False))
    return next((k for k, (a, b) in pairs if a != b), min(len(first), len(last)))


def _by_token(members: list[int], prompts: list[Sequence[int]], at: int) -> Iterator[list[int]]:
    """Neighbours whose prompts have the same token at place `at`, or all end before it."""

    def token(pair: tuple[int, Sequence[int]]) -> int | None:
        return pair[1][at] if len(pair[1]) > at else None

    for _, branch in groupby(zip(members, prompts, strict=True), key=token):
        yield [i for i, _ in branch]


def pack(samples: Sequence[Sample], device: torch.device | str = "cpu", min_saved: int = MIN_SAVED) -> Pack:
    """Pack samples, in any order; common prefixes are found by token ids, so tokenization is that of whole prompts.

    The last response token is a target but no input: nothing after it is predicted. A sample with an empty response has
    one predicting place, its last prompt token, with the target 0.

    Args:
        min_saved: tokens that a node of the tree must save.
    """
    tree = _Tree.of(samples, min_saved)
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
        groups=tree.groups,
        predicting=torch.tensor(predicting, device=device),
        targets=torch.tensor(targets, device=device),
        weights=torch.tensor(weights, dtype=torch.float32, device=device),
        lengths=[len(sample.response) or 1 for sample in samples],
        chains=[tree.chains[i] for i in range(len(samples))],
        prefix_tokens=tree.shared,
    )


def micro_batches(
    samples: Sequence[Sample], slots: Sequence[int], limit: PackLimit | int, together: int = 1
) -> list[tuple[int, ...]]:
    """Slots in chunks within the limit, in the order of their prompts, so that a chunk shares its prefixes.

    Args:
        limit: the bounds of a chunk, or only its most slots.
        together: consecutive samples with the same prompt that one slot stands for: slot k for k * together, ...
    """
    bounds = PackLimit(limit) if isinstance(limit, int) else limit
    ordered = sorted(slots, key=lambda slot: list(samples[slot * together].prompt))

    def cost(chunk: Sequence[int]) -> Cost:
        return pack_cost([samples[slot * together + k] for slot in chunk for k in range(together)], bounds.form)

    return [tuple(chunk) for chunk in bounds.cut(ordered, cost)]


def pack_cost(samples: Sequence[Sample], form: Form = "packed") -> Cost:
    """The cost of a pack of samples, without building its tensors."""
    lengths = [len(sample.prompt) + max(0, len(sample.response) - 1) for sample in samples]
    if form == "plain":  # rows padded to the longest
        return Cost(len(lengths) * max(lengths), len(lengths) * max(lengths) ** 2)
    tree = _Tree.of(samples, MIN_SAVED)
    size, pairs = len(tree.tokens), 0
    for group in tree.groups:
        width, context = group.spans[0].length, sum(span.length for span in group.context)
        if form == "flash":
            pairs += sum(context + span.length for span in group.spans)
        else:
            pairs += len(group.spans) * width * (width + context)
    return Cost(size, size**2 if form == "masked" else pairs)


def with_sequence_targets(packed: Pack, samples: Sequence[Sample]) -> Pack:
    """The same pack with every token of each sample but its first as a target, for the loss on whole sequences.

    A shared token is one target whose weight is the sum of its samples' weights, so the weighted sum over the targets
    is the sum over all tokens of all samples. Where samples diverge, there is one target per different next token. The
    response tokens stay the first targets.

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
