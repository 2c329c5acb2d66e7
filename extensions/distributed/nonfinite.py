"""Detection of NaN and infinity before they reach the weights, with one device synchronisation per update."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class NonFiniteTensor:
    """A tensor that contains NaN or infinity, and the samples that it belongs to."""

    tensor: str
    slots: list[int]  # positions in the rank's batch
    found: str  # "NaN" or "infinity"


class NonFiniteError(Exception):
    """A tensor of this or another rank is non-finite; the weights are not updated.

    Args:
        problems: those of this rank; empty if only other ranks have non-finite tensors.
    """

    def __init__(self, problems: Sequence[NonFiniteTensor]) -> None:
        super().__init__("; ".join(f"{p.tensor}: {p.found}, samples {p.slots}" for p in problems) or "another rank")
        self.problems = list(problems)

    def __reduce__(self) -> tuple[Any, ...]:  # Ray pickles it
        return NonFiniteError, (self.problems,)


class NonFiniteCheck:
    """Records sums of tensors on the device, and reads them once per update, to avoid device synchronisation.

    Args:
        parameters: parameters whose gradients are checked. A hook gets the gradient of one backward pass before
            DeepSpeed accumulates, partitions or offloads it, so the check is the same at all ZeRO stages.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        # Name, values (a scalar, or one per sample) that are non-finite if the tensor is, and its samples.
        self._records: list[tuple[str, Tensor, Sequence[int]]] = []
        self._slots: Sequence[int] = ()
        for name, parameter in parameters.items():
            parameter.register_hook(partial(self._gradient, name))

    def forget(self) -> None:
        """Drop what was recorded since the last check."""
        self._records = []

    def samples(self, slots: Sequence[int]) -> None:
        """Set the samples that the next tensors and gradients belong to."""
        self._slots = slots

    def watch(self, name: str, values: Tensor) -> None:
        """Record a scalar, or one row per sample: (B, ...)."""
        values = values.detach()
        self._records.append((name, values.flatten(1).sum(1) if values.dim() > 1 else values, self._slots))

    def _gradient(self, name: str, gradient: Tensor) -> None:
        # A sum is non-finite if one of its terms is, and takes one pass. (It may also overflow, but such a gradient is
        # unusable too.)
        self._records.append((f"gradient of {name}", gradient.detach().sum(), self._slots))

    def check(self, total: Callable[[Tensor], Tensor]) -> None:
        """Check everything that was recorded since the last check.

        Args:
            total: function that sums a tensor over the ranks.

        Raises:
            NonFiniteError: on every rank, if a record is non-finite on any rank.
        """
        records, self._records = self._records, []
        sums = torch.stack([values.double().sum() for _, values, _ in records])
        finite = torch.isfinite(sums)
        if float(total((~finite).any().float())) == 0:
            return
        problems = []
        for (name, values, slots), fine in zip(records, finite.tolist(), strict=True):
            if not fine:
                bad = [slots[k] for k in (~torch.isfinite(values)).nonzero()[:, 0].tolist()] if values.dim() else slots
                kind = "NaN" if bool(torch.isnan(values).any()) else "infinity"
                problems.append(NonFiniteTensor(name, list(bad), kind))
        raise NonFiniteError(problems)
