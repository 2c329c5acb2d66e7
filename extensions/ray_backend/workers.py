"""OpenRLHF's Ray actors, extended: vLLM engine, policy, reference, critic. Each runs in its own process.

Each replaces `init_model_from_pretrained` (0.11.2), which would load OpenRLHF's own models and optimizers.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ray
from torch import Tensor
from transformers import GenerationConfig

from extensions.distributed.openrlhf import ValueLoss, without_cuda
from extensions.distributed.optim import set_schedule
from extensions.distributed.shares import share
from extensions.distributed.strategy import load_trainable_state, trainable_state
from extensions.model.loading import load_tokenizer, model_folder
from extensions.model.policy import Policy
from extensions.model.proof import Proof
from extensions.prefix.tree import Sample
from extensions.ray_backend.models import PackedActor, PackedCritic, RayStrategy
from extensions.recipe import Recipe
from extensions.rollout.lora_sync import LoraPayload, SyncError, random_lora_state, response_logprobs
from extensions.rollout.rewards import load_reward
from extensions.rollout.sampler import eos_ids
from extensions.rollout.vllm_engine import (
    LoraSlot,
    probe_params,
    prompt_logprobs,
    set_vllm_environment,
    vllm_arguments,
)
from extensions.runs.checkpoint import file_entry, files_of, read_rank, write_rank

without_cuda()
set_vllm_environment()

# After `extensions`, which makes it importable without flash-attn and CUDA.
from openrlhf.trainer.ray.launcher import ReferenceModelActor  # noqa: E402
from openrlhf.trainer.ray.ppo_actor import ActorPPOTrainer, PolicyModelActor  # noqa: E402
from openrlhf.trainer.ray.ppo_critic import CriticModelActor, CriticPPOTrainer  # noqa: E402
from openrlhf.trainer.ray.vllm_engine import RolloutRayActor  # noqa: E402


def undecorated(actor_class: Any) -> Any:
    """The class that `ray.remote` wrapped, for subclassing."""
    return actor_class.__ray_metadata__.modified_class


class RolloutActor(undecorated(RolloutRayActor)):  # type: ignore[misc]
    """OpenRLHF's vLLM engine, which serves the policy's adapter and computes the agent's rewards."""

    async def __init__(self, *args: Any, recipe: Recipe, on_cpu: bool, **settings: Any) -> None:  # type: ignore[misc]
        self.recipe, self.num_requests = recipe, 0
        arguments = vllm_arguments(recipe, on_cpu, recipe.lora.rank)
        del settings["worker_extension_cls"]  # of OpenRLHF's weight sync
        await super().__init__(*args, **(settings | arguments | {"seed": settings["seed"]}))
        self.tokenizer = load_tokenizer(recipe.model)
        try:
            config = GenerationConfig.from_pretrained(str(model_folder(recipe.model)))
        except OSError:
            config = None
        self.eos = sorted(eos_ids(config, self.tokenizer))
        self.reward = load_reward(recipe.reward)
        self.lora = LoraSlot()

    def _configure_vllm_env(self, *args: Any) -> None:
        super()._configure_vllm_env(*args)
        # OpenRLHF allows pickles between vLLM's processes for its weight sync (0.11.2), which is not used here.
        os.environ.pop("VLLM_ALLOW_INSECURE_SERIALIZATION", None)

    async def generate(
        self, prompt_token_ids: Sequence[int], sampling_params: Any, multi_modal_data: Any = None
    ) -> Any:
        """One request under the newest adapter."""
        self.num_requests += 1
        prompt, name = {"prompt_token_ids": list(prompt_token_ids)}, f"request-{self.num_requests}"
        stream = self.llm.generate(prompt, sampling_params, request_id=name, lora_request=self.lora.request)
        return [output async for output in stream][-1]

    async def load_lora(self, payload: LoraPayload) -> None:
        """Serve a new version of the adapter from now on. No request may be in flight."""
        request, old = self.lora.replace(payload)
        if old is not None:
            await self.llm.remove_lora(old)
        if not await self.llm.add_lora(request):
            raise SyncError(f"vLLM refused version {payload.version} of the adapter")
        await self.llm.reset_prefix_cache()

    async def probe(self, samples: Sequence[Sample]) -> list[float]:
        """Logprobs of all response tokens, in order."""
        logprobs: list[float] = []
        for sample in samples:  # one request at a time, for the reason in `VllmEngine.probe`
            output = await self.generate([*sample.prompt, *sample.response], probe_params())
            logprobs += prompt_logprobs(output, len(sample.response))
        return logprobs


class RolloutActorFactory:
    """Takes the place of OpenRLHF's `RolloutRayActor` where `create_vllm_engines` makes its actors."""

    def __init__(self, recipe: Recipe, on_cpu: bool) -> None:
        self.arguments = {"recipe": recipe, "on_cpu": on_cpu}

    def options(self, **settings: Any) -> Any:
        actor = ray.remote(RolloutActor).options(**settings)
        return SimpleNamespace(remote=lambda **arguments: actor.remote(**arguments, **self.arguments))


class TrainedActorMixin:
    """Weights, checkpoints and adapter files of a group's rank that trains."""

    strategy: RayStrategy
    engine: Any  # DeepSpeed's
    policy: Policy

    def weights(self) -> dict[str, Tensor] | None:
        """All trained parameters, unsharded; None on ranks other than 0."""
        state = trainable_state(self.policy)
        return state if self.strategy.is_rank_0() else None

    def load_weights(self, state: dict[str, Tensor]) -> None:
        load_trainable_state(self.policy, state)

    def adapter_files(self, state: dict[str, Tensor]) -> dict[str, bytes]:
        """Name and content of the files that `state` has in the run folder."""
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            self._save(folder, state)
            return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def _save(self, folder: Path, state: dict[str, Tensor]) -> None:
        raise NotImplementedError

    def write_checkpoint(self, folder: str, name: str) -> tuple[dict[str, Any], str | None]:
        """Write this rank's part as `folder`/`name`. Returns its files with size and hash, and any disk error."""
        root, files = Path(folder), files_of(self.engine)
        files.begin()
        write_rank(self.engine, root / name, self.strategy.rank)
        entries: dict[str, Any] = {}
        files.attempt(lambda: entries.update({str(p.relative_to(root)): file_entry(p) for p in files.written}))
        return entries, None if files.error is None else str(files.error)

    def read_checkpoint(self, folder: str, name: str, portable: bool) -> None:
        read_rank(self.engine, Path(folder) / name, self.strategy.rank, portable)

    def set_schedule(self, update: int) -> None:
        set_schedule(self.engine.optimizer, self.engine.lr_scheduler, update)


class _ActorTrainer(ActorPPOTrainer):
    def training_step(self, experience: Any, kl_ctl: float, step: int, loss_batch_info: Any = None) -> dict[str, Any]:
        """OpenRLHF's step with its logged losses corrected: they are shares of the batch's loss, and OpenRLHF (0.11.2)
        weights them by tokens once more."""
        status = super().training_step(experience, kl_ctl, step, loss_batch_info)
        share = status["num_action_tokens"] * loss_batch_info["dp_size"] / loss_batch_info["batch_num_tokens"]
        for name in ("policy_loss", "entropy_loss"):
            status["metrics"][name] = status["metrics"][name] / share
        return status


class PolicyActor(TrainedActorMixin, undecorated(PolicyModelActor)):  # type: ignore[misc]
    """A rank of the actor group: base, adapter, optimizer."""

    def init_model_from_pretrained(self, strategy: RayStrategy, num_updates: int) -> None:
        self._setup_distributed(strategy)
        self.policy = strategy.load("actor")
        learned = strategy.recipe.ppo.entropy_coef > 0
        self.actor = PackedActor(self.policy, "actor", "differentiable" if learned else "number")
        self.engine = self.actor.model = strategy.wrap_trained(self.policy, self.policy, num_updates)
        optimizer, scheduler = self.engine.optimizer, self.engine.lr_scheduler
        size = strategy.micro_train_batch_size
        # Without vllm_engines it does not set up OpenRLHF's weight sync.
        self.trainer = _ActorTrainer(strategy, self.actor, None, optimizer, scheduler, micro_train_batch_size=size)

    def _save(self, folder: Path, state: dict[str, Tensor]) -> None:
        self.policy.save_adapter(folder, state)

    def proof(self) -> Proof:
        return self.policy.proof

    def load_random_adapter(self) -> None:
        """Replace the policy's adapter by a random one, until `load_weights`."""
        load_trainable_state(self.policy, random_lora_state(trainable_state(self.policy), self.strategy.recipe.seed))

    def lora_payload(self, version: int) -> LoraPayload | None:
        """The adapter; None on ranks other than 0."""
        state = trainable_state(self.policy)
        return LoraPayload.of(self.policy, state, version) if self.strategy.is_rank_0() else None

    def response_logprobs(self, samples: Sequence[Sample], temperature: float) -> list[float]:
        """Logprobs of all response tokens, in order."""
        self.actor.eval()
        size = self.strategy.recipe.evaluation.micro_batch_size
        logprobs = response_logprobs(self.policy, samples, size, temperature)
        self.actor.train()
        return logprobs

    def share_logprobs(self, rows: Sequence[Sequence[Sample]], temperature: float) -> list[list[float]]:
        """Logprobs of the whole responses of each row in this rank's `share`."""
        own = share(rows, self.strategy.rank, self.strategy.world_size)
        tokens = iter(self.response_logprobs([sample for row in own for sample in row], temperature))
        return [[sum(islice(tokens, len(sample.response))) for sample in row] for row in own]


class ReferenceActor(undecorated(ReferenceModelActor)):  # type: ignore[misc]
    """A rank of the reference group: the initial policy, or the base."""

    def init_model_from_pretrained(self, strategy: RayStrategy) -> None:
        self._setup_distributed(strategy)
        policy = strategy.load("reference").requires_grad_(False)
        self.model = strategy.prepare(PackedActor(policy, "reference", "none"))
        self.model.eval()


class CriticActor(TrainedActorMixin, undecorated(CriticModelActor)):  # type: ignore[misc]
    """A rank of the critic group: base, its own adapter, value head."""

    def init_model_from_pretrained(self, strategy: RayStrategy, num_updates: int) -> None:
        self._setup_distributed(strategy)
        self.policy = strategy.load("critic")
        self.critic = self.engine = strategy.wrap_trained(PackedCritic(self.policy), self.policy, num_updates)
        optimizer, scheduler = self.engine.optimizer, self.engine.lr_scheduler
        size = strategy.micro_train_batch_size
        self.trainer = CriticPPOTrainer(strategy, self.critic, optimizer, scheduler, micro_train_batch_size=size)
        ppo = strategy.recipe.ppo
        loss = ValueLoss(clip_eps=ppo.value_clip)
        self.trainer.critic_loss_fn = lambda *args, **kwargs: ppo.value_coef * loss(*args, **kwargs)

    def _save(self, folder: Path, state: dict[str, Tensor]) -> None:
        self.policy.save_critic(folder, state)
