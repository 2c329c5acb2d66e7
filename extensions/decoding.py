"""Prompts read at once, then token after token: what a model remembers of the rows that it writes.

`read_prompts` picks the form: `TreeDecoder` for models whose attention is packed, `PaddedDecoder` for all others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor
from transformers import DynamicCache

from extensions.attention import PackAttention
from extensions.model.policy import Policy
from extensions.packing import Sample, Span, micro_batches, pack


class Decoder(Protocol):
    """Rows that have been read, in an order of the decoder's own."""

    order: list[int]  # number of each row among the prompts that were given
    states: Tensor  # (rows, hidden) of each last prompt token

    def step(self, tokens: Tensor) -> Tensor:
        """Hidden states (rows, hidden) after one more token (rows,) of each row."""

    def keep(self, rows: Tensor) -> None:
        """Forget all rows but these, given by their places and in their order."""


def read_prompts(policy: Policy, prompts: Sequence[Sequence[int]], rows_at_once: int, new_tokens: int) -> Decoder:
    """Forward over all prompts, in the shared-prefix form.

    Args:
        rows_at_once: rows of one packed forward.
        new_tokens: most tokens that will be written.
    """
    kind = TreeDecoder if policy.packed_attention else PaddedDecoder
    return kind(policy, prompts, rows_at_once, new_tokens)


@dataclass
class _Family:
    """Neighbouring rows that share what they begin with."""

    rows: int
    shared: dict[int, tuple[Tensor, Tensor]]  # layer -> keys and values (key heads, shared tokens, size)


class TreeDecoder:
    """Keeps what rows share once, and the rest of each row in place for all that it will write.

    A query meets the shared keys in one matrix product for all rows of a family, its own keys in one for each row; the
    softmax is over both.
    """

    def __init__(self, policy: Policy, prompts: Sequence[Sequence[int]], rows_at_once: int, new_tokens: int) -> None:
        self.policy, device = policy, policy.device
        self.order: list[int] = []
        self.families: list[_Family] = []
        states: list[Tensor] = []
        own: list[int] = []  # tokens of each row that are not shared
        found: list[tuple[dict[int, tuple[Tensor, Tensor]], list[Span]]] = []  # of each forward
        samples = [Sample(prompt, []) for prompt in prompts]
        for members in micro_batches(samples, range(len(samples)), rows_at_once):
            packed = pack([samples[i] for i in members], device)
            attend = PackAttention(packed, remember=True)
            hidden = policy.packed_states(packed, attend)
            assert attend.remembered is not None
            by_family = sorted(range(len(members)), key=lambda k: [span.first for span in packed.chains[k][:-1]])
            for seen, family in groupby(by_family, key=lambda k: packed.chains[k][:-1]):
                self.families.append(_Family(len(list(family)), _shared(attend.remembered, seen)))
            self.order += [members[k] for k in by_family]
            states.append(hidden[packed.predicting[by_family]])
            spans = [packed.chains[k][-1] for k in by_family]
            own += [span.length for span in spans]
            found.append((attend.remembered, spans))
        self.states = torch.cat(states)
        places = max(own) + new_tokens
        self.own: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> keys and values (rows, key heads, places, size)
        for layer in list(found[0][0]):
            both = [layers.pop(layer) for layers, _ in found]  # so that no two copies of all layers stand in memory
            self.own[layer] = tuple(  # type: ignore[assignment]
                _in_place([(x[which], spans) for x, (_, spans) in zip(both, found, strict=True)], places)
                for which in (0, 1)
            )
        self.written = torch.tensor(own, device=device)  # (rows,) places of `own` in use
        self.position = torch.tensor([len(prompts[i]) for i in self.order], device=device)  # of the next token

    def step(self, tokens: Tensor) -> Tensor:
        self._row = torch.arange(len(tokens), device=tokens.device)
        self._used = int(self.written.max()) + 1
        hidden = torch.arange(self._used, device=tokens.device) > self.written[:, None]
        self._mask = torch.zeros(hidden.shape, device=tokens.device).masked_fill_(hidden, float("-inf"))
        states = self.policy.token_states(tokens[None], self.position[None], self._attend)
        self.written, self.position = self.written + 1, self.position + 1
        return states

    def _attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        keys, values = self.own[layer]
        rows, heads, size = key.shape[2], key.shape[1], key.shape[3]
        keys[self._row, :, self.written] = key[0].transpose(0, 1)
        values[self._row, :, self.written] = value[0].transpose(0, 1)
        keys, values = keys[:, :, : self._used], values[:, :, : self._used]
        q = (query[0].transpose(0, 1) * scaling).reshape(rows, heads, -1, size)  # (rows, key heads, groups, size)
        scores = (q @ keys.transpose(-1, -2)).float() + self._mask[:, None, None]
        outputs, first = [], 0
        for family in self.families:
            members = slice(first, first + family.rows)
            outputs.append(_attended(q[members], scores[members], values[members], *family.shared[layer]))
            first += family.rows
        return torch.cat(outputs).flatten(1, 2)[None]

    def keep(self, rows: Tensor) -> None:
        kept, first = rows.tolist(), 0
        for family in self.families:
            end = first + family.rows
            family.rows = sum(first <= row < end for row in kept)
            first = end
        self.families = [family for family in self.families if family.rows]
        self.order = [self.order[row] for row in kept]
        self.written, self.position = self.written[rows], self.position[rows]
        self.own = {layer: (keys[rows], values[rows]) for layer, (keys, values) in self.own.items()}


def _shared(layers: dict[int, tuple[Tensor, Tensor]], seen: Sequence[Span]) -> dict[int, tuple[Tensor, Tensor]]:
    """Keys and values (key heads, tokens, size) of what a family shares, from those of a pack."""

    def joined(x: Tensor) -> Tensor:
        parts = [x[span.first : span.first + span.length] for span in seen]
        return torch.cat([x[:0], *parts]).transpose(0, 1).contiguous()

    return {layer: (joined(keys), joined(values)) for layer, (keys, values) in layers.items()}


def _in_place(found: Sequence[tuple[Tensor, Sequence[Span]]], places: int) -> Tensor:
    """(rows, key heads, places, size) with what each row has of its own from place 0, from (L, key heads, size)."""
    like = found[0][0]
    result = like.new_zeros(sum(len(spans) for _, spans in found), like.shape[1], places, like.shape[2])
    row = 0
    for x, spans in found:
        for span in spans:
            result[row, :, : span.length] = x[span.first : span.first + span.length].transpose(0, 1)
            row += 1
    return result


def _attended(q: Tensor, own_scores: Tensor, own_values: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """One family's outputs (rows, key heads, groups, size) of queries over its shared and its rows' own keys.

    Args:
        q: (rows, key heads, groups, size), scaled.
        own_scores, own_values: (rows, key heads, groups, places) float32, (rows, key heads, places, size).
        keys, values: (key heads, shared tokens, size).
    """
    rows, heads, groups, size = q.shape
    shared = keys.shape[1]
    if shared == 0:
        return own_scores.softmax(-1).to(q.dtype) @ own_values
    by_head = q.transpose(0, 1).reshape(heads, rows * groups, size)
    scores = (by_head @ keys.transpose(-1, -2)).float().view(heads, rows, groups, shared).transpose(0, 1)
    weights = torch.cat([scores, own_scores], -1).softmax(-1).to(q.dtype)
    by_head = weights[..., :shared].transpose(0, 1).reshape(heads, rows * groups, shared)
    return (by_head @ values).view(heads, rows, groups, size).transpose(0, 1) + weights[..., shared:] @ own_values


class PaddedDecoder:
    """The form that any model takes: transformers' cache, all rows padded on the left to the longest prompt.

    Keys already carry their rotary positions, so they can be copied to any place; padding lies left of a whole prompt,
    where ALiBi too is exact.
    """

    def __init__(self, policy: Policy, prompts: Sequence[Sequence[int]], rows_at_once: int, new_tokens: int) -> None:
        self.policy, device, lengths = policy, policy.device, [len(prompt) for prompt in prompts]
        longest = max(lengths)
        self.order: list[int] = []
        samples = [Sample(prompt, []) for prompt in prompts]
        states: list[Tensor] = []
        layers: list[list[tuple[Tensor, Tensor]]] = []  # keys and values (rows, heads, longest, size), forward by layer
        for members in micro_batches(samples, range(len(samples)), rows_at_once):
            self.order += members
            packed = pack([samples[i] for i in members], device)
            hidden, cache = policy.packed_states_and_cache(packed)
            index = torch.zeros(len(members), longest, dtype=torch.long, device=device)  # padding: place 0, unseen
            for k, places in enumerate(packed.places):
                index[k, longest - len(places) :] = places
            layers.append(
                [tuple(x[0][:, index].transpose(0, 1) for x in (layer.keys, layer.values)) for layer in cache.layers]
            )
            states.append(hidden[packed.predicting])
        self.cache = DynamicCache()
        for depth, parts in enumerate(zip(*layers, strict=True)):
            keys, values = zip(*parts, strict=True)
            self.cache.update(torch.cat(keys), torch.cat(values), depth)
        self.states = torch.cat(states)
        self.position = torch.tensor([lengths[i] for i in self.order], device=device)
        self.visible = torch.arange(longest, device=device) >= longest - self.position[:, None]

    def step(self, tokens: Tensor) -> Tensor:
        self.visible = torch.cat([self.visible, self.visible.new_ones(len(tokens), 1)], dim=1)
        out = self.policy.trunk(
            input_ids=tokens[:, None],
            position_ids=self.position[:, None],
            attention_mask=self.visible.long(),
            past_key_values=self.cache,
            use_cache=True,
        )
        self.position = self.position + 1
        states: Tensor = out.last_hidden_state[:, -1]
        return states

    def keep(self, rows: Tensor) -> None:
        self.order = [self.order[row] for row in rows.tolist()]
        self.visible, self.position = self.visible[rows], self.position[rows]
        self.cache.batch_select_indices(rows)
