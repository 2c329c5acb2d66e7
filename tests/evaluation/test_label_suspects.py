"""Label suspects: which rows are suspects, their order, and the CSV file."""

import csv

import pandas as pd
import pytest

from extensions.data import Example
from extensions.evaluation.label_suspects import FILE, Suspect, find_suspects, write_suspects
from extensions.evaluation.metrics import Prediction
from extensions.tasks import Task


def task(**keys):
    return Task.model_validate({"name": "mine", "description": "-", "question": "{text}"} | keys)


CLASSES = task(labels=["a", "b", "c"])
SETS = task(labels=["a", "b", "c"], multi_label=True)
SCORES = task(score_range=[0, 4])


def suspects(of, cases):
    """The suspects as row number -> (answer, probability); cases: label, answer, probabilities."""
    rows = [Example(of, i, {"text": f"row {i}"}, label) for i, (label, _, _) in enumerate(cases)]
    predictions = [
        Prediction(of.name, i, "", answer, label, probabilities=probabilities)
        for i, (label, answer, probabilities) in enumerate(cases)
    ]
    found = find_suspects(rows, predictions)
    return {suspect.row.index: (suspect.answer, pytest.approx(suspect.probability)) for suspect in found}


def test_another_label_with_a_probability_of_at_least_90_percent():
    cases = [
        ("a", "a", {"a": 0.99, "b": 0.01, "c": 0.0}),
        ("a", "b", {"a": 0.10, "b": 0.90, "c": 0.0}),
        ("a", "b", {"a": 0.11, "b": 0.89, "c": 0.0}),
        ("c", "a", {"a": 0.97, "b": 0.02, "c": 0.01}),
    ]
    found = suspects(CLASSES, cases)
    assert found == {3: ("a", 0.97), 1: ("b", 0.90)} and list(found) == [3, 1], "most confident first"


def test_a_label_of_a_set_that_is_contradicted():
    cases = [
        ("a, b", "a, b", {"a": 0.95, "b": 0.95, "c": 0.05}),
        ("a, b", "a", {"a": 0.95, "b": 0.08, "c": 0.05}),
        ("a", "a, c", {"a": 0.95, "b": 0.08, "c": 0.93}),
        ("none", "b", {"a": 0.1, "b": 0.6, "c": 0.1}),
        ("none", "b", {"a": 0.1, "b": 0.99, "c": 0.1}),
    ]
    assert suspects(SETS, cases) == {4: ("b", 0.99), 2: ("a, c", 0.93), 1: ("a", 0.92)}


def test_a_score_farther_than_a_quarter_of_the_range():
    cases = [
        ("0", 1.0, {"0": 0.3, "1": 0.4, "2": 0.3}),
        ("0", 1.1, {"0": 0.2, "1": 0.3, "2": 0.5}),
        ("4", 0.0, {"0": 0.8, "1": 0.1, "3": 0.1}),
    ]
    assert suspects(SCORES, cases) == {2: ("0.000", 0.9), 1: ("1.100", 0.5)}


NASTY = ['=HYPERLINK("x")', "comma, and\nnew line", 'a "quote"', "lone\rreturn", "ünïcödé 👋", "-1+1", ""]


def test_the_file_has_every_text_unchanged(tmp_path):
    other = task(name="other", question="{text} {label}", labels=["x", "y"])
    rows = [Example(CLASSES, i, {"text": text}, "a") for i, text in enumerate(NASTY)]
    rows.append(Example(other, 7, {"text": "t", "label": "l"}, "x"))
    write_suspects([Suspect(row, "b", 0.95) for row in rows], rows, tmp_path)
    table = pd.read_csv(tmp_path / FILE, dtype=str, keep_default_na=False)
    assert list(table) == ["task", "index", "label", "answer", "probability", "text", "input label"]
    with (tmp_path / FILE).open(encoding="utf-8", newline="") as file:
        assert [line["text"] for line in csv.DictReader(file)] == [*NASTY, "t"]
    assert table.iloc[-1].tolist() == ["other", "7", "x", "b", "0.9500", "t", "l"]
    assert set(table["label"][:-1]) == {"a"} and table["index"].tolist() == [str(i) for i in range(8)]


def test_without_suspects_the_file_has_its_header(tmp_path):
    write_suspects([], [Example(CLASSES, 0, {"text": "t"}, "a")], tmp_path)
    assert (tmp_path / FILE).read_text() == "task,index,label,answer,probability,text\n"
