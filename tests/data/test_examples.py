"""Examples from TSV and JSONL files: valid, hostile and malformed."""

import datetime
import json
from collections import Counter

import pyarrow
import pyarrow.parquet
import pytest

from extensions.common.errors import UserError
from extensions.data import (
    has_split,
    is_labelled,
    is_present,
    load_examples,
)
from extensions.tasks import TASKS, Hub, Task

COLA, SST2, RTE, STSB = (TASKS[name] for name in ("cola", "sst2", "rte", "stsb"))

OWN = Task.model_validate(
    {
        "name": "own",
        "description": "Judge.",
        "question": "{premise} {hypothesis}",
        "labels": {"true": ["Yes"], "false": ["No"], "2": ["Perhaps"]},
        "source": {"files": {"train": "train.jsonl", "test": "test.jsonl"}, "unlabelled": ["test"]},
    }
)


@pytest.fixture
def root(tmp_path):
    for folder in ("CoLA", "SST-2", "RTE", "STS-B"):
        (tmp_path / folder).mkdir()
    return tmp_path


def put(root, name, content):
    (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def rows(task, split, root):
    return [(example.fields, example.label) for example in load_examples(task, split, str(root))]


def refused(task, split, root):
    with pytest.raises(UserError) as caught:
        load_examples(task, split, str(root))
    return str(caught.value)


SST2_ROWS = [({"sentence": "a fine film"}, "1"), ({"sentence": "dull"}, "0")]


@pytest.mark.parametrize(
    "content",
    [
        "sentence\tlabel\na fine film\t1\ndull\t0\n",
        "sentence\tlabel\na fine film\t1\ndull\t0",
        "sentence\tlabel\r\na fine film\t1\r\ndull\t0\r\n",
        "\ufeffsentence\tlabel\na fine film\t1\ndull\t0\n",
        "\ufeffsentence\tlabel\r\na fine film\t1\r\ndull\t0",
        "sentence\tlabel\na fine film\t1\n\ndull\t0\n\n\n",
        "label\tsentence\n1\ta fine film\n0\tdull\n",
        "index\tsentence\tlabel\tmore\n7\ta fine film \t1\t\n8\tdull\t0\t\n",
    ],
    ids=["plain", "no last line end", "CRLF", "BOM", "BOM and CRLF", "blank lines", "other order", "more columns"],
)
def test_tsv_with_a_header(root, content):
    put(root, "SST-2/train.tsv", content)
    assert rows(SST2, "train", root) == SST2_ROWS
    assert [example.index for example in load_examples(SST2, "train", str(root))] == [0, 1]


def test_quotes_and_line_separators_are_plain_characters(root):
    texts = ['"Open, he said', 'a "b" c', "''", '"', "a\u2028b\x85c\x0bd\x1ce", "back\\slash \\t", "#no comment", "NA"]
    put(root, "SST-2/train.tsv", "sentence\tlabel\n" + "".join(f"{text}\t1\n" for text in texts))
    assert [fields["sentence"] for fields, _ in rows(SST2, "train", root)] == texts


def test_cola_has_a_header_only_in_its_test_file(root):
    put(root, "CoLA/train.tsv", "gj04\t1\t\tThe sailors rode.\ncj99\t0\t*\tThe sailors ride breeze.\n")
    put(root, "CoLA/test.tsv", "index\tsentence\n0\tBill whistled.\n")
    assert rows(COLA, "train", root) == [
        ({"sentence": "The sailors rode."}, "1"),
        ({"sentence": "The sailors ride breeze."}, "0"),
    ]
    assert rows(COLA, "test", root) == [({"sentence": "Bill whistled."}, None)]
    assert is_labelled(COLA, "validation") and not is_labelled(COLA, "test") and has_split(COLA, "test")


@pytest.mark.parametrize(
    "content, parts",
    [
        ("sentence\tlabel\nfine\t1\nfine\t1\tmore\n", ["line 3", "3 columns", "expected 2", "sentence, label"]),
        ("sentence\tlabel\nfine\n", ["line 2", "1 columns", "expected 2"]),
        ("sentence\tlabel\nfine\t1\n\nbad\n", ["line 4", "1 columns"]),
        ("sentence\tlabel\nfine\t2\n", ["line 2", "'label'", "'2'", "'1', '0'", "sst2"]),
        ("sentence\tlabel\nfine\t\n", ["line 2", "'label'", "''"]),
        ("sentence\tlabel\nfine\tTrue\n", ["line 2", "'label'", "'True'"]),
        ("sentence\tlabel\n\t1\n", ["line 2", "'sentence'", "expected text"]),
        ("text\tlabel\nfine\t1\n", ["line 2", "'sentence'", "text, label"]),
        ("sentence\tgold\nfine\t1\n", ["line 2", "'label'", "sentence, gold"]),
        ("sentence\tlabel\n", ["no rows"]),
        ("", ["no rows"]),
        ("\n\n", ["no rows"]),
        (b"sentence\tlabel\nfine\t1\ncaf\xe9 au lait\t1\n", ["line 3", "not valid UTF-8", "byte 4", "e9"]),
        (b"\xff\xfes\x00e\x00", ["line 1", "not valid UTF-8", "ff"]),
        pytest.param(
            "sentence\tlabel\nfine\t1\n \t \n",
            ["line 3"],
        ),
    ],
)
def test_a_malformed_tsv_is_named_with_file_line_and_field(root, content, parts):
    put(root, "SST-2/train.tsv", content)
    message = refused(SST2, "train", root)
    for part in ("train.tsv", *parts):
        assert part in message


def test_cola_rows_must_have_four_columns(root):
    put(root, "CoLA/train.tsv", "gj04\t1\tThe sailors rode.\n")
    assert "line 1: 3 columns, expected 4" in refused(COLA, "train", root)


@pytest.mark.parametrize("score", ["5.001", "-0.2", "nan", "NaN", "inf", "-inf", "", "five", "1e400", "3,5", "0x1"])
def test_scores_out_of_range_are_refused(root, score):
    put(root, "STS-B/train.tsv", f"sentence1\tsentence2\tscore\na\tb\t{score}\n")
    message = refused(STSB, "train", root)
    for part in ("train.tsv", "line 2", "'score'", "0 to 5", repr(score)):
        assert part in message


@pytest.mark.parametrize("score", ["0", "5", "5.000", "0.0", "3.857", " 2.5 "])
def test_scores_in_range_are_kept_unchanged(root, score):
    put(root, "STS-B/train.tsv", f"sentence1\tsentence2\tscore\na\tb\t{score}\n")
    assert rows(STSB, "train", root) == [({"sentence1": "a", "sentence2": "b"}, score.strip())]


@pytest.mark.parametrize("score", ["1e0", "+3", "３", "4_0e-1"])
def test_scores_in_other_notations_are_refused(root, score):
    put(root, "STS-B/train.tsv", f"sentence1\tsentence2\tscore\na\tb\t{score}\n")
    assert "'score'" in refused(STSB, "train", root)


# ----------------------------------------------------------------------------------------------------------- JSONL


def jsonl(*records):
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


@pytest.mark.parametrize(
    "label, expected", [(True, "true"), (False, "false"), (2, "2"), ("2", "2"), (" true ", "true")]
)
def test_label_types(root, label, expected):
    put(root, "train.jsonl", jsonl({"premise": "a", "hypothesis": "b", "label": label, "idx": 0}))
    assert rows(OWN, "train", root) == [({"premise": "a", "hypothesis": "b"}, expected)]


@pytest.mark.parametrize("named", ["n\u00e9gatif", "ne\u0301gatif"])
def test_labels_match_in_another_unicode_form(root, named):
    task = Task.model_validate(OWN.model_dump(exclude_defaults=True) | {"labels": ["positif", named], "positive": None})
    records = [
        {"premise": "a", "hypothesis": "b", "label": label} for label in ("n\u00e9gatif", "ne\u0301gatif", "positif")
    ]
    put(root, "train.jsonl", jsonl(*records))
    assert [label for _, label in rows(task, "train", root)] == [named, named, "positif"]
    put(root, "train.jsonl", jsonl({"premise": "a", "hypothesis": "b", "label": "negatif"}))
    assert "'negatif' is not one of" in refused(task, "train", root)


@pytest.mark.parametrize("start, end", [("", "\n"), ("\ufeff", "\n"), ("", "\r\n"), ("\ufeff", "\r\n")])
def test_jsonl_with_bom_and_crlf(root, start, end):
    text = "line\u2028separator\u2029 \x85 next\u000b"
    records = [{"premise": text, "hypothesis": "b", "label": True}] * 2
    put(root, "train.jsonl", start + end.join(json.dumps(r, ensure_ascii=False) for r in records) + end)
    assert [fields["premise"] for fields, _ in rows(OWN, "train", root)] == [text.strip()] * 2


def test_an_unlabelled_split_needs_no_label(root):
    put(root, "test.jsonl", jsonl({"premise": "a", "hypothesis": "b"}))
    assert rows(OWN, "test", root) == [({"premise": "a", "hypothesis": "b"}, None)]


GOOD = {"premise": "a", "hypothesis": "b", "label": True}


@pytest.mark.parametrize(
    "line, parts",
    [
        ('{"premise": "a"', ["line 2", "not valid JSON"]),
        ("[1, 2]", ["line 2", "expected a JSON object", "list"]),
        ("null", ["line 2", "expected a JSON object", "NoneType"]),
        (jsonl({"premise": "a", "label": True}), ["line 2", "'hypothesis'", "premise, label"]),
        (jsonl({"premise": "a", "hypothesis": "b"}), ["line 2", "'label'"]),
        (jsonl(GOOD | {"label": 1}), ["line 2", "'label'", "'1'", "own"]),
        (jsonl(GOOD | {"label": None}), ["line 2", "'label'", "'None'"]),
        (jsonl(GOOD | {"label": 2.5}), ["line 2", "'label'", "'2.5'"]),
        (jsonl(GOOD | {"label": ["true"]}), ["line 2", "'label'"]),
        (jsonl(GOOD | {"hypothesis": ""}), ["line 2", "'hypothesis'", "expected text", "''"]),
        (jsonl(GOOD | {"hypothesis": None}), ["line 2", "'hypothesis'", "None"]),
        (jsonl(GOOD | {"hypothesis": {"text": 3}}), ["line 2", "'hypothesis'", "3"]),
        (jsonl(GOOD | {"hypothesis": ["b"]}), ["line 2", "'hypothesis'"]),
        ('{"premise": "a", "hypothesis": "b", "label": ' + "1" * 5000 + "}", ["line 2"]),
        pytest.param(
            '{"premise": ' + "[" * 200000,
            ["line 2", "not valid JSON"],
        ),
        pytest.param(
            '{"premise": "a\\ud800", "hypothesis": "b", "label": true}',
            ["line 2", "'premise'"],
        ),
    ],
)
def test_a_malformed_jsonl_is_named_with_file_line_and_field(root, line, parts):
    put(root, "train.jsonl", jsonl(GOOD) + line + "\n")
    message = refused(OWN, "train", root)
    for part in ("train.jsonl", *parts):
        assert part in message


@pytest.mark.parametrize("label", ["NaN", "Infinity", "true", "null", '"x"', '"~3"', '"3.5."', '"(3)"', "6", "[1]"])
def test_jsonl_scores_are_checked(root, label):
    source = {"files": {"train": "train.jsonl"}}
    entry = {"name": "own", "description": "-", "question": "{text}", "score_range": [0.0, 5.0], "metrics": ["pearson"]}
    task = Task.model_validate(entry | {"source": source})
    put(root, "train.jsonl", f'{{"text": "a", "label": {label}}}\n')
    message = refused(task, "train", root)
    assert "line 1" in message and "'label'" in message and "0 to 5" in message


def test_missing_files_splits_and_folders(root):
    assert "SST-2/train.tsv: no such file" in refused(SST2, "train", root).replace("\\", "/")
    assert "own has no validation split" in refused(OWN, "validation", root)
    assert "is not a folder" in refused(SST2, "train", root / "nowhere")
    with pytest.raises(UserError, match=r"sst2 needs data\.root.*SST-2/train\.tsv"):
        load_examples(SST2, "train", None)
    (root / "train.jsonl").mkdir()
    assert "no such file" in refused(OWN, "train", root)


def test_names_that_are_too_long_for_the_file_system(root):
    assert "cannot be looked up (task sst2, split train" in refused(SST2, "train", root / ("x" * 300))
    source = OWN.source.model_copy(update={"files": {"train": "x" * 300}})
    message = refused(OWN.model_copy(update={"source": source}), "train", root)
    assert "check data.root and the task's source" in message


@pytest.mark.parametrize("config", ["/abs", "**b"])
def test_configs_of_the_hub_that_are_not_patterns(root, config):
    hub = Hub(repo="a/b", config=config)
    task = OWN.model_copy(update={"source": OWN.source.model_copy(update={"hub": hub})})
    assert "cannot be looked up" in refused(task, "train", root)


KEEPING = {"files": {"train": "train.jsonl"}, "keep": {"group": "g"}}


@pytest.mark.parametrize("value", ["NaN", "-Infinity", "1e999", '"\\ud800"', '["\\udfff"]', '{"a": [NaN]}'])
def test_kept_values_must_be_valid_json(root, value):
    task = Task.model_validate(OWN.model_dump(exclude={"source"}) | {"source": KEEPING})
    put(root, "train.jsonl", jsonl(GOOD | {"g": [1, "a", None]}, GOOD))
    assert [e.kept for e in load_examples(task, "train", str(root))] == [{"group": [1, "a", None]}, {}]
    put(root, "train.jsonl", jsonl(GOOD) + jsonl(GOOD)[:-2] + f', "g": {value}' + "}\n")
    message = refused(task, "train", root)
    assert "train.jsonl, line 2, field 'g': " in message and "cannot be written to a file of predictions" in message


def test_dates_of_a_parquet_file_cannot_be_kept(root):
    (root / "boolq").mkdir()
    columns = {"passage": ["a"], "question": ["b"], "label": [1]}
    for idx, part in (
        (pyarrow.array([datetime.timedelta(seconds=1)]), "row 1, field 'idx': datetime.timedelta(seconds=1) cannot"),
        (pyarrow.array([2**30], pyarrow.date32()), "cannot be read after row 0"),  # a date beyond Python's range
    ):
        pyarrow.parquet.write_table(pyarrow.table(columns | {"idx": idx}), root / "boolq" / "train-0.parquet")
        assert part in refused(TASKS["boolq"], "train", root)


def test_columns_of_group_by_must_exist(root):
    source = {"source": KEEPING, "group_by": ["group"]}
    task = Task.model_validate(OWN.model_dump(exclude={"source", "group_by"}) | source)
    put(root, "train.jsonl", jsonl(GOOD | {"g": 1}, GOOD))
    assert "train.jsonl, line 2: no field 'g'" in refused(task, "train", root)


def test_own_files_need_no_root(root, monkeypatch):
    put(root, "train.jsonl", jsonl(GOOD))
    monkeypatch.chdir(root)
    assert len(load_examples(OWN, "train", None)) == 1


def test_generated_rows():
    task = TASKS["acceptability"]
    for split in ("train", "validation", "test"):
        assert has_split(task, split) and is_labelled(task, split)
        examples = load_examples(task, split, None)
        assert examples == load_examples(task, split, None)
        assert Counter(e.label for e in examples) == {"0": len(examples) / 2, "1": len(examples) / 2}
        assert set(Counter(e.pair for e in examples).values()) == {2}


@pytest.mark.parametrize(
    "task, counts",
    [
        (COLA, (8551, 1043, 1063)),
        (SST2, (67349, 436, 1821)),
        (RTE, (2490, 277, 3000)),
        (STSB, (5749, 1500, 1379)),
    ],
    ids=lambda value: value.name if isinstance(value, Task) else None,
)
def test_row_counts_of_the_real_files(data_root, task, counts):
    for split, count in zip(("train", "validation", "test"), counts, strict=True):
        examples = load_examples(task, split, str(data_root / "glue"))
        assert len(examples) == count
        assert all((example.label is not None) == (split != "test") for example in examples)
        assert [example.index for example in examples] == list(range(count))
        assert not any('""' in text or "\t" in text for example in examples[:500] for text in example.fields.values())


def test_own_files_need_no_root_beside_tasks_of_the_hub(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text('{"premise": "a", "hypothesis": "b", "label": true}\n')
    task = OWN.model_copy(update={"source": OWN.source.model_copy(update={"files": {"train": str(path)}})})
    assert is_present(task, "train", "hub") and not is_present(task, "test", "hub")
    assert [example.label for example in load_examples(task, "train", "hub")] == ["true"]
