"""Archives for the evaluation servers: what is in them, and what is refused. The servers' formats are typed here."""

import json
import math
import shutil
import zipfile
from collections import Counter
from dataclasses import asdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from extensions.common.errors import UserError
from extensions.data import load_examples
from extensions.evaluation.metrics import Prediction
from extensions.evaluation.submission import check_archive, check_files, decode, encode, make_archive, read_predictions
from extensions.tasks import SUITES, TASKS

# ------------------------------------------------------------------------------- the official layout, in small


def table(*lines):
    return "".join(line.replace("|", "\t") + "\n" for line in lines)


def jsonl(*objects):
    return "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in objects)


def spans(text, *entities):
    """Entities as ReCoRD gives them: the places of their letters, the last one inclusive."""
    return [{"start": text.index(entity), "end": text.index(entity) + len(entity) - 1} for entity in entities]


PAIRS = ["0|Anna slept.|She slept.", "1|Bill ate.|Nobody ate.", "2|It rained.|It was May."]
MNLI = "index|promptID|pairID|genre|sentence1_binary_parse|sentence2_binary_parse|sentence1_parse|sentence2_parse"
MNLI_ROWS = [f"{row[0]}|31|31n|travel|( a )|( b )|(ROOT)|(ROOT){row[1:]}" for row in PAIRS]
STSB = "index|genre|filename|year|old_index|source1|source2|sentence1|sentence2"
OPERA = 'Zoë Müller sang in Bonn.\n@highlight\n"El Niño" came after Zoë Müller\'s tour'
RIVER = "The Rhine is long. \u2028 The Elbe is not."
LAYOUT = {
    "glue/CoLA/test.tsv": table("index|sentence", "0|Bill slept.", "1|Bill the slept.", "2|Anna left."),
    "glue/SST-2/test.tsv": table("index|sentence", "0|dull", "1|fine", "2|a fine film"),
    "glue/MRPC/test.tsv": table(
        "index|#1 ID|#2 ID|#1 String|#2 String", *(f"{row[0]}|{i}|{i + 9}{row[1:]}" for i, row in enumerate(PAIRS))
    ),
    "glue/QQP/test.tsv": table("id|question1|question2", *PAIRS),
    "glue/STS-B/test.tsv": table(STSB, *(f"{row[0]}|news|MSRpar|2015|7|a|b{row[1:]}" for row in PAIRS)),
    "glue/MNLI/test_matched.tsv": table(f"{MNLI}|sentence1|sentence2", *MNLI_ROWS),
    "glue/MNLI/test_mismatched.tsv": table(f"{MNLI}|sentence1|sentence2", *MNLI_ROWS),
    "glue/QNLI/test.tsv": table("index|question|sentence", *PAIRS),
    "glue/RTE/test.tsv": table("index|sentence1|sentence2", *PAIRS),
    "glue/WNLI/test.tsv": table("index|sentence1|sentence2", *PAIRS),
    "glue/diagnostic/diagnostic.tsv": table("index|sentence1|sentence2", *PAIRS),
    "superglue/BoolQ/test.jsonl": jsonl(
        *({"question": "is it so", "passage": f"It is {word}.", "idx": i} for i, word in enumerate(("so", "not", "so")))
    ),
    "superglue/CB/test.jsonl": jsonl(*({"premise": "A.", "hypothesis": f"B{i}.", "idx": i} for i in range(3))),
    "superglue/COPA/test.jsonl": jsonl(
        *({"premise": f"A{i}.", "choice1": "B.", "choice2": "C.", "question": "cause", "idx": i} for i in range(3))
    ),
    "superglue/MultiRC/test.jsonl": jsonl(  # numbered neither from 0 nor in order, to see where the numbers come from
        {
            "idx": 7,
            "version": 1.1,
            "passage": {
                "text": "Anna ate bread and cake.",
                "questions": [
                    {"question": "Who?", "idx": 2, "answers": [{"text": "Anna", "idx": 5}, {"text": "Bill", "idx": 4}]},
                    {"question": "What?", "idx": 3, "answers": [{"text": "cake", "idx": 0}]},
                ],
            },
        },
        {
            "idx": 3,
            "version": 1.1,
            "passage": {
                "text": "It rained.",
                "questions": [
                    {"question": "Why?", "idx": 2, "answers": [{"text": "", "idx": 0}, {"text": "clouds", "idx": 1}]}
                ],
            },
        },
    ),
    "superglue/ReCoRD/test.jsonl": jsonl(
        {
            "source": "CNN",
            "passage": {"text": OPERA, "entities": spans(OPERA, '"El Niño"', "Bonn", "Zoë Müller")},
            "qas": [{"query": "@placeholder sang", "idx": 8}, {"query": "the storm @placeholder", "idx": 6}],
            "idx": 4,
        },
        {
            "source": "CNN",
            "passage": {"text": RIVER, "entities": spans(RIVER, "Rhine", "Elbe")},
            "qas": [{"query": "the short @placeholder", "idx": 9}],
            "idx": 5,
        },
    ),
    "superglue/RTE/test.jsonl": jsonl(*({"premise": "A.", "hypothesis": f"B{i}.", "idx": i} for i in range(3))),
    "superglue/WiC/test.jsonl": jsonl(
        *({"word": "bank", "sentence1": "A bank.", "sentence2": f"{i} banks.", "idx": i} for i in range(3))
    ),
    "superglue/WSC/test.jsonl": jsonl(
        *(
            {
                "idx": i,
                "text": "Anna met Eve when she left.",
                "target": {"span1_text": name, "span1_index": 0, "span2_text": "she", "span2_index": 4},
            }
            for i, name in enumerate(("Anna", "Eve", "Anna"))
        )
    ),
    "superglue/AX-b/AX-b.jsonl": jsonl(
        *(
            {"idx": str(i), "label": "entailment", "sentence1": "A.", "sentence2": "B.", "logic": "Negation"}
            for i in range(3)
        )
    ),
    "superglue/AX-g/AX-g.jsonl": jsonl(
        *(
            {"idx": i, "premise": "A.", "hypothesis": "He is B.", "label": "entailment", "pair_id": 201 + i // 2}
            for i in range(3)
        )
    ),
}

# Answers of a run to these rows; ReCoRD's are the entities that get the most probability.
ANSWERS = {
    "cola": ["1", "0", "1"],
    "sst2": ["0", "1", "1"],
    "mrpc": ["1", "0", "0"],
    "qqp": ["1", "1", "0"],
    "stsb": [0.0, 3.14159, 5.0],
    "mnli": ["contradiction", "neutral", "entailment"],
    "mnli_mm": ["neutral", "entailment", "contradiction"],
    "qnli": ["not_entailment", "entailment", "not_entailment"],
    "rte": ["entailment", "not_entailment", "entailment"],
    "wnli": ["0", "1", "0"],
    "ax": ["entailment", "contradiction", "neutral"],
    "boolq": ["true", "false", "true"],
    "cb": ["entailment", "contradiction", "neutral"],
    "copa": ["1", "0", "0"],
    "multirc": ["1", "0", "1", "0", "1"],
    "record": ["Zoë Müller", '"El Niño"', "Elbe"],
    "superglue_rte": ["not_entailment", "entailment", "entailment"],
    "wic": ["false", "true", "true"],
    "wsc": ["true", "false", "true"],
    "axb": ["entailment", "not_entailment", "entailment"],
    "axg": ["not_entailment", "not_entailment", "entailment"],
}
HEADER = "index\tprediction"
# What the servers take for them, by their own FAQ pages.
LINES = {
    "CoLA.tsv": [HEADER, "0\t1", "1\t0", "2\t1"],
    "SST-2.tsv": [HEADER, "0\t0", "1\t1", "2\t1"],
    "MRPC.tsv": [HEADER, "0\t1", "1\t0", "2\t0"],
    "QQP.tsv": [HEADER, "0\t1", "1\t1", "2\t0"],
    "STS-B.tsv": [HEADER, "0\t0.000", "1\t3.142", "2\t5.000"],
    "MNLI-m.tsv": [HEADER, "0\tcontradiction", "1\tneutral", "2\tentailment"],
    "MNLI-mm.tsv": [HEADER, "0\tneutral", "1\tentailment", "2\tcontradiction"],
    "QNLI.tsv": [HEADER, "0\tnot_entailment", "1\tentailment", "2\tnot_entailment"],
    "RTE.tsv": [HEADER, "0\tentailment", "1\tnot_entailment", "2\tentailment"],
    "WNLI.tsv": [HEADER, "0\t0", "1\t1", "2\t0"],
    "AX.tsv": [HEADER, "0\tentailment", "1\tcontradiction", "2\tneutral"],
    "BoolQ.jsonl": ['{"idx":0,"label":"true"}', '{"idx":1,"label":"false"}', '{"idx":2,"label":"true"}'],
    "CB.jsonl": ['{"idx":0,"label":"entailment"}', '{"idx":1,"label":"contradiction"}', '{"idx":2,"label":"neutral"}'],
    "COPA.jsonl": ['{"idx":0,"label":1}', '{"idx":1,"label":0}', '{"idx":2,"label":0}'],
    "MultiRC.jsonl": [
        '{"idx":7,"passage":{"questions":[{"idx":2,"answers":[{"idx":5,"label":1},{"idx":4,"label":0}]},'
        '{"idx":3,"answers":[{"idx":0,"label":1}]}]}}',
        '{"idx":3,"passage":{"questions":[{"idx":2,"answers":[{"idx":0,"label":0},{"idx":1,"label":1}]}]}}',
    ],
    "ReCoRD.jsonl": [
        '{"idx":8,"label":"Zoë Müller"}',
        '{"idx":6,"label":"\\"El Niño\\""}',
        '{"idx":9,"label":"Elbe"}',
    ],
    "RTE.jsonl": [
        '{"idx":0,"label":"not_entailment"}',
        '{"idx":1,"label":"entailment"}',
        '{"idx":2,"label":"entailment"}',
    ],
    "WiC.jsonl": ['{"idx":0,"label":"false"}', '{"idx":1,"label":"true"}', '{"idx":2,"label":"true"}'],
    "WSC.jsonl": ['{"idx":0,"label":"True"}', '{"idx":1,"label":"False"}', '{"idx":2,"label":"True"}'],
    "AX-b.jsonl": [
        '{"idx":0,"label":"entailment"}',
        '{"idx":1,"label":"not_entailment"}',
        '{"idx":2,"label":"entailment"}',
    ],
    "AX-g.jsonl": [
        '{"idx":0,"label":"not_entailment"}',
        '{"idx":1,"label":"not_entailment"}',
        '{"idx":2,"label":"entailment"}',
    ],
}
FILES = dict(zip(ANSWERS, LINES, strict=True))  # task -> its file
# Where an answer has a wrong format.
FALLBACKS = {
    **dict.fromkeys(("cola", "sst2", "mrpc"), "1"),
    **dict.fromkeys(("qqp", "wnli"), "0"),
    **dict.fromkeys(("mnli", "mnli_mm", "qnli", "rte", "ax", "superglue_rte", "axb", "axg"), "entailment"),
    **dict.fromkeys(("boolq", "wic"), "true"),
    **{"stsb": "2.500", "cb": "contradiction", "copa": 1, "multirc": 0, "wsc": "False"},
}
BINARY, THREE, TWO = {"0", "1"}, {"entailment", "neutral", "contradiction"}, {"entailment", "not_entailment"}
BOOLEAN, NUMBER = {"true", "false"}, {0, 1}
VOCABULARY = {
    **dict.fromkeys(("CoLA.tsv", "SST-2.tsv", "MRPC.tsv", "QQP.tsv", "WNLI.tsv"), BINARY),
    **dict.fromkeys(("MNLI-m.tsv", "MNLI-mm.tsv", "AX.tsv", "CB.jsonl"), THREE),
    **dict.fromkeys(("QNLI.tsv", "RTE.tsv", "RTE.jsonl", "AX-b.jsonl", "AX-g.jsonl"), TWO),
    **dict.fromkeys(("BoolQ.jsonl", "WiC.jsonl"), BOOLEAN),
    **dict.fromkeys(("COPA.jsonl", "MultiRC.jsonl"), NUMBER),
    "WSC.jsonl": {"True", "False"},
}
ENTITIES = {8: {"Zoë Müller", "Bonn", '"El Niño"'}, 6: {"Zoë Müller", "Bonn", '"El Niño"'}, 9: {"Rhine", "Elbe"}}

GLUE, SUPERGLUE = list(FILES)[:11], list(FILES)[11:]
MEMBERS = {"glue": GLUE, "superglue": SUPERGLUE}
every_suite = pytest.mark.parametrize("suite", MEMBERS)


def suite_of(file):
    return "glue" if file.endswith(".tsv") else "superglue"


def texts(suite):
    """The files of a valid archive, from the lines above."""
    return {FILES[name]: "".join(f"{line}\n" for line in LINES[FILES[name]]) for name in MEMBERS[suite]}


def contents(archive):
    with zipfile.ZipFile(archive) as opened:
        return {name: opened.read(name).decode("utf-8") for name in opened.namelist()}


def lines_of(name, text):
    """The lines of a file of the archive, without the spaces that JSON allows."""
    assert text.endswith("\n") and "\r" not in text
    lines = text.removesuffix("\n").split("\n")
    if name.endswith(".tsv"):
        return lines
    return [json.dumps(json.loads(line), ensure_ascii=False, separators=(",", ":")) for line in lines]


def zipped(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    root = tmp_path_factory.mktemp("official")
    for name, text in LAYOUT.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(text.encode("utf-8"))
    return root


def run_rows(official, name, answers):
    """What a run leaves for a task: the rows of the test file and these answers."""
    examples = load_examples(TASKS[name], "test", str(official))
    if name != "record":
        return [
            asdict(Prediction(name, e.index, "", answer, e.label, e.kept))
            for e, answer in zip(examples, answers, strict=True)
        ]
    chosen = dict(zip(ENTITIES, answers, strict=True))
    return [
        asdict(Prediction(name, e.index, "", "false", None, e.kept, 0.75 if right else 0.25))
        for e, right in ((e, e.kept["entity"] == chosen[e.kept["query"]]) for e in examples)
    ]


@pytest.fixture(scope="module")
def rows(official):
    return {name: run_rows(official, name, answers) for name, answers in ANSWERS.items()}


def written(path, records):
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def all_of(rows, suite, **changed):
    return [record for name in MEMBERS[suite] for record in changed.get(name, rows[name])]


@pytest.fixture
def out(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "sent.zip"


def refused(sources, suite, out, **options):
    """The error of `make_archive`; it leaves nothing in the archive's folder that was not there."""
    before = {path: path.read_bytes() for path in out.parent.iterdir()}
    with pytest.raises(UserError) as caught:
        make_archive(sources, suite, out, **options)
    assert {path: path.read_bytes() for path in out.parent.iterdir()} == before
    return str(caught.value)


# ------------------------------------------------------------------------------------------ what is in an archive


@pytest.fixture(scope="module")
def archives(official, rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("archives")
    made = {}
    for suite in MEMBERS:
        source = written(folder / f"{suite}.jsonl", all_of(rows, suite))
        entries = make_archive([source], suite, folder / f"{suite}.zip", str(official / suite))
        made[suite] = (folder / f"{suite}.zip", entries)
    return made


def test_these_are_the_tasks_and_files_of_the_suites():
    assert {suite: {task.name for task in tasks} for suite, tasks in SUITES.items()} == {
        suite: set(names) for suite, names in MEMBERS.items()
    }
    assert {name: TASKS[name].submission.file for name in FILES} == FILES


@pytest.mark.parametrize("name", FILES)
def test_right_answers_are_what_the_server_takes(name, archives):
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
    """Whatever the date, the order of the lines, and the files that they stand in."""
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


def relabelled(file, row, label):
    """The lines of `file` with another label in one row."""
    lines, found = [], -1
    for line in LINES[file][file.endswith(".tsv") :]:
        if file.endswith(".tsv"):
            found += 1
            lines.append(f"{line.split(chr(9))[0]}\t{label}" if found == row else line)
            continue
        one = json.loads(line)
        parts = (
            [answer for question in one["passage"]["questions"] for answer in question["answers"]]
            if file == "MultiRC.jsonl"
            else [one]
        )
        for part in parts:
            found += 1
            if found == row:
                part["label"] = label
        lines.append(json.dumps(one, ensure_ascii=False, separators=(",", ":")))
    return [HEADER, *lines] if file.endswith(".tsv") else lines


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
        if name == "record":  # its candidates are chosen by positive_probability, wrong formats or not
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
        pytest.param(["true", "false", "false"], [0.2, 0.9, 0.5], "Bonn", id="the best supported, whatever was said"),
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
        pytest.param(["false", "true", "false"], [0.9, None, 0.8], "Bonn", id="some positive_probability: as none"),
    ],
)
def test_records_answer_is_the_best_supported_candidate(
    answers, positive_probabilities, chosen, rows, official, tmp_path
):
    candidates = [
        {**row, "answer": answer, "positive_probability": positive_probability}
        for row, answer, positive_probability in zip(rows["record"][:3], answers, positive_probabilities, strict=True)
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


# ------------------------------------------------------------------------------------------------------ formats


def valid(file):
    return texts(suite_of(file))[file]


def my_rows(file, text):
    """(row number, label) of a file by the server's description; raises on what is not of that form."""
    lines = text.split("\n")
    assert lines.pop() == ""
    if file.endswith(".tsv"):
        assert lines[0] == HEADER
        cells = [line.split("\t") for line in lines[1:]]
        assert all(len(row) == 2 for row in cells)
        return [(int(number), label) for number, label in cells]
    objects = [json.loads(line) for line in lines]
    if file != "MultiRC.jsonl":
        return [(one["idx"], one["label"]) for one in objects]
    return [
        ((one["idx"], question["idx"], answer["idx"]), answer["label"])
        for one in objects
        for question in one["passage"]["questions"]
        for answer in question["answers"]
    ]


def legal(file, row, label):
    """Whether the server takes a label."""
    if file == "STS-B.tsv":
        return 0 <= float(label) <= 5
    if file == "ReCoRD.jsonl":
        return label in ENTITIES[row]
    return any(label == one and type(label) is type(one) for one in VOCABULARY[file])


def problems_of(file, text, official):
    """Of one file, as part of an archive that lacks the others."""
    found = check_files({file: text}, suite_of(file), str(official))
    assert all(isinstance(problem, str) and problem for problem in found)
    return [problem for problem in found if not problem.endswith(": is missing") or problem.startswith(f"{file}:")]


WORDS = st.text(st.characters(exclude_characters="\t\r\n", exclude_categories=("Cs",)), max_size=8)
WHOLE = st.integers(0, 10**15)


@given(st.lists(st.tuples(WHOLE, WORDS)))
def test_rows_come_back_from_tsv(given_rows):
    task = TASKS["cola"]
    assert decode(task, encode(task, given_rows)) == given_rows


@given(st.lists(st.tuples(WHOLE, st.text() | st.integers()), min_size=1))
def test_rows_come_back_from_jsonl(given_rows):
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
def test_rows_come_back_from_nested_jsonl(passages):
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
def test_every_allowed_label_is_allowed(file, official):
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
    # id, file, change, what the message says besides the file
    ("a row missing", "CoLA.tsv", without(3), ["2 rows, expected 3", "row 1 missing"]),
    ("the last row missing", "AX-b.jsonl", without(3), ["2 rows, expected 3", "row 2 missing"]),
    ("a query missing", "ReCoRD.jsonl", without(2), ["row 6 missing"]),
    ("an answer missing", "MultiRC.jsonl", to(',{"idx":4,"label":0}', ""), ["row (7, 2, 4) missing"]),
    ("a passage missing", "MultiRC.jsonl", without(2), ["3 rows, expected 5", "row (3, 2, 0), (3, 2, 1) missing"]),
    ("a row twice", "RTE.tsv", again(3), ["4 rows, expected 3", "row 1 more than once"]),
    ("a row twice in JSON", "WiC.jsonl", again(1), ["row 0 more than once"]),
    ("a row in place of another", "CB.jsonl", to('"idx":2', '"idx":1'), ["row 1 more than once", "row 2 missing"]),
    ("an answer twice", "MultiRC.jsonl", to('"idx":4', '"idx":5'), ["row (7, 2, 5) more than once"]),
    ("a question twice", "MultiRC.jsonl", to('"idx":3', '"idx":2'), ["line 1", "idx 2 stands twice"]),
    ("a passage twice", "MultiRC.jsonl", again(2), ["line 3", "idx 3 stands twice"]),
    ("a passage without questions", "MultiRC.jsonl", at(2, '{"idx":3,"passage":{"questions":[]}}'), ["line 2"]),
    ("a question without answers", "MultiRC.jsonl", to('[{"idx":0,"label":1}]', "[]"), ["line 1", "question 3 has no"]),
    ("a row more", "QNLI.tsv", lambda text: f"{text}3\tentailment\n", ["row 3 not in the test set"]),
    ("a row more in JSON", "COPA.jsonl", lambda text: text + '{"idx":3,"label":0}\n', ["row 3 not in the test set"]),
    ("another row number", "MRPC.tsv", to("2\t0", "9\t0"), ["row 2 missing", "row 9 not in the test set"]),
    ("row numbers from 1", "SST-2.tsv", lambda _: table(HEADER, "1|0", "2|1", "3|1"), ["row 0 missing", "row 3 not"]),
    ("wrong order", "WNLI.tsv", swapped, ["wrong order: row 2 stands where 1 should"]),
    ("wrong order in JSON", "AX-g.jsonl", swapped, ["wrong order: row 2 stands where 1 should"]),
    ("wrong order of queries", "ReCoRD.jsonl", swapped, ["wrong order: row 9 stands where 6 should"]),
    ("wrong order of passages", "MultiRC.jsonl", swapped, ["wrong order: row (3, 2, 0) stands where (7, 2, 5)"]),
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
    ("an entity of another passage", "ReCoRD.jsonl", to("Elbe", "Bonn"), ["row 9", "'Bonn'", "no entity"]),
    ("part of an entity", "ReCoRD.jsonl", to("Zoë Müller", "Müller"), ["row 8", "'Müller'", "no entity"]),
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


def test_all_problems_are_told_at_once(official):
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
    """MultiRC's row numbers are unknown then, and ReCoRD's entities."""
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
        ("WNLI.tsv", swapped(wnli), "wrong order: row 145 stands where 144 should"),
        ("MultiRC.jsonl", encode(TASKS["multirc"], multirc[:-1]), "9692 rows, expected 9693"),
        ("ReCoRD.jsonl", encode(TASKS["record"], record[1:]), "row 0 missing"),
    ):
        assert any(problem in found for found in check_files({file: text}, suite_of(file)))


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


def test_a_file_that_is_there_twice_is_refused(official, tmp_path):
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


def test_what_is_no_zip_archive_is_refused(official, tmp_path):
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


# Changes of a valid file: a part of it by other text, lines deleted, repeated, moved, or by other JSON.
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
def test_whatever_is_changed_is_noticed(official, change):
    """Never an exception; and where there is no problem, the server reads the same rows with labels that it takes."""
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
def test_a_damaged_archive_is_refused_or_whole(official, archives, tmp_path_factory, data):
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


# --------------------------------------------------------------------------------------------------- predictions

GOOD = {"task": "cola", "index": 0, "text": "Yes</Judgement>", "answer": "1", "gold": None, "kept": {"idx": 0}}
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
    ("a row number of text", {**GOOD, "kept": {"idx": "a"}}, "`kept` has 'a' where row numbers"),
    ("a row number that is a list", {**GOOD, "kept": {"idx": [0]}}, "`kept` has [0] where row numbers"),
    ("a negative row number", {**GOOD, "kept": {"idx": -1}}, "`kept` has -1 where row numbers"),
    ("a boolean row number", {**GOOD, "kept": {"idx": True}}, "`kept` has True where row numbers"),
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


def test_these_predictions_are_in_order(tmp_path):
    """What the table above changes; and `kept` and `text` may be missing where nothing needs them."""
    short = {"task": "cola", "index": 1, "answer": None}
    source = written(tmp_path / "answers.jsonl", [GOOD, SCORE, CANDIDATE, PART, short, {**SCORE, "index": 7}])
    found = read_predictions([source])
    assert {name: [p.index for p in predictions] for name, predictions in found.items()} == {
        "cola": [0, 1],
        "stsb": [0, 7],
        "record": [0],
        "multirc": [0],
    }
    assert found["record"] == [Prediction("record", 0, GOOD["text"], "true", None, KEPT, 0.5)]
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
        ("run", "predictions_test.jsonl: no such file; train with evaluation.predict_test=true"),
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


def test_a_part_of_records_candidates_is_enough(rows, official, tmp_path):
    """An evaluation may leave candidates out; a query without any is missing."""
    source = written(tmp_path / "a.jsonl", [rows["record"][k] for k in (1, 4, 6)])
    make_archive([source], "superglue", tmp_path / "a.zip", str(official), "majority")
    found = [json.loads(line)["label"] for line in contents(tmp_path / "a.zip")["ReCoRD.jsonl"].splitlines()]
    assert found == ["Bonn", "Bonn", "Rhine"]
    source = written(tmp_path / "b.jsonl", rows["record"][3:])
    message = refused([source], "superglue", tmp_path / "a.zip", data_root=str(official), fill="majority")
    assert "ReCoRD.jsonl: row 8 missing" in message


def test_where_no_archive_can_be_written(rows, official, tmp_path):
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
    original = zipfile.ZipFile.writestr

    def full(self, info, text, *more):
        if info.filename == "AX.tsv":
            raise OSError(28, "No space left on device")
        return original(self, info, text, *more)

    monkeypatch.setattr(zipfile.ZipFile, "writestr", full)
    assert (
        refused([source], "glue", out, data_root=str(official)) == f"{out}: cannot be written (No space left on device)"
    )
    check_archive(out, "glue", str(official))


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
    """The other tasks' files are parts or not there; they are filled."""
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
