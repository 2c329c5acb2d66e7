"""Prefill and KV-cache decoding, in the forms that models allow.

`TreeDecoder` for packed attention, `PaddedDecoder` for packed prompts with the model's own attention, `OwnDecoder` for
models whose cache only `generate` can prepare (recurrent and hybrid layers), `UncachedDecoder` for the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig
from transformers.modeling_utils import PreTrainedModel

from extensions.prefix.attention import Attend, PackAttention, Scores, Visible
from extensions.prefix.limits import PackLimit
from extensions.prefix.tree import Pack, Sample, Span, micro_batches, pack, pack_cost


class Forwards(Protocol):
    """The forwards that decoders call; `extensions.model.policy.Policy` implements them."""

    @property
    def device(self) -> torch.device: ...

    @property
    def causal_lm(self) -> PreTrainedModel: ...

    def packed_states(self, pack: Pack, attend: PackAttention | None = None) -> Tensor: ...

    def token_states(self, input_ids: Tensor, position_ids: Tensor, attend: Attend) -> Tensor: ...

    def packed_states_and_cache(self, pack: Pack) -> tuple[Tensor, DynamicCache]: ...

    def trunk(self, **inputs: Any) -> Any: ...

    def last_states(self, **inputs: Any) -> tuple[Tensor, Any]: ...


class Decoder(Protocol):
    """Prefilled sequences, in an order that the decoder chooses."""

    order: list[int]  # index of each row's prompt among those given
    states: Tensor  # (rows, hidden) of each last prompt token

    def step(self, tokens: Tensor) -> Tensor:
        """Hidden states (rows, hidden) after one more token (rows,) of each row."""

    def keep(self, rows: Tensor) -> Tensor:
        """Keep only these rows, in ascending order. Returns the rows kept: these, and any that cannot be dropped."""


@dataclass
class PrefixGroup:
    """Neighbouring rows with a common prefix."""

    rows: int
    shared: dict[int, tuple[Tensor, Tensor]]  # layer -> keys and values (key heads, shared tokens, size)


class TreeDecoder:
    """Keeps the keys and values of a shared prefix once, and preallocates each row's own.

    Scores for shared keys are one matrix product per prefix group, those for own keys one per row; the softmax is over
    both.

    Args:
        limit: bounds of a forward in prefill.
        new_tokens: most tokens that will be written per row.
        flash: prefill by a flash kernel.
    """

    def __init__(
        self,
        policy: Forwards,
        prompts: Sequence[Sequence[int]],
        limit: PackLimit,
        new_tokens: int,
        flash: bool = False,
    ) -> None:
        self.policy, device = policy, policy.device
        self.order: list[int] = []
        self.groups: list[PrefixGroup] = []
        states: list[Tensor] = []
        own: list[int] = []  # tokens of each row that are not shared
        found: list[tuple[dict[int, tuple[Tensor, Tensor]], list[Span]]] = []  # per forward: its cache, the rows' spans
        samples = [Sample(prompt, []) for prompt in prompts]
        for members in micro_batches(samples, range(len(samples)), limit):
            packed = pack([samples[i] for i in members], device)
            attend = PackAttention(packed, keep_cache=True, flash=flash)
            hidden = policy.packed_states(packed, attend)
            assert attend.cache is not None
            by_group = sorted(range(len(members)), key=lambda k: [span.first for span in packed.chains[k][:-1]])
            for context, group in groupby(by_group, key=lambda k: packed.chains[k][:-1]):
                self.groups.append(PrefixGroup(len(list(group)), _shared(attend.cache, context)))
            self.order += [members[k] for k in by_group]
            states.append(hidden[packed.predicting[by_group]])
            spans = [packed.chains[k][-1] for k in by_group]
            own += [span.length for span in spans]
            found.append((attend.cache, spans))
        self.states = torch.cat(states)
        places = max(own) + new_tokens
        self.own: dict[int, tuple[Tensor, Tensor]] = {}  # layer -> keys and values (rows, key heads, places, size)
        for layer in list(found[0][0]):
            both = [layers.pop(layer) for layers, _ in found]  # frees each layer before the next is copied
            self.own[layer] = tuple(  # type: ignore[assignment]
                _own_per_row([(x[which], spans) for x, (_, spans) in zip(both, found, strict=True)], places)
                for which in (0, 1)
            )
        self.used = own  # per row: places of `own` in use; on the host, so that no step waits for the device
        self.written = torch.tensor(own, device=device)  # (rows,) the same, on the device
        self.position = torch.tensor([len(prompts[i]) for i in self.order], device=device)  # of the next token

    def step(self, tokens: Tensor) -> Tensor:
        self._row = torch.arange(len(tokens), device=tokens.device)
        self.used = [places + 1 for places in self.used]
        self._width = max(self.used)
        hidden = torch.arange(self._width, device=tokens.device) > self.written[:, None]
        self._mask = torch.zeros(hidden.shape, device=tokens.device).masked_fill_(hidden, float("-inf"))
        states = self.policy.token_states(tokens[None], self.position[None], self._attend)
        self.written, self.position = self.written + 1, self.position + 1
        return states

    def _attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scores: Scores, visible: Visible
    ) -> Tensor:
        keys, values = self.own[layer]
        rows, heads, size = key.shape[2], key.shape[1], key.shape[3]
        keys[self._row, :, self.written] = key[0].transpose(0, 1)
        values[self._row, :, self.written] = value[0].transpose(0, 1)
        keys, values = keys[:, :, : self._width], values[:, :, : self._width]
        # (rows, key heads, query heads per key head, size)
        q = (query[0].transpose(0, 1) * scores.scaling).reshape(rows, heads, -1, size)
        own_mask = self._mask if visible.causal else visible.once("own", partial(self._own_mask, visible))
        own = scores.capped((q @ keys.transpose(-1, -2)).float()) + own_mask[:, None, None]
        if scores.slopes is not None:
            own += visible.once("own alibi", partial(scores.alibi, self.written, self._width, heads))
        outputs, first = [], 0
        for number, group in enumerate(self.groups):
            members = slice(first, first + group.rows)
            shared_keys, shared_values = group.shared[layer]
            mask = None
            if not visible.causal:
                mask = visible.once(number, partial(self._shared_mask, visible, members, shared_keys.shape[1]))
            if scores.slopes is not None:
                add = partial(scores.alibi, self.position[members], shared_keys.shape[1], heads)
                bias = visible.once(("alibi", number), add)
                mask = bias if mask is None else mask + bias
            parts = (q[members], own[members], values[members], shared_keys, shared_values)
            outputs.append(_attended(*parts, mask, scores))
            first += group.rows
        return torch.cat(outputs).flatten(1, 2)[None]

    def _own_mask(self, visible: Visible) -> Tensor:
        """(rows, places in use) float32, for a layer that does not attend to all earlier positions."""
        shared = self.position - self.written  # (rows,) tokens of the shared prefix
        visible_keys = visible(
            self.position[:, None], shared[:, None] + torch.arange(self._width, device=shared.device)
        )
        return self._mask.masked_fill(~visible_keys, float("-inf"))

    def _shared_mask(self, visible: Visible, members: slice, shared: int) -> Tensor:
        """(rows of a group, 1, 1, shared tokens) float32, for such a layer."""
        visible_keys = visible(self.position[members, None], torch.arange(shared, device=self.position.device))
        mask = torch.zeros(visible_keys.shape, device=visible_keys.device).masked_fill_(~visible_keys, float("-inf"))
        return mask[:, None, None]

    def keep(self, rows: Tensor) -> Tensor:
        kept, first = rows.tolist(), 0
        for group in self.groups:
            end = first + group.rows
            group.rows = sum(first <= row < end for row in kept)
            first = end
        self.groups = [group for group in self.groups if group.rows]
        self.order, self.used = [self.order[row] for row in kept], [self.used[row] for row in kept]
        self.written, self.position = self.written[rows], self.position[rows]
        self.own = {layer: (keys[rows], values[rows]) for layer, (keys, values) in self.own.items()}
        return rows


def _shared(layers: dict[int, tuple[Tensor, Tensor]], context: Sequence[Span]) -> dict[int, tuple[Tensor, Tensor]]:
    """Keys and values (key heads, tokens, size) of a shared prefix, from those of a pack."""

    def joined(x: Tensor) -> Tensor:
        parts = [x[span.first : span.first + span.length] for span in context]
        return torch.cat([x[:0], *parts]).transpose(0, 1).contiguous()

    return {layer: (joined(keys), joined(values)) for layer, (keys, values) in layers.items()}


def _own_per_row(found: Sequence[tuple[Tensor, Sequence[Span]]], places: int) -> Tensor:
    """(rows, key heads, places, size): each row's own keys or values from place 0 on, from (L, key heads, size)."""
    like = found[0][0]
    result = like.new_zeros(sum(len(spans) for _, spans in found), like.shape[1], places, like.shape[2])
    row = 0
    for x, spans in found:
        for span in spans:
            result[row, :, : span.length] = x[span.first : span.first + span.length].transpose(0, 1)
            row += 1
    return result


def _attended(
    q: Tensor,
    own: Tensor,
    own_values: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scores: Scores,
) -> Tensor:
    """Outputs (rows, key heads, groups, value size) of one prefix group over its shared and its rows' own keys.

    `groups` query heads share one key head.

    Args:
        q: (rows, key heads, groups, size), scaled.
        own, own_values: scores (rows, key heads, groups, places) float32, values (rows, key heads, places, value size).
        keys, values: (key heads, shared tokens, size or value size).
        mask: float32, broadcast to (rows, key heads, groups, shared tokens) and added to the scores; None: no mask.
    """
    rows, heads, groups, size = q.shape
    shared = keys.shape[1]
    if shared == 0:
        return scores.weights(own, heads).to(q.dtype) @ own_values
    by_head = q.transpose(0, 1).reshape(heads, rows * groups, size)
    product = (by_head @ keys.transpose(-1, -2)).float().view(heads, rows, groups, shared).transpose(0, 1)
    product = scores.capped(product)
    if mask is not None:
        product = product + mask
    weights = scores.weights(torch.cat([product, own], -1), heads).to(q.dtype)
    by_head = weights[..., :shared].transpose(0, 1).reshape(heads, rows * groups, shared)
    shared_part = (by_head @ values).view(heads, rows, groups, -1).transpose(0, 1)
    return shared_part + weights[..., shared:] @ own_values


class PaddedDecoder:
    """Packed prompts, then transformers' cache, all rows padded on the left to the longest prompt.

    Keys carry their rotary positions, so they can be copied to any place. Padding is left of whole prompts, where
    sliding windows, which depend on distances, are exact.
    """

    def __init__(self, policy: Forwards, prompts: Sequence[Sequence[int]], limit: PackLimit, new_tokens: int) -> None:
        self.policy, device, lengths = policy, policy.device, [len(prompt) for prompt in prompts]
        longest = max(lengths)
        self.order: list[int] = []
        samples = [Sample(prompt, []) for prompt in prompts]
        states: list[Tensor] = []
        layers: list[list[tuple[Tensor, Tensor]]] = []  # keys and values (rows, heads, longest, size), forward by layer
        for members in micro_batches(samples, range(len(samples)), limit):
            self.order += members
            packed = pack([samples[i] for i in members], device)
            hidden, cache = policy.packed_states_and_cache(packed)
            index = torch.zeros(len(members), longest, dtype=torch.long, device=device)  # padding: place 0, masked
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

    def keep(self, rows: Tensor) -> Tensor:
        self.order = [self.order[row] for row in rows.tolist()]
        self.visible, self.position = self.visible[rows], self.position[rows]
        self.cache.batch_select_indices(rows)
        return rows


class OwnDecoder:
    """The model's own forward and cache, driven as `generate` drives them; no prefix is shared.

    Args:
        padded: rows of all lengths are one batch, padded on the left; else, where the cache is not exact under padding,
            one batch per length.
    """

    def __init__(
        self, policy: Forwards, prompts: Sequence[Sequence[int]], limit: PackLimit, new_tokens: int, padded: bool
    ) -> None:
        by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        batches: list[list[int]] = []
        for _, found in groupby(by_length, key=lambda i: 0 if padded else len(prompts[i])):
            members = list(found)
            batches += map(
                list, limit.cut(members, lambda chunk: pack_cost([Sample(prompts[i], []) for i in chunk], "plain"))
            )
        self.batches = [_OwnBatch(policy, [prompts[i] for i in members], new_tokens) for members in batches]
        self.order = [i for members in batches for i in members]
        self.states = torch.cat([batch.states for batch in self.batches])

    def step(self, tokens: Tensor) -> Tensor:
        parts = tokens.split([batch.rows for batch in self.batches])
        return torch.cat([batch.step(part) for batch, part in zip(self.batches, parts, strict=True)])

    def keep(self, rows: Tensor) -> Tensor:
        """Drop whole batches only, since not every cache can drop single rows."""
        wanted, first = set(rows.tolist()), 0
        batches: list[_OwnBatch] = []
        places: list[int] = []
        for batch in self.batches:
            own = range(first, first + batch.rows)
            first += batch.rows
            if not wanted.isdisjoint(own):
                batches.append(batch)
                places += own
        self.batches, self.order = batches, [self.order[place] for place in places]
        return torch.tensor(places, device=rows.device)


class UncachedDecoder:
    """A forward over whole rows for every token: for models whose cache is not exact."""

    def __init__(self, policy: Forwards, prompts: Sequence[Sequence[int]], limit: PackLimit) -> None:
        self.policy, self.limit = policy, limit
        self.order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        self.rows = [list(prompts[i]) for i in self.order]
        self.states = self._forward()

    def step(self, tokens: Tensor) -> Tensor:
        for row, token in zip(self.rows, tokens.tolist(), strict=True):
            row.append(token)
        return self._forward()

    def _forward(self) -> Tensor:
        samples = [Sample(row, []) for row in self.rows]
        chunks = self.limit.cut(samples, lambda chunk: pack_cost(chunk, self.limit.form))
        packs = [pack(chunk, self.policy.device) for chunk in chunks]
        return torch.cat([self.policy.packed_states(packed)[packed.predicting] for packed in packs])

    def keep(self, rows: Tensor) -> Tensor:
        self.order = [self.order[row] for row in rows.tolist()]
        self.rows = [self.rows[row] for row in rows.tolist()]
        return rows


class _OwnBatch:
    """Rows of one cache."""

    def __init__(self, policy: Forwards, prompts: Sequence[Sequence[int]], new_tokens: int) -> None:
        self.policy, self.lm, self.rows = policy, policy.causal_lm, len(prompts)
        longest = max(map(len, prompts))
        ids = torch.tensor([[prompt[0]] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        # `generate` prepares positions and cache as each model needs them, and passes them to `_arguments`.
        self.arguments: dict[str, Any] = self.lm.generate(
            ids.to(policy.device),
            attention_mask=mask.to(policy.device),
            generation_config=GenerationConfig(max_new_tokens=new_tokens, do_sample=False, pad_token_id=0),
            custom_generate=_arguments,
        )
        self.ids: Tensor = self.arguments.pop("input_ids")
        self.states = self._forward(is_first_iteration=True)

    def step(self, tokens: Tensor) -> Tensor:
        self.ids = torch.cat([self.ids, tokens[:, None]], dim=1)
        return self._forward(next_sequence_length=1 if self.arguments.get("use_cache") else None)

    def _forward(self, **which: Any) -> Tensor:
        inputs = self.lm.prepare_inputs_for_generation(self.ids, **which, **self.arguments)
        states, out = self.policy.last_states(**inputs)
        self.arguments = self.lm._update_model_kwargs_for_generation(out, self.arguments)
        return states


def _arguments(model: PreTrainedModel, input_ids: Tensor, **arguments: Any) -> dict[str, Any]:
    """The arguments that `generate` (transformers 5.15) prepared for the forwards."""
    for name in ("logits_processor", "stopping_criteria", "generation_config"):
        arguments.pop(name)
    return arguments | {"input_ids": input_ids}
