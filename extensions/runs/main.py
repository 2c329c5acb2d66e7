"""A run as a process: exit statuses, signals, and errors printed once."""

from __future__ import annotations

import atexit
import errno
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence

import torch

from extensions.common.errors import ProcessGone, UserError
from extensions.distributed import signals
from extensions.recipe import Recipe, load_recipe
from extensions.rollout.lora_sync import SyncError
from extensions.runs.build import run
from extensions.runs.training_run import NonFiniteBatchError, SaveError


def _report(message: str, rank: str, status: int) -> int:
    """Print an error once. Most are the same on all ranks: rank 0 speaks, and the launcher then ends the others.

    A rank that is still there after some seconds has an error of its own, which nobody else would tell.
    """
    if rank != "0":
        told, end = signals.requested(), time.monotonic() + 5
        while time.monotonic() < end:
            time.sleep(0.1)
            if signals.requested() != told:  # by the launcher: rank 0 has said the same
                return status
        message = f"rank {rank}: {message}"
    print(f"error: {message}", file=sys.stderr, flush=True)
    return status


def _crash(error: Exception, rank: str) -> int:
    """An error that nobody foresaw. That of a collective is the echo of another rank's, which speaks first."""
    if _is_of_collective(error):
        time.sleep(5)
        print(
            f"error: rank {rank}: stopped, since another rank is gone ({' '.join(str(error).split())[:200]}). Its own "
            "error stands above, if it could still print one; a rank that is killed cannot, and that is mostly for "
            "lack of memory",
            file=sys.stderr,
            flush=True,
        )
    else:
        print(f"rank {rank}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
    return 1


def _is_of_collective(error: Exception) -> bool:
    """Whether a collective failed because another rank did not take part to its end."""
    said = str(error).lower()
    return isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError) and any(word in said for word in ("gloo", "nccl", "closed by peer", "socket"))
    )


def _is_full_disk(error: Exception) -> bool:
    """Whether a disk, or a user's share of it, is full; the writer of safetensors says so in words alone (0.8)."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in str(error)


def _stopped(method: str, arguments: Sequence[str], rank: str) -> int:
    if rank == "0":
        command = signals.command_line(method, arguments)
        print(f"stopped ({signals.requested() or 'another rank was told to'}); go on with: {command}", flush=True)
    return 0


def main(
    arguments: Sequence[str],
    method: str = "ppo",
    do: Callable[[Recipe], None] = run,
    script: str | None = None,
    set_by_script: Sequence[str] = (),
) -> int:
    """RECIPE [key.sub=value ...], as launch/METHOD.sh got them.

    Args:
        script: of launch/ that was started, if it is not called METHOD.
        set_by_script: overrides that it makes.

    Returns the exit status: 0 finished, or stopped as told; 1 crashed; 2 the user's to put right; 3 the disk is full;
    4 numbers that are none; 6 the rollout engine has other weights.
    (5, from `extensions.distributed.watchdog`: a rank hangs.)
    """
    with signals.caught():  # to the last word: the launcher gives the other ranks SIGTERM as soon as one has failed
        status = _main(arguments, method, do, script or method, set_by_script)
    if status:  # leaving the group well takes all ranks, and NCCL would wait for those that are still in a collective
        atexit.unregister(torch.distributed.destroy_process_group)
    return status


def _main(
    arguments: Sequence[str], method: str, do: Callable[[Recipe], None], script: str, set_by_script: Sequence[str]
) -> int:
    rank = os.environ.get("RANK", "0")
    try:
        if not arguments or arguments[0].startswith("-"):
            raise UserError(
                f"usage: {'bash' if script != method else 'deepspeed'} launch/{script}.sh RECIPE [key.sub=value ...]"
            )
        do(load_recipe(arguments[0], [*arguments[1:], *set_by_script], method))
    except signals.Stopped:
        return _stopped(script, arguments, rank)
    except UserError as error:
        return _report(str(error), rank, 2)
    except SaveError as error:
        return _report(f"{error}\nThen run the same command again: it resumes from the last checkpoint", rank, 3)
    except NonFiniteBatchError as error:
        return _report(str(error), rank, 4)
    except ProcessGone as error:
        return _report(str(error), rank, 1)
    except SyncError as error:
        return _report(str(error), rank, 6)
    except Exception as error:
        if not _is_full_disk(error):
            return _crash(error, rank)
        place = getattr(error, "filename", None) or "while writing to the run folder"
        return _report(
            f"the disk is full ({place}); free some space, then run the same command again: it resumes from the last "
            "checkpoint",
            rank,
            3,
        )
    return 0
