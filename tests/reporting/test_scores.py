"""Scores as text: the table that a run prints, and Markdown."""

import io
from copy import deepcopy

import pytest
from rich.console import Console
from run_folders import scores_of

from extensions.reporting.scores import before_after_table, cell_text, markdown_table
from extensions.tasks import SUITES, TASKS

COLA, SST2, STSB = (TASKS[name] for name in ("cola", "sst2", "stsb"))


def printed(table):
    console = Console(width=200, file=io.StringIO())
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
    assert "Yes 80 (70)" in cola and "No 10 (30)" in cola and "wrong format 10 (0)" in cola
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


def test_markdown_is_escaped_in_cells():
    assert cell_text("a|b *c* <d>\ne`") == r"a\|b \*c\* \<d> e\`"
    assert markdown_table(["x", "y"], [["a"], ["b", "1"]]) == "| x | y |\n| :-- | --: |\n| a |  |\n| b | 1 |\n"
