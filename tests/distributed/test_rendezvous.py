"""Where the ranks of a run meet, and which of them are gone."""

import os
import socket
import subprocess
import sys
from datetime import timedelta

import pytest
import torch.distributed as dist

from extensions.common.errors import UserError
from extensions.distributed import peers
from extensions.distributed import rendezvous as module
from extensions.distributed.rendezvous import rendezvous

SECOND = timedelta(seconds=1)


@pytest.fixture
def group(monkeypatch, tmp_path):
    """`group(rank=0, ...)` sets the variables of a rank."""
    monkeypatch.setattr(module.tempfile, "tempdir", str(tmp_path))

    def join(port="0", rank="0", world_size="2", local_size="2"):
        names = {"MASTER_PORT": port, "RANK": rank, "WORLD_SIZE": world_size, "LOCAL_SIZE": local_size}
        for name, value in names.items():
            monkeypatch.setenv(name, value)

    return join


def test_runs_at_once_meet_at_different_ports_that_their_ranks_know(group, monkeypatch, tmp_path):
    ports = []
    for parent in (os.getpid(), os.getppid()):  # the per-node launchers of two runs
        monkeypatch.setattr(module.os, "getppid", lambda parent=parent: parent)
        group(rank="0")
        first = rendezvous(SECOND)
        with first:
            ports.append(os.environ["MASTER_PORT"])
            assert socket.create_connection(("127.0.0.1", int(ports[-1]))).close() is None
            group(rank="1")
            with rendezvous(SECOND):
                assert os.environ["MASTER_PORT"] == ports[-1]
            (file,) = tmp_path.iterdir()
            assert file.stat().st_mode & 0o777 == 0o600
            with pytest.raises(UserError, match="cannot be created"):  # it is there already
                module._write(file, 1)
        assert list(tmp_path.iterdir()) == []
    assert ports[0] != ports[1] and "0" not in ports


def test_without_rank_0_the_others_do_not_wait_forever(group):
    group(rank="1")
    with pytest.raises(TimeoutError, match="rank 0 has opened no port"), rendezvous(timedelta(seconds=0.2)):
        pass


def test_ranks_on_several_nodes_need_a_port_of_their_own(group):
    group(world_size="4")
    with pytest.raises(UserError, match="several nodes need one port"), rendezvous(SECOND):
        pass


def test_a_port_that_is_taken_is_named_with_its_holder(group):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        group(port=str(port))
        with pytest.raises(UserError, match=rf"port {port} is in use by process {os.getpid()} \("), rendezvous(SECOND):
            dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)


def test_gone_ranks_are_those_whose_processes_have_ended(group, monkeypatch):
    monkeypatch.setattr(peers.os, "getppid", os.getpid)
    group(rank="2", world_size="4")
    monkeypatch.setenv("LOCAL_RANK", "0")  # the second node
    ranks = [
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", f"--local_rank={k}"]) for k in range(2)
    ]
    try:
        assert peers.gone_ranks() == []
        assert (
            peers.missing() == "none of this node is gone, so one of it hangs, or one of another node hangs or is gone"
        )
        ranks[1].kill()
        os.waitid(os.P_PID, ranks[1].pid, os.WEXITED | os.WNOWAIT)  # a zombie, until the launcher polls
        assert peers.gone_ranks() == [3] and peers.missing() == "rank 3 is gone"
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    assert peers.gone_ranks() is None and peers.missing() == "one hangs or is gone"
