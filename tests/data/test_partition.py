"""Splits that are held out of a training file, and stratified samples of it. Expected rows are stated here."""

import json
from collections import Counter

import pytest
from own_task import own, put, refused
from pydantic import ValidationError

from extensions.data import (
    Example,
    has_split,
    is_labelled,
    is_present,
    load_examples,
    load_training,
)
from extensions.data.partition import hold_out, stratified_sample
from extensions.data.splits import RunData
from extensions.recipe import load_recipe
from extensions.tasks import TASKS, fold

SPLITS = ("train", "validation", "test")
SHARES = {"validation": 0.2, "test": 0.1, "seed": 3}


def tickets(counts):
    """Rows sorted by label; every fifth text repeats the next one with different case and spaces."""
    rows = []
    for label, count in counts.items():
        for k in range(count):
            text = f"text {k} of {label}" if k % 5 else f"TEXT  {k + 1} of {label.upper()}"
            rows.append({"subject": "s", "ticket body": text, "team": label})
    return rows


def parts_of(task, folder, seed=0):
    return {split: load_examples(task, split, str(folder), seed) for split in SPLITS}


def body(example):
    return fold(example.fields["ticket body"])


def test_a_held_out_split(tmp_path):
    counts = {"billing": 300, "sales": 150, "legal": 45, "it": 5}
    rows = tickets(counts)
    put(tmp_path, rows)
    task = own(labels=list(counts), source={"split": SHARES})
    parts = parts_of(task, tmp_path)
    assert sorted(e.kept["row"] for part in parts.values() for e in part) == list(range(500)), "each row once"
    for part in parts.values():
        assert [e.index for e in part] == list(range(len(part)))
        assert [e.kept["row"] for e in part] == sorted(e.kept["row"] for e in part), "in the order of the file"
        assert all(rows[e.kept["row"]]["ticket body"] == e.fields["ticket body"] for e in part)
        assert {e.label for e in part} == set(counts), "every class is in every split"
    bodies = {split: {body(e) for e in part} for split, part in parts.items()}
    assert not bodies["train"] & bodies["validation"] and not bodies["test"] & (bodies["train"] | bodies["validation"])
    for split, share in (("validation", 0.2), ("test", 0.1)):
        found = Counter(e.label for e in parts[split])
        for label in ("billing", "sales", "legal"):
            assert found[label] == pytest.approx(share * counts[label], abs=3 + 0.06 * counts[label])
    assert parts_of(task, tmp_path, seed=9) == parts, "independent of the run's seed"
    other = parts_of(own(labels=list(counts), source={"split": SHARES | {"seed": 4}}), tmp_path)
    assert {body(e) for e in other["test"]} != bodies["test"]
    for split in SPLITS:
        assert has_split(task, split) and is_labelled(task, split) and is_present(task, split, str(tmp_path))


def test_classes_of_three_texts_are_in_every_split(tmp_path):
    labels = [f"team {k}" for k in range(40)]
    put(
        tmp_path, [{"subject": "s", "ticket body": f"{label} {k}", "team": label} for label in labels for k in range(3)]
    )
    for seed in range(5):
        task = own(labels=labels, source={"split": {"validation": 0.1, "test": 0.1, "seed": seed}})
        for part in parts_of(task, tmp_path).values():
            assert Counter(e.label for e in part) == dict.fromkeys(labels, 1)


def test_a_class_of_two_texts_stays_in_training(tmp_path):
    put(tmp_path, [*tickets({"billing": 30}), *({"subject": "s", "ticket body": b, "team": "sales"} for b in "ab")])
    parts = parts_of(own(source={"split": SHARES}), tmp_path)
    assert [Counter(e.label for e in part)["sales"] for part in parts.values()] == [2, 0, 0]


def test_a_text_with_two_labels_is_in_one_split(tmp_path):
    rows = [{"subject": "s", "ticket body": f"t{k}", "team": team} for team in ("sales", "billing") for k in range(9)]
    put(tmp_path, rows)
    for seed in range(10):
        parts = parts_of(own(source={"split": SHARES | {"seed": seed}}), tmp_path)
        sides = [{body(e) for e in part} for part in parts.values()]
        assert sum(map(len, sides)) == 9 and all(sides)


def test_a_regression_is_split_by_quantiles(tmp_path):
    rows = [{"subject": "s", "ticket body": f"t{k}", "team": f"{k**3 / 8e6:.6f}"} for k in range(200)]
    put(tmp_path, rows)
    task = own(labels={}, score_range=[0, 1], metrics=["pearson"], source={"split": SHARES})
    for split, count in (("validation", 40), ("test", 20)):
        places = [example.kept["row"] for example in load_examples(task, split, str(tmp_path))]
        assert len(places) == count
        assert Counter(place // 20 for place in places) == dict.fromkeys(range(10), count / 10)


@pytest.mark.parametrize("name", ["labels", "rare sets"])
def test_multi_label_rows_keep_every_label_in_every_split(name):
    sets = ["bug", "bug, crash", "crash, ui", "none", "bug, crash, ui"]
    counts = [40, 30, 3, 20, 1 if name == "rare sets" else 9]
    task = own(labels=["bug", "crash", "ui"]).model_copy(update={"multi_label": True})
    rows = [label for label, count in zip(sets, counts, strict=True) for _ in range(count)]
    examples = [Example(task, i, {"subject": "s", "ticket body": f"t{i}"}, label) for i, label in enumerate(rows)]
    parts = hold_out(examples, {"validation": 0.1, "test": 0.1}, 0)
    assert sorted(i for part in parts.values() for i in part) == list(range(len(rows)))
    for part in parts.values():
        assert {one for i in part for one in rows[i].split(", ")} == {"bug", "crash", "ui", "none"}


@pytest.mark.parametrize(
    "source, part",
    [
        ({"split": {"validation": 0.6, "test": 0.4}}, "leave no rows for training"),
        ({"split": {"validation": 1.0}}, "less than 1"),
        ({"split": {"test": 0.1}, "files": {"validation": "v.csv"}}, "no training file"),
        ({"split": {"test": 0.1}, "files": {"train": "a.csv", "test": "b.csv"}}, "files.test is given too"),
        ({"separator": ", "}, "separator"),
    ],
)
def test_invalid_shares_of_a_split(source, part):
    with pytest.raises(ValidationError, match=part):
        own(source=source)


def test_a_split_that_would_be_empty(tmp_path):
    put(tmp_path, tickets({"billing": 1, "sales": 1}))
    assert "source.split leaves no rows for validation" in refused(
        own(source={"split": SHARES}), tmp_path, "validation"
    )


# ---------------------------------------------------------------------------------------------------------- samples


def test_a_file_sorted_by_label_is_sampled_from_all_of_it(tmp_path):
    """The first rows of a file sorted by label are of one class."""
    put(tmp_path, tickets({"billing": 500, "sales": 100}))
    examples = load_training(own(), str(tmp_path), 60, seed=1)
    assert Counter(e.label for e in examples) == {"billing": 50, "sales": 10}
    assert [e.index for e in examples] == sorted(e.index for e in examples), "in the order of the file"
    assert (
        load_training(own(), str(tmp_path), 60, seed=1) == examples != load_training(own(), str(tmp_path), 60, seed=2)
    )
    assert load_training(own(), str(tmp_path), None) == load_training(own(), str(tmp_path), 600)


@pytest.mark.parametrize("limit", [4, 5, 10, 100])
def test_samples_keep_every_class(limit):
    labels = ["a"] * 1000 + ["b"] * 2 + ["c"] * 30 + ["d"]
    task = own(labels=["a", "b", "c", "d"])
    examples = [Example(task, i, {}, label) for i, label in enumerate(labels)]
    for seed in range(5):
        found = stratified_sample(examples, limit, seed)
        assert len(found) == limit and {e.label for e in found} == set("abcd")


@pytest.mark.parametrize("limit", [1, 2, 7, 50])
def test_pairs_and_questions_stay_whole(limit):
    task = TASKS["multirc"]
    questions = [Example(task, i, {}, str(i % 2), None, {"paragraph": i // 9, "question": i // 3}) for i in range(90)]
    pairs = [Example(TASKS["acceptability"], i, {}, str(i % 2), f"pair {i // 2}") for i in range(60)]
    for examples, key, size in (
        (questions, lambda e: e.kept["question"], 3),
        (pairs, lambda e: e.pair, 2),
    ):
        found = stratified_sample(examples, limit, 0)
        assert set(Counter(map(key, found)).values()) == {size}
        assert len(found) == max(size, limit // size * size)


def test_the_sample_of_a_run(tmp_path):
    put(tmp_path, tickets({"billing": 90, "sales": 30}))
    raw = own(source={"split": {"validation": 0.2}}).model_dump(exclude_defaults=True, mode="json")
    (tmp_path / "r.yaml").write_text(
        json.dumps(
            {
                "name": "a",
                "method": "sft",
                "model": {"path": "b"},
                "data": {"tasks": [raw], "root": str(tmp_path), "max_train_samples": 20},
                "evaluation": {"every_steps": 1},
            }
        )
    )
    recipe = load_recipe(tmp_path / "r.yaml")
    data = RunData.load(recipe, lambda message: None)
    assert data.train == load_training(recipe.data.tasks[0], str(tmp_path), 20, recipe.seed)
    assert len(data.train) == 20 and data.splits == {"tickets": "validation"} and data.table
    assert not {body(e) for e in data.train} & {body(e) for e in data.table}
    assert load_recipe(tmp_path / "r.yaml", []).data.tasks[0].source.split.validation == 0.2
