"""The models that an encoder recipe fine-tunes, and the rows that each predicts."""

import pytest
from support import toy

from extensions.common.errors import UserError
from extensions.data.splits import RunData
from extensions.encoder.jobs import load_jobs
from extensions.recipe import load_recipe


def jobs(write, benchmarks, tasks, **settings):
    warnings = []
    recipe = load_recipe(write(tasks, root=benchmarks, encoder=settings, evaluation={"predict_test": True}))
    found = load_jobs(recipe, warnings.append)
    splits = RunData.joined(recipe, [job.data for job in found]).splits
    return {job.task.name: job for job in found}, splits, [w for w in warnings if "left out: it has" in w]


def test_tasks_without_training_rows_use_the_model_of_their_train_task(write, benchmarks):
    found, splits, warnings = jobs(write, benchmarks, ["rte", "ax", "mnli", "mnli_mm", "axg"])
    assert list(found) == ["rte", "mnli"]
    assert {e.task.name for e in found["mnli"].data.table} == {e.task.name for e in found["mnli"].data.test}
    assert {e.task.name for e in found["mnli"].data.table} == {"mnli", "ax", "mnli_mm"}
    assert {e.task.name for e in [*found["mnli"].data.train, *found["mnli"].data.validation]} == {"mnli"}
    assert splits == dict.fromkeys(["rte", "mnli", "ax", "mnli_mm"], "validation")
    assert len(warnings) == 1 and "AX-g" in warnings[0] and "superglue_rte" in warnings[0]


def test_the_intermediate_task_comes_first_and_is_not_in_the_table(write, benchmarks):
    found, splits, _ = jobs(write, benchmarks, ["cb", "wic", "superglue_rte"], intermediate="mnli")
    assert list(found) == ["mnli", "cb", "wic", "superglue_rte"]
    assert {name: job.start for name, job in found.items()} == {
        "mnli": None,
        "cb": "mnli",
        "wic": None,
        "superglue_rte": "mnli",
    }
    first = found["mnli"].data
    assert first.train and first.validation and not first.table and "mnli" not in splits
    both, splits, _ = jobs(write, benchmarks, ["cb", "mnli"], intermediate="mnli")
    assert list(both) == ["mnli", "cb"] and both["mnli"].data.table and both["mnli"].start is None and "mnli" in splits


@pytest.mark.parametrize(
    "tasks, settings, part",
    [
        (["axb", "axg"], {}, r"data\.tasks: axb, axg can only be evaluated"),
        (
            ["rte"],
            {"intermediate": "mnli"},
            r"encoder\.intermediate: no task would start from mnli.*cb, superglue_rte, boolq",
        ),
        (["cb"], {"intermediate": "ax"}, r"encoder\.intermediate: ax has no training rows"),
    ],
    ids=["evaluated only", "no task starts from it", "cannot be trained"],
)
def test_invalid_jobs(write, benchmarks, tasks, settings, part):
    with pytest.raises(UserError, match=part):
        jobs(write, benchmarks, tasks, **settings)


def test_validation_rows_need_labels(write):
    task = toy("mood")
    task["source"]["unlabelled"] = ["validation"]
    with pytest.raises(UserError, match=r"mood has no labelled validation split.*source\.files\.validation"):
        load_jobs(load_recipe(write([task])), print)
