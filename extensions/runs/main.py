"""A run as a process: signals, errors printed once, exit statuses (see README.md)."""

from __future__ import annotations

import atexit
import errno
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence

import torch

from extensions.common import status_file
from extensions.common.console import say
from extensions.common.errors import ProcessGone, UserError
from extensions.distributed import signals
from extensions.distributed.peers import gone_ranks, named
from extensions.prefix.limits import OutOfMemory, is_out_of_memory
from extensions.recipe import Recipe, load_recipe
from extensions.rollout.lora_sync import SyncError
from extensions.runs.build import run
from extensions.runs.training_run import NonFiniteBatchError, SaveError

CRASHED, DISK_FULL = 1, 3
EXIT_STATUS: dict[type[Exception], int] = {
    UserError: 2,
    SaveError: DISK_FULL,
    NonFiniteBatchError: 4,
    # 5: a rank hangs (`extensions.distributed.watchdog`, which ends the process itself)
    SyncError: 6,
    OutOfMemory: CRASHED,
    ProcessGone: CRASHED,
}
FLAGS = {"--accept-changes": "checkpoint.accept_changes=true"}  # short for a recipe key
RUN_AGAIN = "run the same command again: it resumes from the last checkpoint"


def main(
    arguments: Sequence[str],
    method: str = "ppo",
    do: Callable[[Recipe], None] = run,
    script: str | None = None,
    set_by_script: Sequence[str] = (),
) -> int:
    """Run a recipe as launch/METHOD.sh does. Returns the exit status.

    Args:
        arguments: RECIPE [key.sub=value ...].
        script: name of the script in launch/, if it is not METHOD.
        set_by_script: overrides that the script adds.
    """
    # Until the process ends: the launcher sends SIGTERM to the other ranks as soon as one rank has failed.
    with signals.caught():
        status = _status(arguments, method, do, script or method, set_by_script)
    if status:  # a clean exit from the group is a collective, and NCCL would wait for ranks that are in another one
        atexit.unregister(torch.distributed.destroy_process_group)
    return status


def _status(
    arguments: Sequence[str], method: str, do: Callable[[Recipe], None], script: str, set_by_script: Sequence[str]
) -> int:
    rank = os.environ.get("RANK", "0")
    try:
        if not arguments or arguments[0].startswith("-"):
            launcher = "deepspeed" if script == method else "bash"
            raise UserError(f"usage: {launcher} launch/{script}.sh RECIPE [key.sub=value ...]")
        status_file.announce(signals.command_line(script, arguments))
        words = [FLAGS.get(word, word) for word in arguments[1:]]
        do(load_recipe(arguments[0], [*words, *set_by_script], method))
    except signals.Stopped:
        if rank == "0":
            reason, command = signals.requested() or "another rank", signals.command_line(script, arguments)
            say(f"stopped ({reason}); resume with: {command}")
            status_file.end("stopped", 0, reason)
    except KeyboardInterrupt:
        status_file.end("crashed", CRASHED, "a second Ctrl-C")
        raise
    except Exception as error:
        for kind, status in EXIT_STATUS.items():
            if isinstance(error, kind):
                hint = f"\nFree some space, then {RUN_AGAIN}" if kind is SaveError else ""
                return _report(f"{error}{hint}", rank, status)
        if _is_full_disk(error):
            quota = getattr(error, "errno", None) == errno.EDQUOT
            place = getattr(error, "filename", None) or f"which one, the error does not say: {str(error)[:200]}"
            what = "the disk quota is used up" if quota else "the disk is full"
            return _report(f"{what} ({place}); free some space, then {RUN_AGAIN}", rank, DISK_FULL)
        if is_out_of_memory(error):  # outside the passes that can be repeated with fewer rows, as while a model loads
            what = " ".join(str(error).split())[:300]
            return _report(f"out of memory ({what}); nlu plan estimates what this run needs", rank, CRASHED)
        return _crash(error, rank)
    return 0


def _report(message: str, rank: str, status: int) -> int:
    """Print an error once. Most errors are the same on all ranks: rank 0 prints it, and the launcher ends the others.

    A rank that is still running after some seconds has an error that no other rank has.
    """
    if rank != "0":
        requested, end = signals.requested(), time.monotonic() + 5
        while time.monotonic() < end:
            time.sleep(0.1)
            if signals.requested() != requested:  # by the launcher, so rank 0 has printed the error
                return status
        message = f"rank {rank}: {message}"
    status_file.end("crashed", status, message)
    say(f"error: {message}", sys.stderr)
    return status


def _crash(error: Exception, rank: str) -> int:
    """An unexpected error. An error of a collective is secondary to another rank's failure, which reports first."""
    gone = _wait_for_gone() if _may_be_of_collective(error) else []
    text = " ".join(str(error).split()).partition(" This is typically caused by")[0]  # a guess of gloo
    reason = f"{type(error).__name__}: {text}"
    if gone:
        reason = f"stopped, since {named(gone)} ({reason[:200]})"
        say(
            f"error: rank {rank}: {reason}. Its own error is above; if a signal killed it, it printed none, and the "
            "launcher names the signal",
            sys.stderr,
        )
    else:
        say(f"rank {rank}:\n{traceback.format_exc()}", sys.stderr)
    status_file.end("crashed", CRASHED, reason)
    return CRASHED


def _may_be_of_collective(error: Exception) -> bool:
    """Whether a collective may have failed because another rank left it."""
    text = str(error).lower()
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return several and (
        isinstance(error, torch.distributed.DistError)
        or (
            isinstance(error, RuntimeError)
            and any(word in text for word in ("gloo", "nccl", "closed by peer", "socket"))
        )
    )


def _wait_for_gone() -> list[int]:
    """The ranks that have ended after 5 seconds, in which the failed one reports and the launcher takes note of it."""
    gone: list[int] = []
    for _ in range(50):
        time.sleep(0.1)
        gone = gone or gone_ranks() or []
    return gone


def _is_full_disk(error: Exception) -> bool:
    """Whether a disk, or a user's quota on it, is full; safetensors (0.8) raises no OSError but has its text."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in str(error)
