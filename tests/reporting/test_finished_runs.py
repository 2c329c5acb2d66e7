"""Run folders that a report takes, and damaged ones."""

import json
import math
import re
import shutil

import pytest
from run_folders import result, runs_of, write_run

from extensions.common.errors import UserError
from extensions.evaluation.metrics import Prediction, score
from extensions.reporting.finished_runs import find_runs, read_run
from extensions.tasks import TASKS


def test_a_run_a_sweep_and_a_folder_of_runs(tmp_path):
    first = write_run(tmp_path / "runs" / "a", "eval", {"sst2": (0.5,)})
    second = write_run(tmp_path / "runs" / "b", "eval", {"cola": (0.5,)})
    best = write_run(tmp_path / "sweep" / "sst2" / "ppo.batch_size=8", "ppo", {"sst2": (0.5,)})
    write_run(tmp_path / "sweep" / "sst2" / "ppo.batch_size=4", "ppo", {"sst2": (0.4,)})
    (tmp_path / "sweep" / "best.json").write_text('["sst2/ppo.batch_size=8"]')
    assert [run.folder for run in runs_of(first)] == [first]
    assert [run.folder for run in runs_of(tmp_path / "sweep")] == [best]
    assert [run.folder for run in runs_of(tmp_path / "runs")] == [first, second]
    assert [run.folder for run in runs_of(second, tmp_path / "runs")] == [second, first], "each once"
    write_run(tmp_path / "runs" / "a.old1", "eval", {"sst2": (0.4,)})
    write_run(tmp_path / "runs" / "c", "eval", {"sst2": (0.4,)})
    (tmp_path / "runs" / "c" / "eval.json").write_text('{"before": {}}')
    shutil.copytree(tmp_path / "sweep", tmp_path / "runs" / "sweep")
    warnings = []
    found = find_runs([tmp_path / "runs"], warnings.append)
    sweep = tmp_path / "runs" / "sweep" / "sst2" / "ppo.batch_size=8"
    assert [run.folder for run in found] == [first, second, sweep], "without the run that was set aside"
    assert warnings == [f"{tmp_path / 'runs' / 'c'} is skipped: the run is not finished; its command resumes it"]


def test_unfinished_runs_given_by_name_are_skipped(tmp_path):
    first = write_run(tmp_path / "a", "ppo", {"sst2": (0.9,)})
    second = write_run(tmp_path / "b", "ppo", {"sst2": (0.8,)})
    (second / "eval.json").write_text('{"before": {}}')
    warnings = []
    assert [run.folder for run in find_runs([second, first], warnings.append)] == [first]
    assert warnings == [f"{second} is skipped: the run is not finished; its command resumes it"]
    with pytest.raises(UserError, match=re.escape(f"no run is finished of {second}")):
        find_runs([second], warnings.append)
    (second / "eval.json").unlink()
    assert [run.folder for run in find_runs([first, second], warnings.append)] == [first]


def spoiled(tmp_path, file, content):
    folder = write_run(tmp_path / "x", "ppo", {"sst2": (0.5,)}, validations=[(16, 1.0, 0.5)], rewards=[0.1])
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(content)
    return folder


GOOD = {"method": "ppo", "split": "validation", "after": {"sst2": result(TASKS["sst2"], 0.5)}}

SST2 = GOOD["after"]["sst2"]

COMPLETE = GOOD | {"training": {"tasks": ["sst2"], "steps": 1, "samples": 1, "seconds": 1.0}}


def with_score(**changed):
    return json.dumps(COMPLETE | {"after": {"sst2": SST2 | changed}})


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("recipe.yaml", None, "has no finished run"),
        ("eval.json", "{", "eval.json is damaged.*another output_dir"),
        ("eval.json", "[1]", "eval.json is damaged"),
        ("eval.json", json.dumps(GOOD), "eval.json is damaged: it does not list the trained tasks"),
        ("eval.json", json.dumps(GOOD | {"after": {"sst2": {"score": "high"}}}), r"after\.sst2\.score"),
        ("eval.json", json.dumps(GOOD | {"after": {"cola": GOOD["after"]["sst2"]}}), "'cola'.*not in data.tasks"),
        ("eval.json", json.dumps(GOOD | {"after": {}, "training": {
            "tasks": ["sst2"], "steps": 1, "samples": 1, "seconds": 1.0}}), "it has no scores"),
        ("eval.json", with_score(score=math.inf), r"after\.sst2\.score"),
        ("eval.json", with_score(samples=10**400), r"after\.sst2\.samples"),
        ("eval.json", with_score(intervals={}), "the metric accuracy has no interval"),
        ("eval.json", with_score(confusion={"labels": ["a", "b"], "counts": [[1, 0], [0, 1]]}), "2 rows of 3 columns"),
        ("eval.json", with_score(classes={"a": {"precision": 1, "recall": 1}}), r"classes\.a\.f1"),
        ("eval.json", with_score(calibration={"log_loss": math.inf}), r"calibration\.log_loss"),
        ("eval.json", with_score(likelihood={"score": 1, "metrics": {"x": 1}, "intervals": {}}), "x has no interval"),
        ("eval.json", with_score(metrics={}), "lacks the metric accuracy of sst2"),
        ("eval.json", json.dumps(COMPLETE | {"split": "\ud800"}), "surrogate"),
        ("eval.json", json.dumps(COMPLETE | {"before": {"rte": SST2}}), "'rte'.*not in data.tasks"),
        ("eval.json", '{"after": ' + "[" * 5000, "eval.json is damaged"),
        ("metrics.jsonl", "[" * 5000 + "\n", "metrics.jsonl is damaged"),
        ("metrics.jsonl", '{"step": 1, "samples": 16, "elapsed_s": 1.0, "reward_mean": 1e999}\n', "0.reward_mean"),
        ("recipe.yaml", "name: [", "recipe.yaml"),
        ("recipe.yaml", "name: x\nmodle: {}\n", "modle"),
        ("metrics.jsonl", '{"step": 1}\n', "metrics.jsonl is damaged: 0.samples"),
        ("validation.jsonl", "no json\n", "validation.jsonl is damaged"),
    ],
)  # fmt: skip
def test_a_damaged_run(tmp_path, file, content, message):
    folder = spoiled(tmp_path, file, content)
    with pytest.raises(UserError, match=f"(?s){re.escape(str(folder))}.*") as error:
        runs_of(folder)
    assert re.search(message, str(error.value), re.DOTALL)


def test_the_scores_of_an_evaluation_are_read(tmp_path):
    """What `score` returns is accepted whole."""
    task, made = TASKS["sst2"], []
    for k, (gold, answer) in enumerate([("1", "1"), ("0", None)]):
        made.append(Prediction("sst2", k, "", answer, gold, probabilities={"0": 0.25, "1": 0.75}, likelihood="1"))
    found = score(task, made)
    (tmp_path / "x").mkdir()
    folder = write_run(tmp_path / "x" / "run", "eval", {"sst2": found})
    read = read_run(folder).scores.after["sst2"]
    assert json.loads(read.model_dump_json()) == json.loads(json.dumps(found))
    assert read.likelihood.metrics["accuracy"] == 0.5 and read.calibration.bins[0].count == 2


def test_folders_without_a_run(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "best.json").write_text("[]")
    with pytest.raises(UserError, match="none is not a folder"):
        runs_of(tmp_path / "none")
    with pytest.raises(UserError, match="empty has no finished run"):
        runs_of(tmp_path / "empty")
    with pytest.raises(UserError, match="a sweep without a finished run"):
        runs_of(tmp_path / "sweep")
    (tmp_path / "sweep" / "best.json").write_text('["gone"]')
    with pytest.raises(UserError, match="gone is not a run folder"):
        runs_of(tmp_path / "sweep")


@pytest.mark.parametrize(
    "name, message", [("x" * 300, "cannot be read.*too long"), ("a\\u0000b", "contains NUL"), ("\\ud800", "surrogate")]
)
def test_run_names_that_are_not_file_names(tmp_path, name, message):
    (tmp_path / "best.json").write_text(f'["{name}"]')
    with pytest.raises(UserError, match=f"(?s){re.escape(str(tmp_path))}.*{message}"):
        runs_of(tmp_path)


def test_an_incomplete_last_line_is_dropped(tmp_path):
    folder = write_run(tmp_path / "x", "ppo", {"sst2": (0.5,)}, rewards=[0.1, 0.2])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "sam')
    assert [record.step for record in read_run(folder).iterations] == [1, 2]
