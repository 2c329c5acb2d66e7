"""What the scripts of launch/ run as Python, once a rank: the environment first, then the method's own module.

Imports nothing heavy at the top: the environment must be set before torch loads.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

MODULES = {"ppo": "train", "sft": "train", "eval": "train", "encoder": "encoder"}  # method -> module with its `main`


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


def main(method: str, arguments: Sequence[str]) -> int:
    """Entry point of launch/METHOD.sh: [--local_rank=K] RECIPE [key.sub=value ...]. Returns the exit status."""
    prepare_environment()
    arguments = [argument for argument in arguments if not argument.startswith("--local_rank")]
    return importlib.import_module(f"extensions.{MODULES[method]}").main(arguments, method)
