"""All 21 GLUE and SuperGLUE tasks: every official file, the hub's form of it, and the facts of the benchmarks.

Sizes, class orders and names are typed here and in official.py from the benchmarks' own descriptions and not taken from
the entries that are tested; the rows are invented.
"""

import json
from collections import Counter

import pyarrow
import pyarrow.parquet
import pytest
from official import (
    ALL,
    COLUMNS,
    EXPECTED_LABELLED,
    EXPECTED_SPLITS,
    GLUE,
    LABELS,
    NESTED,
    SPLITS,
    SUPERGLUE,
    TSV,
    expected,
    flat_rows,
    json_file,
    official,
    put,
    tsv_text,
    without,
    write_benchmarks,
    write_official,
)

from extensions.common.errors import UserError
from extensions.data import by_question, is_labelled, is_present, load_examples
from extensions.data.splits import RunData
from extensions.prompts import answer_format
from extensions.recipe import Recipe
from extensions.tasks import SUITES, TASKS


def read(name, split, root, **more):
    return load_examples(TASKS[name], split, str(root), **more)


def found(name, split, root):
    return [(example.fields, example.label, example.kept) for example in read(name, split, root)]


def test_the_files_of_this_test_are_of_the_official_form():
    """What this file writes has the columns that the benchmark's descriptions count."""
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
    """Which splits there are, and which are labelled; each from a file of its own, without which it is absent."""
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


# ------------------------------------------------------------------------------------------------- the hub's files

CONFIGS = {**{name: name for name in ALL}, "mnli_mm": "mnli", "superglue_rte": "rte"}
HUB_FIELDS = {
    name: {"sentence1": "premise", "sentence2": "hypothesis"}
    for name in ("mnli", "mnli_mm", "ax", "cb", "superglue_rte", "axg")
}
HUB_REPOS = {**dict.fromkeys(GLUE, "nyu-mll/glue"), **dict.fromkeys(SUPERGLUE, "aps/super_glue")}


def hub_split(name, split):
    if name in ("mnli", "mnli_mm") and split != "train":
        return f"{split}_{'matched' if name == 'mnli' else 'mismatched'}"
    return split


def hub_rows(name, split):
    """The rows as the hub has them, all columns at the top, labels as class numbers."""
    labelled = split in EXPECTED_LABELLED[name]
    if name == "multirc":
        [one] = NESTED[name]
        return [
            {
                "paragraph": one["passage"]["text"],
                "question": question["question"],
                "answer": answer["text"],
                "idx": {"paragraph": one["idx"], "question": question["idx"], "answer": answer["idx"]},
                "label": answer["label"] if labelled else -1,
            }
            for question in one["passage"]["questions"]
            for answer in question["answers"]
        ]
    if name == "record":
        [one] = NESTED[name]
        return [
            {
                "passage": one["passage"]["text"],
                "query": query["query"],
                "entities": ["Ann", "Bob Ray"],
                "entity_spans": {
                    "text": ["Ann", "Bob Ray", "Bob Ray"],
                    "start": [0, 8, 36],
                    "end": [3, 15, 43],
                },
                "answers": [answer["text"] for answer in query["answers"]] if labelled else [],
                "idx": {"passage": one["idx"], "query": query["idx"]},
            }
            for query in one["qas"]
        ]
    if name == "wsc":
        return [
            without(one, "target", "label") | one["target"] | {"label": int(one["label"]) if labelled else -1}
            for one in NESTED[name]
        ]
    columns, rows = HUB_FIELDS.get(name, {}), []
    for n, (fields, label) in enumerate(flat_rows(name, split)):
        number = -1 if label is None else float(label) if name == "stsb" else LABELS[name].index(label)
        rows.append({columns.get(field, field): text for field, text in fields.items()} | {"label": number, "idx": n})
    return rows


def write_parquet(path, rows, scores=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.Table.from_pylist(rows)
    if scores:
        column = pyarrow.array([row["label"] for row in rows], pyarrow.float32())
        table = table.set_column(table.column_names.index("label"), "label", column)
    pyarrow.parquet.write_table(table, path)


def hub_splits(name):
    return [split for split in EXPECTED_SPLITS[name] if (name, split) != ("ax", "validation")]  # no labels there


def write_hub(root, name, layout):
    for split in hub_splits(name):
        path = root / layout.format(config=CONFIGS[name], split=hub_split(name, split))
        write_parquet(path, hub_rows(name, split), scores=name == "stsb")


def alike(label):
    """Scores are compared as numbers: the official files have 3.800 and the hub 3.8."""
    try:
        return float(label)
    except (TypeError, ValueError):
        return label


LAYOUTS = ["{config}/{split}-00000-of-00001.parquet", "{config}/{split}/0000.parquet"]


def check_like_official(name, split, root):
    examples = read(name, split, root)
    rows = expected(name, split)
    assert [example.fields for example in examples] == [fields for fields, _, _ in rows]
    if name == "stsb":
        assert [alike(example.label) for example in examples] == [alike(label) for _, label, _ in rows]
    else:
        assert [example.label for example in examples] == [label for _, label, _ in rows]
    if split == "test":  # the numbers by which the evaluation server knows the rows
        numbers = [kept.get("idx") for _, _, kept in rows]
        if name in ("multirc", "record"):
            assert [example.kept for example in examples] == [kept for _, _, kept in rows]
        else:
            assert [example.kept.get("idx", example.index) for example in examples] == numbers
    if TASKS[name].group_by:
        grouped = [[example.index for example in unit] for unit in by_question(examples)]
        keys = [tuple(kept[key] for key in TASKS[name].group_by) for _, _, kept in rows]
        assert grouped == [[i for i, key in enumerate(keys) if key == one] for one in dict.fromkeys(keys)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ALL)
def test_the_hubs_files_give_the_official_rows(tmp_path, name, layout):
    write_hub(tmp_path, name, layout)
    for split in hub_splits(name):
        check_like_official(name, split, tmp_path)
    assert [split for split in SPLITS if is_present(TASKS[name], split, str(tmp_path))] == hub_splits(name)


def test_scores_of_the_hub_are_spelled_as_people_write_them(tmp_path):
    """32-bit 3.8 is 3.799999952316284."""
    write_hub(tmp_path, "stsb", LAYOUTS[0])
    assert [example.label for example in read("stsb", "train", tmp_path)] == ["0", "3.8", "4.333", "5"]


@pytest.mark.parametrize("layout", ["{n:05d}-of-00012", "/{n:04d}"])
def test_shards_are_read_in_order(tmp_path, layout):
    for n in reversed(range(12)):
        name = f"train/{n:04d}.parquet" if layout.startswith("/") else f"train-{layout.format(n=n)}.parquet"
        rows = [{"sentence": f"{n} {k}", "label": k % 2, "idx": 3 * n + k} for k in range(3)]
        write_parquet(tmp_path / "cola" / name, rows)
    examples = read("cola", "train", tmp_path)
    assert [example.fields["sentence"] for example in examples] == [f"{n} {k}" for n in range(12) for k in range(3)]
    assert [example.index for example in examples] == list(range(36))


def test_a_split_does_not_take_the_files_of_another(tmp_path):
    """All of MNLI is in one folder of the hub."""
    for split in ("train", "test", "validation_matched", "test_matched", "validation_mismatched", "test_mismatched"):
        row = {"premise": split, "hypothesis": "b", "label": 0, "idx": 0}
        write_parquet(tmp_path / f"mnli/{split}-00000-of-00001.parquet", [row])
    for name in ("mnli", "mnli_mm"):
        for split in EXPECTED_SPLITS[name]:
            texts = [example.fields["sentence1"] for example in read(name, split, tmp_path)]
            assert texts == [hub_split(name, split)]


def test_official_files_go_before_the_hubs(tmp_path):
    write_hub(tmp_path, "cola", LAYOUTS[0])
    put(tmp_path, "CoLA/train.tsv", "gj04\t1\t\tThe official row.\n")
    assert [example.fields["sentence"] for example in read("cola", "train", tmp_path)] == ["The official row."]


@pytest.mark.parametrize(
    "name, row, parts",
    [
        ("cola", {"sentence": "a", "label": -1}, ["row 2", "'label'", "'-1'", "'1', '0'"]),
        ("cola", {"sentence": "a", "label": None}, ["row 2", "'label'", "'None'"]),
        ("cola", {"sentence": "a"}, ["row 2", "'label'"]),
        ("cola", {"sentence": None, "label": 1}, ["row 2", "'sentence'", "expected text, got None"]),
        ("mnli", {"premise": "a", "hypothesis": "b", "label": 3}, ["row 2", "'label'", "'3'", "'entailment'"]),
        ("mnli", {"premise": "a", "hypothesis": " ", "label": 0}, ["row 2", "'hypothesis'"]),
        ("stsb", {"sentence1": "a", "sentence2": "b", "label": 5.5}, ["row 2", "'label'", "'5.5'", "0 to 5"]),
        ("stsb", {"sentence1": "a", "sentence2": "b", "label": float("nan")}, ["row 2", "'label'", "'nan'"]),
        ("wsc", {"text": "a", "span2_text": "he"}, ["row 2", "WSC's format"]),
        ("record", {"passage": "a", "query": "b", "entities": None}, ["row 2", "ReCoRD's format"]),
    ],
)
def test_a_malformed_row_of_the_hub_is_named(tmp_path, name, row, parts):
    good = hub_rows(name, "train")[0]
    schema = pyarrow.Table.from_pylist([good, row]).schema
    path = tmp_path / CONFIGS[name] / "train-00000-of-00001.parquet"
    path.parent.mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([good, row], schema), path)
    with pytest.raises(UserError) as caught:
        read(name, "train", tmp_path)
    for part in (str(path), *parts):
        assert part in str(caught.value)


def test_a_column_that_the_hubs_file_lacks_is_named(tmp_path):
    write_parquet(tmp_path / "cola/train-00000-of-00001.parquet", [{"text": "a", "label": 1}])
    with pytest.raises(UserError, match=r"row 1: no field 'sentence'; the row has: text, label"):
        read("cola", "train", tmp_path)


def test_a_file_of_the_hub_without_rows(tmp_path):
    path = tmp_path / "cola/train-00000-of-00001.parquet"
    path.parent.mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"sentence": pyarrow.array([], pyarrow.string()), "label": []}), path)
    with pytest.raises(UserError, match="no rows"):
        read("cola", "train", tmp_path)


def test_a_damaged_parquet_file_is_named(tmp_path):
    path = tmp_path / "cola/train-00000-of-00001.parquet"
    rows = [{"sentence": f"sentence {n} {n * n}", "label": 1} for n in range(5000)]
    write_parquet(path, rows)
    whole = path.read_bytes()
    for damaged in (b"", b"no parquet", whole[:-100], whole[:500] + bytes(range(256)) * 8 + whole[2548:]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"cannot be read.*download it again") as caught:
            read("cola", "train", tmp_path)
        assert str(path) in str(caught.value)
    path.write_bytes(whole)
    assert len(read("cola", "train", tmp_path)) == 5000


# --------------------------------------------------------------------------------------------------- data.root: hub

COMMIT, CONVERTED = "1" * 40, "2" * 40


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the hub's client, without a network."""
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def snapshot(cache, repo, revision="main", commit=COMMIT):
    """The folder of a revision in the cache."""
    folder = cache / f"datasets--{repo.replace('/', '--')}"
    reference = folder / "refs" / revision
    reference.parent.mkdir(parents=True, exist_ok=True)
    reference.write_text(commit)
    (folder / "snapshots" / commit).mkdir(parents=True, exist_ok=True)
    return folder / "snapshots" / commit


@pytest.mark.parametrize("name", ALL)
def test_root_hub_reads_the_cache(cache, name):
    write_hub(snapshot(cache, HUB_REPOS[name]), name, LAYOUTS[0])
    for split in hub_splits(name):
        assert is_present(TASKS[name], split, "hub")
        check_like_official(name, split, "hub")


@pytest.mark.parametrize("name", ["mnli", "superglue_rte", "axg"])
def test_root_hub_falls_back_on_the_hubs_own_conversion(cache, name):
    """The branch refs/convert/parquet, where the main one has a script, or nothing of this task."""
    folder = snapshot(cache, HUB_REPOS[name], "refs/convert/parquet", CONVERTED)
    write_hub(folder, name, LAYOUTS[1])
    for _ in range(2):
        for split in hub_splits(name):
            check_like_official(name, split, "hub")
        put(snapshot(cache, HUB_REPOS[name]), "glue.py", "a script")  # main without the files


def test_root_hub_prefers_the_main_branch(cache):
    for revision, commit, text in (("main", COMMIT, "main"), ("refs/convert/parquet", CONVERTED, "converted")):
        folder = snapshot(cache, "nyu-mll/glue", revision, commit)
        write_parquet(folder / "cola/train-00000-of-00001.parquet", [{"sentence": text, "label": 1, "idx": 0}])
    assert [example.fields["sentence"] for example in read("cola", "train", "hub")] == ["main"]


@pytest.mark.parametrize("name, split", [("mnli_mm", "validation"), ("wsc", "train"), ("axg", "test")])
def test_root_hub_without_network_or_cache_says_what_to_do(cache, name, split):
    with pytest.raises(UserError) as caught:
        read(name, split, "hub")
    for part in ("data.root: hub", HUB_REPOS[name], f"task {name}", f"split {split}", "network", "official download"):
        assert part in str(caught.value)
    with pytest.raises(UserError):
        is_present(TASKS[name], split, "hub")


def test_root_hub_lacks_the_labelled_diagnostic_set(cache):
    write_hub(snapshot(cache, "nyu-mll/glue"), "ax", LAYOUTS[0])
    assert is_present(TASKS["ax"], "test", "hub") and not is_present(TASKS["ax"], "validation", "hub")
    with pytest.raises(UserError, match=r"nyu-mll/glue.*task ax, split validation"):
        read("ax", "validation", "hub")


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


def test_the_hubs_two_rte_folders_are_told_apart_by_suite(tmp_path):
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
    # the rows left out count as found: the official file has them too
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
    """The evaluation server wants an answer for every row, so none may be left out unseen."""
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
    # of 60 draws each of two has about 30, each of six about 10; four deviations either way
    assert all(14 <= drawn["true", name] <= 46 for name in "bc")
    assert all(1 <= drawn["false", name] <= 22 for name in "adefgh")


# ----------------------------------------------------------------------------------------------- the benchmarks' facts

SIZES = {  # train, validation, test; as the benchmarks publish them
    "cola": (8551, 1043, 1063),
    "sst2": (67349, 872, 1821),
    "mrpc": (3668, 408, 1725),
    "stsb": (5749, 1500, 1379),
    "qqp": (363846, 40430, 390965),
    "mnli": (392702, 9815, 9796),
    "mnli_mm": (None, 9832, 9847),
    "qnli": (104743, 5463, 5463),
    "rte": (2490, 277, 3000),
    "wnli": (635, 71, 146),
    "ax": (None, 1104, 1104),
    "boolq": (9427, 3270, 3245),
    "cb": (250, 56, 250),
    "copa": (400, 100, 500),
    "multirc": (27243, 4848, 9693),
    "record": (100730, 10000, 10000),
    "superglue_rte": (2490, 277, 3000),
    "wic": (5428, 638, 1400),
    "wsc": (554, 104, 146),
    "axb": (None, None, 1104),
    "axg": (None, None, 356),
}
SUBMISSION = {
    **{"cola": "CoLA.tsv", "sst2": "SST-2.tsv", "mrpc": "MRPC.tsv", "qqp": "QQP.tsv", "stsb": "STS-B.tsv"},
    **{"mnli": "MNLI-m.tsv", "mnli_mm": "MNLI-mm.tsv", "qnli": "QNLI.tsv", "rte": "RTE.tsv", "wnli": "WNLI.tsv"},
    **{"ax": "AX.tsv", "boolq": "BoolQ.jsonl", "cb": "CB.jsonl", "copa": "COPA.jsonl", "multirc": "MultiRC.jsonl"},
    **{"record": "ReCoRD.jsonl", "superglue_rte": "RTE.jsonl", "wic": "WiC.jsonl", "wsc": "WSC.jsonl"},
    **{"axb": "AX-b.jsonl", "axg": "AX-g.jsonl"},
}


def test_the_suites_are_complete():
    assert {suite: {task.name for task in tasks} for suite, tasks in SUITES.items()} == {
        "glue": set(GLUE),
        "superglue": set(SUPERGLUE),
    }


def test_official_sizes():
    assert {name: tuple(TASKS[name].source.sizes.get(split) for split in SPLITS) for name in SIZES} == SIZES


def test_tasks_without_a_training_split():
    assert {name for name in SIZES if "train" not in TASKS[name].source.files} == {"mnli_mm", "ax", "axb", "axg"}


def test_submission_files():
    assert {name: TASKS[name].submission.file for name in SUBMISSION} == SUBMISSION


def test_labels_of_the_evaluation_server():
    """COPA and MultiRC take numbers, WSC the words True and False, and BoolQ and WiC true and false."""
    special = {name: TASKS[name].submission.labels for name in SIZES if TASKS[name].submission.labels}
    assert special == {
        "copa": {"0": 0, "1": 1},
        "multirc": {"0": 0, "1": 1},
        "wsc": {"true": "True", "false": "False"},
    }
    nested = {name: TASKS[name].submission.nesting for name in SIZES if TASKS[name].submission.nesting}
    assert nested == {"multirc": "multirc", "record": "record"}


def test_the_averages_are_over_the_papers_columns():
    """WNLI and the diagnostic sets count in neither average."""
    assert {name for name in GLUE if TASKS[name].in_suite_average} == set(GLUE) - {"wnli", "ax"}
    assert {name for name in SUPERGLUE if TASKS[name].in_suite_average} == set(SUPERGLUE) - {"axb", "axg"}


METRICS = {
    **dict.fromkeys(("cola", "ax", "axb"), ("matthews",)),
    **dict.fromkeys(("sst2", "mnli", "mnli_mm", "qnli", "rte", "wnli"), ("accuracy",)),
    **dict.fromkeys(("boolq", "copa", "superglue_rte", "wic", "wsc"), ("accuracy",)),
    **dict.fromkeys(("mrpc", "qqp"), ("f1",)),
    "stsb": ("spearman",),
    "cb": ("f1_macro", "accuracy"),
    "multirc": ("f1a", "exact_match"),
    "record": ("squad_f1", "squad_em"),
    "axg": ("gender_parity", "accuracy"),
}


def test_metrics():
    assert {name: tuple(TASKS[name].metrics) for name in ALL} == METRICS


def test_labels():
    for name in SIZES:
        task = TASKS[name]
        if name == "stsb":
            assert task.score_range == (0, 5) and not task.labels
        else:
            assert set(task.labels) == set(LABELS[name]), name
            assert all(f'"{task.answer(label)}"' in answer_format(task) for label in task.labels), name


PROMPT = ("description", "answer_format", "question", "labels")


@pytest.mark.parametrize("names", [("mnli", "mnli_mm", "ax", "cb"), ("rte", "superglue_rte", "axb", "axg")])
def test_what_is_one_task_has_one_prompt(names):
    """A diagnostic set is answered by the model that was trained on the task it belongs to."""
    assert len({json.dumps([getattr(TASKS[name], key) for key in PROMPT]) for name in names}) == 1


def test_other_tasks_have_prompts_of_their_own():
    groups = [{"mnli", "mnli_mm", "ax", "cb"}, {"rte", "superglue_rte", "axb", "axg"}]
    names = [name for name in SIZES if not any(name in group for group in groups)] + ["mnli", "rte"]
    assert len({TASKS[name].description for name in names}) == len(names) == 15


# ----------------------------------------------------------------------------------------------------- the real files

REAL = {  # rows of the sample folder; where they are fewer than the official ones, a warning says so
    "cola": (8551, 1043, 1063),
    "sst2": (67349, 436, 1821),
    "stsb": (5749, 1500, 1379),
    "qqp": (10315, 102, 1),
    "mnli": (4000, 9815, None),
    "mnli_mm": (None, 1000, None),
    "qnli": (4000, 5463, 5463),
    "rte": (2490, 277, 3000),
    "wnli": (635, 71, 146),
    "ax": (None, None, 1104),
    "boolq": (266, 3270, 3245),
    "cb": (250, 56, 250),
    "copa": (400, 100, 500),
    "multirc": (27240, 4848, 9693),
    "superglue_rte": (2490, 277, 3000),
    "wic": (5428, 638, 1400),
    "axb": (None, None, 1104),
}


@pytest.mark.parametrize("name", REAL)
def test_real_files(data_root, name):
    task = TASKS[name]
    for split, count in zip(SPLITS, REAL[name], strict=True):
        assert is_present(task, split, str(data_root)) == (count is not None)
        if count is None:
            continue
        said = []
        examples = read(name, split, data_root, warn=said.append)
        assert len(examples) == count
        left_out = 3 if (name, split) == ("multirc", "train") else 0  # answers without a text
        expected = [f"left out {left_out} rows"] if left_out else []
        if count + left_out != SIZES[name][SPLITS.index(split)]:
            expected.append(f"has {SIZES[name][SPLITS.index(split)]}")
        assert len(said) == len(expected) and all(part in one for part, one in zip(expected, said, strict=True))
        if split not in EXPECTED_LABELLED[name]:
            assert {example.label for example in examples} == {None}
        elif name == "stsb":
            assert all(0 <= float(example.label) <= 5 for example in examples)
        else:
            assert {example.label for example in examples} == set(LABELS[name])
        if task.source.sizes[split] == count and name not in ("cola", "sst2", "multirc"):
            assert [example.kept["idx"] for example in examples] == list(range(count))
        # a cell that took its neighbour along, or half of a quoted one
        assert not any("\t" in text or "\n" in text for e in examples for text in e.fields.values() if name in GLUE)


@pytest.mark.parametrize("name", ["cola", "sst2", "rte", "superglue_rte", "wnli", "cb", "copa", "multirc"])
def test_the_fallback_label_is_the_commonest_of_the_training_file(data_root, name):
    counts = Counter(example.label for example in read(name, "train", data_root))
    assert counts[TASKS[name].fallback] == max(counts.values()) > sorted(counts.values())[-2]


def test_real_record(data_root):
    files = {split: data_root / "superglue" / json_file("record", split) for split in SPLITS}
    queries = {
        split: [qa for line in path.read_text().splitlines() for qa in json.loads(line)["qas"]]
        for split, path in files.items()
    }
    train = read("record", "train", data_root)
    assert len(train) == 2 * len(queries["train"]) > 100
    for unit in by_question(train):
        assert sorted(example.label for example in unit) == ["false", "true"]
        assert len({example.pair for example in unit}) == 1
    for split in ("validation", "test"):
        examples = read("record", split, data_root)
        assert [unit[0].kept["query"] for unit in by_question(examples)] == [query["idx"] for query in queries[split]]
        assert {e.label for e in examples} == ({"true", "false"} if split == "validation" else {None})
        assert not any("@" in e.fields["statement"] or "@highlight" in e.fields["passage"] for e in examples)
        for example in examples:
            assert example.kept["entity"] in example.fields["statement"]
            # the ends of the official spans are inclusive: one short or long would cut or join words
            assert example.kept["entity"] == example.kept["entity"].strip()
    right = [e for e in read("record", "validation", data_root) if e.label == "true"]
    assert {e.kept["query"] for e in right} == {query["idx"] for query in queries["validation"]}


# ------------------------------------------------------------------------------------------------------------ a run


@pytest.fixture
def small(tmp_path):
    """Official files of every task, in one folder for each suite."""
    return write_benchmarks(tmp_path)


def recipe(root, tasks, **more):
    data = {"tasks": tasks, "root": str(root), **more.pop("data", {})}
    return Recipe.model_validate({"name": "t", "model": {"path": "x"}, "data": data, "evaluation": more})


def load(root, tasks, **more):
    said = []
    return RunData.load(recipe(root, tasks, **more), said.append), said


def by_task(examples):
    return dict(Counter(example.task.name for example in examples))


def test_a_suite_is_short_for_all_its_tasks(small):
    for suite, names in (("glue", GLUE), ("superglue", SUPERGLUE)):
        assert {task.name for task in recipe(small, [suite]).data.tasks} == set(names)
    assert [task.name for task in recipe(small, ["wic", "glue"]).data.tasks[:2]] == ["wic", "mnli"]
    assert len(recipe(small, "glue,superglue").data.tasks) == 21


def test_a_run_of_everything(small):
    data, said = load(small, ["glue", "superglue"], predict_test=True, every_steps=5)
    rows = {**dict.fromkeys(ALL, 4), "wsc": 2, "multirc": 3}
    assert by_task(data.train) == {name: n for name, n in rows.items() if "train" in EXPECTED_SPLITS[name]}
    assert by_task(data.table) == {**rows, "axb": 4, "axg": 4}
    assert data.splits == {name: "test" if name in ("axb", "axg") else "validation" for name in rows}
    assert by_task(data.validation) == by_task(data.train)
    tests = {name: len(expected(name, "test")) for name in rows}
    assert by_task(data.test) == tests
    labelled = {example.task.name for example in data.test if example.label is not None}
    assert labelled == {"axb", "axg"}, "the benchmarks keep the others to themselves"
    sizes = [one for one in said if "official" in one]
    assert len(sizes) == sum(map(len, EXPECTED_SPLITS.values())), "a warning a file, for its size"
    assert sorted(set(said) - set(sizes)) == [
        "MultiRC: 3 of 3 training rows are also in validation (equal texts)",
        "ReCoRD: 4 of 4 training rows are also in validation (equal texts)",
        "WSC: 2 of 2 training rows are also in validation (equal texts)",
    ], "the objects of these tests serve both splits"
    assert data.split == "test and validation"


def test_tasks_that_are_only_evaluated_have_no_training_rows(small):
    data, _ = load(small, ["mnli", "mnli_mm", "ax"], every_steps=1)
    assert by_task(data.train) == by_task(data.validation) == {"mnli": 4}
    assert by_task(data.table) == {"mnli": 4, "mnli_mm": 4, "ax": 4}
    assert data.test == []


@pytest.mark.parametrize("names", [["ax"], ["mnli_mm", "ax"], ["axb", "axg"]])
def test_a_run_needs_a_task_to_train_on(small, names):
    with pytest.raises(UserError) as caught:
        load(small, names)
    assert ", ".join(names) in str(caught.value) and "training split" in str(caught.value)


def test_a_diagnostic_set_that_is_not_there_is_left_out_with_a_warning(small):
    (small / "glue/diagnostic/diagnostic-full.tsv").unlink()
    data, said = load(small, ["mnli", "ax"], predict_test=True)
    assert by_task(data.table) == {"mnli": 4} and data.splits == {"mnli": "validation"}
    assert by_task(data.test) == {"mnli": 3, "ax": 3}, "the evaluation server has its labels"
    assert [one for one in said if "AX is not in the table" in one and "diagnostic/diagnostic-full.tsv" in one]
    (small / "superglue/AX-g/AX-g.jsonl").unlink()
    data, said = load(small, ["superglue_rte", "axg"])
    assert data.splits == {"superglue_rte": "validation"}
    assert [one for one in said if "AX-g is not in the table" in one]


def test_a_run_from_the_hub_leaves_the_diagnostic_set_out(cache):
    for name in ("mnli", "mnli_mm", "ax"):
        write_hub(snapshot(cache, "nyu-mll/glue"), name, LAYOUTS[0])
    data, said = load("hub", ["mnli", "mnli_mm", "ax"], predict_test=True)
    assert data.splits == {"mnli": "validation", "mnli_mm": "validation"}
    assert by_task(data.test) == {"mnli": 3, "mnli_mm": 3, "ax": 3}
    assert [one for one in said if "AX is not in the table" in one]


@pytest.mark.parametrize("path", ["MNLI/train.tsv", "MNLI/dev_matched.tsv", "MNLI/test_matched.tsv"])
def test_a_trained_task_needs_its_files(small, path):
    (small / "glue" / path).unlink()
    with pytest.raises(UserError, match=f"{path}: no such file"):
        load(small, ["mnli"], predict_test=True)
    if "test" in path:
        assert by_task(load(small, ["mnli"])[0].table) == {"mnli": 4}


def test_the_split_of_the_table(small):
    # auto: test where it has labels, else validation
    assert load(small, ["rte", "superglue_rte", "axb"])[0].splits == {
        "rte": "validation",
        "superglue_rte": "validation",
        "axb": "test",
    }
    assert load(small, ["acceptability", "sst2"])[0].splits == {"acceptability": "test", "sst2": "validation"}
    # validation: also of tasks that have a labelled test split; AX-b has no other
    assert load(small, ["acceptability", "rte", "axb"], split="validation")[0].splits == {
        "acceptability": "validation",
        "rte": "validation",
        "axb": "test",
    }
    # test: MNLI-mm is only evaluated, and what is evaluated is what has labels; a trained task must have them
    assert load(small, ["acceptability", "mnli_mm"], split="test")[0].splits == {
        "acceptability": "test",
        "mnli_mm": "validation",
    }
    with pytest.raises(UserError, match=r"task rte has no labelled test split.*source\.files\.test"):
        load(small, ["rte"], split="test")


def test_the_table_and_the_validations_take_some_rows_and_the_test_answers_all(small):
    data, _ = load(
        small,
        ["sst2", "multirc", "axb", "superglue_rte"],
        max_samples=2,
        every_steps=1,
        validation_samples=1,
        predict_test=True,
        data={"max_train_samples": 3},
    )
    assert by_task(data.train) == {"sst2": 3, "multirc": 3, "superglue_rte": 3}
    assert [e.index for e in data.train if e.task.name == "sst2"] == [0, 1, 2]
    assert [e.index for e in data.table if e.task.name == "axb"] == [0, 2], "spread over the file"
    assert [e.index for e in data.table if e.task.name == "multirc"] == [0], "whole questions: the first has one row"
    assert by_task(data.validation) == {"sst2": 1, "multirc": 1, "superglue_rte": 1}
    assert by_task(data.test) == {"sst2": 3, "multirc": 3, "axb": 4, "superglue_rte": 3}


def test_no_validations_and_no_answers_unless_asked(small):
    data, said = load(small, ["cola"])
    assert data.validation == [] and data.test == []
    assert len(said) == 2, "only the files of train and validation are read"
    assert data.describe() == "CoLA: 4 training rows, 4 validation rows"


def test_the_seed_draws_records_candidates(small):
    objects = json.loads((small / "superglue/ReCoRD/train.jsonl").read_text())
    text = "Ann met Bob Ray in Oslo and Rome."
    objects["passage"] = {
        "text": text,
        "entities": [{"start": s, "end": e} for s, e in ((0, 2), (8, 14), (19, 22), (28, 31))],
    }
    put(small, "superglue/ReCoRD/train.jsonl", json.dumps(objects) + "\n")
    drawn = []
    for seed in range(12):
        one = recipe(small, ["record"]).model_copy(update={"seed": seed})
        data = RunData.load(one, lambda message: None)
        assert data.train == RunData.load(one, lambda message: None).train
        drawn.append(tuple(example.kept["entity"] for example in data.train))
    assert len(set(drawn)) > 1
