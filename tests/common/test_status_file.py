"""status.json: written while a run goes on, and how it ends."""

import time

import pytest

from extensions.common import status_file
from extensions.common.files import read_json, write_json
from extensions.common.processes import this_process
from extensions.common.status_file import StatusFile, end_for, is_alive, read_status

ELSEWHERE = this_process() | {"host": "node7", "machine": "its boot"}
GONE = this_process() | {"start": 1.0}


def written(root, **changes):
    status = {"state": "running", "process": this_process(), "heartbeat": time.time(), "started": 100.0}
    write_json(root / "status.json", status | changes)
    return read_status(root)


def test_it_says_what_the_run_does_until_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(status_file, "SPACING", 0.01)
    now = {"step": 1}
    status_file.announce("deepspeed launch/ppo.sh r.yaml")
    status = StatusFile(tmp_path, lambda: dict(now))
    first = read_json(tmp_path / "status.json")
    assert (first["state"], first["step"], first["command"]) == ("running", 1, "deepspeed launch/ppo.sh r.yaml")
    assert is_alive(first)
    now["step"] = 2
    status.changed()
    end = time.monotonic() + 60
    while read_json(tmp_path / "status.json")["step"] != 2:
        assert time.monotonic() < end
        time.sleep(0.01)
    status_file.end("crashed", 3, "the disk is full")
    last = read_json(tmp_path / "status.json")
    assert (last["state"], last["exit_status"], last["reason"]) == ("crashed", 3, "the disk is full")
    status_file.end("finished", 0)  # has ended
    assert read_json(tmp_path / "status.json") == last


def test_a_file_that_cannot_be_written_fails_no_run(tmp_path):
    status = StatusFile(tmp_path / "removed", dict)
    status.end("finished", 0)
    assert not (tmp_path / "removed").exists()


@pytest.mark.parametrize(
    "process, age, alive",
    [
        (this_process(), 10**6, True),
        (GONE, 0, False),
        (ELSEWHERE, 5, True),
        (ELSEWHERE, status_file.STALE + 1, False),
    ],
    ids=["here", "gone", "elsewhere", "elsewhere, without heartbeat"],
)
def test_alive_by_the_process_here_and_by_the_heartbeat_elsewhere(tmp_path, process, age, alive):
    assert is_alive(written(tmp_path, process=process, heartbeat=time.time() - age)) is alive


@pytest.mark.parametrize(
    "changes, state",
    [
        ({"process": GONE}, "crashed"),
        ({}, "running"),
        ({"process": GONE, "started": 10.0}, "running"),
        ({"process": GONE, "state": "stopped"}, "stopped"),
        ({"process": GONE, "state": "crashed", "exit_status": 1, "reason": "rank 1 is gone"}, "crashed"),
    ],
    ids=["gone", "alive", "of an earlier session", "ended by itself", "secondary to another rank"],
)
def test_a_launcher_writes_the_end_of_a_killed_run_only(tmp_path, changes, state):
    written(tmp_path, **changes)
    end_for(tmp_path, 50.0, 247, "killed")
    found = read_status(tmp_path)
    assert found["state"] == state
    assert found.get("exit_status") == (247 if state == "crashed" else None)
    first = f"; {changes['reason']}" if "reason" in changes else ""
    assert found.get("reason") == (f"killed{first}" if state == "crashed" else None)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"state": "running"}', '{"state": 1, "process": 2}'])
def test_a_damaged_file_is_none(tmp_path, content):
    (tmp_path / "status.json").write_text(content)
    assert read_status(tmp_path) is None
