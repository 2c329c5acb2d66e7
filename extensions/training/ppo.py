"""PPO on LoRA adapters with a rule-based reward: section 4.3 of the paper, step by step.

1 sample    `samples_per_prompt` responses to each prompt of the batch
2 reward    the rule on the text, given at the last token
3 reference logprobs of the policy that training started from; per-token KL
4 advantage GAE, or the comparison of the responses to a prompt (`Experience.estimate_advantages`)
5 update    `epochs` passes of the clipped policy and value losses
6 log

A batch passes through five files: this one, `rollout/sampler` (responses), `prefix/tree` (samples as one packed
row), `model/policy` (its forward) and `losses`. The run around it (data, evaluations, checkpoints) is
`extensions.runs`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from extensions.data import BatchOrder, Example
from extensions.distributed import watchdog
from extensions.distributed.openrlhf import AdaptiveKLController, FixedKLController, compute_approx_kl
from extensions.distributed.strategy import Strategy
from extensions.model.policy import Policy, Role
from extensions.prefix.limits import MemoryLimits
from extensions.prefix.logprobs import Entropy
from extensions.prefix.tree import Pack, Sample
from extensions.prompts import PromptEncoder, parse_answer
from extensions.recipe import Ppo, Vllm
from extensions.rollout.rewards import Reward
from extensions.rollout.sampler import Sampler, training_request
from extensions.training.experience import Experience, MicroBatch, TokenIndex
from extensions.training.losses import PpoLosses, Scale
from extensions.training.records import batch_metrics, debug_record, rollout_record, summary_lines
from extensions.training.trainer import Clock, LocalPolicyMixin, add, mixed_seed


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
        correction: Vllm | None = None,
    ) -> None:
        self.limits = limits or MemoryLimits()
        self.policy, self.engine, self.strategy, self.sampler = policy, engine, strategy, sampler
        self.encoder, self.reward, self.order, self.ppo, self.seed = encoder, reward, order, ppo, seed
        self.budgets = budgets
        self.entropy: Entropy = "differentiable" if ppo.entropy_coef > 0 else "number"
        self.losses = PpoLosses(ppo, correction)
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
        self.one_forward = not dropout and ppo.mini_batch_size is None and ppo.value_model != "adapter"
        self._first_forward: dict[str, Tensor] | None = None  # with its graph

    def state(self) -> dict[str, Any]:
        """State for a checkpoint besides the engine's."""
        return {"kl_coef": self.kl_controller.value, "kl_init": self.ppo.kl.init}

    def load_state(self, state: dict[str, Any]) -> None:
        if state["kl_init"] == self.ppo.kl.init:  # a fork may start it anew
            self.kl_controller.value = state["kl_coef"]

    def iterate(self, step: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """One PPO iteration. Returns its metrics and one record per sample of the batch; empty except on rank 0."""
        clock = Clock(self.policy.device)
        batch = self.order.batch(step)[self.strategy.rank :: self.strategy.world_size]
        experience = self._experience = self.rollout(batch, step, clock)
        with clock("reference"):
            mismatch = self.compute_old_and_reference_logprobs(experience)
            experience.estimate_advantages(self.ppo, self.kl_controller.value, self.strategy.sum)
        experience.watch(self.strategy.nonfinite)
        with clock("update"):
            losses = self.update(experience, step)
        return self.summarise(experience, losses | mismatch, step, clock)

    def summary_lines(self, metrics: dict[str, Any]) -> tuple[str, str]:
        return summary_lines(metrics)

    # --------------------------------------------------------------------------------- 1 sample, 2 reward

    def rollout(self, batch: Sequence[Example], step: int, clock: Clock) -> Experience:
        """Scored responses; prompts whose rewards are all equal are sampled again as often as the recipe says."""
        self._experience = None

        def scored(prompts: Sequence[int], attempt: int) -> Experience:
            with clock("rollout"):
                found = self.sample(batch, step, prompts, attempt)
            self._experience = self._experience or found  # if the reward fails, for the record of the batch
            with clock("reward"):
                scores = self.reward(found.texts, found.prompts, found.examples, found.answers)
                found.scores = torch.tensor(scores, dtype=torch.float32, device=self.policy.device)
            return found

        experience = scored(range(len(batch)), 0)
        for attempt in range(1, self.ppo.resample_equal_groups + 1):
            again = experience.equal_groups.nonzero()[:, 0].tolist()
            if not bool(self.strategy.sum(torch.tensor([float(len(again))], device=self.policy.device))):
                break
            if again:
                experience = experience.replaced(again, scored(again, attempt))
        return experience

    def sample(self, batch: Sequence[Example], step: int, prompts: Sequence[int], attempt: int = 0) -> Experience:
        """Responses of the current policy, with the logprobs and values that sampling computes anyway.

        Args:
            batch: this rank's share of the batch.
            prompts: places of the examples in `batch` to sample.
            attempt: 0, or the number of the resampling, which draws other random numbers.
        """
        k, requests, texts = self.ppo.samples_per_prompt, [], []
        for slot in prompts:
            ids, text = self.encoder.encode(batch[slot].task, batch[slot].fields)
            row = slot * self.strategy.world_size + self.strategy.rank
            budget = self.budgets[batch[slot].task.name]
            requests += [training_request(ids, self.seed, step, row * k + j, budget, attempt) for j in range(k)]
            texts += [text] * k
        with self.sampler.session():
            responses = self.sampler.sample(requests)
        examples = [batch[slot] for slot in prompts for _ in range(k)]
        index = TokenIndex([len(response.tokens) for response in responses], self.policy.device)
        return Experience(
            examples=examples,
            prompts=texts,
            samples=[Sample(q.prompt, r.tokens) for q, r in zip(requests, responses, strict=True)],
            texts=[response.text for response in responses],
            answers=[parse_answer(r.text, example.task) for r, example in zip(responses, examples, strict=True)],
            index=index,
            logprobs=torch.cat([response.logprobs for response in responses]),
            values=torch.cat([response.values for response in responses]),
            kl=torch.zeros(len(index.sample), device=self.policy.device),
            weights=torch.tensor([self.order.weight(example) for example in examples], device=self.policy.device),
            samples_per_prompt=k,
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
                experience.sampled = experience.logprobs
            experience.logprobs = again["logprobs"]
            experience.values = again.get("values", experience.values)
        if self.ppo.value_model == "adapter":
            experience.values = self._forward_all(experience, "critic", logprobs=False)["values"]
        if self.ppo.kl.init > 0:
            reference = self._forward_all(experience, "reference", values=False)["logprobs"]
            experience.kl = compute_approx_kl(experience.logprobs, reference)
            if self.ppo.kl.use_loss:
                experience.reference = reference
        return sums

    def _old_policy(self, experience: Experience) -> dict[str, Tensor]:
        """Logprobs, and values of a shared critic, of the policy that sampled: (N,) each."""
        if not self.one_forward or len(self._micro_batches(experience, range(experience.num_prompts))) > 1:
            return self._forward_all(experience, "actor", values=self.ppo.value_model == "shared")

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
                for part in self._micro_batches(experience, range(experience.num_prompts)):
                    watchdog.heartbeat()
                    self._running(part)
                    for name, values in forward(part.pack).items():
                        flat = results.setdefault(name, values.new_zeros(len(experience.index.sample)))
                        flat[part.tokens] = values
            return results

        return self.limits.attempt(compute)

    def _micro_batches(self, experience: Experience, prompts: Sequence[int]) -> list[MicroBatch]:
        return experience.micro_batches(prompts, self.limits.of(self.ppo.micro_batch_size))

    def _running(self, part: MicroBatch) -> None:
        self.limits.running(len(part.slots) // self.ppo.samples_per_prompt, part.pack.input_ids.shape[1])

    # ------------------------------------------------------------------------------------------- 5 update

    def update(self, experience: Experience, step: int) -> dict[str, Tensor]:
        """Epochs of minibatch updates. Returns this rank's sums over response tokens, for the metrics."""
        self.policy.train()
        sums: dict[str, Tensor] = {}
        for epoch in range(self.ppo.epochs):
            for prompts in self._mini_batches(experience.num_prompts, step, epoch):
                moment = (step, epoch, prompts[0])
                sums = self.limits.attempt(
                    partial(self._optimizer_step, experience, prompts, moment, sums), self._discard
                )
        return sums

    def _discard(self) -> bool:
        """Discard a minibatch that failed for lack of memory; see `Strategy.discard`."""
        self._first_forward = None
        return self.strategy.discard(self.engine)

    def _mini_batches(self, count: int, step: int, epoch: int) -> list[list[int]]:
        """This rank's prompts, shuffled into minibatches; by default the whole batch is one."""
        if self.ppo.mini_batch_size is None:
            return [list(range(count))]
        size = self.ppo.mini_batch_size // self.strategy.world_size
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, step, epoch))
        prompts = torch.randperm(count, generator=generator).tolist()
        return [prompts[i : i + size] for i in range(0, count, size)]

    def _optimizer_step(
        self, experience: Experience, prompts: list[int], moment: tuple[int, ...], before: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Gradients over the micro-batches of a minibatch, then one update.

        Returns the sums of the metrics: those `before`, and its own.
        """
        slots = experience.slots(prompts)
        own_tokens = experience.kept[experience.index.tokens_of(slots)].sum()
        scale = Scale(self.strategy.sum(own_tokens), self.strategy.world_size)
        per_loss = scale.tokens / scale.ranks  # factor from a loss to the sum over its tokens
        if self.ppo.drop_equal_groups:
            k, first = experience.samples_per_prompt, experience.index.first
            kept = [prompt for prompt in prompts if experience.kept[first[prompt * k]] > 0]
            prompts = kept or prompts[:1]  # every rank has a forward
        parts = self._micro_batches(experience, prompts)
        sums = dict(before)
        shared, separate = (self.ppo.value_model == kind for kind in ("shared", "adapter"))
        for k, part in enumerate(parts):
            watchdog.heartbeat()
            last = k == len(parts) - 1
            torch.manual_seed(mixed_seed(self.seed, *moment, k, self.strategy.rank))  # of the dropout masks
            self.strategy.nonfinite.samples(part.slots)
            self._running(part)
            with self.policy.role("actor"):
                out = self._first_forward or self.engine(part.pack, entropy=self.entropy, values=shared)
                self._first_forward = None
                actor = self.losses.actor(experience, out, part, scale, self.kl_controller.value)
                loss = actor.loss
                if shared:
                    value_loss = self.losses.value(experience, out, part, scale)
                    loss = loss + self.ppo.value_coef * value_loss
                self.strategy.nonfinite.watch("logprobs of the update", part.sums(actor.logprobs))
                self.strategy.nonfinite.watch("entropy", part.sums(actor.entropy))
                self.strategy.update(self.engine, loss, last and not separate)
            if separate:
                with self.policy.role("critic"):
                    value_loss = self.losses.value(experience, self.engine(part.pack, logprobs=False), part, scale)
                    self.strategy.update(self.engine, self.ppo.value_coef * value_loss, last)
            weight = experience.kept[part.tokens]
            count = weight.sum()
            add(sums, "tokens", count)
            add(sums, "policy_loss", actor.policy_loss * per_loss)
            add(sums, "clip_fraction", actor.clip_fraction * count)
            if self.losses.corrects:
                add(sums, "is_fraction", actor.is_fraction * count)
            add(sums, "entropy", (actor.entropy * weight).sum())
            if shared or separate:
                add(sums, "value_loss", value_loss * per_loss)
            if self.ppo.kl.use_loss:
                add(sums, "kl_loss", actor.kl_loss * per_loss)
            if moment[1] == 0 and k == 0 and not self.recompute:
                # Before the first update of the batch the ratio is 1 up to rounding (and dropout).
                difference = (actor.logprobs.detach() - experience.logprobs[part.tokens]).abs().sum()
                sums.setdefault("sampling_mismatch", difference)
                sums.setdefault("mismatch_tokens", difference.new_tensor(len(part.tokens)))
        return sums

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
        flat: dict[str, Any] = {
            name: t if name == "scores" else index.flatten(t) for name, t in tensors.items() if name != "mask"
        }
        flat = {"kept": torch.ones(len(index.sample), device=self.policy.device)} | flat
        self._experience = Experience(
            examples=[],
            prompts=[r["prompt"] for r in records],
            samples=[Sample(r["prompt_ids"], r["response_ids"]) for r in records],
            texts=[r["response"] for r in records],
            answers=[],
            index=index,
            weights=torch.ones(len(records)),
            **flat,
        )

    def per_sample_losses(self, slot: int) -> dict[Role, Callable[[], Tensor]]:
        """The losses of one sample of the current iteration alone, keyed by the role under which each is computed."""
        experience = self._experience
        assert experience is not None
        part = experience.micro_batch([slot])
        scale = Scale(torch.tensor(float(experience.index.lengths[slot])), 1)
        shared, separate = (self.ppo.value_model == kind for kind in ("shared", "adapter"))

        def actor() -> Tensor:
            out = self.policy(part.pack, entropy=self.entropy)
            loss = self.losses.actor(experience, out, part, scale, self.kl_controller.value).loss
            return loss + self.ppo.value_coef * self.losses.value(experience, out, part, scale) if shared else loss

        def critic() -> Tensor:
            return self.losses.value(experience, self.policy(part.pack, logprobs=False), part, scale)

        return {"actor": actor, "critic": critic} if separate else {"actor": actor}

    # ---------------------------------------------------------------------------------------------- 6 log

    def summarise(
        self, experience: Experience, sums: dict[str, Tensor], step: int, clock: Clock
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Metrics over all ranks and records in batch order, on rank 0. Updates the KL coefficient, on all ranks."""
        kl_coef, names = self.kl_controller.value, sorted(sums)
        totals = dict(
            zip(names, self.strategy.sum(torch.stack([sums[n].float() for n in names])).tolist(), strict=True)
        )
        kl, device = experience.index.sums(experience.kl.double()), self.policy.device
        packed = sum(p.pack.input_ids.shape[1] for p in self._micro_batches(experience, range(experience.num_prompts)))
        logical = sum(len(sample.prompt) + len(sample.response) for sample in experience.samples)
        counted = torch.tensor([len(kl), int(experience.equal_groups.sum()), packed, logical], device=device)
        kl_sum, count, equal, packed, logical = self.strategy.sum(torch.cat([kl.sum()[None], counted])).tolist()
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
        ranks, responses, k = len(by_rank), sum(map(len, by_rank)), experience.samples_per_prompt
        prompts = responses // k
        records = [by_rank[n % ranks][n // ranks * k + j] for n in range(prompts) for j in range(k)]
        tokens, response_tokens = totals["tokens"], sum(r["tokens"] for r in records)
        seconds = sum(clock.seconds.values())
        metrics: dict[str, Any] = {
            "step": step + 1,
            "samples": (step + 1) * self.order.batch_size,
            **batch_metrics(records, {example.task.name: example.task for example in self.order.examples}),
            "equal_groups": equal / prompts if k > 1 else None,
            "kl": kl_sum / count if self.ppo.kl.init > 0 else None,
            "kl_coef": kl_coef,
            "policy_loss": totals["policy_loss"] / tokens,
            **{name: totals[name] / tokens for name in ("value_loss", "kl_loss", "is_fraction") if name in totals},
            "entropy": totals["entropy"] / tokens,
            "clip_fraction": totals["clip_fraction"] / tokens,
            "sampling_mismatch": totals["sampling_mismatch"] / totals.get("mismatch_tokens", response_tokens),
            "grad_norm": self.strategy.get_grad_norm(self.engine),
            "lr": self.engine.get_lr()[0],
            "response_tokens": response_tokens / responses,
            **self.sampler.metrics,
            "seconds": clock.seconds,
            "packed_tokens": int(packed),
            "logical_tokens": int(logical),
            "samples_per_s": prompts / seconds,
        }
        return metrics, records
