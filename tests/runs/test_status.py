"""`nlu status`: what a run does now, or how it ended."""

import errno
import json
import os
import subprocess
import sys
import time
from contextlib import nullcontext

import pytest
from support import ROOT
from typer.testing import CliRunner

from extensions.cli.main import app
from extensions.common.errors import UserError
from extensions.common.files import write_json, write_jsonl
from extensions.common.processes import this_process
from extensions.common.run_lock import check_free, lock_folder
from extensions.common.status_file import STALE
from extensions.runs.status import find_runs, run_status, status_lines

COMMAND = "deepspeed launch/ppo.sh r.yaml"
GONE = this_process() | {"pid": 4194304, "start": 1.0}
ELSEWHERE = this_process() | {"host": "node7", "machine": "its boot"}


def make_run(root, best_by="sampled", **status):
    """A run folder after step 30 of 40."""
    (root / "checkpoints" / "step-9").mkdir(parents=True)
    (root / "checkpoints" / "step-30").mkdir()
    (root / "checkpoints" / "step-30" / "weights").write_bytes(b"x" * 3000)
    (root / "recipe.yaml").write_text(f"evaluation:\n  best_by: {best_by}\n")
    write_json(root / "versions.json", {})
    write_jsonl(root / "metrics.jsonl", [{"step": k, "elapsed_s": k * (1.0 if k <= 10 else 2.5)} for k in range(1, 31)])
    scores = [(10, 0.5, 0.9), (20, 0.8, 0.7), (30, 0.6, 0.8)]
    write_jsonl(root / "validation.jsonl", [{"step": s, "mean": m, "likelihood_mean": b} for s, m, b in scores])
    write_jsonl(root / "warnings.jsonl", [{"step": k, "text": f"warning {k}"} for k in range(5)])
    if status:
        base = {"process": this_process(), "heartbeat": time.time() - 3, "started": 1.0, "command": COMMAND}
        now = {"directory": os.getcwd(), "phase": "training", "step": 30, "last_step": 40, "eta_s": 61.0, "idle_s": 1.0}
        write_json(root / "status.json", base | now | status)
    return root


def test_a_running_run(tmp_path):
    found = run_status(make_run(tmp_path, state="running"))
    assert (found.state, found.why, found.resume) == ("running", None, None)
    assert (found.step, found.last_step, found.eta_s, found.seconds_per_step) == (30, 40, 61.0, 2.5)
    assert found.validation == {"step": 30, "score": 0.6} and found.best == {"step": 20, "score": 0.8}
    assert found.warnings == 5 and found.last_warnings[-1] == {"step": 4, "text": "warning 4"}
    assert (found.checkpoint, found.checkpoint_size) == ("step-30", 3000) and found.disk_free > 0
    text = "\n".join(status_lines(found))
    assert f"running (process {os.getpid()} on " in text and "ETA 1:01" in text and "step-30 takes 2.93 KiB" in text
    assert "validation: 60.0 at step 30; best 80.0 at step 20\n" in text and "warning 4" in text


def test_the_interval_of_validations(tmp_path):
    root = make_run(tmp_path, state="running", validate_every=10)
    assert "best 80.0 at step 20; every 10 steps and after the last\n" in "\n".join(status_lines(run_status(root)))
    (root / "validation.jsonl").unlink()
    assert "  validation: none yet; every 10 steps and after the last" in status_lines(run_status(root))


def test_the_best_step_is_that_of_the_recipe(tmp_path):
    assert run_status(make_run(tmp_path, "likelihood", state="running")).best == {"step": 10, "score": 0.9}


@pytest.mark.parametrize(
    "status, state, why",
    [
        ({"state": "running", "process": GONE}, "crashed", "process 4194304 is gone"),
        (
            {"state": "running", "process": GONE, "oom_kills": {"/proc/vmstat": -1}},
            "crashed",
            "out of memory: the kernel",
        ),
        ({"state": "running", "process": ELSEWHERE}, "running", "by its heartbeat"),
        (
            {"state": "running", "process": ELSEWHERE, "silent_for": STALE + 3600},
            "crashed",
            "no heartbeat for 1:0",
        ),
        ({"state": "stopped", "reason": "SIGTERM", "process": GONE}, "stopped", "SIGTERM"),
        ({"state": "crashed", "reason": "rank 1 is gone", "exit_status": 1}, "crashed", "rank 1 is gone"),
        ({"state": "finished"}, "finished", None),
    ],
)
def test_states(tmp_path, status, state, why):
    silent = {"heartbeat": time.time() - status["silent_for"]} if "silent_for" in status else {}
    found = run_status(make_run(tmp_path, **status | silent))
    assert found.state == state and (found.why is None if why is None else why in found.why)
    assert found.resume == (COMMAND if state in ("stopped", "crashed") else None)
    assert (found.eta_s is not None) is (state == "running")


def test_the_command_to_resume_names_its_directory(tmp_path):
    found = run_status(make_run(tmp_path, state="stopped", directory="/of it"))
    assert found.resume == f"cd '/of it' && {COMMAND}"


def test_without_status_json(tmp_path):
    root = make_run(tmp_path / "run")
    assert run_status(root).state == "stopped"
    write_json(root / "eval.json", {"after": {}})
    assert run_status(root).state == "finished" and run_status(tmp_path / "none").state == "not started"


def test_a_folder_in_use_is_named_before_anything_is_loaded(tmp_path):
    root = make_run(tmp_path)
    check_free(tmp_path / "none")
    check_free(root)
    code = "import sys; from pathlib import Path; from extensions.common.run_lock import check_free; "
    check = [sys.executable, "-c", code + "check_free(Path(sys.argv[1]))", str(root)]
    with lock_folder(root):
        refused = subprocess.run(check, capture_output=True, text=True, cwd=ROOT)
        assert f"{root}: already running (process {os.getpid()} on " in refused.stderr
    assert subprocess.run(check, cwd=ROOT).returncode == 0


def test_the_command_lists_all_runs_below_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("one", "sweep/a", "sweep/b", "one.old1"):
        make_run(tmp_path / "runs" / name, state="stopped")
    assert [str(run) for run in find_runs([tmp_path / "runs"])] == [
        str(tmp_path / "runs" / name) for name in ("one", "sweep/a", "sweep/b")
    ]
    shown = CliRunner().invoke(app, ["status"])
    assert shown.exit_code == 0 and shown.output.count(f"stopped\n  resume with: {COMMAND}") == 3
    listed = json.loads(CliRunner().invoke(app, ["status", "runs/one", "nowhere", "--json"]).output)
    assert [(one["run"], one["state"]) for one in listed] == [("runs/one", "stopped"), ("nowhere", "not started")]


def test_the_command_loads_no_torch(tmp_path):
    code = "import sys; from extensions.cli.main import app; app(['status'], standalone_mode=False); "
    code += "print([name for name in ('torch', 'transformers', 'deepspeed') if name in sys.modules])"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


@pytest.mark.parametrize("age, refused", [(5, True), (STALE + 5, False)])
def test_on_a_file_system_without_locks_the_heartbeat_decides(tmp_path, monkeypatch, age, refused):
    def unsupported(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("extensions.common.run_lock.fcntl.lockf", unsupported)
    make_run(tmp_path, state="running", process=ELSEWHERE, heartbeat=time.time() - age)
    lock_folder(tmp_path).close()
    with pytest.raises(UserError, match=r"already running \(process \d+ on node7\)") if refused else nullcontext():
        check_free(tmp_path)
