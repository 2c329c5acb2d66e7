"""OpenRLHF's Ray actors, extended: vLLM engine, policy, reference, critic. Each runs in a process of its own.

What OpenRLHF's methods make by name (a model, a trainer, a tokenizer) is put in its place while they run
(`openrlhf.replaced`), in that process.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ray
from torch import Tensor
from transformers import GenerationConfig

from extensions.distributed.openrlhf import ValueLoss, without_cuda
from extensions.distributed.strategy import load_trainable_state, trainable_state
from extensions.model.loading import load_tokenizer, model_folder
from extensions.model.proof import Proof
from extensions.prefix.tree import Sample
from extensions.ray_backend.models import PackedActor, PackedCritic, RayStrategy
from extensions.ray_backend.openrlhf import replaced
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

from openrlhf.trainer.ray import launcher, ppo_actor, ppo_critic, vllm_engine  # noqa: E402

ACTOR, CRITIC, LAUNCHER = (module.__name__ for module in (ppo_actor, ppo_critic, launcher))


def plain(actor_class: Any) -> Any:
    """The class behind one that `ray.remote` wrapped, to be extended."""
    return actor_class.__ray_metadata__.modified_class


class RolloutWorker(plain(vllm_engine.RolloutRayActor)):  # type: ignore[misc]
    """OpenRLHF's vLLM engine, which serves the policy's adapter; the agent's rewards are computed here too."""

    async def __init__(self, *args: Any, recipe: Recipe, on_cpu: bool, **settings: Any) -> None:  # type: ignore[misc]
        self.recipe = recipe
        options = vllm_arguments(recipe, on_cpu, recipe.lora.rank)
        del settings["worker_extension_cls"]  # of OpenRLHF's weight sync
        await super().__init__(*args, **(settings | options | {"seed": settings["seed"]}))
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
        # OpenRLHF allows pickles between vLLM's processes for its weight sync (0.11.2); nothing here sends any.
        os.environ.pop("VLLM_ALLOW_INSECURE_SERIALIZATION", None)

    async def generate(
        self, prompt_token_ids: Sequence[int], sampling_params: Any, multi_modal_data: Any = None
    ) -> Any:
        """One request under the newest adapter."""
        self._count = getattr(self, "_count", 0) + 1
        prompt = {"prompt_token_ids": list(prompt_token_ids)}
        name, adapter = f"request-{self._count}", self.lora.request
        outputs = [
            one async for one in self.llm.generate(prompt, sampling_params, request_id=name, lora_request=adapter)
        ]
        return outputs[-1]

    async def load_lora(self, payload: LoraPayload) -> None:
        """Use a new version from now on. No request may be in work."""
        request, old = self.lora.replace(payload)
        if old is not None:
            await self.llm.remove_lora(old)
        if not await self.llm.add_lora(request):
            raise SyncError(f"vLLM refused version {payload.version} of the adapter")
        await self.llm.reset_prefix_cache()

    async def probe(self, samples: Sequence[Sample]) -> list[float]:
        found: list[float] = []
        for sample in samples:  # one at a time, see `VllmEngine.probe`
            output = await self.generate([*sample.prompt, *sample.response], probe_params())
            found += prompt_logprobs(output, len(sample.response))
        return found


class Engines:
    """Stands for OpenRLHF's `RolloutRayActor`, of which `create_vllm_engines` makes engines."""

    def __init__(self, recipe: Recipe, on_cpu: bool) -> None:
        self.own = {"recipe": recipe, "on_cpu": on_cpu}

    def options(self, **settings: Any) -> Any:
        actor = ray.remote(RolloutWorker).options(**settings)
        return SimpleNamespace(remote=lambda **kwargs: actor.remote(**kwargs, **self.own))


class _Trained:
    """What the actors of trained models have in common: weights, checkpoints, files."""

    strategy: RayStrategy
    engine: Any  # DeepSpeed's

    @property
    def policy(self) -> Any:
        raise NotImplementedError

    def weights(self) -> dict[str, Tensor] | None:
        """All trained parameters, whole; from rank 0 alone."""
        state = trainable_state(self.policy)
        return state if self.strategy.is_rank_0() else None

    def load_weights(self, state: dict[str, Tensor]) -> None:
        load_trainable_state(self.policy, state)

    def saved(self, state: dict[str, Tensor]) -> dict[str, bytes]:
        """The files of `state` in the run folder, by their names."""
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            self._save(folder, state)
            return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def _save(self, folder: Path, state: dict[str, Tensor]) -> None:
        raise NotImplementedError

    def write_checkpoint(self, folder: str, name: str) -> tuple[dict[str, Any], str | None]:
        """Write this rank's part below `folder`; its files with size and hash, and what the disk refused."""
        root, files = Path(folder), files_of(self.engine)
        files.begin()
        write_rank(self.engine, root / name, self.strategy.rank)
        entries: dict[str, Any] = {}
        files.attempt(lambda: entries.update({str(p.relative_to(root)): file_entry(p) for p in files.written}))
        return entries, None if files.error is None else str(files.error)

    def read_checkpoint(self, folder: str, name: str) -> None:
        read_rank(self.engine, Path(folder) / name, self.strategy.rank)

    def save_model(self) -> None:
        """OpenRLHF calls it at the end; the run has saved its adapter."""


class _ActorTrainer(ppo_actor.ActorPPOTrainer):
    """Without the process group between trainer and engines, which needs NCCL and has no use here."""

    def training_step(self, experience: Any, kl_ctl: float, step: int, loss_batch_info: Any = None) -> dict[str, Any]:
        """As OpenRLHF's, but its logs: they weigh by tokens what has been divided by the whole batch's (0.11.2)."""
        status = super().training_step(experience, kl_ctl, step, loss_batch_info)
        own = status["num_action_tokens"] * loss_batch_info["dp_size"] / loss_batch_info["batch_num_tokens"]
        for name in ("policy_loss", "entropy_loss"):
            status["metrics"][name] = status["metrics"][name] / own
        return status

    def _init_vllm_sync_group(self, backend: str) -> None:
        pass

    def broadcast_to_vllm(self) -> None:
        raise AssertionError("the adapter is sent by extensions.ray_backend.trainer")


class PolicyActor(_Trained, plain(ppo_actor.PolicyModelActor)):  # type: ignore[misc]
    """The policy: base, adapter, optimizer."""

    def init_model_from_pretrained(self, strategy: RayStrategy, *args: Any, **kwargs: Any) -> None:
        def actor(pretrain: str, **settings: Any) -> PackedActor:
            entropy = strategy.recipe.ppo.entropy_coef > 0
            return PackedActor(strategy.load("actor"), "actor", "differentiable" if entropy else "number")

        parts = {
            f"{ACTOR}:Actor": actor,
            f"{ACTOR}:ActorPPOTrainer": _ActorTrainer,
            f"{ACTOR}:get_tokenizer": _tokenizer,
        }
        with replaced(parts):
            super().init_model_from_pretrained(strategy, *args, **kwargs)
        self.engine = self.actor.model

    @property
    def policy(self) -> Any:
        return self.engine.module

    def _save(self, folder: Path, state: dict[str, Tensor]) -> None:
        self.policy.save_adapter(folder, state)

    def proof(self) -> Proof:
        return self.policy.proof

    def load_random_adapter(self) -> None:
        """A random adapter in the place of the policy's, until `load_weights`."""
        load_trainable_state(self.policy, random_lora_state(trainable_state(self.policy), self.strategy.recipe.seed))

    def lora_payload(self, version: int) -> LoraPayload | None:
        """The adapter as it travels; from rank 0 alone."""
        state = trainable_state(self.policy)
        return LoraPayload.of(self.policy, state, version) if self.strategy.is_rank_0() else None

    def probe(self, samples: Sequence[Sample]) -> list[float]:
        self.actor.eval()
        found = response_logprobs(self.policy, samples, self.strategy.recipe.evaluation.micro_batch_size)
        self.actor.train()
        return found

    def logprobs(self, samples: Sequence[Sample]) -> list[float]:
        """Of whole responses, at the temperature of sampling."""
        self.actor.eval()
        temperature, size = self.policy.temperature, self.strategy.recipe.evaluation.micro_batch_size
        tokens = iter(response_logprobs(self.policy, samples, size, temperature))
        found = [sum(next(tokens) for _ in sample.response) for sample in samples]
        self.actor.train()
        return found


class ReferenceActor(plain(launcher.ReferenceModelActor)):  # type: ignore[misc]
    """The policy that training started from, or the base."""

    def init_model_from_pretrained(self, strategy: RayStrategy, *args: Any, **kwargs: Any) -> None:
        def actor(pretrain: str, **settings: Any) -> PackedActor:
            return PackedActor(strategy.load("reference").requires_grad_(False), "reference", "none")

        with replaced({f"{LAUNCHER}:Actor": actor}):
            super().init_model_from_pretrained(strategy, *args, **kwargs)


class CriticActor(_Trained, plain(ppo_critic.CriticModelActor)):  # type: ignore[misc]
    """The critic: base, an adapter of its own, value head."""

    def init_model_from_pretrained(self, strategy: RayStrategy, *args: Any, **kwargs: Any) -> None:
        def critic(*settings: Any, **more: Any) -> PackedCritic:
            return PackedCritic(strategy.load("critic"))

        with replaced({f"{CRITIC}:get_llm_for_sequence_regression": critic, f"{CRITIC}:get_tokenizer": _tokenizer}):
            super().init_model_from_pretrained(strategy, *args, **kwargs)
        ppo = strategy.recipe.ppo
        loss = ValueLoss(clip_eps=ppo.value_clip)
        self.trainer.critic_loss_fn = lambda *args, **kwargs: ppo.value_coef * loss(*args, **kwargs)
        self.engine = self.critic

    @property
    def policy(self) -> Any:
        return self.engine.module.policy

    def _save(self, folder: Path, state: dict[str, Tensor]) -> None:
        self.policy.save_critic(folder, state)


def _tokenizer(pretrain: str, model: Any, padding_side: str, strategy: RayStrategy, use_fast: bool = True) -> Any:
    return load_tokenizer(strategy.recipe.model)
