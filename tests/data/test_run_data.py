"""The examples of a run: splits, tasks without training rows, demonstrations, the table."""

import json
from collections import Counter

import pytest
from hub_files import (
    LAYOUTS,
    snapshot,
    write_hub,
)
from official import (
    ALL,
    EXPECTED_SPLITS,
    GLUE,
    SUPERGLUE,
    expected,
    put,
    write_benchmarks,
)

from extensions.common.errors import UserError
from extensions.data.splits import RunData
from extensions.recipe import Recipe


@pytest.fixture
def small(tmp_path):
    """Official files of every task, in one folder per suite."""
    return write_benchmarks(tmp_path)


def recipe(root, tasks, **more):
    data = {"tasks": tasks, "root": str(root), **more.pop("data", {})}
    return Recipe.model_validate({"name": "t", "model": {"path": "x"}, "data": data, "evaluation": more})


def load(root, tasks, **more):
    said = []
    return RunData.load(recipe(root, tasks, **more), said.append), said


def by_task(examples):
    return dict(Counter(example.task.name for example in examples))


def test_a_suite_name_selects_all_its_tasks(small):
    for suite, names in (("glue", GLUE), ("superglue", SUPERGLUE)):
        assert {task.name for task in recipe(small, [suite]).data.tasks} == set(names)
    assert [task.name for task in recipe(small, ["wic", "glue"]).data.tasks[:2]] == ["wic", "mnli"]
    assert len(recipe(small, "glue,superglue").data.tasks) == 21


def test_a_run_of_all_tasks(small):
    data, said = load(small, ["glue", "superglue"], predict_test=True, every_steps=5)
    rows = {**dict.fromkeys(ALL, 4), "wsc": 2, "multirc": 3}
    assert by_task(data.train) == {name: n for name, n in rows.items() if "train" in EXPECTED_SPLITS[name]}
    assert by_task(data.table) == {**rows, "axb": 4, "axg": 4}
    assert data.splits == {name: "test" if name in ("axb", "axg") else "validation" for name in rows}
    assert by_task(data.validation) == by_task(data.train)
    tests = {name: len(expected(name, "test")) for name in rows}
    assert by_task(data.test) == tests
    labelled = {example.task.name for example in data.test if example.label is not None}
    assert labelled == {"axb", "axg"}, "the benchmarks do not publish the other labels"
    sizes = [one for one in said if "official" in one]
    assert len(sizes) == sum(map(len, EXPECTED_SPLITS.values())), "one warning per file, for its size"
    assert sorted(set(said) - set(sizes)) == [
        "MultiRC: 3 of 3 training rows are also in validation (equal texts)",
        "ReCoRD: 4 of 4 training rows are also in validation (equal texts)",
        "WSC: 2 of 2 training rows are also in validation (equal texts)",
    ], "the objects of these tests serve both splits"
    assert data.split == "test and validation"


def test_tasks_that_are_only_evaluated_have_no_training_rows(small):
    data, _ = load(small, ["mnli", "mnli_mm", "ax"], every_steps=1)
    assert by_task(data.train) == by_task(data.validation) == {"mnli": 4}
    assert by_task(data.table) == {"mnli": 4, "mnli_mm": 4, "ax": 4}
    assert data.test == []


@pytest.mark.parametrize("names", [["ax"], ["mnli_mm", "ax"], ["axb", "axg"]])
def test_a_run_needs_a_task_to_train_on(small, names):
    with pytest.raises(UserError) as caught:
        load(small, names)
    assert ", ".join(names) in str(caught.value) and "training split" in str(caught.value)


def test_a_missing_diagnostic_set_is_left_out_with_a_warning(small):
    (small / "glue/diagnostic/diagnostic-full.tsv").unlink()
    data, said = load(small, ["mnli", "ax"], predict_test=True)
    assert by_task(data.table) == {"mnli": 4} and data.splits == {"mnli": "validation"}
    assert by_task(data.test) == {"mnli": 3, "ax": 3}, "the evaluation server has its labels"
    assert [one for one in said if "AX is not in the table" in one and "diagnostic/diagnostic-full.tsv" in one]
    (small / "superglue/AX-g/AX-g.jsonl").unlink()
    data, said = load(small, ["superglue_rte", "axg"])
    assert data.splits == {"superglue_rte": "validation"}
    assert [one for one in said if "AX-g is not in the table" in one]


def test_a_run_from_the_hub_leaves_the_diagnostic_set_out(hub_cache):
    for name in ("mnli", "mnli_mm", "ax"):
        write_hub(snapshot(hub_cache, "nyu-mll/glue"), name, LAYOUTS[0])
    data, said = load("hub", ["mnli", "mnli_mm", "ax"], predict_test=True)
    assert data.splits == {"mnli": "validation", "mnli_mm": "validation"}
    assert by_task(data.test) == {"mnli": 3, "mnli_mm": 3, "ax": 3}
    assert [one for one in said if "AX is not in the table" in one]


@pytest.mark.parametrize("path", ["MNLI/train.tsv", "MNLI/dev_matched.tsv", "MNLI/test_matched.tsv"])
def test_a_trained_task_needs_its_files(small, path):
    (small / "glue" / path).unlink()
    with pytest.raises(UserError, match=f"{path}: no such file"):
        load(small, ["mnli"], predict_test=True)
    if "test" in path:
        assert by_task(load(small, ["mnli"])[0].table) == {"mnli": 4}


def test_the_split_of_the_table(small):
    # auto: test where it has labels, else validation
    assert load(small, ["rte", "superglue_rte", "axb"])[0].splits == {
        "rte": "validation",
        "superglue_rte": "validation",
        "axb": "test",
    }
    assert load(small, ["acceptability", "sst2"])[0].splits == {"acceptability": "test", "sst2": "validation"}
    # validation: also of tasks that have a labelled test split; AX-b has no other
    assert load(small, ["acceptability", "rte", "axb"], split="validation")[0].splits == {
        "acceptability": "validation",
        "rte": "validation",
        "axb": "test",
    }
    # test: evaluation-only MNLI-mm uses the labelled split; a trained task must have labels in the chosen split
    assert load(small, ["acceptability", "mnli_mm"], split="test")[0].splits == {
        "acceptability": "test",
        "mnli_mm": "validation",
    }
    with pytest.raises(UserError, match=r"task rte has no labelled test split.*source\.files\.test"):
        load(small, ["rte"], split="test")


def test_table_and_validations_are_subsampled_and_the_test_split_is_not(small):
    data, _ = load(
        small,
        ["sst2", "multirc", "axb", "superglue_rte"],
        max_samples=2,
        every_steps=1,
        validation_samples=1,
        predict_test=True,
        data={"max_train_samples": 3},
    )
    assert by_task(data.train) == {"sst2": 3, "multirc": 3, "superglue_rte": 3}
    assert [e.index for e in data.train if e.task.name == "sst2"] == [0, 1, 2]
    assert [e.index for e in data.table if e.task.name == "axb"] == [0, 2], "spread over the file"
    assert [e.index for e in data.table if e.task.name == "multirc"] == [0], "whole questions: the first has one row"
    assert by_task(data.validation) == {"sst2": 1, "multirc": 1, "superglue_rte": 1}
    assert by_task(data.test) == {"sst2": 3, "multirc": 3, "axb": 4, "superglue_rte": 3}


def test_validations_and_test_predictions_are_optional(small):
    data, said = load(small, ["cola"])
    assert data.validation == [] and data.test == []
    assert len(said) == 2, "only the files of train and validation are read"
    assert data.describe() == "CoLA: 4 training rows, 4 validation rows"


def test_the_seed_draws_records_candidates(small):
    objects = json.loads((small / "superglue/ReCoRD/train.jsonl").read_text())
    text = "Ann met Bob Ray in Oslo and Rome."
    objects["passage"] = {
        "text": text,
        "entities": [{"start": s, "end": e} for s, e in ((0, 2), (8, 14), (19, 22), (28, 31))],
    }
    put(small, "superglue/ReCoRD/train.jsonl", json.dumps(objects) + "\n")
    drawn = []
    for seed in range(12):
        one = recipe(small, ["record"]).model_copy(update={"seed": seed})
        data = RunData.load(one, lambda message: None)
        assert data.train == RunData.load(one, lambda message: None).train
        drawn.append(tuple(example.kept["entity"] for example in data.train))
    assert len(set(drawn)) > 1
