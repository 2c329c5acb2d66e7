"""Files of a submission: round trips, and every error that the check reports."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from servers import (
    FILES,
    HEADER,
    LINES,
    VOCABULARY,
    check_files,
    my_rows,
    problems_of,
    relabelled,
    suite_of,
    table,
    texts,
    valid,
    zipped,
)

from extensions.common.errors import UserError
from extensions.evaluation.server_files import decode, encode
from extensions.evaluation.submission import check_archive
from extensions.tasks import TASKS

# ------------------------------------------------------------------------------------------------------ formats


WORDS = st.text(st.characters(exclude_characters="\t\r\n", exclude_categories=("Cs",)), max_size=8)
WHOLE = st.integers(0, 10**15)


@given(st.lists(st.tuples(WHOLE, WORDS)))
def test_tsv_round_trip(given_rows):
    task = TASKS["cola"]
    assert decode(task, encode(task, given_rows)) == given_rows


@given(st.lists(st.tuples(WHOLE, st.text() | st.integers()), min_size=1))
def test_jsonl_round_trip(given_rows):
    for name in ("boolq", "copa", "record"):
        back = decode(TASKS[name], encode(TASKS[name], given_rows))
        assert back == given_rows
        assert all(
            type(a) is type(b) for pair in zip(back, given_rows, strict=True) for a, b in zip(*pair, strict=True)
        )


NESTED = st.dictionaries(
    WHOLE,
    st.dictionaries(
        WHOLE,
        st.lists(st.tuples(WHOLE, st.sampled_from([0, 1])), min_size=1, max_size=3, unique_by=lambda x: x[0]),
        min_size=1,
        max_size=3,
    ),
    min_size=1,
    max_size=3,
)


@given(NESTED)
def test_nested_jsonl_round_trip(passages):
    given_rows = [
        ((passage, question, answer), label)
        for passage, questions in passages.items()
        for question, answers in questions.items()
        for answer, label in answers
    ]
    text = encode(TASKS["multirc"], given_rows)
    assert decode(TASKS["multirc"], text) == my_rows("MultiRC.jsonl", text) == given_rows


# ---------------------------------------------------------------------------------------------------- validation


@pytest.mark.parametrize("file", LINES)
def test_every_allowed_label_is_accepted(file, official):
    assert problems_of(file, valid(file), official) == []
    numbers = [row for row, _ in my_rows(file, valid(file))]
    options = {
        "STS-B.tsv": ["0", "5", "0.000", "5.000", "4.9999", "3.2e-05"],
        "ReCoRD.jsonl": ["Zoë Müller", '"El Niño"', "Bonn"],
    }.get(file) or VOCABULARY[file]
    for label in options:
        lines = relabelled(file, 0, label)
        text = "".join(f"{line}\n" for line in lines)
        assert my_rows(file, text)[0] == (numbers[0], str(label) if file.endswith(".tsv") else label)
        assert problems_of(file, text, official) == [], label


def at(number, line):
    """Replaces a line, counted from 1 as editors do."""

    def change(text):
        lines = text.split("\n")
        lines[number - 1] = line
        return "\n".join(lines)

    return change


def without(number):
    def change(text):
        lines = text.split("\n")
        del lines[number - 1]
        return "\n".join(lines)

    return change


def again(number):
    def change(text):
        lines = text.split("\n")
        lines.insert(number, lines[number - 1])
        return "\n".join(lines)

    return change


def swapped(text):
    lines = text.split("\n")
    lines[-3], lines[-2] = lines[-2], lines[-3]
    return "\n".join(lines)


def to(old, new):
    def change(text):
        assert old in text
        return text.replace(old, new, 1)

    return change


FAULTS = [
    # id, file, change, parts of the message besides the file name
    ("a row missing", "CoLA.tsv", without(3), ["2 rows, expected 3", "row 1 missing"]),
    ("the last row missing", "AX-b.jsonl", without(3), ["2 rows, expected 3", "row 2 missing"]),
    ("a query missing", "ReCoRD.jsonl", without(2), ["row 6 missing"]),
    ("an answer missing", "MultiRC.jsonl", to(',{"idx":4,"label":0}', ""), ["row (7, 2, 4) missing"]),
    ("a passage missing", "MultiRC.jsonl", without(2), ["3 rows, expected 5", "row (3, 2, 0), (3, 2, 1) missing"]),
    ("a row twice", "RTE.tsv", again(3), ["4 rows, expected 3", "row 1 more than once"]),
    ("a row twice in JSON", "WiC.jsonl", again(1), ["row 0 more than once"]),
    ("a row in place of another", "CB.jsonl", to('"idx":2', '"idx":1'), ["row 1 more than once", "row 2 missing"]),
    ("an answer twice", "MultiRC.jsonl", to('"idx":4', '"idx":5'), ["row (7, 2, 5) more than once"]),
    ("a question twice", "MultiRC.jsonl", to('"idx":3', '"idx":2'), ["line 1", "idx 2 occurs twice"]),
    ("a passage twice", "MultiRC.jsonl", again(2), ["line 3", "idx 3 occurs twice"]),
    ("a passage without questions", "MultiRC.jsonl", at(2, '{"idx":3,"passage":{"questions":[]}}'), ["line 2"]),
    ("a question without answers", "MultiRC.jsonl", to('[{"idx":0,"label":1}]', "[]"), ["line 1", "question 3 has no"]),
    ("a row more", "QNLI.tsv", lambda text: f"{text}3\tentailment\n", ["row 3 not in the test set"]),
    ("a row more in JSON", "COPA.jsonl", lambda text: text + '{"idx":3,"label":0}\n', ["row 3 not in the test set"]),
    ("another row number", "MRPC.tsv", to("2\t0", "9\t0"), ["row 2 missing", "row 9 not in the test set"]),
    ("row numbers from 1", "SST-2.tsv", lambda _: table(HEADER, "1|0", "2|1", "3|1"), ["row 0 missing", "row 3 not"]),
    ("wrong order", "WNLI.tsv", swapped, ["wrong order: got row 2, expected row 1"]),
    ("wrong order in JSON", "AX-g.jsonl", swapped, ["wrong order: got row 2, expected row 1"]),
    ("wrong order of queries", "ReCoRD.jsonl", swapped, ["wrong order: got row 9, expected row 6"]),
    ("wrong order of passages", "MultiRC.jsonl", swapped, ["wrong order: got row (3, 2, 0), expected row (7, 2, 5)"]),
    ("a row number that is text", "BoolQ.jsonl", to('"idx":1', '"idx":"1"'), ["line 2", "'1'"]),
    ("a row number that is true", "BoolQ.jsonl", to('"idx":1', '"idx":true'), ["line 2", "True"]),
    ("a row number that is 1.0", "BoolQ.jsonl", to('"idx":1', '"idx":1.0'), ["line 2", "1.0"]),
    ("a row number that is a list", "BoolQ.jsonl", to('"idx":1', '"idx":[1]'), ["line 2", "[1]"]),
    ("a row number that is nothing", "WSC.jsonl", to('"idx":1', '"idx":null'), ["line 2", "None"]),
    ("no row number", "WSC.jsonl", to('"idx":1,', ""), ["line 2", "idx"]),
    ("no label", "WSC.jsonl", to(',"label":"False"', ""), ["line 2", "label"]),
    ("a negative row number", "CoLA.tsv", to("1\t0", "-1\t0"), ["line 3", "-1"]),
    ("a row number of other digits", "CoLA.tsv", to("1\t0", "١\t0"), ["line 3", "expected a row number"]),
    ("a row number of 5000 digits", "CoLA.tsv", to("1\t0", f"{'1' * 5000}\t0"), ["line 3", "expected a row number"]),
    ("no header", "CoLA.tsv", without(1), ["line 1", "header"]),
    ("another header", "CoLA.tsv", at(1, "Index\tPrediction"), ["line 1", "header", "Index"]),
    ("a header with spaces", "CoLA.tsv", at(1, "index prediction"), ["line 1", "header"]),
    ("a header after a mark", "CoLA.tsv", lambda text: f"\ufeff{text}", ["line 1", "header", "ufeff"]),
    ("a column more", "CoLA.tsv", to("1\t0", "1\t0\t0.9"), ["line 3", "0.9"]),
    ("a column less", "CoLA.tsv", to("1\t0", "1"), ["line 3"]),
    ("a comma", "CoLA.tsv", to("1\t0", "1,0"), ["line 3", "1,0"]),
    ("an empty line", "CoLA.tsv", to("1\t0\n", "1\t0\n\n"), ["line 4"]),
    ("an empty line in JSON", "CB.jsonl", lambda text: f"{text}\n", ["line 4"]),
    ("a label by a word", "CoLA.tsv", to("1\t0", "1\tNo"), ["row 1", "'No'", "'1', '0'"]),
    ("a label 0.0", "CoLA.tsv", to("1\t0", "1\t0.0"), ["row 1", "'0.0'"]),
    ("a label after a space", "CoLA.tsv", to("1\t0", "1\t 0"), ["row 1", "' 0'"]),
    ("an upper-case label", "MNLI-m.tsv", to("\tneutral", "\tNeutral"), ["row 1", "'Neutral'", "'neutral'"]),
    ("a label of the three", "RTE.tsv", to("not_entailment", "neutral"), ["row 1", "'neutral'", "'not_entailment'"]),
    ("a label with a space", "QNLI.tsv", to("not_entailment", "not entailment"), ["row 0", "'not entailment'"]),
    ("an upper-case label in JSON", "CB.jsonl", to('"contradiction"', '"Contradiction"'), ["row 1", "'Contradiction'"]),
    ("True for WiC", "WiC.jsonl", to('"true"', '"True"'), ["row 1", "'True'", "'true'"]),
    ("true for WSC", "WSC.jsonl", to('"False"', '"false"'), ["row 1", "'false'", "'False'"]),
    ("true itself for BoolQ", "BoolQ.jsonl", to('"false"', "false"), ["row 1", "False", "'false'"]),
    ("1 for BoolQ", "BoolQ.jsonl", to('"false"', "0"), ["row 1", "0", "'false'"]),
    ("text for COPA", "COPA.jsonl", to('"idx":1,"label":0', '"idx":1,"label":"0"'), ["row 1", "'0'"]),
    ("true for COPA", "COPA.jsonl", to('"label":1', '"label":true'), ["row 0", "True"]),
    ("1.0 for COPA", "COPA.jsonl", to('"label":1', '"label":1.0'), ["line 1", "float"]),
    ("2 for COPA", "COPA.jsonl", to('"label":1', '"label":2'), ["row 0", "2"]),
    ("true for MultiRC", "MultiRC.jsonl", to('"label":1', '"label":true'), ["row (7, 2, 5)", "True"]),
    ("text for MultiRC", "MultiRC.jsonl", to('"label":0', '"label":"0"'), ["row (7, 2, 4)", "'0'"]),
    ("nothing for AX-b", "AX-b.jsonl", to('"not_entailment"', "null"), ["line 2", "NoneType"]),
    ("a list for AX-g", "AX-g.jsonl", to('"not_entailment"', "[1]"), ["line 1", "list"]),
    ("a score above the range", "STS-B.tsv", to("3.142", "5.1"), ["row 1", "'5.1'", "from 0 to 5"]),
    ("a score below the range", "STS-B.tsv", to("3.142", "-0.1"), ["row 1", "'-0.1'"]),
    ("a score nan", "STS-B.tsv", to("3.142", "nan"), ["row 1", "'nan'"]),
    ("a score inf", "STS-B.tsv", to("3.142", "inf"), ["row 1", "'inf'"]),
    ("a score of text", "STS-B.tsv", to("3.142", "high"), ["row 1", "'high'"]),
    ("a score with a comma", "STS-B.tsv", to("3.142", "3,142"), ["row 1", "'3,142'"]),
    ("a score with an underscore", "STS-B.tsv", to("3.142", "0_3"), ["row 1", "'0_3'"]),
    ("a score of other digits", "STS-B.tsv", to("3.142", "٣"), ["row 1"]),
    ("a score with a space", "STS-B.tsv", to("3.142", " 3.142"), ["row 1", "' 3.142'"]),
    ("no score", "STS-B.tsv", to("3.142", ""), ["row 1", "''"]),
    ("an entity of another passage", "ReCoRD.jsonl", to("Elbe", "Bonn"), ["row 9", "'Bonn'", "of its passage"]),
    ("part of an entity", "ReCoRD.jsonl", to("Zoë Müller", "Müller"), ["row 8", "'Müller'", "of its passage"]),
    ("an entity by its number", "ReCoRD.jsonl", to('"Elbe"', "1"), ["row 9", "1", "expected the text"]),
    ("no entity", "ReCoRD.jsonl", to('"Elbe"', '""'), ["row 9", "''", "expected the text"]),
    ("an empty label", "CoLA.tsv", to("1\t0", "1\t"), ["row 1", "''"]),
    ("an empty label in JSON", "WiC.jsonl", to('"false"', '""'), ["row 0", "''"]),
    ("no JSON", "BoolQ.jsonl", at(2, "{'idx': 1, 'label': 'false'}"), ["line 2", "JSON"]),
    ("JSON that is no object", "BoolQ.jsonl", at(2, '[1, "false"]'), ["line 2"]),
    ("JSON that is a number", "BoolQ.jsonl", at(2, "1"), ["line 2"]),
    ("JSON that is text", "BoolQ.jsonl", at(2, '"idx"'), ["line 2"]),
    ("JSON that is nothing", "MultiRC.jsonl", at(2, "null"), ["line 2"]),
    ("JSON 2000 deep", "BoolQ.jsonl", at(2, "[" * 2000), ["line 2"]),
    ("a label 2000 deep", "COPA.jsonl", at(2, f'{{"idx":1,"label":{"[" * 2000}{"]" * 2000}}}'), ["line 2"]),
    ("a number of 5000 digits", "COPA.jsonl", to('"label":1', f'"label":{"1" * 5000}'), ["line 1"]),
    ("two objects on a line", "CB.jsonl", to("}\n", "} "), ["line 1"]),
    ("flat rows for MultiRC", "MultiRC.jsonl", at(2, '{"idx":3,"label":1}'), ["line 2", "passage"]),
    ("questions that are text", "MultiRC.jsonl", at(2, '{"idx":3,"passage":{"questions":"ab"}}'), ["line 2"]),
    ("answers that are a number", "MultiRC.jsonl", to('[{"idx":5,"label":1},{"idx":4,"label":0}]', "5"), ["line 1"]),
    ("CRLF", "CoLA.tsv", lambda text: text.replace("\n", "\r\n"), ["line 1", "carriage return"]),
    ("CRLF in one line", "STS-B.tsv", to("3.142\n", "3.142\r\n"), ["line 3", "carriage return"]),
    ("CRLF in JSON", "CB.jsonl", lambda text: text.replace("\n", "\r\n"), ["line 1", "carriage return"]),
    ("no line", "SST-2.tsv", lambda _: "", ["line 1", "header"]),
    ("no line in JSON", "COPA.jsonl", lambda _: "", ["line 1"]),
    ("the header alone", "SST-2.tsv", lambda _: f"{HEADER}\n", ["0 rows, expected 3", "row 0, 1, 2 missing"]),
]


@pytest.mark.parametrize("file, change, parts", [fault[1:] for fault in FAULTS], ids=[fault[0] for fault in FAULTS])
def test_a_faulty_file_is_refused(file, change, parts, official, tmp_path):
    suite = suite_of(file)
    files = texts(suite)
    check_archive(zipped(tmp_path / "good.zip", files), suite, str(official))
    files[file] = change(files[file])
    with pytest.raises(UserError) as caught:
        check_archive(zipped(tmp_path / "bad.zip", files), suite, str(official))
    title, *problems = str(caught.value).split("\n")
    assert title == f"{tmp_path / 'bad.zip'}: {len(problems)} problem(s)"
    assert problems and all(problem.startswith(f"  {file}") for problem in problems), "the other files are in order"
    for part in parts:
        assert part in str(caught.value)
    assert [problem.strip() for problem in problems] == check_files(files, suite, str(official))


def test_all_problems_are_reported_at_once(official):
    files = texts("glue")
    files["CoLA.tsv"] = f"{HEADER}\n0\t1\n2\tx\n"
    files["AX.tsv"] = "index,prediction\n"
    del files["RTE.tsv"]
    files["notes.txt"] = "mine"
    assert sorted(check_files(files, "glue", str(official))) == [
        "AX.tsv, line 1: expected the header 'index\\tprediction', got 'index,prediction'",
        "CoLA.tsv: 2 rows, expected 3",
        "CoLA.tsv: row 1 missing",
        "CoLA.tsv: row 2: label 'x', expected one of '1', '0'",
        "RTE.tsv: is missing",
        "notes.txt: is no file of a glue submission",
    ]


def test_without_the_official_files_sizes_and_labels_are_checked(tmp_path, monkeypatch):
    """MultiRC's row ids and ReCoRD's entities are then unknown."""
    monkeypatch.chdir(tmp_path)
    files = texts("superglue")
    assert set(check_files(files, "superglue")) >= {
        "BoolQ.jsonl: 3 rows, expected 3245",
        "BoolQ.jsonl: row 3, 4, 5 and 3239 others missing",
        "MultiRC.jsonl: 5 rows, expected 9693",
        "ReCoRD.jsonl: 3 rows, expected 10000",
    }
    wnli = f"{HEADER}\n" + "".join(f"{i}\t{i % 2}\n" for i in range(146))
    multirc = [((i // 20, i // 5, i), i % 2) for i in range(9693)]
    record = [(i, f"entity {i}") for i in range(10000)]
    for name, suite, text in (
        ("wnli", "glue", wnli),
        ("multirc", "superglue", encode(TASKS["multirc"], multirc)),
        ("record", "superglue", encode(TASKS["record"], record)),
    ):
        file = FILES[name]
        assert [p for p in check_files({file: text}, suite) if p.startswith(file)] == []
    for file, text, problem in (
        ("WNLI.tsv", wnli.replace("145\t", "146\t"), "row 146 not in the test set"),
        ("WNLI.tsv", swapped(wnli), "wrong order: got row 145, expected row 144"),
        ("MultiRC.jsonl", encode(TASKS["multirc"], multirc[:-1]), "9692 rows, expected 9693"),
        ("ReCoRD.jsonl", encode(TASKS["record"], record[1:]), "row 0 missing"),
    ):
        assert any(problem in found for found in check_files({file: text}, suite_of(file)))
