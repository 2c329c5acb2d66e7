"""What a job will need, before it is started: memory a rank, FLOPs, seconds; and which settings to use (`nlu plan`).

Nothing is downloaded or trained: the model is built without weights from its configuration. Memory is counted on the
tensors that autograd would keep (a forward with fake tensors, which have shapes and no numbers). A pass takes the
longest of three times: its FLOPs at a stated share of the device's peak, its weights through memory, and the start of
its kernels, which bounds small passes on GPUs. `NOT_MODELLED` and `CHECKED` say how far to trust it, and are printed.
"""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from extensions.common.errors import UserError
from extensions.data import (
    check_trainable,
    epoch_sizes,
    has_split,
    load_examples,
    load_training,
    rows_of_epoch,
    subsample_evenly,
)
from extensions.model.loading import attention_of, load_config
from extensions.model.policy import LOGITS_AT_ONCE
from extensions.model.prompt_encoder import load_recipe_encoder
from extensions.planner.flops import (
    Batch,
    ModelShape,
    decode_work,
    forward_flops,
    meta_model,
    pack_work,
    packs,
    ppo_flops,
    prompt_work,
    sft_flops,
)
from extensions.prefix.attention import NAME as PACKED
from extensions.prefix.tree import common_prefix
from extensions.prompts import PromptEncoder
from extensions.recipe import Lora, Recipe
from extensions.tasks import SUITES, Task

GIB = 2**30
SAMPLE = 512  # training rows, over all tasks, whose tokens are counted
MAX_GPUS = 1024
GPUS_A_NODE = 8  # that NVLink joins
USABLE = 0.92  # of the memory: the allocator loses some to fragments
DEEPSPEED_BUCKET = 5e8 * 4  # bytes of the gradient buffer of ZeRO 1 to 3, whatever the model (DeepSpeed 0.19.6)
DEEPSPEED_LIVE = 1e9  # weights that ZeRO 3 keeps gathered at most (DeepSpeed 0.19.6)
LOGIT_COPIES = 4  # float32 arrays of a chunk of logits at once: themselves, their logprobs, probabilities, slopes
DRAW_COPIES = 4  # of a decoding step, in float32: logits, their logprobs, probabilities, padded
BYTES_4BIT = 0.516  # of a weight in nf4 with double quantisation (QLoRA, section 3)
ALL_REDUCE_LATENCY_S = 20e-6  # of one hop of a collective, NCCL's order of magnitude between nodes
# Kernels of an optimizer step for each trained matrix: AdamW's are fused over many, Adafactor's are not.
OPTIMIZER_KERNELS = {"adamw": 2, "adafactor": 25}
VLLM_CPU_CACHE = GIB  # of keys and values, its engine's default here on a CPU
NOT_MODELLED = (
    "Not modelled: tokenizing, rewards, the time of evaluations, checkpoints, the slowest rank of each step, vLLM's "
    "speed (rollouts are taken as this project's own) and Ray's messages, deepspeed.offload and deepspeed.config."
)
# Whole iterations of SmolLM2-135M on CoLA (tests/bench, two cores, with the rate measured there): bfloat16 11.8 s,
# taken 10.7; float32 16.4 s, taken 18.2; memory 1.97 and 2.73 GiB, taken 2.03 and 2.83.
CHECKED = (
    "Checked on a CPU alone: predicted iterations of SmolLM2 were 10% too long to 10% too short, phases up to 25% off, "
    "memory 4% too low. Numbers for GPUs rest on what is assumed."
)

LINKS = {"nvlink": 300.0, "infiniband": 50.0, "ethernet": 12.5}  # GB/s a GPU, one way: NVLink 3, NDR 400, 100 Gb/s


@dataclass(frozen=True)
class Device:
    """What one rank runs on."""

    name: str
    tflops: float  # TFLOP/s at the model's dtype, peak, dense
    memory: float  # GiB
    bandwidth: float  # GB/s of memory
    utilisation: float  # share of the peak that a large pass reaches
    kernel_us: float  # microseconds that Python and torch take to start one kernel
    overlaps: bool  # whether kernels are started while others run
    context: float  # GiB that are gone before the first tensor

    @property
    def rate(self) -> float:
        """FLOP/s that a large pass reaches."""
        return self.tflops * 1e12 * self.utilisation


# Name -> TFLOP/s in bfloat16 and in float32 (no TF32, as torch has it by default), GiB, GB/s: NVIDIA's data sheets, SXM
# where there are several; dense rates, half of those "with sparsity". The T4 has no bfloat16 units: at best float32's.
GPUS = {
    "t4": (8.1, 8.1, 16, 320),
    "a10": (125, 31.2, 24, 600),
    "rtx4090": (165, 82.6, 24, 1008),
    "l40s": (362, 91.6, 48, 864),
    "a100-40": (312, 19.5, 40, 1555),
    "a100-80": (312, 19.5, 80, 2039),
    "h100": (989, 67, 80, 3350),
    "h200": (989, 67, 141, 4800),
}
# Assumed of GPUs: 40% of the peak is usual for dense training of 7B models; a decoding step of a 7B model in
# transformers takes about 25 ms on any recent GPU, which is 20 microseconds a kernel; a CUDA context with cuBLAS and
# NCCL is about 1.2 GiB.
GPU_UTILISATION, GPU_KERNEL_US, GPU_CONTEXT = 0.4, 20.0, 1.2
# Measured with SmolLM2-135M on one core (Xeon, AVX-512), against the matrix products that `measured` takes.
CPU_UTILISATION, CPU_KERNEL_US, CPU_CONTEXT = {"float32": 0.8, "bfloat16": 0.55}, 40.0, 0.6


@dataclass(frozen=True)
class PlanOptions:
    """What the command line asks for; None: the default of the device, or measured on the data."""

    cpu: bool = False
    gpu: str = "h100"
    gpu_memory: float | None = None  # GiB
    link: str = "nvlink"  # between ranks: one of LINKS, or GB/s
    rate: float | None = None  # TFLOP/s, peak, at the model's dtype
    bandwidth: float | None = None  # GB/s
    utilisation: float | None = None
    measure: bool = False
    prefix_tokens: int | None = None
    suffix_tokens: int | None = None
    response_tokens: int | None = None


# Where no data are at hand: about the means of GLUE's tasks (README's table, SentencePiece), and a short answer.
PREFIX_TOKENS, SUFFIX_TOKENS, ANSWER_TOKENS = 110, 50, 7


# ---------------------------------------------------------------------------------------------------------- devices


def find_device(options: PlanOptions, dtype: str, width: int) -> Device:
    """The device that the options name, with what they state of it.

    Args:
        dtype: of the model.
        width: hidden size of the model, for `--measure`.

    Raises:
        UserError: an unknown name, or a CPU of which nothing is known.
    """
    if options.cpu:
        tflops, bandwidth = measured(dtype, width) if options.measure else (options.rate, options.bandwidth)
        if tflops is None or bandwidth is None:
            raise UserError(
                "--cpu: the rate of a CPU is not known by name; add --measure to measure this one, or state it with "
                "--rate TFLOPS --bandwidth GB/S"
            )
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
        device = Device(
            "cpu", tflops, memory, bandwidth, CPU_UTILISATION[dtype], CPU_KERNEL_US, overlaps=False, context=CPU_CONTEXT
        )
    elif options.measure:
        raise UserError("--measure: measures this machine's CPU; use it with --cpu, or name the GPU with --gpu")
    elif options.gpu not in GPUS:
        raise UserError(
            f"--gpu: {options.gpu!r} is not known; choose from {', '.join(GPUS)}, or the nearest of them with "
            "--gpu-memory, --rate and --bandwidth for what differs"
        )
    else:
        bfloat16, float32, memory, bandwidth = GPUS[options.gpu]
        tflops = bfloat16 if dtype == "bfloat16" else float32
        device = Device(
            options.gpu, tflops, memory, bandwidth, GPU_UTILISATION, GPU_KERNEL_US, overlaps=True, context=GPU_CONTEXT
        )
    stated: dict[str, Any] = {
        "tflops": options.rate,
        "memory": options.gpu_memory,
        "bandwidth": options.bandwidth,
        "utilisation": options.utilisation,
    }
    return replace(device, **{name: value for name, value in stated.items() if value is not None})


def measured(dtype: str, width: int) -> tuple[float, float]:
    """TFLOP/s and GB/s of this machine's CPU: by matrices as wide as the model, and by one row and large weights."""
    with torch.no_grad():
        rate = _rate(512, width, 4 * width, getattr(torch, dtype))
        side = 4096  # 64 MB of weights, beyond the caches; two FLOPs for each four bytes
        bandwidth = _rate(1, side, side, torch.float32) * 2
    return rate / 1e12, bandwidth / 1e9


def _rate(rows: int, width: int, out: int, dtype: torch.dtype) -> float:
    """FLOP/s of (rows, width) x (width, out), the median over about a third of a second."""
    left, right = torch.randn(rows, width, dtype=dtype), torch.randn(out, width, dtype=dtype)
    nn.functional.linear(left, right)
    seconds: list[float] = []
    while len(seconds) < 3 or sum(seconds) < 0.3:
        start = time.perf_counter()
        nn.functional.linear(left, right)
        seconds.append(time.perf_counter() - start)
    return 2 * rows * width * out / float(np.median(seconds))


def link_rate(link: str, ranks: int) -> float:
    """Bytes/s one way between ranks. NVLink joins the GPUs of a node; beyond it InfiniBand is assumed.

    Raises:
        UserError: neither a name nor a positive number.
    """
    if link in LINKS:
        slow = link == "nvlink" and ranks > GPUS_A_NODE
        return LINKS["infiniband" if slow else link] * 1e9
    try:
        rate = float(link)
    except ValueError:
        rate = math.nan
    if not 0 < rate < math.inf:
        raise UserError(f"--link: {link!r} is neither one of {', '.join(LINKS)} nor a number of GB/s above 0")
    return rate * 1e9


# ----------------------------------------------------------------------------------------------------------- tokens


@dataclass(frozen=True)
class TaskTokens:
    """Token numbers of one task's training rows."""

    task: str
    rows: int  # of an epoch, after mixing
    prefix: int
    suffixes: list[int]  # of the rows that were counted
    answers: list[int]  # gold answers and closing tag, for SFT


def token_statistics(
    recipe: Recipe, config: Any, options: PlanOptions, warn: Callable[[str], None]
) -> tuple[list[TaskTokens], str]:
    """Tokens of each trained task, and in words where they are from.

    Raises:
        UserError: no task of the recipe can be trained on, or the data or the tokenizer cannot be read.
    """
    check_trainable(recipe.data.tasks)
    tasks = [task for task in recipe.data.tasks if has_split(task, "train")]
    stated = options.prefix_tokens is not None and options.suffix_tokens is not None
    absent = recipe.data.root is None and any(task.suite in SUITES for task in tasks)
    if stated or absent:
        sizes = {task.name: _stated_rows(recipe, task) for task in tasks}
        found = {task.name: _assumed(task, options) for task in tasks}
        of = "as stated" if stated else "assumed, data.root is not set"
        one = found[tasks[0].name]
        source = f"{one.prefix} + {one.suffixes[0]} prompt tokens {of}; rows of the official training sets"
    else:
        encoder = load_recipe_encoder(recipe, config, tasks, warn)
        found, sizes = {}, {}
        for task in tasks:
            examples = load_training(task, recipe.data.root, recipe.data.max_train_samples, recipe.seed)
            sizes |= epoch_sizes(examples, recipe.data.oversample)
            found[task.name] = _counted(
                encoder, task, subsample_evenly(examples, max(2, SAMPLE // len(tasks))), options
            )
        counted = sum(len(one.suffixes) for one in found.values())
        source = f"tokens counted on {counted} training rows with the model's tokenizer"
    data = recipe.data
    mixed = rows_of_epoch(sizes, data.mixing, data.mixing_cap, data.mixing_temperature)
    return [replace(found[task.name], rows=mixed[task.name]) for task in tasks], source


def _stated_rows(recipe: Recipe, task: Task) -> int:
    rows = task.source.sizes.get("train") or len(load_examples(task, "train", recipe.data.root, recipe.seed))
    return min(rows, recipe.data.max_train_samples or rows)


def _assumed(task: Task, options: PlanOptions) -> TaskTokens:
    prefix = PREFIX_TOKENS if options.prefix_tokens is None else options.prefix_tokens
    suffix = SUFFIX_TOKENS if options.suffix_tokens is None else options.suffix_tokens
    return TaskTokens(task.name, 0, prefix, [suffix], [options.response_tokens or ANSWER_TOKENS])


def _counted(encoder: PromptEncoder, task: Task, examples: Sequence[Any], options: PlanOptions) -> TaskTokens:
    encoded = [encoder.encode(task, example.fields) for example in examples]
    answers = [
        len(encoder.answer_ids(ids, text, task.answer(example.label)))
        for (ids, text), example in zip(encoded, examples, strict=True)
    ]
    prompts = [ids for ids, _ in encoded]
    prefix = common_prefix(prompts) if options.prefix_tokens is None else options.prefix_tokens
    own = [max(1, len(ids) - prefix) for ids in prompts]
    return TaskTokens(
        task.name,
        0,
        prefix,
        own if options.suffix_tokens is None else [options.suffix_tokens],
        answers if options.response_tokens is None else [options.response_tokens],
    )


def typical_batch(tokens: Sequence[TaskTokens], rows: int, budget: tuple[int, int] | None, worst: bool) -> list[Batch]:
    """A batch of `rows` rows as the training draws them, one `Batch` for each task in it.

    Tasks, prompt lengths and response lengths are at equal distances in their distributions, so that a batch of one
    row is the median and a large one has the mean of all.

    Args:
        budget: fewest and most response tokens (PPO; every response runs to its budget); None: gold answers (SFT).
        worst: long rows, for memory: the 95th percentile of prompts and the longest responses.
    """
    shares = np.cumsum([task.rows for task in tokens]) / sum(task.rows for task in tokens)
    places = (np.arange(rows) + 0.5) / rows
    task_of = np.searchsorted(shares, places).clip(max=len(tokens) - 1)
    batches = []
    for k, task in enumerate(tokens):
        count = int((task_of == k).sum())
        if count == 0:
            continue
        levels = np.full(count, 0.95) if worst else (np.arange(count) + 0.5) / count
        ends = np.ones(count) if worst else (np.arange(count) + 0.5) / count
        if budget is None:
            responses = np.quantile(task.answers, ends)
        else:
            responses = np.minimum(budget[0] + np.floor(ends * (budget[1] - budget[0] + 1)), budget[1])
        suffixes = np.quantile(task.suffixes, levels).round().astype(int)
        batches.append(Batch(task.prefix, suffixes.tolist(), responses.round().astype(int).tolist()))
    return batches


# ----------------------------------------------------------------------------------------------------------- memory


NO_KERNEL = {torch.ops.aten._unsafe_view.default, torch.ops.aten.empty_like.default}


class _Kernels(TorchDispatchMode):
    """Counts the operations that start a kernel: all but views."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        starts = func.namespace == "aten" and not func.is_view and func not in NO_KERNEL
        self.count += starts
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Trace:
    """What a training forward of the decoder leaves: a number for each layer, and for all else."""

    layer_bytes: float  # kept for the backward pass
    other_bytes: float  # the same, outside the layers
    layer_kernels: float
    other_kernels: float


class Memory:
    """Bytes that autograd keeps of a pack, and kernels of a forward, from forwards of the model's first layers.

    Args:
        config: of transformers.
        attention: the implementation, as the recipe has it.
    """

    LENGTHS = (64, 128, 256)

    def __init__(self, config: Any, lora: Lora, attention: str, dtype: torch.dtype, trust_remote_code: bool) -> None:
        self.config, self.lora, self.attention, self.dtype = config, lora, attention, dtype
        self.trust_remote_code = trust_remote_code

    @cached_property
    def _curves(self) -> tuple[Any, Any, Trace]:
        """Bytes of a layer and of the rest by pack length. Both are polynomials of degree 2, so three lengths do."""
        # The second layer is as all others; the first keeps less, for nothing trained is before it.
        traces = [
            Trace(two - one, 2 * one - two, second - first, 2 * first - second)
            for (one, first), (two, second) in zip(self._forwards(1), self._forwards(2), strict=True)
        ]
        layer = np.polynomial.Polynomial.fit(self.LENGTHS, [trace.layer_bytes for trace in traces], 2)
        other = np.polynomial.Polynomial.fit(self.LENGTHS, [trace.other_bytes for trace in traces], 2)
        return layer, other, traces[-1]

    def at(self, tokens: int) -> Trace:
        """For a pack of so many tokens."""
        layer, other, trace = self._curves
        return replace(trace, layer_bytes=float(layer(tokens)), other_bytes=float(other(tokens)))

    def _forwards(self, layers: int) -> list[tuple[int, int]]:
        """Bytes kept and kernels started by the model cut to so many layers, for each of `LENGTHS`."""
        config = copy.deepcopy(self.config)
        config.get_text_config().num_hidden_layers = layers
        model = meta_model(config, self.lora, self.attention, self.dtype, self.trust_remote_code)
        found = []
        with FakeTensorMode():
            _pretend_cpu(model)
            model.train()
            for tokens in self.LENGTHS:
                inputs = {
                    "input_ids": torch.zeros(1, tokens, dtype=torch.long),
                    "position_ids": torch.arange(tokens)[None],
                    "attention_mask": torch.zeros(1, 1, tokens, tokens, dtype=self.dtype),
                }
                with _Kernels() as kernels:
                    kept = kept_bytes(model.base_model, inputs)
                found.append((kept, kernels.count))
        return found


def kept_bytes(trunk: nn.Module, inputs: dict[str, torch.Tensor]) -> int:
    """Bytes of all storages that autograd keeps of one forward, weights aside."""
    weights = {p.untyped_storage()._cdata for p in trunk.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage  # held, so that no other gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = trunk(**inputs, use_cache=False)
    del out
    return sum(storage.nbytes() for storage in kept.values())


def _pretend_cpu(model: nn.Module) -> None:
    """Fake tensors on the CPU in place of meta ones: attention then takes a fused kernel, as on a GPU."""
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                module._parameters[name] = nn.Parameter(
                    torch.empty(weight.shape, dtype=weight.dtype), requires_grad=weight.requires_grad
                )
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def optimizer_bytes(shapes: Sequence[tuple[int, ...]], name: str) -> int:
    """Bytes of the optimizer's state, float32: two moments (AdamW); rows and columns (Adafactor without momentum).

    Args:
        shapes: of the trained parameters.
    """
    if name == "adamw":
        return sum(4 * 2 * math.prod(shape) for shape in shapes)
    return sum(4 * (shape[0] + shape[1] if len(shape) == 2 else math.prod(shape)) for shape in shapes)


# ------------------------------------------------------------------------------------------------------------- plan


@dataclass(frozen=True)
class Setting:
    """What may be chosen without changing the results (beyond rounding)."""

    zero_stage: int
    gradient_checkpointing: bool
    micro_batch_size: int


@dataclass(frozen=True)
class Estimate:
    """One rank under one setting."""

    setting: Setting
    memory: dict[str, float]  # part -> GiB; what is there at the same time
    at_load: float  # GiB when the model is loaded: the whole base, before ZeRO 3 shards it
    seconds: dict[str, float]  # phase -> seconds of one step

    @property
    def total(self) -> float:
        """GiB at the worst moment."""
        return max(sum(self.memory.values()), self.at_load)

    @property
    def step_s(self) -> float:
        return sum(self.seconds.values())


@dataclass(frozen=True)
class Scaling:
    """One line of the scaling table."""

    gpus: int
    batch_size: int  # the recipe's, or where that is too small the least that gives each rank a row
    step_s: float | None  # None: does not fit
    samples_per_s: float | None
    setting: Setting | None
    enough: bool  # whether the recipe's batch can be shared by so many


@dataclass(frozen=True)
class Plan:
    """The answer."""

    recipe: str
    method: str
    model: str
    device: Device
    dtype: str
    gpus: int  # asked for
    ranks: int  # that the batch can use
    tokens: str  # where the token numbers are from
    shape: ModelShape
    trained: int
    chosen: Estimate
    why: list[str]
    settings: list[str]  # key=value, for the command line
    flops: dict[str, float]  # phase -> FLOPs of a step over all ranks, in the least form
    batch_size: int
    rows: int  # of an epoch
    epoch_s: float
    steps: int  # of the whole run
    samples_per_s: float
    tokens_per_s: float  # prompt and response tokens of the samples
    utilisation: float  # least FLOPs over the peak of all ranks
    scaling: list[Scaling]

    def as_json(self) -> dict[str, Any]:
        derived: dict[str, Any] = {"memory_gib": self.chosen.total, "step_s": self.chosen.step_s}
        derived |= {"not_modelled": NOT_MODELLED, "checked": CHECKED}
        return asdict(self) | derived


@contextmanager
def _counting(config: Any) -> Iterator[None]:
    """Turns what a family raises in a forward without weights into one sentence."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"nlu plan cannot count models of the family {config.model_type!r}, whose code does not run without "
            f"weights ({type(error).__name__}: {' '.join(str(error).split())[:99]}); nlu check loads and measures one"
        ) from error


class Planner:
    """Everything that does not depend on the number of ranks.

    Args:
        warn: gets what is odd but no error.
    """

    def __init__(
        self, recipe: Recipe, options: PlanOptions, warn: Callable[[str], None] = lambda message: None
    ) -> None:
        if recipe.method not in ("ppo", "sft"):
            raise UserError(f"method: {recipe.method!r} trains no LLM; plan a recipe of ppo or sft (method=ppo)")
        _check(options)
        link_rate(options.link, 1)
        self.recipe, self.options = recipe, options
        model = recipe.model
        config = load_config(model)
        with _counting(config):
            self.shape = ModelShape.of(config, recipe.lora, model.trust_remote_code)
        if model.load_in_4bit and options.cpu:
            raise UserError("model.load_in_4bit: true needs a GPU; set it to false, or leave out --cpu")
        auto = "float32" if options.cpu else "bfloat16"
        self.dtype = auto if model.dtype == "auto" else model.dtype
        self.device = find_device(options, self.dtype, self.shape.hidden)
        self.word = 2 if self.dtype == "bfloat16" else 4  # bytes of a number
        attention = attention_of(model, config)
        self.dense = attention != PACKED  # whether all pairs are computed, and most of them masked
        with _counting(config):
            self.heads = config.get_text_config().num_attention_heads
            dtype = getattr(torch, self.dtype)
            self.activations = Memory(config, recipe.lora, attention, dtype, model.trust_remote_code)
            self.activations.at(1)
        self.tokens, self.source = token_statistics(recipe, config, options, warn)
        self.ppo = recipe.method == "ppo"
        self.adapters = 2 if self.ppo and recipe.ppo.critic == "adapter" else 1
        self.estimate = lru_cache(maxsize=None)(self._estimate)

    # ---------------------------------------------------------------------------------------------- the recipe's

    @property
    def trained(self) -> int:
        """Trained numbers: adapters, and PPO's value head with its biases."""
        head = self.shape.value_head + self.shape.hidden + 1 if self.ppo else 0
        return self.adapters * self.shape.lora + head

    @property
    def base_bytes(self) -> float:
        shape = self.shape
        if self.recipe.model.load_in_4bit:
            return BYTES_4BIT * shape.linear + self.word * (shape.parameters - shape.linear)
        return float(self.word * shape.parameters)

    @property
    def _budget(self) -> tuple[int, int] | None:
        rollout, stated = self.recipe.rollout, self.options.response_tokens
        if not self.ppo:
            return None
        return (stated, stated) if stated is not None else (rollout.min_new_tokens, rollout.max_new_tokens)

    @property
    def _recompute(self) -> bool:
        old, ppo = self.recipe.ppo.old_logprobs, self.recipe.ppo
        if not self.recipe.lora.dropout and ppo.mini_batch_size is None and ppo.critic == "shared":
            return False  # the first update's forward is it, where the batch is one pack (extensions.training.ppo)
        return old == "recomputed" or (old == "auto" and self.dtype != "float32")

    @property
    def _reference_adapter(self) -> bool:
        kl = self.recipe.ppo.kl
        return self.ppo and self.recipe.model.adapter is not None and kl.reference == "start" and kl.init > 0

    def batches(self, rows: int, worst: bool = False) -> list[Batch]:
        """A rank's share of a step."""
        return typical_batch(self.tokens, rows, self._budget, worst)

    def flops(self, rows: int, setting: Setting, dense: bool = False) -> dict[str, float]:
        """FLOPs of a step on one rank, by phase."""
        batches, size = self.batches(rows), setting.micro_batch_size
        if not self.ppo:
            sequence = self.recipe.sft.loss == "sequence"
            return sft_flops(self.shape, batches, size, sequence, setting.gradient_checkpointing, dense)
        ppo = self.recipe.ppo
        return ppo_flops(
            self.shape,
            batches,
            ppo.epochs,
            size,
            rows // self._optimizer_steps or 1,
            ppo.critic,
            reference=ppo.kl.init > 0,
            reference_adapter=self._reference_adapter,
            recompute=self._recompute,
            checkpointing=setting.gradient_checkpointing,
            dense=dense,
        )

    # ----------------------------------------------------------------------------------------- memory and seconds

    def _estimate(self, rows: int, ranks: int, setting: Setting) -> Estimate:
        return Estimate(
            setting,
            self._memory(rows, ranks, setting),
            self.base_bytes / GIB + self.device.context,
            self._seconds(rows, ranks, setting),
        )

    def _memory(self, rows: int, ranks: int, setting: Setting) -> dict[str, float]:
        """GiB by part. Update, rollout and evaluation do not coincide; the largest is counted."""
        shape, stage, word = self.shape, setting.zero_stage, self.word
        batches = self.batches(rows, worst=True)
        size = setting.micro_batch_size
        work = max((pack_work(pack, self._sequence) for pack in packs(batches, size)), key=lambda work: work.tokens)
        trace = self.activations.at(work.tokens)
        kept = shape.layers * trace.layer_bytes
        if setting.gradient_checkpointing:  # the input of each layer, and one layer's at a time
            kept = shape.layers * work.tokens * shape.hidden * word + trace.layer_bytes
        activations = kept + trace.other_bytes + trace.layer_bytes  # once more for the gradients of a layer
        if self.dense:
            activations += work.tokens**2 * 3  # the mask, of single bytes, while it is made
        else:  # queries, keys, values and outputs once more, as they stand in blocks; on a CPU the weights of the pairs
            layer = work.tokens * 2 * (shape.attention_width + shape.kv_width) * word
            layer += self.heads * work.pairs * word if self.options.cpu else 0
            activations += layer * (1 if setting.gradient_checkpointing else shape.layers)
        chunk = min(work.predicting, max(1, LOGITS_AT_ONCE // shape.vocab))
        logits = chunk * shape.vocab * (4 * LOGIT_COPIES + word)
        evaluation = self.recipe.evaluation
        sampled = max(rows if self.ppo else 0, 0 if evaluation.decoding == "likelihood" else evaluation.batch_size)
        # Keys and values of all rows sampled together, one layer's once more as it grows, and of a pack of prompts.
        longest = max(b.prefix + max(b.suffixes) for b in batches) + self.recipe.rollout.max_new_tokens
        per_token = 2 * shape.kv_width * word
        cache = per_token * (sampled * longest * (shape.layers + 1) + work.tokens * shape.layers)
        cache += sampled * shape.vocab * 4 * DRAW_COPIES
        updating = self.vllm or activations + logits >= cache  # vLLM's cache is in its own share
        parts = {
            "base weights": self.base_bytes,
            "adapters, gradients, optimizer": self._trained_bytes(ranks, stage),
            "activations": activations if updating else 0.0,
            "logits": logits if updating else 0.0,
            "cache of rollout or evaluation": 0.0 if updating else cache,
            "context": self.device.context * GIB,
        }
        if stage == 3:
            parts["base weights"] = self.base_bytes / ranks + min(self.base_bytes, DEEPSPEED_LIVE * word)
        if stage > 0:
            parts["DeepSpeed's gradient buffer"] = DEEPSPEED_BUCKET
        parts["base weights"] *= self.copies
        if self.vllm:
            self._with_engine(parts)
        return {name: size / GIB for name, size in parts.items() if size}

    @property
    def vllm(self) -> bool:
        return self.ppo and (self.recipe.backend == "ray" or self.recipe.rollout.backend == "vllm")

    @property
    def copies(self) -> int:
        """Of the base on a GPU: one in all roles, or one a group on Ray where they share the GPUs."""
        if not self.ppo or self.recipe.backend == "deepspeed" or not self.recipe.ray.colocate:
            return 1
        return 2 + (self.recipe.ppo.kl.init > 0)

    def _with_engine(self, parts: dict[str, float]) -> None:
        """Put vLLM's memory in; while it sleeps, that of the update is there in its stead."""
        if self.recipe.backend == "ray" and not self.recipe.ray.colocate:
            return
        engine = self.recipe.vllm.gpu_memory_utilization * self.device.memory * GIB
        if self.options.cpu:
            engine = self.base_bytes + VLLM_CPU_CACHE
        if self.recipe.vllm.sleep and not self.options.cpu:
            if engine < parts["activations"] + parts["logits"]:
                return
            parts["activations"] = parts["logits"] = 0.0
        parts["vLLM engine"] = engine

    @property
    def _sequence(self) -> bool:
        return not self.ppo and self.recipe.sft.loss == "sequence"

    def _trained_bytes(self, ranks: int, stage: int) -> float:
        """Float32 parameters, gradients, optimizer state; ZeRO shards state (and a copy), then gradients, then all."""
        reference = self.shape.lora if self._reference_adapter else 0
        parameters = 4.0 * self.trained
        state = self.state_bytes
        if stage == 0:
            return 2 * parameters + state + 4 * reference
        sharded = state + parameters + (parameters if stage >= 2 else 0) + (parameters if stage == 3 else 0)
        whole = (parameters if stage < 3 else 0) + (parameters if stage < 2 else 0)
        return whole + sharded / ranks + 4 * reference

    @property
    def state_bytes(self) -> float:
        """Of the optimizer's state, float32, unsharded."""
        if self.recipe.trained_with.name == "adamw":
            return float(8 * self.trained)
        # Rows and columns of the matrices: of LoRA's, `rank` and the width that makes up the rest of each.
        shape, rank = self.shape, self.recipe.lora.rank
        lora = 4 * self.adapters * (shape.lora // rank + shape.lora_tensors * rank)
        hidden = shape.hidden
        head = optimizer_bytes([(hidden, hidden), (hidden,), (1, hidden), (1,)], "adafactor") if self.ppo else 0
        return float(lora + head)

    def _pass(self, flops: float, kernels: float, gathers: float, ranks: int, passes: int) -> float:
        """Seconds of passes over the base. Its weights are read once in each, and with ZeRO 3 gathered.

        Args:
            kernels: that one pass starts.
            gathers: of the whole base, in all.
        """
        device = self.device
        weights = passes * self.base_bytes / (device.bandwidth * 1e9)
        starts = passes * kernels * device.kernel_us * 1e-6
        work = max(flops / device.rate, weights)
        gather = gathers * self.base_bytes * (ranks - 1) / ranks / link_rate(self.options.link, ranks)
        return (max(work, starts) if device.overlaps else work + starts) + gather

    def _seconds(self, rows: int, ranks: int, setting: Setting) -> dict[str, float]:
        shape, size = self.shape, setting.micro_batch_size
        batches = self.batches(rows)
        sharded = setting.zero_stage == 3 and ranks > 1
        trace = self.activations.at(1)
        forward = shape.layers * trace.layer_kernels + trace.other_kernels + 12
        count = len(packs(batches, size))
        flops = self.flops(rows, setting, self.dense)
        seconds = {}
        for phase, amount in flops.items():
            if phase == "rollout":
                prompts = forward_flops(shape, prompt_work(batches, size, self.dense), head=False)
                # All ranks wait for the longest response.
                steps = max(max(batch.responses) for batch in self.batches(rows * ranks))
                if (
                    sharded
                ):  # every rank writes as many tokens for every row (extensions.rollout.sampler, fixed_decode_steps)
                    steps = self.recipe.rollout.max_new_tokens
                read = self._pass(prompts, forward, count * sharded, ranks, count)
                written = self._decode(rows, batches, steps, forward, sharded, ranks)
                seconds[phase] = read + written
            elif phase == "update":
                epochs = self.recipe.ppo.epochs if self.ppo else 1
                learned = epochs * self.adapters * len(packs(batches, min(size, rows // self._optimizer_steps or 1)))
                # A backward pass starts twice the kernels of its forward, without Python in half the time each.
                passes = learned * (3 if setting.gradient_checkpointing else 2)
                gathers = 2 * learned * sharded
                seconds[phase] = self._pass(amount, forward, gathers, ranks, passes)
                seconds[phase] += epochs * self._optimizer_steps * self._optimizer_step(ranks)
            else:
                seconds[phase] = self._pass(amount, forward, count * sharded, ranks, count)
        return seconds

    def _decode(
        self, rows: int, batches: Sequence[Batch], steps: int, forward: float, sharded: bool, ranks: int
    ) -> float:
        """Seconds of the token steps: weights and cache are read once in each, however few rows are left."""
        shape, device = self.shape, self.device
        work = decode_work(batches)
        cache = 2 * shape.kv_width * self.word * shape.layers * work.pairs / (device.bandwidth * 1e9)
        flops = forward_flops(shape, work, value=True)
        return self._pass(flops, forward, (steps - 1) * sharded, ranks, max(steps - 1, 1)) + cache

    @property
    def _optimizer_steps(self) -> int:
        """In a pass over the batch."""
        ppo = self.recipe.ppo
        return ppo.batch_size // (ppo.mini_batch_size or ppo.batch_size) if self.ppo else 1

    def _optimizer_step(self, ranks: int) -> float:
        """Seconds of the gradient exchange and the update."""
        name = self.recipe.trained_with.name
        size = 4.0 * self.trained
        touched = 7 * size / (self.device.bandwidth * 1e9)  # parameter, gradient, moments: read, and written
        kernels = OPTIMIZER_KERNELS[name] * self.adapters * self.shape.lora_tensors * self.device.kernel_us * 1e-6
        exchange = 0.0
        if ranks > 1:  # a ring moves each byte twice, less one share
            exchange = 2 * size * (ranks - 1) / ranks / link_rate(self.options.link, ranks)
            exchange += 2 * math.ceil(math.log2(ranks)) * ALL_REDUCE_LATENCY_S
        return max(touched, kernels) + exchange

    # -------------------------------------------------------------------------------------------------- the choice

    def candidates(self, rows: int, ranks: int) -> list[Estimate]:
        """Every setting that the recipe's optimizer and model allow, the fastest first."""
        sizes = sorted({*(2**k for k in range(rows.bit_length()) if 2**k < rows), rows})
        stages = [0]
        if self.recipe.trained_with.name != "adafactor" and not self.recipe.model.load_in_4bit and ranks > 1:
            stages = [0, 2, 3]
        found = [
            self.estimate(rows, ranks, Setting(stage, checkpointing, size))
            for stage in stages
            for checkpointing in (False, True)
            for size in sizes
        ]
        return sorted(found, key=lambda e: (e.step_s, e.setting.zero_stage, e.total))

    def fits(self, estimate: Estimate) -> bool:
        return estimate.total <= USABLE * self.device.memory

    def choose(self, rows: int, ranks: int) -> Estimate | None:
        """The fastest that fits."""
        return next(filter(self.fits, self.candidates(rows, ranks)), None)

    def scaling(self) -> list[Scaling]:
        found = []
        for ranks in (2**k for k in range(MAX_GPUS.bit_length())):
            enough = self._shared_by(ranks)
            batch = self.batch_size if enough else math.ceil(self.batch_size / ranks) * ranks
            best = self.choose(batch // ranks, ranks)
            step = best.step_s if best else None
            found.append(
                Scaling(ranks, batch, step, batch / step if step else None, best.setting if best else None, enough)
            )
        return found

    @property
    def batch_size(self) -> int:
        return self.recipe.training_batch

    def _shared_by(self, ranks: int) -> bool:
        """Whether so many ranks can share a step's samples evenly, as `extensions.runs.training_run` asks."""
        mini = self.recipe.ppo.mini_batch_size if self.ppo else None
        return self.batch_size % ranks == 0 and (mini or self.batch_size) % ranks == 0

    def plan(self, gpus: int) -> Plan:
        """The fastest setting that fits, and what it costs.

        Args:
            gpus: ranks to plan for; those that the batch cannot use are left out.

        Raises:
            UserError: nothing fits.
        """
        if not 1 <= gpus <= MAX_GPUS:
            raise UserError(f"--gpus: {gpus} is not from 1 to {MAX_GPUS}; for the CPU use --cpu")
        recipe, wanted = self.recipe, gpus
        ranks = max(n for n in range(1, wanted + 1) if self._shared_by(n))
        rows = self.batch_size // ranks
        chosen = self.choose(rows, ranks)
        if chosen is None:
            raise UserError(self._nothing_fits(rows, ranks))
        least = self.flops(rows, replace(chosen.setting, gradient_checkpointing=False))
        flops = {phase: ranks * amount for phase, amount in least.items()}
        steps = recipe.training_steps(sum(task.rows for task in self.tokens))
        samples = self.batch_size / chosen.step_s
        batches = self.batches(rows)
        tokens = sum(b.rows * b.prefix + sum(b.suffixes) + sum(b.responses) for b in batches)
        peak = self.device.tflops * 1e12 * ranks
        rows_an_epoch = sum(task.rows for task in self.tokens)
        return Plan(
            recipe=recipe.name,
            method=recipe.method,
            model=recipe.model.path,
            device=self.device,
            dtype=self.dtype,
            gpus=gpus,
            ranks=ranks,
            tokens=self.source,
            shape=self.shape,
            trained=self.trained,
            chosen=chosen,
            why=self._why(chosen, rows, ranks, wanted),
            settings=self._settings(chosen.setting),
            flops=flops,
            batch_size=self.batch_size,
            rows=rows_an_epoch,
            epoch_s=rows_an_epoch / samples,
            steps=steps,
            samples_per_s=samples,
            tokens_per_s=samples * tokens / rows,
            utilisation=sum(flops.values()) / (chosen.step_s * peak),
            scaling=[] if self.options.cpu else self.scaling(),
        )

    def _settings(self, setting: Setting) -> list[str]:
        return [
            f"deepspeed.zero_stage={setting.zero_stage}",
            f"model.gradient_checkpointing={str(setting.gradient_checkpointing).lower()}",
            f"{self.recipe.method}.micro_batch_size={setting.micro_batch_size}",
        ]

    def _nothing_fits(self, rows: int, ranks: int) -> str:
        least = min(self.candidates(rows, ranks), key=lambda e: e.total)
        ways = ["a device with more memory"]
        if not self.recipe.model.load_in_4bit and self.device.name != "cpu":
            ways.append("model.load_in_4bit=true")
        if self.recipe.trained_with.name == "adafactor" and ranks > 1:
            key = "sft.optimizer" if self.recipe.method == "sft" else "optimizer.name"
            ways.append(f"{key}=adamw, which allows ZeRO 3")
        ways.append("a smaller evaluation.batch_size or prompt.max_tokens")
        return (
            f"--gpu-memory: {self.device.memory:g} GiB, of which {USABLE:.0%} are counted on, hold no setting; the "
            f"least, {', '.join(self._settings(least.setting))}, needs {least.total:.1f} GiB a rank. Use "
            f"{', or '.join(ways)}"
        )

    def _why(self, chosen: Estimate, rows: int, ranks: int, wanted: int) -> list[str]:
        """The reasons, one sentence or two for each decision."""
        setting, base = chosen.setting, self.base_bytes / GIB
        every = self.candidates(rows, ranks)
        name = self.recipe.trained_with.name

        def best(**other: Any) -> Estimate | None:
            alike = [e for e in every if all(getattr(e.setting, key) == value for key, value in other.items())]
            return min(alike, key=lambda e: (not self.fits(e), e.step_s), default=None)

        why = []
        if wanted > ranks:
            key = f"{self.recipe.method}.batch_size"
            if wanted > self.batch_size:
                lacking = f"gives {wanted} GPUs less than a row each"
            else:
                lacking = f"cannot be shared evenly by {wanted} GPUs"
            multiple = math.ceil(self.batch_size / wanted) * wanted
            why.append(
                f"ranks: {ranks}. {key}={self.batch_size} {lacking}; {key}={multiple} could use all of them, and is "
                "another batch size than the recipe's."
            )
        if setting.zero_stage == 0:
            reason = f"stage 0: each rank holds the whole base ({base:.1f} GiB)"
            third = best(zero_stage=3)
            if name == "adafactor":
                reason += "; Adafactor loses its factored state in any other stage"
            elif self.recipe.model.load_in_4bit:
                reason += "; a 4-bit base is not sharded"
            elif ranks == 1:
                reason += "; one rank has nobody to share it with"
            elif third is not None:
                state = self._trained_bytes(ranks, 0) / GIB
                often = "every pass and for every token of a rollout" if self.ppo else "every pass"
                reason += (
                    f". All that stage 2 could shard is {state:.2f} GiB, and its gradient buffer takes "
                    f"{DEEPSPEED_BUCKET / GIB:.1f} GiB; stage 3 would gather the base in {often}, "
                    f"{third.step_s / chosen.step_s:.1f} times the step"
                )
        else:
            reason = f"stage {setting.zero_stage}: "
            whole = best(zero_stage=0)
            if whole is not None and self.fits(whole):
                reason += f"stage 0 fits only with {', '.join(self._settings(whole.setting)[1:])}, "
                reason += f"{whole.step_s / chosen.step_s:.1f} times the step"
            else:
                least = min(e.total for e in every if e.setting.zero_stage == 0)
                reason += f"at stage 0 a rank would need {least:.1f} GiB or more"
            if setting.zero_stage == 3:
                reason += f"; each rank still loads the whole base ({base:.1f} GiB) before it is sharded"
        why.append(f"{reason}.")

        same = replace(setting, gradient_checkpointing=not setting.gradient_checkpointing)
        other = self.estimate(rows, ranks, same)
        if setting.gradient_checkpointing:
            fitting = "would not fit" if not self.fits(other) else "is no faster here"
            why.append(
                f"checkpointing on: without it {setting.micro_batch_size} rows a pack need {other.total:.1f} GiB, "
                f"which {fitting}; smaller packs repeat the prefix more often."
            )
        else:
            saved = chosen.total - other.total
            what = f"save {saved:.1f} GiB" if saved > 0.05 else "save nothing, for the worst moment is another,"
            why.append(
                f"checkpointing off: activations fit; it would {what} and make the step "
                f"{other.step_s / chosen.step_s:.2f} times as long."
            )
        if setting.micro_batch_size == rows:
            why.append(
                f"micro-batch {rows}: all rows of a rank are one pack, so its prefix is computed once in each pass."
            )
        else:
            one = self.estimate(rows, ranks, replace(setting, micro_batch_size=rows))
            reason = "is slower, by attention over all pairs" if self.fits(one) else f"needs {one.total:.1f} GiB"
            why.append(f"micro-batch {setting.micro_batch_size}: one pack of all {rows} rows of a rank {reason}.")
        return why


def _check(options: PlanOptions) -> None:
    """UserError for a number out of range."""
    for name in ("gpu_memory", "rate", "bandwidth"):
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name.replace('_', '-')}: {value:g} is not a number above 0")
    if options.utilisation is not None and not 0 < options.utilisation <= 1:
        raise UserError(f"--utilisation: {options.utilisation:g} is not a share above 0 and at most 1")
    for name, least in (("prefix_tokens", 0), ("suffix_tokens", 1), ("response_tokens", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')}: {value} is below {least}")


# ------------------------------------------------------------------------------------------------------------ tables


def tables(plan: Plan) -> list[Table | str]:
    """What `nlu plan` prints, in order; texts are plain."""
    device, chosen = plan.device, plan.chosen
    where = "on the CPU" if device.name == "cpu" else f"on {plan.ranks} x {device.name}"
    memory = Table("memory of a rank", "GiB", title_justify="left")
    for part, size in chosen.memory.items():
        memory.add_row(part, f"{size:.2f}")
    if chosen.at_load > sum(chosen.memory.values()):
        memory.add_row("at most, while the model is loaded", f"{chosen.at_load:.2f}")
    else:
        memory.add_row("together, at most", f"{chosen.total:.2f}")
    memory.add_row("there is", f"{device.memory:.0f}")
    phases = Table("phase of a step", "TFLOP, all ranks", "seconds", "share")
    for phase, seconds in chosen.seconds.items():
        phases.add_row(phase, f"{plan.flops[phase] / 1e12:.2f}", f"{seconds:.3g}", f"{seconds / chosen.step_s:.0%}")
    phases.add_row("step", f"{sum(plan.flops.values()) / 1e12:.2f}", f"{chosen.step_s:.3g}", "")
    for table in (memory, phases):
        for column in table.columns[1:]:
            column.justify = "right"
    shape = plan.shape
    parts: list[Table | str] = [
        f"{plan.recipe}: {plan.method} of {plan.model} {where}, {plan.dtype}; {shape.parameters / 1e9:.3g}e9 "
        f"parameters, {plan.trained / 1e6:.2f} million trained; {plan.batch_size} samples a step",
        plan.tokens,
        f"set: {' '.join(plan.settings)}",
        *(f"- {reason}" for reason in plan.why),
        memory,
        phases,
        f"{plan.samples_per_s:.3g} samples/s, {plan.tokens_per_s:.4g} tokens/s, {plan.utilisation:.1%} of the peak; an "
        f"epoch of {plan.rows} rows takes {_duration(plan.epoch_s)}, the run of at most {plan.steps} steps "
        f"{_duration(plan.steps * chosen.step_s)}",
    ]
    if plan.scaling:
        parts += _scaling_table(plan)
    sharing = "while others run" if device.overlaps else "after the one before"
    return [
        *parts,
        f"Assumed: {device.tflops:.4g} TFLOP/s at a utilisation of {device.utilisation:.0%}, {device.bandwidth:.4g} "
        f"GB/s, {device.kernel_us:g} microseconds to start a kernel, {sharing}; every response runs to its budget. "
        f"{NOT_MODELLED} {CHECKED}",
    ]


def _scaling_table(plan: Plan) -> list[Table | str]:
    table = Table("GPUs", "batch", "step, s", "samples/s", "speed-up", "an epoch", "setting", title_justify="left")
    first = plan.scaling[0]
    for line in plan.scaling:
        batch = f"{line.batch_size}" if line.enough else f"{line.batch_size} (not {plan.batch_size})"
        if line.step_s is None or line.samples_per_s is None or line.setting is None:
            table.add_row(str(line.gpus), batch, "does not fit")
            continue
        setting = line.setting
        words = f"ZeRO {setting.zero_stage}, micro-batch {setting.micro_batch_size}"
        words += ", checkpointing" if setting.gradient_checkpointing else ""
        gain = f"{line.samples_per_s / first.samples_per_s:.1f}" if first.samples_per_s else "-"
        epoch = _duration(plan.rows / line.samples_per_s)
        table.add_row(str(line.gpus), batch, f"{line.step_s:.3g}", f"{line.samples_per_s:.3g}", gain, epoch, words)
    for column in table.columns[:5]:
        column.justify = "right"
    usable = [line for line in plan.scaling if line.enough and line.samples_per_s]
    notes: list[Table | str] = [table]
    if usable:
        fastest = max(line.samples_per_s or 0.0 for line in usable)
        few = next(line.gpus for line in usable if (line.samples_per_s or 0.0) >= 0.95 * fastest)
        notes.append(f"With {plan.method}.batch_size={plan.batch_size}, {few} of them are within 5% of the fastest.")
    if not all(line.enough for line in plan.scaling):
        most = max(line.gpus for line in plan.scaling if line.enough)
        notes.append(
            f"Of these numbers of GPUs, {plan.method}.batch_size={plan.batch_size} gives work to {most} at most. The "
            "lines below that need the batch size in them: another training than the recipe's."
        )
    return notes


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
