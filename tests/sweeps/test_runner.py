"""Running a sweep, with a stub in place of deepspeed and with real runs."""

import csv
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from support import ROOT, run_command, sweep_recipe, write_recipe
from typer.testing import CliRunner

from extensions.cli.main import app

# In place of the launcher: writes the files of a run, or fails by batch size. 5 fails, 6 succeeds without a result, 7
# writes its process id and sleeps.
STUB = """#!{python}
import json, os, sys, time
from pathlib import Path
import yaml

arguments = sys.argv[1:]
at = next(k for k, argument in enumerate(arguments) if argument.endswith(".sh"))
recipe = yaml.safe_load(Path(arguments[at + 1]).read_text()) | {{"method": Path(arguments[at]).stem}}
for key, _, value in (argument.partition("=") for argument in arguments[at + 2 :]):
    *parents, last = key.split(".")
    place = recipe
    for parent in parents:
        place = place.setdefault(parent, {{}})
    place[last] = yaml.safe_load(value)
folder, size = Path(recipe["output_dir"]), recipe["ppo"]["batch_size"]
folder.mkdir(parents=True)
print("options", *arguments[:at])
if size == 5:
    print("error: no room for 5", file=sys.stderr)
    sys.exit(3)
if size == 6:
    sys.exit(0)
if size == 7:
    (folder / "pid").write_text(str(os.getpid()))
    time.sleep(600)
(folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
task = recipe["data"]["tasks"][0]
split = recipe["evaluation"].get("split", "test")
scores = {{"splits": {{task: split}}, "after": {{task: {{"score": size / 100}}}}, "training": {{"samples": 2 * size, "seconds": 1.5}}}}
bar = {{"score": 0.65, "intervals": {{m: [0.6, 0.7] for m in ("accuracy", "matthews")}}, "train_rows": 2 * size, "seconds": 0.3}}
(folder / "eval.json").write_text(json.dumps(scores | {{"yardsticks": {{"tfidf": {{task: bar}}}}}}))
(folder / "predictions_test.jsonl").touch()
"""  # noqa: E501


@pytest.fixture
def stub(tmp_path):
    path = tmp_path / "bin" / "deepspeed"
    path.parent.mkdir()
    path.write_text(STUB.format(python=sys.executable))
    path.chmod(0o755)
    return path


def sweep(*arguments):
    return CliRunner().invoke(app, ["sweep", *map(str, arguments)])


def starts(out):
    """How often each cell was started."""
    logs = sorted((out / "logs").iterdir())
    return {log.stem: sum(line.startswith("$ ") for line in log.read_text().splitlines()) for log in logs}


def test_a_sweep_continues_after_failures_and_skips_finished_cells(tmp_path, stub):
    path, out = sweep_recipe(tmp_path), tmp_path / "out"
    arguments = [path, "data.tasks=[sst2]", "--grid", "ppo.batch_size=4,5,6,8", "--out", out, "--launcher", stub]
    result = sweep(*arguments)
    said = " ".join(result.output.split())
    assert result.exit_code == 1
    log = (out / "logs" / "sst2-ppo.batch_size=4.log").read_text()
    assert "options --master_port 0\n" in log, "two sweeps on a machine do not share a port"
    assert "[1/4] sst2, ppo.batch_size=4: started" in said and "validation 4.0" in said
    assert "[2/4] sst2, ppo.batch_size=5: failed with status 3" in said and "error: no room for 5" in said
    assert "[3/4] sst2, ppo.batch_size=6: ended without a result" in said
    assert said.count("sst2, ppo.batch_size=5: failed with status 3; log") == 1  # listed again at the end
    assert "SST-2 │ TF-IDF + logistic regression │ 65.0 [60, 70] │ 16 │ 0.3" in said, "at the best cell's training rows"
    assert f"nlu report {out}" in said
    assert f"nlu submit {out / 'sst2/ppo.batch_size=8'} --suite glue" in said

    assert f"launch/eval.sh {path}" in said and f"model.adapter={out / 'sst2/ppo.batch_size=8/adapter'}" in said
    assert said.rstrip().endswith("evaluation.predict_test=true") and said.count("launch/eval.sh") == 1
    assert "evaluation.split=" not in said, "the best cell is evaluated on the split that the recipe names"

    table = json.loads((out / "sweep.json").read_text())
    rows, compared_by = table["cells"], table["compared_by"]
    assert compared_by == ("the score of the kept weights after training, of sampled answers, on the validation rows")
    assert f"validation: {compared_by}" in said and compared_by in (out / "sweep.md").read_text()
    assert [row["status"] for row in rows] == ["finished", "failed", "failed", "finished"]
    assert rows[3] == {
        "task": "sst2",
        "settings": {"ppo.batch_size": 8},
        "folder": "sst2/ppo.batch_size=8",
        "status": "finished",
        "validation": 0.08,
        "table": 0.08,
        "split": "validation",
        "samples": 16,
        "seconds": 1.5,
        "rows": None,
        "likelihood": None,
        "best": True,
    }
    assert json.loads((out / "best.json").read_text()) == ["sst2/ppo.batch_size=8"]
    with (out / "sweep.csv").open() as file:
        flat = list(csv.DictReader(file))
    assert [(row["settings"], row["validation"], row["best"]) for row in flat] == [
        ("ppo.batch_size=4", "0.04", "False"),
        ("ppo.batch_size=5", "", "False"),
        ("ppo.batch_size=6", "", "False"),
        ("ppo.batch_size=8", "0.08", "True"),
    ]
    assert (out / "sweep.md").read_text().partition("## ")[2] == (
        "sst2\n\n"
        "| ppo.batch_size | validation | table | samples | seconds | status |\n"
        "| ---: | ---: | ---: | ---: | ---: | --- |\n"
        "| 4 | 4.0 | 4.0 (validation) | 8 | 2 | finished |\n"
        "| 5 | - | - | - | - | failed |\n"
        "| 6 | - | - | - | - | failed |\n"
        "| **8** | **8.0** | **8.0 (validation)** | **16** | **2** | **finished, best** |\n"
    )

    table = (out / "sweep.md").read_text()
    (out / "sweep.md").unlink()
    assert sweep(*arguments, "--collect").exit_code == 0
    assert (out / "sweep.md").read_text() == table.replace("failed", "open"), "failures are recorded per session"
    printed = sweep(*arguments, "--print")
    assert [shlex.split(line)[3] for line in printed.output.splitlines()] == ["ppo.batch_size=5", "ppo.batch_size=6"]
    for size in (5, 6):
        (out / f"sst2/ppo.batch_size={size}").rename(out / f"old-{size}")
    again = sweep(*arguments)
    assert again.exit_code == 1 and "[1/4] sst2, ppo.batch_size=4: finished already, validation 4.0" in again.output
    assert starts(out) == {f"sst2-ppo.batch_size={size}": 2 if size in (5, 6) else 1 for size in (4, 5, 6, 8)}


def test_print_writes_nothing(tmp_path, stub):
    path, out = sweep_recipe(tmp_path), tmp_path / "out"
    printed = sweep(path, "--print", "--out", out, "--launcher", f"{stub} --num_gpus 4", "data.root=a b")
    commands = [shlex.split(line) for line in printed.stdout.splitlines()]
    assert len(commands) == 8 and not out.exists()
    assert commands[0][:6] == [str(stub), "--num_gpus", "4", str(ROOT / "launch/ppo.sh"), str(path), "data.root=a b"]


def test_replacing_the_table_of_another_sweep_warns(tmp_path, stub):
    path, out = sweep_recipe(tmp_path), tmp_path / "out"
    arguments = [path, "--grid", "ppo.batch_size=4", "--out", out, "--launcher", f"{stub} --master_port 7"]
    assert sweep(*arguments, "data.tasks=[sst2]").exit_code == 0
    assert "options --master_port 7\n" in (out / "logs" / "sst2-ppo.batch_size=4.log").read_text()
    result = sweep(*arguments, "data.tasks=[cola]")
    assert result.exit_code == 0 and "(sst2/ppo.batch_size=4)" in result.output
    assert json.loads((out / "best.json").read_text()) == ["cola/ppo.batch_size=4"]


@pytest.mark.parametrize(
    "launcher, part", [("", "empty"), ("a 'b", "quotation"), ("no-such-program", "no such program")]
)
def test_wrong_launchers(launcher, part, tmp_path):
    result = sweep(sweep_recipe(tmp_path), "--out", tmp_path / "out", "--launcher", launcher)
    assert result.exit_code == 2 and part in result.stderr and not (tmp_path / "out").exists()


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"


@pytest.mark.slow
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_sweep_stops_its_run_and_continues_later(tmp_path, stub, kind):
    path, out = sweep_recipe(tmp_path), tmp_path / "out"
    command = [Path(sys.executable).parent / "nlu", "sweep", path, "data.tasks=[sst2]", "--out", out]
    command += ["--launcher", stub, "--grid", "ppo.batch_size=4,7,8"]
    # In the background of a script, pytest ignores SIGINT, and its children inherit that. A preexec_fn would restore it
    # too, but copies this process, which may be too large.
    code = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
    process = subprocess.Popen([sys.executable, "-c", code, *command], stdout=subprocess.PIPE, text=True)
    pid_file = out / "sst2/ppo.batch_size=7/pid"
    deadline = time.monotonic() + 120
    while not (pid_file.exists() and pid_file.read_text()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(kind)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 130 and "interrupted" in said
    assert not alive(int(pid_file.read_text()))
    rows = json.loads((out / "sweep.json").read_text())["cells"]
    assert [(row["status"], row["best"]) for row in rows] == [("finished", True), ("open", False), ("open", False)]
    pid_file.parent.rename(tmp_path / "interrupted")
    stub.write_text(stub.read_text().replace("size == 7", "size == 0"))
    assert sweep(*command[2:]).exit_code == 0
    assert starts(out) == {"sst2-ppo.batch_size=4": 1, "sst2-ppo.batch_size=7": 2, "sst2-ppo.batch_size=8": 1}
    assert json.loads((out / "best.json").read_text()) == ["sst2/ppo.batch_size=8"]


@pytest.mark.slow
def test_real_runs(tiny_model, tmp_path):
    """Two runs on two ranks: one finishes, one has a batch size that two ranks cannot share; then --print."""
    evaluation = {"every_steps": 1, "max_samples": 4, "validation_samples": 4}
    path = write_recipe(tmp_path, tiny_model("llama"), evaluation=evaluation)
    out = tmp_path / "out"
    command = ["nlu", "sweep", str(path), "--grid", "ppo.batch_size=3,4", "--out", str(out)]
    command += ["--launcher", "deepspeed --num_accelerators 2"]
    done = run_command(command)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "failed with status 2" in done.stdout and "ppo.batch_size: 3 samples cannot be shared" in done.stdout
    folder = out / "acceptability" / "ppo.batch_size=4"
    failed, finished = json.loads((out / "sweep.json").read_text())["cells"]
    assert (failed["status"], failed["validation"], failed["best"]) == ("failed", None, False)
    assert (finished["status"], finished["split"], finished["samples"]) == ("finished", "validation", 8)
    assert finished["rows"] == json.loads((folder / "versions.json").read_text())["inputs"]["evaluation rows"]
    assert (
        finished["validation"]
        == finished["table"]
        == json.loads((folder / "eval.json").read_text())["after"]["acceptability"]["score"]
    )
    assert json.loads((out / "best.json").read_text()) == ["acceptability/ppo.batch_size=4"]
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["output_dir"] == str(folder)

    printed = run_command([*command, "--print"])  # a finished real run is recognised as such, with the same recipe
    assert [shlex.split(line)[5] for line in printed.stdout.splitlines()] == ["ppo.batch_size=3"], printed.stderr
