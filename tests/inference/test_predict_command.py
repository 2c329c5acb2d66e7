"""`nlu predict` on the command line."""

import json
import math
import shutil
import subprocess

import pyarrow
import pyarrow.parquet
import pytest
from predict_cli import LABELS, fails, nlu, table, tickets, write_csv
from support import environment, run_command

from extensions import Predictor
from extensions.common.files import read_json, write_json
from extensions.inference.manifest import FILE_NAME


@pytest.mark.slow
def test_csv_to_csv(workspace, predictor, tmp_path):
    rows = tickets(50)
    source, out = write_csv(tmp_path / "new.csv", rows), tmp_path / "answers.csv"
    done = run_command(["nlu", "predict", str(workspace / "run"), str(source), "--out", str(out), "--probabilities"])
    assert done.returncode == 0, done.stderr
    assert "run is not there; answering with" in done.stderr and "50 rows in" in done.stderr
    header, *found = table(out.read_text(encoding="utf-8"))
    assert header == ["id", "subject", "ticket body", "answer", "confidence", *(f"p({label})" for label in LABELS)]
    assert [row[:3] for row in found] == [[row["id"], row["subject"], row["ticket body"]] for row in rows]
    expected = predictor.predict(rows, True)
    for row, one in zip(found, expected, strict=True):
        probabilities = list(map(float, row[5:]))
        assert row[3] == one.answer and float(row[4]) == pytest.approx(one.confidence, abs=1e-5)
        assert sum(probabilities) == pytest.approx(1, abs=2e-6) and max(probabilities) == float(row[4])


@pytest.mark.slow
def test_standard_input_to_standard_output(workspace, tmp_path):
    """In a pipe, standard output has only the table; CSV and JSONL."""
    source = write_csv(tmp_path / "new.csv", tickets(3))
    lines = "".join(json.dumps(row) + "\n" for row in tickets(3))
    answers = []
    for content, options in ((source.read_text(encoding="utf-8"), []), (lines, ["-", "--format", "jsonl"])):
        command = ["nlu", "predict", str(workspace / "run-sft"), *options]
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


@pytest.mark.slow
def test_parquet_keeps_its_types(workspace, tmp_path):
    rows = pyarrow.table(
        {
            "id": pyarrow.array([7, None], pyarrow.int16()),
            "subject": ["a", "b"],
            "ticket body": pyarrow.array(["one", "two"], pyarrow.large_string()),
            "when": pyarrow.array([1, 2], pyarrow.timestamp("ms")),
        }
    )
    pyarrow.parquet.write_table(rows, tmp_path / "new.parquet")
    result = nlu(workspace / "run-sft", tmp_path / "new.parquet", "--out", tmp_path / "out.parquet")
    assert result.exit_code == 0, result.output
    found = pyarrow.parquet.read_table(tmp_path / "out.parquet")
    assert found.select(rows.column_names).equals(rows) and found.schema.field("id").type == pyarrow.int16()
    assert found.column_names[4:] == ["answer", "confidence"]
    as_text = nlu(workspace / "run-sft", tmp_path / "new.parquet")
    assert [row[0] for row in table(as_text.stdout)] == ["id", "7", ""]


def test_malformed_rows_get_errors(workspace, tmp_path):
    source = tmp_path / "new.csv"
    body = "ticket body"
    source.write_text(f'id,subject,{body}\n1,a,text\n2,,text\n3,a,"   "\n4,too,many,cells\n5,a,text\n')
    result = nlu(workspace / "run-sft", source, "--out", tmp_path / "out.csv")
    assert result.exit_code == 0, result.output
    assert "3 of 5 rows have no answer; see the column 'error'" in result.stderr
    header, *rows = table((tmp_path / "out.csv").read_text())
    assert header == ["id", "subject", body, "answer", "confidence", "error"]
    assert [row[0] for row in rows] == ["1", "2", "3", "4", "5"]
    assert rows[0][3] == rows[4][3] != "" and rows[0][5] == rows[4][5] == ""
    assert rows[2][2] == "   ", "the cell is unchanged"
    assert [bool(row[3]) for row in rows] == [True, False, False, False, True]
    for row, part in zip(
        rows[1:4], ("'subject': expected text", f"{body!r}: expected text", "4 columns, expected 3"), strict=True
    ):
        assert part in row[5]


def test_labels_in_the_input_are_scored(workspace, predictor, tmp_path):
    rows = tickets(9)
    answers = [one.answer for one in predictor.predict(rows)]
    for row, answer in zip(rows, answers, strict=True):
        row["team"] = answer
    rows[0]["team"] = next(label for label in LABELS if label != answers[0])
    rows[8]["team"] = "no such team"
    path = tmp_path / "labelled.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = nlu(workspace / "run-sft", path, "--out", tmp_path / "out.jsonl")
    assert "1 rows without a label of the task" in result.stdout
    assert "accuracy" in result.stdout and f"{100 * 7 / 8:.1f}" in result.stdout
    assert "most frequent confusion" in result.stdout and "(1)" in result.stdout
    known = predictor.predict(rows[:8], True)
    nll = -sum(math.log(one.probabilities[row["team"]]) for one, row in zip(known, rows[:8], strict=True)) / 8
    assert f"probabilities: log loss {nll:.3f} nats" in result.stdout
    assert "p(3)" not in (tmp_path / "out.jsonl").read_text(), "probabilities are written only on request"


def test_one_row_by_text(workspace, predictor):
    (one,) = predictor.predict([{"subject": "Refund", "ticket body": "a=b"}], True)
    result = nlu(workspace / "run-sft", "--text", "subject=Refund", "--text", "body=a=b")
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
def test_error_messages(workspace, tmp_path, arguments, parts):
    places = {"run": workspace / "run-sft", "new": tmp_path / "new.csv", "folder": tmp_path}
    places |= {"wrong": tmp_path / "wrong.csv", "twice": tmp_path / "twice.csv"}
    write_csv(places["new"], tickets(2))
    places["wrong"].write_text("id,text,subject\n1,a,b\n")
    places["twice"].write_text("subject,ticket body,answer,confidence\na,b,c,d\n")
    message = fails(*(argument.format(**places) for argument in arguments))
    assert all(part in message for part in parts), message


def test_prefix_avoids_a_name_clash(workspace, tmp_path):
    (tmp_path / "new.csv").write_text("subject,ticket body,answer\na,b,mine\n")
    result = nlu(workspace / "run-sft", tmp_path / "new.csv", "--prefix", "model_")
    header, row = table(result.stdout)
    assert header == ["subject", "ticket body", "answer", "model_answer", "model_confidence"] and row[2] == "mine"


def test_a_csv_keeps_its_dialect(workspace, tmp_path):
    """Separator, byte order mark, a CR in a cell; a row with too many cells keeps those that have a column."""
    import pandas

    new, out = tmp_path / "new.csv", tmp_path / "out.csv"
    new.write_bytes('\ufeffid;subject;ticket body\n1;a,b;"x\ry"\n2;c;d;e\n'.encode())
    assert nlu(workspace / "run-sft", new, "--out", out).exit_code == 0
    assert out.read_bytes().startswith("\ufeffid;subject;ticket body;answer;confidence;error\n".encode())
    found = pandas.read_csv(out, sep=";", dtype=str, keep_default_na=False, encoding="utf-8-sig")
    assert found["subject"].tolist() == ["a,b", "c"] and found["ticket body"].tolist() == ["x\ry", "d"]
    assert found["answer"][0] in LABELS and found["answer"][1] == "" and "4 columns, expected 3" in found["error"][1]


def test_a_file_is_read_like_the_training_files(workspace, tmp_path, tiny_model):
    """If quotes are plain characters in the training files, they are so in the input and the output."""
    folder = tmp_path / "adapter"
    shutil.copytree(workspace / "run-sft" / "adapter", folder)
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


def test_the_suffix_decides_the_format(workspace, tmp_path):
    new = write_csv(tmp_path / "new.csv", tickets(3))
    result = nlu(workspace / "run-sft", new, "--format", "jsonl")
    assert [json.loads(line)["id"] for line in result.stdout.splitlines()] == ["000", "001", "002"]
