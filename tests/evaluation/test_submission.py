"""Archives for the evaluation servers: contents, fallback labels, missing tasks, and the real test files."""

import json
import shutil
import zipfile
from collections import Counter
from dataclasses import asdict

import pytest
from servers import (
    ANSWERS,
    FALLBACKS,
    FILES,
    HEADER,
    LINES,
    MEMBERS,
    all_of,
    check_files,
    contents,
    every_suite,
    jsonl,
    legal,
    lines_of,
    my_rows,
    refused,
    relabelled,
    spans,
    suite_of,
    valid,
    written,
)

from extensions.common.errors import UserError
from extensions.data import load_examples
from extensions.evaluation.metrics import Prediction
from extensions.evaluation.submission import check_archive, make_archive, read_predictions
from extensions.tasks import SUITES, TASKS

# ------------------------------------------------------------------------------------------ what is in an archive


def test_these_are_the_tasks_and_files_of_the_suites():
    assert {suite: {task.name for task in tasks} for suite, tasks in SUITES.items()} == {
        suite: set(names) for suite, names in MEMBERS.items()
    }
    assert {name: TASKS[name].submission.file for name in FILES} == FILES


@pytest.mark.parametrize("name", FILES)
def test_files_are_those_that_the_server_expects(name, archives):
    file = FILES[name]
    archive, entries = archives[suite_of(file)]
    assert lines_of(file, contents(archive)[file]) == LINES[file]
    (entry,) = [entry for entry in entries if entry.task.name == name]
    written_rows = len(ANSWERS[name])  # answers of MultiRC, queries of ReCoRD
    assert (entry.rows, entry.fallbacks, entry.filled) == (written_rows, 0, False)


@every_suite
def test_an_archive_is_flat_and_holds_exactly_the_files_of_the_suite(suite, archives, official):
    archive, entries = archives[suite]
    with zipfile.ZipFile(archive) as opened:
        assert sorted(opened.namelist()) == sorted(FILES[name] for name in MEMBERS[suite])
    assert sorted(entry.task.name for entry in entries) == sorted(MEMBERS[suite])
    assert [path.name for path in archive.parent.iterdir() if path.suffix == ".tmp"] == []
    check_archive(archive, suite, str(official))
    check_archive(archive, suite, str(official / suite))


@every_suite
def test_the_same_predictions_give_the_same_bytes(suite, archives, rows, official, tmp_path, monkeypatch):
    """Independent of the date, and of the order and files of the lines."""
    monkeypatch.setattr("time.time", lambda: 1.9e9)
    (tmp_path / "run").mkdir()
    backwards = all_of(rows, suite)[::-1]
    written(tmp_path / "run" / "predictions_test.jsonl", backwards[::2])
    sources = [written(tmp_path / "rest.jsonl", backwards[1::2]), tmp_path / "run"]
    make_archive(sources, suite, tmp_path / "again.zip", str(official))
    assert (tmp_path / "again.zip").read_bytes() == archives[suite][0].read_bytes()


def test_predictions_of_other_tasks_are_left_out(rows, official, archives, tmp_path):
    own = Prediction("acceptability", 0, "", "1", None)
    with pytest.raises(UserError, match="line 1: unknown task 'acceptability'"):
        read_predictions([written(tmp_path / "own.jsonl", [asdict(own)])])
    both = written(tmp_path / "both.jsonl", all_of(rows, "superglue") + all_of(rows, "glue"))
    make_archive([both], "glue", tmp_path / "glue.zip", str(official))
    assert (tmp_path / "glue.zip").read_bytes() == archives["glue"][0].read_bytes()
    only = written(tmp_path / "only.jsonl", rows["copa"] + rows["wic"])
    message = refused([only], "glue", tmp_path / "glue.zip", fill="majority")
    assert message == "no predictions for glue; those found are for: copa, wic"


# ---------------------------------------------------------------------------------- wrong formats and missing tasks


@every_suite
def test_a_wrong_format_gets_the_fallback_label(suite, rows, official, tmp_path):
    changed = {name: [{**rows[name][0]}, {**rows[name][1], "answer": None}, *rows[name][2:]] for name in MEMBERS[suite]}
    source = written(tmp_path / "answers.jsonl", all_of(rows, suite, **changed))
    entries = make_archive([source], suite, tmp_path / "a.zip", str(official))
    make_archive([source], suite, tmp_path / "b.zip", str(official))
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    found = contents(tmp_path / "a.zip")
    for entry in entries:
        name, file = entry.task.name, FILES[entry.task.name]
        if name == "record":  # candidates are chosen by positive_probability, even with wrong formats
            assert lines_of(file, found[file]) == LINES[file] and entry.fallbacks == 0
        else:
            assert lines_of(file, found[file]) == relabelled(file, 1, FALLBACKS[name]), name
            assert (entry.fallbacks, entry.filled) == (1, False), name


def test_all_wrong_formats_are_counted(rows, official, tmp_path):
    nothing = [{**row, "answer": None} for row in all_of(rows, "glue")]
    source = written(tmp_path / "answers.jsonl", nothing)
    entries = make_archive([source], "glue", tmp_path / "a.zip", str(official))
    assert [(entry.rows, entry.fallbacks) for entry in entries] == [(3, 3)] * 11
    assert contents(tmp_path / "a.zip")["STS-B.tsv"] == f"{HEADER}\n0\t2.500\n1\t2.500\n2\t2.500\n"


@pytest.mark.parametrize(
    "answers, positive_probabilities, chosen",
    [
        pytest.param(["true"] * 3, [(1, 18.0), (1, 19.5), (1, 19.0)], "Bonn", id="log-odds, where probabilities are 1"),
        pytest.param(["true", "false", "false"], [0.2, 0.9, 0.5], "Bonn", id="the most probable, not the sampled"),
        pytest.param(["false"] * 3, [0.1, 0.2, 0.3], '"El Niño"', id="no Yes"),
        pytest.param([None] * 3, [0, 1, 0.5], "Bonn", id="wrong formats, whole numbers"),
        pytest.param(["true"] * 3, [0.1, 0.7, 0.7], "Bonn", id="a tie: the first in the text"),
        pytest.param(["false", "false", "true"], [0.5, 0.5, 0.5], "Zoë Müller", id="all tie: the first in the text"),
        pytest.param(["false", "true", None], [None] * 3, "Bonn", id="no positive_probability: Yes"),
        pytest.param([None, "true", "true"], [None] * 3, "Bonn", id="no positive_probability: the first Yes"),
        pytest.param(
            ["false", "false", None], [None] * 3, '"El Niño"', id="no positive_probability: a wrong format before No"
        ),
        pytest.param(
            ["false"] * 3, [None] * 3, "Zoë Müller", id="no positive_probability, no Yes: the first in the text"
        ),
        pytest.param(["false", "true", "false"], [0.9, None, 0.8], "Bonn", id="some positive_probability: all ignored"),
    ],
)
def test_the_answer_of_record_is_the_best_candidate(answers, positive_probabilities, chosen, rows, official, tmp_path):
    candidates = [
        {**row, "answer": answer, "positive_probability": probability}
        | (
            {"positive_probability": probability[0], "positive_log_odds": probability[1]}
            if isinstance(probability, tuple)
            else {}
        )
        for row, answer, probability in zip(rows["record"][:3], answers, positive_probabilities, strict=True)
    ]
    assert [row["kept"]["entity"] for row in candidates] == ["Zoë Müller", "Bonn", '"El Niño"']
    source = written(tmp_path / "answers.jsonl", candidates + rows["record"][3:])
    make_archive([source], "superglue", tmp_path / "a.zip", str(official), "majority")
    found = [json.loads(line) for line in contents(tmp_path / "a.zip")["ReCoRD.jsonl"].splitlines()]
    assert found == [{"idx": 8, "label": chosen}, {"idx": 6, "label": '"El Niño"'}, {"idx": 9, "label": "Elbe"}]


def test_an_entity_of_digits_stays_text(official, tmp_path):
    text = "Boeing built the 747 in Everett."
    shutil.copytree(official / "superglue", tmp_path / "superglue")
    record = {"passage": {"text": text, "entities": spans(text, "Boeing", "747")}, "idx": 0}
    record["qas"] = [{"query": "the big @placeholder", "idx": 0}]
    (tmp_path / "superglue" / "ReCoRD" / "test.jsonl").write_text(jsonl(record))
    examples = load_examples(TASKS["record"], "test", str(tmp_path))
    answers = [asdict(Prediction("record", e.index, "", "true", None, e.kept, float(e.index))) for e in examples]
    source = written(tmp_path / "answers.jsonl", answers)
    make_archive([source], "superglue", tmp_path / "a.zip", str(tmp_path), "majority")
    assert json.loads(contents(tmp_path / "a.zip")["ReCoRD.jsonl"]) == {"idx": 0, "label": "747"}


@every_suite
def test_missing_tasks_are_named(suite, rows, official, out, tmp_path):
    given_name, *missing = MEMBERS[suite]
    message = refused([written(tmp_path / "some.jsonl", rows[given_name])], suite, out, data_root=str(official))
    assert message.startswith("no predictions for ") and "--fill majority" in message
    assert set(message.partition("no predictions for ")[2].partition(";")[0].split(", ")) == set(missing)


@every_suite
def test_missing_tasks_are_filled(suite, rows, official, tmp_path):
    given_name, *missing = MEMBERS[suite]
    source = written(tmp_path / "some.jsonl", rows[given_name])
    entries = make_archive([source], suite, tmp_path / "a.zip", str(official / suite), "majority")
    assert [(e.task.name, e.rows, e.fallbacks) for e in entries if e.filled] == [
        (task.name, len(ANSWERS[task.name]), 0) for task in SUITES[suite] if task.name in missing
    ]
    found = contents(tmp_path / "a.zip")
    assert lines_of(FILES[given_name], found[FILES[given_name]]) == LINES[FILES[given_name]]
    check_archive(tmp_path / "a.zip", suite, str(official))
    for name in missing:
        file, lines = FILES[name], lines_of(FILES[name], found[FILES[name]])
        if name == "record":  # the first entity in the text
            firsts = [(8, "Zoë Müller"), (6, "Zoë Müller"), (9, "Rhine")]
            assert [(one["idx"], one["label"]) for one in map(json.loads, lines)] == firsts
        else:
            assert {label for _, label in my_rows(file, found[file])} == {FALLBACKS[name]}
            assert [row for row, _ in my_rows(file, found[file])] == [row for row, _ in my_rows(file, valid(file))]


@pytest.mark.slow
def test_without_the_files_official_sizes_are_filled(tmp_path, monkeypatch):
    """GLUE's row numbers are 0 to n - 1."""
    monkeypatch.chdir(tmp_path)
    sizes = {"CoLA.tsv": 1063, "SST-2.tsv": 1821, "MRPC.tsv": 1725, "STS-B.tsv": 1379, "QNLI.tsv": 5463}
    sizes |= {"MNLI-m.tsv": 9796, "MNLI-mm.tsv": 9847, "RTE.tsv": 3000, "WNLI.tsv": 146, "AX.tsv": 1104}
    sizes |= {"QQP.tsv": 390965}
    source = written(tmp_path / "wnli.jsonl", [asdict(Prediction("wnli", i, "", "1", None)) for i in range(146)])
    entries = make_archive([source], "glue", tmp_path / "a.zip", None, "majority")
    found = contents(tmp_path / "a.zip")
    assert {name: text.count("\n") - 1 for name, text in found.items()} == sizes
    assert {entry.task.submission.file: entry.rows for entry in entries} == sizes
    for name in set(sizes) - {"QQP.tsv"}:
        assert [number for number, _ in my_rows(name, found[name])] == list(range(sizes[name]))
    assert found["WNLI.tsv"] == f"{HEADER}\n" + "".join(f"{i}\t1\n" for i in range(146))


@pytest.mark.parametrize("absent", ["MultiRC", "ReCoRD"])
def test_nested_tasks_cannot_be_filled_without_their_file(absent, rows, official, out, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(official / "superglue", tmp_path / "superglue")
    shutil.rmtree(tmp_path / "superglue" / absent)
    source = written(tmp_path / "copa.jsonl", rows["copa"])
    for data_root in (str(tmp_path), None):
        message = refused([source], "superglue", out, data_root=data_root, fill="majority")
        expected = absent if data_root else "MultiRC"
        assert f"--data-root with {expected}/test.jsonl" in message and "nested" in message


# ---------------------------------------------------------------------------------------------------- real files

REAL = {
    "glue": {"cola": 1063, "sst2": 1821, "stsb": 1379, "qnli": 5463, "rte": 3000, "wnli": 146, "ax": 1104},
    "superglue": {
        "boolq": 3245,
        "cb": 250,
        "copa": 500,
        "multirc": 9693,
        "superglue_rte": 3000,
        "wic": 1400,
        "axb": 1104,
    },
}


@pytest.mark.slow
@every_suite
def test_constant_answers_to_the_real_files(suite, data_root, tmp_path):
    """The other tasks' files are incomplete or absent; these tasks are filled."""
    records = []
    for name in REAL[suite]:
        task = TASKS[name]
        answer = 1.5 if name == "stsb" else list(task.labels)[-1]
        examples = load_examples(task, "test", str(data_root))
        records += [asdict(Prediction(name, e.index, "", answer, e.label, e.kept)) for e in examples]
    source = written(tmp_path / "answers.jsonl", records)
    entries = make_archive([source], suite, tmp_path / "a.zip", str(data_root / suite), "majority")
    check_archive(tmp_path / "a.zip", suite, str(data_root))
    assert {entry.task.name: entry.rows for entry in entries if not entry.filled} == REAL[suite]
    found = contents(tmp_path / "a.zip")
    for name, count in REAL[suite].items():
        file = FILES[name]
        mine = my_rows(file, found[file])
        labels = Counter(label for _, label in mine)
        assert len(mine) == count and len(labels) == 1, name
        assert all(legal(file, row, label) for row, label in mine[:1])
        if name == "multirc":
            assert len({passage for (passage, _, _), _ in mine}) == 166 == found[file].count("\n")
        else:
            assert [number for number, _ in mine] == list(range(count)), name
    # The official sizes are those of these files.
    alone = {FILES[name]: found[FILES[name]] for name in REAL[suite]}
    missing = [f"{FILES[name]}: is missing" for name in MEMBERS[suite] if name not in REAL[suite]]
    assert sorted(check_files(alone, suite)) == sorted(missing)
    assert sorted(check_files(alone, suite, str(data_root))) == sorted(missing)
