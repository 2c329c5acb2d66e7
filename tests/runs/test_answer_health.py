"""Warnings about answers: collapse, labels that no answer names, formats."""

import json

import pytest
from health_series import COLA, SST2, STSB, answers, batches, iterations, record, warnings_of

from extensions.evaluation.metrics import Prediction, score
from extensions.runs.answer_health import CollapseWatch, FormatWatch, UnpredictedWatch, unpredicted_in
from extensions.runs.health import HealthMonitor
from extensions.tasks import Task

# ---------------------------------------------------------------------------------------------------------- collapse


def test_collapse_is_reported_once_per_window():
    found = warnings_of(CollapseWatch([COLA]), batches([("1", "1"), ("1", "0")] * 168))
    assert [k for k, _ in found] == [10, 20]
    assert found[0][1] == (
        "cola: 100% of the last 160 answers are 'Yes'; the policy may have collapsed to one class. Try a larger "
        "ppo.batch_size, data.balanced: true, a lower optimizer.lr, a higher ppo.kl.init, or a small ppo.entropy_coef "
        "such as 0.01"
    )


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ([("1", "1"), ("0", "0")] * 80, []),
        ([("1", "1")] * 160, []),  # the data are as one-sided as the answers
        ([("1", "0")] * 136 + [("1", "1")] * 24, [10]),
        ([("1", "0")] * 137 + [("1", "1")] * 23, []),  # golds: 85.6%
        ([("1", "0"), ("1", "1")] * 76 + [("0", "1")] * 8, [10]),
        ([("1", "0"), ("1", "1")] * 75 + [("0", "1")] * 10, []),  # answers: 151 of 160
        ([("1", "0"), ("1", "1")] * 79 + [(None, "1")] * 2, []),  # a wrong format is no answer
    ],
    ids=["varied", "one-sided data", "golds at 85%", "golds above", "answers at 95%", "answers below", "wrong formats"],
)
def test_thresholds_of_a_collapse(pairs, expected):
    assert iterations(CollapseWatch([COLA]), batches(pairs)) == expected


def test_collapse_is_checked_per_task_and_not_for_regression():
    golds = ["1", "0"] * 80
    batch = [record(gold, gold, "sst2") for gold in golds] + [record(0.0, "2.5", "stsb") for _ in golds]
    watch = CollapseWatch([SST2, COLA, STSB])
    assert watch.step({}, batch) == []
    (text,) = watch.step({}, batch + [record("0", gold) for gold in golds])
    assert text.startswith("cola: 100% of the last 160 answers are 'No'")


# ------------------------------------------------------------------------------------------------------------ format


def test_lost_format():
    found = warnings_of(FormatWatch(), answers((160, 80), (304, 304)))
    # 80 right and 80 wrong, then wrong ones alone: the right ones leave the window, 16 per iteration.
    assert [k for k, _ in found] == [14, 24]
    assert found[0][1] == (
        "step 14: 90% of the last 160 answers have a wrong format, after 50% earlier: the policy has lost the format. "
        "Look at rollouts.jsonl, then train again with a lower optimizer.lr or a higher ppo.kl.init. "
        "evaluation.every_steps keeps the adapter of the best validation, from which model.adapter can start"
    )


@pytest.mark.parametrize(
    ("runs", "expected"),
    [
        ([(16, 16), (144, 0), (160, 144)], [20]),
        ([(16, 16), (144, 0), (160, 143), (160, 127)], []),  # never 90%
        ([(160, 81), (480, 480)], []),  # never had it: 79 of 160 right
        ([(144, 0), (16, 16)], []),  # what came earlier counts, not how fast
    ],
    ids=["90%", "just below", "never at 50%", "well"],
)
def test_thresholds_of_a_lost_format(runs, expected):
    assert [k for k, _ in later(warnings_of(FormatWatch(), answers(*runs)))] == expected


def later(found):
    """Without the hint after the first iterations of wrong formats alone."""
    return [(k, text) for k, text in found if "Teach the format first" not in text]


def test_format_that_is_never_learned():
    found = later(warnings_of(FormatWatch(), answers(*[(160, 152)] * 8)))
    assert [k for k, _ in found] == [40], "once"
    assert found[0][1] == (
        "step 40: at least 95% of any 160 answers of the first 640 have a wrong format, so there is hardly a reward to "
        "learn from. Look at rollouts.jsonl; try several responses per prompt (ppo.samples_per_prompt: 8, "
        "ppo.advantage_estimator: rloo), a larger rollout.response_budget, ppo.whiten_min_std: 0.3, demonstrations "
        "(prompt.shots), or another model.path"
    )


@pytest.mark.parametrize("batch", [1, 7, 16, 160, 512])
@pytest.mark.parametrize("wrong", [151, 152])
def test_format_in_any_batch_size(batch, wrong):
    expected = [-(-640 // batch)] if wrong == 152 else []
    series = answers((160, 160), (160, wrong), (320, 320), (500, 500), batch=batch)
    assert [k for k, _ in later(warnings_of(FormatWatch(), series))] == expected


@pytest.mark.parametrize("batch", [1, 4, 16, 160])
def test_wrong_formats_alone_name_sft_after_five_iterations(batch):
    found = warnings_of(FormatWatch(), answers((batch * 60, batch * 60), batch=batch))
    ((step, text),) = [(k, text) for k, text in found if "Teach the format first" in text]
    assert step == 5
    assert text.startswith("step 5: every answer of the last 5 iterations has a wrong format")
    first, sft, second = text.partition("bash launch/sft.sh RECIPE")
    assert sft and "prompt.shots" not in first and "model.adapter=runs/NAME-sft/adapter" in second


@pytest.mark.parametrize(
    ("runs", "expected"),
    [
        ([(16, 15), (64, 64)], []),
        ([(16, 15), (80, 80)], [6]),
        ([(64, 64), (16, 15), (64, 64)], []),
        ([(160, 80), (80, 80)], []),  # the format was there: it is lost, which is another warning
    ],
    ids=["four", "five", "four and four", "had it"],
)
def test_thresholds_of_wrong_formats_alone(runs, expected):
    found = warnings_of(FormatWatch(), answers(*runs))
    assert [k for k, text in found if "Teach the format first" in text] == expected


# ------------------------------------------------------------------------------------------------------- unpredicted

FOUR = Task.model_validate(
    {"name": "four", "description": "-", "question": "{t}", "labels": {c: [f"word {c}"] for c in "abcd"}}
)
TAGS = Task.model_validate(FOUR.model_dump() | {"name": "tags", "multi_label": True, "metrics": ["f1_micro"]})


def of_four(pairs, task="four", batch=8):
    records = [record(answer, gold, task) for answer, gold in pairs]
    return [({}, records[k : k + batch]) for k in range(0, len(records), batch)]


def unpredicted(pairs, task=FOUR, batch=8):
    return warnings_of(UnpredictedWatch([task], CollapseWatch([task])), of_four(pairs, task.name, batch))


def test_labels_that_no_answer_names():
    """Two of four balanced classes: each has its 20th row in iteration 10."""
    assert unpredicted([("a", "a"), ("b", "b"), ("a", "c"), ("b", "d")] * 40) == [
        (
            10,
            "step 10: four: no answer names 'word c' (20 rows), 'word d' (20 rows); try more training rows of them, "
            "data.balanced: true, data.oversample: true or data.class_weights: balanced, a lower optimizer.lr, or more "
            "steps",
        )
    ]


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ([("a", "b")] * 19, []),
        ([("a", "b")] * 20, [20]),
        ([("a", "b")] * 100, [20]),  # once
        ([("a", "b")] * 19 + [("b", "a")] + [("a", "b")] * 19, []),  # a wrong answer names it too
        ([("a", "b")] * 20 + [("b", "b")] + [("a", "b")] * 20, [20, 41]),  # again, after it was named
        ([(None, "b")] * 50, []),  # wrong formats say nothing about the class
        ([("a", "a")] * 100, []),  # no row asks for the others
    ],
    ids=["19", "20", "once", "named", "again", "wrong format", "not asked for"],
)
def test_thresholds_of_an_unpredicted_label(pairs, expected):
    assert [k for k, _ in unpredicted(pairs, batch=1)] == expected


def test_a_label_of_a_multi_label_task():
    found = unpredicted([("a, b", "a, c"), ("none", "b")] * 20, TAGS, batch=40)
    assert found == [
        (
            1,
            "step 1: tags: no answer names 'word c' (20 rows); try more training rows of it, a lower optimizer.lr, or "
            "more steps",
        )
    ]


def test_a_collapse_is_one_warning_per_iteration():
    """One batch in which both are due: the warning about the collapse alone."""
    (text,) = HealthMonitor([COLA], None).step({"step": 1}, [record("1", str(k % 2)) for k in range(160)])
    assert "collapsed to one class" in text
    monitor = HealthMonitor([COLA], None)
    series = [record("1", str(k % 2)) for k in range(160)]
    texts = [text for k in range(0, 160, 16) for text in monitor.step({"step": k // 16 + 1}, series[k : k + 16])]
    assert ["no answer names" in text for text in texts] == [True, False]
    assert texts[0].startswith("step 3: ") and monitor.collapse.warned == ["cola"]
    assert monitor.validation(10, {"cola": result_of(COLA, ["1"] * 4, ["1", "0"] * 2)}) == []


def result_of(task, given, golds):
    rows = zip(given, golds, strict=True)
    return score(task, [Prediction(task.name, k, "", answer, gold, {}) for k, (answer, gold) in enumerate(rows)], False)


def test_labels_that_no_answer_of_an_evaluation_names():
    golds = ["a"] * 6 + ["b"] * 3 + ["c"] * 2 + ["d"]
    given = ["a"] * 9 + ["b", "d", None]
    labels, text = unpredicted_in(FOUR, result_of(FOUR, given, golds), "after training, test split", "sft")
    assert labels == ["c"]
    assert text.startswith(
        "after training, test split: four: no answer names 'word c' (2 rows); try more training rows"
    )
    assert unpredicted_in(FOUR, result_of(FOUR, golds, golds), "-") == ([], None)
    assert unpredicted_in(FOUR, result_of(FOUR, [None] * 11 + ["a"], golds), "-") == ([], None), "it is the format"
    assert unpredicted_in(STSB, result_of(STSB, ["1.0"] * 3, ["2.0", "3.0", "4.0"]), "-") == ([], None)
    labels, text = unpredicted_in(TAGS, result_of(TAGS, ["a", "none"], ["a, b", "c"]), "-", "encoder")
    assert labels == ["b", "c"] and "encoder.lr" in text and "data." not in text
    assert "prompt.shots" in unpredicted_in(FOUR, result_of(FOUR, given, golds), "-", "eval")[1]


def test_validations_warn_where_the_labels_change():
    monitor = HealthMonitor([FOUR], None)
    golds = ["a", "b", "c", "d"]
    kept = [["a", "b", "c", "c"], ["a", "b", "c", "c"], ["a", "b", "b", "b"], golds, ["a", "b", "c", "c"]]
    counts = []
    for step, given in enumerate(kept):
        counts.append(len(monitor.validation(step, {"four": result_of(FOUR, given, golds)})))
        resumed = HealthMonitor([FOUR], None)
        resumed.load_state(json.loads(json.dumps(monitor.state())))
        monitor = resumed
    assert counts == [1, 0, 1, 0, 1]
