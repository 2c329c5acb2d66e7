"""Where the ranks of a run meet: port 0 of MASTER_PORT, and errors of a port that is taken.

On one node MASTER_PORT=0 lets the kernel choose the port at the moment when rank 0 opens it, so two runs never get the
same one. The other ranks read it from a file that is named after their common parent, DeepSpeed's per-node launcher.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import psutil
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined] # torch 2.13 lists it in no __all__

from extensions.common.errors import UserError
from extensions.common.processes import start_of

POLL = 0.05  # seconds


@contextmanager
def rendezvous(timeout: timedelta) -> Iterator[None]:
    """Resolve MASTER_PORT=0 for a block that joins the process group.

    Raises:
        UserError: rank 0 cannot open MASTER_PORT, or port 0 and ranks on several nodes.
    """
    store, shared = None, _port_file()
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if os.environ["MASTER_PORT"] == "0":
        if int(os.environ.get("LOCAL_SIZE", world_size)) != world_size:
            raise UserError("--master_port 0: ranks on several nodes need one port that is free on the first of them")
        if rank == 0:
            # env:// finds this server by its port and uses it (multi_tenant).
            store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, multi_tenant=True)
            if world_size > 1:
                _write(shared, store.port)
        os.environ["MASTER_PORT"] = str(_read(shared, timeout) if store is None else store.port)
    try:
        yield
    except dist.DistNetworkError as error:
        if rank == 0 and any(name in str(error) for name in ("EADDRINUSE", "EACCES")):
            raise UserError(_refused(int(os.environ["MASTER_PORT"]), error)) from error
        raise
    finally:
        if store is not None:
            shared.unlink(missing_ok=True)


def _port_file() -> Path:
    parent = os.getppid()
    return Path(tempfile.gettempdir()) / f"nlu-port-{os.getuid()}-{parent}-{start_of(parent)}"


def _write(path: Path, port: int) -> None:
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)  # O_EXCL follows no link
    except OSError as error:
        raise UserError(
            f"{path}: cannot be created ({error.strerror}), and the other ranks read their port there; set TMPDIR to "
            "another folder, or give a free port: --master_port N, MASTER_PORT=N"
        ) from error
    os.write(file, f"{port}\n".encode())
    os.close(file)


def _read(path: Path, timeout: timedelta) -> int:
    end = time.monotonic() + timeout.total_seconds()
    while time.monotonic() < end:
        with suppress(FileNotFoundError):
            if (text := path.read_text()).endswith("\n") and path.stat().st_uid == os.getuid():
                return int(text)
        time.sleep(POLL)
    raise TimeoutError(f"rank 0 has opened no port for {timeout.total_seconds():.0f} s ({path})")


def _refused(port: int, error: Exception) -> str:
    if "EACCES" in str(error):
        return f"port {port}: this user may not open it; give another: --master_port N, MASTER_PORT=N"
    return (
        f"port {port} is in use{_holder(port)}, so the ranks of this run cannot meet there. `bash launch/METHOD.sh` "
        "takes a free port by itself; or give another: --master_port N (deepspeed), MASTER_PORT=N (bash)"
    )


def _holder(port: int) -> str:
    """The process that listens on a port of this machine, as far as this user may see it."""
    with suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
                command = " ".join(psutil.Process(connection.pid).cmdline())
                return f" by process {connection.pid} ({command[:200]})"
    return " by another process"
