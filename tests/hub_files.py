"""GLUE and SuperGLUE with the rows of official.py, in the layouts of the hub's parquet files."""

import pyarrow
import pyarrow.parquet
from official import (
    ALL,
    EXPECTED_LABELLED,
    EXPECTED_SPLITS,
    GLUE,
    LABELS,
    NESTED,
    SUPERGLUE,
    expected,
    flat_rows,
    without,
)

from extensions.data import by_question, load_examples
from extensions.tasks import TASKS

COMMIT, CONVERTED = "1" * 40, "2" * 40


def read(name, split, root, **more):
    return load_examples(TASKS[name], split, str(root), **more)


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
    """The rows in the hub's form: all columns at the top level, labels as class numbers."""
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
    if split == "test":  # the row ids that the evaluation server expects
        numbers = [kept.get("idx") for _, _, kept in rows]
        if name in ("multirc", "record"):
            assert [example.kept for example in examples] == [kept for _, _, kept in rows]
        else:
            assert [example.kept.get("idx", example.index) for example in examples] == numbers
    if TASKS[name].group_by:
        grouped = [[example.index for example in unit] for unit in by_question(examples)]
        keys = [tuple(kept[key] for key in TASKS[name].group_by) for _, _, kept in rows]
        assert grouped == [[i for i, key in enumerate(keys) if key == one] for one in dict.fromkeys(keys)]


def snapshot(cache, repo, revision="main", commit=COMMIT):
    """The folder of a revision in the cache."""
    folder = cache / f"datasets--{repo.replace('/', '--')}"
    reference = folder / "refs" / revision
    reference.parent.mkdir(parents=True, exist_ok=True)
    reference.write_text(commit)
    (folder / "snapshots" / commit).mkdir(parents=True, exist_ok=True)
    return folder / "snapshots" / commit
