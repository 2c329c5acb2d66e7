"""The evaluation servers' formats, written by hand: small official files, answers, and the expected archives."""

import json
import zipfile
from dataclasses import asdict
from functools import partial

import pytest

from extensions.common.errors import UserError
from extensions.data import load_examples
from extensions.evaluation import server_files
from extensions.evaluation.metrics import Prediction
from extensions.evaluation.submission import make_archive
from extensions.tasks import TASKS


def table(*lines):
    return "".join(line.replace("|", "\t") + "\n" for line in lines)


def jsonl(*objects):
    return "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in objects)


def spans(text, *entities):
    """Entities in ReCoRD's form: inclusive character spans."""
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
    "superglue/MultiRC/test.jsonl": jsonl(  # unordered numbers that do not begin at 0, to show their source
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

# Answers of a run to these rows; ReCoRD's are the entities with the highest probability.
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
# The expected files, according to the servers' own FAQ pages.
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
# Labels of answers with a wrong format.
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


def run_rows(official, name, answers):
    """The predictions file of a run: the rows of the test file with these answers."""
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


def written(path, records):
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def all_of(rows, suite, **changed):
    return [record for name in MEMBERS[suite] for record in changed.get(name, rows[name])]


def refused(sources, suite, out, **options):
    """The error of `make_archive`; checks that it adds nothing to the archive's folder."""
    before = {path: path.read_bytes() for path in out.parent.iterdir()}
    with pytest.raises(UserError) as caught:
        make_archive(sources, suite, out, **options)
    assert {path: path.read_bytes() for path in out.parent.iterdir()} == before
    return str(caught.value)


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


def valid(file):
    return texts(suite_of(file))[file]


def my_rows(file, text):
    """(row number, label) of a file by the server's description; raises for any other form."""
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
    """Whether the server accepts a label."""
    if file == "STS-B.tsv":
        return 0 <= float(label) <= 5
    if file == "ReCoRD.jsonl":
        return label in ENTITIES[row]
    return any(label == one and type(label) is type(one) for one in VOCABULARY[file])


def check_files(files, suite, data_root=None):
    """The problems of an archive's files, checked against the official ones in `data_root`."""
    return server_files.check_files(files, suite, partial(server_files.official_rows, data_root=data_root))


def problems_of(file, text, official):
    """The problems of one file, as part of an archive that lacks the others."""
    found = check_files({file: text}, suite_of(file), str(official))
    assert all(isinstance(problem, str) and problem for problem in found)
    return [problem for problem in found if not problem.endswith(": is missing") or problem.startswith(f"{file}:")]
