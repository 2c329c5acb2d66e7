"""`nlu replay`: a batch that stopped a run, computed again sample by sample, with the weights of that moment.

The forward is that of one sample alone, without dropout, so a number that was none only with the dropout of that
moment, or by a faulty device, is not found again; the table then says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor, nn

from extensions.common.errors import UserError
from extensions.common.files import read_json
from extensions.distributed.strategy import Strategy, load_trainable_state
from extensions.model.loading import load_policy
from extensions.model.policy import Policy
from extensions.recipe import Recipe, load_recipe
from extensions.training.experience import EXPERIENCE_TENSORS
from extensions.training.ppo import PpoTrainer
from extensions.training.sft import SftTrainer
from extensions.training.trainer import Trainer


@dataclass
class Replayed:
    """One sample of the batch."""

    rank: int
    slot: int
    record: dict[str, Any]  # of rank-K.json
    known: list[str]  # tensors of the run that are not finite at this sample
    losses: dict[str, float] = field(default_factory=dict)  # role -> loss, now; none where the run had not come to it
    gradient_norm: float = 0.0
    first: str | None = None  # the first module whose output is not finite, now

    @property
    def bad(self) -> bool:
        return self.first is not None or not all(map(math.isfinite, (*self.losses.values(), self.gradient_norm)))


def replay(folder: Path, overrides: Sequence[str] = ()) -> tuple[list[str], list[Replayed]]:
    """What the run found, and each sample of the batch again.

    Args:
        folder: RUN/failed/step-N.
        overrides: of the run's recipe, such as model.dtype=float32.

    Raises:
        UserError: the folder is no such batch, or the model cannot be loaded.
    """
    parts = sorted(folder.glob("rank-*.json"), key=lambda path: int(path.stem.removeprefix("rank-")))
    if not parts:
        raise UserError(f"{folder}: holds no rank-0.json; name a folder RUN/failed/step-N that a stopped run left")
    recipe = load_recipe(folder.parent.parent / "recipe.yaml", overrides)
    if recipe.backend == "ray":  # there the critic has an adapter of its own in any case
        recipe = recipe.model_copy(update={"ppo": recipe.ppo.model_copy(update={"critic": "adapter"})})
    strategy = Strategy(recipe.seed, recipe.deepspeed, 0.0)
    strategy.setup_distributed()
    policy = _policy(recipe, strategy.device)
    if (folder / "weights.safetensors").exists():
        load_trainable_state(policy, load_file(folder / "weights.safetensors"))
    policy.eval()
    trainer = _trainer(recipe, policy, strategy)
    said, found = [], []
    for path in parts:
        rank, content = int(path.stem.removeprefix("rank-")), read_json(path)
        tensors = load_file(path.with_suffix(".safetensors"), device=str(strategy.device))
        samples = content["samples"]
        said += [f"rank {rank}: {p['found']} in {p['tensor']}; samples {p['slots']}" for p in content["problems"]]
        whole = recipe.method == "sft" or set(EXPERIENCE_TENSORS) <= tensors.keys()
        if samples and whole:
            # What was no number in the run is shown; here it would hide which sample gives none by itself.
            trainer.restore_snapshot(
                samples, {k: t.nan_to_num(0, 0, 0) if t.is_floating_point() else t for k, t in tensors.items()}
            )
        part = [Replayed(rank, slot, record, _not_finite(tensors, slot)) for slot, record in enumerate(samples)]
        found += [_again(sample, trainer, policy) for sample in part] if whole else part
    return said, found


def _policy(recipe: Recipe, device: torch.device) -> Policy:
    critic = recipe.ppo.critic if recipe.method == "ppo" else "none"
    return load_policy(recipe.model, recipe.lora, critic, recipe.rollout.temperature, device, recipe.seed, "base")


def _trainer(recipe: Recipe, policy: Policy, strategy: Strategy) -> Trainer:
    """A training loop for its losses alone."""
    unused: Any = None
    sampler: Any = SimpleNamespace(exact=True)
    if recipe.method == "sft":
        return SftTrainer(policy, unused, strategy, unused, unused, recipe.sft, recipe.seed)
    return PpoTrainer(policy, unused, strategy, sampler, unused, unused, unused, recipe.ppo, unused, recipe.seed)


def _not_finite(tensors: dict[str, Tensor], slot: int) -> list[str]:
    return [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor[slot]).all())]


def _again(sample: Replayed, trainer: Trainer, policy: Policy) -> Replayed:
    parameters, squares = list(policy.trainable.values()), 0.0
    for role, loss in trainer.per_sample_losses(sample.slot).items():
        with policy.role(role), _first_not_finite(policy) as places:
            value = loss()
            gradients = torch.autograd.grad(value, parameters, allow_unused=True)
        sample.losses[role] = float(value.detach())
        squares += sum(float(gradient.double().square().sum()) for gradient in gradients if gradient is not None)
        sample.first = sample.first or next(iter(places), None)
    sample.gradient_norm = math.sqrt(squares) if squares >= 0 else math.nan
    return sample


@contextmanager
def _first_not_finite(policy: Policy) -> Iterator[list[str]]:
    """Names of the modules whose output is not finite, in the order in which they finish."""
    places: list[str] = []

    def hook(name: str) -> Any:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            tensors = output if isinstance(output, (tuple, list)) else [output]
            if any(isinstance(t, Tensor) and t.is_floating_point() and not torch.isfinite(t).all() for t in tensors):
                places.append(name)

        return look

    handles = [module.register_forward_hook(hook(name)) for name, module in policy.named_modules() if name]
    try:
        yield places
    finally:
        for handle in handles:
            handle.remove()


def table(samples: Sequence[Replayed]) -> Table:
    """For a console."""
    found = Table("rank", "sample", "task", "row", "tokens", "in the run", "loss", "gradient norm", "first bad module")
    for one in samples:
        tokens = len(one.record["prompt_ids"]) + len(one.record["response_ids"])
        losses = ", ".join(f"{value:.4g}" for value in one.losses.values())
        cells = [one.rank, one.slot, one.record["task"], one.record["index"], tokens, ", ".join(one.known) or "finite"]
        cells += [losses, f"{one.gradient_norm:.4g}", one.first or "-"]
        found.add_row(*(escape(str(cell)) for cell in cells), style="bold red" if one.bad else None)
    return found
