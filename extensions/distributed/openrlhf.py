"""The only module that imports openrlhf, apart from `extensions.ray_backend`, and workarounds for dependencies.

Each workaround states its reason and the versions that it was checked with.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import re
import sys
import time
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.utils.cpp_extension
import transformers.modeling_flash_attention_utils
import transformers.modeling_utils


def _flash_attn_modules() -> dict[str, types.ModuleType]:
    """Stand-ins for the five flash-attn functions that OpenRLHF 0.11 imports at module level.

    Only its sequence-packing and ring-attention paths call them, and this project uses neither. The padding functions
    still work: they are transformers' equivalents.
    """
    from einops import rearrange
    from torch.distributed.nn.functional import all_gather

    hf = transformers.modeling_flash_attention_utils

    def gather(tensor: torch.Tensor, group: Any) -> torch.Tensor:
        return torch.cat(all_gather(tensor, group))

    modules = {
        name: types.ModuleType(name)
        for name in ("flash_attn", "flash_attn.bert_padding", "flash_attn.utils", "flash_attn.utils.distributed")
    }
    padding = modules["flash_attn.bert_padding"]
    padding.index_first_axis, padding.rearrange = hf._index_first_axis, rearrange  # type: ignore[attr-defined]
    padding.pad_input, padding.unpad_input = hf._pad_input, hf._unpad_input  # type: ignore[attr-defined]
    modules["flash_attn.utils.distributed"].all_gather = gather  # type: ignore[attr-defined]
    return modules


@contextmanager
def openrlhf_importable() -> Iterator[None]:
    """Let `import openrlhf...` succeed where flash-attn is not installed (OpenRLHF 0.11.2 requires it).

    The stand-ins are removed afterwards, since transformers detects flash-attn by its module. An installed flash-attn
    is never replaced: if it is broken, its own error is raised.
    """
    if importlib.util.find_spec("flash_attn") is not None:
        yield
        return
    # Caches the result before the stand-ins exist.
    transformers.modeling_flash_attention_utils.flash_attn_supports_top_left_mask()
    modules = _flash_attn_modules()
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]


# DeepSpeed (0.19.6) warns about a missing accelerator unless this is set.
if not torch.accelerator.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

# torch 2.13 deprecates a collective that DeepSpeed 0.19.6 calls once per rank and run.
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")

import deepspeed  # noqa: E402

with openrlhf_importable():
    from openrlhf.models.actor import Actor
    from openrlhf.models.loss import PolicyLoss, SFTLoss, ValueLoss, aggregate_loss
    from openrlhf.models.utils import compute_approx_kl, compute_reward
    from openrlhf.trainer.ppo_utils.kl_controller import AdaptiveKLController, FixedKLController
    from openrlhf.utils.deepspeed.deepspeed import DeepspeedStrategy

from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine  # noqa: E402
from deepspeed.runtime.fp16.loss_scaler import LossScaler  # noqa: E402
from deepspeed.runtime.zero.config import ZeroStageEnum  # noqa: E402
from deepspeed.utils.tensor_fragment import fragment_address  # noqa: E402

# Classes in DeepSpeed's checkpoints (0.19.6, ZeRO) besides tensors, numbers and text: an enum, a static loss scaler and
# an address in a flat buffer. They are safe to unpickle: their constructors only set attributes.
CHECKPOINT_GLOBALS: list[Any] = [ZeroStageEnum, LossScaler, fragment_address]

__all__ = [
    "CHECKPOINT_GLOBALS",
    "Actor",
    "AdaptiveKLController",
    "DeepspeedStrategy",
    "FixedKLController",
    "PolicyLoss",
    "SFTLoss",
    "TorchCheckpointEngine",
    "ValueLoss",
    "aggregate_loss",
    "compute_approx_kl",
    "compute_reward",
    "deepspeed",
    "load_op",
    "openrlhf_importable",
    "remove_shared_memory",
    "without_cuda",
]


def load_op(builder_name: str) -> None:
    """Compile (once) and load one of DeepSpeed's C++ ops for this accelerator; do nothing if it has no such op.

    torch (2.13) guards the build and each later load by a file `lock`. A killed process leaves it behind, and every
    later run would wait forever. This function first takes an fcntl lock, which ends with its process; the holder may
    remove torch's stale file. DeepSpeed caches the loaded op, so torch's lock is not taken again.
    """
    # Use this environment's ninja, not another one on PATH: each version considers the other's build stale.
    programs = os.path.dirname(sys.executable)
    if not os.environ.get("PATH", "").startswith(programs):
        os.environ["PATH"] = os.pathsep.join([programs, os.environ.get("PATH", os.defpath)])
    builder = deepspeed.accelerator.get_accelerator().create_op_builder(builder_name)
    if builder is None or not builder.is_compatible(verbose=False):
        return
    folder = Path(torch.utils.cpp_extension._get_build_directory(builder.name, False))
    try:
        lock = folder.with_name(f"{folder.name}.run.lock").open("w")
        fcntl.lockf(lock, fcntl.LOCK_EX)
    except OSError:  # a read-only folder, or a file system without locks
        _build(builder)
        return
    with lock:
        torch_lock = folder / "lock"
        # In a folder shared with other programs a recent lock may be theirs; a build takes a minute.
        own = folder.is_relative_to(sys.prefix)
        if torch_lock.exists() and (own or time.time() - torch_lock.stat().st_mtime > 600):
            torch_lock.unlink(missing_ok=True)
        _build(builder)


def _build(builder: Any) -> None:
    """Compile and load an op. DeepSpeed (0.19.6) cannot read an architecture such as 9.0a in TORCH_CUDA_ARCH_LIST."""
    name = "TORCH_CUDA_ARCH_LIST"
    given = os.environ.get(name)
    if given is not None:
        os.environ[name] = re.sub(r"(\d+\.\d+)[a-z]", r"\1", given)
    try:
        builder.load(verbose=False)
    finally:
        if given is not None:
            os.environ[name] = given


def remove_shared_memory() -> None:
    """Remove the shared-memory file that DeepSpeed 0.19.6 leaves per rank on a CPU: 66 MB, until the machine restarts.

    Its name contains user, address, port and rank (csrc/cpu/comm/shm.cpp).
    """
    parts = (os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT"), os.environ.get("RANK"))
    if hasattr(os, "getuid"):
        name = "_".join(["deepspeed_allreduce_buffer", str(os.getuid()), *map(str, parts)])
        (Path("/dev/shm") / name).unlink(missing_ok=True)  # nosec B108 # only removes; DeepSpeed's name


class _Cpu(str):
    """Result of `torch.cuda.current_device` on a CPU: a device for tensors that formats as 0 in f"cuda:{...}"."""

    def __format__(self, spec: str) -> str:
        return "0"


def without_cuda() -> None:
    """Without a GPU, replace the torch.cuda functions that OpenRLHF's Ray classes call (0.11.2).

    These classes assume CUDA: `torch.cuda.current_device()` is the device of tensors, `f"cuda:{...}"` that of a replay
    buffer which never uses it, and caches and synchronisation are CUDA's.
    """
    if torch.cuda.is_available():
        return
    cuda: Any = torch.cuda
    for name in ("set_device", "empty_cache", "synchronize"):
        setattr(cuda, name, lambda *args, **kwargs: None)
    cuda.current_device = lambda: _Cpu("cpu")
