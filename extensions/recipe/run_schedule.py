"""The iterations of a training: where its warmup ends, where it validates, and from where on it may stop early."""

from __future__ import annotations

import math
from collections.abc import Callable

from extensions.common.errors import UserError
from extensions.recipe.schema import Recipe


class RunSchedule:
    """The schedule of a training run.

    Args:
        rows: training rows per epoch; None: not known, so that keys in epochs do not count.

    Attributes:
        steps: iterations, unless the training stops early.
        spanned, updates: iterations and optimizer steps that the schedule of the learning rate spans.
        warmup: iteration at whose end the learning rate has reached its peak; 0: there is no warmup.
        validate_every: iterations between two validations; the last iteration is followed by one too. 0: none.
        patience: validations without a new best before the training stops; 0: it never does.
    """

    def __init__(self, recipe: Recipe, rows: int | None = None) -> None:
        self.steps = recipe.training_steps(rows)
        settings = recipe.schedule
        self.epochs = None if rows is None else settings.epochs
        spanned = self.steps
        if rows is not None and settings.epochs is not None:
            spanned = max(1, math.ceil(settings.epochs * rows / recipe.training_batch))
        self.spanned, self.updates = spanned, recipe.num_updates(spanned)
        self.warmup = math.ceil(settings.warmup_updates(self.updates) / recipe.num_updates(1))
        self.ends_at_zero = settings.name == "linear" or (settings.name == "cosine" and settings.min_lr_ratio == 0)
        every = recipe.evaluation.every_steps
        # Rounded first: 0.07 x 100 is a little more than 7.
        self.validate_every = max(1, math.ceil(round(every * self.steps, 6))) if 0 < every < 1 else int(every)
        self.patience = recipe.evaluation.patience

    def validates_after(self, step: int) -> bool:
        """Whether a validation follows this iteration."""
        return bool(self.validate_every) and step > 0 and (step % self.validate_every == 0 or step >= self.steps)

    def counts_for_patience(self, step: int) -> bool:
        """Whether the validation after this iteration counts for `patience`.

        During the warmup the learning rate is below what the recipe asks for, so a score that does not improve is no
        sign of convergence.
        """
        return step > self.warmup

    @property
    def validations(self) -> list[int]:
        """The iterations that a validation follows."""
        return [*range(self.validate_every, self.steps, self.validate_every), self.steps] if self.validate_every else []

    @property
    def first_stop(self) -> int | None:
        """The first iteration after which the training may stop before its end; None: it cannot.

        The first validation always is a new best.
        """
        counted = [step for step in self.validations[1:] if self.counts_for_patience(step)]
        stop = counted[self.patience - 1] if 0 < self.patience <= len(counted) else self.steps
        return stop if stop < self.steps else None

    def waiting(self, step: int, since: int) -> str:
        """The end of the line of a validation without a new best.

        Args:
            since: validations that count since the best one.
        """
        if not self.patience:
            return ""
        if self.counts_for_patience(step):
            return f"; {since} of {self.patience} without a new best"
        return f"; not counted by evaluation.patience, since the warmup ends at step {self.warmup}"

    def check(self) -> None:
        """UserError if the learning rate is zero for the rest of the run."""
        if self.ends_at_zero and self.spanned < self.steps:
            raise UserError(
                f"schedule.epochs: {self.epochs:g} ({self.spanned} iterations) ends at a learning rate of 0, and the "
                f"run has up to {self.steps} iterations; use schedule.name: cosine with schedule.min_lr_ratio above 0, "
                "or max_epochs of the same number"
            )

    def describe(self, info: Callable[[str], None], warn: Callable[[str], None]) -> None:
        """Say how the learning rate, validations and early stopping run, and warn of keys that have no effect."""
        if self.epochs is not None:
            info(
                f"learning rate: warmup until step {self.warmup}, the end of its decay at step {self.spanned} "
                f"(schedule.epochs: {self.epochs:g}), of at most {self.steps} steps"
            )
            if self.spanned > self.steps:
                missed = "peak" if self.warmup >= self.steps else "end"
                warn(
                    f"schedule.epochs: {self.epochs:g} spans {self.spanned} iterations, but the run ends after "
                    f"{self.steps}, before its learning rate has reached its {missed}: lower it, or raise max_steps or "
                    "max_epochs"
                )
        if not self.validate_every:
            return
        often = f"every {self.validate_every} of {self.steps} iterations, and " if len(self.validations) > 1 else ""
        text = f"validations: {often}after the last one"
        if self.first_stop is not None:
            text += f"; early stopping: {self.patience} without a new best, at step {self.first_stop} at the earliest"
            text += (
                f", since those up to the end of the warmup, step {self.warmup}, do not count" if self.warmup else ""
            )
        info(text)
        if self.patience and self.first_stop is None:
            counted = sum(map(self.counts_for_patience, self.validations))
            warn(
                f"evaluation.patience: {self.patience} cannot stop this run of {self.steps} iterations before its end: "
                f"validations after the warmup, which ends at step {self.warmup}: {counted}. Lower patience, or set "
                "evaluation.every_steps to a fraction of the run such as 0.05"
            )
