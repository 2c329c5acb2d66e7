"""The proof at load: every path of this project is compared with the model's own plain forward.

Paths, from fast to general: packed rows with this project's attention; packed rows with a dense mask for the model's
attention; plain rows through the model's own forward and cache. The first path that agrees with the model on some rows,
in the forward and in decoding, is used. If none does, the model is refused.
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
from extensions.model.mpt import has_alibi
from extensions.model.policy import ForwardPath, Policy
from extensions.model.precision import computing_in_float32
from extensions.prefix.attention import NAME as PACKED
from extensions.prefix.attention import CannotPack
from extensions.prefix.flash import missing
from extensions.prefix.limits import PackLimit
from extensions.prefix.logprobs import token_logprobs
from extensions.prefix.tree import Sample, pack, with_sequence_targets
from extensions.prompts import PromptEncoder

CHUNK = 256  # tokens per chunk of logits
WRITTEN = 2  # tokens of each row that are decoded one by one
TAIL = 16  # last tokens of a row, where a sliding window takes effect: their mean is checked too
# Tolerance for rounding. A path is checked in float32, whatever the run's dtype, by the largest difference of a logprob
# relative to 1 + its magnitude. If each module's output is perturbed by one bit (`ROUNDED`), the model's own forward
# changes by nearly as much as an exact path differs from it; a wrong path differs 200 times as much or more. `NOISE`
# times that change is allowed, at most `NEVER_MORE`. In lower precision two orders of the same sums differ by 0.05 nats
# on average and by 0.25 at most (SmolLM2), which would hide a wrong path: there `MEAN` is a sanity check, and the only
# check for quantized weights.
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
    """Between logprobs and those of the model's own forward, in nats."""

    mean: float
    largest: float
    relative: float  # the largest relative to 1 + the magnitude of its logprob
    tokens: int


@dataclass
class Proof:
    """The chosen path and its evidence; written to model.json of the run folder."""

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
    """Switch the policy to the fastest exact path.

    Args:
        attention: recipe key model.attn_implementation.
        rows: rows to compare on, of different lengths, with a common prefix.
        same_forwards: whether all ranks must do equally many forwards (ZeRO 3).

    Raises:
        UserError: no path is exact.
    """
    lm = policy.causal_lm
    policy.eval()
    low_precision, quantized = lm.dtype != torch.float32, bool(getattr(lm, "is_quantized", False))
    dtype = str(lm.dtype).removeprefix("torch.")
    rejected: list[str] = []
    with policy.role("actor"), torch.no_grad():
        with computing_in_float32(lm):
            exact = _own_rows(policy, rows)
            allowed = min(NOISE * max(ROUNDED, _noise(policy, rows[-1], exact[-1])), NEVER_MORE)
        expected = _own_rows(policy, rows) if low_precision else exact
        for path in _paths(policy, attention, same_forwards, rejected):
            try:
                policy.use(path)
                found = _compare(policy, rows, expected)
                with computing_in_float32(lm):
                    in_float32 = _compare(policy, rows, exact) if low_precision and not quantized else found
            except CannotPack as error:
                rejected.append(f"{path}: {error}")
                continue
            except (torch.OutOfMemoryError, MemoryError):
                raise
            except Exception as error:  # a model's code may raise anything
                why = f"{type(error).__name__}: {error}"
                rejected.append(f"{path}: {' '.join(why.split())[:160]}")
                continue
            failed = [
                name
                for name in found
                if not (quantized or in_float32[name].relative <= allowed)
                or (low_precision and not found[name].mean <= MEAN)
            ]
            if not failed:
                transform = policy.anatomy.transform
                head = "the model's own" if transform is None else f"linear, scale {transform.scale:g}"
                head += f", cap {transform.cap:g}" if transform is not None and transform.cap is not None else ""
                return Proof(type(lm).__name__, dtype, path, **found, head=head, rejected=rejected)
            worst = max(one.largest for one in in_float32.values())
            rejected.append(f"{path}: {' and '.join(failed)} off by up to {worst:.2g} nats")
    raise UserError(
        f"model.path: {type(lm).__name__} has no exact path here: each differs from its own forward "
        f"({'; '.join(rejected)}). Use another model, or report this with the model's family"
    )


def check_gradient(policy: Policy, sample: Sample) -> None:
    """Raises UserError where no gradient reaches the adapter."""
    with policy.role("actor"), torch.enable_grad():
        if not policy(pack([sample], policy.device), values=False)["logprobs"].requires_grad:
            raise UserError(
                f"model.path: no gradient reaches the LoRA layers of {type(policy.causal_lm).__name__}, whose own "
                "backward pass leaves them out; it can be evaluated (launch/eval.sh), but not trained"
            )


def _paths(policy: Policy, attention: str, same_forwards: bool, rejected: list[str]) -> Iterator[ForwardPath]:
    """The paths to try, fastest first; a requested attention that cannot be exact is noted in `rejected`."""
    lm = policy.causal_lm
    loaded = lm.config._attn_implementation
    # transformers' sdpa (5.15) ignores capped scores.
    capped = getattr(lm.config.get_text_config(), "attn_logit_softcapping", None)
    if attention == "sdpa" and capped:
        rejected.append(
            f"model.attn_implementation: sdpa ignores attn_logit_softcapping {capped:g}; set it to auto or eager"
        )
        return
    if attention in ("auto", "flash") and loaded == PACKED:
        lacking = missing(policy.device, lm.dtype, has_alibi(lm))
        if lacking is None:
            yield ForwardPath("packed", PACKED, flash=True)
        elif attention == "flash":
            rejected.append(f"model.attn_implementation: flash cannot be used: {lacking}; set it to auto")
    elif attention == "flash":
        rejected.append("model.attn_implementation: flash needs a model with transformers' attention interface")
    if attention == "flash":
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
    """(T - 1,) logprob of each token of a row but the first, by the model's own forward."""
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
    """Largest relative change of the model's own logprobs of a row, with perturbed roundings and without the row's last
    token."""
    row = [*sample.prompt, *sample.response]
    with _perturbed(policy.causal_lm):
        found = [_own_logprobs(policy, row)[:-1]]
    found.append(_own_logprobs(policy, row[:-1]))
    own = expected[:-1].double()
    return max(float(((one.double() - own).abs() / (1 + own.abs())).max()) for one in found)


@contextmanager
def _perturbed(lm: nn.Module) -> Iterator[None]:
    generator = torch.Generator().manual_seed(0)

    def perturb(module: nn.Module, inputs: Any, output: Any) -> Any:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return output
        signs = torch.randint(2, output.shape, generator=generator).to(output.device) * 2 - 1
        return output * (1 + ROUNDED * signs)

    leaves = [module for module in lm.modules() if next(module.children(), None) is None]
    hooks = [module.register_forward_hook(perturb) for module in leaves]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _forward(policy: Policy, rows: Sequence[Sample], expected: Sequence[Tensor]) -> Difference:
    """Difference over every token of every row, computed as one pack."""
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
    """Difference over the last tokens of every row, decoded. Two rows have one length: some caches batch them."""
    whole = [[*sample.prompt, *sample.response] for sample in rows]
    length = len(whole[0])
    whole, expected = [*whole, whole[-1][:length]], [*expected, expected[-1][: length - 1]]
    decoder = policy.prefill([row[:-WRITTEN] for row in whole], PackLimit(len(whole)), WRITTEN)
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
    """Sizes of the windows and chunks of a model's attention, in tokens."""
    text = config.get_text_config()
    found = {getattr(text, name, None) for name in WINDOWS}
    return sorted(size for size in found if isinstance(size, int) and size > 0)


def proof_rows(examples: Sequence[Example], encoder: PromptEncoder, config: Any, new_tokens: int) -> list[Sample]:
    """Short rows of a run, and a row longer than each attention window that its prompts and responses can exceed.

    Raises:
        UserError: the tokenizer has tokens beyond the model's vocabulary.
    """
    encoded = []
    longest = max(examples, key=lambda example: sum(map(len, example.fields.values())))
    for example in (*islice(examples, 0, None, max(1, len(examples) // 64)), longest):
        ids, text = encoder.encode(example.task, example.fields)
        answer = example.task.answer(example.label) if example.label is not None else "-"
        encoded.append(Sample(ids, encoder.answer_ids(ids, text, answer)))
    encoder.dropped.clear()  # from these rows; the run counts its own
    _check_vocabulary(encoded, encoder, config)
    encoded.sort(key=lambda sample: len(sample.prompt))
    beyond: list[Sample] = []
    for window in windows_of(config):
        found = next((sample for sample in encoded if len(sample.prompt) + new_tokens > window), None)
        if found is not None and all(len(sample.prompt) + len(sample.response) <= window for sample in beyond):
            repeats = -(-new_tokens // len(found.response))  # up to the longest response
            beyond.append(Sample(found.prompt, [*found.response] * repeats))
    return encoded[:2] + (beyond or encoded[2:3])


def _check_vocabulary(rows: Sequence[Sample], encoder: PromptEncoder, config: Any) -> None:
    """Added tokens may lie beyond the model's vocabulary as long as no row contains them."""
    known = getattr(config.get_text_config(), "vocab_size", None)
    largest = max(token for sample in rows for token in (*sample.prompt, *sample.response))
    if known is not None and max(encoder.tokenizer.vocab_size - 1, largest) >= known:
        raise UserError(
            f"model.path: its tokenizer has {len(encoder.tokenizer)} tokens, but config.json says vocab_size {known}, "
            "so it belongs to another model; put the model's own tokenizer files into its folder"
        )


def synthetic_rows(lm: Any) -> list[Sample]:
    """Three rows of token ids with a common prefix."""
    vocabulary = lm.get_input_embeddings().num_embeddings
    vocabulary = min(vocabulary, getattr(lm.get_output_embeddings(), "out_features", vocabulary))
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(vocabulary // 8, vocabulary, (count,), generator=generator).tolist()

    prefix = ids(20)
    return [Sample([*prefix, *ids(own)], ids(4)) for own in (3, 6, 12)]
