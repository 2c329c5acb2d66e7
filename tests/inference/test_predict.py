"""Answers to new rows: `nlu predict` as a user runs it, `Predictor`, and the equalities that hold between them."""

import csv
import io
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import ClassVar

import pyarrow
import pyarrow.parquet
import pytest
import torch
from support import environment, run_command, write_recipe
from typer.testing import CliRunner

from extensions import Predictor
from extensions.cli.main import app
from extensions.common.errors import UserError
from extensions.common.files import read_json, read_jsonl, write_json
from extensions.inference.manifest import FILE_NAME, Manifest
from extensions.prompts import CLOSE
from extensions.runs.main import main

LABELS = {"3": ["three"], "Abuse/Spam": ["abuse"], "Billing": ["billing", "payment"]}
TEXTS = [
    'I was charged "twice",\nplease refund é😀.',
    "Nobody slept; the children, were happy.",
    "Mary wrote a letter to the teacher last week." * 3,
    "  spam spam  ",
    "=1+1",
]


def tickets(count):
    """Rows as JSON objects, with a column that the task does not use."""
    return [
        {
            "id": f"00{k}",
            "subject": f"Ticket {'ABC'[k % 3] * 4}",
            "ticket body": f"{TEXTS[k % len(TEXTS)]} {k}",
            "team": list(LABELS)[k % 3],
            "extra": [k, None],
        }
        for k in range(count)
    ]


@pytest.fixture(scope="module")
def scene(tiny_model, tmp_path_factory):
    """Folder of a short supervised run (`run-sft`), whose own evaluation decodes by likelihood."""
    folder = tmp_path_factory.mktemp("predict")
    for name, rows in (("train", tickets(24)), ("validation", tickets(9)), ("test", tickets(15))):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "name": "tickets",
        "description": "Which team is it for?",
        "question": 'Subject "{subject}", text "{body}".',
        "labels": LABELS,
        "source": {
            "files": {split: f"{split}.jsonl" for split in ("train", "validation", "test")},
            "columns": {"body": "ticket body"},
            "label": "team",
        },
    }
    recipe = write_recipe(
        folder,
        tiny_model("llama"),
        data={"tasks": [task], "root": str(folder)},
        sft={"batch_size": 12, "max_steps": 40, "lr": 2e-2, "loss": "answer"},
        schedule={"name": "constant"},
        output_dir=str(folder / "run-sft"),
        evaluation={"max_samples": None, "decoding": "likelihood", "batch_size": 4},
        prompt={"shots": 1},
    )
    assert main([str(recipe)], "sft") == 0
    return folder


@pytest.fixture(scope="module")
def predictor(scene):
    return Predictor.load(scene / "run-sft")


def nlu(*arguments, stdin=None):
    result = CliRunner().invoke(app, ["predict", *map(str, arguments)], input=stdin)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def fails(*arguments, stdin=None):
    result = nlu(*arguments, stdin=stdin)
    assert result.exit_code == 2 and "Traceback" not in result.output, result.output
    return result.stderr


def table(content):
    return list(csv.reader(io.StringIO(content)))


def write_csv(path, rows):
    """As pandas and spreadsheets write it."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "subject", "ticket body"])
        writer.writerows([row["id"], row["subject"], row["ticket body"]] for row in rows)
    return path


# ------------------------------------------------------------------------------------------------------------- equality


def test_predictions_are_those_of_the_evaluation(scene, predictor):
    evaluated = read_jsonl(scene / "run-sft" / "predictions_after.jsonl")
    chances = [p["probabilities"]["3"] for p in evaluated]
    assert max(chances) > 1.01 * min(chances), "the rows differ"
    for batch_size in (1, 4, 64):
        answers = predictor.predict(tickets(15), probabilities=True, batch_size=batch_size)
        assert [one.answer for one in answers] == [p["answer"] for p in evaluated]
        for one, p in zip(answers, evaluated, strict=True):
            assert one.probabilities == pytest.approx(p["probabilities"], rel=1e-4)
            assert sum(one.probabilities.values()) == pytest.approx(1, abs=1e-9)
            assert one.confidence == max(one.probabilities.values()) == one.probabilities[one.answer]
            assert one.error is one.raw is None


def test_sampled_answers_are_those_of_an_evaluation(scene, predictor, tiny_model, tmp_path):
    """Same seed, same rows: the same random numbers."""
    adapter = f"model.adapter={scene / 'run-sft' / 'adapter'}"
    for decoding in ("sample", "greedy"):
        overrides = [f"output_dir={tmp_path / decoding}", adapter, f"evaluation.decoding={decoding}"]
        assert main([str(scene / "recipe.yaml"), *overrides], "eval") == 0
        evaluated = read_jsonl(tmp_path / decoding / "predictions_after.jsonl")
        answers = predictor.predict(tickets(15), decoding=decoding)
        assert [(one.raw, one.answer) for one in answers] == [(p["text"], p["answer"]) for p in evaluated]
        assert all((one.answer is None) == (one.error is not None) == (one.confidence is None) for one in answers)


def test_an_adapter_answers_alone(scene, predictor, tmp_path):
    """Its folder elsewhere, with no run beside it."""
    folder = tmp_path / "elsewhere"
    shutil.copytree(scene / "run-sft" / "adapter", folder)
    assert Predictor.load(folder).predict(tickets(5), True) == predictor.predict(tickets(5), True)


def test_a_merged_model_answers_as_base_and_adapter(scene, predictor, tmp_path):
    merged = tmp_path / "merged"
    adapter = f"model.adapter={scene / 'run-sft' / 'adapter'}"
    done = CliRunner().invoke(app, ["merge", str(scene / "recipe.yaml"), str(merged), adapter])
    assert done.exit_code == 0, done.output
    moved = merged.rename(tmp_path / "moved")
    for one, other in zip(
        Predictor.load(moved).predict(tickets(15), True), predictor.predict(tickets(15), True), strict=True
    ):
        assert one.answer == other.answer
        assert one.probabilities == pytest.approx(other.probabilities, rel=1e-4)
    with pytest.raises(UserError, match=r"merged model, which needs no base"):
        Predictor.load(moved, model=str(scene))
    weights = next(moved.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    with pytest.raises(UserError, match="has changed since it was merged"):
        Predictor.load(moved)


def test_the_tokenizer_is_the_adapters(scene, predictor, tmp_path, tiny_model):
    """The base's may end an answer otherwise."""
    other = tmp_path / "base"
    shutil.copytree(tiny_model("llama"), other)
    config = read_json(other / "tokenizer_config.json")
    write_json(other / "tokenizer_config.json", config | {"eos_token": "a"})
    found = Predictor.load(scene / "run-sft", model=str(other))
    assert found.sampler.tokenizer.eos_token == "<eos>"


# ---------------------------------------------------------------------------------------------------- as a user runs it


@pytest.mark.slow
def test_csv_to_csv(scene, predictor, tmp_path):
    rows = tickets(50)
    source, out = write_csv(tmp_path / "new.csv", rows), tmp_path / "answers.csv"
    done = run_command(["nlu", "predict", str(scene / "run"), str(source), "--out", str(out), "--probabilities"])
    assert done.returncode == 0, done.stderr
    assert "run is not there; answering with" in done.stderr and "50 rows in" in done.stderr
    header, *found = table(out.read_text(encoding="utf-8"))
    assert header == ["id", "subject", "ticket body", "answer", "confidence", *(f"p({label})" for label in LABELS)]
    assert [row[:3] for row in found] == [[row["id"], row["subject"], row["ticket body"]] for row in rows]
    expected = predictor.predict(rows, True)
    for row, one in zip(found, expected, strict=True):
        chances = list(map(float, row[5:]))
        assert row[3] == one.answer and float(row[4]) == pytest.approx(one.confidence, abs=1e-5)
        assert sum(chances) == pytest.approx(1, abs=2e-6) and max(chances) == float(row[4])


@pytest.mark.slow
def test_standard_input_to_standard_output(scene, tmp_path):
    """In a pipe, with nothing but the table in the output; CSV and JSONL."""
    source = write_csv(tmp_path / "new.csv", tickets(3))
    lines = "".join(json.dumps(row) + "\n" for row in tickets(3))
    answers = []
    for content, options in ((source.read_text(encoding="utf-8"), []), (lines, ["-", "--format", "jsonl"])):
        command = ["nlu", "predict", str(scene / "run-sft"), *options]
        done = subprocess.run(command, input=content, capture_output=True, text=True, env=environment())
        assert done.returncode == 0, done.stderr
        if options:
            found = [json.loads(line) for line in done.stdout.splitlines()]
            assert [{k: v for k, v in row.items() if k not in ("answer", "confidence")} for row in found] == tickets(3)
            answers.append([row["answer"] for row in found])
        else:
            header, *found = table(done.stdout)
            assert header[-2:] == ["answer", "confidence"]
            answers.append([row[3] for row in found])
    assert answers[0] == answers[1]


def test_parquet_keeps_its_types(scene, tmp_path):
    rows = pyarrow.table(
        {
            "id": pyarrow.array([7, None], pyarrow.int16()),
            "subject": ["a", "b"],
            "ticket body": pyarrow.array(["one", "two"], pyarrow.large_string()),
            "when": pyarrow.array([1, 2], pyarrow.timestamp("ms")),
        }
    )
    pyarrow.parquet.write_table(rows, tmp_path / "new.parquet")
    result = nlu(scene / "run-sft", tmp_path / "new.parquet", "--out", tmp_path / "out.parquet")
    assert result.exit_code == 0, result.output
    found = pyarrow.parquet.read_table(tmp_path / "out.parquet")
    assert found.select(rows.column_names).equals(rows) and found.schema.field("id").type == pyarrow.int16()
    assert found.column_names[4:] == ["answer", "confidence"]
    as_text = nlu(scene / "run-sft", tmp_path / "new.parquet")
    assert [row[0] for row in table(as_text.stdout)] == ["id", "7", ""]


def test_rows_that_cannot_be_answered_do_not_stop_the_others(scene, tmp_path):
    source = tmp_path / "new.csv"
    body = "ticket body"
    source.write_text(f'id,subject,{body}\n1,a,text\n2,,text\n3,a,"   "\n4,too,many,cells\n5,a,text\n')
    result = nlu(scene / "run-sft", source, "--out", tmp_path / "out.csv")
    assert result.exit_code == 0, result.output
    assert "3 of 5 rows have no answer; see the column 'error'" in result.stderr
    header, *rows = table((tmp_path / "out.csv").read_text())
    assert header == ["id", "subject", body, "answer", "confidence", "error"]
    assert [row[0] for row in rows] == ["1", "2", "3", "4", "5"]
    assert rows[0][3] == rows[4][3] != "" and rows[0][5] == rows[4][5] == ""
    assert rows[2][2] == "   ", "as it was"
    assert [bool(row[3]) for row in rows] == [True, False, False, False, True]
    for row, part in zip(
        rows[1:4], ("'subject': expected text", f"{body!r}: expected text", "4 columns, expected 3"), strict=True
    ):
        assert part in row[5]


def test_a_prompt_that_cannot_fit_is_an_error_of_its_row(predictor, monkeypatch):
    long = {"subject": "word " * 900, "ticket body": "word"}
    assert predictor.predict([long])[0].answer in LABELS, "what is too long is cut"
    bare = len(predictor.encoder.encode(predictor.manifest.task(None), {"subject": "", "body": ""})[0])
    monkeypatch.setattr(predictor.encoder, "max_tokens", bare // 4)
    (one,) = predictor.predict([long])
    assert one.answer is None and f"the {bare // 4} tokens" in one.error


def test_labels_in_the_input_are_scored(scene, predictor, tmp_path):
    rows = tickets(9)
    answers = [one.answer for one in predictor.predict(rows)]
    for row, answer in zip(rows, answers, strict=True):
        row["team"] = answer
    rows[0]["team"] = next(label for label in LABELS if label != answers[0])
    rows[8]["team"] = "no such team"
    path = tmp_path / "labelled.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = nlu(scene / "run-sft", path, "--out", tmp_path / "out.jsonl")
    assert "1 rows without a label of the task" in result.stdout
    assert "accuracy" in result.stdout and f"{100 * 7 / 8:.1f}" in result.stdout


def test_one_row_by_text(scene, predictor):
    (one,) = predictor.predict([{"subject": "Refund", "ticket body": "a=b"}], True)
    result = nlu(scene / "run-sft", "--text", "subject=Refund", "--text", "body=a=b")
    first, second, *rest = result.stdout.splitlines()
    assert first.split() == ["answer", one.answer] and second.split() == ["confidence", f"{one.confidence:.3f}"]
    assert [line.split()[-2:] for line in rest] == [
        [f"{chance:.3f}", label] for label, chance in sorted(one.probabilities.items(), key=lambda item: -item[1])
    ]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["missing", "x.csv"], ["missing: no such folder", "runs/NAME"]),
        (["{run}", "missing.csv"], ["missing.csv: no such file"]),
        (["{run}", "{new}", "--task", "other"], ["'other' is not a task", "tickets"]),
        (["{run}", "{new}", "--temperature", "0"], ["--temperature: got '0'", "auto"]),
        (["{run}", "{new}", "--out", "out.xlsx"], ["'.xlsx'", "out.xlsx"][1:]),
        (["{run}", "{new}", "--out", "{new}"], ["is the input itself"]),
        (["{run}", "{new}", "--out", "no/such/out.csv"], ["its folder is not there"]),
        (["{run}", "{new}", "--device", "abacus"], ["--device: 'abacus'"]),
        (["{run}", "{wrong}"], ["no column 'ticket body'", "needs: 'subject', 'ticket body'", "found: 'id', 'text'"]),
        (["{run}", "{twice}"], ["has the column 'answer', 'confidence' already", "--prefix"]),
        (["{run}", "--text", "title=x"], ["got 'title=x'", "subject, ticket body"]),
        (["{run}", "--text", "subject=x"], ["ticket body missing"]),
        (["{run}/critic", "{new}"], ["no such folder"]),
        (["{folder}", "{new}"], ["neither a run folder"]),
        (["{run}", "{new}", "--model", "./nowhere"], ["'./nowhere' is not there", "--model"]),
    ],
    ids=lambda value: " ".join(value[1:]) if isinstance(value, list) else None,
)
def test_mistakes_are_explained(scene, tmp_path, arguments, parts):
    places = {"run": scene / "run-sft", "new": tmp_path / "new.csv", "folder": tmp_path}
    places |= {"wrong": tmp_path / "wrong.csv", "twice": tmp_path / "twice.csv"}
    write_csv(places["new"], tickets(2))
    places["wrong"].write_text("id,text,subject\n1,a,b\n")
    places["twice"].write_text("subject,ticket body,answer,confidence\na,b,c,d\n")
    message = fails(*(argument.format(**places) for argument in arguments))
    assert all(part in message for part in parts), message


def test_a_clash_of_names_is_solved_by_a_prefix(scene, tmp_path):
    (tmp_path / "new.csv").write_text("subject,ticket body,answer\na,b,mine\n")
    result = nlu(scene / "run-sft", tmp_path / "new.csv", "--prefix", "model_")
    header, row = table(result.stdout)
    assert header == ["subject", "ticket body", "answer", "model_answer", "model_confidence"] and row[2] == "mine"


def test_a_csv_is_written_as_it_was(scene, tmp_path):
    """Separator, byte order mark, a CR in a cell; a row with too many cells keeps those that have a column."""
    import pandas

    new, out = tmp_path / "new.csv", tmp_path / "out.csv"
    new.write_bytes('\ufeffid;subject;ticket body\n1;a,b;"x\ry"\n2;c;d;e\n'.encode())
    assert nlu(scene / "run-sft", new, "--out", out).exit_code == 0
    assert out.read_bytes().startswith("\ufeffid;subject;ticket body;answer;confidence;error\n".encode())
    found = pandas.read_csv(out, sep=";", dtype=str, keep_default_na=False, encoding="utf-8-sig")
    assert found["subject"].tolist() == ["a,b", "c"] and found["ticket body"].tolist() == ["x\ry", "d"]
    assert found["answer"][0] in LABELS and found["answer"][1] == "" and "4 columns, expected 3" in found["error"][1]


def test_a_file_is_read_as_those_of_the_training(scene, tmp_path, tiny_model):
    """Where a quote is a character there, it is one here, in what the model reads and in what is written."""
    folder = tmp_path / "adapter"
    shutil.copytree(scene / "run-sft" / "adapter", folder)
    content = read_json(folder / FILE_NAME)
    content["tasks"][0]["source"] |= {"files": {"train": "train.tsv"}, "quoting": "none"}
    write_json(folder / FILE_NAME, content)
    new, out = tmp_path / "new.tsv", tmp_path / "out.tsv"
    lines = ['1\t"good" one\tx', '2\t"bad\ty', '3\tso "so\tz']
    new.write_text("\n".join(["id\tsubject\tticket body", *lines]) + "\n")
    assert nlu(folder, new, "--out", out).exit_code == 0
    written = out.read_text().splitlines()[1:]
    assert [line.rsplit("\t", 2)[0] for line in written] == lines
    rows = [dict(zip(("id", "subject", "ticket body"), line.split("\t"), strict=True)) for line in lines]
    answers = Predictor.load(folder).predict(rows)
    assert [line.rsplit("\t", 2)[1] for line in written] == [one.answer for one in answers]


def test_the_format_of_a_file_is_that_of_its_suffix(scene, tmp_path):
    new = write_csv(tmp_path / "new.csv", tickets(3))
    result = nlu(scene / "run-sft", new, "--format", "jsonl")
    assert [json.loads(line)["id"] for line in result.stdout.splitlines()] == ["000", "001", "002"]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ({"batch_size": -1}, "batch_size: got -1"),
        ({"temperature": 0.0}, "temperature: got 0.0"),
        ({"temperature": float("nan")}, "temperature: got nan"),
        ({"decoding": "greddy"}, "'greddy'; allowed: sample, greedy, likelihood"),
        ({"rows": {"subject": "a"}}, 'df.to_dict("records")'),
        ({"rows": [{"text": "a"}]}, "rows: no column 'subject', 'ticket body'"),
    ],
)
def test_wrong_arguments_are_explained(predictor, arguments, part):
    rows = arguments.pop("rows", tickets(2))
    with pytest.raises(UserError, match=re.escape(part)):
        predictor.predict(rows, **arguments)


def test_rows_of_a_data_frame(predictor):
    """With what pandas and numpy put in the place of texts; a row that is none is an error of its own."""
    import numpy
    import pandas

    missing = [{"subject": gap, "ticket body": "x"} for gap in (pandas.NA, float("nan"), None, pandas.NaT)]
    good = {"subject": numpy.int64(3), "ticket body": True}
    found = predictor.predict([good, *missing, "a", {"subject": "3", "ticket body": "true"}, {"subject": " "}])
    assert found[0] == found[6] and found[0].error is None
    assert all("subject" in one.error for one in found[1:5])
    assert "expected a dictionary" in found[5].error and found[7].answer is None
    assert predictor.predict([]) == []


def test_threads_take_turns(predictor):
    expected, found = predictor.predict(tickets(6)), {}
    threads = [threading.Thread(target=lambda k=k: found.update({k: predictor.predict(tickets(6))})) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found.get(k) for k in range(4)] == [expected] * 4


# ------------------------------------------------------------------------------------------------------------ hand-over


def test_another_base_is_refused(scene, tiny_model, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tiny_model("llama"), other)
    same = Predictor.load(scene / "run-sft", model=str(other))  # a copy of the base is the base
    assert same.predict(tickets(1))[0].answer is not None
    weights = other / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-2] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match=r"is not the model that it was trained on: sha256 .*--model"):
        Predictor.load(scene / "run-sft", model=str(other))


def test_the_file_says_what_answering_needs(scene, tiny_model):
    found = Manifest.load(scene / "run-sft" / "adapter")
    assert [task.name for task in found.tasks] == ["tickets"] and found.tasks[0].labels == LABELS
    assert found.prompt.shots == 1 and len(found.prompt.demonstrations["tickets"]) == 2
    assert found.base.path == str(tiny_model("llama")) and found.base.dtype == "float32"
    assert found.calibration == {"tickets": None} and found.decoding == "likelihood"
    assert found.packages["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda content: None, ["cannot be read", "train again"]),
        (lambda content: "{", ["damaged", "JSON"]),
        (lambda content: [], ["damaged", "format"]),
        (lambda content: content | {"format": 99, "project": "7.0"}, ["format 99", "version 7.0", "update"]),
        (lambda content: {k: v for k, v in content.items() if k != "tasks"}, ["tasks: field required", "damaged"]),
        (lambda content: content | {"tasks": [{"name": "x"}]}, ["tasks.0.description", "Copy the folder again"]),
        (lambda content: content | {"extra": 1}, ["extra: extra inputs"]),
        (lambda content: content | {"prompt": 3}, ["prompt: input should be"]),
    ],
    ids=["missing", "torn", "list", "newer", "no tasks", "half a task", "unknown key", "mistyped"],
)
def test_a_damaged_file_is_one_sentence(scene, tmp_path, change, parts):
    folder = tmp_path / "adapter"
    shutil.copytree(scene / "run-sft" / "adapter", folder)
    changed = change(read_json(folder / FILE_NAME))
    (folder / FILE_NAME).unlink()
    if changed is not None:
        text = changed if isinstance(changed, str) else json.dumps(changed)
        (folder / FILE_NAME).write_text(text)
    write_csv(tmp_path / "new.csv", tickets(1))
    message = fails(folder, tmp_path / "new.csv")
    assert str(folder / FILE_NAME) in message and all(part in message for part in parts), message


def modes(folder):
    return {p.name: stat.S_IMODE(p.stat().st_mode) for p in folder.rglob("*") if p.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_all_files_have_the_permissions_of_the_umask(tiny_model, tmp_path, mask, mode):
    recipe = write_recipe(tmp_path, tiny_model("llama"), output_dir=str(tmp_path / "run"), ppo={"critic": "adapter"})
    start = "import os, sys; os.umask(int(sys.argv[1])); "
    code = start + "from extensions.runs.main import main; sys.exit(main(sys.argv[2:], 'ppo'))"
    command = [sys.executable, "-c", code, str(mask), str(recipe), "evaluation.every_steps=1"]
    done = run_command(command)
    assert done.returncode == 0, done.stderr
    merged = [sys.executable, "-c", "import os, sys; os.umask(int(sys.argv[1])); from extensions.cli.main import app; "
              "app(sys.argv[2:])", str(mask), "merge", str(recipe), str(tmp_path / "merged"),
              f"model.adapter={tmp_path / 'run' / 'adapter'}"]  # fmt: skip
    done = run_command(merged)
    assert done.returncode == 0, done.stderr
    found = modes(tmp_path / "run") | modes(tmp_path / "merged")
    assert {"adapter_model.safetensors", "value_head.safetensors", "best.safetensors", "model.safetensors"} <= set(
        found
    )
    assert {name: value for name, value in found.items() if value != mode} == {}


# ---------------------------------------------------------------------------------------------------------- calibration


def test_a_temperature_is_fitted_stored_and_used(scene, predictor, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(scene / "run-sft", run)
    result = nlu(run, "--temperature", "auto")
    assert result.exit_code == 0 and "fitted on 9 validation rows: NLL" in result.stderr, result.output
    fitted = Manifest.load(run / "adapter").calibration["tickets"]
    assert fitted is not None and fitted != 1
    plain, again = predictor.predict(tickets(4), True), Predictor.load(run).predict(tickets(4), True)
    for one, other in zip(plain, again, strict=True):
        powers = {label: chance ** (1 / fitted) for label, chance in one.probabilities.items()}
        expected = {label: power / sum(powers.values()) for label, power in powers.items()}
        assert other.probabilities == pytest.approx(expected, rel=1e-6) and other.answer == one.answer
    assert Predictor.load(run).predict(tickets(4), True, temperature=1.0) == plain
    result = nlu(run, write_csv(tmp_path / "new.csv", tickets(1)))
    assert f"probabilities at temperature {fitted:.3f}" in result.stderr
    # Without the run there are no validation rows.
    alone = tmp_path / "alone"
    shutil.copytree(run / "adapter", alone)
    message = fails(alone, "--temperature", "auto")
    assert "no recipe.yaml" in message and "runs/NAME" in message
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(recipe.replace("validation.jsonl", "gone.jsonl"))
    assert "these cannot be read" in fails(run, "--temperature", "auto")


# --------------------------------------------------------------------------------------------------------------- python


def test_importing_the_package_loads_no_torch():
    code = "import sys, extensions; assert extensions.__version__; assert 'torch' not in sys.modules"
    done = run_command([sys.executable, "-c", code])
    assert done.returncode == 0, done.stderr
    with pytest.raises(ImportError):
        from extensions import Nothing  # noqa: F401


def test_answers_are_frozen_and_keep_the_order(predictor):
    rows = [tickets(4)[k] for k in (3, 0, 2, 1)]
    answers = predictor.predict(rows)
    assert [one.probabilities for one in answers] == [None] * 4
    assert answers == [predictor.predict([row])[0] for row in rows] or all(
        one.confidence == pytest.approx(predictor.predict([row])[0].confidence, rel=1e-5)
        for one, row in zip(answers, rows, strict=True)
    )
    with pytest.raises(AttributeError):
        answers[0].answer = "x"
    assert predictor.predict([]) == []
    lacking, _ = predictor.predict([{"subject": "a"}, rows[0]])
    assert lacking.answer is None and "'ticket body'" in lacking.error


def test_relative_paths_and_strings_are_taken(scene, monkeypatch):
    monkeypatch.chdir(scene)
    assert Predictor.load("run").location.folder == Path("run-sft/adapter")
    assert os.path.exists(Predictor.load("run-sft").location.recipe)


# ------------------------------------------------------------------------------------------------------------- the card


def card_blocks(adapter, language):
    text = (adapter / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"^(`{{3,}}){language}\n(.*?)\n\1$", text, re.MULTILINE | re.DOTALL)


def card_code(adapter):
    prompt, transformers_code, client = (code for _, code in card_blocks(adapter, "python"))
    return prompt, transformers_code, client


@pytest.mark.slow
def test_the_cards_code_answers_a_row(scene, predictor, tmp_path):
    """As it stands there, in the adapter's folder, without this project."""
    folder = scene / "run-sft" / "adapter"
    prompt, code, _ = card_code(folder)
    command = [sys.executable, "-P", "-c", f"{prompt}\n{code}\nimport sys\nassert 'extensions' not in sys.modules"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), cwd=folder)
    assert done.returncode == 0, done.stderr
    answer, confidence = done.stdout.split()
    (one,) = predictor.predict([{"subject": "your subject", "ticket body": "your ticket body"}])
    assert answer == one.answer and float(confidence) == pytest.approx(one.confidence, rel=1e-3)


def test_the_cards_prompt_is_that_of_the_training(scene, predictor):
    prompt, _, _ = card_code(scene / "run-sft" / "adapter")
    names = {}
    exec(prompt, names)
    row = {"subject": ' {body} \\ "', "ticket body": "a\nb {0} é"}
    task = predictor.manifest.task(None)
    fields = {"subject": row["subject"].strip(), "body": row["ticket body"]}
    assert names["prompt"](row) == predictor.encoder.encode(task, fields)[1]
    assert names["ANSWERS"] == LABELS


class Stub(BaseHTTPRequestHandler):
    """The answer of a vLLM server: the second of the choices, without the stop string."""

    asked: ClassVar[list] = []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append((self.path, self.headers["Content-Type"], body))
        text = body["structured_outputs"]["choice"][1].removesuffix(body["stop"][0])
        content = json.dumps({"choices": [{"text": text}]}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.mark.slow
def test_the_cards_client_asks_a_server(scene, predictor):
    folder = scene / "run-sft" / "adapter"
    prompt, _, client = card_code(folder)
    server = HTTPServer(("127.0.0.1", 0), Stub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        assert "http://localhost:8000/v1/completions" in client
        code = f"{prompt}\n{client}".replace("localhost:8000", f"127.0.0.1:{server.server_port}")
        done = run_command([sys.executable, "-c", code])
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert done.returncode == 0, done.stderr
    assert done.stdout == "Abuse/Spam\n"
    ((path, kind, body),) = Stub.asked
    assert path == "/v1/completions" and kind == "application/json"
    fields = {"subject": "your subject", "body": "your ticket body"}
    words = ("three", "abuse", "billing", "payment")
    longest = max(6, *(len(predictor.sampler.tokenizer(f"{word}{CLOSE}")["input_ids"]) for word in words))
    assert body == {
        "model": "tiny",
        "prompt": predictor.encoder.encode(predictor.manifest.task(None), fields)[1],
        "temperature": 0,
        "max_tokens": longest,
        "structured_outputs": {"choice": [f"{word}{CLOSE}" for word in words]},
        "stop": [CLOSE],
    }


def test_the_card_names_the_commands(scene, tiny_model):
    commands = [code for _, code in card_blocks(scene / "run-sft" / "adapter", "bash")]
    assert commands == [
        "nlu predict . new.csv --out answers.csv --probabilities",
        f"vllm serve {tiny_model('llama')} --enable-lora --max-lora-rank 8 --lora-modules tiny=.",
        "nlu merge recipe.yaml merged model.adapter=adapter\nhf upload YOUR_NAME/tiny adapter --private",
    ]
