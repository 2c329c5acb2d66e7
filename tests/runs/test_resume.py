"""Keys and inputs that a resumed run must not change; the run folder and its lock."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from resumable import RESUMABLE, again, assert_ended_as, own_task, with_reward
from support import write_recipe

from extensions.common.console import Reporter
from extensions.common.files import read_json, read_jsonl, write_json, write_text
from extensions.recipe import load_recipe
from extensions.runs.folder import RunFolder
from extensions.runs.main import main
from extensions.runs.resume import is_finished


@pytest.mark.slow
def test_keys_that_may_change_on_resume(unfinished, tmp_path, capsys):
    path = again(unfinished, tmp_path)
    assert main([str(path), "optimizer.lr=0.5", "deepspeed.timeout=60"]) == 2
    error = capsys.readouterr().err
    assert "optimizer.lr: was 0.01, is 0.5" in error and "timeout" not in error
    assert main([str(path), "deepspeed.timeout=60", "checkpoint.keep=7"]) == 0
    assert_ended_as(unfinished / "whole", tmp_path / "run")


@pytest.mark.parametrize("changed", ["data", "reward"])
def test_changed_inputs_are_refused(tiny_model, tmp_path, capsys, untried, changed):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"text {k}", "label": "ab"[k % 2]}) + "\n" for k in range(8)))
    reward = with_reward(tmp_path, "calls += 1\nif calls == 6: raise SystemExit\nreturn 1.0")
    path = write_recipe(
        tmp_path,
        tiny_model("llama"),
        output_dir=str(tmp_path / "run"),
        data={"tasks": [own_task(rows)]},
        reward=reward,
        **RESUMABLE,
    )
    with pytest.raises(SystemExit):
        main([str(path)])
    if changed == "data":
        rows.write_text(rows.read_text().replace("text 3", "text 33"))
    else:
        Path(reward).write_text(Path(reward).read_text() + "# changed\n")
    assert main([str(path)]) == 2
    assert f"have changed since (sha256): {changed}." in capsys.readouterr().err


def test_two_runs_do_not_write_into_one_folder(unfinished, tmp_path, capsys):
    path = again(unfinished, tmp_path)
    code = "import fcntl, sys, time; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print(1, flush=True); "
    holder = subprocess.Popen(
        [sys.executable, "-c", code + "time.sleep(60)", str(tmp_path / "run" / "run.lock")], stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout.readline() == b"1\n"
        assert main([str(path)]) == 2
        assert "already running (" in capsys.readouterr().err
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    assert main([str(path)]) == 0


def test_other_package_versions_are_a_warning(unfinished, tmp_path, capsys):
    path = again(unfinished, tmp_path)
    versions = read_json(tmp_path / "run" / "versions.json")
    versions["packages"]["torch"] = "1.0"
    write_json(tmp_path / "run" / "versions.json", versions)
    assert main([str(path)]) == 0
    assert "torch was 1.0, is" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["recipe.yaml", "versions.json"])
def test_a_damaged_run_folder_is_an_error(unfinished, tmp_path, capsys, name):
    path = again(unfinished, tmp_path)
    (tmp_path / "run" / name).write_text("{{{")
    assert main([str(path)]) == 2
    error = capsys.readouterr().err
    assert name in error and "damaged" in error and "Traceback" not in error


def test_a_tracker_that_fails_does_not_stop_the_run(tmp_path, tiny_model):
    reporter = Reporter(active=False)
    recipe = load_recipe(write_recipe(tmp_path, tiny_model("llama"), output_dir=str(tmp_path / "run")))
    folder = RunFolder(tmp_path / "run", recipe, {}, reporter)

    class Broken:
        def log(self, *args, **kwargs):
            raise ConnectionError("no network")

    folder.trackers.active["broken"] = Broken()
    for step in (1, 2):
        folder.metrics({"step": step, "loss": 0.5})
    folder.close()
    assert [r["step"] for r in read_jsonl(tmp_path / "run" / "metrics.jsonl")] == [1, 2]
    (warning,) = read_jsonl(tmp_path / "run" / "warnings.jsonl")
    assert list(reporter.warnings) == [warning["text"]]
    assert "broken failed" in warning["text"] and "no network" in warning["text"]


def test_is_finished(tmp_path):
    assert not is_finished(tmp_path)
    for text, expected in (("{", False), ("[]", False), ('{"before": {}}', False), ('{"after": {}}', True)):
        write_text(tmp_path / "eval.json", text)
        assert is_finished(tmp_path) == expected
