"""The label sets that a run of a multi-label task compares."""

from types import SimpleNamespace

import pytest

from extensions.data import Example
from extensions.data.splits import RunData
from extensions.evaluation.likelihood import candidates, compared_beside_sampled
from extensions.recipe import Evaluation, Recipe
from extensions.runs import build

LABELS = [f"l{k}" for k in range(7)]  # 128 label sets, more than are compared


def recipe_of(method, folder):
    task = {"name": "topics", "description": "-", "question": "{text}", "labels": LABELS, "multi_label": True}
    keys = {"name": "trial", "method": method, "data": {"tasks": [task]}}
    return Recipe.model_validate(keys | {"model": {"path": "some/model", "adapter": str(folder)}})


@pytest.mark.parametrize("recorded", [True, False])
def test_an_evaluation_compares_the_label_sets_of_the_training(tmp_path, monkeypatch, recorded):
    manifest = SimpleNamespace(label_sets={"topics": ["l0, l3", "l1, gone"], "other": ["a"]})
    monkeypatch.setattr(build.Manifest, "load", lambda folder: manifest)
    if recorded:
        (tmp_path / build.FILE_NAME).touch()
    recipe = recipe_of("eval", tmp_path)
    (task,) = recipe.data.tasks
    found = build.label_sets(recipe, RunData()).get("topics", [])
    assert found == (["l0, l3"] if recorded else []), "a set with an unknown label is not compared"
    assert candidates(task, found).keys == ["none", *LABELS, *found]


def test_a_training_compares_the_label_sets_of_its_rows(tmp_path):
    recipe = recipe_of("sft", tmp_path)
    rows = [Example(recipe.data.tasks[0], i, {}, label) for i, label in enumerate(["l1, l2", "none", "l1, l2"])]
    assert build.label_sets(recipe, RunData(train=rows)) == {"topics": ["l1, l2", "none"]}


@pytest.mark.parametrize(
    ("labels", "settings", "expected"),
    [(4, {}, True), (5, {}, False), (5, {"best_by": "likelihood"}, True), (4, {"probabilities": False}, False)],
)
def test_many_label_sets_are_not_compared_beside_sampled_answers(tmp_path, labels, settings, expected):
    (task,) = recipe_of("sft", tmp_path).data.tasks
    task = task.model_copy(update={"labels": dict(list(task.labels.items())[:labels])})
    compared = candidates(task)
    assert compared.count == 2**labels
    assert compared_beside_sampled(Evaluation(**settings), compared) is expected
