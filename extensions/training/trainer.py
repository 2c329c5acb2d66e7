"""The trainer interface of a run, and what the training loops share: phase timing, seeds, metric sums."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from extensions.data import BatchOrder
from extensions.distributed import watchdog
from extensions.distributed.strategy import load_trainable_state, trainable_state
from extensions.model.policy import Policy, Role


class Trainer(Protocol):
    """The interface between a run and a training loop."""

    policy: Policy
    engine: Any  # DeepSpeed's, around the policy
    order: BatchOrder

    def iterate(self, step: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """One iteration: its metrics, and one record per sample where there are responses. Rank 0's are used."""

    def summary_lines(self, metrics: dict[str, Any]) -> tuple[str, str]:
        """The metrics of one iteration for the console: the most important in at most 45 columns, and details."""

    def state(self) -> dict[str, Any]:
        """State for a checkpoint besides the engine's; JSON."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what `state` returned."""

    def weights(self) -> dict[str, Tensor]:
        """All trained parameters, unsharded, on the CPU. Call it on every rank."""

    def load_weights(self, state: dict[str, Tensor]) -> None:
        """Restore what `weights` returned. Call it on every rank."""

    def save(self, adapter: Path, critic: Path, state: dict[str, Tensor]) -> None:
        """Write `state` in PEFT's format, and the critic if there is one, each into its folder."""

    def debug_snapshot(self) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
        """This rank's samples of the current iteration, and their tensors so far, (B, ...) each."""

    def restore_snapshot(self, records: Sequence[dict[str, Any]], tensors: dict[str, Tensor]) -> None:
        """Set the current iteration to what `debug_snapshot` returned."""

    def per_sample_losses(self, slot: int) -> dict[Role, Callable[[], Tensor]]:
        """The losses of one of these samples alone, keyed by the role under which each is computed."""


class LocalPolicyMixin:
    """The weights of a training loop whose policy lives in this process."""

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
    """Seconds per phase of an iteration, including the GPU work launched in it."""

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
    """Add a value to the sum of a metric."""
    value = value.detach().float()
    sums[name] = sums[name] + value if name in sums else value


def mixed_seed(*parts: int) -> int:
    """One seed from several integers."""
    mixed = 0
    for part in parts:
        mixed = (mixed * 1_000_003 + part + 1) % (2**63)
    return mixed
