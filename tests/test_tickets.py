"""From a user's CSV to answers: the README's `nlu init`, `launch/sft.sh`, `nlu predict`, with a tiny model."""

import csv
import json
import shlex

import pandas
import pytest
from conftest import save_tiny_model, tiny_config
from readme import blocks, own_data, own_data_commands
from support import ROOT, free_port, run_command
from tickets import TEAMS, tickets, write
from typer.testing import CliRunner

from extensions import Predictor
from extensions.cli.main import app
from extensions.common.files import read_json, read_jsonl
from extensions.runs.main import main

FEW = [
    "max_steps=1",
    "sft.max_steps=2",
    "checkpoint.every_steps=0",
    "evaluation.every_steps=0",
    "evaluation.patience=0",
]


@pytest.fixture(scope="module")
def long_model(tmp_path_factory):
    """A tiny model whose context holds the prompts."""

    def config(vocabulary):
        made = tiny_config("llama", vocabulary)
        made.max_position_embeddings = 4096
        return made

    folder = tmp_path_factory.mktemp("long")
    save_tiny_model(folder, config)
    return folder


@pytest.fixture(scope="module")
def workspace(long_model, tmp_path_factory):
    """A folder with tickets.csv, new.csv and the results of the README's commands, each run as a process."""
    folder = tmp_path_factory.mktemp("workspace")
    write(folder / "tickets.csv", tickets(160, seed=1))
    write(folder / "new.csv", [{k: v for k, v in row.items() if k != "team"} for row in tickets(50, seed=2)])
    (folder / "launch").symlink_to(ROOT / "launch")
    said = {}
    for command in own_data_commands():
        words = shlex.split(command)
        words += ["--model", str(long_model)] if words[:2] == ["nlu", "init"] else []
        words += FEW if words[0] == "bash" else []
        words += ["--probabilities"] if words[:2] == ["nlu", "predict"] else []
        done = run_command(["env", f"MASTER_PORT={free_port()}", *words], cwd=folder)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        said[words[1]] = done.stdout + done.stderr
    assert list(said) == ["init", "launch/sft.sh", "predict"]
    valid = run_command(["nlu", "validate", "tickets.yaml"], cwd=folder)
    assert valid.returncode == 0 and "valid" in valid.stdout, valid.stderr[-2000:]
    return folder, said["init"], said["predict"]


def rows_of(path):
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_the_recipe_of_init(workspace):
    _, said, _ = workspace
    for part in (
        "classification of column 'team'; 4 distinct values",
        "text: subject",
        "ticket body",
        "kept beside predictions: id",
        "'Billing_and_Payments': 'billing and payments', 80 rows (50.0%)",
        "data.class_weights: balanced",
        "prompt 3 of",
        "launch/sft.sh tickets.yaml",
    ):
        assert part in said, said


@pytest.mark.slow
def test_csv_to_csv(workspace):
    folder, _, said = workspace
    new, answers = rows_of(folder / "new.csv"), rows_of(folder / "answers.csv")
    assert len(new) == len(answers) == 50 and "runs/tickets-sft" in said
    chances = [f"p({team})" for team in TEAMS]
    assert list(answers[0]) == [*new[0], "answer", "confidence", *chances]
    for before, after in zip(new, answers, strict=True):
        assert {name: after[name] for name in before} == before, "every cell as it was, line breaks and emoji too"
        assert after["answer"] in TEAMS
        assert sum(float(after[name]) for name in chances) == pytest.approx(1, abs=1e-6)
        assert float(after["confidence"]) == pytest.approx(float(after[f"p({after['answer']})"]), abs=1e-6)


@pytest.mark.slow
def test_other_formats_and_python_give_the_same_answers(workspace):
    folder, _, _ = workspace
    new, answers = rows_of(folder / "new.csv"), rows_of(folder / "answers.csv")
    expected = [(row["answer"], float(row["confidence"])) for row in answers]
    pandas.DataFrame(new).to_parquet(folder / "new.parquet")
    (folder / "new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in new))
    pandas.DataFrame(new).to_csv(folder / "new.tsv", sep="\t", index=False)
    for suffix in ("parquet", "jsonl", "tsv"):
        out = folder / f"out.{suffix}"
        run = str(folder / "runs" / "tickets-sft")
        result = CliRunner().invoke(app, ["predict", run, str(folder / f"new.{suffix}"), "--out", str(out)])
        assert result.exit_code == 0, result.output
        if suffix == "parquet":
            found = pandas.read_parquet(out)
        elif suffix == "jsonl":
            found = pandas.DataFrame(read_jsonl(out))
        else:
            found = pandas.read_csv(out, sep="\t", keep_default_na=False)
        assert found["answer"].tolist() == [answer for answer, _ in expected]
        assert found["confidence"].tolist() == pytest.approx([confidence for _, confidence in expected], abs=1e-6)
        assert found["ticket body"].tolist() == [row["ticket body"] for row in new]
    from_python = Predictor.load(folder / "runs" / "tickets-sft").predict(new)
    assert [one.answer for one in from_python] == [answer for answer, _ in expected]


@pytest.mark.slow
def test_answers_to_the_test_split_are_those_of_the_evaluation(workspace):
    """The held-out rows, found by their index in the file, get the same answers and scores."""
    folder, _, _ = workspace
    predictions = read_jsonl(folder / "runs" / "tickets-sft" / "predictions_after.jsonl")
    rows = rows_of(folder / "tickets.csv")
    held_out = [rows[one["kept"]["row"]] for one in predictions]
    assert [row["id"] for row in held_out] == [one["kept"]["id"] for one in predictions]
    assert [row["team"] for row in held_out] == [one["gold"] for one in predictions]
    write(folder / "held_out.csv", held_out)
    command = ["predict", str(folder / "runs" / "tickets-sft"), str(folder / "held_out.csv")]
    result = CliRunner().invoke(app, [*command, "--out", str(folder / "held_out_answers.csv")])
    assert result.exit_code == 0, result.output
    assert [row["answer"] for row in rows_of(folder / "held_out_answers.csv")] == [one["answer"] for one in predictions]
    scores = read_json(folder / "runs" / "tickets-sft" / "eval.json")["after"]["tickets"]["metrics"]
    assert scores.keys() == {"f1_macro", "accuracy", "balanced_accuracy"}
    for name in ("f1_macro", "accuracy"):  # the short table leaves out the balanced accuracy
        assert name in result.output and f"{100 * scores[name]:.1f}" in result.output


@pytest.mark.slow
def test_the_example_in_python(workspace, monkeypatch, capsys):
    """The README's example, with this run."""
    folder, _, _ = workspace
    monkeypatch.chdir(folder)
    [code] = blocks("python", own_data())
    exec(code, {})
    answer, confidence = capsys.readouterr().out.strip().rsplit(" ", 1)
    assert answer in TEAMS and 0 < float(confidence) <= 1


MOODS = ["dreadful", "poor", "mixed", "fine", "lovely"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["regression", "multi-label"])
def test_scores_from_minus_one_to_one_and_several_labels(kind, long_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if kind == "regression":
        rows = [{"review": f"{MOODS[k % 5]} thing {k}", "mood": f"{(k % 41) / 20 - 1:.2f}"} for k in range(120)]
        label, new = "mood", {"review": "a fine day"}
    else:
        topics = [["food"], ["food", "staff"], [], ["price", "staff"]]
        rows = [{"review": f"visit {k}", "topics": ";".join(topics[k % 4])} for k in range(120)]
        label, new = "topics", {"review": "a visit"}
    write(tmp_path / "own.csv", rows)
    made = CliRunner().invoke(app, ["init", "own.csv", "--label", label, "--model", str(long_model)])
    assert made.exit_code == 0 and kind in made.output, made.output
    for method in ("sft", "ppo"):
        assert main(["own.yaml", *FEW, f"output_dir=run-{method}"], method) == 0
    assert main(["own.yaml", "model.adapter=run-sft/adapter", "output_dir=again"], "eval") == 0
    scored = CliRunner().invoke(app, ["predict", "run-sft", "own.csv", "--out", "out.jsonl"])
    assert scored.exit_code == 0, scored.output
    found = read_jsonl(tmp_path / "out.jsonl")
    assert len(found) == 120
    of_run = {one["kept"]["row"]: one["answer"] for one in read_jsonl(tmp_path / "run-sft" / "predictions_after.jsonl")}
    metrics = read_json(tmp_path / "again" / "eval.json")["after"]["own"]["metrics"]
    if kind == "regression":
        assert {"pearson", "spearman", "mae", "rmse", "r2"} <= metrics.keys()
        assert all(-1 <= float(row["answer"]) <= 1 for row in found)
        assert {k: float(found[k]["answer"]) for k in of_run} == pytest.approx(of_run)
    else:
        assert {"f1_micro", "f1_macro", "subset_accuracy"} <= metrics.keys()
        known = {"food", "staff", "price"}
        assert all(set(row["answer"].split(", ")) <= known or row["answer"] == "none" for row in found)
        assert {k: found[k]["answer"] for k in of_run} == of_run
    (one,) = Predictor.load("run-ppo").predict([new])
    assert one.error is None and 0 <= one.confidence <= 1
