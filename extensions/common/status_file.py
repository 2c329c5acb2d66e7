"""status.json of a run folder: what the run does now, as its process last wrote it, and how it ended.

A thread writes it every `EVERY` seconds and soon after each new phase, so a run never waits for the file or fails
because of it. Readers on another host of a shared file system go by the age of the heartbeat.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from extensions.common.errors import UserError
from extensions.common.files import read_json, write_json
from extensions.common.processes import is_here, is_running, this_process

FILE = "status.json"
EVERY = 10.0  # seconds between heartbeats
SPACING = 1.0  # seconds between two writes at least
STALE = 60.0  # seconds without a heartbeat after which a process on another host counts as gone
LONGEST = 4000  # characters of a reason

_command = ""  # that started this process
_current: StatusFile | None = None  # of this process


class StatusFile:
    """Writes status.json until `end`; one per process.

    Args:
        snapshot: what the run does now, as JSON; called in a thread.
    """

    def __init__(self, root: Path, snapshot: Callable[[], dict[str, Any]]) -> None:
        global _current
        self._path, self._snapshot = root / FILE, snapshot
        self._fixed = {
            "process": this_process(),
            "command": _command,
            "directory": os.getcwd(),
            "started": time.time(),
        }
        self._wake, self._ended = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="status")
        _current = self
        self._write({"state": "running"})
        self._thread.start()

    def changed(self) -> None:
        """Write soon."""
        self._wake.set()

    def end(self, state: str, exit_status: int, reason: str | None = None) -> None:
        """Write the last state: finished, stopped or crashed."""
        global _current
        _current = None
        self._ended.set()
        self._wake.set()
        self._thread.join(timeout=EVERY)
        self._write(_ending(state, exit_status, reason))

    def _beat(self) -> None:
        while not self._ended.wait(SPACING):
            self._wake.wait(EVERY - SPACING)
            self._wake.clear()
            if not self._ended.is_set():
                self._write({"state": "running"})

    def _write(self, state: dict[str, Any]) -> None:
        with suppress(Exception):  # a full disk, a folder that was removed
            write_json(self._path, state | self._fixed | {"heartbeat": time.time()} | self._snapshot())


def announce(command: str) -> None:
    """Name the command that started this process, before its status file is made."""
    global _command
    _command = command


def end(state: str, exit_status: int, reason: str | None = None) -> None:
    """End the status file of this process, if it has one that has not ended."""
    if _current is not None:
        _current.end(state, exit_status, reason)


def read_status(root: Path) -> dict[str, Any] | None:
    """The content of status.json; None if there is none, or it is damaged."""
    try:
        status = read_json(root / FILE)
    except (OSError, UserError):
        return None
    complete = isinstance(status, dict) and {"state", "process", "heartbeat", "started"} <= status.keys()
    return status if complete and isinstance(status["process"], dict) else None


def is_alive(status: dict[str, Any]) -> bool:
    """Whether the process of a status file runs: looked up on its machine, elsewhere judged by its heartbeat."""
    if is_here(status["process"]):
        return is_running(status["process"])
    return time.time() - float(status["heartbeat"]) < STALE


def end_for(root: Path, since: float, exit_status: int, reason: str | None) -> None:
    """Write the exit status of a run that crashed, and how it ended if its process could not say so itself.

    Args:
        since: time of day; a status file of an earlier process is left as it is.
        reason: None: not known here.
    """
    status = read_status(root)
    if status is None or status["started"] < since or is_alive(status):
        return
    if status["state"] == "running":
        reason = reason or f"a rank ended with status {exit_status}; its output names the error"
    elif status["state"] == "crashed":  # perhaps secondary to another rank, whose status is that of the run
        reason = "; ".join(filter(None, (reason, status.get("reason"))))
    else:
        return
    with suppress(OSError):
        write_json(root / FILE, status | _ending("crashed", exit_status, reason))


def _ending(state: str, exit_status: int, reason: str | None) -> dict[str, Any]:
    return {"state": state, "exit_status": exit_status, "reason": reason and reason[:LONGEST]}
