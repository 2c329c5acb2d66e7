"""The proof at load: what this project computes is compared with the model's own plain forward.

Paths, from fast to general: packed rows with this project's attention; packed rows with a dense mask for the model's
attention; plain rows through the model's own forward and cache. The first that agrees with the model on some rows, in
the forward and in decoding, is used. None: the model is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from extensions.attention import NAME as PACKED
from extensions.attention import CannotPack
from extensions.data import Example
from extensions.errors import UserError
from extensions.model.anatomy import captured, eager, own_logits
from extensions.model.policy import ForwardPath, Policy
from extensions.numerics import token_logprobs
from extensions.packing import Sample, pack, with_sequence_targets
from extensions.prompts import PromptEncoder

CHUNK = 256  # tokens whose logits are there at once
WRITTEN = 2  # tokens of each row that are decoded one by one
TAIL = 16  # last tokens of a row, where a sliding window shows: their mean must hold too
# Difference that is rounding. In float32: the largest of a logprob, relative to 1 + its size, at most `LARGEST` or
# `NOISE` times what the model's own forward differs from itself on a shortened row. In lower precision: the mean, where
# two orders of the same sums differ by 0.05 nats on average and by 0.25 at most (SmolLM2).
LARGEST, NOISE, MEAN = 5e-5, 20.0, 0.15
WINDOWS = ("sliding_window", "attention_chunk_size", "local_attention", "window_size", "attention_window_size")


@dataclass(frozen=True)
class Difference:
    """Of logprobs to those of the model's own forward, in nats."""

    mean: float
    largest: float
    tokens: int


@dataclass
class Proof:
    """What was found; `model.json` of the run folder."""

    model: str  # its class
    dtype: str
    path: ForwardPath
    forward: Difference
    decoding: Difference
    head: str
    rejected: list[str] = field(default_factory=list)  # faster paths, and why they are not used

    def __str__(self) -> str:
        largest = max(self.forward.largest, self.decoding.largest)
        slower = f"; not {self.rejected[0]}" if self.rejected else ""
        return f"{self.model}: {self.path}; within {largest:.1g} nats of its own forward ({self.dtype}){slower}"

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def choose_path(policy: Policy, attention: str, rows: Sequence[Sample], same_forwards: bool) -> Proof:
    """Have the policy use the fastest path that is exact.

    Args:
        attention: recipe key model.attn_implementation.
        rows: what is computed, of different lengths, with something to share.
        same_forwards: whether all ranks must do as many forwards as each other (ZeRO 3).

    Raises:
        UserError: there is none.
    """
    lm = policy.causal_lm
    policy.eval()
    with policy.role("actor"), torch.no_grad():
        expected = [_own_logprobs(policy, [*sample.prompt, *sample.response]) for sample in rows]
        largest = max(LARGEST, NOISE * _noise(policy, rows[-1], expected[-1]))
        rejected: list[str] = []
        for path in _paths(policy, attention, same_forwards):
            try:
                policy.use(path)
                forward, decoding = _forward(policy, rows, expected), _decoding(policy, rows, expected)
            except CannotPack as error:
                rejected.append(f"{path}: {error}")
                continue
            except Exception as error:  # whatever a model's code raises for inputs that it does not know
                why = f"{type(error).__name__}: {error}"
                rejected.append(f"{path}: {' '.join(why.split())[:160]}")
                continue
            found = {"forward": forward, "decoding": decoding}
            failed = [name for name, difference in found.items() if not _agrees(difference, lm.dtype, largest)]
            if not failed:
                transform = policy.anatomy.transform
                head = "the model's own" if transform is None else f"linear, scale {transform.scale:g}"
                head += f", cap {transform.cap:g}" if transform is not None and transform.cap is not None else ""
                dtype = str(lm.dtype).removeprefix("torch.")
                return Proof(type(lm).__name__, dtype, path, forward, decoding, head, rejected)
            worst = max(forward.largest, decoding.largest)
            rejected.append(f"{path}: {' and '.join(failed)} off by up to {worst:.2g} nats")
    raise UserError(
        f"model.path: {type(lm).__name__} cannot be computed here as its own forward does ({'; '.join(rejected)})."
        " Use another model, or report this with the family's name"
    )


def check_gradient(policy: Policy, sample: Sample) -> None:
    """Raises UserError where what the policy computes does not depend on its adapter, for autograd."""
    with policy.role("actor"), torch.enable_grad():
        if not policy(pack([sample], policy.device), values=False)["logprobs"].requires_grad:
            raise UserError(
                f"model.path: no gradient reaches the LoRA layers of {type(policy.causal_lm).__name__}, whose own "
                "backward pass leaves them out; it can be evaluated (launch/eval.sh), but not trained"
            )


def _paths(policy: Policy, attention: str, same_forwards: bool) -> Iterator[ForwardPath]:
    lm = policy.causal_lm
    loaded = lm.config._attn_implementation
    if attention != "auto" or not lm._can_set_attn_implementation():
        implementations = [loaded]
    else:
        # transformers' sdpa (5.15) leaves out what it does not know, such as capped scores.
        capped = getattr(lm.config.get_text_config(), "attn_logit_softcapping", None)
        implementations = ["sdpa"] * bool(lm._supports_sdpa and not capped) + ["eager"]
        if loaded == PACKED:
            yield ForwardPath("packed", PACKED)
    for name in implementations:
        yield ForwardPath("masked", name)
    for name in implementations:
        yield ForwardPath("plain", name)
    for name in implementations if not same_forwards else ():
        yield ForwardPath("plain", name, "by length")
    for name in implementations:
        yield ForwardPath("plain", name, "none")


def _own_logprobs(policy: Policy, row: Sequence[int]) -> Tensor:
    """(T - 1,) log-probabilities of each token of a row but its first, by the model's own forward."""
    lm, ids = policy.causal_lm, torch.tensor([row], device=policy.device)
    one = {"logits_to_keep": 1} if lm._supports_logits_to_keep() else {}
    found = []
    with eager(lm), captured(policy.decoder) as states:
        lm(input_ids=ids, use_cache=False, **one)
        for first in range(0, len(row) - 1, CHUNK):
            targets = ids[0, first + 1 : first + 1 + CHUNK]
            logits = own_logits(lm, policy.decoder, states[0][0, first : first + len(targets)])
            found.append(token_logprobs(logits.float() / policy.temperature, targets))
    return torch.cat(found)


def _noise(policy: Policy, sample: Sample, expected: Tensor) -> float:
    """Largest relative difference of the model's logprobs of a row to those of the row without its last token."""
    again = _own_logprobs(policy, [*sample.prompt, *sample.response][:-1]).double()
    own = expected[: len(again)].double()
    return float(((again - own).abs() / (1 + own.abs())).max())


def _forward(policy: Policy, rows: Sequence[Sample], expected: Sequence[Tensor]) -> Difference:
    """Of every token of every row, by the pack of all."""
    packed = with_sequence_targets(pack(rows, policy.device, min_saved=1), rows)
    found = policy(packed, values=False)["logprobs"]
    by_target = {
        target: number
        for number, target in enumerate(zip(packed.predicting.tolist(), packed.targets.tolist(), strict=True))
    }
    own = torch.full_like(found, math.nan)
    tail = torch.zeros(len(found), dtype=torch.bool, device=found.device)
    for sample, places, logprobs in zip(rows, packed.places, expected, strict=True):
        following = [*sample.prompt, *sample.response][1:]
        numbers = [by_target[target] for target in zip(places.tolist(), following, strict=True)]
        own[numbers] = logprobs
        tail[numbers[-TAIL:]] = True
    return _difference(found, own, tail)


def _decoding(policy: Policy, rows: Sequence[Sample], expected: Sequence[Tensor]) -> Difference:
    """Of the last tokens of every row, decoded."""
    whole = [[*sample.prompt, *sample.response] for sample in rows]
    decoder = policy.prefill([row[:-WRITTEN] for row in whole], len(rows), WRITTEN)
    states, found, own = decoder.states, [], []
    for step in range(WRITTEN):
        tokens = torch.tensor([whole[i][step - WRITTEN] for i in decoder.order], device=policy.device)
        found.append(token_logprobs(policy.logits(states), tokens))
        own.append(torch.stack([expected[i][step - WRITTEN] for i in decoder.order]))
        states = decoder.step(tokens)
    every = torch.ones(len(rows) * WRITTEN, dtype=torch.bool, device=policy.device)
    return _difference(torch.cat(found), torch.cat(own), every)


def _difference(found: Tensor, own: Tensor, tail: Tensor) -> Difference:
    apart = (found.double() - own.double()).abs()
    relative = apart / (1 + own.double().abs())
    mean = max(float(apart.mean()), float(apart[tail].mean()))
    return Difference(mean, float(relative.max()), len(found))


def _agrees(found: Difference, dtype: torch.dtype, largest: float) -> bool:
    if not math.isfinite(found.largest):
        return False
    return found.largest <= largest if dtype == torch.float32 else found.mean <= MEAN


# ----------------------------------------------------------------------------------------------------------- rows


def window_of(config: Any) -> int | None:
    """The shortest window of a model's attention, if it has one."""
    text = config.get_text_config()
    found = [getattr(text, name, None) for name in WINDOWS]
    return min((size for size in found if isinstance(size, int) and size > 0), default=None)


def proof_rows(examples: Sequence[Example], encoder: PromptEncoder, config: Any, new_tokens: int) -> list[Sample]:
    """Short rows of a run; where its prompts reach beyond a sliding window, one that does."""
    longest = max(examples, key=lambda example: sum(map(len, example.fields.values())))
    encoded = []
    for example in (longest, *islice(examples, 0, None, max(1, len(examples) // 64))):
        ids, text = encoder.encode(example.task, example.fields)
        answer = example.task.answer(example.label) if example.label is not None else "-"
        encoded.append(Sample(ids, encoder.answer_ids(ids, text, answer)))
    encoded.sort(key=lambda sample: len(sample.prompt))
    window = window_of(config)
    beyond = [sample for sample in encoded[2:] if window is not None and len(sample.prompt) + new_tokens > window]
    return encoded[:2] + (beyond[:1] or encoded[2:3])


def synthetic_rows(lm: Any) -> list[Sample]:
    """Three rows that share a prefix, of a model's token ids."""
    vocabulary = min(lm.get_input_embeddings().num_embeddings, lm.get_output_embeddings().out_features)
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(vocabulary // 8, vocabulary, (count,), generator=generator).tolist()

    prefix = ids(20)
    return [Sample([*prefix, *ids(own)], ids(4)) for own in (3, 6, 12)]
