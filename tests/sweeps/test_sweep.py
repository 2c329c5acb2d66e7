"""The sweep: its plan, its choice and its records; runs by a stand-in for deepspeed, and real ones."""

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
from support import ROOT, run_command, write_recipe
from typer.testing import CliRunner

from extensions.cli.main import app
from extensions.common.errors import UserError
from extensions.recipe import dump_recipe, load_recipe
from extensions.sweeps.grid import Cell, Outcome, best_validation, choose, outcome, parse_grid, plan

# Stands in for the launcher: leaves what a run leaves, or fails as the batch size tells it to. A batch of 5 fails, of 6
# ends well without a result, of 7 writes its process number and sleeps.
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
(folder / "validation.jsonl").write_text(json.dumps({{"step": 1, "mean": size / 100, "tasks": {{task: {{}}}}}}) + "\\n")
scores = {{"splits": {{task: "test"}}, "after": {{task: {{"score": 0.25}}}}, "training": {{"samples": 2 * size, "seconds": 1.5}}}}
(folder / "eval.json").write_text(json.dumps(scores))
(folder / "predictions_test.jsonl").touch()
"""  # noqa: E501


@pytest.fixture
def stub(tmp_path):
    path = tmp_path / "bin" / "deepspeed"
    path.parent.mkdir()
    path.write_text(STUB.format(python=sys.executable))
    path.chmod(0o755)
    return path


def recipe_file(folder, **sections):
    base = {"data": {"tasks": ["sst2", "cola"]}, "evaluation": {"every_steps": 1}}
    return write_recipe(folder, Path("model"), **base | sections)


def planned(path, *overrides, method="ppo", grid=(), together=False, out=Path("out"), warnings=None):
    return plan(path, overrides, method, grid, together, out, [].append if warnings is None else warnings.append)


def refused(path, *overrides, **options):
    with pytest.raises(UserError) as caught:
        planned(path, *overrides, **options)
    return str(caught.value)


def groups(sweep):
    return {cell.task: [task.name for task in cell.recipe.data.tasks] for cell in sweep.cells}


def lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


# --------------------------------------------------------------------------------------------------------- the plan


@pytest.mark.parametrize(
    "text, values",
    [
        ("ppo.batch_size=4,8", [4, 8]),
        (" ppo.batch_size = 4 ", [4]),
        ("optimizer.lr=1e-5, 2.0e-5", ["1e-5", 2e-5]),  # YAML 1.1; the recipe reads both as numbers
        ("lora.target_modules=auto,[q_proj, v_proj]", ["auto", ["q_proj", "v_proj"]]),
        ("ppo.mini_batch_size=null,4", [None, 4]),
        ("model.path='a,b',c", ["a,b", "c"]),
    ],
)
def test_values_of_a_grid(text, values):
    assert parse_grid([text]) == {text.partition("=")[0].strip(): values}


@pytest.mark.parametrize(
    "grid, parts",
    [
        (["ppo.batchsize=4"], ["'ppo.batchsize'", "ppo.batch_size?"]),
        (["ppo=4"], ["no recipe key is called 'ppo'"]),
        (["data.tasks=sst2,cola"], ["data.tasks", "outside of the grid"]),
        (["output_dir=a,b"], ["--out"]),
        (["ppo.batch_size"], ["no values", "KEY=V1,V2"]),
        (["ppo.batch_size=4,]"], ["not valid YAML"]),
        (["ppo.batch_size=4", "ppo.batch_size=8"], ["given twice"]),
        (["ppo.batch_size=8,4,8"], ["ppo.batch_size=8", "the same run"]),
        (["optimizer.lr=1e-5,0.00001"], ["the same run"]),
    ],
    ids=lambda value: value[0],
)
def test_wrong_grids(grid, parts, tmp_path):
    message = refused(recipe_file(tmp_path), grid=grid)
    assert all(part in message for part in parts), message


def test_wrong_values_of_all_cells_are_told_at_once(tmp_path):
    message = refused(recipe_file(tmp_path), grid=["ppo.batch_size=4,many", "optimizer.lr=0,1e-5"])
    assert message.count("'many'") == 2 and message.count("optimizer.lr: got 0") == 2  # three of the four are wrong
    message = refused(recipe_file(tmp_path), "ppo.mini_batch_size=6", grid=["ppo.batch_size=4,6,8"])
    assert [f"ppo.batch_size: {size}" in message for size in (4, 6, 8)] == [True, False, True]


@pytest.mark.parametrize(
    "overrides, part",
    [
        (["output_dir=x"], "--out"),
        (["method=sft"], "--method"),
        (["ppo.batch_size=8"], "leave out one"),
        (["ppo.bach_size=8"], "ppo.bach_size: unknown key"),
        (["data.tasks=ax,mnli_mm"], "can only be evaluated"),
    ],
)
def test_wrong_overrides(overrides, part, tmp_path):
    assert part in refused(recipe_file(tmp_path), *overrides, grid=["ppo.batch_size=4,8"])


def test_the_papers_grid_is_that_of_ppo_alone(tmp_path):
    """Section 5.1: batch size in {4, 8, 12, 16}."""
    path = recipe_file(tmp_path)
    sizes = [(cell.task, cell.recipe.ppo.batch_size) for cell in planned(path).cells]
    assert sizes == [(task, size) for task in ("sst2", "cola") for size in (4, 8, 12, 16)]
    assert [cell.recipe.ppo.batch_size for cell in planned(path, "ppo.batch_size=7").cells] == [7, 7]
    for method in ("sft", "eval", "encoder"):
        cells = planned(path, method=method).cells
        assert [(cell.task, cell.settings, cell.recipe.method) for cell in cells] == [
            ("sst2", {}, method),
            ("cola", {}, method),
        ]


def test_evaluation_only_tasks_go_along_with_their_teachers(tmp_path):
    path, options = recipe_file(tmp_path), {"grid": ["ppo.batch_size=4"]}
    single = ["qqp", "qnli", "sst2", "cola", "stsb", "mrpc", "rte", "wnli"]
    assert groups(planned(path, "data.tasks=glue", **options)) == {
        "mnli": ["mnli", "mnli_mm", "ax"],
        **{name: [name] for name in single},
    }
    found = groups(planned(path, "data.tasks=superglue", method="sft"))
    assert found.pop("superglue_rte") == ["superglue_rte", "axb", "axg"]
    assert found == {name: [name] for name in ("boolq", "cb", "copa", "multirc", "record", "wic", "wsc")}
    warnings = []
    assert groups(planned(path, "data.tasks=ax,cola", warnings=warnings, **options)) == {"cola": ["cola"]}
    assert len(warnings) == 1 and warnings[0].startswith("AX is left out") and "mnli" in warnings[0]


def test_prompting_takes_every_task_by_itself_and_together_all_in_one(tmp_path):
    path = recipe_file(tmp_path)
    tasks = ["mnli", "ax", "cola"]
    chosen = f"data.tasks=[{', '.join(tasks)}]"
    assert groups(planned(path, chosen, method="eval")) == {task: [task] for task in tasks}
    for method in ("ppo", "sft", "eval", "encoder"):
        sweep = planned(path, chosen, method=method, together=True, grid=["seed=0"])
        assert groups(sweep) == {"together": tasks} and len(sweep.cells) == 1


def test_a_command_starts_the_cell_that_was_planned(tmp_path):
    own = {"name": "tickets", "description": "Route it: now." + 40 * " Or later.", "question": 'Who takes "{text}"?'}
    own |= {"labels": ["billing", "technical"], "source": {"files": {"train": "a.jsonl", "validation": "b.jsonl"}}}
    own["question"] = f"First read.\n\n{own['question']}"
    path = recipe_file(tmp_path, data={"tasks": [own, "sst2"]})
    out = tmp_path / "my sweep: 1"
    overrides = ["seed=3", "name=trial", "data.root=x y"]
    grid = ["model.path=org/a,org_a", "lora.target_modules=auto,[q_proj, v_proj]"]
    sweep = planned(path, *overrides, grid=grid, out=out)
    assert len({cell.folder for cell in sweep.cells}) == len({sweep.log(cell) for cell in sweep.cells}) == 8
    for cell in sweep.cells:
        command = sweep.command(cell, ["deepspeed", "--num_gpus", "4"])
        assert command[:5] == ["deepspeed", "--num_gpus", "4", str(ROOT / "launch" / "ppo.sh"), str(path)]
        assert "\n" not in shlex.join(command)
        # As the run reads it, behind a shell.
        assert load_recipe(path, shlex.split(shlex.join(command))[5:], "ppo") == cell.recipe
        assert [task.name for task in cell.recipe.data.tasks] == [cell.task]
        assert (cell.recipe.seed, cell.recipe.data.root) == (3, "x y")
        assert cell.recipe.name.startswith(f"trial-{cell.task}-")
        assert cell.folder.parent == out / cell.task
    assert [cell.recipe.model.path for cell in sweep.cells] == 2 * (2 * ["org/a"] + 2 * ["org_a"])


def test_folders_are_called_as_their_cells(tmp_path):
    sweep = planned(recipe_file(tmp_path), grid=["ppo.batch_size=4,8", "optimizer.lr=1e-5"], out=None)
    assert sweep.cells[1].folder == Path("runs/tiny-ppo-sweep/sst2/ppo.batch_size=8,optimizer.lr=1e-5")
    assert sweep.log(sweep.cells[1]) == Path("runs/tiny-ppo-sweep/logs/sst2-ppo.batch_size=8,optimizer.lr=1e-5.log")
    assert sweep.cells[1].recipe.name == "tiny-sst2-ppo.batch_size-8-optimizer.lr-1e-5"
    assert planned(recipe_file(tmp_path), together=True, out=None).out == Path("runs/tiny-ppo-together-sweep")


def test_a_test_split_never_chooses(tmp_path):
    path = recipe_file(
        tmp_path, data={"tasks": ["acceptability"]}, evaluation={"every_steps": 0}
    )  # generated: has test
    two = {"grid": ["ppo.batch_size=4,8"]}
    message = refused(path, **two)
    assert "acceptability" in message and "evaluation.every_steps" in message
    assert "at most the 2 steps" in refused(path, "evaluation.every_steps=3", **two)  # ends before its first validation
    assert "evaluation.split=validation" in refused(path, method="eval", grid=["prompt.shots=0,5"])
    assert "sst2" in refused(path, "data.tasks=[sst2]", "evaluation.split=test", **two)
    for allowed in (["evaluation.every_steps=2"], ["evaluation.split=validation"], ["data.tasks=[sst2]"]):
        assert len(planned(path, *allowed, **two).cells) == 2
    assert len(planned(path, grid=["ppo.batch_size=4"]).cells) == 1  # nothing to choose
    assert len(planned(path, method="encoder", grid=["encoder.lr=1e-5,2e-5"]).cells) == 2  # always validates


def test_cells_spare_what_is_the_same_for_all_or_for_the_best_alone(tmp_path):
    path = recipe_file(tmp_path, evaluation={"every_steps": 1, "before": True, "predict_test": True})

    def spared(*overrides, **options):
        return [
            (cell.recipe.evaluation.before, cell.recipe.evaluation.predict_test)
            for cell in planned(path, "data.tasks=[sst2]", *overrides, **options).cells
        ]

    assert spared(grid=["ppo.batch_size=4,8"]) == [(False, False)] * 2
    assert spared(grid=["ppo.batch_size=4"]) == [(False, True)]
    assert spared("evaluation.predict_test=true", "evaluation.before=true", method="sft") == [(True, True)]
    assert spared(method="eval") == [(True, True)], "there the keys mean something else, or nothing"


def test_an_encoder_sweep_with_an_intermediate_task_is_one_run(tmp_path):
    path = recipe_file(tmp_path, data={"tasks": ["cb", "copa"]}, encoder={"intermediate": "mnli"})
    assert "--together" in refused(path, method="encoder")
    assert len(planned(path, method="encoder", together=True).cells) == 1


# ------------------------------------------------------------------------------------------------------ the outcome


@pytest.mark.parametrize(
    "records, best",
    [
        ([], None),
        ([{"mean": 0.4, "tasks": {"a": {}}}], 0.4),
        ([{"mean": m, "tasks": {"a": {}, "b": {}}} for m in (-0.2, 0.6, 0.5)], 0.6),
        ([{"mean": m, "tasks": {"a": {}}} for m in (None, -0.5, None)], -0.5),
        ([{"mean": None, "tasks": {"a": {}}}], None),
        # An encoder's: (0.8 + 0.5) / 2.
        ([{"mean": m, "tasks": {t: {}}} for t, m in (("a", 0.8), ("a", 0.7), ("b", 0.3), ("b", 0.5))], 0.65),
        # The intermediate task of an encoder, "mnli", chooses nothing.
        ([{"mean": m, "tasks": {t: {}}} for t, m in (("mnli", 0.9), ("a", 0.3))], 0.3),
    ],
)
def test_best_validation_of_a_run(records, best, tmp_path):
    assert best_validation(lines(tmp_path / "validation.jsonl", *records), ["a", "b"]) == best
    assert best_validation(tmp_path / "absent.jsonl", ["a"]) is None


def test_the_best_cell_of_each_task():
    def cells(*tasks):
        return [Cell(task, {}, None, []) for task in tasks]

    def done(validation):
        return Outcome("finished", validation)

    assert choose(cells("a", "a", "a"), [done(0.5), done(0.7), done(0.6)]) == [1]
    assert choose(cells("a", "a", "a"), [done(0.5), done(0.7), done(0.7)]) == [1]  # ties: the first
    assert choose(cells("a", "a"), [done(-0.3), done(-0.1)]) == [1]
    assert choose(cells("a", "a"), [done(0.0), done(None)]) == [0]
    assert choose(cells("a", "a", "b", "b"), [Outcome("failed"), done(0.1), Outcome(), Outcome("failed")]) == [1]
    assert choose(cells("a", "b", "b"), [done(0.9), done(0.2), done(0.3)]) == [0, 2]
    assert choose(cells("a", "a", "b", "c"), [done(None), done(None), done(None), Outcome()]) == [2]  # without rivals


def score(value):
    return {"score": value, "metrics": {"accuracy": value}, "samples": 10}


def finish(cell, scores, **override):
    cell.folder.mkdir(parents=True)
    (cell.folder / "recipe.yaml").write_text(dump_recipe(cell.recipe.model_copy(update=override)))
    (cell.folder / "eval.json").write_text(json.dumps(scores))


def test_outcome_of_a_run_folder(tmp_path):
    """Judged by the tasks that it learns, by validations if there are any, never by a test split."""
    options = {"together": True, "grid": ["ppo.batch_size=4"]}
    path = recipe_file(tmp_path, data={"tasks": ["sst2", "axb", "cola"]})
    (cell,) = planned(path, out=tmp_path / "out", **options).cells
    assert outcome(cell) == Outcome("open")
    training = {"tasks": ["sst2", "cola"], "steps": 36, "samples": 576, "seconds": 438.0}
    splits = {"sst2": "validation", "axb": "test", "cola": "validation"}
    after = {"sst2": score(0.9), "axb": score(0.1), "cola": score(0.5)}
    finish(cell, {"method": "ppo", "splits": splits, "before": after, "training": training})
    assert outcome(cell) == Outcome("open")
    scores = {"method": "ppo", "splits": splits, "after": after, "training": training}
    (cell.folder / "eval.json").write_text(json.dumps(scores))
    assert outcome(cell) == Outcome("finished", 0.7, 0.7, "validation", 576, 438.0)
    (cell.folder / "eval.json").write_text(json.dumps(scores | {"splits": splits | {"cola": "test"}}))
    assert outcome(cell) == Outcome("finished", None, 0.7, "test and validation", 576, 438.0)
    lines(cell.folder / "validation.jsonl", {"step": 5, "mean": 0.8, "tasks": {"sst2": {}, "cola": {}}})
    assert outcome(cell) == Outcome("finished", 0.8, 0.7, "test and validation", 576, 438.0)


def test_a_finished_run_of_another_recipe_is_refused(tmp_path):
    path, out = recipe_file(tmp_path), tmp_path / "out"
    cells = planned(path, out=out).cells
    scores = {"method": "ppo", "splits": {"sst2": "validation"}, "after": {"sst2": score(0.9)}}
    finish(cells[0], scores, output_dir="elsewhere")
    assert planned(path, out=out).cells == cells
    finish(cells[2], scores, seed=9)
    message = refused(path, out=out)
    assert str(cells[2].folder) in message and "seed was 9, is 0" in message and "--out" in message
    assert str(cells[0].folder) not in message
    (cells[2].folder / "eval.json").write_text("{}")  # unfinished: the run itself decides
    assert planned(path, out=out).cells == cells


# ------------------------------------------------------------------------------------------------------- the running


def sweep(*arguments):
    return CliRunner().invoke(app, ["sweep", *map(str, arguments)])


def starts(out):
    """How often each cell was started."""
    logs = sorted((out / "logs").iterdir())
    return {log.stem: sum(line.startswith("$ ") for line in log.read_text().splitlines()) for log in logs}


def test_a_sweep_goes_on_after_failures_and_skips_what_is_finished(tmp_path, stub):
    path, out = recipe_file(tmp_path), tmp_path / "out"
    arguments = [path, "data.tasks=[sst2]", "--grid", "ppo.batch_size=4,5,6,8", "--out", out, "--launcher", stub]
    result = sweep(*arguments)
    said = " ".join(result.output.split())
    assert result.exit_code == 1
    assert "[1/4] sst2, ppo.batch_size=4: started" in said and "validation 4.0" in said
    assert "[2/4] sst2, ppo.batch_size=5: failed with status 3" in said and "error: no room for 5" in said
    assert "[3/4] sst2, ppo.batch_size=6: ended without a result" in said
    assert said.count("sst2, ppo.batch_size=5: failed with status 3; log") == 1  # listed again at the end
    assert f"nlu report {out}" in said
    assert f"nlu submit {out / 'sst2/ppo.batch_size=8'} --suite glue" in said

    assert f"launch/eval.sh {path}" in said and f"model.adapter={out / 'sst2/ppo.batch_size=8/adapter'}" in said
    assert said.rstrip().endswith("evaluation.predict_test=true") and said.count("launch/eval.sh") == 1

    rows = json.loads((out / "sweep.json").read_text())["cells"]
    assert [row["status"] for row in rows] == ["finished", "failed", "failed", "finished"]
    assert rows[3] == {
        "task": "sst2",
        "settings": {"ppo.batch_size": 8},
        "folder": "sst2/ppo.batch_size=8",
        "status": "finished",
        "validation": 0.08,
        "table": 0.25,
        "split": "test",
        "samples": 16,
        "seconds": 1.5,
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
        "| 4 | 4.0 | 25.0 (test) | 8 | 2 | finished |\n"
        "| 5 | - | - | - | - | failed |\n"
        "| 6 | - | - | - | - | failed |\n"
        "| **8** | **8.0** | **25.0 (test)** | **16** | **2** | **finished, best** |\n"
    )

    table = (out / "sweep.md").read_text()
    (out / "sweep.md").unlink()
    assert sweep(*arguments, "--collect").exit_code == 0
    assert (out / "sweep.md").read_text() == table.replace("failed", "open"), "what a session remembers alone"
    printed = sweep(*arguments, "--print")
    assert [shlex.split(line)[3] for line in printed.output.splitlines()] == ["ppo.batch_size=5", "ppo.batch_size=6"]
    for size in (5, 6):
        (out / f"sst2/ppo.batch_size={size}").rename(out / f"old-{size}")
    again = sweep(*arguments)
    assert again.exit_code == 1 and "[1/4] sst2, ppo.batch_size=4: finished already, validation 4.0" in again.output
    assert starts(out) == {f"sst2-ppo.batch_size={size}": 2 if size in (5, 6) else 1 for size in (4, 5, 6, 8)}


def test_nothing_is_written_by_print(tmp_path, stub):
    path, out = recipe_file(tmp_path), tmp_path / "out"
    printed = sweep(path, "--print", "--out", out, "--launcher", f"{stub} --num_gpus 4", "data.root=a b")
    commands = [shlex.split(line) for line in printed.stdout.splitlines()]
    assert len(commands) == 8 and not out.exists()
    assert commands[0][:6] == [str(stub), "--num_gpus", "4", str(ROOT / "launch/ppo.sh"), str(path), "data.root=a b"]


def test_a_sweep_of_others_in_the_same_folder_is_told(tmp_path, stub):
    path, out = recipe_file(tmp_path), tmp_path / "out"
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
    result = sweep(recipe_file(tmp_path), "--out", tmp_path / "out", "--launcher", launcher)
    assert result.exit_code == 2 and part in result.stderr and not (tmp_path / "out").exists()


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"


@pytest.mark.slow
@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_sweep_stops_its_run_and_goes_on_later(tmp_path, stub, kind):
    path, out = recipe_file(tmp_path), tmp_path / "out"
    command = [Path(sys.executable).parent / "nlu", "sweep", path, "data.tasks=[sst2]", "--out", out]
    command += ["--launcher", stub, "--grid", "ppo.batch_size=4,7,8"]

    def heeding():  # a test run in the background of a script would hand down that SIGINT is ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=heeding)
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
    """One run of two ranks finishes, one has a batch that two ranks cannot share; then what is left is asked for."""
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
    assert (finished["status"], finished["split"], finished["samples"]) == ("finished", "test", 8)
    means = [json.loads(line)["mean"] for line in (folder / "validation.jsonl").read_text().splitlines()]
    assert len(means) == 2 and finished["validation"] == max(means)
    assert finished["table"] == json.loads((folder / "eval.json").read_text())["after"]["acceptability"]["score"]
    assert json.loads((out / "best.json").read_text()) == ["acceptability/ppo.batch_size=4"]
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["output_dir"] == str(folder)

    printed = run_command([*command, "--print"])  # what real runs leave counts as finished, by the same recipe
    assert [shlex.split(line)[5] for line in printed.stdout.splitlines()] == ["ppo.batch_size=3"], printed.stderr
