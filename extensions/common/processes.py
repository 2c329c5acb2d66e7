"""Processes by identity (a pid alone is reused), and the kernel's counts of processes killed for lack of memory."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

MACHINE = "/proc/vmstat"


def this_process() -> dict[str, Any]:
    """The identity of this process, as plain JSON: pid, start, host, and the machine since its last start."""
    return {"pid": os.getpid(), "start": start_of(os.getpid()), "host": socket.gethostname(), "machine": machine()}


def machine() -> str:
    """Where a pid has a meaning: one boot of one kernel, and on it one namespace of pids (a container has its own)."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return f"{socket.gethostname()} {psutil.boot_time():.0f}"


def start_of(pid: int) -> float | None:
    """When a process of this machine started, in a fixed unit since a fixed time; None if it has ended.

    On Linux in clock ticks since the boot: psutil's time of day moves when the clock is set.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else float(fields[19])
    except OSError:
        if os.path.isdir("/proc/self"):
            return None
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else round(process.create_time())
    return None


def is_here(process: dict[str, Any]) -> bool:
    """Whether a process is, or was, one of this machine, so that its pid can be looked up."""
    return bool(process.get("machine") == machine())


def is_running(process: dict[str, Any]) -> bool:
    """Whether a process of this machine is running."""
    return process.get("start") is not None and start_of(process["pid"]) == process["start"]


def oom_kills() -> dict[str, int]:
    """File of the kernel -> processes killed for lack of memory so far: of this cgroup, then of the whole machine."""
    found = {}
    for path in [*_cgroup_files(), Path(MACHINE)]:
        with suppress(OSError, ValueError, IndexError):
            found[str(path)] = next(
                int(line.split()[1]) for line in path.read_text().splitlines() if line.startswith("oom_kill ")
            )
    return found


def _cgroup_files() -> list[Path]:
    """Versions 2 and 1 of cgroups."""
    files = []
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers in ("", "memory"):
                root, name = ("memory", "memory.oom_control") if controllers else ("", "memory.events")
                files.append(Path("/sys/fs/cgroup", root, path.lstrip("/"), name))
    return files


def killed_for(before: Mapping[str, int], now: Mapping[str, int] | None = None) -> tuple[bool, str]:
    """Whether a process may have been killed for lack of memory since `before` (`oom_kills`), and words that say so.

    The counter of the cgroup is that of the run; that of the machine counts other programs too.
    """
    now = oom_kills() if now is None else now
    for path, count in now.items():
        if path in before and count > before[path]:
            rise = f"oom_kill in {path}: {before[path]} before, {count} now"
            if path != MACHINE:
                return True, f"out of memory: the kernel's OOM killer has killed a process of this run's cgroup; {rise}"
            killed = "the kernel's OOM killer has killed a process on this machine"
            return True, f"possibly out of memory: {killed}, and dmesg says which; {rise}"
    if not before.keys() & now.keys():
        return False, "by a user, a scheduler or the system; this machine counts no out-of-memory kills: see dmesg"
    return False, "by a user, a scheduler or the system; this machine's kernel has recorded no out-of-memory kill"
