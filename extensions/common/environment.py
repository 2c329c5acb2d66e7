"""Defaults of the environment of a rank. Imports nothing heavy: it must be set before torch loads."""

from __future__ import annotations

import ctypes
import os
import sys


def prepare_environment() -> None:
    """Defaults of the environment that a rank runs in; what the user set is left alone."""
    # DeepSpeed starts N ranks on a machine and leaves each of them all the cores.
    ranks_here = int(os.environ.get("LOCAL_SIZE", "1"))
    if ranks_here > 1 and hasattr(os, "sched_getaffinity"):
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks_here)))

    # Bars of libraries are for terminals; elsewhere they fill logs.
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")

    # One folder an environment for what DeepSpeed compiles: in the common one under the home directory, environments
    # take turns to compile the same thing anew (40 s), each time the other one ran last.
    if sys.prefix != sys.base_prefix and os.access(sys.prefix, os.W_OK):
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", os.path.join(sys.prefix, "torch_extensions"))

    keep_freed_memory()


def keep_freed_memory() -> None:
    """Let the C library keep what is freed for what comes next, rather than give it back to the system each time.

    Every layer of every pass frees and takes megabytes; fresh pages each time cost a tenth of the run on a CPU
    (`tests/bench`). What the user set in the environment is left alone, and so are C libraries other than glibc.
    """
    if any(name in os.environ for name in ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "LD_PRELOAD")):
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # M_... of malloc.h
    mallopt(mmap_threshold, 2**30)
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(top_pad, 2**26)
