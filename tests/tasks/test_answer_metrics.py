"""Metrics of own tasks by their kind, and their answers in a run and in the preview."""

import json
import math

import numpy as np
import pytest
from own_answers import SIGNED, TOPICS, own
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    f1_score,
    mean_absolute_error,
    mean_squared_error,
    r2_score,
)

from extensions.evaluation.metrics import Prediction, score
from extensions.recipe import dump_recipe, load_recipe
from extensions.reporting.scores import before_after_table, interval_text, metric_text
from extensions.rollout.reward_check import trial_answers
from extensions.runs.health import CollapseWatch
from extensions.training.records import batch_metrics


def predictions(pairs):
    return [Prediction("own", i, "", answer, gold) for i, (gold, answer) in enumerate(pairs)]


@pytest.mark.parametrize(
    "keys, metrics, more",
    [
        ({"labels": ["a", "b"]}, ["accuracy"], []),
        ({"score_range": [-1, 1]}, ["pearson", "spearman"], ["mae", "rmse", "r2"]),
        ({"labels": ["a", "b"], "multi_label": True}, ["f1_micro", "f1_macro"], ["subset_accuracy"]),
        ({"score_range": [-1, 1], "metrics": ["r2"]}, ["r2"], []),
        ({"score_range": [-1, 1], "extra_metrics": ["mae"]}, ["pearson", "spearman"], ["mae"]),
        ({"score_range": [-1, 1], "extra_metrics": []}, ["pearson", "spearman"], []),
    ],
)
def test_metrics_by_kind(tmp_path, keys, metrics, more):
    task = own(**keys)
    assert (task.metrics, task.extra_metrics) == (metrics, more)
    recipe = {
        "name": "r",
        "model": {"path": "m"},
        "data": {"tasks": [task.model_dump(exclude_defaults=True, mode="json")]},
    }
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    loaded = load_recipe(tmp_path / "r.yaml")
    assert loaded.data.tasks == [task]
    (tmp_path / "again.yaml").write_text(dump_recipe(loaded))
    assert load_recipe(tmp_path / "again.yaml") == loaded


def test_scores_of_regressions():
    """A wrong format is the middle of the range."""
    task = own(score_range=[-1, 3])
    pairs = [("-1", -1.0), ("0.5", 0.0), ("2.5", 3.0), ("1e-1", None), ("3", 2.0)]
    golds, answers = [-1, 0.5, 2.5, 0.1, 3], [-1, 0, 3, 1, 2]
    found = score(task, predictions(pairs))
    expected = {
        "pearson": pearsonr(golds, answers).statistic,
        "spearman": spearmanr(golds, answers).statistic,
        "mae": mean_absolute_error(golds, answers),
        "rmse": math.sqrt(mean_squared_error(golds, answers)),
        "r2": r2_score(golds, answers),
    }
    assert found["metrics"] == pytest.approx(expected)
    assert found["metrics"]["mae"] == pytest.approx((0 + 0.5 + 0.5 + 0.9 + 1) / 5)
    assert found["score"] == pytest.approx((expected["pearson"] + expected["spearman"]) / 2)
    assert "majority" not in found and found["intervals"].keys() == expected.keys()
    assert score(task, predictions(pairs[:1]))["metrics"]["r2"] == 0.0


def test_scores_of_label_sets():
    pairs = [("s, m", "s"), ("none", "none"), ("s", None), ("p", "p, m"), ("s, p", "s, p"), ("none", None), ("s", "s")]
    golds = [[1, 0, 1], [0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 0], [1, 0, 0]]
    answers = [[1, 0, 0], [0, 0, 0], [0, 0, 0], [0, 1, 1], [1, 1, 0], [0, 0, 0], [1, 0, 0]]
    found = score(TOPICS, predictions(pairs))
    expected = {
        "f1_micro": f1_score(golds, answers, average="micro", zero_division=0),
        "f1_macro": f1_score(golds, answers, average="macro", zero_division=0),
        "subset_accuracy": 3 / 7,  # a wrong format is never right, also where there is no label
    }
    assert found["metrics"] == pytest.approx(expected) and found["metrics"]["f1_micro"] == pytest.approx(
        2 * 5 / (5 + 1 + 2 + 5)
    )
    readable = [i for i, (_, answer) in enumerate(pairs) if answer is not None]
    assert accuracy_score(np.array(golds)[readable], np.array(answers)[readable]) * len(readable) / 7 == pytest.approx(
        3 / 7
    )
    assert found["score"] == pytest.approx((expected["f1_micro"] + expected["f1_macro"]) / 2)
    assert found["majority"] == pytest.approx(2 / 7)
    assert found["gold_shares"] == pytest.approx({"Sports": 4 / 7, "Politics": 2 / 7, "Money": 1 / 7, "none": 2 / 7})
    assert found["predicted_shares"] == pytest.approx(
        {"Sports": 3 / 7, "Politics": 2 / 7, "Money": 1 / 7, "none": 1 / 7, "wrong format": 2 / 7}
    )


def test_balanced_accuracy():
    """A wrong format is wrong for its label; a label without gold rows does not count."""
    task = own(labels=["a", "b", "c"], metrics=["balanced_accuracy"])
    pairs = [("a", "a")] * 8 + [("a", "b"), ("b", "b"), ("b", None), ("b", "a")]
    found = score(task, predictions(pairs))["metrics"]
    number = {"a": 0, "b": 1, "c": 2, None: 3}
    with pytest.warns(UserWarning, match="not in y_true"):
        expected = balanced_accuracy_score([number[g] for g, _ in pairs], [number[a] for _, a in pairs])
    assert found["balanced_accuracy"] == pytest.approx(expected) == pytest.approx((8 / 9 + 1 / 3) / 2)
    assert found["accuracy"] == pytest.approx(9 / 12)


def test_errors_are_plain_numbers_in_tables():
    assert metric_text("mae", 0.41234) == "0.412" and metric_text("pearson", 0.41234) == "41.2"
    assert metric_text("r2", -3.5) == "-3.500" and metric_text("rmse", None) == "-"
    assert interval_text("rmse", 1.5, [1.25, 2]) == "1.500 [1.250, 2.000]"
    task = own(score_range=[-1, 1])
    result = {"own": score(task, predictions([("-1", -0.5), ("1", 0.5), ("0", None)]))}
    table = before_after_table([task], result, result, "test")
    columns = {column.header: list(column.cells) for column in table.columns}
    cells = dict(zip(columns["metric"], columns["before"], strict=True))
    assert "mae, r2, rmse as they are" in str(table.title)
    assert (cells["mae"], cells["r2"], cells["pearson"]) == ("0.333", "0.750", "100.0")


def test_the_metrics_of_a_batch():
    def record(gold, answer):
        return {"task": "own", "gold": gold, "answer": answer, "reward": 0.5}

    found = batch_metrics(
        [record("s, m", "s, m"), record("s", "p"), record("s", None), record("none", "none")], {"own": TOPICS}
    )
    assert found["accuracy"] == 0.5 and found["format_error_rate"] == 0.25
    assert found["predicted_shares"] == {
        "Sports": 0.25,
        "Politics": 0.25,
        "Money": 0.25,
        "none": 0.25,
        "wrong format": 0.25,
    }


def test_a_collapse_of_label_sets_is_reported(monkeypatch):
    monkeypatch.setattr(CollapseWatch, "WINDOW", 4)
    watch = CollapseWatch([TOPICS])
    golds = ["s", "p", "m, s", "none"]
    records = [{"task": "own", "answer": "s, m", "gold": TOPICS.join_labels(gold.split(", "))} for gold in golds]
    (text,) = watch.step({}, records)
    assert "'Sports, Money'" in text


def test_answers_of_the_preview():
    assert dict(trial_answers(TOPICS, "s"))["gold"] == "Sports"
    assert [answer for kind, answer in trial_answers(TOPICS, "s") if kind == "wrong"] == [
        "Politics",
        "Money",
        "none",
        "Sports, Politics, Money",
    ]
    assert [answer for kind, answer in trial_answers(SIGNED, "-1") if kind == "wrong"] == ["0", "1"]
