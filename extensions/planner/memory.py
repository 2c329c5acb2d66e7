"""Memory per rank, in bytes, by part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from extensions.model.policy import LOGITS_AT_ONCE
from extensions.planner.activations import Trace
from extensions.planner.devices import GIB
from extensions.planner.flops import ModelShape, SampleTokens, pack_work, packs
from extensions.planner.job import Setting, TrainingJob
from extensions.prefix.limits import Form

DEEPSPEED_BUCKET = 5e8 * 4  # bytes of the gradient buffer of ZeRO 1 to 3, for any model size (DeepSpeed 0.19.6)
DEEPSPEED_LIVE = 1e9  # maximum number of gathered weights of ZeRO 3 (DeepSpeed 0.19.6)
LOGIT_COPIES = 4  # simultaneous float32 copies of a chunk of logits: logits, logprobs, probabilities, gradients
DRAW_COPIES = 4  # float32 copies of a decoding step: logits, logprobs, probabilities, padded
VLLM_CPU_CACHE = GIB  # KV cache, the project's default for an engine on a CPU
# On a CPU the attention weights are kept, and blocks of their size fragment the heap: measured 1.5 times the weights
# (SmolLM2-135M in float32, a row of 1000 and one of 2000 tokens: predicted 2.7 and 8.4 GB, measured 2.6 and 8.3).
CPU_SCORES = 1.5
CPU_SDPA_PAIR = 8.0  # bytes per pair and layer of torch's sdpa on a CPU: its dense mask in float32, twice


@dataclass(frozen=True)
class PackMemory:
    """Bytes of a forward over a pack: `constant + token x tokens + pair x computed query-key pairs`."""

    constant: float
    token: float
    pair: float

    def __call__(self, tokens: int, pairs: int) -> float:
        return self.constant + self.token * tokens + self.pair * pairs


def pack_memory(
    shape: ModelShape, trace: Trace, heads: int, value: int, form: Form, cpu: bool, layers: int
) -> PackMemory:
    """Activations that autograd keeps of `layers` layers, and what one layer takes besides, for a moment.

    Args:
        value: bytes of a number.
        form: of the forward.
        layers: all of them; 0 with checkpointing, which keeps the inputs of layers, and without gradients.
    """
    layer, other = ([*x.convert().coef, 0.0, 0.0][:3] for x in (trace.layer_bytes, trace.other_bytes))
    counted = layers + 1 + (layers == 0)
    whole = [counted * a + b for a, b in zip(layer, other, strict=True)]
    token, pair = whole[1], whole[2]
    copies = max(layers, 1)
    if form == "flash":
        # Kept: queries, keys and values, where the traced sdpa repeats keys and values for each query head, and keeps
        # its outputs, its normalisers and the mask.
        token -= counted * ((3 * shape.attention_width - 2 * shape.kv_width) * value + 4 * heads)
        # In one layer's backward pass: the gradient of queries, outputs and their gradient; per gathered key the key
        # and the value, their gradients, and one of these sorted by place, then in float32 (`prefix.flash`).
        token += 3 * shape.attention_width * value
        pair = shape.kv_width * (5 * value + 4)
    elif form != "packed":
        pair += 3 + (CPU_SDPA_PAIR * copies if cpu else 0)  # the boolean mask while it is built
        token += 2 * shape.attention_width * value * copies if cpu else 0  # keys and values of every query head
    else:  # copies of queries, keys, values and outputs in blocks; on a CPU also the attention weights, else masks
        token += 2 * (shape.attention_width + shape.kv_width) * value * copies
        weights = heads * value * (CPU_SCORES * layers if layers else 4)
        pair += weights if cpu else shape.attention_width / shape.kv_width * value + 5
    return PackMemory(max(whole[0], 0.0), token, max(pair, 0.0))


def pairs_of(pack: Sequence[SampleTokens], form: Form) -> int:
    """`extensions.prefix.limits.Cost.pairs` of a pack."""
    if form == "masked":
        return pack_work(pack).tokens ** 2
    prefixes = {row.task: row.prefix for row in pack}
    if form == "flash":
        keys = sum(prefixes.values())
        for row in pack:
            chain = row.prefix + row.suffix
            keys += chain + row.responses * (max(row.response - 1, 0) + (chain if row.responses > 1 else 0))
        return keys
    pairs = sum(n * n for n in prefixes.values())
    for row in pack:
        written = max(row.response - 1, 0)
        if row.responses == 1:  # prompt and response are one span
            own = row.suffix + written
            pairs += own * (row.prefix + own)
        else:
            pairs += row.suffix * (row.prefix + row.suffix)
            pairs += row.responses * written * (row.prefix + row.suffix + written)
    return pairs


def rank_memory(job: TrainingJob, rows: int, ranks: int, setting: Setting) -> dict[str, float]:
    """Bytes by part. The update never coincides with rollout or evaluation, so the larger one is counted."""
    shape, stage, value = job.shape, setting.zero_stage, job.value_bytes
    batch = job.batch(rows, longest=True)
    parts_of_batch = packs(batch, setting.micro_batch_size)
    largest = max(parts_of_batch, key=lambda pack: pack_work(pack, job.sequence_loss).tokens)
    work = pack_work(largest, job.sequence_loss)
    pairs = pairs_of(largest, job.form)
    checkpointing = setting.gradient_checkpointing
    layers = 0 if checkpointing else shape.layers
    memory = pack_memory(shape, job.trace, job.num_heads, value, job.form, job.options.cpu, layers)
    activations = memory(work.tokens, pairs)
    if checkpointing:  # the input of each layer
        activations += shape.layers * work.tokens * shape.hidden * value
    chunk = min(work.predicting, max(1, LOGITS_AT_ONCE // shape.vocab))
    logits = chunk * shape.vocab * (4 * LOGIT_COPIES + value)

    evaluation, vllm = job.recipe.evaluation, _uses_vllm(job)
    sampled = max(
        rows * job.recipe.ppo.samples_per_prompt if job.ppo else 0,
        0 if evaluation.decoding == "likelihood" else evaluation.batch_size,
    )
    # KV cache of all rows sampled together (one layer's twice while it grows), and of a pack of prompts.
    longest = max(row.prefix + row.suffix for row in batch) + job.recipe.rollout.max_new_tokens
    cache = 2 * shape.kv_width * value * (sampled * longest * (shape.layers + 1) + work.tokens * shape.layers)
    cache += sampled * shape.vocab * 4 * DRAW_COPIES
    updating = vllm or activations + logits >= cache  # vLLM's cache is part of the engine

    base = job.base_bytes
    if stage == 3:
        base = base / ranks + min(base, DEEPSPEED_LIVE * value)
    parts = {
        "base weights": base * _base_copies(job),
        "adapters, gradients, optimizer": trained_bytes(job, ranks, stage),
        "activations": activations if updating else 0.0,
        "logits": logits if updating else 0.0,
        "cache of rollout or evaluation": 0.0 if updating else cache,
        "context": job.device.context * GIB,
        "DeepSpeed's gradient buffer": DEEPSPEED_BUCKET if stage > 0 else 0.0,
    }
    if vllm:
        _add_engine(job, parts)
    return {name: size for name, size in parts.items() if size}


def _uses_vllm(job: TrainingJob) -> bool:
    return job.ppo and (job.recipe.backend == "ray" or job.recipe.rollout.backend == "vllm")


def _base_copies(job: TrainingJob) -> int:
    """Copies of the base per GPU: one for all roles, or on Ray one per group if the groups share GPUs."""
    if not job.ppo or job.recipe.backend == "deepspeed" or not job.recipe.ray.colocate:
        return 1
    ppo = job.recipe.ppo
    return 1 + (ppo.value_model != "none") + (ppo.kl.init > 0)


def _add_engine(job: TrainingJob, parts: dict[str, float]) -> None:
    """Add vLLM's memory. A sleeping engine and the update alternate, so the larger one is counted."""
    if job.recipe.backend == "ray" and not job.recipe.ray.colocate:
        return
    engine = job.recipe.vllm.gpu_memory_utilization * job.device.memory * GIB
    if job.options.cpu:
        engine = job.base_bytes + VLLM_CPU_CACHE
    elif job.recipe.vllm.sleep:
        if engine < parts["activations"] + parts["logits"]:
            return
        parts["activations"] = parts["logits"] = 0.0
    parts["vLLM engine"] = engine


def trained_bytes(job: TrainingJob, ranks: int, stage: int) -> float:
    """Bytes of float32 parameters, gradients and optimizer state under ZeRO, including a copy of the parameters."""
    parameters, state = 4.0 * job.trained, optimizer_bytes(job)
    whole, sharded = {
        0: (2 * parameters + state, 0.0),
        2: (parameters, 2 * parameters + state),
        3: (0.0, 3 * parameters + state),
    }[stage]
    return whole + sharded / ranks + (4 * job.shape.lora if job.reference_adapter else 0)


def optimizer_bytes(job: TrainingJob) -> float:
    """Bytes of the unsharded float32 optimizer state: two moments (AdamW); row and column factors (Adafactor)."""
    if job.recipe.trained_with.name == "adamw":
        return 8.0 * job.trained
    # A LoRA matrix has `rank` rows (or columns) and weights / rank columns (or rows). The value head has matrices of
    # (hidden, hidden) and (1, hidden), and biases of hidden and 1.
    shape, rank = job.shape, job.recipe.lora.rank
    lora = job.num_adapters * (shape.lora // rank + shape.lora_tensors * rank)
    return 4.0 * (lora + (4 * shape.hidden + 2 if job.has_critic else 0))
