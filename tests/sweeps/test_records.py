"""The outcome of each cell and the choice of the best."""

import json

import pytest
from support import planned_sweep, sweep_recipe

from extensions.common.errors import UserError
from extensions.recipe import dump_recipe
from extensions.sweeps.grid import Cell
from extensions.sweeps.records import Outcome, SweepRecords, choose, estimator, outcome


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
    """Scores are of the learned tasks; the validation score is of validations if any, never of a test split."""
    options = {"together": True, "grid": ["ppo.batch_size=4"]}
    path = sweep_recipe(tmp_path, data={"tasks": ["sst2", "axb", "cola"]})
    (cell,) = planned_sweep(path, out=tmp_path / "out", **options).cells
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
    (cell.folder / "validation.jsonl").write_text('{"step": 5, "mean": 0.8, "tasks": {"sst2": {}, "cola": {}}}\n')
    assert outcome(cell) == Outcome("finished", None, 0.7, "test and validation", 576, 438.0), "never a validation's"
    (cell.folder / "versions.json").write_text('{"inputs": {"evaluation rows": "ab12"}}')
    assert outcome(cell).rows == "ab12"


def test_cells_are_compared_by_the_answers_that_select_the_best_validation(tmp_path):
    path, grid = sweep_recipe(tmp_path, data={"tasks": ["sst2"]}), ["ppo.batch_size=4,8"]
    for best_by, expected, said in (("decoding", 0.9, "sampled answers"), ("likelihood", 0.7, "answers by likelihood")):
        out = tmp_path / best_by
        cell = planned_sweep(path, f"evaluation.best_by={best_by}", grid=grid, out=out).cells[0]
        after = {"sst2": score(0.9) | {"likelihood": score(0.7)}}
        finish(cell, {"method": "ppo", "splits": {"sst2": "validation"}, "after": after})
        assert (outcome(cell).validation, outcome(cell).table) == (expected, 0.9)
        assert (
            estimator(cell.recipe) == f"the score of the kept weights after training, of {said}, on the validation rows"
        )


def test_cells_with_other_rows_are_not_compared(tmp_path):
    sweep = planned_sweep(sweep_recipe(tmp_path), grid=["seed=0,1"], out=tmp_path / "out")
    for cell, rows in zip(sweep.cells, ("one", "other", "one", "one"), strict=True):
        finish(cell, {"method": "ppo", "splits": {cell.task: "validation"}, "after": {cell.task: score(0.5)}})
        (cell.folder / "versions.json").write_text(json.dumps({"inputs": {"evaluation rows": rows}}))
    records = SweepRecords(sweep)
    assert records.incomparable() == ["sst2"] and [row["best"] for row in records.rows()] == [False, False, True, False]


def test_a_finished_run_of_another_recipe_is_refused(tmp_path):
    path, out = sweep_recipe(tmp_path), tmp_path / "out"
    cells = planned_sweep(path, out=out).cells
    scores = {"method": "ppo", "splits": {"sst2": "validation"}, "after": {"sst2": score(0.9)}}
    finish(cells[0], scores, output_dir="elsewhere")
    assert planned_sweep(path, out=out).cells == cells
    finish(cells[2], scores, seed=9)
    with pytest.raises(UserError) as caught:
        planned_sweep(path, out=out)
    message = str(caught.value)
    assert str(cells[2].folder) in message and "seed was 9, is 0" in message and "--out" in message
    assert str(cells[0].folder) not in message
    (cells[2].folder / "eval.json").write_text("{}")  # unfinished: the run itself decides
    assert planned_sweep(path, out=out).cells == cells


def test_the_table_has_the_score_by_likelihood_beside_the_sampled_one(tmp_path):
    path = sweep_recipe(tmp_path)
    sweep = planned_sweep(path, out=tmp_path / "out")
    assert "by likelihood" not in SweepRecords(sweep)._markdown()
    after = {"sst2": score(0.5) | {"likelihood": score(0.75)}}
    finish(sweep.cells[0], {"method": "ppo", "splits": {"sst2": "validation"}, "after": after})
    assert outcome(sweep.cells[0]).likelihood == 0.75
    records = SweepRecords(sweep)
    first, second = [line for line in records._markdown().splitlines() if line.startswith("| ") and "---" not in line][
        1:3
    ]
    assert "**50.0 (validation)** | **75.0** |" in first and "| - | - | - | - | - |" in second
    assert [column.header for column in records.table().columns][3:5] == ["table", "by likelihood"]
