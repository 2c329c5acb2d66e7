"""Stop requests: SIGTERM, SIGINT and SIGHUP are recorded, and the run stops at a point from which it can resume.

A cluster's scheduler and DeepSpeed's launcher send SIGTERM before SIGKILL; a terminal sends SIGINT for Ctrl-C and
SIGHUP when it closes. A second SIGINT raises KeyboardInterrupt as usual.
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
_reason: str | None = None  # reason of the first request in this process


class Stopped(Exception):
    """The run stopped on request and can resume from its checkpoint."""


def request(reason: str) -> None:
    """Request that this process's run stop."""
    global _reason
    _reason = _reason or reason


def requested() -> str | None:
    """The reason of the stop request; None without a request."""
    return _reason


@contextmanager
def caught() -> Iterator[None]:
    """Record these signals instead of terminating the process; ignored ones (nohup) stay ignored."""
    global _reason
    _reason = None
    if threading.current_thread() is not threading.main_thread():  # Python allows handlers there only
        yield
        return
    before: dict[signal.Signals, Any] = {}
    interrupts = 0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal interrupts
        interrupts += number == signal.SIGINT
        if number == signal.SIGINT and interrupts > 1:
            raise KeyboardInterrupt
        request(signal.Signals(number).name)

    for one in _SIGNALS:
        if signal.getsignal(one) is not signal.SIG_IGN:
            before[one] = signal.signal(one, handle)
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def launcher() -> psutil.Process | None:
    """The `deepspeed` command: an ancestor of DeepSpeed's per-node process, which does not notice when it dies."""
    with suppress(psutil.Error):
        for process in psutil.Process().parents():
            if any(os.path.basename(part) == "deepspeed" for part in process.cmdline()[:2]):
                return process
    return None


def deepspeed_command(words: Sequence[str]) -> str:
    """A `deepspeed` command as a user would type it, without the options that launch/launch.sh adds."""
    shown = shlex.join(["deepspeed", *(word for word in words if word != "--quiet")])
    return shown.replace(" --master_port 0 ", " ", 1)


def command_line(method: str, arguments: Sequence[str]) -> str:
    """The command that started the run, as a user would type it, including launcher options."""
    script = f"{method}.sh"
    with suppress(psutil.Error):
        command = found.cmdline() if (found := launcher()) is not None else []
        names = [os.path.basename(part) for part in command]
        if script in names:
            return deepspeed_command(command[names.index("deepspeed") + 1 :])
    ranks = os.environ.get("WORLD_SIZE", "1")
    return ("" if ranks == "1" else f"NPROC={ranks} ") + shlex.join(["bash", f"launch/{script}", *arguments])
