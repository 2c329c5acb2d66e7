"""A batch with non-finite values: written to the run folder before the run stops, explained, and read by `nlu replay`.

failed/step-N/
    rank-K.json           what was found, and the samples of rank K: task, row, token ids, text, reward
    rank-K.safetensors    the iteration's tensors of these samples: logprobs, values, advantages, ...; (B, T) each
    weights.safetensors   the trained parameters, not yet updated by this batch
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from extensions.common.errors import UserError
from extensions.common.files import apply_umask, read_json, write_json
from extensions.distributed import watchdog
from extensions.distributed.nonfinite import NonFiniteTensor
from extensions.distributed.strategy import Strategy
from extensions.training.trainer import Trainer

WEIGHTS = "weights.safetensors"


def write_part(
    folder: Path,
    rank: int,
    problems: Sequence[NonFiniteTensor],
    samples: Sequence[dict[str, Any]],
    tensors: Mapping[str, Tensor],
    weights: Mapping[str, Tensor] | None,
) -> None:
    """Write a rank's part of a failed batch.

    Args:
        weights: from one rank; None from the others.

    Raises:
        OSError: the disk refuses.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"rank-{rank}.json", {"problems": [asdict(p) for p in problems], "samples": list(samples)})
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, folder / f"rank-{rank}.safetensors")
    if weights is not None:
        save_file(dict(weights), folder / WEIGHTS)
    apply_umask(folder)


def read_parts(
    folder: Path,
) -> Iterator[tuple[int, list[dict[str, Any]], list[NonFiniteTensor], dict[str, Tensor]]]:
    """Rank, samples, problems and tensors of each part of a failed batch.

    Raises:
        UserError: the folder holds no failed batch.
    """
    ranks = sorted(int(path.stem.removeprefix("rank-")) for path in folder.glob("rank-*.json"))
    if not ranks:
        raise UserError(f"{folder}: holds no rank-0.json; name a folder RUN/failed/step-N that a stopped run left")
    for rank in ranks:
        content, tensors = read_json(folder / f"rank-{rank}.json"), load_file(folder / f"rank-{rank}.safetensors")
        yield rank, content["samples"], [NonFiniteTensor(**p) for p in content["problems"]], tensors


def write_and_explain(problems: Sequence[NonFiniteTensor], trainer: Trainer, strategy: Strategy, folder: Path) -> str:
    """Write the current batch, and name its non-finite tensors and their samples. Call it on every rank.

    Args:
        problems: of this rank; none where another rank has them.
        folder: of the batch.
    """
    weights = trainer.weights()
    samples, tensors = trainer.debug_snapshot()
    own_weights, lines, prefix = weights if strategy.is_rank_0() else None, [], f"  rank {strategy.rank}: "
    try:
        write_part(folder, strategy.rank, problems, samples, tensors, own_weights)  # the checks below may crash
        if strategy.stage != 3:  # there each forward is a collective of all ranks
            problems = _narrowed(problems, trainer)
            write_part(folder, strategy.rank, problems, samples, tensors, own_weights)
    except OSError as error:
        lines.append(f"{prefix}its part of the batch could not be written ({error.strerror})")
    for problem in problems[:3]:  # in the order of the computation, so the cause comes first
        named = [f"{slot} ({samples[slot]['task']}, row {samples[slot]['index']})" for slot in problem.slots[:4]]
        more = f" and {len(problem.slots) - 4} more" if len(problem.slots) > 4 else ""
        lines.append(f"{prefix}{problem.found} in {problem.tensor}; sample {', '.join(named)}{more}")
    if len(problems) > 3:
        lines.append(f"{prefix}and then in {len(problems) - 3} more tensors")
    return "\n".join(line for part in strategy.gather(lines) for line in part)


def _narrowed(problems: Sequence[NonFiniteTensor], trainer: Trainer) -> list[NonFiniteTensor]:
    """Gradients and losses are those of a whole micro-batch: keep the samples whose own are not finite."""
    of_batch = [p for p in problems if p.tensor.startswith(("gradient", "loss"))]
    bad = {slot for slot in {s for p in of_batch for s in p.slots} if not check_sample(trainer, slot).is_finite}
    return [replace(p, slots=[s for s in p.slots if s in bad] or p.slots) if p in of_batch else p for p in problems]


# ------------------------------------------------------------------------------------------------------ one sample


@dataclass
class SampleCheck:
    """The losses and gradients of one sample of a batch, computed alone; empty where the trainer has no losses."""

    losses: dict[str, float] = field(default_factory=dict)  # role -> loss
    gradient_norm: float = 0.0
    first_bad_module: str | None = None  # the first module whose output is not finite

    @property
    def is_finite(self) -> bool:
        return all(map(math.isfinite, (*self.losses.values(), self.gradient_norm)))


def check_sample(trainer: Trainer, slot: int) -> SampleCheck:
    """Forward and backward of one sample of the trainer's current batch."""
    watchdog.heartbeat()
    check, squares = SampleCheck(), 0.0
    for role, loss in trainer.per_sample_losses(slot).items():
        with trainer.policy.role(role), _non_finite_modules(trainer.policy) as modules:
            value = loss()
            parameters = list(trainer.policy.trainable.values())
            gradients = torch.autograd.grad(value, parameters, allow_unused=True)
        check.losses[role] = float(value.detach())
        squares += sum(float(gradient.double().square().sum()) for gradient in gradients if gradient is not None)
        check.first_bad_module = check.first_bad_module or next(iter(modules), None)
    check.gradient_norm = math.sqrt(squares) if squares >= 0 else math.nan
    return check


@contextmanager
def _non_finite_modules(policy: nn.Module) -> Iterator[list[str]]:
    """Names of the modules whose output is not finite, in the order in which they finish."""
    names = {module: name for name, module in policy.named_modules()}
    found: list[str] = []

    def look(module: nn.Module, inputs: Any, output: Any) -> None:
        tensors = output if isinstance(output, (tuple, list)) else [output]
        bad = any(isinstance(t, Tensor) and t.is_floating_point() and not torch.isfinite(t).all() for t in tensors)
        if bad and (name := names.get(module)):
            found.append(name)

    handle = nn.modules.module.register_module_forward_hook(look)
    try:
        yield found
    finally:
        handle.remove()
