"""The other ranks of a run, as processes of this node: which of them are gone."""

from __future__ import annotations

import os
from contextlib import suppress

import psutil

_OPTION = "--local_rank="  # of each rank, by DeepSpeed's per-node launcher (launcher/launch.py, 0.19.6)


def gone_ranks() -> list[int] | None:
    """The ranks of this node whose processes have ended; None if they are not DeepSpeed's, so it cannot be known."""
    running = set()
    with suppress(psutil.Error):
        for process in psutil.Process(os.getppid()).children():
            with suppress(psutil.Error, ValueError):
                found = next((word for word in process.cmdline() if word.startswith(_OPTION)), None)
                if found is not None and process.status() != psutil.STATUS_ZOMBIE:
                    running.add(int(found.removeprefix(_OPTION)))
    if not running:
        return None
    first = int(os.environ.get("RANK", "0")) - int(os.environ.get("LOCAL_RANK", "0"))
    return [first + k for k in range(int(os.environ.get("LOCAL_SIZE", "1"))) if k not in running]


def named(gone: list[int]) -> str:
    """`rank 1 is gone`, `ranks 1, 2 are gone`."""
    return f"rank {gone[0]} is gone" if len(gone) == 1 else f"ranks {', '.join(map(str, gone))} are gone"


def missing() -> str:
    """What is known about a rank that others wait for."""
    gone = gone_ranks()
    if gone:
        return named(gone)
    if gone is None:
        return "one hangs or is gone"
    if os.environ.get("LOCAL_SIZE") == os.environ.get("WORLD_SIZE"):
        return "none is gone, so one hangs"
    return "none of this node is gone, so one of it hangs, or one of another node hangs or is gone"
