"""PPO on OpenRLHF's groups: its training step, behind the interface of `extensions.training.trainer.Trainer`.

`RayTrainer` is a `BasePPOTrainer`, as OpenRLHF's own `PPOTrainer`, and runs in the driver's process. Everything around
the iterations (validation, early stopping, checkpoints, records, adapter, model card) is
`extensions.runs.training_run.TrainingRun`, as on the DeepSpeed backend.

An iteration: the agent's responses from all vLLM engines; logprobs, reference logprobs and values from the groups;
advantages; updates of actor and critic; LoRA sync and probe.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
import torch
from torch import Tensor

from extensions.common.files import write_bytes
from extensions.data import BatchOrder
from extensions.distributed import watchdog
from extensions.distributed.nonfinite import NonFiniteCheck
from extensions.distributed.openrlhf import compute_approx_kl
from extensions.model.loading import load_tokenizer
from extensions.prefix.tree import Sample
from extensions.prompts import PromptEncoder, parse_answer
from extensions.ray_backend.groups import GroupCheckpoints, Groups, RayLoraSync, RolloutRequest
from extensions.ray_backend.models import RayStrategy, scatter
from extensions.recipe import Ppo, Recipe
from extensions.rollout.lora_sync import SyncProbe
from extensions.rollout.rewards import Reward
from extensions.rollout.sampler import training_request
from extensions.rollout.vllm_sampler import request_seed
from extensions.runs.checkpoint import Checkpoints
from extensions.runs.training_run import TrainingRun
from extensions.training.experience import Experience, TokenIndex
from extensions.training.records import batch_metrics, debug_record, rollout_record, summary_lines
from extensions.training.trainer import Clock

# After `extensions`, which makes it importable without flash-attn.
from openrlhf.trainer.ppo_trainer import BasePPOTrainer  # isort: skip
from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker  # isort: skip


class ExperienceMaker(RemoteExperienceMaker):
    """OpenRLHF's experience maker with the advantages of the DeepSpeed backend and checks before the update."""

    ppo: Ppo
    probe: SyncProbe
    experience: Experience  # of the current iteration; complete after `compute_advantages_and_returns`
    mismatch: float  # mean difference of the sampled tokens' logprobs between vLLM and the trainer

    def make_experience_batch(self, rollout_samples: list[Any]) -> list[Any]:
        watchdog.heartbeat()
        return super().make_experience_batch(rollout_samples)

    def compute_advantages_and_returns(self, experiences: list[Any]) -> list[Any]:
        """Replaces OpenRLHF's, which always whitens, without a minimum deviation, and has no TD target (0.11.2).

        Raises:
            NonFiniteError: a tensor of the rollout holds NaN or Inf.
            SyncError: the logprobs of the sampled tokens differ too much between vLLM and the trainer.
        """
        whole, masks = self.experience, [e.action_mask.bool() for e in experiences]

        def flat(field: str) -> Tensor:  # (N,) over all experiences
            return torch.cat([getattr(e, field)[mask] for e, mask in zip(experiences, masks, strict=True)])

        whole.scores = torch.cat([e.rewards for e in experiences]).float()
        whole.logprobs, whole.kl = flat("action_log_probs"), flat("kl")
        if self.ppo.value_model != "none":
            whole.values = flat("values")
        if self.ppo.kl.use_loss:  # OpenRLHF then leaves it at 0
            whole.reference = flat("base_action_log_probs")
            whole.kl = compute_approx_kl(whole.logprobs, whole.reference)
        whole.estimate_advantages(self.ppo, self.kl_ctl.value)
        nonfinite = NonFiniteCheck({})
        whole.watch(nonfinite)
        nonfinite.check(lambda total: total)
        self.mismatch = float((whole.logprobs - flat("rollout_log_probs")).abs().mean())
        self.probe.check_samples(self.mismatch)
        sizes = [int(mask.sum()) for mask in masks]
        split = (whole.advantages.split(sizes), whole.returns.split(sizes))
        for e, mask, advantages, returns in zip(experiences, masks, *split, strict=True):
            e.advantages, e.returns = scatter(advantages, mask), scatter(returns, mask)
        return experiences


class RayTrainer(BasePPOTrainer):
    """OpenRLHF's training step as a `Trainer`.

    Args:
        probed: samples of the probe.
        budgets: task -> low and high end of the response budget, in tokens.
    """

    policy: Any = None  # the policies are in the processes of the groups
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
        budgets: Mapping[str, Sequence[int]],
    ) -> None:
        tokenizer = load_tokenizer(recipe.model)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # padding is masked: any token will do
        actor, critic, reference = groups.actor, groups.critic, groups.reference
        super().__init__(strategy, actor, critic, None, reference, groups.engines, tokenizer)
        for module in (BasePPOTrainer.__module__, RemoteExperienceMaker.__module__):
            logging.getLogger(module).setLevel(logging.WARNING)  # they log each step, which the run does too
        self.recipe, self.groups, self.encoder, self.reward, self.order = recipe, groups, encoder, reward, order
        self.experience_maker = ExperienceMaker(actor, critic, None, reference, self.kl_ctl, strategy, tokenizer)
        self.experience_maker.ppo, self.experience_maker.probe = recipe.ppo, probe
        self.budgets = budgets
        self.sync = RayLoraSync(groups, probe, probed)
        self.experience: Experience | None = None  # of the current iteration

    # ------------------------------------------------------------------------------------------------ an iteration

    def iterate(self, step: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """One PPO iteration: its metrics, and a record of each sample."""
        ppo, clock, self.experience = self.recipe.ppo, Clock(torch.device("cpu")), None
        with clock("rollout"), self.groups.awake():
            self.sync.refresh()
            experience, rollout = self.rollout(step)
        self.experience = self.experience_maker.experience = experience
        kl_coef = self.kl_ctl.value
        status, _ = self.train_step(rollout, step)
        kl = experience.index.sums(experience.kl.double()).tolist()
        mean_kl = sum(kl) / len(kl)
        if ppo.kl.init > 0:
            self.kl_ctl.update(mean_kl, len(kl))
        scores, lengths = experience.scores.tolist(), experience.index.lengths
        texts = (experience.prompts, experience.texts, experience.answers)
        fields = zip(experience.examples, *texts, scores, kl, lengths, strict=True)
        records = [rollout_record(*sample) for sample in fields]
        phases = {"reference": "make_experience", "update": "ppo_train", "sync": "broadcast"}
        clock.seconds |= {phase: status[f"timing/{name}"] for phase, name in phases.items()}
        metrics = {
            "step": step + 1,
            "samples": (step + 1) * self.order.batch_size,
            **batch_metrics(records, {example.task.name: example.task for example in self.order.examples}),
            "equal_groups": float(experience.equal_groups.float().mean()) if ppo.samples_per_prompt > 1 else None,
            "kl": mean_kl if ppo.kl.init > 0 else None,
            "kl_coef": kl_coef,
            "policy_loss": status["policy_loss"],
            **self._of_critic(status),
            "entropy": status["entropy_loss"],
            "clip_fraction": status["ppo_clip_ratio"],
            "sampling_mismatch": self.experience_maker.mismatch,
            "grad_norm": status["actor_grad_norm"],
            "lr": status["actor_lr"],
            "response_tokens": sum(lengths) / len(lengths),
            "stale_samples": self.num_stale,
            **self.sync.metrics,
            "seconds": clock.seconds,
            "samples_per_s": experience.num_prompts / sum(clock.seconds.values()),
        }
        return metrics, records

    def _of_critic(self, status: Mapping[str, Any]) -> dict[str, float]:
        """Its loss without the coefficient, and the norm of its gradient; nothing without a critic."""
        ppo = self.recipe.ppo
        if ppo.value_model == "none":
            return {}
        loss = status["critic_loss"] / ppo.value_coef if ppo.value_coef else 0.0
        return {"value_loss": loss, "critic_grad_norm": status["critic_grad_norm"]}

    def summary_lines(self, metrics: dict[str, Any]) -> tuple[str, str]:
        return summary_lines(metrics)

    def rollout(self, step: int) -> tuple[Experience, list[Any]]:
        """The agent's responses to a batch: as an experience, and as OpenRLHF's experiences of one sample each."""
        k, requests = self.recipe.ppo.samples_per_prompt, []
        batch = [example for example in self.order.batch(step) for _ in range(k)]
        encoded = [self.encoder.encode(example.task, example.fields) for example in batch]
        for row, (example, (ids, _)) in enumerate(zip(batch, encoded, strict=True)):
            request = training_request(ids, self.recipe.seed, step, row, self.budgets[example.task.name])
            label = self.reward.label(example)
            requests.append(RolloutRequest(ids, request.budget, request_seed(request), False, label))
        prompts = [text for _, text in encoded]
        responses = self.groups.respond(requests, prompts)
        self.num_stale = sum(r["extra_logs"]["adapter_version"] != self.sync.version for r in responses)
        samples = [
            Sample(ids, response["observation_tokens"][len(ids) :])
            for (ids, _), response in zip(encoded, responses, strict=True)
        ]
        texts = [response["text"] for response in responses]
        answers = [parse_answer(text, example.task) for text, example in zip(texts, batch, strict=True)]
        index = TokenIndex([len(sample.response) for sample in samples])
        unknown = torch.zeros(len(index.sample))  # until the groups have computed them
        weights = torch.tensor([self.order.weight(example) for example in batch])
        texts_of = (batch, prompts, samples, texts, answers, index)
        experience = Experience(*texts_of, unknown, unknown, unknown, weights, samples_per_prompt=k)
        longest = max(len(response["observation_tokens"]) for response in responses)
        process = self.groups.generator._process_response_into_experience
        return experience, [process(response, max_len=longest) for response in responses]

    def ppo_train(self, global_steps: int) -> dict[str, Any]:
        watchdog.heartbeat()
        status = super().ppo_train(global_steps)
        # OpenRLHF (0.11.2) would adapt the KL coefficient to this mean over tokens; `iterate` adapts it per response.
        status.pop("kl", None)
        return status

    def broadcast_to_vllm(self) -> None:
        """Called by OpenRLHF's step after the update."""
        self.sync.outdated = True
        self.sync.refresh()

    # ----------------------------------------------------------------------------------- state, weights, diagnostics

    def state(self) -> dict[str, Any]:
        return {"kl_coef": self.kl_ctl.value, "kl_init": self.recipe.ppo.kl.init}

    def load_state(self, state: dict[str, Any]) -> None:
        if state["kl_init"] == self.recipe.ppo.kl.init:  # a fork may start it anew
            self.kl_ctl.value = state["kl_coef"]
        self.sync.outdated = True  # the groups have read a checkpoint

    def weights(self) -> dict[str, Tensor]:
        """The weights of the trained groups, named as in a policy with ppo.critic: adapter."""
        return {
            n: t for group in self.groups.trained.values() for n, t in self.groups.call(group, "weights")[0].items()
        }

    def load_weights(self, state: dict[str, Tensor]) -> None:
        self.sync.outdated = True
        for group, part in self._by_group(state):
            self.groups.call(group, "load_weights", ray.put(part))

    def save(self, adapter: Path, critic: Path, state: dict[str, Tensor]) -> None:
        for folder, (group, part) in zip((adapter, critic), self._by_group(state), strict=False):
            for name, content in self.groups.call(group, "adapter_files", ray.put(part))[0].items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                write_bytes(folder / name, content)

    def _by_group(self, state: dict[str, Tensor]) -> list[tuple[Any, dict[str, Tensor]]]:
        critic = {name: t for name, t in state.items() if ".critic." in name or name.startswith("value_head.")}
        actor = {name: t for name, t in state.items() if name not in critic}
        return [(group, actor if name == "actor" else critic) for name, group in self.groups.trained.items()]

    def debug_snapshot(self) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
        experience = self.experience
        if experience is None:
            return [], {}
        samples = zip(experience.examples, experience.prompts, experience.texts, experience.samples, strict=True)
        return [debug_record(*sample) for sample in samples], experience.padded()

    def restore_snapshot(self, records: Sequence[dict[str, Any]], tensors: dict[str, Tensor]) -> None:
        raise NotImplementedError("nlu replay recomputes a failed batch on the DeepSpeed backend")

    def per_sample_losses(self, slot: int) -> dict[Any, Callable[[], Tensor]]:
        return {}


class RayTrainingRun(TrainingRun):
    """A training run whose checkpoints hold the parts of all groups' ranks."""

    trainer: RayTrainer

    def make_checkpoints(self) -> Checkpoints:
        return GroupCheckpoints(self.recipe, self.strategy, self.trainer.groups)
