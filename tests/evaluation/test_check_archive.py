"""Archives that `nlu submit --check` refuses, and property tests of damaged files and archives."""

import json
import zipfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from servers import (
    HEADER,
    LINES,
    MEMBERS,
    VOCABULARY,
    all_of,
    contents,
    legal,
    my_rows,
    problems_of,
    refused,
    texts,
    valid,
    written,
    zipped,
)

from extensions.common.errors import UserError
from extensions.evaluation.submission import check_archive


def refused_archive(path, suite, official):
    with pytest.raises(UserError) as caught:
        check_archive(path, suite, str(official))
    return str(caught.value)


def test_missing_files_are_named(official, tmp_path):
    for suite in MEMBERS:
        for file in texts(suite):
            files = texts(suite)
            del files[file]
            message = refused_archive(zipped(tmp_path / "a.zip", files), suite, official)
            assert message.split("\n")[1:] == [f"  {file}: is missing"]


@pytest.mark.parametrize("name", ["more.tsv", "__MACOSX/._CoLA.tsv", "CoLA.tsv ", "cola.tsv", "AX-b.jsonl", "folder/"])
def test_other_files_are_named(name, official, tmp_path):
    path = zipped(tmp_path / "a.zip", texts("glue") | {name: ""})
    assert f"  {name}: is no file of a glue submission" in refused_archive(path, "glue", official)


def test_files_in_a_folder_are_refused(official, tmp_path):
    path = zipped(tmp_path / "a.zip", {f"submission/{name}": text for name, text in texts("glue").items()})
    message = refused_archive(path, "glue", official)
    assert "22 problem(s)" in message
    assert "  CoLA.tsv: is missing" in message and "submission/CoLA.tsv: is no file of a glue submission" in message


def test_a_duplicate_file_is_refused(official, tmp_path):
    path = zipped(tmp_path / "a.zip", texts("glue"))
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("RTE.tsv", texts("glue")["RTE.tsv"])
    assert refused_archive(path, "glue", official).split("\n")[1:] == ["  RTE.tsv: is in the archive twice"]


def test_the_archive_of_the_other_suite_is_refused(official, archives):
    message = refused_archive(archives["glue"][0], "superglue", official)
    assert "BoolQ.jsonl: is missing" in message and "CoLA.tsv: is no file of a superglue submission" in message


@pytest.mark.parametrize("text, line", [(b"0\t1\n1\t\xe9\n2\t1\n", 3), (b"\xff\xfe0", 2)], ids=["latin-1", "utf-16"])
def test_other_encodings_are_refused(text, line, official, tmp_path):
    files = {**texts("glue"), "CoLA.tsv": f"{HEADER}\n".encode() + text}
    message = refused_archive(zipped(tmp_path / "a.zip", files), "glue", official)
    assert str(tmp_path / "a.zip") in message and f"CoLA.tsv, line {line}: not valid UTF-8" in message


def test_a_file_that_is_no_zip_archive_is_refused(official, tmp_path):
    (tmp_path / "empty.zip").write_bytes(b"")
    (tmp_path / "text.zip").write_text(texts("glue")["CoLA.tsv"])
    for path in (tmp_path / "nowhere.zip", tmp_path, tmp_path / "empty.zip", tmp_path / "text.zip"):
        message = refused_archive(path, "glue", official)
        assert message.startswith(f"{path}: cannot be read as a zip archive")


def test_an_encrypted_archive_is_refused(official, tmp_path):
    path = zipped(tmp_path / "a.zip", texts("glue"))
    raw = bytearray(path.read_bytes())
    for mark, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        raw[raw.index(mark) + flags] |= 1
    path.write_bytes(raw)
    assert "encrypted" in refused_archive(path, "glue", official)


def test_a_data_root_that_is_no_folder_is_refused(archives, official, rows, out, tmp_path):
    for wrong in (tmp_path / "nowhere", archives["glue"][0]):
        assert f"{str(wrong)!r} is not a folder" in refused_archive(archives["glue"][0], "glue", wrong)
        source = written(tmp_path / "answers.jsonl", all_of(rows, "glue"))
        assert f"{str(wrong)!r} is not a folder" in refused([source], "glue", out, data_root=str(wrong))


def test_a_broken_official_file_is_a_problem(official, tmp_path):
    (tmp_path / "glue" / "RTE").mkdir(parents=True)
    (tmp_path / "glue" / "RTE" / "test.tsv").write_text("index\tsentence1\tsentence2\n0\tAnna slept.\n")
    (problem,) = problems_of("RTE.tsv", valid("RTE.tsv"), tmp_path)
    assert "RTE/test.tsv, line 2: 2 columns, expected 3" in problem


# Mutations of a valid file: replaced text, deleted, repeated or moved lines, other JSON.
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["true", "0", "entailment", "Elbe", ""]),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["idx", "label", "passage", "questions", "answers"]), inner, max_size=3)
    ),
    max_leaves=5,
)
PIECES = st.text(max_size=3) | st.sampled_from(
    ["\t", "\n", "\r", "\r\n", '"', "}", "{", "0", "1", "nan", "True", "true", "\ufeff", "\x00", " ", "[", "-", "."]
)


@st.composite
def changed_files(draw):
    file = draw(st.sampled_from(sorted(LINES)))
    text = valid(file)
    for _ in range(draw(st.integers(1, 3))):
        lines = text.split("\n")
        here, there = (draw(st.integers(0, len(lines) - 1)) for _ in range(2))
        kind = draw(st.sampled_from(["piece", "piece", "label", "delete", "repeat", "move", "json", "whole"]))
        if kind == "piece":
            start = draw(st.integers(0, len(text)))
            stop = draw(st.integers(start, min(len(text), start + 8)))
            text = text[:start] + draw(PIECES) + text[stop:]
            continue
        if kind == "whole":
            text = draw(st.text(max_size=60))
            continue
        if kind == "label":
            if file == "STS-B.tsv":
                new = str(draw(st.floats(-1, 6)))
            else:
                new = str(draw(st.sampled_from(sorted(VOCABULARY.get(file) or {"Elbe", "Rhine", "Bonn"}))))
            label = lines[here].split("\t")[-1] if file.endswith(".tsv") else lines[here].split(":")[-1].strip('"}]')
            lines[here] = lines[here].replace(label, new)
        elif kind == "delete":
            del lines[here]
        elif kind == "repeat":
            lines.insert(there, lines[here])
        elif kind == "move":
            lines[here], lines[there] = lines[there], lines[here]
        else:
            label = draw(JSON)
            lines[here] = json.dumps(draw(st.sampled_from([label, {"idx": 1, "label": label}, {"idx": label}])))
        text = "\n".join(lines)
    return file, text


@settings(max_examples=400)
@given(changed_files())
def test_every_change_is_detected(official, change):
    """No exception; and without a problem, the server reads the same rows with valid labels."""
    file, text = change
    problems = problems_of(file, text, official)
    if problems:
        assert text != valid(file)
        assert all(problem.startswith(file) for problem in problems)
        return
    found = my_rows(file, text if text.endswith("\n") else f"{text}\n")
    assert [row for row, _ in found] == [row for row, _ in my_rows(file, valid(file))]
    assert all(type(part) is int for row, _ in found for part in (row if isinstance(row, tuple) else (row,)))
    assert all(legal(file, row, label) for row, label in found)


@given(st.data())
def test_a_damaged_archive_is_refused_or_intact(official, archives, tmp_path_factory, data):
    raw = bytearray(archives["superglue"][0].read_bytes())
    start = data.draw(st.integers(0, len(raw)))
    raw[start : start + data.draw(st.integers(0, 40))] = data.draw(st.binary(max_size=20))
    path = tmp_path_factory.getbasetemp() / "damaged.zip"
    path.write_bytes(raw)
    try:
        check_archive(path, "superglue", str(official))
    except UserError as error:
        assert str(error).startswith(f"{path}: ")
    else:
        assert contents(path) == contents(archives["superglue"][0])
