"""The console output of `nlu plan`."""

from __future__ import annotations

from rich.table import Table

from extensions.planner.plan import CHECKED, NOT_MODELLED, Plan


def plan_tables(plan: Plan) -> list[Table | str]:
    """The tables and texts of a plan, in order; the texts have no markup."""
    device, chosen, shape = plan.device, plan.chosen, plan.shape
    where = "on the CPU" if device.name == "cpu" else f"on {plan.ranks} x {device.name}"
    starts = "while others run" if device.overlaps else "after the one before"
    return [
        f"{plan.recipe}: {plan.method} of {plan.model} {where}, {plan.dtype}; {shape.parameters / 1e9:.3g}e9 "
        f"parameters, {plan.trained / 1e6:.2f} million trained; {plan.batch_size} samples per step",
        plan.tokens,
        f"set: {' '.join(plan.settings)}",
        *(f"- {reason}" for reason in plan.why),
        "model.micro_batch_tokens: null bounds a micro-batch by memory; the longest row within the bound has "
        f"{plan.longest_rows[0]} tokens in training and {plan.longest_rows[1]} in evaluation",
        _memory_table(plan),
        _phase_table(plan),
        f"{plan.samples_per_s:.3g} samples/s, {plan.tokens_per_s:.4g} tokens/s, {plan.utilisation:.1%} of the peak; an "
        f"epoch of {plan.rows} rows takes {_duration(plan.epoch_s)}, the run of at most {plan.steps} steps "
        f"{_duration(plan.steps * chosen.step_s)}",
        *plan.schedule,
        *(_scaling_table(plan) if plan.scaling else []),
        f"Assumed: {device.tflops:.4g} TFLOP/s at a utilisation of {device.utilisation:.0%}, {device.bandwidth:.4g} "
        f"GB/s, {device.kernel_us:g} microseconds to start a kernel, {starts}; every response uses its whole budget. "
        f"{NOT_MODELLED} {CHECKED}",
    ]


def _memory_table(plan: Plan) -> Table:
    chosen = plan.chosen
    table = _table("memory per rank", "GiB")
    for part, size in chosen.memory.items():
        table.add_row(part, f"{size:.2f}")
    loading = chosen.at_load > sum(chosen.memory.values())
    table.add_row("peak, while the model is loaded" if loading else "peak", f"{chosen.total:.2f}")
    table.add_row("available", f"{plan.device.memory:.0f}")
    return table


def _phase_table(plan: Plan) -> Table:
    step_s = plan.chosen.step_s
    table = _table("phase of a step", "TFLOP, all ranks", "seconds", "share")
    for phase, seconds in plan.chosen.seconds.items():
        table.add_row(phase, f"{plan.flops[phase] / 1e12:.2f}", f"{seconds:.3g}", f"{seconds / step_s:.0%}")
    table.add_row("step", f"{sum(plan.flops.values()) / 1e12:.2f}", f"{step_s:.3g}", "")
    return table


def _scaling_table(plan: Plan) -> list[Table | str]:
    table = _table("GPUs", "batch", "step, s", "samples/s", "speed-up", "an epoch", "setting")
    table.columns[0].justify, table.columns[5].justify, table.columns[6].justify = "right", "left", "left"
    first = plan.scaling[0].samples_per_s
    for line in plan.scaling:
        batch = f"{line.batch_size}" if line.enough else f"{line.batch_size} (not {plan.batch_size})"
        if line.step_s is None or line.samples_per_s is None or line.setting is None:
            table.add_row(str(line.gpus), batch, "does not fit")
            continue
        setting = f"ZeRO {line.setting.zero_stage}, micro-batch {line.setting.micro_batch_size}"
        setting += ", checkpointing" if line.setting.gradient_checkpointing else ""
        gain = f"{line.samples_per_s / first:.1f}" if first else "-"
        epoch = _duration(plan.rows / line.samples_per_s)
        table.add_row(str(line.gpus), batch, f"{line.step_s:.3g}", f"{line.samples_per_s:.3g}", gain, epoch, setting)

    key, notes = f"{plan.method}.batch_size={plan.batch_size}", []
    speeds = {line.gpus: line.samples_per_s for line in plan.scaling if line.enough and line.samples_per_s}
    if speeds:
        fewest = next(gpus for gpus, speed in speeds.items() if speed >= 0.95 * max(speeds.values()))
        notes.append(f"With {key}, {fewest} of them are within 5% of the fastest.")
    most = max(line.gpus for line in plan.scaling if line.enough)
    if most < plan.scaling[-1].gpus:
        notes.append(
            f"Of these numbers of GPUs, {key} can be divided among {most} at most. The lines below that need the batch "
            "size in them, which is a different training from the recipe's."
        )
    return [table, *notes]


def _table(first: str, *others: str) -> Table:
    table = Table(first, title_justify="left")
    for column in others:
        table.add_column(column, justify="right")
    return table


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
