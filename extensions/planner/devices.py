"""The options of `nlu plan`, and the selected device: rates, memory, links between ranks."""

from __future__ import annotations

import math
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.benchmark import Timer

from extensions.common.errors import UserError
from extensions.prefix.products import linear

GIB = 2**30
CGROUPS = Path("/sys/fs/cgroup")
GPUS_PER_NODE = 8  # connected by NVLink
LINKS = {"nvlink": 300.0, "infiniband": 50.0, "ethernet": 12.5}  # GB/s per GPU, one way: NVLink 3, NDR 400, 100 Gb/s

# Name -> TFLOP/s in bfloat16 and in float32 (no TF32, torch's default), GiB, GB/s. From NVIDIA's data sheets, the SXM
# variant if there are several; dense rates, half of those "with sparsity". The T4 has no bfloat16 units, so its float32
# rate is used.
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
NO_FLASH = {"t4"}  # compute capability below 8.0 (`extensions.prefix.flash`)
# Assumed for GPUs: 40% of the peak is typical for dense training of 7B models; a decoding step of a 7B model in
# transformers takes about 25 ms on any recent GPU, or 20 microseconds per kernel; a CUDA context with cuBLAS and NCCL
# takes about 1.2 GiB.
GPU_UTILISATION, GPU_KERNEL_US, GPU_CONTEXT = 0.4, 20.0, 1.2
# Measured with SmolLM2-135M on one core (Xeon, AVX-512), relative to the matrix products of `measure_cpu`.
CPU_UTILISATION, CPU_KERNEL_US, CPU_CONTEXT = {"float32": 0.8, "bfloat16": 0.55}, 40.0, 0.6


@dataclass(frozen=True)
class PlanOptions:
    """The command-line options; None: the device's default, or counted on the data.

    Raises:
        UserError: a number is out of range.
    """

    cpu: bool = False
    gpu: str = "h100"
    gpu_memory: float | None = None  # GiB
    link: str = "nvlink"  # between ranks: one of LINKS, or GB/s
    rate: float | None = None  # peak TFLOP/s at the model's dtype
    bandwidth: float | None = None  # GB/s
    utilisation: float | None = None
    measure: bool = False
    prefix_tokens: int | None = None
    suffix_tokens: int | None = None
    response_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("gpu_memory", "rate", "bandwidth", "utilisation", "suffix_tokens", "response_tokens"):
            value, share = getattr(self, name), name == "utilisation"
            if value is not None and not (0 < value <= 1 if share else 0 < value < math.inf):
                expected = "a share above 0 and at most 1" if share else "a number above 0"
                raise UserError(f"--{name.replace('_', '-')}: {value:g} is not {expected}")
        if self.prefix_tokens is not None and self.prefix_tokens < 0:
            raise UserError(f"--prefix-tokens: {self.prefix_tokens} is below 0")


@dataclass(frozen=True)
class Device:
    """The device of one rank."""

    name: str
    tflops: float  # dense peak TFLOP/s at the model's dtype
    memory: float  # GiB
    bandwidth: float  # memory bandwidth in GB/s
    utilisation: float  # share of the peak that a large pass reaches
    kernel_us: float  # microseconds of Python and torch overhead per kernel launch
    overlaps: bool  # kernel launches overlap with running kernels
    context: float  # GiB in use before the first tensor

    @property
    def rate(self) -> float:
        """FLOP/s that a large pass reaches."""
        return self.tflops * 1e12 * self.utilisation


def host_memory() -> int:
    """Bytes of the machine's memory that this process may use: all of it, or the limit of its control group."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    root = CGROUPS
    with suppress(OSError):
        groups = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()]
        own = next((path.strip("/") for _, kinds, path in groups if not kinds or "memory" in kinds), "")
        places = [root / own / "memory.max", root / "memory.max"]  # version 2; version 1 below
        places += [root / "memory" / own / "memory.limit_in_bytes", root / "memory/memory.limit_in_bytes"]
        for place in places:
            with suppress(OSError, ValueError):  # ValueError: "max"
                limits.append(int(place.read_text(encoding="utf-8")))
    return min(limits)


def total_memory(device: torch.device) -> int:
    """Bytes of a rank's device as a whole, whatever is free now; on a CPU the rank's share of the machine's memory."""
    if device.type == "cpu":
        return host_memory() // max(1, int(os.environ.get("LOCAL_SIZE", "1")))
    return int(torch.cuda.get_device_properties(device).total_memory)


def find_device(options: PlanOptions, dtype: str, width: int) -> Device:
    """The device of the options, with overridden values.

    Args:
        dtype: dtype of the model.
        width: hidden size of the model, for `--measure`.

    Raises:
        UserError: the name is unknown, or a CPU has no rate.
    """
    name = "cpu" if options.cpu else options.gpu
    if options.cpu:
        tflops, bandwidth = measure_cpu(dtype, width) if options.measure else (options.rate, options.bandwidth)
        if tflops is None or bandwidth is None:
            raise UserError(
                "--cpu: the rate of a CPU is not known by name; add --measure to measure this one, or state it with "
                "--rate TFLOPS --bandwidth GB/S"
            )
        memory = host_memory() / GIB
        utilisation, kernel_us, context = CPU_UTILISATION[dtype], CPU_KERNEL_US, CPU_CONTEXT
    elif options.measure:
        raise UserError("--measure: measures this machine's CPU; use it with --cpu, or name the GPU with --gpu")
    elif name not in GPUS:
        raise UserError(
            f"--gpu: {name!r} is not known; choose from {', '.join(GPUS)}, or the nearest of them with --gpu-memory, "
            "--rate and --bandwidth for what differs"
        )
    else:
        bfloat16, float32, memory, bandwidth = GPUS[name]
        tflops = bfloat16 if dtype == "bfloat16" else float32
        utilisation, kernel_us, context = GPU_UTILISATION, GPU_KERNEL_US, GPU_CONTEXT
    return Device(
        name,
        options.rate or tflops,
        options.gpu_memory or memory,
        options.bandwidth or bandwidth,
        options.utilisation or utilisation,
        kernel_us,
        not options.cpu,
        context,
    )


def measure_cpu(dtype: str, width: int) -> tuple[float, float]:
    """TFLOP/s and GB/s of this machine's CPU, from products as wide as the model and of one row with large weights."""
    rate = _matmul_flops_per_s(512, width, 4 * width, getattr(torch, dtype))
    side = 4096  # 64 MB of weights exceed the caches; two FLOPs per four bytes
    bandwidth = _matmul_flops_per_s(1, side, side, torch.float32) * 2
    return rate / 1e12, bandwidth / 1e9


def _matmul_flops_per_s(rows: int, width: int, out: int, dtype: torch.dtype) -> float:
    """FLOP/s of (rows, width) x (width, out), the median over about a third of a second."""
    tensors = {"x": torch.randn(rows, width, dtype=dtype), "w": torch.randn(out, width, dtype=dtype)}
    timer = Timer("linear(x, w)", globals=tensors | {"linear": linear}, num_threads=torch.get_num_threads())
    return 2 * rows * width * out / timer.blocked_autorange(min_run_time=0.3).median


def link_rate(link: str, ranks: int) -> float:
    """Bytes/s between ranks, one way. NVLink connects the GPUs of a node; between nodes InfiniBand is assumed.

    Raises:
        UserError: `link` is neither a name nor a positive number.
    """
    if link in LINKS:
        slow = link == "nvlink" and ranks > GPUS_PER_NODE
        return LINKS["infiniband" if slow else link] * 1e9
    try:
        rate = float(link)
    except ValueError:
        rate = math.nan
    if not 0 < rate < math.inf:
        raise UserError(f"--link: {link!r} is neither one of {', '.join(LINKS)} nor a number of GB/s above 0")
    return rate * 1e9
