"""A rank that hangs ends, and says where it hung; so does one that waits for it.

While it is watched a rank must show progress, at least once in the given seconds: a phase of an iteration, a
batch of an evaluation. One that computes and does not is the one that hangs: its stack is printed. One that waits in a
collective for another gets `GRACE` seconds more, so that the guilty one speaks first; the launcher ends the rest.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from extensions.distributed import signals

GRACE = 30.0
HUNG = 5  # exit status
STDERR = 2  # the descriptor: sys.stderr may be something without one

_seconds: float | None = None  # without progress; None: nobody watches
_last = 0.0
_armed = 0.0  # when `progress` last set the alarm of faulthandler
_waiting: str | None = None  # in which collective


def heartbeat() -> None:
    """The run goes on."""
    global _last, _armed
    _last = time.monotonic()
    if _seconds is not None and _last - _armed > min(1.0, _seconds / 10):
        _armed = _last
        # The thread below needs Python's lock, which a regular expression that never ends does not give away.
        faulthandler.dump_traceback_later(_seconds + 2 * GRACE, exit=True, file=STDERR)


@contextmanager
def watching(rank: int, seconds: float) -> Iterator[None]:
    """Watch this process meanwhile."""
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
    """What is done here may have to wait for other ranks."""
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
            _say(f"error: rank {rank}: waited {idle:.0f} s in {collective} for another rank, which hangs or is gone.")
        else:
            _say(f"error: rank {rank}: no progress for {idle:.0f} s (deepspeed.timeout: {seconds:g}).")
        _say("It is in the topmost line of the main thread, the last thread printed here:")
        faulthandler.dump_traceback(STDERR, all_threads=True)
        os._exit(HUNG)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
