"""GLUE and SuperGLUE with invented rows, in the layout and formats of the official downloads.

Formats, class orders and names are typed here from the benchmarks' own descriptions and not taken from the entries that
are tested. Rows: four of each labelled split, three of a test set.
"""

import json
from pathlib import Path

GLUE = ["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "mnli_mm", "qnli", "rte", "wnli", "ax"]
SUPERGLUE = ["boolq", "cb", "copa", "multirc", "record", "superglue_rte", "wic", "wsc", "axb", "axg"]
ALL = [*GLUE, *SUPERGLUE]
SPLITS = ("train", "validation", "test")

# ------------------------------------------------------------------------------------------- rows of the flat tasks

FIELDS = {
    **dict.fromkeys(("cola", "sst2"), "sentence"),
    **dict.fromkeys(("mrpc", "stsb", "mnli", "mnli_mm", "rte", "wnli", "ax"), "sentence1 sentence2"),
    **dict.fromkeys(("cb", "superglue_rte", "axb", "axg"), "sentence1 sentence2"),
    "qqp": "question1 question2",
    "qnli": "sentence question",
    "boolq": "passage question",
    "copa": "question premise choice1 choice2",
    "wic": "word sentence1 sentence2",
}
THREE_WAY = ("entailment", "neutral", "contradiction")
TWO_WAY = ("entailment", "not_entailment")
LABELS = {  # in the order of the hub's class numbers
    **dict.fromkeys(("cola", "sst2", "mrpc", "qqp", "wnli", "copa", "multirc"), ("0", "1")),
    **dict.fromkeys(("mnli", "mnli_mm", "ax"), THREE_WAY),
    **dict.fromkeys(("qnli", "rte", "superglue_rte", "axb", "axg"), TWO_WAY),
    **dict.fromkeys(("boolq", "wic", "wsc", "record"), ("false", "true")),
    "cb": ("entailment", "contradiction", "neutral"),
    "stsb": ("3.8", "0", "5", "4.333"),
}
EXPECTED_SPLITS = {
    **dict.fromkeys(ALL, SPLITS),
    **dict.fromkeys(("mnli_mm", "ax"), ("validation", "test")),
    **dict.fromkeys(("axb", "axg"), ("test",)),
}
EXPECTED_LABELLED = {
    **dict.fromkeys(ALL, ("train", "validation")),
    **dict.fromkeys(("mnli_mm", "ax"), ("validation",)),
    **dict.fromkeys(("axb", "axg"), ("test",)),
}


def flat_rows(name, split):
    """(fields, label) of invented rows: texts with characters of other formats, every label at least once."""
    labels = [None] * 3
    if split in EXPECTED_LABELLED[name]:
        labels = [LABELS[name][n % len(LABELS[name])] for n in (1, 0, 3, 2)]
    rows = []
    for n, label in enumerate(labels):
        fields = {field: f"{field} {n} of \"{split}, it's 5 % {{x}}\u2028\x85 #" for field in FIELDS[name].split()}
        rows.append((fields, label))
    return rows


# ------------------------------------------------------------------------------------- GLUE's files; "|" is a tab

MNLI = "index|promptID|pairID|genre|sentence1_binary_parse|sentence2_binary_parse|sentence1_parse|sentence2_parse"
MNLI_ROW = "{n}|3119{n}|3119{n}n|fiction|( ( a ) b )|( c )|(ROOT (S a))|(ROOT (S b))|{a}|{b}"
STSB = "index|genre|filename|year|old_index|source1|source2|sentence1|sentence2"
STSB_ROW = "{n}|main-captions|MSRvid|2012test|000{n}|none|none|{a}|{b}"
PAIR, PAIR_ROW = "index|sentence1|sentence2", "{n}|{a}|{b}"
DIAGNOSTIC = "Lexical Semantics|Predicate-Argument Structure|Logic|Knowledge|Domain|Premise|Hypothesis|Label"


def three(folder, header, row, label_header, label_row, test_header, test_row):
    """train, dev and test files; the first two have the same format."""
    labelled = (f"{header}{label_header}", f"{row}{label_row}")
    return {
        "train": (f"{folder}/train.tsv", *labelled),
        "validation": (f"{folder}/dev.tsv", *labelled),
        "test": (f"{folder}/test.tsv", test_header, test_row),
    }


def mnli(which):
    five = "|label1|label2|label3|label4|label5|gold_label"
    return {
        "validation": (
            f"MNLI/dev_{which}.tsv",
            f"{MNLI}|sentence1|sentence2{five}",
            f"{MNLI_ROW}|{{other}}|neutral|{{label}}|entailment|contradiction|{{label}}",
        ),
        "test": (f"MNLI/test_{which}.tsv", f"{MNLI}|sentence1|sentence2", MNLI_ROW),
    }


# split -> file, header (None: none), row; {a} and {b} are the texts, {n} the row number, {id} another number
TSV = {
    "cola": {
        "train": ("CoLA/train.tsv", None, "gj04|{label}|{star}|{a}"),
        "validation": ("CoLA/dev.tsv", None, "gj04|{label}|{star}|{a}"),
        "test": ("CoLA/test.tsv", "index|sentence", "{n}|{a}"),
    },
    "sst2": three("SST-2", "sentence", "{a}", "|label", "|{label}", "index|sentence", "{n}|{a}"),
    "mrpc": three(
        "MRPC",
        "Quality|#1 ID|#2 ID|#1 String|#2 String",
        "{label}|70{id}|80{id}|{a}|{b}",
        "",
        "",
        "index|#1 ID|#2 ID|#1 String|#2 String",
        "{n}|70{id}|80{id}|{a}|{b}",
    ),
    "stsb": three("STS-B", STSB, STSB_ROW, "|score", "|{label}", STSB, STSB_ROW),
    "qqp": three(
        "QQP",
        "id|qid1|qid2|question1|question2",
        "{id}|21{id}|22{id}|{a}|{b}",
        "|is_duplicate",
        "|{label}",
        "id|question1|question2",
        "{n}|{a}|{b}",
    ),
    "mnli": {
        "train": (
            "MNLI/train.tsv",
            f"{MNLI}|sentence1|sentence2|label1|gold_label",
            f"{MNLI_ROW}|{{other}}|{{label}}",
        ),
        **mnli("matched"),
    },
    "mnli_mm": mnli("mismatched"),
    "qnli": three(
        "QNLI", "index|question|sentence", "{n}|{b}|{a}", "|label", "|{label}", "index|question|sentence", ""
    ),
    "rte": three("RTE", PAIR, PAIR_ROW, "|label", "|{label}", PAIR, PAIR_ROW),
    "wnli": three("WNLI", PAIR, PAIR_ROW, "|label", "|{label}", PAIR, PAIR_ROW),
    "ax": {
        "validation": ("diagnostic/diagnostic-full.tsv", DIAGNOSTIC, "||Negation||Artificial|{a}|{b}|{label}"),
        "test": ("diagnostic/diagnostic.tsv", PAIR, PAIR_ROW),
    },
}
TSV["qnli"]["test"] = ("QNLI/test.tsv", "index|question|sentence", "{n}|{b}|{a}")
COLUMNS = {  # of the official files, counted by hand
    "mnli": (12, 16, 10),
    "mnli_mm": (16, 10),
    "mrpc": (5, 5, 5),
    "qqp": (6, 6, 3),
    "stsb": (10, 10, 9),
    "cola": (4, 4, 2),
    "ax": (8, 3),
}


def other_number(n):
    return 133 * n + 40


def tsv_text(name, split):
    _, header, row = TSV[name][split]
    lines = [] if header is None else [header.replace("|", "\t")]
    for n, (fields, label) in enumerate(flat_rows(name, split)):
        a, b = [*fields.values(), ""][:2]
        spelled = f"{float(label):.3f}" if name == "stsb" and label else label
        other = next(one for one in THREE_WAY if one != label)
        filled = {"a": a, "b": b, "n": n, "id": other_number(n), "label": spelled, "other": other}
        filled["star"] = "*" if label == "0" else ""
        lines.append("\t".join(cell.format(**filled) for cell in row.split("|")))
    return "".join(f"{line}\n" for line in lines)


def tsv_kept(name, split, n):
    """The official row number, if the file has one."""
    if split != "test" and name in ("cola", "sst2", "mrpc", "ax"):
        return {}
    return {"idx": other_number(n) if name == "qqp" and split != "test" else n}


# ----------------------------------------------------------------------------------------------- SuperGLUE's files

FOLDERS = {"superglue_rte": "RTE", "boolq": "BoolQ", "cb": "CB", "copa": "COPA", "wic": "WiC", "wsc": "WSC"}
FOLDERS |= {"multirc": "MultiRC", "record": "ReCoRD"}
JSON_LABELS = {"true": True, "false": False, "0": 0, "1": 1}


def json_file(name, split):
    if name in ("axb", "axg"):
        return {"axb": "AX-b/AX-b.jsonl", "axg": "AX-g/AX-g.jsonl"}[name]
    return f"{FOLDERS[name]}/{'val' if split == 'validation' else split}.jsonl"


def json_object(name, fields, n):
    if name in ("cb", "superglue_rte"):
        return {"premise": fields["sentence1"], "hypothesis": fields["sentence2"], "idx": n}
    if name == "axg":
        return {"premise": fields["sentence1"], "hypothesis": fields["sentence2"], "idx": n, "pair_id": 551 + n // 2}
    if name == "axb":
        return {"idx": str(n), **fields, "logic": "Negation"}
    if name == "wic":
        return {**fields, "idx": n, "start1": 2, "start2": 8, "end1": 5, "end2": 9, "version": 1.1}
    return {**fields, "idx": n}


def flat_objects(name, split):
    rows = enumerate(flat_rows(name, split))
    more = [{} if label is None else {"label": JSON_LABELS.get(label, label)} for _, label in flat_rows(name, split)]
    return [json_object(name, fields, n) | more[n] for n, (fields, _) in rows]


STORY = "Ann met Bob Ray in Oslo.\n@highlight\nBob Ray smiled"
STORY_READ = "Ann met Bob Ray in Oslo. Bob Ray smiled."
NESTED = {
    "multirc": [
        {
            "idx": 4,
            "version": 1.1,
            "passage": {
                "text": "Mia baked.",
                "questions": [
                    {"question": "Who?", "idx": 9, "answers": [{"text": "Mia", "idx": 30, "label": 1}]},
                    {
                        "question": "What?",
                        "idx": 10,
                        "answers": [{"text": "A pie", "idx": 31, "label": 0}, {"text": "Tom", "idx": 32, "label": 0}],
                    },
                ],
            },
        }
    ],
    "record": [
        {
            "idx": 2,
            "source": "CNN",
            "passage": {
                "text": STORY,
                "entities": [{"start": 8, "end": 14}, {"start": 0, "end": 2}, {"start": 36, "end": 42}],
            },
            "qas": [
                {
                    "query": "@placeholder smiled at Ann",
                    "idx": 5,
                    "answers": [{"start": 8, "end": 14, "text": "Bob Ray"}],
                },
                {"query": "Bob met @placeholder", "idx": 6, "answers": [{"start": 0, "end": 2, "text": "Ann"}]},
            ],
        }
    ],
    "wsc": [
        {
            "text": "Sam told Al that he won.",
            "target": {"span1_index": 0, "span1_text": "Sam", "span2_index": 4, "span2_text": "he"},
            "idx": 0,
            "label": True,
        },
        {
            "text": "He won, and he knew.",
            "target": {"span1_index": 1, "span1_text": "Won", "span2_index": 3, "span2_text": "he"},
            "idx": 1,
            "label": False,
        },
    ],
}
NESTED_EXPECTED = {
    "multirc": [
        ({"passage": "Mia baked.", "answer": answer, "question": question}, label, kept)
        for question, answer, label, kept in [
            ("Who?", "Mia", "1", {"paragraph": 4, "question": 9, "answer": 30}),
            ("What?", "A pie", "0", {"paragraph": 4, "question": 10, "answer": 31}),
            ("What?", "Tom", "0", {"paragraph": 4, "question": 10, "answer": 32}),
        ]
    ],
    "record": [
        (
            {"passage": STORY_READ, "statement": statement},
            label,
            {"passage": 2, "query": query, "entity": entity, "answers": [answer]},
        )
        for statement, label, query, entity, answer in [
            ("Ann smiled at Ann", "false", 5, "Ann", "Bob Ray"),
            ("Bob Ray smiled at Ann", "true", 5, "Bob Ray", "Bob Ray"),
            ("Bob met Ann", "true", 6, "Ann", "Ann"),
            ("Bob met Bob Ray", "false", 6, "Bob Ray", "Ann"),
        ]
    ],
    "wsc": [
        ({"text": "Sam told Al that *he* won.", "pronoun": "he", "noun": "Sam"}, "true", {"idx": 0}),
        ({"text": "He won, and *he* knew.", "pronoun": "he", "noun": "Won"}, "false", {"idx": 1}),
    ],
}


def without(value, *keys):
    """`value` with `keys` left out at every depth."""
    if isinstance(value, dict):
        return {key: without(one, *keys) for key, one in value.items() if key not in keys}
    return [without(one, *keys) for one in value] if isinstance(value, list) else value


def official(name, split):
    """Path and text of a split's official file."""
    if name in TSV:
        return TSV[name][split][0], tsv_text(name, split)
    objects = NESTED[name] if name in NESTED else flat_objects(name, split)
    if split not in EXPECTED_LABELLED[name]:
        objects = without(objects, "label", "answers") if name == "record" else without(objects, "label")
    return json_file(name, split), "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in objects)


def expected(name, split):
    """(fields, label, kept) of every row."""
    if name in NESTED:
        rows = NESTED_EXPECTED[name]
        if split in EXPECTED_LABELLED[name]:
            return rows
        return [(fields, None, kept | ({"answers": []} if name == "record" else {})) for fields, _, kept in rows]
    found = []
    for n, (fields, label) in enumerate(flat_rows(name, split)):
        kept = tsv_kept(name, split, n) if name in TSV else {"idx": n}
        if name == "axg":
            kept["pair"] = 551 + n // 2
        found.append((fields, f"{float(label):.3f}" if name == "stsb" and label else label, kept))
    return found


def put(root, path, text):
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_bytes(text.encode())


def write_official(root, name, bom="", end="\n"):
    for split in EXPECTED_SPLITS[name]:
        path, text = official(name, split)
        put(root, path, bom + text.replace("\n", end))


def write_benchmarks(root: Path) -> Path:
    """All files of both suites, in `glue/` and `superglue/` below `root`; returns it."""
    for name in ALL:
        write_official(root / ("glue" if name in GLUE else "superglue"), name)
    return root
