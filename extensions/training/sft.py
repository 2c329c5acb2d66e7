"""Supervised fine-tuning on LoRA adapters: section 4.2 of the paper, step by step.

1 pack    prompt, gold answer and closing tag of each sample of the batch, in the shared-prefix form
2 update  one pass of the next-token loss, over the whole sequences or over the answers
3 log

The run around it (data, evaluations, checkpoints) is `extensions.runs.training_run`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from extensions.data import BatchOrder, Example
from extensions.distributed import watchdog
from extensions.distributed.openrlhf import SFTLoss
from extensions.distributed.strategy import Strategy
from extensions.model.policy import Policy, Role
from extensions.prefix.limits import MemoryLimits
from extensions.prefix.tree import Pack, Sample, micro_batches, pack, with_sequence_targets
from extensions.prompts import PromptEncoder
from extensions.recipe import Sft
from extensions.training.trainer import Clock, LocalPolicyMixin, add, mixed_seed


class SftTrainer(LocalPolicyMixin):
    """The training loop over one batch order.

    Args:
        policy, engine: the policy, and the DeepSpeed engine around it.
        order: which examples make up each batch.
        sft: recipe section `sft`.
        limits: of memory, besides the rows of a micro-batch.
    """

    def __init__(
        self,
        policy: Policy,
        engine: Any,
        strategy: Strategy,
        encoder: PromptEncoder,
        order: BatchOrder,
        sft: Sft,
        seed: int,
        limits: MemoryLimits | None = None,
    ) -> None:
        self.limits = limits or MemoryLimits()
        self.policy, self.engine, self.strategy = policy, engine, strategy
        self.encoder, self.order, self.sft, self.seed = encoder, order, sft, seed
        self.loss = SFTLoss()
        self._batch: tuple[list[Example], list[Sample]] = ([], [])  # of the current iteration

    def state(self) -> dict[str, Any]:
        """Empty: the engine's state is complete."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        pass

    def iterate(self, step: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """One optimizer step. Returns its metrics, the same on all ranks; there are no responses to record."""
        clock = Clock(self.policy.device)
        self._batch = [], []
        batch = self.order.batch(step)[self.strategy.rank :: self.strategy.world_size]
        with clock("encode"):
            samples = [
                replace(sample, weight=self.order.weight(example))
                for example in batch
                for sample in self.encode(example)
            ]
            self._batch = batch, samples
        with clock("update"):
            sums = self.update(samples, step)
        return self.summarise(sums, step, clock), []

    def summary_lines(self, metrics: dict[str, Any]) -> tuple[str, str]:
        """Losses in nats per token, and throughput."""
        line = f"loss {metrics['loss']:.3f}  of the answer {metrics['answer_loss']:.3f}"
        return line, f"{metrics['samples_per_s']:.1f} samples/s"

    def encode(self, example: Example) -> list[Sample]:
        """`samples_per_example` samples: the prompt, and the gold answer with its closing tag as the response."""
        assert example.label is not None, "training examples are labelled"
        ids, text = self.encoder.encode(example.task, example.fields)
        answer = self.encoder.answer_ids(ids, text, example.task.answer(example.label))
        return [Sample(ids, answer)]

    def update(self, samples: Sequence[Sample], step: int) -> dict[str, Tensor]:
        """Gradients over the micro-batches, then one update. Returns this rank's sums over tokens, for the metrics.

        The loss is the mean over the target tokens of all samples of all ranks, weighted by sample, so micro-batches,
        ranks and shared prefixes do not change it, except for the dropout masks.
        """
        self.policy.train()
        sequence = self.sft.loss == "sequence"
        targets = [len(s.response) + (len(s.prompt) - 1 if sequence else 0) for s in samples]
        weighted = sum(sample.weight * count for sample, count in zip(samples, targets, strict=True))
        tokens = self.strategy.sum(torch.tensor(float(weighted), device=self.policy.device))
        sums = self.limits.attempt(
            partial(self._optimizer_step, samples, step, tokens), partial(self.strategy.discard, self.engine)
        )
        return sums | {"target_tokens": torch.tensor(float(sum(targets)), device=self.policy.device)}

    def _optimizer_step(self, samples: Sequence[Sample], step: int, tokens: Tensor) -> dict[str, Tensor]:
        """Gradients over the micro-batches of a batch with `tokens` weighted targets on all ranks, then one update."""
        chunks = micro_batches(samples, range(len(samples)), self.limits.of(self.sft.micro_batch_size))
        sums: dict[str, Tensor] = {}
        for k, chunk in enumerate(chunks):
            watchdog.heartbeat()
            packed = self._pack(samples, chunk)
            self.strategy.nonfinite.samples(chunk)
            self.limits.running(len(chunk), packed.input_ids.shape[1])
            torch.manual_seed(mixed_seed(self.seed, step, k, self.strategy.rank))  # of the dropout masks
            with self.policy.role("actor"):
                logprobs = self.engine(packed, values=False, temperature=1.0)["logprobs"]
                loss = self.loss(logprobs, packed.weights, dp_size=self.strategy.world_size, batch_num_tokens=tokens)
                self.strategy.update(self.engine, loss, k == len(chunks) - 1)
            answer_tokens = sum(packed.lengths)
            add(sums, "loss", -(logprobs * packed.weights).sum())
            add(sums, "tokens", packed.weights.sum())
            add(sums, "answer_loss", -logprobs[:answer_tokens].sum())
            add(sums, "answer_tokens", torch.tensor(answer_tokens, device=logprobs.device))
        return sums

    def _pack(self, samples: Sequence[Sample], slots: Sequence[int]) -> Pack:
        """A pack of some examples' samples, with the targets of the loss."""
        count = self.sft.samples_per_example
        packing = [samples[slot * count + k] for slot in slots for k in range(count)]
        packed = pack(packing, self.policy.device)
        return with_sequence_targets(packed, packing) if self.sft.loss == "sequence" else packed

    def debug_snapshot(self) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
        """The samples of the current iteration, the first of each example."""
        examples, samples = self._batch
        records = [
            {
                "task": example.task.name,
                "index": example.index,
                "gold": example.label,
                "prompt_ids": list(sample.prompt),
                "response_ids": list(sample.response),
                "weight": sample.weight,
            }
            for example, sample in zip(examples, samples[:: self.sft.samples_per_example], strict=True)
        ]
        return records, {}

    def restore_snapshot(self, records: Sequence[dict[str, Any]], tensors: dict[str, Tensor]) -> None:
        """Set the current iteration to what `debug_snapshot` returned."""
        self._batch = [], [Sample(r["prompt_ids"], r["response_ids"], r.get("weight", 1.0)) for r in records]

    def per_sample_losses(self, slot: int) -> dict[Role, Callable[[], Tensor]]:
        """The loss of one sample of the current iteration, alone."""
        packed = self._pack(self._batch[1], [slot])

        def actor() -> Tensor:
            logprobs = self.policy(packed, values=False, temperature=1.0)["logprobs"]
            return self.loss(logprobs, packed.weights, dp_size=1, batch_num_tokens=packed.weights.sum())

        return {"actor": actor}

    def summarise(self, sums: dict[str, Tensor], step: int, clock: Clock) -> dict[str, Any]:
        """Metrics over all ranks."""
        samples = self.order.batch_size
        return {
            "step": step + 1,
            "samples": (step + 1) * samples,
            **self._losses(sums),
            "grad_norm": self.strategy.get_grad_norm(self.engine),
            "lr": self.engine.get_lr()[0],
            "seconds": clock.seconds,
            "samples_per_s": samples / sum(clock.seconds.values()),
        }

    def _losses(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """Mean losses of a batch in nats per token, over all targets weighted, over answers unweighted."""
        names = ("loss", "tokens", "answer_loss", "answer_tokens", "target_tokens")
        loss, tokens, answer_loss, answer_tokens, targets = self.strategy.sum(
            torch.stack([sums[n] for n in names])
        ).tolist()
        return {
            "loss": loss / tokens,
            "answer_loss": answer_loss / answer_tokens,
            "target_tokens": targets / self.order.batch_size,
        }
