"""The official files of all 21 GLUE and SuperGLUE tasks: locations, rows, sizes and missing texts.

The rows are invented; formats are typed in official.py from the benchmarks' own descriptions, not taken from the task
table.
"""

import json
from collections import Counter

import pytest
from hub_files import (
    LAYOUTS,
    check_like_official,
    read,
    write_hub,
)
from official import (
    ALL,
    COLUMNS,
    EXPECTED_LABELLED,
    EXPECTED_SPLITS,
    GLUE,
    SPLITS,
    SUPERGLUE,
    TSV,
    expected,
    official,
    put,
    tsv_text,
    write_official,
)

from extensions.common.errors import UserError
from extensions.data import is_labelled, is_present, load_examples
from extensions.tasks import TASKS


def found(name, split, root):
    return [(example.fields, example.label, example.kept) for example in read(name, split, root)]


def test_the_invented_files_have_the_official_columns():
    """The invented files have as many columns as the benchmarks' descriptions state."""
    for name, counts in COLUMNS.items():
        for split, count in zip(TSV[name], counts, strict=True):
            lines = tsv_text(name, split).removesuffix("\n").split("\n")
            assert {line.count("\t") + 1 for line in lines} == {count}, (name, split)
    assert set(TSV) == set(GLUE) and len(GLUE) + len(SUPERGLUE) == 21


@pytest.mark.parametrize("bom, end", [("", "\n"), ("\ufeff", "\n"), ("", "\r\n"), ("\ufeff", "\r\n")], ids=ascii)
@pytest.mark.parametrize("name", ALL)
def test_official_files(tmp_path, name, bom, end):
    write_official(tmp_path, name, bom, end)
    for split in EXPECTED_SPLITS[name]:
        examples = read(name, split, tmp_path)
        assert [(one.fields, one.label, one.kept) for one in examples] == expected(name, split)
        assert [one.index for one in examples] == list(range(len(examples)))
        assert all(one.task is TASKS[name] for one in examples)


@pytest.mark.parametrize("name", ALL)
def test_splits(tmp_path, name):
    """All splits and the labelled ones; each has its own file, without which it is absent."""
    task = TASKS[name]
    assert [split for split in SPLITS if split in task.source.files] == list(EXPECTED_SPLITS[name])
    assert [split for split in SPLITS if is_labelled(task, split)] == list(EXPECTED_LABELLED[name])
    assert not any(is_present(task, split, str(tmp_path)) for split in SPLITS)
    for split in EXPECTED_SPLITS[name]:
        put(tmp_path, *official(name, split))
        assert is_present(task, split, str(tmp_path))
    assert [split for split in SPLITS if is_present(task, split, str(tmp_path))] == list(EXPECTED_SPLITS[name])
    for split in set(SPLITS) - set(EXPECTED_SPLITS[name]):
        with pytest.raises(UserError, match=f"{name} has no {split} split"):
            read(name, split, tmp_path)


# ---------------------------------------------------------------------------------------------------- where files are


@pytest.mark.parametrize(
    "name, suite", [("cola", "glue"), ("rte", "glue"), ("superglue_rte", "superglue"), ("axg", "superglue")]
)
def test_root_is_the_suites_folder_or_its_parent(tmp_path, name, suite):
    write_official(tmp_path / suite, name)
    for root in (tmp_path, tmp_path / suite):
        for split in EXPECTED_SPLITS[name]:
            assert found(name, split, root) == expected(name, split)
    with pytest.raises(UserError, match="no such file"):
        read(name, "test", tmp_path / suite / TASKS[name].source.files["test"].split("/")[0])


@pytest.mark.parametrize("together", [True, False], ids=["one folder", "two folders"])
def test_both_rte_tasks_read_their_own_file(tmp_path, together):
    for name, suite in (("rte", "glue"), ("superglue_rte", "superglue")):
        write_official(tmp_path if together else tmp_path / suite, name)
    (tmp_path / ("" if together else "glue") / "RTE/train.tsv").write_text(
        "index\tsentence1\tsentence2\tlabel\n0\tof GLUE\tb\tentailment\n"
    )
    assert found("rte", "train", tmp_path) == [({"sentence1": "of GLUE", "sentence2": "b"}, "entailment", {"idx": 0})]
    assert found("superglue_rte", "train", tmp_path) == expected("superglue_rte", "train")
    assert found("rte", "test", tmp_path) == expected("rte", "test")


def test_rte_folders_of_the_hub_are_distinguished_by_suite(tmp_path):
    for name, suite in (("rte", "glue"), ("superglue_rte", "superglue")):
        write_hub(tmp_path / suite, name, LAYOUTS[0])
    for name in ("rte", "superglue_rte"):
        for split in SPLITS:
            check_like_official(name, split, tmp_path)


def test_a_built_in_task_needs_a_root():
    with pytest.raises(UserError, match=r"wic needs data\.root.*WiC/train\.jsonl.*path/to/superglue.*data\.root=hub"):
        load_examples(TASKS["wic"], "train", None)


# ----------------------------------------------------------------------------------------------- counts and gaps


def sized(name, **sizes):
    task = TASKS[name]
    return task.model_copy(update={"source": task.source.model_copy(update={"sizes": sizes})})


def warnings(task, split, root):
    said = []
    load_examples(task, split, str(root), warn=said.append)
    return said


@pytest.mark.parametrize(
    "name, counts", [("rte", (4, 4, 3)), ("wsc", (2, 2, 2)), ("record", (2, 2, 2)), ("multirc", (3, 3, 3))]
)
def test_a_wrong_number_of_rows_is_a_warning(tmp_path, name, counts):
    write_official(tmp_path, name)
    for split, count in zip(SPLITS, counts, strict=True):
        assert warnings(sized(name, **{split: count}), split, tmp_path) == []
        assert warnings(sized(name), split, tmp_path) == []
        [said] = warnings(sized(name, **{split: 900 + count}), split, tmp_path)
        what = "queries" if name == "record" else "rows"  # ReCoRD's official sizes count queries
        for part in (str(tmp_path / official(name, split)[0]), f"{count} {what}", f"has {900 + count}", split):
            assert part in said


QQP = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
QQP_ROWS = [
    "0\t1\t2\tWhy?\tHow?\t0",
    "1\t3\t4\t\tHow?\t1",
    "2\t5\t6\tWhy?",
    "3\t7\t8\tWhere?\t \t0",
    "4\t9\t10\tWho?\tWhich?\t1",
    "5\t11\t12\tWho?\tWhich?\t1\tmore",
]


def test_qqp_rows_with_gaps_are_left_out_of_training(tmp_path):
    put(tmp_path, "QQP/train.tsv", QQP + "".join(f"{row}\n" for row in QQP_ROWS))
    assert [(kept["idx"], label) for _, label, kept in found("qqp", "train", tmp_path)] == [(0, "0"), (4, "1")]
    assert [example.index for example in read("qqp", "train", tmp_path)] == [0, 1]
    path = str(tmp_path / "QQP/train.tsv")
    # skipped rows count towards the size: the official file has them too
    assert warnings(sized("qqp", train=6), "train", tmp_path) == [
        f"{path}: left out 4 rows that lack a text or a column"
    ]
    assert len(warnings(sized("qqp", train=2), "train", tmp_path)) == 2
    whole = QQP + QQP_ROWS[0] + "\n"
    put(tmp_path, "QQP/train.tsv", whole)
    assert warnings(sized("qqp", train=1), "train", tmp_path) == []
    put(tmp_path, "QQP/train.tsv", QQP + QQP_ROWS[1] + "\n")
    with pytest.raises(UserError, match="no rows"):
        read("qqp", "train", tmp_path)


def test_qqp_rows_with_an_empty_question_count_in_evaluation(tmp_path):
    put(tmp_path, "QQP/dev.tsv", QQP + "".join(f"{QQP_ROWS[k]}\n" for k in (0, 1, 3, 4)))
    assert found("qqp", "validation", tmp_path) == [
        ({"question1": "Why?", "question2": "How?"}, "0", {"idx": 0}),
        ({"question1": "", "question2": "How?"}, "1", {"idx": 1}),
        ({"question1": "Where?", "question2": ""}, "0", {"idx": 3}),
        ({"question1": "Who?", "question2": "Which?"}, "1", {"idx": 4}),
    ]
    put(tmp_path, "QQP/test.tsv", "id\tquestion1\tquestion2\n0\tWhy?\t\n1\t\t\n")
    assert found("qqp", "test", tmp_path) == [
        ({"question1": "Why?", "question2": ""}, None, {"idx": 0}),
        ({"question1": "", "question2": ""}, None, {"idx": 1}),
    ]
    assert warnings(sized("qqp", test=2), "test", tmp_path) == []


def test_a_test_row_without_its_columns_is_an_error_even_in_qqp(tmp_path):
    """The evaluation server expects an answer to every row, so none may be skipped silently."""
    put(tmp_path, "QQP/test.tsv", "id\tquestion1\tquestion2\n0\tWhy?\tHow?\n1\tWhy?\n")
    with pytest.raises(UserError, match="line 3: 2 columns, expected 3"):
        read("qqp", "test", tmp_path)


def test_multirc_without_an_answers_text(tmp_path):
    gap = {"idx": 1, "passage": {"text": "P", "questions": [{"question": "Q", "idx": 2, "answers": []}]}}
    for text, idx in (("", 3), ("yes", 4), (None, 5)):
        gap["passage"]["questions"][0]["answers"].append({"text": text, "idx": idx, "label": 1})
    for split in ("train", "val"):
        put(tmp_path, f"MultiRC/{split}.jsonl", json.dumps(gap) + "\n")
    assert [kept["answer"] for _, _, kept in found("multirc", "train", tmp_path)] == [4]
    assert [said.split(": ")[1] for said in warnings(sized("multirc", train=3), "train", tmp_path)] == [
        "left out 2 rows that lack a text or a column"
    ]
    assert [(fields["answer"], kept["answer"]) for fields, _, kept in found("multirc", "validation", tmp_path)] == [
        ("", 3),
        ("yes", 4),
        ("", 5),
    ]


@pytest.mark.parametrize("split, file, label", [("train", "train", "\tentailment"), ("test", "test", "")])
def test_an_empty_text_is_an_error_in_other_tasks(tmp_path, split, file, label):
    header = "index\tsentence1\tsentence2" + ("\tlabel" if label else "")
    put(tmp_path, f"RTE/{file}.tsv", f"{header}\n0\ta\tb{label}\n1\t\tb{label}\n")
    with pytest.raises(UserError, match=rf"{file}\.tsv, line 3, field 'sentence1': expected text, got ''"):
        read("rte", split, tmp_path)


def test_training_on_record_takes_one_right_and_one_wrong_candidate(tmp_path):
    names = ["Ann", "Bob", "Cid", "Dora", "Eve"]
    text = " ".join(names)
    spans = [{"start": text.index(name), "end": text.index(name) + len(name) - 1} for name in names]
    # query 0: two of five are right; query 1: one; query 2: all; query 3: none
    answers = [["Ann", "dora"], ["Bob"], names, ["Zoe"]]
    queries = [
        {"query": f"@placeholder {n}", "idx": n, "answers": [{"text": one} for one in some]}
        for n, some in enumerate(answers)
    ]
    put(
        tmp_path,
        "ReCoRD/train.jsonl",
        json.dumps({"idx": 0, "passage": {"text": text, "entities": spans}, "qas": queries}) + "\n",
    )
    seen = {n: set() for n in range(4)}
    for seed in range(40):
        examples = read("record", "train", tmp_path, seed=seed)
        assert examples == read("record", "train", tmp_path, seed=seed)
        assert [example.index for example in examples] == list(range(6))
        by_query = [[e for e in examples if e.kept["query"] == n] for n in range(4)]
        assert [Counter(e.label for e in unit) for unit in by_query] == [
            {"true": 1, "false": 1},
            {"true": 1, "false": 1},
            {"true": 1},
            {"false": 1},
        ]
        assert [len({e.pair for e in unit}) for unit in by_query] == [1] * 4 and len({e.pair for e in examples}) == 4
        for n, unit in enumerate(by_query):
            seen[n] |= {(e.kept["entity"], e.label) for e in unit}
    assert seen[0] == {("Ann", "true"), ("Dora", "true"), ("Bob", "false"), ("Cid", "false"), ("Eve", "false")}
    assert seen[1] == {("Bob", "true")} | {(name, "false") for name in ("Ann", "Cid", "Dora", "Eve")}
    assert seen[2] == {(name, "true") for name in names} and seen[3] == {(name, "false") for name in names}
    put(tmp_path, "ReCoRD/val.jsonl", (tmp_path / "ReCoRD/train.jsonl").read_text())
    assert len(read("record", "validation", tmp_path)) == 20  # evaluation has them all


def test_each_query_of_record_draws_for_itself(tmp_path):
    text = " ".join("abcdefgh")
    objects = [
        {
            "idx": n,
            "passage": {"text": text, "entities": [{"start": 2 * k, "end": 2 * k} for k in range(8)]},
            "qas": [{"query": "@placeholder", "idx": n, "answers": [{"text": "b"}, {"text": "c"}]}],
        }
        for n in range(60)
    ]
    put(tmp_path, "ReCoRD/train.jsonl", "".join(json.dumps(one) + "\n" for one in objects))
    drawn = Counter((e.label, e.kept["entity"]) for e in read("record", "train", tmp_path))
    assert set(drawn) == {("true", name) for name in "bc"} | {("false", name) for name in "adefgh"}
    # of 60 draws each of two gets about 30, each of six about 10; within four standard deviations
    assert all(14 <= drawn["true", name] <= 46 for name in "bc")
    assert all(1 <= drawn["false", name] <= 22 for name in "adefgh")
