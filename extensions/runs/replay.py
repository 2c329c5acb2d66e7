"""`nlu replay`: a failed batch computed again, sample by sample, with the weights of that step.

Each forward is that of one sample alone, without dropout. A non-finite value that came from a dropout mask or from a
faulty device is not reproduced; the table then says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rich.table import Table
from safetensors.torch import load_file

from extensions.distributed.strategy import Strategy, load_trainable_state
from extensions.model.loading import load_policy
from extensions.recipe import Recipe, load_recipe
from extensions.runs.failed_batch import WEIGHTS, SampleCheck, check_sample, read_parts
from extensions.training.correlation import sft_trainer
from extensions.training.ppo import PpoTrainer
from extensions.training.trainer import Trainer


@dataclass
class Replayed:
    """One sample of a failed batch."""

    rank: int
    slot: int
    record: dict[str, Any]  # of rank-K.json
    bad_tensors: list[str]  # tensors of the run that are not finite at this sample
    check: SampleCheck = field(default_factory=SampleCheck)  # empty if the run failed before it had losses

    @property
    def is_bad(self) -> bool:
        return self.check.first_bad_module is not None or not self.check.is_finite


def replay_batch(folder: Path, overrides: Sequence[str] = ()) -> tuple[list[str], list[Replayed]]:
    """The findings of the run, one line per tensor, and each sample of the batch computed again.

    Args:
        folder: RUN/failed/step-N.
        overrides: of the run's recipe, such as model.dtype=float32.

    Raises:
        UserError: the folder holds no failed batch, or the model cannot be loaded.
    """
    parts = list(read_parts(folder))
    recipe = load_recipe(folder.parent.parent / "recipe.yaml", overrides)
    if recipe.backend == "ray":  # there the critic always has its own adapter
        recipe = recipe.model_copy(update={"ppo": recipe.ppo.model_copy(update={"critic": "adapter"})})
    trainer = _trainer(recipe)
    if (folder / WEIGHTS).exists():
        load_trainable_state(trainer.policy, load_file(folder / WEIGHTS))
    trainer.policy.eval()
    problems, found = [], []
    for rank, samples, noted, tensors in parts:
        problems += [f"rank {rank}: {p.found} in {p.tensor}; samples {p.slots}" for p in noted]
        part = [
            Replayed(rank, slot, record, [name for name, t in tensors.items() if not bool(t[slot].isfinite().all())])
            for slot, record in enumerate(samples)
        ]
        if samples and (recipe.method == "sft" or "returns" in tensors):
            # Replaced here, since they would make every sample non-finite; `bad_tensors` has them.
            known = {name: t.to(trainer.policy.device).nan_to_num(0, 0, 0) for name, t in tensors.items()}
            trainer.restore_snapshot(samples, known)
            for sample in part:
                sample.check = check_sample(trainer, sample.slot)
        found += part
    return problems, found


def _trainer(recipe: Recipe) -> Trainer:
    """A trainer for its per-sample losses alone."""
    strategy = Strategy(recipe.seed, recipe.deepspeed, 0.0)
    strategy.setup_distributed()
    critic = recipe.ppo.value_model if recipe.method == "ppo" else "none"
    policy = load_policy(
        recipe.model, recipe.lora, critic, recipe.rollout.temperature, strategy.device, recipe.seed, "base"
    )
    unused: Any = None
    if recipe.method == "sft":
        return sft_trainer(recipe.sft)(policy, unused, strategy, unused, unused, recipe.sft, recipe.seed)
    sampler: Any = SimpleNamespace(exact=True)
    correction = recipe.vllm if recipe.rollout.backend == "vllm" else None
    return PpoTrainer(
        policy, unused, strategy, sampler, unused, unused, unused, recipe.ppo, unused, recipe.seed, None, correction
    )


def replay_table(samples: Sequence[Replayed]) -> Table:
    """For a console."""
    table = Table("rank", "sample", "task", "row", "tokens", "in the run", "loss", "gradient norm", "first bad module")
    for one in samples:
        record, check = one.record, one.check
        tokens = len(record["prompt_ids"]) + len(record["response_ids"])
        losses = ", ".join(f"{value:.4g}" for value in check.losses.values())
        bad_tensors = ", ".join(one.bad_tensors) or "finite"
        cells = [one.rank, one.slot, record["task"], record["index"], tokens, bad_tensors, losses]
        cells += [f"{check.gradient_norm:.4g}", check.first_bad_module or "-"]
        table.add_row(*map(str, cells), style="bold red" if one.is_bad else None)
    return table
