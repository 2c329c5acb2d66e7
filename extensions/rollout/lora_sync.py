"""LoRA sync: sends the trained adapter to vLLM engines and checks that they compute what the trainer computes.

The base is frozen, so a sync sends only the adapter, as a new LoRA request with a new id, which no cached prefix of an
older version can serve. OpenRLHF's own weight sync cannot do that (its issues 546, 991, 1349; checked with 0.11.2):
the names of adapter weights have no target in the engine.

Every sync is verified on the tokens of some training rows:

- Before the first one a random adapter is sent, and engine and trainer must agree on it. A fresh adapter computes zero
  and would hide a layer without a target or a wrong scale.
- After each sync they must agree on the policy, within `vllm.probe_tolerance`.
- If the trainer's adapter has changed, the engine's logprobs must have changed too. A sync that delivers nothing looks
  like a slightly stale policy (verl's issue 7495).
"""

from __future__ import annotations

import hashlib
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from extensions.data import Example
from extensions.model.policy import Policy
from extensions.prefix.logprobs import mean_and_worst
from extensions.prefix.tree import Sample, micro_batches, pack
from extensions.prompts import PromptEncoder

PROBED_PROMPT_TOKENS = 64  # at the end of a prompt, compared besides those of the right answer
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1}  # nats, mean over the probed tokens
LORA_FILES = ("adapter_config.json", "adapter_model.safetensors")
RANDOM_B_STD = 0.02  # of the random adapter's B matrices; moves a logprob by about one nat


class SyncError(Exception):
    """A vLLM engine does not compute what the trainer's policy computes; the message gives the difference."""


@dataclass(frozen=True)
class LoraPayload:
    """One version of the adapter as it is sent to the vLLM engines: the two files of PEFT's format."""

    version: int  # of the weights: 1, 2, ...
    config: bytes  # adapter_config.json
    weights: bytes  # adapter_model.safetensors

    @staticmethod
    def of(policy: Policy, state: dict[str, Tensor], version: int) -> LoraPayload:
        """The payload of a policy's adapter.

        Args:
            state: all trained parameters, unsharded (`strategy.trainable_state`).
        """
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            policy.save_adapter(folder, state)
            config, weights = ((folder / file).read_bytes() for file in LORA_FILES)
        return LoraPayload(version, config, weights)

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.weights).hexdigest()

    def write(self, folder: Path) -> None:
        """Write the files from which an engine reads them."""
        for file, content in zip(LORA_FILES, (self.config, self.weights), strict=True):
            (folder / file).write_bytes(content)


def random_lora_state(state: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """The trained parameters with random B matrices in their adapters; in a fresh adapter they are zero."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(tensor.shape, generator=generator).to(tensor) * RANDOM_B_STD if ".lora_B." in name else tensor
        for name, tensor in state.items()
    }


# ----------------------------------------------------------------------------------------------------- the probe


def probe_samples(examples: Sequence[Example], encoder: PromptEncoder, count: int) -> list[Sample]:
    """The probed tokens: the ends of `count` training prompts with their right answers, as responses."""
    samples = []
    for example in examples[:: max(1, len(examples) // count)][:count]:
        ids, text = encoder.encode(example.task, example.fields)
        answer = encoder.answer_ids(ids, text, example.task.answer(str(example.label)))
        start = max(1, len(ids) - PROBED_PROMPT_TOKENS)
        samples.append(Sample(ids[:start], [*ids[start:], *answer]))
    return samples


def response_logprobs(
    policy: Policy, samples: Sequence[Sample], micro_batch_size: int, temperature: float = 1.0
) -> list[float]:
    """Logprobs of all response tokens, in the order of the samples, under the policy's current role."""
    by_row: dict[int, list[float]] = {}
    with torch.no_grad():
        for rows in micro_batches(samples, range(len(samples)), micro_batch_size):
            packed = pack([samples[i] for i in rows], policy.device)
            flat = policy(packed, values=False, temperature=temperature)["logprobs"].cpu()
            by_row |= {i: part.tolist() for i, part in zip(rows, flat.split(packed.lengths), strict=True)}
    return [value for i in range(len(samples)) for value in by_row[i]]


class SyncProbe:
    """Compares vLLM engines and trainer after each sync.

    Args:
        dtype: of the base.
        tolerance: recipe key vllm.probe_tolerance; None takes the default of `dtype`.
        warn: called once, instead of an error, where sampled tokens differ by more, since the update corrects it.
    """

    def __init__(self, dtype: torch.dtype, tolerance: float | None, warn: Callable[[str], None] | None = None) -> None:
        self.warn = warn
        self.dtype, self.tolerance = dtype, TOLERANCE[dtype] if tolerance is None else tolerance
        self._last: tuple[str, list[list[float]]] | None = None  # digest of the adapter, logprobs per engine

    def check(
        self, digest: str, trainer: Sequence[float], engines: Sequence[Sequence[float]], what: str
    ) -> dict[str, Any]:
        """Metrics of a sync.

        Args:
            digest: of the adapter that was sent.
            trainer: logprobs of the probed tokens, by the trainer.
            engines: the same, by each vLLM engine.
            what: name of the payload, for the error message.

        Raises:
            SyncError: they differ by more than the tolerance, or a new adapter changed nothing in an engine.
        """
        expected = torch.tensor(trainer)
        differences = [mean_and_worst(expected, torch.tensor(engine)) for engine in engines]
        for number, (mean, worst) in enumerate(differences):
            if not mean <= self.tolerance:  # NaN too
                raise SyncError(
                    f"after {what} was sent, vLLM engine {number} and the trainer differ by {mean:.2g} nats per token "
                    f"on average (at most {worst:.2g}) over {len(trainer)} probed tokens, more than "
                    f"{self.tolerance:g} (vllm.probe_tolerance): the engine does not sample from the policy in "
                    "training. Nothing was updated from its samples"
                )
        if self._last is not None and self._last[0] != digest and self.dtype == torch.float32:
            # In bfloat16 rounding may hide a small update.
            for number, (old, new) in enumerate(zip(self._last[1], engines, strict=True)):
                if old == list(new):
                    raise SyncError(
                        f"after {what} was sent, the logprobs of vLLM engine {number} are bit-identical to those of "
                        f"the adapter before it, on {len(trainer)} probed tokens: the sync delivered nothing"
                    )
        self._last = (digest, [list(engine) for engine in engines])
        means, worsts = zip(*differences, strict=True)
        return {"probe_mean": max(means), "probe_max": max(worsts), "probe_tokens": len(trainer)}

    def check_samples(self, mismatch: float) -> None:
        """Check the sampled tokens before the update.

        Args:
            mismatch: mean absolute difference of their logprobs by engine and trainer, in nats per token.

        Raises:
            SyncError: it exceeds the tolerance and is not corrected, or it is NaN.
        """
        if mismatch > self.tolerance and self.warn is not None:
            self.warn(
                f"the logprobs of the sampled tokens differ by {mismatch:.2g} nats per token between vLLM and the "
                f"trainer, more than {self.tolerance:g} (vllm.probe_tolerance), though the same weights are in both: "
                "rounding. Each token is weighted for it (vllm.is_correction); model.dtype=float32 would remove it"
            )
            self.warn = lambda message: None
        elif not mismatch <= self.tolerance:
            raise SyncError(
                f"the logprobs of the sampled tokens differ by {mismatch:.2g} nats per token between vLLM and the "
                f"trainer, more than {self.tolerance:g} (vllm.probe_tolerance): the samples are not from the policy in "
                "training. Nothing was updated from them. Of rounding alone, vllm.is_correction=clip corrects it"
            )


# ------------------------------------------------------------------------------------------------------ the sync


class LoraSync(ABC):
    """Keeps vLLM engines at the policy's weights and probes them. Subclasses connect the two."""

    def __init__(self, probe: SyncProbe) -> None:
        self.probe = probe
        self.version, self.digest = 0, ""  # of the adapter in the engines
        self.metrics: dict[str, Any] = {}  # of the last sync

    def refresh(self) -> None:
        """Send the adapter unless the engines have it. Call it on every rank.

        Raises:
            SyncError: an engine does not compute what the policy computes.
        """
        if not self.digest:
            with self.random_adapter():
                self._send("a random adapter")
        self._send(f"version {self.version + 1} of the adapter")

    def _send(self, what: str) -> None:
        payload = self.payload(self.version + 1)
        if payload.digest == self.digest:
            return
        self.deliver(payload)
        self.version, self.digest = payload.version, payload.digest
        self.metrics = self.probe.check(self.digest, self.trainer_logprobs(), self.engine_logprobs(), what)

    @abstractmethod
    def random_adapter(self) -> AbstractContextManager[None]:
        """Gives the policy a random adapter (`random_lora_state`) inside the context."""

    @abstractmethod
    def payload(self, version: int) -> LoraPayload:
        """The policy's adapter."""

    @abstractmethod
    def deliver(self, payload: LoraPayload) -> None:
        """Load it into all engines."""

    @abstractmethod
    def trainer_logprobs(self) -> list[float]:
        """Logprobs of the probed tokens, by the policy."""

    @abstractmethod
    def engine_logprobs(self) -> list[list[float]]:
        """The same, by each engine."""
