"""PPO on LoRA adapters with a rule-based reward: section 4.3 of the paper, step by step.

1 sample    one response per prompt of the batch
2 reward    the rule on the text, given at the last token
3 reference logprobs of the policy that training started from; per-token KL penalty
4 advantage GAE, whitened over the batch
5 update    `epochs` passes of the clipped policy and value losses
6 log

A batch passes through four files: this one, `rollout/sampler` (responses), `prefix/tree` (samples as one packed
row) and `model/policy` (its forward). The run around it (data, evaluations, checkpoints) is `extensions.runs`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from extensions.data import BatchOrder, Example
from extensions.distributed import watchdog
from extensions.distributed.nonfinite import NonFiniteCheck
from extensions.distributed.openrlhf import (
    AdaptiveKLController,
    FixedKLController,
    PolicyLoss,
    ValueLoss,
    compute_approx_kl,
    compute_reward,
)
from extensions.distributed.strategy import Strategy
from extensions.model.policy import Policy, Role
from extensions.prefix.limits import MemoryLimits, PackLimit
from extensions.prefix.logprobs import Entropy
from extensions.prefix.tree import Pack, Sample
from extensions.prompts import PromptEncoder, parse_answer
from extensions.recipe import Ppo
from extensions.rollout.rewards import Reward
from extensions.rollout.sampler import Sampler, training_request
from extensions.training.advantages import gae, td_targets, whiten
from extensions.training.experience import EXPERIENCE_TENSORS, Experience, MicroBatch, TokenIndex
from extensions.training.records import batch_metrics, debug_record, rollout_record, summary_lines
from extensions.training.trainer import Clock, LocalPolicyMixin, add, mixed_seed


@dataclass
class ActorLoss:
    """Policy loss of one micro-batch with n response tokens, normalised by the tokens of the whole minibatch."""

    logprobs: Tensor  # (n,) under the current policy
    entropy: Tensor  # (n,)
    policy_loss: Tensor
    clip_fraction: Tensor  # of its tokens
    loss: Tensor  # policy loss with the entropy bonus


class PpoTrainer(LocalPolicyMixin):
    """The PPO loop over one batch order.

    Args:
        policy, engine: the policy, and the DeepSpeed engine around it.
        order: which examples make up each batch.
        ppo: recipe section `ppo`.
        budgets: task -> low and high end of the response budget, in tokens.
        limits: of memory, besides the rows of a micro-batch.
    """

    def __init__(
        self,
        policy: Policy,
        engine: Any,
        strategy: Strategy,
        sampler: Sampler,
        encoder: PromptEncoder,
        reward: Reward,
        order: BatchOrder,
        ppo: Ppo,
        budgets: Mapping[str, Sequence[int]],
        seed: int,
        limits: MemoryLimits | None = None,
    ) -> None:
        self.limits = limits or MemoryLimits()
        self.policy, self.engine, self.strategy, self.sampler = policy, engine, strategy, sampler
        self.encoder, self.reward, self.order, self.ppo, self.seed = encoder, reward, order, ppo, seed
        self.budgets = budgets
        self.entropy: Entropy = "differentiable" if ppo.entropy_coef > 0 else "number"
        self.policy_loss = PolicyLoss(clip_eps_low=ppo.clip, clip_eps_high=ppo.clip)
        self.value_loss = ValueLoss(clip_eps=ppo.value_clip)
        kl = ppo.kl
        self.kl_controller = (
            AdaptiveKLController(kl.init, kl.target, kl.horizon) if kl.adaptive else FixedKLController(kl.init)
        )
        # Sampling and the packed forward agree to rounding in float32. In bfloat16 they do not, and the ratio of the
        # first epoch would not be 1.
        exact = policy.causal_lm.dtype == torch.float32
        self.recompute = (
            not sampler.exact or ppo.old_logprobs == "recomputed" or (ppo.old_logprobs == "auto" and not exact)
        )
        self._experience: Experience | None = None  # of the current iteration
        # Without dropout, a first update of a single forward repeats the forward of the old policy, which is then kept.
        dropout = any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in policy.modules())
        self.one_forward = not dropout and ppo.mini_batch_size is None and ppo.critic == "shared"
        self._first_forward: dict[str, Tensor] | None = None  # with its graph

    def state(self) -> dict[str, Any]:
        """State for a checkpoint besides the engine's."""
        return {"kl_coef": self.kl_controller.value, "kl_init": self.ppo.kl.init}

    def load_state(self, state: dict[str, Any]) -> None:
        if state["kl_init"] == self.ppo.kl.init:  # a fork may start it anew
            self.kl_controller.value = state["kl_coef"]

    def iterate(self, step: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """One PPO iteration. Returns its metrics and one record per sample of the batch; empty except on rank 0."""
        clock, self._experience = Clock(self.policy.device), None
        batch = self.order.batch(step)[self.strategy.rank :: self.strategy.world_size]
        with clock("rollout"):
            experience = self._experience = self.sample(batch, step)
        with clock("reward"):
            scores = self.reward(experience.texts, experience.prompts, experience.examples, experience.answers)
            experience.scores = torch.tensor(scores, dtype=torch.float32, device=self.policy.device)
            experience.weights = torch.tensor([self.order.weight(example) for example in batch]).to(experience.scores)
        with clock("reference"):
            mismatch = self.compute_old_and_reference_logprobs(experience)
            self.estimate_advantages(experience, self.ppo, self.kl_controller.value, self.strategy.sum)
        self.watch_experience(experience, self.strategy.nonfinite)
        with clock("update"):
            losses = self.update(experience, step)
        return self.summarise(experience, losses | mismatch, step, clock)

    def summary_lines(self, metrics: dict[str, Any]) -> tuple[str, str]:
        return summary_lines(metrics)

    # ------------------------------------------------------------------------------------------- 1 sample

    def sample(self, batch: Sequence[Example], step: int) -> Experience:
        """Responses of the current policy, with the logprobs and values that sampling computes anyway."""
        encoded = [self.encoder.encode(example.task, example.fields) for example in batch]
        requests = []
        for slot, (example, (ids, _)) in enumerate(zip(batch, encoded, strict=True)):
            row = slot * self.strategy.world_size + self.strategy.rank
            requests.append(training_request(ids, self.seed, step, row, self.budgets[example.task.name]))
        with self.sampler.session():
            responses = self.sampler.sample(requests)
        index = TokenIndex([len(response.tokens) for response in responses], self.policy.device)
        return Experience(
            examples=list(batch),
            prompts=[text for _, text in encoded],
            samples=[Sample(q.prompt, r.tokens) for q, r in zip(requests, responses, strict=True)],
            texts=[response.text for response in responses],
            answers=[parse_answer(r.text, example.task) for r, example in zip(responses, batch, strict=True)],
            index=index,
            logprobs=torch.cat([response.logprobs for response in responses]),
            values=torch.cat([response.values for response in responses]),
            kl=torch.zeros(len(index.sample), device=self.policy.device),
        )

    # ---------------------------------------------------------------------------------------- 3 reference

    @torch.no_grad()
    def compute_old_and_reference_logprobs(self, experience: Experience) -> dict[str, Tensor]:
        """Reference logprobs for the KL; old logprobs and values again where those of sampling are not exact.

        Returns the summed absolute difference between sampled and recomputed logprobs, where both are known.
        """
        self.policy.eval()
        sums: dict[str, Tensor] = {}
        if self.recompute:
            again = self._old_policy(experience)
            difference = sums["sampling_mismatch"] = (again["logprobs"] - experience.logprobs).abs().sum()
            if not self.sampler.exact:
                total, tokens = self.strategy.sum(
                    torch.stack([difference, difference.new_tensor(len(experience.logprobs))])
                ).tolist()
                self.sampler.check_logprob_mismatch(total / tokens)
            experience.logprobs = again["logprobs"]
            experience.values = again.get("values", experience.values)
        if self.ppo.critic == "adapter":
            experience.values = self._forward_all(experience, "critic", logprobs=False)["values"]
        if self.ppo.kl.init > 0:
            reference = self._forward_all(experience, "reference", values=False)["logprobs"]
            experience.kl = compute_approx_kl(experience.logprobs, reference)
        return sums

    def _old_policy(self, experience: Experience) -> dict[str, Tensor]:
        """Logprobs, and values of a shared critic, of the policy that sampled: (N,) each."""
        if not self.one_forward or len(self._micro_batches(experience, range(len(experience.samples)))) > 1:
            return self._forward_all(experience, "actor", values=self.ppo.critic == "shared")

        def first(packed: Pack) -> dict[str, Tensor]:
            with torch.enable_grad():
                self._first_forward = self.engine(packed, entropy=self.entropy)
            return {name: flat.detach() for name, flat in self._first_forward.items()}

        self.policy.train()  # there is no dropout, and models checkpoint gradients in this mode only
        results = self._by_micro_batch(experience, "actor", first)
        self.policy.eval()
        return results

    def _forward_all(self, experience: Experience, role: Role, **what: bool) -> dict[str, Tensor]:
        """A forward over all samples under `role`: (N,) each."""
        return self._by_micro_batch(experience, role, partial(self.policy, **what))

    def _by_micro_batch(
        self, experience: Experience, role: Role, forward: Callable[[Pack], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """`forward` of every micro-batch, its results put in batch order: (N,) each."""

        def compute() -> dict[str, Tensor]:
            results: dict[str, Tensor] = {}
            with self.policy.role(role):
                for part in self._micro_batches(experience, range(len(experience.samples))):
                    watchdog.heartbeat()
                    self.limits.running(len(part.slots), part.pack.input_ids.shape[1])
                    for name, values in forward(part.pack).items():
                        flat = results.setdefault(name, values.new_zeros(len(experience.index.sample)))
                        flat[part.tokens] = values
            return results

        return self.limits.attempt(compute)

    def _micro_batches(self, experience: Experience, slots: Sequence[int]) -> list[MicroBatch]:
        return experience.micro_batches(slots, self.limits.of(self.ppo.micro_batch_size))

    # ---------------------------------------------------------------------------------------- 4 advantage

    @staticmethod
    def estimate_advantages(
        experience: Experience, ppo: Ppo, kl_coef: float, sum_over_ranks: Callable[[Tensor], Tensor] = lambda x: x
    ) -> None:
        """Token rewards (KL penalty everywhere, the weighted score at the last token), then advantages and returns."""
        index = experience.index
        kl, values = index.pad(experience.kl), index.pad(experience.values)
        rewards = compute_reward(experience.scores * experience.weights, kl_coef, kl, index.mask)
        advantages, returns = gae(rewards, values, index.mask, ppo.gamma, ppo.lam)
        if ppo.value_target == "td":
            returns = td_targets(rewards, values, index.mask, ppo.gamma)
        experience.advantages, experience.returns = index.flatten(advantages), index.flatten(returns)
        if ppo.whiten:
            every = torch.ones_like(experience.advantages)
            experience.advantages = whiten(experience.advantages, every, sum_over_ranks, ppo.whiten_min_std)

    @staticmethod
    def watch_experience(experience: Experience, nonfinite: NonFiniteCheck) -> None:
        """Record every tensor of the rollout for the check before the update."""
        nonfinite.samples(range(len(experience.samples)))
        for name in EXPERIENCE_TENSORS:
            tensor = getattr(experience, name)
            nonfinite.watch(f"{name} of the rollout", tensor if name == "scores" else experience.index.sums(tensor))

    # ------------------------------------------------------------------------------------------- 5 update

    def update(self, experience: Experience, step: int) -> dict[str, Tensor]:
        """Epochs of minibatch updates. Returns this rank's sums over response tokens, for the metrics."""
        self.policy.train()
        sums: dict[str, Tensor] = {}
        for epoch in range(self.ppo.epochs):
            for slots in self._mini_batches(len(experience.samples), step, epoch):
                moment = (step, epoch, slots[0])
                sums = self.limits.attempt(
                    partial(self._optimizer_step, experience, slots, moment, sums), self._discard
                )
        return sums

    def _discard(self) -> bool:
        """Discard a minibatch that failed for lack of memory; see `Strategy.discard`."""
        self._first_forward = None
        return self.strategy.discard(self.engine)

    def _mini_batches(self, count: int, step: int, epoch: int) -> list[list[int]]:
        """This rank's slots, shuffled into minibatches; by default the whole batch is one."""
        if self.ppo.mini_batch_size is None:
            return [list(range(count))]
        size = self.ppo.mini_batch_size // self.strategy.world_size
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, step, epoch))
        slots = torch.randperm(count, generator=generator).tolist()
        return [slots[i : i + size] for i in range(0, count, size)]

    def _optimizer_step(
        self, experience: Experience, slots: list[int], moment: tuple[int, ...], before: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Gradients over the micro-batches of a minibatch, then one update.

        Returns the sums of the metrics: those `before`, and its own.

        Every loss is a sum over the tokens of a micro-batch over the number of tokens in the minibatch of all ranks, so
        neither micro-batches nor ranks change the result.
        """
        own_tokens = sum(experience.index.lengths[slot] for slot in slots)
        tokens = self.strategy.sum(torch.tensor(float(own_tokens), device=self.policy.device))
        scale = {"dp_size": self.strategy.world_size, "batch_num_tokens": tokens}
        per_loss = tokens / self.strategy.world_size  # factor from a loss to the sum over its tokens
        parts = self._micro_batches(experience, slots)
        sums = dict(before)
        shared = self.ppo.critic == "shared"
        for k, part in enumerate(parts):
            watchdog.heartbeat()
            last = k == len(parts) - 1
            torch.manual_seed(mixed_seed(self.seed, *moment, k, self.strategy.rank))  # of the dropout masks
            self.strategy.nonfinite.samples(part.slots)
            self.limits.running(len(part.slots), part.pack.input_ids.shape[1])
            with self.policy.role("actor"):
                out = self._first_forward or self.engine(part.pack, entropy=self.entropy, values=shared)
                self._first_forward = None
                actor = self._actor_loss(experience, out, part, scale)
                loss = actor.loss
                if shared:
                    value_loss = self._value_loss(experience, out, part, scale)
                    loss = loss + self.ppo.value_coef * value_loss
                self.strategy.nonfinite.watch("logprobs of the update", part.sums(actor.logprobs))
                self.strategy.nonfinite.watch("entropy", part.sums(actor.entropy))
                self.strategy.update(self.engine, loss, last and shared)
            if not shared:
                with self.policy.role("critic"):
                    value_loss = self._value_loss(experience, self.engine(part.pack, logprobs=False), part, scale)
                    self.strategy.update(self.engine, self.ppo.value_coef * value_loss, last)
            count = actor.entropy.new_tensor(len(part.tokens))
            add(sums, "tokens", count)
            add(sums, "policy_loss", actor.policy_loss * per_loss)
            add(sums, "value_loss", value_loss * per_loss)
            add(sums, "clip_fraction", actor.clip_fraction * count)
            add(sums, "entropy", actor.entropy.sum())
            if moment[1] == 0 and k == 0 and not self.recompute:
                # Before the first update of the batch the ratio is 1 up to rounding (and dropout).
                difference = (actor.logprobs.detach() - experience.logprobs[part.tokens]).abs().sum()
                sums.setdefault("sampling_mismatch", difference)
                sums.setdefault("mismatch_tokens", count)
        return sums

    def _actor_loss(
        self, experience: Experience, out: dict[str, Tensor], part: MicroBatch, scale: dict[str, Any]
    ) -> ActorLoss:
        # OpenRLHF's losses take (B, T); a sum over tokens is the same over one row of all of them.
        logprobs, entropy = out["logprobs"], out["entropy"]
        old, advantages = experience.logprobs[part.tokens], experience.advantages[part.tokens]
        policy_loss, clip_fraction, *_ = self.policy_loss(
            logprobs[None], old[None], advantages[None], torch.ones_like(logprobs)[None], **scale
        )
        loss = policy_loss
        if self.ppo.entropy_coef > 0:
            bonus = entropy.sum() / scale["batch_num_tokens"] * scale["dp_size"]
            loss = loss - self.ppo.entropy_coef * bonus
        return ActorLoss(logprobs, entropy, policy_loss, clip_fraction, loss)

    def _value_loss(
        self, experience: Experience, out: dict[str, Tensor], part: MicroBatch, scale: dict[str, Any]
    ) -> Tensor:
        values = out["values"]
        old, returns = experience.values[part.tokens], experience.returns[part.tokens]
        loss: Tensor = self.value_loss(values[None], old[None], returns[None], torch.ones_like(values)[None], **scale)
        return loss

    # ------------------------------------------------------------------------------------ non-finite values

    def debug_snapshot(self) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
        """The samples of the current iteration, and their tensors so far: (B, ...)."""
        experience = self._experience
        if experience is None:
            return [], {}
        parts = zip(experience.examples, experience.prompts, experience.texts, experience.samples, strict=True)
        return [debug_record(*part) for part in parts], experience.padded()

    def restore_snapshot(self, records: Sequence[dict[str, Any]], tensors: dict[str, Tensor]) -> None:
        """Set the current iteration to what `debug_snapshot` returned."""
        index = TokenIndex([len(r["response_ids"]) for r in records], self.policy.device)
        flat = {name: t if name == "scores" else index.flatten(t) for name, t in tensors.items() if name != "mask"}
        self._experience = Experience(
            examples=[],
            prompts=[r["prompt"] for r in records],
            samples=[Sample(r["prompt_ids"], r["response_ids"]) for r in records],
            texts=[r["response"] for r in records],
            answers=[],
            index=index,
            **flat,
        )

    def per_sample_losses(self, slot: int) -> dict[Role, Callable[[], Tensor]]:
        """The losses of one sample of the current iteration alone, keyed by the role under which each is computed."""
        experience = self._experience
        assert experience is not None
        (part,) = experience.micro_batches([slot], PackLimit(1))
        scale = {"dp_size": 1, "batch_num_tokens": torch.tensor(float(experience.index.lengths[slot]))}
        shared = self.ppo.critic == "shared"

        def actor() -> Tensor:
            out = self.policy(part.pack, entropy=self.entropy)
            loss = self._actor_loss(experience, out, part, scale).loss
            return loss + self.ppo.value_coef * self._value_loss(experience, out, part, scale) if shared else loss

        def critic() -> Tensor:
            return self._value_loss(experience, self.policy(part.pack, logprobs=False), part, scale)

        return {"actor": actor} if shared else {"actor": actor, "critic": critic}

    # ---------------------------------------------------------------------------------------------- 6 log

    def summarise(
        self, experience: Experience, sums: dict[str, Tensor], step: int, clock: Clock
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Metrics over all ranks and records in batch order, on rank 0. Updates the KL coefficient, on all ranks."""
        kl_coef, names = self.kl_controller.value, sorted(sums)
        totals = dict(
            zip(names, self.strategy.sum(torch.stack([sums[n].float() for n in names])).tolist(), strict=True)
        )
        kl = experience.index.sums(experience.kl.double())
        kl_sum, count = self.strategy.sum(torch.stack([kl.sum(), kl.new_tensor(len(kl))])).tolist()
        if self.ppo.kl.init > 0:
            self.kl_controller.update(kl_sum / count, int(count))
        lengths = experience.index.lengths
        scores = experience.scores.tolist()
        fields = (experience.examples, experience.prompts, experience.texts, experience.answers, scores, kl.tolist())
        by_rank = self.strategy.gather_to_rank_0(
            [rollout_record(*sample) for sample in zip(*fields, lengths, strict=True)]
        )
        if by_rank is None:
            return {}, []
        records = [by_rank[i % len(by_rank)][i // len(by_rank)] for i in range(sum(map(len, by_rank)))]
        tokens, response_tokens = totals["tokens"], sum(r["tokens"] for r in records)
        seconds = sum(clock.seconds.values())
        metrics = {
            "step": step + 1,
            "samples": (step + 1) * self.order.batch_size,
            **batch_metrics(records, {example.task.name: example.task for example in self.order.examples}),
            "kl": kl_sum / count if self.ppo.kl.init > 0 else None,
            "kl_coef": kl_coef,
            "policy_loss": totals["policy_loss"] / tokens,
            "value_loss": totals["value_loss"] / tokens,
            "entropy": totals["entropy"] / tokens,
            "clip_fraction": totals["clip_fraction"] / tokens,
            "sampling_mismatch": totals["sampling_mismatch"] / totals.get("mismatch_tokens", response_tokens),
            "grad_norm": self.strategy.get_grad_norm(self.engine),
            "lr": self.engine.get_lr()[0],
            "response_tokens": response_tokens / len(records),
            **self.sampler.metrics,
            "seconds": clock.seconds,
            "samples_per_s": len(records) / seconds,
        }
        return metrics, records
