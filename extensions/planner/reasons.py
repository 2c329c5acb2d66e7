"""Sentences that explain the chosen setting."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from extensions.planner.devices import GIB
from extensions.planner.job import USABLE, Estimate, TrainingJob
from extensions.planner.memory import DEEPSPEED_BUCKET, trained_bytes


def reasons(
    job: TrainingJob, candidates: Sequence[Estimate], chosen: Estimate, rows: int, ranks: int, gpus: int
) -> list[str]:
    """One or two sentences per decision.

    Args:
        candidates: all settings, the fastest first.
        rows: rows per rank.
        gpus: requested GPUs; more than `ranks` if the batch cannot be divided among all of them.
    """
    setting = chosen.setting
    by_setting = {candidate.setting: candidate for candidate in candidates}
    sentences = [_ranks_reason(job, ranks, gpus)] if gpus > ranks else []
    sentences.append(f"stage {setting.zero_stage}: {_stage_reason(job, candidates, chosen, ranks)}.")

    other = by_setting[replace(setting, gradient_checkpointing=not setting.gradient_checkpointing)]
    if setting.gradient_checkpointing:
        outcome = "is no faster here" if job.fits(other) else "does not fit"
        sentences.append(
            f"checkpointing on: without it a pack of {setting.micro_batch_size} rows needs {other.total:.1f} GiB, "
            f"which {outcome}; smaller packs repeat the prefix more often."
        )
    else:
        saved = chosen.total - other.total
        gain = f"save {saved:.1f} GiB" if saved > 0.05 else "save nothing, since peak memory is elsewhere,"
        sentences.append(
            f"checkpointing off: activations fit; it would {gain} and make the step "
            f"{other.step_s / chosen.step_s:.2f} times as long."
        )
    if setting.micro_batch_size == rows:
        sentences.append(
            f"micro-batch {rows}: all rows of a rank are one pack, so its prefix is computed once in each pass."
        )
    else:
        whole = by_setting[replace(setting, micro_batch_size=rows)]
        reason = "is slower, by attention over all pairs" if job.fits(whole) else f"needs {whole.total:.1f} GiB"
        sentences.append(f"micro-batch {setting.micro_batch_size}: one pack of all {rows} rows of a rank {reason}.")
    return sentences


def _ranks_reason(job: TrainingJob, ranks: int, gpus: int) -> str:
    key, batch = f"{job.recipe.method}.batch_size", job.batch_size
    lack = "is less than one row per GPU on" if gpus > batch else "cannot be divided evenly among"
    return (
        f"ranks: {ranks}. {key}={batch} {lack} {gpus} GPUs; {key}={math.ceil(batch / gpus) * gpus} could use all "
        "of them, but is not the recipe's batch size."
    )


def _stage_reason(job: TrainingJob, candidates: Sequence[Estimate], chosen: Estimate, ranks: int) -> str:
    base, stage = job.base_bytes / GIB, chosen.setting.zero_stage
    if stage > 0:
        whole = _best(job, candidates, 0)
        if job.fits(whole):
            keys = ", ".join(whole.setting.assignments(job.recipe.method)[1:])
            reason = f"stage 0 fits only with {keys}, {whole.step_s / chosen.step_s:.1f} times the step"
        else:
            least = min(candidate.total for candidate in candidates if candidate.setting.zero_stage == 0)
            reason = f"at stage 0 a rank would need {least:.1f} GiB or more"
        loaded = f"; each rank still loads the whole base ({base:.1f} GiB) before it is sharded" if stage == 3 else ""
        return reason + loaded
    reason = f"each rank holds the whole base ({base:.1f} GiB)"
    if job.recipe.trained_with.name == "adafactor":
        return f"{reason}; Adafactor loses its factored state in any other stage"
    if job.recipe.model.load_in_4bit:
        return f"{reason}; a 4-bit base is not sharded"
    if ranks == 1:
        return f"{reason}; with one rank there is nothing to shard"
    when = "every pass and for every token of a rollout" if job.ppo else "every pass"
    return (
        f"{reason}. All that stage 2 could shard is {trained_bytes(job, ranks, 0) / GIB:.2f} GiB, and its gradient "
        f"buffer takes {DEEPSPEED_BUCKET / GIB:.1f} GiB; stage 3 would gather the base in {when}, "
        f"{_best(job, candidates, 3).step_s / chosen.step_s:.1f} times the step"
    )


def _best(job: TrainingJob, candidates: Sequence[Estimate], stage: int) -> Estimate:
    """The fastest setting of a stage that fits; the fastest of the stage if none fits."""
    of_stage = [candidate for candidate in candidates if candidate.setting.zero_stage == stage]
    return next(filter(job.fits, of_stage), of_stage[0])


def nothing_fits(job: TrainingJob, candidates: Sequence[Estimate], ranks: int) -> str:
    """The message when no setting fits: the smallest one, and what to change."""
    recipe, method = job.recipe, job.recipe.method
    least = min(candidates, key=lambda candidate: candidate.total)
    remedies = ["a device with more memory"]
    if not recipe.model.load_in_4bit and not job.options.cpu:
        remedies.append("model.load_in_4bit=true")
    if recipe.trained_with.name == "adafactor" and ranks > 1:
        key = "sft.optimizer" if method == "sft" else "optimizer.name"
        remedies.append(f"{key}=adamw, which allows ZeRO 3")
    remedies.append("a smaller evaluation.batch_size or prompt.max_tokens")
    return (
        f"--gpu-memory: no setting fits in {USABLE:.0%} of {job.device.memory:g} GiB (the rest is left to "
        f"fragmentation); the smallest, {', '.join(least.setting.assignments(method))}, needs {least.total:.1f} GiB "
        f"per rank. Use {', or '.join(remedies)}"
    )
