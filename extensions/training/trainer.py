"""What the two training loops share: the clock of an iteration's phases, seeds, sums for the metrics."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from extensions.distributed import watchdog
from extensions.distributed.strategy import load_trainable_state, trainable_state
from extensions.model.policy import Policy, Role


class Trainer(Protocol):
    """What a run asks of a training loop."""

    policy: Policy
    engine: Any  # DeepSpeed's, around the policy

    def iterate(self, step: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """One iteration: its metrics, and a record for each sample where there are responses; same on all ranks."""

    def summary_line(self, metrics: dict[str, Any]) -> str:
        """The metrics of one iteration in one line for the console."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold besides the engine's state; JSON."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Put back what `state` gave."""

    def weights(self) -> dict[str, Tensor]:
        """All trained parameters, whole, on the CPU. Call it on every rank."""

    def load_weights(self, state: dict[str, Tensor]) -> None:
        """Put back what `weights` gave. Call it on every rank."""

    def save(self, adapter: Path, critic: Path, state: dict[str, Tensor]) -> None:
        """Write `state` in PEFT's format, and the critic if there is one, each into its folder."""

    def debug_snapshot(self) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
        """This rank's samples of the iteration in work, and what is known of them, each (B, ...)."""

    def restore_snapshot(self, records: Sequence[dict[str, Any]], tensors: dict[str, Tensor]) -> None:
        """Take what `debug_snapshot` gave as the iteration in work."""

    def per_sample_losses(self, slot: int) -> dict[Role, Callable[[], Tensor]]:
        """The losses of one of these samples, alone, by the role that each must be computed in."""


class LocalPolicyMixin:
    """What a training loop keeps in a policy of this process."""

    policy: Policy

    def weights(self) -> dict[str, Tensor]:
        return trainable_state(self.policy)

    def load_weights(self, state: dict[str, Tensor]) -> None:
        load_trainable_state(self.policy, state)

    def save(self, adapter: Path, critic: Path, state: dict[str, Tensor]) -> None:
        self.policy.save_adapter(adapter, state)
        self.policy.save_critic(critic, state)


@dataclass
class Clock:
    """Seconds by phase of an iteration; work that a GPU was given in a phase counts to it."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        watchdog.heartbeat()
        start = time.perf_counter()
        try:
            yield
        finally:
            if self.device.type != "cpu":
                torch.accelerator.synchronize()
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start


def add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    """Add to a sum of a metric."""
    value = value.detach().float()
    sums[name] = sums[name] + value if name in sums else value


def mixed_seed(*parts: int) -> int:
    """One seed from several numbers, by a fixed mixing."""
    mixed = 0
    for part in parts:
        mixed = (mixed * 1_000_003 + part + 1) % (2**63)
    return mixed
