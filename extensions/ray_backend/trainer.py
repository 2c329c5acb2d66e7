"""The run on Ray: OpenRLHF's PPO step over its groups, inside the run that the DeepSpeed loop has too.

`RayTrainer` is OpenRLHF's `BasePPOTrainer` (as its own `PPOTrainer` is) and runs in the driver's process. What is
around a step (data order, validations, early stop, checkpoints, records, adapter, card) is
`extensions.runs.training_run.TrainingRun`.

A step: the agent's responses from all engines -> logprobs, reference, values by the groups -> advantages -> updates of
actor and critic -> the adapter to the engines, and the probe.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
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
from extensions.evaluation.evaluator import Evaluator
from extensions.model.proof import Proof
from extensions.prefix.tree import Sample
from extensions.prompts import PromptEncoder, parse_answer
from extensions.ray_backend.models import RayStrategy
from extensions.recipe import Recipe
from extensions.rollout.lora_sync import LoraPayload, LoraSync, SyncProbe
from extensions.rollout.rewards import Reward
from extensions.rollout.sampler import GenerationRequest, Response
from extensions.rollout.vllm_sampler import request_seed
from extensions.runs.checkpoint import CheckpointFiles, Checkpoints
from extensions.runs.training_run import TrainingRun
from extensions.training.advantages import gae, td_targets, whiten
from extensions.training.experience import TokenIndex
from extensions.training.ppo import generation_request
from extensions.training.records import batch_metrics, debug_record, rollout_record, summary_line
from extensions.training.trainer import Clock

# After `extensions`, which lets it be imported without flash-attn.
from openrlhf.trainer.ppo_trainer import BasePPOTrainer  # isort: skip
from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker  # isort: skip
from openrlhf.trainer.ppo_utils.samples_generator import SamplesGenerator  # isort: skip

LOGGERS = ("openrlhf.trainer.ppo_trainer", "openrlhf.trainer.ppo_utils.experience_maker")


@dataclass(frozen=True)
class RolloutRequest:
    """What the agent is asked for, as JSON in OpenRLHF's label."""

    prompt_ids: list[int]
    budget: int
    seed: int
    greedy: bool
    label: str | None  # for the reward; None: no reward is wanted


def wait(references: Sequence[Any]) -> list[Any]:
    """`ray.get` that tells the watchdog of every result that comes."""
    pending = list(references)
    while pending:
        ready, pending = ray.wait(pending, num_returns=1, timeout=1.0)
        if ready:
            ray.get(ready)  # an error at once, not when the others have come, who may wait for this one
            watchdog.heartbeat()
    return list(ray.get(list(references)))


class Groups:
    """OpenRLHF's actor groups and engines, and the calls on them that it has no methods for."""

    def __init__(self, actor: Any, critic: Any, engines: Sequence[Any], generator: SamplesGenerator) -> None:
        self.actor, self.critic, self.engines, self.generator = actor, critic, list(engines), generator
        self.sleeps = bool(generator.args.vllm.enable_sleep)  # OpenRLHF puts new engines to sleep at once
        self._awake = False

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Engines that share a GPU with the training have its memory inside this alone."""
        if not self.sleeps or self._awake:
            yield
            return
        self.every_engine("wake_up")
        self._awake = True
        try:
            yield
        finally:
            self._awake = False
            self.every_engine("sleep")

    @staticmethod
    def all(group: Any, method: str, *arguments: Any) -> list[Any]:
        return wait(group.async_run_method(method, *arguments))

    def every_engine(self, method: str, *arguments: Any) -> list[Any]:
        return wait([getattr(engine, method).remote(*arguments) for engine in self.engines])

    def proof(self) -> Proof:
        """What the actor's group found of the model when it was loaded."""
        found: Proof = self.all(self.actor, "proof")[0]
        return found

    def respond(self, asks: Sequence[RolloutRequest], prompts: Sequence[str]) -> list[dict[str, Any]]:
        """The agent's responses, in order; OpenRLHF shares them out over the engines."""
        labels = [json.dumps(asdict(ask)) for ask in asks]
        references = self.generator._dispatch_prompts_to_vllm(list(prompts), labels, n_samples_per_prompt=1)
        return [responses[0] for responses in wait(references)]


class RayLoraSync(LoraSync):
    """Of the actor group and all engines.

    Args:
        samples: for the probe.
    """

    def __init__(self, groups: Groups, probe: SyncProbe, samples: Sequence[Sample]) -> None:
        super().__init__(probe)
        self.groups, self.samples = groups, list(samples)
        self.changed = True  # whether the weights may be others than those that were sent

    def refresh(self) -> None:
        if self.changed:
            with self.groups.awake():
                super().refresh()
            self.changed = False

    @contextmanager
    def random_adapter(self) -> Iterator[None]:
        before = ray.put(self._actor("weights"))
        self._actor("load_random_adapter")
        try:
            yield
        finally:
            self._actor("load_weights", before)

    def payload(self, version: int) -> LoraPayload:
        found: LoraPayload = self._actor("lora_payload", version)
        return found

    def deliver(self, payload: LoraPayload) -> None:
        self.groups.every_engine("load_lora", ray.put(payload))

    def trainer_logprobs(self) -> list[float]:
        found: list[float] = self._actor("probe", self.samples)
        return found

    def engine_logprobs(self) -> list[list[float]]:
        return self.groups.every_engine("probe", self.samples)

    def _actor(self, method: str, *arguments: Any) -> Any:
        """What rank 0 answers; all ranks are asked."""
        return self.groups.all(self.groups.actor, method, *arguments)[0]


class RaySampler:
    """What an evaluation asks of a sampler (`extensions.rollout.sampler.Sampler`), by the engines and the actors."""

    fixed_decode_steps: int | None = None

    def __init__(self, groups: Groups, refresh: Callable[[], None]) -> None:
        self.groups, self.refresh = groups, refresh

    @contextmanager
    def session(self) -> Iterator[None]:
        with self.groups.awake():
            self.refresh()
            yield

    def sample(self, requests: Sequence[GenerationRequest], greedy: bool = False) -> list[Response]:
        asks = [RolloutRequest(list(r.prompt), r.budget, request_seed(r), greedy, None) for r in requests]
        found = []
        for ask, response in zip(asks, self.groups.respond(asks, [""] * len(asks)), strict=True):
            tokens = response["observation_tokens"][len(ask.prompt_ids) :]
            logprobs = torch.tensor(response["rollout_log_probs"][len(ask.prompt_ids) :])
            found.append(Response(tokens, logprobs, torch.zeros_like(logprobs), response["text"]))
        return found

    def logprobs(self, samples: Sequence[Sample], together: int = 1) -> Tensor:
        return torch.tensor(self.groups.all(self.groups.actor, "logprobs", list(samples))[0])


class ExperienceMaker(RemoteExperienceMaker):
    """OpenRLHF's, with the paper's whitening and value targets, and a look at every number before the update."""

    recipe: Recipe
    probe: SyncProbe
    last: list[Any]  # of the iteration in work
    weights: Tensor  # (B,) of its rows
    mismatch: float  # mean difference of the logprobs of its samples, by engine and trainer

    def make_experience_batch(self, rollout_samples: list[Any]) -> list[Any]:
        watchdog.heartbeat()
        self.last = super().make_experience_batch(rollout_samples)
        check_finite(self.last)
        differences = [((e.action_log_probs - e.rollout_log_probs) * e.action_mask).abs().sum() for e in self.last]
        self.mismatch = float(sum(differences) / sum(e.action_mask.sum() for e in self.last))
        self.probe.check_samples(self.mismatch)
        return self.last

    def compute_advantages_and_returns(self, experiences: list[Any]) -> list[Any]:
        """Replaces OpenRLHF's, which always whitens, has no least deviation and no TD target (0.11.2)."""
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
    """Raises NonFiniteError where an experience holds NaN or infinity."""
    problems, first = [], 0
    for e in experiences:
        named = {"scores": e.rewards, "logprobs": e.action_log_probs, "values": e.values, "kl": e.kl}
        named |= {"advantages": e.advantages, "returns": e.returns}
        for name, tensor in named.items():
            bad = [first + row for row, values in enumerate(tensor) if not bool(torch.isfinite(values).all())]
            if bad:
                kind = "NaN" if bool(torch.isnan(tensor).any()) else "infinity"
                problems.append(NonFiniteTensor(f"{name} of the rollout", bad, kind))
        first += len(e.rewards)
    if problems:
        raise NonFiniteError(problems)


class RayTrainer(BasePPOTrainer):
    """OpenRLHF's step, as `extensions.training.trainer.Trainer` asks for it.

    Args:
        groups: made by OpenRLHF's `train`.
        samples: for the probe.
    """

    policy: Any = None  # in other processes
    engine: Any = None

    def __init__(
        self,
        recipe: Recipe,
        strategy: RayStrategy,
        groups: Groups,
        critic: Any,
        reference: Any,
        tokenizer: Any,
        encoder: PromptEncoder,
        reward: Reward,
        order: BatchOrder,
        probe: SyncProbe,
        samples: Sequence[Sample],
    ) -> None:
        super().__init__(strategy, groups.actor, critic, None, reference, groups.engines, tokenizer)
        for name in LOGGERS:  # they print each step's numbers and a sample; the run has its own line
            logging.getLogger(name).setLevel(logging.WARNING)
        self.recipe, self.groups, self.encoder, self.reward, self.order = recipe, groups, encoder, reward, order
        self.experience_maker = ExperienceMaker(groups.actor, critic, None, reference, self.kl_ctl, strategy, tokenizer)
        self.experience_maker.recipe, self.experience_maker.probe = recipe, probe
        self.engines = RayLoraSync(groups, probe, samples)
        self.batch: list[Example] = []
        self.responses: list[dict[str, Any]] = []
        self.asks: list[RolloutRequest] = []
        self.prompts: list[str] = []

    def fit(self, global_step: int = 0) -> None:
        raise NotImplementedError("extensions.runs.training_run.TrainingRun calls iterate")

    # -------------------------------------------------------------------------------------------------- one step

    def iterate(self, step: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """One PPO iteration: its metrics, and a record of each sample."""
        clock = Clock(torch.device("cpu"))
        self.experience_maker.last, self.batch = [], self.order.batch(step)
        self.experience_maker.weights = torch.tensor([self.order.weight(example) for example in self.batch])
        with clock("rollout"), self.groups.awake():
            self.engines.refresh()
            rollout = self.sample(step)
        kl_coef = self.kl_ctl.value
        status, _ = self.train_step(rollout, step)
        experiences = self.experience_maker.last
        records = self.records(experiences)
        mean_kl = sum(r["kl"] for r in records) / len(records)
        if self.recipe.ppo.kl.init > 0:
            self.kl_ctl.update(mean_kl, len(records))
        clock.seconds |= {
            "reference": status["timing/make_experience"],
            "update": status["timing/ppo_train"],
            "sync": status["timing/broadcast"],
        }
        seconds = sum(clock.seconds.values())
        tokens = sum(r["tokens"] for r in records)
        metrics = batch_metrics(records, {example.task.name: example.task for example in self.order.examples})
        metrics |= {
            "kl": mean_kl if self.recipe.ppo.kl.init > 0 else None,
            "kl_coef": kl_coef,
            "policy_loss": status["policy_loss"],
            "value_loss": status["critic_loss"] / self.recipe.ppo.value_coef if self.recipe.ppo.value_coef else 0.0,
            "entropy": status["entropy_loss"],
            "clip_fraction": status["ppo_clip_ratio"],
            "sampling_mismatch": self.experience_maker.mismatch,
            "grad_norm": status["actor_grad_norm"],
            "critic_grad_norm": status["critic_grad_norm"],
            "lr": status["actor_lr"],
            "response_tokens": tokens / len(records),
            "stale_samples": self.stale,
            **self.engines.metrics,
            "seconds": clock.seconds,
            "samples_per_s": len(records) / seconds,
        }
        return {"step": step + 1, "samples": (step + 1) * self.order.batch_size} | metrics, records

    def summary_line(self, metrics: dict[str, Any]) -> str:
        return summary_line(metrics)

    def sample(self, step: int) -> list[Any]:
        """OpenRLHF's experiences of one sample each, in batch order."""
        encoded = [self.encoder.encode(example.task, example.fields) for example in self.batch]
        self.prompts, self.asks = [text for _, text in encoded], []
        for row, (example, (ids, _)) in enumerate(zip(self.batch, encoded, strict=True)):
            request = generation_request(ids, self.recipe.seed, step, row, self.recipe.rollout.response_budget)
            self.asks.append(
                RolloutRequest(ids, request.budget, request_seed(request), False, self.reward.label(example))
            )
        self.responses = self.groups.respond(self.asks, self.prompts)
        self.stale = sum(r["extra_logs"]["adapter_version"] != self.engines.version for r in self.responses)
        longest = max(len(r["observation_tokens"]) for r in self.responses)
        process = self.groups.generator._process_response_into_experience
        return [process(response, max_len=longest) for response in self.responses]

    def ppo_train(self, global_steps: int) -> dict[str, Any]:
        watchdog.heartbeat()
        status = super().ppo_train(global_steps)
        # OpenRLHF would steer the KL coefficient by a mean over tokens (0.11.2); here it is that of a response.
        status.pop("kl", None)
        return status

    def broadcast_to_vllm(self) -> None:
        """OpenRLHF's step calls it after the update."""
        self.engines.changed = True
        self.engines.refresh()

    # ------------------------------------------------------------------------------- what a run asks of a trainer

    def state(self) -> dict[str, Any]:
        return {"kl_coef": self.kl_ctl.value}

    def load_state(self, state: dict[str, Any]) -> None:
        self.kl_ctl.value = state["kl_coef"]
        self.engines.changed = True  # a checkpoint has been read

    def weights(self) -> dict[str, Tensor]:
        """Of both groups, named as in a policy with ppo.critic: adapter."""
        actor = self.groups.all(self.groups.actor, "weights")[0]
        critic = self.groups.all(self.groups.critic, "weights")[0]
        return {**actor, **critic}

    def load_weights(self, state: dict[str, Tensor]) -> None:
        self.engines.changed = True
        for group, part in self._parts(state):
            self.groups.all(group, "load_weights", ray.put(part))

    def _parts(self, state: dict[str, Tensor]) -> list[tuple[Any, dict[str, Tensor]]]:
        critic = {name: t for name, t in state.items() if ".critic." in name or name.startswith("value_head.")}
        actor = {name: t for name, t in state.items() if name not in critic}
        return [(self.groups.actor, actor), (self.groups.critic, critic)]

    def save(self, adapter: Path, critic: Path, state: dict[str, Tensor]) -> None:
        for folder, (group, part) in zip((adapter, critic), self._parts(state), strict=True):
            for name, content in self.groups.all(group, "saved", ray.put(part))[0].items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                write_bytes(folder / name, content)

    def records(self, experiences: Sequence[Any]) -> list[dict[str, Any]]:
        kl = torch.cat([e.info["kl_of_response"] for e in experiences]).tolist()
        found = []
        for slot, (example, response) in enumerate(zip(self.batch, self.responses, strict=True)):
            tokens = len(self.response_ids(slot))
            reward, text = response["reward"], response["text"]
            answer = parse_answer(text, example.task)
            found.append(rollout_record(example, self.prompts[slot], text, answer, reward, kl[slot], tokens))
        return found

    def debug_snapshot(self) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
        experiences = self.experience_maker.last
        if not experiences or len(self.responses) != len(self.batch):
            return [], {}
        samples = [Sample(ask.prompt_ids, self.response_ids(slot)) for slot, ask in enumerate(self.asks)]
        records = [
            debug_record(example, self.prompts[slot], self.responses[slot]["text"], samples[slot])
            for slot, example in enumerate(self.batch)
        ]
        return records, tensors_of(experiences, [len(sample.response) for sample in samples])

    def response_ids(self, slot: int) -> list[int]:
        """Token ids of a response of the iteration in work."""
        tokens: list[int] = self.responses[slot]["observation_tokens"]
        return tokens[len(self.asks[slot].prompt_ids) :]

    def restore_snapshot(self, records: Sequence[dict[str, Any]], tensors: dict[str, Tensor]) -> None:
        raise NotImplementedError("nlu replay computes a failed batch by the DeepSpeed loop")

    def per_sample_losses(self, slot: int) -> dict[Any, Callable[[], Tensor]]:
        return {}


def tensors_of(experiences: Sequence[Any], lengths: list[int]) -> dict[str, Tensor]:
    """Tensors of each response, (B, T), as `extensions.training.experience.Experience.padded` gives them."""
    index = TokenIndex(lengths)
    named = {
        "logprobs": "action_log_probs",
        "values": "values",
        "kl": "kl",
        "advantages": "advantages",
        "returns": "returns",
    }
    found = {"scores": torch.cat([e.rewards for e in experiences])}
    for name, field in named.items():
        flat = torch.cat([getattr(e, field)[e.action_mask.bool()] for e in experiences])
        found[name] = index.pad(flat)
    found["mask"] = index.mask
    return found


# ---------------------------------------------------------------------------------------------------- the run around


class GroupCheckpoints(Checkpoints):
    """The checkpoints of a run on Ray: each rank of each group writes its part, in a folder that all nodes share."""

    def __init__(self, recipe: Recipe, strategy: RayStrategy, groups: Groups, ranks: int) -> None:
        self.root, self.strategy = recipe.run_dir.absolute() / "checkpoints", strategy
        self.keep, self.ranks, self.files = recipe.checkpoint.keep, ranks, CheckpointFiles(())
        self.groups = {"actor": groups.actor, "critic": groups.critic}

    def _write_parts(self, folder: Path) -> dict[str, Any]:
        entries: dict[str, Any] = {}
        for name, group in self.groups.items():
            for written, error in Groups.all(group, "write_checkpoint", str(folder), name):
                entries |= written
                if error is not None and self.files.error is None:
                    self.files.error = OSError(error)
        return entries

    def _read_parts(self, folder: Path) -> None:
        for name, group in self.groups.items():
            Groups.all(group, "read_checkpoint", str(folder), name)


class RayTrainingRun(TrainingRun):
    """`Training` whose ranks are OpenRLHF's groups."""

    trainer: RayTrainer

    def make_checkpoints(self) -> Checkpoints:
        groups = self.trainer.groups
        assert isinstance(self.strategy, RayStrategy)
        return GroupCheckpoints(self.recipe, self.strategy, groups, len(groups.actor._actor_handlers))

    def _compare_ranks(self) -> None:
        """All ranks of a group are asked for theirs by OpenRLHF alone."""


def evaluator(
    recipe: Recipe,
    strategy: RayStrategy,
    reporter: Any,
    trainer: RayTrainer,
    label_sets: Mapping[str, Sequence[str]],
) -> Evaluator:
    sampler: Any = RaySampler(trainer.groups, trainer.engines.refresh)
    return Evaluator(recipe, strategy, reporter, sampler, trainer.encoder, recipe.run_dir, label_sets)
