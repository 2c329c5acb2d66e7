"""Seconds of a step, by phase.

On a GPU, a pass takes the longest of three times: its FLOPs at the device's rate, reading its weights from memory, and
launching its kernels, which bounds small passes. On a CPU, the launches add to the longer of the other two.
"""

from __future__ import annotations

import math

from extensions.planner.devices import link_rate
from extensions.planner.flops import Work, forward_flops, packed_work, packs
from extensions.planner.job import Setting, TrainingJob

ALL_REDUCE_LATENCY_S = 20e-6  # per hop of a collective, NCCL's order of magnitude between nodes
# Kernels of an optimizer step per trained matrix: AdamW's are fused over many, Adafactor's are not.
OPTIMIZER_KERNELS = {"adamw": 2, "adafactor": 25}
HEAD_KERNELS = 12  # kernels of a pass outside the decoder


def step_seconds(job: TrainingJob, rows: int, ranks: int, setting: Setting) -> dict[str, float]:
    """Seconds by phase, in execution order."""
    batch, size = job.batch(rows), setting.micro_batch_size
    num_packs = len(packs(batch, size))
    sharded = setting.zero_stage == 3 and ranks > 1
    seconds = {}
    for phase, flops in job.flops(rows, setting, job.dense).items():
        if phase == "rollout":
            seconds[phase] = _rollout_seconds(job, rows, ranks, size, num_packs, sharded)
        elif phase == "update":
            epochs = job.recipe.ppo.epochs if job.ppo else 1
            forwards = epochs * job.num_adapters * len(packs(batch, min(size, rows // job.optimizer_steps or 1)))
            # A backward pass launches twice the kernels of its forward; without Python each takes half the time.
            passes = forwards * (3 if setting.gradient_checkpointing else 2)
            seconds[phase] = _pass_seconds(job, flops, passes, 2 * forwards * sharded, ranks)
            seconds[phase] += epochs * job.optimizer_steps * _optimizer_step_seconds(job, ranks)
        else:
            seconds[phase] = _pass_seconds(job, flops, num_packs, num_packs * sharded, ranks)
    return seconds


def _rollout_seconds(job: TrainingJob, rows: int, ranks: int, size: int, num_packs: int, sharded: bool) -> float:
    """Prefill and decoding. Each decoding step reads weights and cache once, for any number of unfinished rows."""
    shape, batch = job.shape, job.batch(rows)
    prompts = [row._replace(response=0) for row in batch]
    prefill = forward_flops(shape, packed_work(prompts, size, dense=job.dense), head=False)
    total, read = packed_work(batch, size), packed_work(prompts, size)
    decoded = Work(total.tokens - read.tokens, total.pairs - read.pairs, total.predicting)
    # All ranks wait for the longest response; under ZeRO 3 they all decode the full budget (rollout.sampler).
    steps = job.recipe.rollout.max_new_tokens if sharded else max(row.response for row in job.batch(rows * ranks))
    cache = 2 * shape.kv_width * job.value_bytes * shape.layers * decoded.pairs
    return (
        _pass_seconds(job, prefill, num_packs, num_packs * sharded, ranks)
        + _pass_seconds(
            job, forward_flops(shape, decoded, value=job.has_critic), max(steps - 1, 1), (steps - 1) * sharded, ranks
        )
        + cache / (job.device.bandwidth * 1e9)
    )


def _pass_seconds(job: TrainingJob, flops: float, passes: int, gathers: int, ranks: int) -> float:
    """Seconds of passes over the base, each of which reads its weights once.

    Args:
        flops: FLOPs of all passes.
        gathers: number of gathers of the whole base (ZeRO 3).
    """
    device, trace = job.device, job.trace
    kernels = job.shape.layers * trace.layer_kernels + trace.other_kernels + HEAD_KERNELS
    starts = passes * kernels * device.kernel_us * 1e-6
    work = max(flops / device.rate, passes * job.base_bytes / (device.bandwidth * 1e9))
    gather = gathers * job.base_bytes * (ranks - 1) / ranks / link_rate(job.options.link, ranks)
    return (max(work, starts) if device.overlaps else work + starts) + gather


def _optimizer_step_seconds(job: TrainingJob, ranks: int) -> float:
    """Seconds of the gradient all-reduce and the optimizer update."""
    gradients, device = 4.0 * job.trained, job.device
    memory = 7 * gradients / (device.bandwidth * 1e9)  # reads and writes of parameter, gradient and moments
    kernels = OPTIMIZER_KERNELS[job.recipe.trained_with.name] * job.num_adapters * job.shape.lora_tensors
    exchange = 0.0
    if ranks > 1:  # a ring all-reduce moves each byte 2 (n - 1) / n times
        exchange = 2 * gradients * (ranks - 1) / ranks / link_rate(job.options.link, ranks)
        exchange += 2 * math.ceil(math.log2(ranks)) * ALL_REDUCE_LATENCY_S
    return max(memory, kernels * device.kernel_us * 1e-6) + exchange
