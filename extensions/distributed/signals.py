"""Asking a run to stop: SIGTERM, SIGINT and SIGHUP are noted, and the run stops where it can go on from.

A cluster's scheduler sends SIGTERM before it kills, DeepSpeed's launcher too; a terminal sends SIGINT for Ctrl-C and
SIGHUP when it goes. A second SIGINT ends the process as ever.
"""

from __future__ import annotations

import os
import shlex
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import psutil

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_reason: str | None = None  # a process has one


class Stopped(Exception):
    """The run was asked to stop, and has kept what it needs to go on."""


def request(reason: str) -> None:
    """Ask this process's run to stop."""
    global _reason
    _reason = _reason or reason


def requested() -> str | None:
    """Why this process's run is to stop; None where it is not."""
    return _reason


@contextmanager
def caught() -> Iterator[None]:
    """Note these signals instead of dying by them; those that are ignored (nohup) stay so."""
    global _reason
    _reason = None
    if threading.current_thread() is not threading.main_thread():  # Python allows it there alone
        yield
        return
    before: dict[signal.Signals, Any] = {}

    interrupts = 0

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal interrupts
        interrupts += number == signal.SIGINT
        if number == signal.SIGINT and interrupts > 1:
            raise KeyboardInterrupt
        request(signal.Signals(number).name)

    for one in _SIGNALS:
        if signal.getsignal(one) is not signal.SIG_IGN:
            before[one] = signal.signal(one, note)
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def launcher() -> psutil.Process | None:
    """The `deepspeed` command above DeepSpeed's process for this machine, which does not notice when that one dies."""
    with suppress(psutil.Error):
        for process in psutil.Process().parents():
            if any(os.path.basename(part) == "deepspeed" for part in process.cmdline()[:2]):
                return process
    return None


def command_line(method: str, arguments: Sequence[str]) -> str:
    """The command that started this process's run, as one would type it: the launcher's, with its options."""
    script = f"{method}.sh"
    with suppress(psutil.Error):
        command = found.cmdline() if (found := launcher()) is not None else []
        names = [os.path.basename(part) for part in command]
        if script in names:
            options = [part for part in command[names.index("deepspeed") + 1 :] if part != "--quiet"]
            return shlex.join(["deepspeed", *options])
    ranks = os.environ.get("WORLD_SIZE", "1")
    return ("" if ranks == "1" else f"NPROC={ranks} ") + shlex.join(["bash", f"launch/{script}", *arguments])
