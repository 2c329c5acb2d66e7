"""Numbers that are none: found before they reach the weights, and the batch left in the run folder for `nlu replay`.

failed/step-N/
    rank-K.json           what was found, and the samples of rank K: task, row, token ids, text, reward
    rank-K.safetensors    what the iteration knew of them: logprobs, values, advantages, ...; (B, T) each
    weights.safetensors   the trained parameters, as they were before the update that did not happen
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from extensions.common.files import apply_umask, write_json


@dataclass(frozen=True)
class NonFiniteTensor:
    """A tensor with NaN or infinity in it, and the samples that it is of."""

    tensor: str
    slots: list[int]  # of the rank's batch
    found: str  # "NaN" or "infinity"


class NonFiniteError(Exception):
    """A tensor of this or another rank is not finite; the weights have not been touched.

    Args:
        problems: of this rank; none where another rank has them.
    """

    def __init__(self, problems: Sequence[NonFiniteTensor]) -> None:
        super().__init__("; ".join(f"{p.tensor}: {p.found}, samples {p.slots}" for p in problems) or "another rank")
        self.problems = list(problems)

    def __reduce__(self) -> tuple[Any, ...]:  # it may come from another process
        return NonFiniteError, (self.problems,)


class NonFiniteCheck:
    """Notes on the device what is not finite, and asks for the notes once an update, so that nothing waits.

    Args:
        parameters: whose gradients are watched. A hook sees the gradient of one backward pass before DeepSpeed adds,
            partitions or offloads it, so it is the same at all ZeRO stages.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self._notes: list[tuple[str, Tensor, Sequence[int]]] = []
        self._slots: Sequence[int] = ()
        for name, parameter in parameters.items():
            parameter.register_hook(partial(self._gradient, name))

    def samples(self, slots: Sequence[int]) -> None:
        """The samples that the next tensors and gradients are of."""
        self._slots = slots

    def watch(self, name: str, values: Tensor) -> None:
        """A scalar, or a row for each of the samples: (B, ...)."""
        bad = values.detach()
        self._notes.append((name, bad.sum(tuple(range(1, bad.dim()))) if bad.dim() > 1 else bad, self._slots))

    def _gradient(self, name: str, gradient: Tensor) -> None:
        # A sum is not finite where a part of it is not, and takes one pass. (It may also overflow; that is no gradient
        # to use either.)
        self._notes.append((f"gradient of {name}", gradient.detach().sum(), self._slots))

    def check(self, total: Callable[[Tensor], Tensor]) -> None:
        """Raises NonFiniteError, on every rank, if something that was noted since the last check is not finite on any.

        Args:
            total: sum over the ranks.
        """
        notes, self._notes = self._notes, []
        sums = torch.stack([values.double().sum() for _, values, _ in notes])
        finite = torch.isfinite(sums)
        if float(total((~finite).any().float())) == 0:
            return
        problems = []
        for (name, values, slots), fine in zip(notes, finite.tolist(), strict=True):
            if not fine:
                bad = [slots[k] for k in (~torch.isfinite(values)).nonzero()[:, 0].tolist()] if values.dim() else slots
                kind = "NaN" if bool(torch.isnan(values).any()) else "infinity"
                problems.append(NonFiniteTensor(name, list(bad), kind))
        raise NonFiniteError(problems)


def leave(
    folder: Path,
    rank: int,
    problems: Sequence[NonFiniteTensor],
    samples: Sequence[dict[str, Any]],
    tensors: Mapping[str, Tensor],
    weights: Mapping[str, Tensor] | None,
) -> None:
    """Write this rank's part of a failed batch.

    Args:
        weights: from one rank; None from the others.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"rank-{rank}.json", {"problems": [asdict(p) for p in problems], "samples": list(samples)})
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, folder / f"rank-{rank}.safetensors")
    if weights is not None:
        save_file(dict(weights), folder / "weights.safetensors")
    apply_umask(folder)
