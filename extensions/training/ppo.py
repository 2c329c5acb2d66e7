"""PPO on LoRA adapters with a rule-based reward: section 4.3 of the paper, step by step.

1 sample    one response for each prompt of the batch
2 reward    the rule on the text, given at the last token
3 reference logprobs of the policy that training started from; per-token KL penalty
4 advantage GAE, whitened over the batch
5 update    `epochs` passes of the clipped policy and value losses
6 log

The run around it (data, engine, evaluations, checkpoints) is `extensions.runs.training_run`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from extensions.data import BatchOrder, Example
from extensions.distributed import watchdog
from extensions.distributed.openrlhf import (
    AdaptiveKLController,
    FixedKLController,
    PolicyLoss,
    ValueLoss,
    compute_approx_kl,
    compute_reward,
)
from extensions.distributed.strategy import Strategy
from extensions.evaluation.metrics import shares
from extensions.model.policy import Policy, Role
from extensions.prefix.logprobs import Entropy, length_mask, pad_rows
from extensions.prefix.tree import Pack, Sample, micro_batches, pack
from extensions.prompts import PromptEncoder, parse_answer
from extensions.recipe import Ppo
from extensions.rollout.rewards import Reward
from extensions.rollout.sampler import GenerationRequest, Sampler, random_numbers
from extensions.training.advantages import gae, td_targets, whiten
from extensions.training.trainer import Clock, LocalPolicyMixin, add, mixed_seed

TRAINING = 0  # purpose of its random numbers
EXPERIENCE_TENSORS = (
    "scores",
    "logprobs",
    "values",
    "kl",
    "advantages",
    "targets",
)  # tensors of an experience, all (B, ...)


@dataclass
class Experience:
    """One rank's share of a batch: B samples, T response tokens in the longest."""

    examples: list[Example]
    samples: list[Sample]  # token ids of prompts and responses, as they are packed
    texts: list[str]  # responses
    prompts: list[str]
    scores: Tensor  # (B,) the reward of each response, before the weight of its row
    lengths: list[int]  # response tokens of each
    mask: Tensor  # (B, T) bool, true at response tokens
    logprobs: Tensor  # (B, T) log pi_old(a_t|s_t), 0 where mask is 0; so are all below
    values: Tensor  # (B, T) V_old(s_t)
    kl: Tensor  # (B, T) log pi_old - log pi_ref
    weights: Tensor = field(default_factory=lambda: torch.ones(1))  # (B,) of the rows, or one for all
    advantages: Tensor = field(default_factory=lambda: torch.empty(0))  # (B, T) whitened
    targets: Tensor = field(default_factory=lambda: torch.empty(0))  # (B, T) what the values are fitted to


@dataclass
class ActorLoss:
    """Of one micro-batch, over the tokens of the whole minibatch."""

    logprobs: Tensor  # (B, T), now
    entropy: Tensor  # (B, T)
    policy_loss: Tensor
    clipped: Tensor  # share of its tokens
    loss: Tensor  # with the entropy bonus


class PpoTrainer(LocalPolicyMixin):
    """The training loop over one batch order.

    Args:
        policy, engine: the policy, and the DeepSpeed engine around it.
        order: which examples make up each batch.
        ppo: recipe section `ppo`.
        min_new_tokens, max_new_tokens: response budget.
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
        min_new_tokens: int,
        max_new_tokens: int,
        seed: int,
    ) -> None:
        self.policy, self.engine, self.strategy, self.sampler = policy, engine, strategy, sampler
        self.encoder, self.reward, self.order, self.ppo, self.seed = encoder, reward, order, ppo, seed
        self.min_new_tokens, self.max_new_tokens = min_new_tokens, max_new_tokens
        self.entropy: Entropy = "differentiable" if ppo.entropy_coef > 0 else "number"
        self.policy_loss = PolicyLoss(clip_eps_low=ppo.clip, clip_eps_high=ppo.clip)
        self.value_loss = ValueLoss(clip_eps=ppo.value_clip)
        kl = ppo.kl
        self.kl_controller = (
            AdaptiveKLController(kl.init, kl.target, kl.horizon) if kl.adaptive else FixedKLController(kl.init)
        )
        # Sampling and the packed forward agree to rounding in float32; in bfloat16 they do not, and the ratio of the
        # first epoch would not be 1.
        exact = policy.causal_lm.dtype == torch.float32
        self.recompute = (
            not sampler.exact or ppo.old_logprobs == "recomputed" or (ppo.old_logprobs == "auto" and not exact)
        )
        self._packs: dict[tuple[int, ...], Pack] = {}
        self._experience: Experience | None = None  # of the iteration in work
        # Without dropout the forward of the batch's first update is that of the old policy, if it is a single one.
        dropout = any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in policy.modules())
        self.one_forward = not dropout and ppo.mini_batch_size is None and ppo.critic == "shared"
        self._first: dict[str, Tensor] | None = None  # results of that forward, with their graph

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold besides the engine's state."""
        return {"kl_coef": self.kl_controller.value}

    def load_state(self, state: dict[str, Any]) -> None:
        self.kl_controller.value = state["kl_coef"]

    def iterate(self, step: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """One PPO iteration. Returns its metrics and, for each sample of this batch, a record; same on all ranks."""
        clock, self._experience = Clock(self.policy.device), None
        batch = self.order.batch(step)[self.strategy.rank :: self.strategy.world_size]
        with clock("rollout"):
            experience = self._experience = self.sample(batch, step)
        with clock("reward"):
            scores = self.reward(experience.texts, experience.prompts, experience.examples)
            experience.scores = torch.tensor(scores, dtype=torch.float32, device=self.policy.device)
            experience.weights = torch.tensor([self.order.weight(example) for example in batch]).to(experience.scores)
        with clock("reference"):
            mismatch = self.compute_old_and_reference_logprobs(experience)
            self.estimate_advantages(experience)
        nonfinite = self.strategy.nonfinite
        nonfinite.samples(range(len(batch)))
        for name in EXPERIENCE_TENSORS:
            nonfinite.watch(f"{name} of the rollout", getattr(experience, name))
        with clock("update"):
            losses = self.update(experience, step)
        return self.summarise(experience, losses | mismatch, step, clock)

    def summary_line(self, metrics: dict[str, Any]) -> str:
        return summary_line(metrics)

    # ------------------------------------------------------------------------------------------- 1 sample

    def sample(self, batch: Sequence[Example], step: int) -> Experience:
        """Responses of the current policy, with the logprobs and values that sampling computed anyway."""
        encoded = [self.encoder.encode(example.task, example.fields) for example in batch]
        requests = []
        for slot, (ids, _) in enumerate(encoded):
            row = slot * self.strategy.world_size + self.strategy.rank
            requests.append(training_request(ids, self.seed, step, row, self.min_new_tokens, self.max_new_tokens))
        with self.sampler.session():
            responses = self.sampler.sample(requests)
        lengths = [len(response.tokens) for response in responses]
        width, device = max(lengths), self.policy.device
        mask = length_mask(lengths, width, device)
        self._packs.clear()
        return Experience(
            examples=list(batch),
            samples=[Sample(q.prompt, r.tokens) for q, r in zip(requests, responses, strict=True)],
            texts=[response.text for response in responses],
            prompts=[text for _, text in encoded],
            scores=torch.empty(0),
            lengths=lengths,
            mask=mask,
            logprobs=pad_rows(torch.cat([response.logprobs for response in responses]), lengths, width),
            values=pad_rows(torch.cat([response.values for response in responses]), lengths, width),
            kl=torch.zeros(mask.shape, device=device),
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
            sums["sampling_mismatch"] = (again["logprobs"] - experience.logprobs).abs().sum()
            if not self.sampler.exact:
                total = self.strategy.sum(torch.stack([sums["sampling_mismatch"], experience.mask.sum()]))
                self.sampler.check_logprob_mismatch(float(total[0] / total[1]))
            experience.logprobs = again["logprobs"]
            experience.values = again.get("values", experience.values)
        if self.ppo.critic == "adapter":
            experience.values = self._all_rows(experience, "critic", logprobs=False, values=True)["values"]
        if self.ppo.kl.init > 0:
            reference = self._all_rows(experience, "reference", logprobs=True, values=False)["logprobs"]
            experience.kl = compute_approx_kl(experience.logprobs, reference) * experience.mask
        return sums

    def _old_policy(self, experience: Experience) -> dict[str, Tensor]:
        """Logprobs, and values of a shared critic, of the policy that sampled: (B, T)."""
        if not self.one_forward or len(experience.samples) > self.ppo.micro_batch_size:
            return self._all_rows(experience, "actor", logprobs=True, values=self.ppo.critic == "shared")

        def first(packed: Pack) -> dict[str, Tensor]:
            with torch.enable_grad():
                self._first = self.engine(packed, entropy=self.entropy)
            return {name: flat.detach() for name, flat in self._first.items()}

        self.policy.train()  # there is no dropout, and models checkpoint gradients in this mode alone
        results = self._rows_of(experience, "actor", first)
        self.policy.eval()
        return results

    def _all_rows(self, experience: Experience, role: Any, logprobs: bool, values: bool) -> dict[str, Tensor]:
        """A forward over all samples under `role`; results (B, T)."""
        return self._rows_of(experience, role, partial(self.policy, logprobs=logprobs, values=values))

    def _rows_of(
        self, experience: Experience, role: Any, forward: Callable[[Pack], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """What `forward` gives for each pack of the samples, by sample: (B, T)."""
        results: dict[str, Tensor] = {}
        with self.policy.role(role):
            for slots in self._micro_batches(experience, range(len(experience.samples))):
                watchdog.heartbeat()
                packed = self._pack(experience, slots)
                for name, flat in forward(packed).items():
                    rows = results.setdefault(name, torch.zeros(experience.mask.shape, device=flat.device))
                    rows[list(slots)] = pad_rows(flat, packed.lengths, rows.shape[1])
        return results

    def _micro_batches(self, experience: Experience, slots: Sequence[int]) -> list[tuple[int, ...]]:
        return micro_batches(experience.samples, slots, self.ppo.micro_batch_size)

    def _pack(self, experience: Experience, slots: tuple[int, ...]) -> Pack:
        """The pack of some samples; made once an iteration, used by the reference and by every epoch."""
        if slots not in self._packs:
            self._packs[slots] = pack([experience.samples[slot] for slot in slots], self.policy.device)
        return self._packs[slots]

    # ---------------------------------------------------------------------------------------- 4 advantage

    def estimate_advantages(self, experience: Experience) -> None:
        """Token rewards (KL penalty everywhere, the weighted score at the last token), then advantages and value
        targets."""
        scores = experience.scores * experience.weights
        rewards = compute_reward(scores, self.kl_controller.value, experience.kl, experience.mask)
        advantages, returns = gae(rewards, experience.values, experience.mask, self.ppo.gamma, self.ppo.lam)
        if self.ppo.value_target == "td":
            returns = td_targets(rewards, experience.values, experience.mask, self.ppo.gamma)
        if self.ppo.whiten:
            advantages = whiten(advantages, experience.mask, self.strategy.sum, self.ppo.whiten_min_std)
        experience.advantages, experience.targets = advantages, returns

    # ------------------------------------------------------------------------------------------- 5 update

    def update(self, experience: Experience, step: int) -> dict[str, Tensor]:
        """Epochs of minibatch updates. Returns this rank's sums over response tokens, for the metrics."""
        self.policy.train()
        sums: dict[str, Tensor] = {}
        for epoch in range(self.ppo.epochs):
            for mini_batch in self._mini_batches(len(experience.samples), step, epoch):
                self._optimizer_step(experience, mini_batch, (step, epoch, mini_batch[0]), sums)
        return sums

    def _mini_batches(self, count: int, step: int, epoch: int) -> list[list[int]]:
        """This rank's slots, shuffled into minibatches; the whole batch is one by default."""
        if self.ppo.mini_batch_size is None:
            return [list(range(count))]
        size = self.ppo.mini_batch_size // self.strategy.world_size
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, step, epoch))
        slots = torch.randperm(count, generator=generator).tolist()
        return [slots[i : i + size] for i in range(0, count, size)]

    def _optimizer_step(
        self, experience: Experience, slots: list[int], moment: tuple[int, ...], sums: dict[str, Tensor]
    ) -> None:
        """Gradients over the micro-batches of a minibatch, then one update.

        Every loss is a sum over this micro-batch's tokens over the number of tokens in the minibatch of all ranks, so
        neither the micro-batches nor the ranks change the result.
        """
        tokens = self.strategy.sum(experience.mask[slots].sum().float())
        scale = {"dp_size": self.strategy.world_size, "batch_num_tokens": tokens}
        chunks = self._micro_batches(experience, slots)
        shared = self.ppo.critic == "shared"
        for k, chunk in enumerate(chunks):
            watchdog.heartbeat()
            packed, rows = self._pack(experience, chunk), list(chunk)
            mask = experience.mask[rows]
            last = k == len(chunks) - 1
            torch.manual_seed(mixed_seed(self.seed, *moment, k, self.strategy.rank))  # of the dropout masks
            self.strategy.nonfinite.samples(rows)
            with self.policy.role("actor"):
                out, self._first = self._first or self.engine(packed, entropy=self.entropy, values=shared), None
                actor = self._actor_loss(experience, out, packed, rows, scale)
                logprobs, entropy, policy_loss = actor.logprobs, actor.entropy, actor.policy_loss
                loss = actor.loss
                if shared:
                    value_loss = self._value_loss(experience, out, packed, rows, scale)
                    loss = loss + self.ppo.value_coef * value_loss
                self.strategy.nonfinite.watch("logprobs of the update", logprobs)
                self.strategy.nonfinite.watch("entropy", entropy)
                self.strategy.update(self.engine, loss, last and shared)
            if not shared:
                with self.policy.role("critic"):
                    out = self.engine(packed, logprobs=False)
                    value_loss = self._value_loss(experience, out, packed, rows, scale)
                    self.strategy.update(self.engine, self.ppo.value_coef * value_loss, last)
            counted = mask.sum()
            share = tokens / self.strategy.world_size
            add(sums, "tokens", counted)
            add(sums, "policy_loss", policy_loss * share)
            add(sums, "value_loss", value_loss * share)
            add(sums, "clip_fraction", actor.clipped * counted)
            add(sums, "entropy", (entropy * mask).sum())
            if moment[1] == 0 and k == 0 and not self.recompute:
                # Before the first update of the batch the ratio is 1 but for rounding (and dropout).
                sums.setdefault("sampling_mismatch", (logprobs.detach() - experience.logprobs[rows])[mask].abs().sum())
                sums.setdefault("mismatch_tokens", counted)

    def _actor_loss(
        self, experience: Experience, out: dict[str, Tensor], packed: Pack, rows: list[int], scale: dict[str, Any]
    ) -> ActorLoss:
        mask, width = experience.mask[rows], experience.mask.shape[1]
        logprobs, entropy = (pad_rows(out[name], packed.lengths, width) for name in ("logprobs", "entropy"))
        policy_loss, clipped, *_ = self.policy_loss(
            logprobs, experience.logprobs[rows], experience.advantages[rows], mask, **scale
        )
        loss = policy_loss
        if self.ppo.entropy_coef > 0:
            bonus = (entropy * mask).sum() / scale["batch_num_tokens"] * self.strategy.world_size
            loss = loss - self.ppo.entropy_coef * bonus
        return ActorLoss(logprobs, entropy, policy_loss, clipped, loss)

    def _value_loss(
        self, experience: Experience, out: dict[str, Tensor], packed: Pack, rows: list[int], scale: dict[str, Any]
    ) -> Tensor:
        values = pad_rows(out["values"], packed.lengths, experience.mask.shape[1])
        return self.value_loss(
            values, experience.values[rows], experience.targets[rows], experience.mask[rows], **scale
        )

    # ------------------------------------------------------------------------------------ numbers that are none

    def debug_snapshot(self) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
        """The samples of the iteration in work, and what is known of them: (B, ...)."""
        experience = self._experience
        if experience is None:
            return [], {}
        records = [
            debug_record(example, experience.prompts[slot], experience.texts[slot], experience.samples[slot])
            for slot, example in enumerate(experience.examples)
        ]
        known = {name: getattr(experience, name) for name in (*EXPERIENCE_TENSORS, "mask")}
        return records, {name: tensor for name, tensor in known.items() if len(tensor) == len(records)}

    def restore_snapshot(self, records: Sequence[dict[str, Any]], tensors: dict[str, Tensor]) -> None:
        """Take what `debug_snapshot` gave as the iteration in work."""
        self._packs.clear()
        self._experience = Experience(
            examples=[],
            samples=[Sample(r["prompt_ids"], r["response_ids"]) for r in records],
            texts=[r["response"] for r in records],
            prompts=[r["prompt"] for r in records],
            lengths=[len(r["response_ids"]) for r in records],
            **tensors,
        )

    def per_sample_losses(self, slot: int) -> dict[Role, Callable[[], Tensor]]:
        """The losses of one sample of the iteration in work, alone, by the role that each must be computed in."""
        experience = self._experience
        assert experience is not None
        packed, rows = self._pack(experience, (slot,)), [slot]
        scale = {"dp_size": 1, "batch_num_tokens": experience.mask[rows].sum().float()}

        def actor() -> Tensor:
            out = self.policy(packed, entropy=self.entropy)
            loss = self._actor_loss(experience, out, packed, rows, scale).loss
            if self.ppo.critic == "shared":
                loss = loss + self.ppo.value_coef * self._value_loss(experience, out, packed, rows, scale)
            return loss

        def critic() -> Tensor:
            return self._value_loss(experience, self.policy(packed, logprobs=False), packed, rows, scale)

        return {"actor": actor} if self.ppo.critic == "shared" else {"actor": actor, "critic": critic}

    # ---------------------------------------------------------------------------------------------- 6 log

    def summarise(
        self, experience: Experience, sums: dict[str, Tensor], step: int, clock: Clock
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Metrics over all ranks, and the samples' records in batch order; steers the KL coefficient."""
        kl_coef = self.kl_controller.value
        records: list[dict[str, Any]] = []
        kl = experience.kl.sum(1).tolist()
        for slot, example in enumerate(experience.examples):
            text, score, tokens = experience.texts[slot], float(experience.scores[slot]), experience.lengths[slot]
            records.append(rollout_record(example, experience.prompts[slot], text, score, kl[slot], tokens))
        by_rank = self.strategy.gather(records)
        records = [by_rank[i % len(by_rank)][i // len(by_rank)] for i in range(sum(map(len, by_rank)))]
        names = sorted(sums)
        totals = dict(
            zip(names, self.strategy.sum(torch.stack([sums[n].float() for n in names])).tolist(), strict=True)
        )
        mean_kl = sum(r["kl"] for r in records) / len(records)
        if self.ppo.kl.init > 0:
            self.kl_controller.update(mean_kl, len(records))
        metrics = batch_metrics(records, {example.task.name: example.task for example in self.order.examples})
        tokens = totals["tokens"]
        response_tokens = sum(r["tokens"] for r in records)
        mismatch_tokens = totals.get("mismatch_tokens", response_tokens)
        seconds = sum(clock.seconds.values())
        metrics |= {
            "kl": mean_kl if self.ppo.kl.init > 0 else None,
            "kl_coef": kl_coef,
            "policy_loss": totals["policy_loss"] / tokens,
            "value_loss": totals["value_loss"] / tokens,
            "entropy": totals["entropy"] / tokens,
            "clip_fraction": totals["clip_fraction"] / tokens,
            "sampling_mismatch": totals["sampling_mismatch"] / mismatch_tokens,
            "grad_norm": self.strategy.get_grad_norm(self.engine),
            "lr": self.engine.get_lr()[0],
            "response_tokens": response_tokens / len(records),
            **self.sampler.metrics,
            "seconds": clock.seconds,
            "samples_per_s": len(records) / seconds,
        }
        return {"step": step + 1, "samples": (step + 1) * self.order.batch_size} | metrics, records


def training_request(ids: Sequence[int], seed: int, step: int, row: int, low: int, high: int) -> GenerationRequest:
    """What a row of a batch asks for: its budget, uniform in [low, high] (section 5.1), and its random numbers."""
    draw, uniforms = random_numbers(seed, TRAINING, step, row, high)
    return GenerationRequest(ids, low + int(draw * (high - low + 1)), uniforms)


def summary_line(metrics: dict[str, Any]) -> str:
    """Reward, accuracy, format errors, KL, answer shares and throughput of one iteration."""
    shares_of_answers = " ".join(f"{name} {share:.0%}" for name, share in metrics["predicted_shares"].items())
    kl = "-" if metrics["kl"] is None else f"{metrics['kl']:.2f}"
    accuracy = "" if metrics["accuracy"] is None else f"acc {metrics['accuracy']:.2f}  "
    return (
        f"reward {metrics['reward_mean']:+.2f}  {accuracy}wrong format {metrics['format_error_rate']:.0%}  "
        f"kl {kl}  {shares_of_answers}  {metrics['samples_per_s']:.1f} samples/s"
    )


def rollout_record(
    example: Example, prompt: str, response: str, reward: float, kl: float, tokens: int
) -> dict[str, Any]:
    """A sample in rollouts.jsonl, and for the metrics of its batch."""
    return {
        "task": example.task.name,
        "index": example.index,
        "prompt": prompt,
        "response": response,
        "answer": parse_answer(response, example.task),
        "gold": example.label,
        "reward": reward,
        "kl": kl,
        "tokens": tokens,
    }


def debug_record(example: Example, prompt: str, response: str, sample: Sample) -> dict[str, Any]:
    """A sample of a failed batch, for `nlu replay`."""
    return {
        "task": example.task.name,
        "index": example.index,
        "gold": example.label,
        "prompt": prompt,
        "response": response,
        "prompt_ids": list(sample.prompt),
        "response_ids": list(sample.response),
    }


def batch_metrics(records: Sequence[dict[str, Any]], tasks: dict[str, Any]) -> dict[str, Any]:
    """Rewards, format errors, accuracy and label shares of a batch; accuracy is over the classification samples."""
    rewards = torch.tensor([r["reward"] for r in records])
    judged = [r for r in records if not tasks[r["task"]].is_regression]
    present = sorted({r["task"] for r in records})
    predicted: dict[str, float] = {}
    for name in present:
        own = [r["answer"] for r in judged if r["task"] == name]
        if own:
            prefix = f"{name}: " if len(tasks) > 1 else ""
            predicted |= {f"{prefix}{word}": share for word, share in shares(tasks[name], own).items()}
    return {
        "reward_mean": float(rewards.mean()),
        "reward_std": float(rewards.std(correction=0)),
        "reward_by_task": {
            n: float(torch.tensor([r["reward"] for r in records if r["task"] == n]).mean()) for n in present
        },
        "format_error_rate": sum(r["answer"] is None for r in records) / len(records),
        "accuracy": sum(r["answer"] == r["gold"] for r in judged) / len(judged) if judged else None,
        "predicted_shares": predicted,
    }
