"""The optimizers and learning-rate schedules of the paper (section 5.1)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from transformers.optimization import Adafactor, get_scheduler

from extensions.distributed.openrlhf import load_op
from extensions.recipe import Optimizer, Schedule


def make_optimizer(groups: Sequence[dict[str, Any]], settings: Optimizer, offload: bool) -> torch.optim.Optimizer:
    """Adafactor as in section 5.1 of the paper (fixed learning rate, no parameter scaling), or AdamW.

    Args:
        groups: torch's parameter groups; a group without `lr` gets that of the settings.
        offload: keep AdamW's state in CPU memory and update it there.
    """
    groups = list(groups)
    options: dict[str, Any] = {"lr": settings.lr, "weight_decay": settings.weight_decay}
    if settings.name == "adafactor":
        return Adafactor(groups, scale_parameter=False, relative_step=False, warmup_init=False, **options)
    options |= {"betas": tuple(settings.betas), "eps": settings.eps}
    if offload:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        load_op("CPUAdamBuilder")
        return DeepSpeedCPUAdam(groups, adamw_mode=True, **options)
    return torch.optim.AdamW(groups, **options)


def make_scheduler(optimizer: torch.optim.Optimizer, settings: Schedule, num_updates: int) -> Any:
    """Warmup, then the recipe's shape (section 5.1: cosine to a tenth of the peak), over `num_updates` steps.

    After them the rate stays where it is; transformers' cosine (5.15) would rise again.
    """
    names = {"cosine": "cosine_with_min_lr", "linear": "linear", "constant": "constant_with_warmup"}
    scheduler = get_scheduler(
        names[settings.name],
        optimizer,
        num_warmup_steps=settings.warmup_updates(num_updates),
        num_training_steps=num_updates,
        scheduler_specific_kwargs={"min_lr_rate": settings.min_lr_ratio} if settings.name == "cosine" else None,
    )
    scheduler.lr_lambdas = [partial(_until, num_updates, factor) for factor in scheduler.lr_lambdas]
    return scheduler


def _until(last: int, factor: Callable[[int], float], update: int) -> float:
    return factor(min(update, last))


@contextmanager
def recipe_hyperparameters(optimizer: Any, scheduler: Any) -> Iterator[None]:
    """Keep the optimizer's hyperparameters and the schedule's peak while a checkpoint is loaded into both.

    A checkpoint has those of the recipe that wrote it, which may be another one.
    """
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    peaks = list(scheduler.base_lrs)
    yield
    for group, own in zip(optimizer.param_groups, groups, strict=True):
        group.update(own)
    scheduler.base_lrs = peaks
    set_schedule(optimizer, scheduler, scheduler.last_epoch)


def set_schedule(optimizer: Any, scheduler: Any, update: int) -> None:
    """Set a schedule, and with it the optimizer's learning rates, to where it is after `update` optimizer steps."""
    scheduler.last_epoch = update
    rates = [peak * factor(update) for peak, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates
