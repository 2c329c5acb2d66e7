"""Watchdog: terminates a hung rank and prints its stack.

A watched rank must call `heartbeat` within the given seconds: in each phase of an iteration and each batch of an
evaluation. Otherwise it counts as hung: its stack is printed and its process exits. A rank that waits in a collective
gets `GRACE` more seconds, so that the hung rank reports first; the launcher then terminates the others.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from extensions.common import status_file
from extensions.distributed import signals
from extensions.distributed.peers import missing

GRACE = 30.0
HUNG = 5  # exit status
STDERR = 2  # file descriptor; sys.stderr may not have one

_seconds: float | None = None  # limit without a heartbeat; None: not watched
_last = 0.0  # time of the last heartbeat
_armed = 0.0  # when `heartbeat` last set the alarm of faulthandler
_waiting: str | None = None  # name of the collective


def heartbeat() -> None:
    """Report progress of this rank."""
    global _last, _armed
    _last = time.monotonic()
    if _seconds is not None and _last - _armed > min(1.0, _seconds / 10):
        _armed = _last
        # Second alarm without the GIL: the thread of `watching` needs it, and a regular expression that backtracks
        # forever never releases it.
        faulthandler.dump_traceback_later(_seconds + 2 * GRACE, exit=True, file=STDERR)


def idle_s() -> float | None:
    """Seconds since the last progress of this rank; None before the first."""
    return time.monotonic() - _last if _last else None


@contextmanager
def watching(rank: int, seconds: float) -> Iterator[None]:
    """Exit this process with status 5 if the block has no heartbeat for `seconds`."""
    global _seconds, _armed
    _seconds, _armed = seconds, 0.0
    heartbeat()
    threading.Thread(target=_watch, args=(rank,), daemon=True, name="watchdog").start()
    try:
        yield
    finally:
        _seconds = None
        faulthandler.cancel_dump_traceback_later()


@contextmanager
def waiting(collective: str) -> Iterator[None]:
    """Mark a block that may wait for other ranks."""
    global _waiting
    outer, _waiting = _waiting, collective
    heartbeat()
    try:
        yield
    finally:
        _waiting = outer
        heartbeat()


def _watch(rank: int) -> None:
    launcher = signals.launcher()
    while (seconds := _seconds) is not None:
        time.sleep(min(1.0, seconds / 10))
        idle, collective = time.monotonic() - _last, _waiting
        if launcher is not None and not launcher.is_running():
            signals.request("the launcher has gone")
        if _seconds is None or idle < seconds + (GRACE if collective else 0):
            continue
        if collective:
            reason = f"waited {idle:.0f} s in {collective} for other ranks: {missing()}"
        else:
            reason = f"no progress for {idle:.0f} s (deepspeed.timeout: {seconds:g})"
        _print(f"error: rank {rank}: {reason}.")
        _print("It is at the topmost line of the main thread, the last thread printed here:")
        faulthandler.dump_traceback(STDERR, all_threads=True)
        status_file.end("crashed", HUNG, f"rank {rank}: {reason}")
        os._exit(HUNG)


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
