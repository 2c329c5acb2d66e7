"""Reading predictions for a submission: malformed lines, duplicate rows, missing sources."""

import json
import math

import pytest
from servers import all_of, contents, refused, written

from extensions.common.errors import UserError
from extensions.evaluation.metrics import Prediction
from extensions.evaluation.submission import check_archive, make_archive, read_predictions

# --------------------------------------------------------------------------------------------------- predictions

GOOD = {"task": "cola", "index": 0, "response": "Yes</Judgement>", "answer": "1", "gold": None, "kept": {"idx": 0}}
SCORE = {**GOOD, "task": "stsb", "answer": 2.5}
KEPT = {"passage": 4, "query": 8, "entity": "Bonn", "answers": []}
CANDIDATE = {**GOOD, "task": "record", "answer": "true", "kept": KEPT, "positive_probability": 0.5}
PART = {**GOOD, "task": "multirc", "kept": {"paragraph": 7, "question": 2, "answer": 5}}
MALFORMED = [
    ("no JSON", "{'task': 'cola'}", "expected an object"),
    ("half a line", json.dumps(GOOD)[:-9], "expected an object"),
    ("a list", "[]", "expected an object"),
    ("text", '"task"', "expected an object"),
    ("null", "null", "expected an object"),
    ("a number", "7", "expected an object"),
    ("5000 deep", "[" * 5000, "expected an object"),
    *(
        (f"no {key}", {k: v for k, v in GOOD.items() if k != key}, f"KeyError('{key}')")
        for key in ("task", "index", "answer")
    ),
    ("an unknown task", {**GOOD, "task": "CoLA"}, "unknown task 'CoLA'; allowed: "),
    ("an own task", {**GOOD, "task": "acceptability"}, "unknown task 'acceptability'"),
    ("a task that is a list", {**GOOD, "task": ["cola"]}, "unknown task ['cola']"),
    ("a task that is nothing", {**GOOD, "task": None}, "unknown task None"),
    ("a negative index", {**GOOD, "index": -1}, "index -1"),
    ("a boolean index", {**GOOD, "index": True}, "index True"),
    ("an index 1.0", {**GOOD, "index": 1.0}, "index 1.0"),
    ("an index of text", {**GOOD, "index": "1"}, "index '1'"),
    ("no index", {**GOOD, "index": None}, "index None"),
    ("a word for a label", {**GOOD, "answer": "Yes"}, "answer 'Yes'; allowed for cola: 1, 0, or null"),
    ("a number for a label", {**GOOD, "answer": 1}, "answer 1;"),
    ("true for a label", {**GOOD, "answer": True}, "answer True;"),
    ("a list for a label", {**GOOD, "answer": ["1"]}, "answer ['1'];"),
    ("an object for a label", {**GOOD, "answer": {}}, "answer {};"),
    ("an empty label", {**GOOD, "answer": ""}, "answer '';"),
    ("a score above the range", {**SCORE, "answer": 5.01}, "answer 5.01; allowed for stsb: a number from 0 to 5"),
    ("a score below the range", {**SCORE, "answer": -1}, "answer -1;"),
    ("a score nan", {**SCORE, "answer": math.nan}, "answer nan;"),
    ("a score inf", {**SCORE, "answer": math.inf}, "answer inf;"),
    ("a score of text", {**SCORE, "answer": "2.5"}, "answer '2.5';"),
    ("a score true", {**SCORE, "answer": True}, "answer True;"),
    ("kept is missing", {k: v for k, v in PART.items() if k != "kept"}, "must hold paragraph, question, answer"),
    ("kept is null", {**PART, "kept": None}, "`kept` must hold paragraph, question, answer for multirc"),
    ("kept is null without need", {**GOOD, "kept": None}, "`kept` must hold idx for cola"),
    ("kept is a list", {**PART, "kept": ["paragraph", "question", "answer"]}, "`kept` must hold"),
    ("kept is text", {**PART, "kept": "paragraph question answer"}, "`kept` must hold"),
    ("kept is a number", {**CANDIDATE, "kept": 3}, "`kept` must hold passage, query, entity, answers for record"),
    ("kept lacks a key", {**PART, "kept": {"paragraph": 7, "question": 2}}, "`kept` must hold"),
    ("kept lacks the pair", {**GOOD, "task": "axg", "answer": "entailment"}, "`kept` must hold idx, pair for axg"),
    ("a row number of text", {**GOOD, "kept": {"idx": "a"}}, "`kept` has 'a', expected row numbers"),
    ("a row number that is a list", {**GOOD, "kept": {"idx": [0]}}, "`kept` has [0], expected row numbers"),
    ("a negative row number", {**GOOD, "kept": {"idx": -1}}, "`kept` has -1, expected row numbers"),
    ("a boolean row number", {**GOOD, "kept": {"idx": True}}, "`kept` has True, expected row numbers"),
    ("a question of text", {**PART, "kept": {**PART["kept"], "question": "2"}}, "`kept` has (7, '2', 5)"),
    ("a query that is a list", {**CANDIDATE, "kept": {**KEPT, "query": [8]}}, "`kept` has [8]"),
    ("an empty entity", {**CANDIDATE, "kept": {**KEPT, "entity": " "}}, "the entity ' '"),
    ("an entity that is nothing", {**CANDIDATE, "kept": {**KEPT, "entity": None}}, "the entity None"),
    ("half a surrogate pair", json.dumps({**CANDIDATE, "kept": {**KEPT, "entity": "\ud800"}}), "the entity '\\ud800'"),
    (
        "a positive_probability of text",
        {**CANDIDATE, "positive_probability": "0.5"},
        "positive_probability '0.5' is not a probability",
    ),
    ("a positive_probability nan", {**CANDIDATE, "positive_probability": math.nan}, "positive_probability nan"),
    ("a positive_probability inf", {**CANDIDATE, "positive_probability": math.inf}, "positive_probability inf"),
    ("a positive_probability above 1", {**CANDIDATE, "positive_probability": 1.5}, "positive_probability 1.5"),
    ("a positive_probability below 0", {**CANDIDATE, "positive_probability": -0.5}, "positive_probability -0.5"),
    ("a positive_probability true", {**CANDIDATE, "positive_probability": True}, "positive_probability True"),
    ("positive_log_odds inf", {**CANDIDATE, "positive_log_odds": math.inf}, "positive_log_odds inf is not a finite"),
    ("positive_log_odds of text", {**CANDIDATE, "positive_log_odds": "1"}, "positive_log_odds '1' is not a finite"),
    (
        "a positive_probability that is a list",
        {**CANDIDATE, "positive_probability": [0.5]},
        "positive_probability [0.5]",
    ),
]


@pytest.mark.parametrize("line, part", [row[1:] for row in MALFORMED], ids=[row[0] for row in MALFORMED])
@pytest.mark.parametrize("earlier", [False, True], ids=["no archive", "an earlier archive"])
def test_malformed_predictions_are_named_and_nothing_is_written(line, part, earlier, out, tmp_path):
    if earlier:
        out.write_bytes(b"of last week")
    source = tmp_path / "answers.jsonl"
    first = {**GOOD, "index": 9, "kept": {"idx": 9}}
    source.write_text(f"{json.dumps(first)}\n\n{line if isinstance(line, str) else json.dumps(line)}\n", "utf-8")
    message = refused([source], "glue", out, fill="majority")
    assert message.startswith(f"{source}, line 3: ") and part in message


def test_valid_predictions_are_read(tmp_path):
    """The unchanged lines of the table above; `kept` and `text` may be missing if they are not needed."""
    short = {"task": "cola", "index": 1, "answer": None}
    source = written(tmp_path / "answers.jsonl", [GOOD, SCORE, CANDIDATE, PART, short, {**SCORE, "index": 7}])
    found = read_predictions([source])
    assert {name: [p.index for p in predictions] for name, predictions in found.items()} == {
        "cola": [0, 1],
        "stsb": [0, 7],
        "record": [0],
        "multirc": [0],
    }
    assert found["record"] == [Prediction("record", 0, GOOD["response"], "true", None, KEPT, 0.5)]
    assert found["cola"][1] == Prediction("cola", 1, "", None, None)


def test_a_row_that_is_answered_twice_is_named(out, tmp_path):
    first = written(tmp_path / "a.jsonl", [GOOD, {**GOOD, "index": 1}])
    second = written(tmp_path / "b.jsonl", [SCORE, {**GOOD, "answer": "0"}])
    for sources, where in (([first, second], f"{second}, line 2"), ([first, first], f"{first}, line 1")):
        assert refused(sources, "glue", out, fill="majority") == f"{where}: row 0 of cola is answered twice"


def test_sources_without_predictions_are_named(out, tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "latin.jsonl").write_bytes(b'{"task": "caf\xe9"}\n')
    (tmp_path / "run").mkdir()
    for name, part in (
        ("nowhere.jsonl", "nowhere.jsonl: no such file"),
        ("run", "predictions_test.jsonl: no such file; run with evaluation.predict_test=true"),
        ("empty.jsonl", "empty.jsonl: no predictions"),
        ("latin.jsonl", "latin.jsonl: cannot be read as UTF-8"),
    ):
        assert part in refused([tmp_path / name], "glue", out, fill="majority")


@pytest.mark.parametrize(
    "name, change, part",
    [
        ("cola", lambda rows: rows[:-1], "CoLA.tsv: row 2 missing"),
        ("rte", lambda rows: [{**rows[0], "index": 5, "kept": {"idx": 5}}, *rows[1:]], "RTE.tsv: row 0 missing"),
        ("ax", lambda rows: [*rows, {**rows[0], "index": 3, "kept": {}}], "AX.tsv: row 3 not in the test set"),
        ("mrpc", lambda rows: [*rows, {**rows[0], "index": 3}], "MRPC.tsv: row 0 more than once"),
    ],
)
def test_predictions_of_other_rows_leave_an_earlier_archive_alone(name, change, part, rows, official, out, tmp_path):
    whole = written(tmp_path / "whole.jsonl", all_of(rows, "glue"))
    make_archive([whole], "glue", out, str(official))
    source = written(tmp_path / "answers.jsonl", all_of(rows, "glue", **{name: change(rows[name])}))
    message = refused([source], "glue", out, data_root=str(official))
    assert message.startswith("glue submission: ") and part in message
    check_archive(out, "glue", str(official))


def test_some_candidates_of_a_record_query_suffice(rows, official, tmp_path):
    """An evaluation may omit candidates; a query without any counts as missing."""
    source = written(tmp_path / "a.jsonl", [rows["record"][k] for k in (1, 4, 6)])
    make_archive([source], "superglue", tmp_path / "a.zip", str(official), "majority")
    found = [json.loads(line)["label"] for line in contents(tmp_path / "a.zip")["ReCoRD.jsonl"].splitlines()]
    assert found == ["Bonn", "Bonn", "Rhine"]
    source = written(tmp_path / "b.jsonl", rows["record"][3:])
    message = refused([source], "superglue", tmp_path / "a.zip", data_root=str(official), fill="majority")
    assert "ReCoRD.jsonl: row 8 missing" in message


def test_an_archive_that_cannot_be_written(rows, official, tmp_path):
    source = written(tmp_path / "answers.jsonl", all_of(rows, "glue"))
    (tmp_path / "folder").mkdir()
    for target, part in (
        (tmp_path / "folder", "is a folder"),
        (tmp_path / "nowhere" / "a.zip", "nowhere/a.zip: cannot be written (No such file"),
        (source / "a.zip", "cannot be written (Not a directory"),
    ):
        with pytest.raises(UserError) as caught:
            make_archive([source], "glue", target, str(official))
        assert part in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl", "folder"]


def test_a_full_disk_leaves_the_earlier_archive(rows, official, out, tmp_path, monkeypatch):
    source = written(tmp_path / "answers.jsonl", all_of(rows, "glue"))
    make_archive([source], "glue", out, str(official))

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    assert (
        refused([source], "glue", out, data_root=str(official)) == f"{out}: cannot be written (No space left on device)"
    )
    check_archive(out, "glue", str(official))
