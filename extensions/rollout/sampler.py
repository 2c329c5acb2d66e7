"""Sampling: prompts in; response tokens with their logprobs and values out.

Decoding follows section 5.1 of the paper: multinomial at the recipe's temperature, a token budget per row, ending at a
stop string. Random numbers are a function of (seed, purpose, step, row; of an evaluation also the task), so a row's
response does not depend on its batch or rank, and a resumed run needs no generator state.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from extensions.distributed import watchdog
from extensions.model.policy import Policy
from extensions.prefix.limits import MemoryLimits
from extensions.prefix.logprobs import sample_tokens, token_logprobs
from extensions.prefix.tree import Sample, common_prefix, micro_batches, pack

# Finished rows are dropped when at most this share of the batch is unfinished: dropping copies the cache.
COMPACT_BELOW = 0.9
TRAINING = 0  # purpose of the random numbers of rollouts; evaluation has another
RESAMPLING = 2  # and from here on those of the attempts to sample a prompt again


@dataclass(frozen=True)
class GenerationRequest:
    """The generation request of one sample."""

    prompt: Sequence[int]
    budget: int  # most tokens of the response
    uniforms: np.ndarray  # (>= budget,) float64 in [0, 1): one per token


@dataclass(frozen=True)
class Response:
    """The response to one request."""

    tokens: list[int]
    logprobs: Tensor  # (len(tokens),) float32 under the policy that sampled
    values: Tensor  # (len(tokens),) float32 V of the state before each token, by a head on the actor's trunk; else 0
    text: str


def random_numbers(
    seed: int, purpose: int, step: int, row: int, max_new_tokens: int, task: str = ""
) -> tuple[float, np.ndarray]:
    """A uniform number for the row's budget, and one per token.

    Philox is counter-based: each (seed, purpose, step, task, row) is a stream of its own, without state.

    Args:
        task: name of the task that `row` counts in; "" for the rows of a training batch, which are of all tasks.
    """
    word = int.from_bytes(hashlib.sha256(task.encode()).digest()[:8], "big") if task else 0
    counter = np.array([0, word, row, step], dtype=np.uint64)  # numpy increments the first word
    rng = np.random.Generator(np.random.Philox(key=[seed, purpose], counter=counter))
    return rng.random(), rng.random(max_new_tokens)


def training_request(
    ids: Sequence[int], seed: int, step: int, row: int, budget: Sequence[int], attempt: int = 0
) -> GenerationRequest:
    """The request of one training sample: a budget uniform in [low, high] (section 5.1), and its random numbers.

    Args:
        row: of the response among all of the batch.
        attempt: 0, or that of sampling its prompt again.
    """
    low, high = budget
    draw, uniforms = random_numbers(seed, RESAMPLING + attempt - 1 if attempt else TRAINING, step, row, high)
    return GenerationRequest(ids, low + int(draw * (high - low + 1)), uniforms)


class Sampler:
    """Rollout backend `hf`: the policy itself samples.

    Args:
        stop: a response ends with this text, or with an EOS token.
        micro_batch_size: rows per packed forward over the prompts.
        fixed_decode_steps: decoding steps of every batch, the longest budget. ZeRO 3 gathers weights in each forward,
            so all ranks need the same number; tokens beyond a response's end are discarded. None: finished rows are
            dropped.
        limits: of memory, besides the rows; a batch whose cache would exceed them is decoded in parts.
    """

    # Whether logprobs equal the trainer's up to rounding in float32, and values are those of the policy's head.
    exact = True
    # Rows that it wants at once, beyond evaluation.batch_size: an engine has a queue, and batches each step anew.
    queued_rows = 0

    def __init__(
        self,
        policy: Policy,
        tokenizer: PreTrainedTokenizerBase,
        stop: str,
        micro_batch_size: int,
        fixed_decode_steps: int | None = None,
        limits: MemoryLimits | None = None,
    ) -> None:
        self.limits = limits or MemoryLimits()
        self.policy, self.tokenizer, self.stop = policy, tokenizer, stop
        self.micro_batch_size, self.fixed_decode_steps = micro_batch_size, fixed_decode_steps
        self.eos = eos_ids(policy.causal_lm.generation_config, tokenizer)
        self.may_stop = _tokens_with(stop[-1], tokenizer)

    @contextmanager
    def session(self) -> Iterator[None]:
        """Context of all sampling with one state of the weights. Enter it on every rank."""
        yield

    def check_logprob_mismatch(self, mismatch: float) -> None:
        """Raises if sampled logprobs differ too much from the trainer's on average; this backend needs no check."""

    @property
    def metrics(self) -> dict[str, Any]:
        """Metrics of the rollout backend since the last session began."""
        return {}

    @torch.no_grad()
    def sample(self, requests: Sequence[GenerationRequest], greedy: bool = False) -> list[Response]:
        """One response per request, in order; `greedy` takes the most probable tokens."""
        return self.limits.attempt(lambda: self._sample_in_parts(requests, greedy))

    def _sample_in_parts(self, requests: Sequence[GenerationRequest], greedy: bool) -> list[Response]:
        self.policy.eval()
        responses: list[Response] = []
        with self.policy.role("actor"):
            for part in self._parts(requests):
                responses += self._sample(part, greedy)
        return responses

    def _parts(self, requests: Sequence[GenerationRequest]) -> list[Sequence[GenerationRequest]]:
        """Requests whose KV cache fits into memory together: all of them, or parts; a row's response is the same."""
        limits = self.limits
        if self.fixed_decode_steps:  # ranks decode equally many batches
            return [requests]
        prompts = [request.prompt for request in requests]
        shared = common_prefix(prompts) if self.policy.path.kind == "packed" else 0  # kept once
        places = max(len(prompt) - shared + request.budget for prompt, request in zip(prompts, requests, strict=True))
        limits.running(len(requests), len(requests) * places + shared)
        rows = min(limits.rows_together, len(requests))
        if rows * places + shared > limits.cache_tokens:
            rows = max(1, int((limits.cache_tokens - shared) // places))
        return [requests[first : first + rows] for first in range(0, len(requests), rows)]

    def _sample(self, requests: Sequence[GenerationRequest], greedy: bool) -> list[Response]:
        policy, device = self.policy, self.policy.device
        steps = self.fixed_decode_steps or max(request.budget for request in requests)
        self.limits.running(len(requests), sum(len(request.prompt) + steps for request in requests))
        decoder = policy.prefill([request.prompt for request in requests], self.limits.of(self.micro_batch_size), steps)
        states = decoder.states
        tokens: list[list[int]] = [[] for _ in requests]
        padded_uniforms = np.zeros((len(requests), steps))
        for row, request in zip(padded_uniforms, requests, strict=True):
            row[: request.budget] = request.uniforms[: min(request.budget, steps)]
        uniforms = torch.from_numpy(padded_uniforms).to(device)
        logprobs, values = torch.zeros(2, len(requests), steps, device=device)
        is_finished = [False] * len(requests)
        for step in range(steps):
            watchdog.heartbeat()
            rows = decoder.order  # requests in the batch: unfinished ones, and finished ones that are not dropped yet
            logits = policy.logits(states)
            drawn = logits.argmax(-1) if greedy else sample_tokens(logits, uniforms[rows, step])
            logprobs[rows, step] = token_logprobs(logits, drawn)
            if policy.value_head is not None:
                values[rows, step] = policy.value_head(states)
            for i, token in zip(rows, drawn.tolist(), strict=True):
                if not is_finished[i]:
                    tokens[i].append(token)
                    is_finished[i] = len(tokens[i]) == requests[i].budget or self._ends(tokens[i])
            active_rows = [k for k, i in enumerate(rows) if not is_finished[i]]
            if step + 1 == steps or not (active_rows or self.fixed_decode_steps):
                break
            if not self.fixed_decode_steps and len(active_rows) <= COMPACT_BELOW * len(rows):
                drawn = drawn[decoder.keep(torch.tensor(active_rows, device=device))]
            states = decoder.step(drawn)
        return [
            Response(written, logprobs[i, : len(written)], values[i, : len(written)], self.decode(written))
            for i, written in enumerate(tokens)
        ]

    @torch.no_grad()
    def logprobs(self, samples: Sequence[Sample], together: int = 1, counted: int | None = None) -> Tensor:
        """Log-probability (len(samples),) float32 of each whole response after its prompt, under the policy.

        Args:
            together: number of consecutive samples with the same prompt, computed in one pack.
            counted: rows of a micro-batch that they count as; None: one each. The number of packs depends only on this
                and the number of prompts, so ranks with equally many do equally many forwards.
        """
        return self.limits.attempt(lambda: self._logprobs(samples, together, counted or together))

    def _logprobs(self, samples: Sequence[Sample], together: int, counted: int) -> Tensor:
        self.policy.eval()
        totals = torch.zeros(len(samples), device=self.policy.device)
        limit = self.limits.of(max(1, self.micro_batch_size // counted))
        with self.policy.role("actor"):
            for chunk in micro_batches(samples, range(len(samples) // together), limit, together):
                watchdog.heartbeat()
                members = [together * k + i for k in chunk for i in range(together)]
                packed = pack([samples[i] for i in members], self.policy.device)
                self.limits.running(len(chunk), packed.input_ids.shape[1])
                tokens = self.policy(packed, values=False)["logprobs"]
                totals[members] = torch.stack([part.sum() for part in tokens.split(packed.lengths)])
        return totals

    def _ends(self, tokens: list[int]) -> bool:
        """Whether the last token ends the response; text is decoded only where the stop string could have ended."""
        if tokens[-1] in self.eos:
            return True
        return tokens[-1] in self.may_stop and self.stop in self.decode(tokens)

    def decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def eos_ids(config: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of the EOS tokens, of the model's generation config and of the tokenizer."""
    configured = config.eos_token_id if config else None
    ids = configured if isinstance(configured, list) else [configured]
    return {i for i in (*ids, tokenizer.eos_token_id) if i is not None}


def _tokens_with(character: str, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of all tokens that contain `character`."""
    return {i for token, i in tokenizer.get_vocab().items() if character in token}
