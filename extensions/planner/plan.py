"""`nlu plan`: memory per rank, FLOPs and seconds of a job before it starts, and the settings to use.

Nothing is downloaded or trained. `NOT_MODELLED` and `CHECKED`, which are printed, describe the accuracy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

from extensions.common.errors import UserError
from extensions.model.loading import load_config
from extensions.planner.devices import GIB, Device, PlanOptions
from extensions.planner.flops import ModelShape
from extensions.planner.job import Estimate, Setting, TrainingJob
from extensions.planner.limits import rank_memory_of, with_training
from extensions.planner.memory import rank_memory
from extensions.planner.reasons import nothing_fits, reasons
from extensions.planner.seconds import step_seconds
from extensions.recipe import Recipe, RunSchedule

MAX_GPUS = 1024
NOT_MODELLED = (
    "Not modelled: tokenizing, rewards, the time of evaluations, checkpoints, the slowest rank of each step, vLLM's "
    "speed (rollouts are taken as this project's own) and Ray's messages, deepspeed.offload and deepspeed.config."
)
# Whole iterations of SmolLM2-135M on CoLA (tests/bench, two cores, with the rate measured there): bfloat16 predicted
# 5.9 s, measured 5.3; float32 predicted 7.3 s, measured 8.4; memory predicted 1.98 and 2.76 GiB, measured 2.38 and
# 2.68.
# On an H100 in bfloat16, PPO on short rows (random weights; memory as torch allocates it, without the context):
# SmolLM2-135M predicted 1.13 GiB and 0.94 s, measured 0.89 GiB and 1.8 s; Llama-2-7B 18.4 GiB, measured 17.3 GiB.
CHECKED = (
    "Checked on a CPU: predicted iterations of SmolLM2 were 12% too long to 14% too short, phases up to 25% off, "
    "memory 3% too high to 17% too low. On an H100 predicted memory was 6 to 27% too high, and short iterations took "
    "twice as long as predicted: the time to start a kernel is an assumption."
)


@dataclass(frozen=True)
class Scaling:
    """One line of the scaling table."""

    gpus: int
    batch_size: int  # the recipe's, or the next multiple of the GPUs if that cannot be divided
    step_s: float | None  # None: no setting fits
    samples_per_s: float | None
    setting: Setting | None
    enough: bool  # the recipe's batch can be divided evenly among the GPUs


@dataclass(frozen=True)
class Plan:
    """The fastest setting that fits, and its costs."""

    recipe: str
    method: str
    model: str
    device: Device
    dtype: str
    gpus: int  # requested
    ranks: int  # used: the batch can be divided evenly among them
    tokens: str  # source of the token counts
    shape: ModelShape
    trained: int  # trained parameters
    chosen: Estimate
    why: list[str]
    settings: list[str]  # key=value, for the command line
    flops: dict[str, float]  # phase -> minimal FLOPs of a step over all ranks
    batch_size: int
    rows: int  # per epoch
    epoch_s: float
    steps: int  # steps of the whole run
    schedule: list[str]  # its learning rate, validations and early stopping
    samples_per_s: float
    tokens_per_s: float  # prompt and response tokens of the samples
    longest_rows: tuple[int, int]  # tokens of the longest row within the bound of a micro-batch: training, evaluation
    utilisation: float  # minimal FLOPs over the peak of all ranks
    scaling: list[Scaling]

    def as_json(self) -> dict[str, Any]:
        derived: dict[str, Any] = {"memory_gib": self.chosen.total, "step_s": self.chosen.step_s}
        return asdict(self) | derived | {"not_modelled": NOT_MODELLED, "checked": CHECKED}


class Planner:
    """Estimates settings of a job and chooses among them.

    Args:
        warn: called with each non-fatal finding.
    """

    def __init__(self, recipe: Recipe, options: PlanOptions, warn: Callable[[str], None] = lambda _: None) -> None:
        self.job, self.warn = TrainingJob(recipe, options, warn), warn
        self.estimate = lru_cache(maxsize=None)(self._estimate)

    def _estimate(self, rows: int, ranks: int, setting: Setting) -> Estimate:
        """Costs of a rank with `rows` rows."""
        job = self.job
        memory = {part: size / GIB for part, size in rank_memory(job, rows, ranks, setting).items()}
        at_load = job.base_bytes / GIB + job.device.context
        return Estimate(setting, memory, at_load, step_seconds(job, rows, ranks, setting))

    def longest_rows(self, ranks: int) -> tuple[int, int]:
        """Tokens of the longest row within the bound of a micro-batch, in training and in evaluation."""
        job, recipe = self.job, self.job.recipe
        total = job.device.memory * GIB
        made = rank_memory_of(
            recipe.model, recipe.lora, load_config(recipe.model), job.options.cpu, total, form=job.form
        )
        assert made is not None  # the job has traced the model
        memory = with_training(made, recipe, ranks)
        return memory.limit(1, True).longest, memory.limit(1, False).longest

    def candidates(self, rows: int, ranks: int) -> list[Estimate]:
        """Every setting that the recipe's optimizer and model allow, the fastest first."""
        recipe = self.job.recipe
        sharded = recipe.trained_with.name != "adafactor" and not recipe.model.load_in_4bit and ranks > 1
        found = [
            self.estimate(rows, ranks, Setting(stage, checkpointing, size))
            for stage in ((0, 2, 3) if sharded else (0,))
            for checkpointing in (False, True)
            for size in sorted({min(2**k, rows) for k in range(rows.bit_length() + 1)})
        ]
        return sorted(found, key=lambda e: (e.step_s, e.setting.zero_stage, e.total))

    def choose(self, rows: int, ranks: int) -> Estimate | None:
        """The fastest setting that fits; None if none does."""
        return next(filter(self.job.fits, self.candidates(rows, ranks)), None)

    def scaling(self) -> list[Scaling]:
        """One line per power of two of GPUs."""
        lines, job = [], self.job
        for ranks in (2**k for k in range(MAX_GPUS.bit_length())):
            enough = job.divides_among(ranks)
            batch = job.batch_size if enough else math.ceil(job.batch_size / ranks) * ranks
            best = self.choose(batch // ranks, ranks)
            step, setting = (best.step_s, best.setting) if best else (None, None)
            lines.append(Scaling(ranks, batch, step, batch / step if step else None, setting, enough))
        return lines

    def plan(self, gpus: int) -> Plan:
        """The fastest setting that fits, and its costs.

        Args:
            gpus: ranks to plan for; the largest number that divides the batch evenly is used.

        Raises:
            UserError: no setting fits.
        """
        if not 1 <= gpus <= MAX_GPUS:
            raise UserError(f"--gpus: {gpus} is not from 1 to {MAX_GPUS}; for the CPU use --cpu")
        job, recipe = self.job, self.job.recipe
        ranks = max(n for n in range(1, gpus + 1) if job.divides_among(n))
        rows = job.batch_size // ranks
        candidates, chosen = self.candidates(rows, ranks), self.choose(rows, ranks)
        if chosen is None:
            raise UserError(nothing_fits(job, candidates, ranks))
        least = job.flops(rows, replace(chosen.setting, gradient_checkpointing=False))
        flops = {phase: ranks * amount for phase, amount in least.items()}
        rows_per_epoch = sum(task.rows for task in job.tokens)
        run, schedule = RunSchedule(recipe, rows_per_epoch), list[str]()
        run.check()
        run.describe(schedule.append, self.warn)
        samples_per_s = job.batch_size / chosen.step_s
        tokens_per_row = sum(row.prefix + row.suffix + row.response for row in job.batch(rows)) / rows
        return Plan(
            recipe=recipe.name,
            method=recipe.method,
            model=recipe.model.path,
            device=job.device,
            dtype=job.dtype,
            gpus=gpus,
            ranks=ranks,
            tokens=job.tokens_source,
            shape=job.shape,
            trained=job.trained,
            chosen=chosen,
            why=reasons(job, candidates, chosen, rows, ranks, gpus),
            settings=chosen.setting.assignments(recipe.method),
            flops=flops,
            batch_size=job.batch_size,
            rows=rows_per_epoch,
            epoch_s=rows_per_epoch / samples_per_s,
            steps=run.steps,
            schedule=schedule,
            samples_per_s=samples_per_s,
            tokens_per_s=samples_per_s * tokens_per_row,
            longest_rows=self.longest_rows(ranks),
            utilisation=sum(flops.values()) / (chosen.step_s * job.device.tflops * 1e12 * ranks),
            scaling=[] if job.options.cpu else self.scaling(),
        )
