"""A rank that hangs ends, and says where it hung; so does one that waits for it.

Between `start` and `stop` a rank must show progress, at least once in the given seconds: a phase of an iteration, a
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

import psutil

from extensions import signals

GRACE = 30.0
HUNG = 5  # exit status
STDERR = 2  # the descriptor: sys.stderr may be something without one

_seconds: float | None = None  # without progress; None: nobody watches
_last = 0.0
_armed = 0.0  # when `progress` last set the alarm of faulthandler
_waiting: str | None = None  # in which collective


def start(rank: int, seconds: float) -> None:
    """Watch this process from now on, until `stop`."""
    global _seconds, _armed
    watched = _seconds is not None
    _seconds, _armed = seconds, 0.0
    progress()
    if not watched:
        threading.Thread(target=_watch, args=(rank,), daemon=True, name="watchdog").start()


def stop() -> None:
    global _seconds
    _seconds = None
    faulthandler.cancel_dump_traceback_later()


def progress() -> None:
    """The run goes on."""
    global _last, _armed
    _last = time.monotonic()
    if _seconds is not None and _last - _armed > min(1.0, _seconds / 10):
        _armed = _last
        # The thread below needs Python's lock, which a regular expression that never ends does not give away.
        faulthandler.dump_traceback_later(_seconds + 2 * GRACE, exit=True, file=STDERR)


@contextmanager
def watching(rank: int, seconds: float) -> Iterator[None]:
    """`start`, and `stop` at the end."""
    start(rank, seconds)
    try:
        yield
    finally:
        stop()


@contextmanager
def waiting(collective: str) -> Iterator[None]:
    """What is done here may have to wait for other ranks."""
    global _waiting
    outer, _waiting = _waiting, collective
    progress()
    try:
        yield
    finally:
        _waiting = outer
        progress()


def _watch(rank: int) -> None:
    launcher = _launcher()
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


def _launcher() -> psutil.Process | None:
    """The `deepspeed` command above DeepSpeed's process for this machine, which does not notice when that one dies."""
    try:
        for process in psutil.Process().parents():
            if any(os.path.basename(part) == "deepspeed" for part in process.cmdline()[:2]):
                return process
    except psutil.Error:
        pass
    return None
