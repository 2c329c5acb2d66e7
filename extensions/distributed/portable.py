"""A copy of what an engine trains that every ZeRO stage, offload setting and number of ranks can load.

DeepSpeed's own checkpoint files fit one ZeRO stage, partition and number of ranks. This copy has, per trained parameter
NAME: `NAME` (float32 weights), and `NAME/exp_avg`, `NAME/exp_avg_sq` (AdamW's moments, equal in torch's AdamW and in
DeepSpeedCPUAdam); all unsharded. Adafactor, which runs at ZeRO stage 0 only, has no moments here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from extensions.distributed.openrlhf import deepspeed
from extensions.distributed.optim import set_schedule
from extensions.distributed.strategy import load_trainable_state, trainable, trainable_state

MOMENTS = ("exp_avg", "exp_avg_sq")
COUNTERS = ("global_steps", "global_samples", "skipped_steps", "micro_steps")


def portable_state(engine: deepspeed.DeepSpeedEngine) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, on the CPU, and as JSON: place in the schedule, DeepSpeed's counters, updates of the optimizer.

    Call it on every rank.
    """
    named, stage = trainable(engine.module), engine.zero_optimization_stage()
    base = _base(engine)
    values: dict[str, Any] = {
        "schedule": engine.lr_scheduler.last_epoch,
        "counters": {name: getattr(engine, name) for name in COUNTERS},
        "updates": None,  # before the first one, there are no moments
    }
    if not stage:
        tensors = trainable_state(engine.module)
    else:
        tensors = {name: deepspeed.utils.safe_get_full_fp32_param(p) for name, p in named.items()}
    states = [base.state[p] for p in (_flat(engine) if stage else named.values()) if base.state.get(p)]
    if states and set(MOMENTS) <= states[0].keys():
        values["updates"] = int(max(float(state["step"]) for state in states))
        if stage in (1, 2):
            # After a load without an update, DeepSpeed (0.19.6) has not linked moments and parameters.
            engine.optimizer._hp_optimizer_states_linked = False
            engine.optimizer._lazy_init_hp_params_optimizer_state()
        for name, parameter in named.items():
            for key in MOMENTS:
                if stage:
                    tensors[f"{name}/{key}"] = deepspeed.utils.safe_get_full_optimizer_state(parameter, key)
                else:  # a parameter without a gradient so far has no moments
                    found = base.state.get(parameter, {}).get(key)
                    tensors[f"{name}/{key}"] = torch.zeros_like(parameter) if found is None else found
    return {key: tensor.detach().cpu().clone().contiguous() for key, tensor in tensors.items()}, values


def load_portable_state(
    engine: deepspeed.DeepSpeedEngine, tensors: Mapping[str, Tensor], values: Mapping[str, Any]
) -> None:
    """Restore what `portable_state` returned; the hyperparameters stay the engine's. Call it on every rank."""
    named, stage, base = trainable(engine.module), engine.zero_optimization_stage(), _base(engine)
    load_trainable_state(engine.module, {name: tensors[name] for name in named})
    updates = values["updates"]
    if updates is not None:
        whole = isinstance(base, deepspeed.ops.adam.DeepSpeedCPUAdam)  # its count is a number, torch's a tensor
        for parameter in _flat(engine) if stage else named.values():
            base.state[parameter] = {
                "step": updates if whole else torch.tensor(float(updates)),
                **{key: torch.zeros_like(parameter, memory_format=torch.preserve_format) for key in MOMENTS},
            }
        if stage in (1, 2):
            engine.optimizer._hp_optimizer_states_linked = False
            engine.optimizer._lazy_init_hp_params_optimizer_state()
    for name, parameter in named.items():
        if stage:
            _set(parameter, tensors[name], None)
        for key in MOMENTS if updates is not None else ():
            value = tensors[f"{name}/{key}"]
            if stage:
                _set(parameter, value, key)
            else:
                base.state[parameter][key].copy_(value)
    set_schedule(base, engine.lr_scheduler, values["schedule"])
    for name in COUNTERS:
        setattr(engine, name, values["counters"][name])


def _base(engine: deepspeed.DeepSpeedEngine) -> torch.optim.Optimizer:
    """The optimizer that ZeRO wraps; at stage 0 the engine's own."""
    return engine.optimizer.optimizer if engine.zero_optimization_stage() else engine.optimizer


def _flat(engine: deepspeed.DeepSpeedEngine) -> list[Tensor]:
    """This rank's flat partitions, which are the parameters of the optimizer under ZeRO (DeepSpeed 0.19.6)."""
    if engine.zero_optimization_stage() == 3:
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    return list(engine.optimizer.single_partition_of_fp32_groups)


def _set(parameter: Any, value: Tensor, key: str | None) -> None:
    """Set this rank's part of a float32 parameter or of its moment `key`."""
    if not hasattr(parameter, "ds_id"):
        value = value.to(parameter.device)
        if key is None:
            deepspeed.utils.safe_set_full_fp32_param(parameter, value)
        else:
            deepspeed.utils.safe_set_full_optimizer_state(parameter, value, key)
        return
    # safe_set_full_* (DeepSpeed 0.19.6) fails under ZeRO 3 where the ranks do not divide the size.
    size = parameter.ds_tensor.numel()
    group = parameter.ds_process_group
    ranks, rank = torch.distributed.get_world_size(group), torch.distributed.get_rank(group)
    padded = torch.nn.functional.pad(value.flatten(), (0, size * ranks - value.numel()))
    part = padded.narrow(0, size * rank, size)
    if key is None:
        deepspeed.utils.safe_set_local_fp32_param(parameter, part)
    else:
        deepspeed.utils.safe_set_local_optimizer_state(parameter, part, key)
