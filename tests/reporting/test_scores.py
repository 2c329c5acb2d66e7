"""Scores as text: the table that a run prints, and Markdown."""

import io
import random
from copy import deepcopy

import pytest
from own_answers import TOPICS, own
from run_folders import scores_of

from extensions.common.console import DataConsole
from extensions.evaluation.metrics import Prediction, score
from extensions.reporting.scores import (
    before_after_table,
    calibration_text,
    cell_text,
    class_table,
    markdown_table,
    own_class_tables,
)
from extensions.tasks import SUITES, TASKS

COLA, SST2, STSB = (TASKS[name] for name in ("cola", "sst2", "stsb"))


def printed(table, width=200):
    console = DataConsole(width=width, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


def test_before_after_table():
    before, after = scores_of(2), scores_of(6)
    text = printed(before_after_table([COLA, STSB], before, after, "validation"))
    assert "Before and after, validation split (%)" in text
    metrics = ("matthews", "accuracy", "spearman", "pearson")
    cola, accuracy, stsb, pearson = [line for line in text.split("\n") if any(m in line for m in metrics)]
    assert "CoLA (10)" in cola and "matthews" in cola and "10.0 → 10.0" in cola
    low, high = after["cola"]["intervals"]["matthews"]
    assert f"[{100 * low:.0f}, {100 * high:.0f}]" in cola
    assert "Yes 80 (70)  No 10 (30)" in cola
    low, high = after["cola"]["intervals"]["accuracy"]
    interval = [f"[{100 * low:.0f},", f"{100 * high:.0f}]"]
    assert accuracy.replace("│", " ").split() == ["accuracy", "70.0", "20.0", "60.0", *interval]
    assert "STS-B (4)" in stsb and "60.0" in stsb and "pearson" in pearson
    alone = printed(before_after_table([COLA, STSB], None, after, "test"))
    assert "→" not in alone and "Score, test split" in alone and "before" not in alone


def result_of(task, value):
    """A result with `value` everywhere."""
    names = [*task.metrics, *task.extra_metrics]
    result = {"score": value, "metrics": dict.fromkeys(names, value), "intervals": {name: [0.0, 1.0] for name in names}}
    return result | {"samples": 3, "format_error_rate": 0.0, "majority": 0.5, "gold_shares": {}, "predicted_shares": {}}


def average_rows(tasks, before, after):
    text = printed(before_after_table(tasks, before, after, "validation"))
    return [line.replace("│", " ").split() for line in text.split("\n") if "average" in line]


@pytest.mark.parametrize("suite", SUITES)
def test_the_table_has_the_average_of_a_whole_suite(suite):
    tasks = SUITES[suite]
    counted = [task for task in tasks if task.in_suite_average]
    # Counted: 0.1, 0.2, ... before and 0.05 more after; those that do not count: 0.
    mean = sum(0.1 * (k + 1) for k in range(len(counted))) / len(counted)
    before, after = (
        {t.name: result_of(t, 0.1 * (counted.index(t) + 1) + more if t in counted else 0.0) for t in tasks}
        for more in (0.0, 0.05)
    )
    (row,) = average_rows(tasks, before, after)
    assert row[-2:] == [f"{100 * mean:.1f}", f"{100 * mean + 5:.1f}"]
    (row,) = average_rows(tasks, None, after)
    assert row == ["average,", suite, f"{100 * mean + 5:.1f}"]
    (row,) = average_rows(counted, {}, {task.name: after[task.name] for task in counted})
    assert row[-2:] == ["-", f"{100 * mean + 5:.1f}"], "tasks outside the average may be missing"
    for task in counted:
        rest = {name: result for name, result in after.items() if name != task.name}
        assert average_rows(tasks, None, rest) == []


def test_the_table_of_both_suites_has_two_averages():
    tasks = [task for suite in SUITES.values() for task in suite]
    after = {task.name: result_of(task, {"glue": 0.25, "superglue": 0.75}[task.suite]) for task in tasks}
    assert sorted(row[-1] for row in average_rows(tasks, None, after)) == ["25.0", "75.0"]


def test_a_task_without_scores_is_not_in_the_table():
    after = scores_of(6)
    text = printed(before_after_table([COLA, SST2, STSB], scores_of(2), after, "validation"))
    assert "CoLA" in text and "STS-B" in text and "SST-2" not in text and "average" not in text
    alone = printed(before_after_table([COLA, SST2, STSB], None, {"stsb": after["stsb"]}, "validation"))
    assert "STS-B" in alone and "CoLA" not in alone and "SST-2" not in alone


def test_a_metric_without_a_value_before():
    before = {"cola": deepcopy(scores_of(2)["cola"])}
    before["cola"]["metrics"].pop("matthews")
    table = before_after_table([COLA, STSB], before, scores_of(6), "validation")
    columns = {column.header: list(column.cells) for column in table.columns}
    assert columns["before"] == ["-", "20.0", "-", "-"] and columns["majority"] == ["", "70.0", "", ""]


def scored(task, rows):
    """rows: (gold, answer, answer by likelihood)."""
    made = [
        Prediction(task.name, i, "", answer, gold, likelihood=found) for i, (gold, answer, found) in enumerate(rows)
    ]
    return score(task, made)


def test_the_column_by_likelihood():
    after = {"sst2": scored(SST2, [("1", None, "1"), ("0", "0", "0"), ("1", "0", "0"), ("0", "0", "0")])}
    table = before_after_table([SST2], after, after, "validation")
    columns = {str(column.header): list(column.cells) for column in table.columns}
    assert columns["by\nlikelihood"] == ["75.0"] and columns["after"][0].startswith("50.0 [")
    same = {"sst2": scored(SST2, [("1", "1", "1"), ("0", "0", "0")])}
    assert "likelihood" not in printed(before_after_table([SST2], None, same, "validation")), "it would be repeated"


def test_the_table_of_glue_fits_into_120_columns():
    rng = random.Random(0)
    after = {}
    for task in SUITES["glue"]:
        golds = [str(rng.randint(0, 5)) if task.is_regression else rng.choice(list(task.labels)) for _ in range(200)]
        kind = float if task.is_regression else str
        after[task.name] = scored(task, [(g, rng.choice([kind(g), None]), kind(g)) for g in golds])
        after[task.name]["samples"] = 9815
    lines = printed(before_after_table(SUITES["glue"], after, after, "validation"), 120).splitlines()
    assert max(map(len, lines)) <= 120 and "…" not in "".join(lines)
    assert sum("MNLI-mm (9815) " in line for line in lines) == 1
    assert sum("contradiction" in line for line in lines) == 3 and len(lines) < 36
    assert "average, glue" in lines[-2] and lines[-2].count("100.0") == 1, "by likelihood, all are right"


def test_a_task_of_many_labels_shows_the_most_predicted():
    task = own(labels=[f"label {k}" for k in range(20)])
    rows = [(f"label {k}", "label 7", "label 7") for k in range(18)] + [("label 3", "label 3", None)] * 2
    text = printed(before_after_table([task], None, {"own": scored(task, rows)}, "test"))
    assert "label 7 90 (5)" in text and "label 3 10 (15)" in text and "and 15 more" in text and "label 19" not in text


def test_the_table_of_classes():
    task = own(labels={"b": ["billing"], "a": ["access [now]"], "o": ["other"]})
    rows = [("b", "b", "b")] * 3 + [("b", "o", "b")] * 2 + [("b", None, "b"), ("a", "a", "a"), ("a", "b", "a")]
    found = scored(task, rows)
    table = class_table(task, found)
    cells = list(zip(*([*column.cells] for column in table.columns), strict=True))
    assert [column.header for column in table.columns][-1] == "most frequent confusion"
    assert cells == [
        ("billing", "75.0", "50.0", "60.0", "6", "other (2)"),
        ("access [now]", "100.0", "50.0", "66.7", "2", "billing (1)"),
        ("other", "0.0", "0.0", "0.0", "0", ""),
    ]
    assert "access [now]" in printed(table)
    assert len(own_class_tables([task, SST2, STSB], {"own": found} | scores_of(6))) == 1, "of own classifications"
    sets = class_table(TOPICS, score(TOPICS, [Prediction("own", 0, "", "s", "s, m")]))
    assert [column.header for column in sets.columns] == ["class", "precision", "recall", "F1", "rows"]


def test_of_many_classes_those_with_the_lowest_f1_are_shown():
    task = own(labels=[f"l{k}" for k in range(15)])
    rows = [(f"l{k}", f"l{k}" if i >= 15 - k else "l0", None) for k in range(1, 15) for i in range(20)]
    table = class_table(task, scored(task, rows))
    assert "the 12 of 15 classes with the lowest F1" in str(table.title)
    assert list(table.columns[0].cells) == [f"l{k}" for k in range(12)]


def test_calibration_in_words():
    text = calibration_text({"calibration": {"log_loss": 0.51234, "brier": 0.25, "ece": 0.0312, "bins": []}})
    assert text == "probabilities: log loss 0.512 nats, Brier score 0.250, expected calibration error 3.1%"


def test_markdown_is_escaped_in_cells():
    assert cell_text("a|b *c* <d>\ne`") == r"a\|b \*c\* \<d> e\`"
    assert markdown_table(["x", "y"], [["a"], ["b", "1"]]) == "| x | y |\n| :-- | --: |\n| a |  |\n| b | 1 |\n"
