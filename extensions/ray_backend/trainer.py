"""PPO on OpenRLHF's groups: its training step, behind the interface of `extensions.training.trainer.Trainer`.

`RayTrainer` is a `BasePPOTrainer`, as OpenRLHF's own `PPOTrainer`, and runs in the driver's process. Everything around
the iterations (validation, early stopping, checkpoints, records, adapter, model card) is
`extensions.runs.training_run.TrainingRun`, as on the DeepSpeed backend.

An iteration: the agent's responses from all vLLM engines; logprobs, reference logprobs and values from the groups;
advantages; updates of actor and critic; LoRA sync and probe.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
import torch
from torch import Tensor

from extensions.common.files import write_bytes
from extensions.data import BatchOrder, Example
from extensions.distributed import watchdog
from extensions.distributed.nonfinite import NonFiniteError, NonFiniteTensor
from extensions.distributed.openrlhf import compute_reward
from extensions.model.loading import load_tokenizer
from extensions.prefix.tree import Sample
from extensions.prompts import PromptEncoder, parse_answer
from extensions.ray_backend.groups import GroupCheckpoints, Groups, RayLoraSync, RolloutRequest
from extensions.ray_backend.models import RayStrategy
from extensions.recipe import Recipe
from extensions.rollout.lora_sync import SyncProbe
from extensions.rollout.rewards import Reward
from extensions.rollout.vllm_sampler import request_seed
from extensions.runs.checkpoint import Checkpoints
from extensions.runs.training_run import TrainingRun
from extensions.training.advantages import gae, td_targets, whiten
from extensions.training.experience import TokenIndex
from extensions.training.ppo import generation_request
from extensions.training.records import batch_metrics, debug_record, rollout_record, summary_line
from extensions.training.trainer import Clock

# After `extensions`, which makes it importable without flash-attn.
from openrlhf.trainer.ppo_trainer import BasePPOTrainer  # isort: skip
from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker  # isort: skip

# Name of a tensor in a debug snapshot and in errors -> field of OpenRLHF's Experience.
FIELDS = {
    "logprobs": "action_log_probs",
    "values": "values",
    "kl": "kl",
    "advantages": "advantages",
    "returns": "returns",
}


class ExperienceMaker(RemoteExperienceMaker):
    """OpenRLHF's, with the paper's whitening and value targets, and checks before the update."""

    recipe: Recipe
    probe: SyncProbe
    weights: Tensor  # (B,) of the current batch's samples
    experiences: list[Any]  # of the current iteration
    mismatch: float  # mean difference of the sampled tokens' logprobs between vLLM and the trainer

    def make_experience_batch(self, rollout_samples: list[Any]) -> list[Any]:
        watchdog.heartbeat()
        self.experiences = super().make_experience_batch(rollout_samples)
        check_finite(self.experiences)
        differences = [((e.action_log_probs - e.rollout_log_probs) * e.action_mask).abs() for e in self.experiences]
        num_tokens = sum(e.action_mask.sum() for e in self.experiences)
        self.mismatch = float(sum(difference.sum() for difference in differences) / num_tokens)
        self.probe.check_samples(self.mismatch)
        return self.experiences

    def compute_advantages_and_returns(self, experiences: list[Any]) -> list[Any]:
        """Replaces OpenRLHF's, which always whitens, without a minimum deviation, and has no TD target (0.11.2)."""
        ppo = self.recipe.ppo
        weights = self.weights.split([len(e.rewards) for e in experiences])
        for e, weight in zip(experiences, weights, strict=True):
            e.rewards = e.rewards.float()
            mask = e.action_mask
            rewards = compute_reward(e.rewards * weight, self.kl_ctl.value, e.kl, mask)
            e.advantages, e.returns = gae(rewards, e.values, mask, ppo.gamma, ppo.lam)
            if ppo.value_target == "td":
                e.returns = td_targets(rewards, e.values, mask, ppo.gamma)
            e.info["kl_of_response"] = (e.kl * mask).sum(-1)
        if ppo.whiten:
            flat = torch.cat([e.advantages.flatten() for e in experiences])
            masks = torch.cat([e.action_mask.flatten() for e in experiences])
            parts = whiten(flat, masks, min_std=ppo.whiten_min_std).split([e.advantages.numel() for e in experiences])
            for e, part in zip(experiences, parts, strict=True):
                e.advantages = part.view_as(e.advantages)
        return experiences


def check_finite(experiences: Sequence[Any]) -> None:
    """Raises NonFiniteError if an experience holds NaN or Inf."""
    problems, first = [], 0
    for e in experiences:
        for name, field in {"scores": "rewards", **FIELDS}.items():
            tensor = getattr(e, field)
            bad = [first + row for row, values in enumerate(tensor) if not bool(torch.isfinite(values).all())]
            if bad:
                kind = "NaN" if bool(torch.isnan(tensor).any()) else "infinity"
                problems.append(NonFiniteTensor(f"{name} of the rollout", bad, kind))
        first += len(e.rewards)
    if problems:
        raise NonFiniteError(problems)


class RayTrainer(BasePPOTrainer):
    """OpenRLHF's training step as a `Trainer`.

    Args:
        probed: samples of the probe.
    """

    policy: Any = None  # in the processes of the groups
    engine: Any = None

    def __init__(
        self,
        recipe: Recipe,
        strategy: RayStrategy,
        groups: Groups,
        encoder: PromptEncoder,
        reward: Reward,
        order: BatchOrder,
        probe: SyncProbe,
        probed: Sequence[Sample],
    ) -> None:
        tokenizer = load_tokenizer(recipe.model)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # padding is masked: any token will do
        actor, critic, reference = groups.actor, groups.critic, groups.reference
        super().__init__(strategy, actor, critic, None, reference, groups.engines, tokenizer)
        for module in (BasePPOTrainer.__module__, RemoteExperienceMaker.__module__):
            logging.getLogger(module).setLevel(logging.WARNING)  # they log each step, which the run does too
        self.recipe, self.groups, self.encoder, self.reward, self.order = recipe, groups, encoder, reward, order
        self.experience_maker = ExperienceMaker(actor, critic, None, reference, self.kl_ctl, strategy, tokenizer)
        self.experience_maker.recipe, self.experience_maker.probe = recipe, probe
        self.sync = RayLoraSync(groups, probe, probed)
        # Of the current iteration:
        self.batch: list[Example] = []
        self.prompts: list[str] = []
        self.samples: list[Sample] = []
        self.responses: list[dict[str, Any]] = []

    def fit(self, global_step: int = 0) -> None:
        raise NotImplementedError("extensions.runs.training_run.TrainingRun calls iterate")

    # ------------------------------------------------------------------------------------------------ an iteration

    def iterate(self, step: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """One PPO iteration: its metrics, and a record of each sample."""
        ppo, clock = self.recipe.ppo, Clock(torch.device("cpu"))
        self.experience_maker.experiences, self.batch = [], self.order.batch(step)
        self.experience_maker.weights = torch.tensor([self.order.weight(example) for example in self.batch])
        with clock("rollout"), self.groups.awake():
            self.sync.refresh()
            rollout = self.rollout(step)
        kl_coef = self.kl_ctl.value
        status, _ = self.train_step(rollout, step)
        records = self.records()
        mean_kl = sum(r["kl"] for r in records) / len(records)
        if ppo.kl.init > 0:
            self.kl_ctl.update(mean_kl, len(records))
        phases = {"reference": "make_experience", "update": "ppo_train", "sync": "broadcast"}
        clock.seconds |= {phase: status[f"timing/{name}"] for phase, name in phases.items()}
        metrics = {
            "step": step + 1,
            "samples": (step + 1) * self.order.batch_size,
            **batch_metrics(records, {example.task.name: example.task for example in self.order.examples}),
            "kl": mean_kl if ppo.kl.init > 0 else None,
            "kl_coef": kl_coef,
            "policy_loss": status["policy_loss"],
            "value_loss": status["critic_loss"] / ppo.value_coef if ppo.value_coef else 0.0,
            "entropy": status["entropy_loss"],
            "clip_fraction": status["ppo_clip_ratio"],
            "sampling_mismatch": self.experience_maker.mismatch,
            "grad_norm": status["actor_grad_norm"],
            "critic_grad_norm": status["critic_grad_norm"],
            "lr": status["actor_lr"],
            "response_tokens": sum(r["tokens"] for r in records) / len(records),
            "stale_samples": self.stale,
            **self.sync.metrics,
            "seconds": clock.seconds,
            "samples_per_s": len(records) / sum(clock.seconds.values()),
        }
        return metrics, records

    def summary_line(self, metrics: dict[str, Any]) -> str:
        return summary_line(metrics)

    def rollout(self, step: int) -> list[Any]:
        """OpenRLHF's experiences of one sample each, in batch order."""
        encoded = [self.encoder.encode(example.task, example.fields) for example in self.batch]
        requests = []
        for row, (example, (ids, _)) in enumerate(zip(self.batch, encoded, strict=True)):
            request = generation_request(ids, self.recipe.seed, step, row, self.recipe.rollout.response_budget)
            label = self.reward.label(example)
            requests.append(RolloutRequest(ids, request.budget, request_seed(request), False, label))
        self.prompts = [text for _, text in encoded]
        self.responses = self.groups.respond(requests, self.prompts)
        tokens = [response["observation_tokens"] for response in self.responses]
        self.samples = [Sample(ids, all_ids[len(ids) :]) for (ids, _), all_ids in zip(encoded, tokens, strict=True)]
        self.stale = sum(r["extra_logs"]["adapter_version"] != self.sync.version for r in self.responses)
        process, longest = self.groups.generator._process_response_into_experience, max(map(len, tokens))
        return [process(response, max_len=longest) for response in self.responses]

    def ppo_train(self, global_steps: int) -> dict[str, Any]:
        watchdog.heartbeat()
        status = super().ppo_train(global_steps)
        # With it OpenRLHF would adapt the KL coefficient to a mean over tokens (0.11.2); `iterate` does, per response.
        status.pop("kl", None)
        return status

    def broadcast_to_vllm(self) -> None:
        """OpenRLHF's step calls it after the update."""
        self.sync.outdated = True
        self.sync.refresh()

    def records(self) -> list[dict[str, Any]]:
        kl = torch.cat([e.info["kl_of_response"] for e in self.experience_maker.experiences]).tolist()
        found = []
        for slot, (example, response) in enumerate(zip(self.batch, self.responses, strict=True)):
            reward, text, num_tokens = response["reward"], response["text"], len(self.samples[slot].response)
            answer = parse_answer(text, example.task)
            found.append(rollout_record(example, self.prompts[slot], text, answer, reward, kl[slot], num_tokens))
        return found

    # ----------------------------------------------------------------------------------- state, weights, diagnostics

    def state(self) -> dict[str, Any]:
        return {"kl_coef": self.kl_ctl.value}

    def load_state(self, state: dict[str, Any]) -> None:
        self.kl_ctl.value = state["kl_coef"]
        self.sync.outdated = True  # the groups have read a checkpoint

    def weights(self) -> dict[str, Tensor]:
        """Of both groups, named as in a policy with ppo.critic: adapter."""
        return {**self.groups.call_actor("weights"), **self.groups.call(self.groups.critic, "weights")[0]}

    def load_weights(self, state: dict[str, Tensor]) -> None:
        self.sync.outdated = True
        for group, part in self._by_group(state):
            self.groups.call(group, "load_weights", ray.put(part))

    def save(self, adapter: Path, critic: Path, state: dict[str, Tensor]) -> None:
        for folder, (group, part) in zip((adapter, critic), self._by_group(state), strict=True):
            for name, content in self.groups.call(group, "adapter_files", ray.put(part))[0].items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                write_bytes(folder / name, content)

    def _by_group(self, state: dict[str, Tensor]) -> list[tuple[Any, dict[str, Tensor]]]:
        critic = {name: t for name, t in state.items() if ".critic." in name or name.startswith("value_head.")}
        actor = {name: t for name, t in state.items() if name not in critic}
        return [(self.groups.actor, actor), (self.groups.critic, critic)]

    def debug_snapshot(self) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
        experiences = self.experience_maker.experiences
        if not experiences:
            return [], {}
        texts = [response["text"] for response in self.responses]
        rows = zip(self.batch, self.prompts, texts, self.samples, strict=True)
        return [debug_record(*row) for row in rows], padded(experiences, [len(s.response) for s in self.samples])

    def restore_snapshot(self, records: Sequence[dict[str, Any]], tensors: dict[str, Tensor]) -> None:
        raise NotImplementedError("nlu replay recomputes a failed batch on the DeepSpeed backend")

    def per_sample_losses(self, slot: int) -> dict[Any, Callable[[], Tensor]]:
        return {}


def padded(experiences: Sequence[Any], lengths: list[int]) -> dict[str, Tensor]:
    """Tensors of each response, (B, T), as `extensions.training.experience.Experience.padded` returns them."""
    index = TokenIndex(lengths)
    tensors = {"scores": torch.cat([e.rewards for e in experiences])}
    for name, field in FIELDS.items():
        tensors[name] = index.pad(torch.cat([getattr(e, field)[e.action_mask.bool()] for e in experiences]))
    return tensors | {"mask": index.mask}


class RayTrainingRun(TrainingRun):
    """A training run whose checkpoints hold the parts of all groups' ranks."""

    trainer: RayTrainer

    def make_checkpoints(self) -> Checkpoints:
        return GroupCheckpoints(self.recipe, self.strategy, self.trainer.groups)
