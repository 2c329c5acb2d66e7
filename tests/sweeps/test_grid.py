"""The plan of a sweep: its grid, its cells, and what is refused."""

import json
import shlex
from pathlib import Path

import pytest
from support import ROOT, planned_sweep, sweep_recipe

from extensions.common.errors import UserError
from extensions.recipe import load_recipe
from extensions.sweeps.grid import parse_grid


def refused(path, *overrides, **options):
    with pytest.raises(UserError) as caught:
        planned_sweep(path, *overrides, **options)
    return str(caught.value)


def groups(sweep):
    return {cell.task: [task.name for task in cell.recipe.data.tasks] for cell in sweep.cells}


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
    message = refused(sweep_recipe(tmp_path), grid=grid)
    assert all(part in message for part in parts), message


def test_wrong_values_of_all_cells_are_reported_at_once(tmp_path):
    message = refused(sweep_recipe(tmp_path), grid=["ppo.batch_size=4,many", "optimizer.lr=0,1e-5"])
    assert message.count("'many'") == 2 and message.count("optimizer.lr: got 0") == 2  # three of the four are wrong
    message = refused(sweep_recipe(tmp_path), "ppo.mini_batch_size=6", grid=["ppo.batch_size=4,6,8"])
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
    assert part in refused(sweep_recipe(tmp_path), *overrides, grid=["ppo.batch_size=4,8"])


def test_the_papers_grid_is_for_ppo_only(tmp_path):
    """Section 5.1: batch size in {4, 8, 12, 16}."""
    path = sweep_recipe(tmp_path)
    sizes = [(cell.task, cell.recipe.ppo.batch_size) for cell in planned_sweep(path).cells]
    assert sizes == [(task, size) for task in ("sst2", "cola") for size in (4, 8, 12, 16)]
    assert [cell.recipe.ppo.batch_size for cell in planned_sweep(path, "ppo.batch_size=7").cells] == [7, 7]
    for method in ("sft", "eval", "encoder"):
        cells = planned_sweep(path, method=method).cells
        assert [(cell.task, cell.settings, cell.recipe.method) for cell in cells] == [
            ("sst2", {}, method),
            ("cola", {}, method),
        ]


def test_evaluation_only_tasks_join_their_train_task(tmp_path):
    path, options = sweep_recipe(tmp_path), {"grid": ["ppo.batch_size=4"]}
    single = ["qqp", "qnli", "sst2", "cola", "stsb", "mrpc", "rte", "wnli"]
    assert groups(planned_sweep(path, "data.tasks=glue", **options)) == {
        "mnli": ["mnli", "mnli_mm", "ax"],
        **{name: [name] for name in single},
    }
    found = groups(planned_sweep(path, "data.tasks=superglue", method="sft"))
    assert found.pop("superglue_rte") == ["superglue_rte", "axb", "axg"]
    assert found == {name: [name] for name in ("boolq", "cb", "copa", "multirc", "record", "wic", "wsc")}
    warnings = []
    assert groups(planned_sweep(path, "data.tasks=ax,cola", warnings=warnings, **options)) == {"cola": ["cola"]}
    assert len(warnings) == 1 and warnings[0].startswith("AX is left out") and "mnli" in warnings[0]


def test_prompting_has_a_run_per_task_and_together_one_run(tmp_path):
    path = sweep_recipe(tmp_path)
    tasks = ["mnli", "ax", "cola"]
    chosen = f"data.tasks=[{', '.join(tasks)}]"
    assert groups(planned_sweep(path, chosen, method="eval")) == {task: [task] for task in tasks}
    for method in ("ppo", "sft", "eval", "encoder"):
        sweep = planned_sweep(path, chosen, method=method, together=True, grid=["seed=0"])
        assert groups(sweep) == {"together": tasks} and len(sweep.cells) == 1


def test_a_command_starts_the_planned_cell(tmp_path):
    own = {"name": "tickets", "description": "Route it: now." + 40 * " Or later.", "question": 'Who takes "{text}"?'}
    own |= {"labels": ["billing", "technical"], "source": {"files": {"train": "a.jsonl", "validation": "b.jsonl"}}}
    own["question"] = f"First read.\n\n{own['question']}"
    path = sweep_recipe(tmp_path, data={"tasks": [own, "sst2"]})
    out = tmp_path / "my sweep: 1"
    overrides = ["seed=3", "name=trial", "data.root=/x y"]
    grid = ["model.path=org/a,org_a", "lora.target_modules=auto,[q_proj, v_proj]"]
    sweep = planned_sweep(path, *overrides, grid=grid, out=out)
    assert len({cell.folder for cell in sweep.cells}) == len({sweep.log(cell) for cell in sweep.cells}) == 8
    for cell in sweep.cells:
        command = sweep.command(cell, ["deepspeed", "--num_gpus", "4"])
        assert command[:5] == ["deepspeed", "--num_gpus", "4", str(ROOT / "launch" / "ppo.sh"), str(path)]
        assert "\n" not in shlex.join(command)
        # As the run reads it, behind a shell.
        assert load_recipe(path, shlex.split(shlex.join(command))[5:], "ppo") == cell.recipe
        assert [task.name for task in cell.recipe.data.tasks] == [cell.task]
        assert (cell.recipe.seed, cell.recipe.data.root) == (3, "/x y")
        assert cell.recipe.name.startswith(f"trial-{cell.task}-")
        assert cell.folder.parent == out / cell.task
    assert [cell.recipe.model.path for cell in sweep.cells] == 2 * (2 * ["org/a"] + 2 * ["org_a"])


def test_folders_are_named_after_their_cells(tmp_path):
    sweep = planned_sweep(sweep_recipe(tmp_path), grid=["ppo.batch_size=4,8", "optimizer.lr=1e-5"], out=None)
    assert sweep.cells[1].folder == Path("runs/tiny-ppo-sweep/sst2/ppo.batch_size=8,optimizer.lr=1e-5")
    assert sweep.log(sweep.cells[1]) == Path("runs/tiny-ppo-sweep/logs/sst2-ppo.batch_size=8,optimizer.lr=1e-5.log")
    assert sweep.cells[1].recipe.name == "tiny-sst2-ppo.batch_size-8-optimizer.lr-1e-5"
    assert planned_sweep(sweep_recipe(tmp_path), together=True, out=None).out == Path("runs/tiny-ppo-together-sweep")


def test_cells_are_never_chosen_by_a_test_split(tmp_path):
    """In a grid the table is of the validation rows; the test rows are for the best cell."""
    path = sweep_recipe(tmp_path, data={"tasks": ["acceptability"]})  # generated: has a test split
    two = {"grid": ["ppo.batch_size=4,8"]}
    for method, grid in (("ppo", two["grid"]), ("eval", ["prompt.shots=0,5"]), ("encoder", ["encoder.lr=1e-5,2e-5"])):
        cells = planned_sweep(path, method=method, grid=grid).cells
        assert [cell.recipe.evaluation.split for cell in cells] == ["validation"] * 2
    for task in ("sst2", "acceptability"):
        message = refused(path, f"data.tasks=[{task}]", "evaluation.split=test", **two)
        assert "a test split must not choose the best cell" in message
    own = {"name": "own", "description": "-", "question": "{text}", "labels": ["a", "b"]}
    own["source"] = {"files": {"train": "a.csv", "test": "b.csv"}}
    assert "own has no labelled validation split" in refused(path, f"data.tasks=[{json.dumps(own)}]", **two)
    (cell,) = planned_sweep(path, grid=["ppo.batch_size=4"]).cells
    assert cell.recipe.evaluation.split == "auto", "there is nothing to choose"


def test_keys_that_score_cells_differently_are_refused(tmp_path):
    path = sweep_recipe(tmp_path)
    for key, values in (
        ("decoding", "sample,likelihood"),
        ("max_samples", "50,100"),
        ("best_by", "decoding,likelihood"),
    ):
        message = refused(path, grid=[f"evaluation.{key}={values}"])
        assert f"different values of evaluation.{key} would be scored by other rows or answers" in message


def test_cells_with_many_more_validations_are_warned_of(tmp_path):
    path = sweep_recipe(tmp_path, max_steps=6000, max_epochs=1)

    def said(*overrides):
        warnings = []
        planned_sweep(path, "data.tasks=[cola]", "data.max_train_samples=null", *overrides, warnings=warnings)
        return warnings

    (warning,) = said("evaluation.every_steps=250")  # CoLA: 2138 iterations by 4, 535 by 16
    assert warning.startswith("cola: its cells have 3 to 9 validations each")
    assert said("evaluation.every_steps=0.05") == []


def test_cells_skip_evaluations_that_are_the_same_for_all_or_for_the_best_only(tmp_path):
    path = sweep_recipe(tmp_path, evaluation={"every_steps": 1, "before": True, "predict_test": True})

    def spared(*overrides, **options):
        return [
            (cell.recipe.evaluation.before, cell.recipe.evaluation.predict_test)
            for cell in planned_sweep(path, "data.tasks=[sst2]", *overrides, **options).cells
        ]

    assert spared(grid=["ppo.batch_size=4,8"]) == [(False, False)] * 2
    assert spared(grid=["ppo.batch_size=4"]) == [(False, True)]
    assert spared("evaluation.predict_test=true", "evaluation.before=true", method="sft") == [(True, True)]
    assert spared(method="eval") == [(True, True)], "the keys differ or have no effect there"


def test_an_encoder_sweep_with_an_intermediate_task_is_one_run(tmp_path):
    path = sweep_recipe(tmp_path, data={"tasks": ["cb", "copa"]}, encoder={"intermediate": "mnli"})
    assert "--together" in refused(path, method="encoder")
    assert len(planned_sweep(path, method="encoder", together=True).cells) == 1
