"""The optimizers and learning-rate schedules of the paper (section 5.1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
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
    """Warmup, then the recipe's shape (section 5.1: cosine to a tenth of the peak), over `num_updates` steps."""
    names = {"cosine": "cosine_with_min_lr", "linear": "linear", "constant": "constant_with_warmup"}
    return get_scheduler(
        names[settings.name],
        optimizer,
        num_warmup_steps=math.ceil(num_updates * settings.warmup_ratio),
        num_training_steps=num_updates,
        scheduler_specific_kwargs={"min_lr_rate": settings.min_lr_ratio} if settings.name == "cosine" else None,
    )
