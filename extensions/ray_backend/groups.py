"""OpenRLHF's actor groups and vLLM engines: how they are started, and the calls on them that OpenRLHF lacks.

`Groups` is the driver's handle on them; LoRA sync, sampler and checkpoints are built on it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import ray
import torch
from torch import Tensor

from extensions.distributed import watchdog
from extensions.distributed.shares import joined
from extensions.distributed.strategy import Strategy
from extensions.prefix.tree import Sample
from extensions.ray_backend.cluster import ClusterShape
from extensions.ray_backend.models import RayStrategy
from extensions.ray_backend.workers import CriticActor, PolicyActor, ReferenceActor, RolloutActorFactory
from extensions.recipe import Recipe
from extensions.rollout.lora_sync import LoraPayload, LoraSync, SyncProbe
from extensions.rollout.sampler import GenerationRequest, Response
from extensions.rollout.vllm_engine import QUEUED_ROWS
from extensions.rollout.vllm_sampler import request_seed
from extensions.runs.checkpoint import CheckpointFiles, Checkpoints

# After `extensions`, which makes it importable without flash-attn.
from openrlhf.trainer.ppo_utils.samples_generator import SamplesGenerator  # isort: skip
from openrlhf.trainer.ray import vllm_engine  # isort: skip
from openrlhf.trainer.ray.launcher import RayActorGroup  # isort: skip


@dataclass(frozen=True)
class RolloutRequest:
    """One sample's request to the agent, sent as JSON in OpenRLHF's label."""

    prompt_ids: list[int]  # OpenRLHF sends text, which does not determine them
    budget: int  # response tokens at most
    seed: int
    greedy: bool
    label: str | None  # for the reward; None: no reward is computed


def wait(references: Sequence[Any]) -> list[Any]:
    """`ray.get` with a heartbeat for each result."""
    pending = list(references)
    while pending:
        ready, pending = ray.wait(pending, num_returns=1, timeout=1.0)
        if ready:
            ray.get(ready)  # raises an error at once; the other results may be waiting for this one
            watchdog.heartbeat()
    return list(ray.get(list(references)))


class Groups:
    """The running groups and vLLM engines.

    Args:
        strategy: of all groups.
        engines: handles of `RolloutActor`.
    """

    def __init__(self, strategy: RayStrategy, actor: Any, critic: Any, reference: Any, engines: Sequence[Any]) -> None:
        self.actor, self.critic, self.reference, self.engines = actor, critic, reference, list(engines)
        self.trained = {"actor": actor} | ({} if critic is None else {"critic": critic})
        self.generator = SamplesGenerator(strategy, None, None, None, self.engines)
        self.sleeps = bool(strategy.args.vllm.enable_sleep)  # then OpenRLHF puts new engines to sleep
        self._awake = False

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Engines that share GPUs with training hold GPU memory only inside this context."""
        if not self.sleeps or self._awake:
            yield
            return
        self.call_engines("wake_up")
        self._awake = True
        try:
            yield
        finally:
            self._awake = False
            self.call_engines("sleep")

    @staticmethod
    def call(group: Any, method: str, *arguments: Any) -> list[Any]:
        """The results of all ranks of a group."""
        return wait(group.async_run_method(method, *arguments))

    def call_actor(self, method: str, *arguments: Any) -> Any:
        """The result of rank 0; the method runs on all ranks of the actor group."""
        return self.call(self.actor, method, *arguments)[0]

    def call_engines(self, method: str, *arguments: Any) -> list[Any]:
        return wait([getattr(engine, method).remote(*arguments) for engine in self.engines])

    def respond(self, requests: Sequence[RolloutRequest], prompts: Sequence[str]) -> list[dict[str, Any]]:
        """The agent's responses, in order; OpenRLHF distributes the requests over the engines."""
        labels = [json.dumps(asdict(request)) for request in requests]
        references = self.generator._dispatch_prompts_to_vllm(list(prompts), labels, n_samples_per_prompt=1)
        return [responses[0] for responses in wait(references)]


def start_groups(recipe: Recipe, shape: ClusterShape, strategy: RayStrategy, num_updates: int) -> Groups:
    """Start vLLM engines and groups, placed as by OpenRLHF's `train_ppo_ray` (0.11.2), with this project's actors."""
    args, placement = strategy.args, None
    if recipe.ray.colocate:  # one place per GPU, shared by a rank of each group and an engine
        placement = ray.util.placement_group([{"GPU": 1, "CPU": 1}] * shape.ranks, strategy="PACK")
        ray.get(placement.ready())
    with mock.patch.object(vllm_engine, "RolloutRayActor", RolloutActorFactory(recipe, shape.on_cpu)):
        engines = vllm_engine.create_vllm_engines(
            args.vllm.num_engines,
            args.vllm.tensor_parallel_size,
            args.actor.model_name_or_path,
            args.train.seed,
            args.train.full_determinism_enable,
            args.vllm.enable_prefix_caching,
            args.vllm.enforce_eager,
            args.data.max_len,
            placement,
            args.vllm.gpu_memory_utilization,
            args.vllm.enable_sleep,
            agent_func_path=args.train.agent_func_path,
        )

    def group(actor_class: type) -> Any:
        remote_class, share = ray.remote(num_gpus=1)(actor_class), 0.2 if recipe.ray.colocate else 1
        return RayActorGroup(shape.nodes, shape.gpus_per_node, remote_class, placement, share)

    actor = group(PolicyActor)
    reference = group(ReferenceActor) if recipe.ppo.kl.init > 0 else None
    critic = group(CriticActor) if recipe.ppo.value_model != "none" else None
    loading = actor.async_init_model_from_pretrained(strategy, num_updates)
    if reference is not None:
        loading += reference.async_init_model_from_pretrained(strategy)
    ray.get(loading)
    if critic is not None:
        ray.get(critic.async_init_model_from_pretrained(strategy, num_updates))
    return Groups(strategy, actor, critic, reference, engines)


class RayLoraSync(LoraSync):
    """LoRA sync between the actor group and all vLLM engines.

    Args:
        samples: of the probe.
    """

    def __init__(self, groups: Groups, probe: SyncProbe, samples: Sequence[Sample]) -> None:
        super().__init__(probe)
        self.groups, self.samples = groups, list(samples)
        self.outdated = True  # the policy's weights may differ from those in the engines

    def refresh(self) -> None:
        if self.outdated:
            with self.groups.awake():
                super().refresh()
            self.outdated = False

    @contextmanager
    def random_adapter(self) -> Iterator[None]:
        before = ray.put(self.groups.call_actor("weights"))
        self.groups.call_actor("load_random_adapter")
        try:
            yield
        finally:
            self.groups.call_actor("load_weights", before)

    def payload(self, version: int) -> LoraPayload:
        return self.groups.call_actor("lora_payload", version)

    def deliver(self, payload: LoraPayload) -> None:
        self.groups.call_engines("load_lora", ray.put(payload))

    def trainer_logprobs(self) -> list[float]:
        return self.groups.call_actor("response_logprobs", self.samples, 1.0)

    def engine_logprobs(self) -> list[list[float]]:
        return self.groups.call_engines("probe", self.samples)


class RaySampler:
    """The sampler of an evaluation (`extensions.rollout.sampler.Sampler`), over the vLLM engines and the actor group.

    Args:
        temperature: of sampling.
        refresh: syncs the engines.
    """

    fixed_decode_steps: int | None = None
    queued_rows = QUEUED_ROWS  # of all engines together

    def __init__(self, groups: Groups, temperature: float, refresh: Callable[[], None]) -> None:
        self.groups, self.temperature, self.refresh = groups, temperature, refresh

    @contextmanager
    def session(self) -> Iterator[None]:
        with self.groups.awake():
            self.refresh()
            yield

    def sample(self, requests: Sequence[GenerationRequest], greedy: bool = False) -> list[Response]:
        sent = [RolloutRequest(list(r.prompt), r.budget, request_seed(r), greedy, None) for r in requests]
        found = []
        for request, response in zip(sent, self.groups.respond(sent, [""] * len(sent)), strict=True):
            tokens = response["observation_tokens"][len(request.prompt_ids) :]
            logprobs = torch.tensor(response["rollout_log_probs"][len(request.prompt_ids) :])
            found.append(Response(tokens, logprobs, torch.zeros_like(logprobs), response["text"]))
        return found

    def logprobs(self, samples: Sequence[Sample], together: int = 1, counted: int | None = None) -> Tensor:
        rows = [list(samples[first : first + together]) for first in range(0, len(samples), together)]
        by_rank = self.groups.call(self.groups.actor, "share_logprobs", ray.put(rows), self.temperature)
        return torch.tensor([value for row in joined(by_rank, len(rows)) for value in row])


class GroupCheckpoints(Checkpoints):
    """The checkpoints of a run on Ray: each rank of each group writes its part to a folder that all nodes share."""

    def __init__(self, recipe: Recipe, strategy: Strategy, groups: Groups) -> None:
        self.root, self.strategy = recipe.run_dir.absolute() / "checkpoints", strategy
        self.keep, self.files = recipe.checkpoint.keep, CheckpointFiles(())
        self.ranks = len(groups.actor._actor_handlers)
        self.groups = groups.trained

    def _write_parts(self, folder: Path) -> dict[str, Any]:
        entries: dict[str, Any] = {}
        for name, group in self.groups.items():
            for written, error in Groups.call(group, "write_checkpoint", str(folder), name):
                entries |= written
                if error is not None and self.files.error is None:
                    self.files.error = OSError(error)
        return entries

    def _read_parts(self, folder: Path, portable: bool) -> None:
        for name, group in self.groups.items():
            Groups.call(group, "read_checkpoint", str(folder), name, portable)

    def set_schedule(self, update: int) -> None:
        for group in self.groups.values():
            Groups.call(group, "set_schedule", update)
