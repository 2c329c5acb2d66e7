"""The rollout backend `vllm` of the DeepSpeed backend: a vLLM engine beside each rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from extensions.distributed import watchdog
from extensions.distributed.strategy import Strategy, load_trainable_state, trainable_state
from extensions.model.policy import Policy
from extensions.prefix.tree import Sample
from extensions.recipe import Recipe
from extensions.rollout.lora_sync import LoraPayload, LoraSync, SyncProbe, random_lora_state, response_logprobs
from extensions.rollout.sampler import GenerationRequest, Response, Sampler
from extensions.rollout.vllm_engine import (
    QUEUED_ROWS,
    VllmEngine,
    sampled_tokens,
    sampling_params,
    vllm_arguments,
    vllm_dtype,
)


class LocalLoraSync(LoraSync):
    """LoRA sync between the policy and the vLLM engine of one rank.

    Args:
        samples: of the probe.
        say: prints a line.
        warn: the same, for a warning.
    """

    def __init__(
        self,
        recipe: Recipe,
        policy: Policy,
        strategy: Strategy,
        samples: Sequence[Sample],
        say: Callable[[str], None],
        warn: Callable[[str], None],
    ) -> None:
        on_cpu = strategy.device.type == "cpu"
        warn_only = warn if recipe.vllm.corrects else None
        super().__init__(SyncProbe(vllm_dtype(recipe, on_cpu), recipe.vllm.probe_tolerance, warn_only))
        self.policy, self.samples, self.seed = policy, list(samples), recipe.seed
        self.micro_batch_size = recipe.evaluation.micro_batch_size
        say("starting one vLLM engine per rank")
        lora_rank = policy.lm.peft_config["default"].r
        self.engine = VllmEngine(vllm_arguments(recipe, on_cpu, lora_rank), recipe.vllm.sleep, strategy.device)

    @contextmanager
    def random_adapter(self) -> Iterator[None]:
        state = trainable_state(self.policy)
        load_trainable_state(self.policy, random_lora_state(state, self.seed))
        try:
            yield
        finally:
            load_trainable_state(self.policy, state)

    def payload(self, version: int) -> LoraPayload:
        return LoraPayload.of(self.policy, trainable_state(self.policy), version)

    def deliver(self, payload: LoraPayload) -> None:
        self.engine.load(payload)

    def trainer_logprobs(self) -> list[float]:
        self.policy.eval()
        with self.policy.role("actor"):
            return response_logprobs(self.policy, self.samples, self.micro_batch_size)

    def engine_logprobs(self) -> list[list[float]]:
        return [self.engine.probe(self.samples)]


class VllmSampler(Sampler):
    """Samples tokens with vLLM; the policy itself computes the likelihoods of given answers.

    Args:
        sync: to the rank's vLLM engine.
        settings: of `Sampler`.
    """

    exact = False  # vLLM's logprobs are rounded differently from the trainer's, and it computes no values
    queued_rows = QUEUED_ROWS

    def __init__(self, sync: LocalLoraSync, *settings: Any) -> None:
        super().__init__(*settings)
        self.sync = sync

    @contextmanager
    def session(self) -> Iterator[None]:
        with self.sync.engine.awake():
            self.sync.refresh()
            yield

    @property
    def metrics(self) -> dict[str, Any]:
        return self.sync.metrics

    def check_logprob_mismatch(self, mismatch: float) -> None:
        self.sync.probe.check_samples(mismatch)

    def _parts(self, requests: Sequence[GenerationRequest]) -> list[Sequence[GenerationRequest]]:
        return [requests]  # the engine has a cache of its own, and a queue

    def _sample(self, requests: Sequence[GenerationRequest], greedy: bool) -> list[Response]:
        watchdog.heartbeat()
        temperature, eos = self.policy.temperature, sorted(self.eos)
        params = [sampling_params(r.budget, request_seed(r), temperature, greedy, self.stop, eos) for r in requests]
        responses = []
        for output in self.sync.engine.generate([r.prompt for r in requests], params):
            tokens, found = sampled_tokens(output)
            logprobs = torch.tensor(found, device=self.policy.device)
            responses.append(Response(tokens, logprobs, torch.zeros_like(logprobs), self.decode(tokens)))
        return responses


def request_seed(request: GenerationRequest) -> int:
    """The seed of a vLLM request, from the request's own random numbers."""
    return int(float(request.uniforms[0]) * 2**31)
