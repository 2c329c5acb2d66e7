"""Environment defaults of a rank. Nothing heavy is imported, since they must be set before torch loads."""

from __future__ import annotations

import ctypes
import os
import sys


def prepare_environment() -> None:
    """Set the environment defaults of a rank. Values that the user has set are kept."""
    # DeepSpeed starts N ranks per machine and leaves all cores to each of them.
    ranks_here = int(os.environ.get("LOCAL_SIZE", "1"))
    if ranks_here > 1 and hasattr(os, "sched_getaffinity"):
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks_here)))

    # Progress bars of libraries are for terminals; elsewhere they fill logs.
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")

    # One build folder per environment for DeepSpeed's extensions: environments that share the default folder under the
    # home directory recompile (40 s) whenever another one ran last.
    if sys.prefix != sys.base_prefix and os.access(sys.prefix, os.W_OK):
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", os.path.join(sys.prefix, "torch_extensions"))

    keep_freed_memory()


def keep_freed_memory() -> None:
    """Make glibc reuse freed memory instead of returning it to the system.

    Every layer of every pass frees and allocates megabytes; the page faults cost a tenth of a run on a CPU
    (`tests/bench`). Does nothing if the user has configured malloc in the environment, or with another C library.
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
