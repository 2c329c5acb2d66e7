"""run.lock of a run folder: one process at a time."""

from __future__ import annotations

import fcntl
import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

from extensions.common.errors import UserError
from extensions.common.status_file import is_alive, read_status

LOCK = "run.lock"


def lock_folder(root: Path) -> Any:
    """Lock a run folder for this process; two processes that write there would corrupt its files.

    Returns:
        The file whose closing releases the lock.

    Raises:
        UserError: another process holds the lock.
    """
    file = (root / LOCK).open("a+", encoding="utf-8")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not (root / LOCK).exists() or os.fstat(file.fileno()).st_ino != (root / LOCK).stat().st_ino:
            file.close()  # its holder has just ended and removed it
            return lock_folder(root)
    except BlockingIOError:
        file.close()
        raise UserError(_already_running(root)) from None
    except OSError:  # a file system without locks
        return file
    file.seek(0)
    file.truncate()
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def check_free(root: Path) -> None:
    """Check that no other process runs in a folder, before anything is loaded; writes nothing.

    Raises:
        UserError: one does.
    """
    with suppress(FileNotFoundError), (root / LOCK).open(encoding="utf-8") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # released with the file
        except BlockingIOError:
            raise UserError(_already_running(root)) from None
        except OSError:  # a file system without locks
            status = read_status(root)
            if status is not None and status["state"] == "running" and is_alive(status):
                raise UserError(_already_running(root)) from None


def _already_running(root: Path) -> str:
    holder, status = "", read_status(root)
    with suppress(OSError):
        holder = (root / LOCK).read_text(encoding="utf-8").strip()
    if not holder and status is not None:
        holder = f"process {status['process'].get('pid')} on {status['process'].get('host')}"
    return (
        f"{root}: already running ({holder or 'process unknown'}); wait for it, stop it by kill (it saves first), or "
        f"choose another output_dir. `nlu status {root}` says what it does"
    )
