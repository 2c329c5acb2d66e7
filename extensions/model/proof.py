"""The proof at load: what this project computes is compared with the model's own plain forward.

Paths, from fast to general: packed rows with this project's attention; packed rows with a dense mask for the model's
attention; plain rows through the model's own forward and cache. The first that agrees with the model on some rows, in
the forward and in decoding, is used. None: the model is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from extensions.common.errors import UserError
from extensions.data import Example
from extensions.model.anatomy import captured, eager, own_logits
from extensions.model.policy import ForwardPath, Policy
from extensions.model.precision import computing_in_float32
from extensions.prefix.attention import NAME as PACKED
from extensions.prefix.attention import CannotPack
from extensions.prefix.logprobs import token_logprobs
from extensions.prefix.tree import Sample, pack, with_sequence_targets
from extensions.prompts import PromptEncoder

CHUNK = 256  # tokens whose logits are there at once
WRITTEN = 2  # tokens of each row that are decoded one by one
TAIL = 16  # last tokens of a row, where a sliding window shows: their mean must hold too
# Difference that is rounding. A path is judged in float32, whatever the run's dtype: by the largest difference of a
# logprob, relative to 1 + its size. Where each module rounds its output otherwise, by one bit (`ROUNDED`), the model's
# own forward differs from itself by nearly as much as an exact path does (a wrong path by 200 times and more), so
# `NOISE` times that is allowed, and never more than `NEVER_MORE`. In lower precision two orders of the same sums differ
# by 0.05 nats on average and by 0.25 at most (SmolLM2), which would hide a wrong path; `MEAN` is a sanity check there,
# and all that there is for quantized weights.
ROUNDED, NOISE, NEVER_MORE, MEAN = 2.0**-23, 20.0, 1e-3, 0.15
WINDOWS = (
    "sliding_window",
    "attention_chunk_size",
    "local_attention",
    "window_size",
    "attention_window_size",
    "index_topk",
)


@dataclass(frozen=True)
class Difference:
    """Of logprobs to those of the model's own forward, in nats."""

    mean: float
    largest: float
    relative: float  # the largest, each relative to 1 + the size of its logprob
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
    narrow, quantized = lm.dtype != torch.float32, bool(getattr(lm, "is_quantized", False))
    dtype = str(lm.dtype).removeprefix("torch.")
    rejected: list[str] = []
    with policy.role("actor"), torch.no_grad():
        with computing_in_float32(lm):
            exact = _own_rows(policy, rows)
            allowed = min(NOISE * max(ROUNDED, _noise(policy, rows[-1], exact[-1])), NEVER_MORE)
        expected = _own_rows(policy, rows) if narrow else exact
        for path in _paths(policy, attention, same_forwards, rejected):
            try:
                policy.use(path)
                found = _compare(policy, rows, expected)
                with computing_in_float32(lm):
                    judged = _compare(policy, rows, exact) if narrow and not quantized else found
            except CannotPack as error:
                rejected.append(f"{path}: {error}")
                continue
            except (torch.OutOfMemoryError, MemoryError):
                raise
            except Exception as error:  # whatever a model's code raises for inputs that it does not know
                why = f"{type(error).__name__}: {error}"
                rejected.append(f"{path}: {' '.join(why.split())[:160]}")
                continue
            failed = [
                name
                for name in found
                if not (quantized or judged[name].relative <= allowed) or (narrow and not found[name].mean <= MEAN)
            ]
            if not failed:
                transform = policy.anatomy.transform
                head = "the model's own" if transform is None else f"linear, scale {transform.scale:g}"
                head += f", cap {transform.cap:g}" if transform is not None and transform.cap is not None else ""
                return Proof(type(lm).__name__, dtype, path, **found, head=head, rejected=rejected)
            worst = max(one.largest for one in judged.values())
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


def _paths(policy: Policy, attention: str, same_forwards: bool, rejected: list[str]) -> Iterator[ForwardPath]:
    """Those to try, from the fastest; what the recipe asks for and cannot be is noted in `rejected`."""
    lm = policy.causal_lm
    loaded = lm.config._attn_implementation
    # transformers' sdpa (5.15) leaves out what it does not know, such as capped scores.
    capped = getattr(lm.config.get_text_config(), "attn_logit_softcapping", None)
    if attention == "sdpa" and capped:
        rejected.append(
            f"model.attn_implementation: sdpa leaves out attn_logit_softcapping {capped:g}; set it to auto or eager"
        )
        return
    if attention != "auto" or not lm._can_set_attn_implementation():
        implementations = [loaded]
    else:
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


def _compare(policy: Policy, rows: Sequence[Sample], expected: Sequence[Tensor]) -> dict[str, Difference]:
    return {"forward": _forward(policy, rows, expected), "decoding": _decoding(policy, rows, expected)}


def _own_rows(policy: Policy, rows: Sequence[Sample]) -> list[Tensor]:
    return [_own_logprobs(policy, [*sample.prompt, *sample.response]) for sample in rows]


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
    """Largest relative difference of the model's logprobs of a row to its own, where modules round otherwise, and where
    the row has lost its last token."""
    row = [*sample.prompt, *sample.response]
    with _rounded_otherwise(policy.causal_lm):
        found = [_own_logprobs(policy, row)[:-1]]
    found.append(_own_logprobs(policy, row[:-1]))
    own = expected[:-1].double()
    return max(float(((one.double() - own).abs() / (1 + own.abs())).max()) for one in found)


@contextmanager
def _rounded_otherwise(lm: nn.Module) -> Iterator[None]:
    generator = torch.Generator().manual_seed(0)

    def round_otherwise(module: nn.Module, inputs: Any, output: Any) -> Any:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return output
        signs = torch.randint(2, output.shape, generator=generator).to(output.device) * 2 - 1
        return output * (1 + ROUNDED * signs)

    leaves = [module for module in lm.modules() if next(module.children(), None) is None]
    hooks = [module.register_forward_hook(round_otherwise) for module in leaves]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _forward(policy: Policy, rows: Sequence[Sample], expected: Sequence[Tensor]) -> Difference:
    """Of every token of every row, by the pack of all."""
    packed = with_sequence_targets(pack(rows, policy.device, min_saved=1), rows)
    found = policy(packed, values=False)["logprobs"]
    by_target = {
        target: number
        for number, target in enumerate(zip(packed.predicting.tolist(), packed.targets.tolist(), strict=True))
    }
    own = torch.full_like(found, torch.nan)
    tail = torch.zeros(len(found), dtype=torch.bool, device=found.device)
    for sample, places, logprobs in zip(rows, packed.places, expected, strict=True):
        following = [*sample.prompt, *sample.response][1:]
        numbers = [by_target[target] for target in zip(places.tolist(), following, strict=True)]
        own[numbers] = logprobs
        tail[numbers[-TAIL:]] = True
    return _difference(found, own, tail)


def _decoding(policy: Policy, rows: Sequence[Sample], expected: Sequence[Tensor]) -> Difference:
    """Of the last tokens of every row, decoded; two rows are of one length, which some caches take for a batch."""
    whole = [[*sample.prompt, *sample.response] for sample in rows]
    length = len(whole[0])
    whole, expected = [*whole, whole[-1][:length]], [*expected, expected[-1][: length - 1]]
    decoder = policy.prefill([row[:-WRITTEN] for row in whole], len(whole), WRITTEN)
    states, found, own = decoder.states, [], []
    for step in range(WRITTEN):
        tokens = torch.tensor([whole[i][step - WRITTEN] for i in decoder.order], device=policy.device)
        found.append(token_logprobs(policy.logits(states), tokens))
        own.append(torch.stack([expected[i][step - WRITTEN] for i in decoder.order]))
        states = decoder.step(tokens)
    every = torch.ones(len(whole) * WRITTEN, dtype=torch.bool, device=policy.device)
    return _difference(torch.cat(found), torch.cat(own), every)


def _difference(found: Tensor, own: Tensor, tail: Tensor) -> Difference:
    apart = (found.double() - own.double()).abs()
    relative = apart / (1 + own.double().abs())
    mean = max(float(apart.mean()), float(apart[tail].mean()))
    return Difference(mean, float(apart.max()), float(relative.max()), len(found))


# ----------------------------------------------------------------------------------------------------------- rows


def windows_of(config: Any) -> list[int]:
    """Numbers of tokens beyond which a model's attention leaves some out."""
    text = config.get_text_config()
    found = {getattr(text, name, None) for name in WINDOWS}
    return sorted(size for size in found if isinstance(size, int) and size > 0)


def proof_rows(examples: Sequence[Example], encoder: PromptEncoder, config: Any, new_tokens: int) -> list[Sample]:
    """Short rows of a run; and for each window that a prompt and its response can reach beyond, one that does.

    Raises:
        UserError: the tokenizer has tokens that the model does not know.
    """
    encoded = []
    longest = max(examples, key=lambda example: sum(map(len, example.fields.values())))
    for example in (*islice(examples, 0, None, max(1, len(examples) // 64)), longest):
        ids, text = encoder.encode(example.task, example.fields)
        answer = example.task.answer(example.label) if example.label is not None else "-"
        encoded.append(Sample(ids, encoder.answer_ids(ids, text, answer)))
    encoder.dropped.clear()  # of these rows; what a run loses is counted as it is used
    _check_vocabulary(encoded, encoder, config)
    encoded.sort(key=lambda sample: len(sample.prompt))
    beyond: list[Sample] = []
    for window in windows_of(config):
        found = next((sample for sample in encoded if len(sample.prompt) + new_tokens > window), None)
        if found is not None and all(len(sample.prompt) + len(sample.response) <= window for sample in beyond):
            repeats = -(-new_tokens // len(found.response))  # as long as a response may be
            beyond.append(Sample(found.prompt, [*found.response] * repeats))
    return encoded[:2] + (beyond or encoded[2:3])


def _check_vocabulary(rows: Sequence[Sample], encoder: PromptEncoder, config: Any) -> None:
    """Tokens added to a tokenizer may lie beyond a model's vocabulary as long as no row has them."""
    known = getattr(config.get_text_config(), "vocab_size", None)
    largest = max(token for sample in rows for token in (*sample.prompt, *sample.response))
    if known is not None and max(encoder.tokenizer.vocab_size - 1, largest) >= known:
        raise UserError(
            f"model.path: its tokenizer has {len(encoder.tokenizer)} tokens, but config.json says vocab_size {known}, "
            "so it is another model's; put the model's own tokenizer files in its folder"
        )


def synthetic_rows(lm: Any) -> list[Sample]:
    """Three rows that share a prefix, of a model's token ids."""
    vocabulary = lm.get_input_embeddings().num_embeddings
    vocabulary = min(vocabulary, getattr(lm.get_output_embeddings(), "out_features", vocabulary))
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(vocabulary // 8, vocabulary, (count,), generator=generator).tolist()

    prefix = ids(20)
    return [Sample([*prefix, *ids(own)], ids(4)) for own in (3, 6, 12)]
