"""Facts of the benchmarks, and the real files if they are there.

Sizes, class orders and names are typed here and in official.py from the benchmarks' own descriptions, not taken from
the task table.
"""

import json
from collections import Counter

import pytest
from hub_files import (
    read,
)
from official import (
    ALL,
    EXPECTED_LABELLED,
    GLUE,
    LABELS,
    SPLITS,
    SUPERGLUE,
    json_file,
)

from extensions.data import by_question, is_present
from extensions.prompts import answer_format
from extensions.tasks import SUITES, TASKS

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
    """COPA and MultiRC use numbers, WSC the words True and False, and BoolQ and WiC true and false."""
    special = {name: TASKS[name].submission.labels for name in SIZES if TASKS[name].submission.labels}
    assert special == {
        "copa": {"0": 0, "1": 1},
        "multirc": {"0": 0, "1": 1},
        "wsc": {"true": "True", "false": "False"},
    }
    nested = {name: TASKS[name].submission.nesting for name in SIZES if TASKS[name].submission.nesting}
    assert nested == {"multirc": "multirc", "record": "record"}


def test_the_averages_are_over_the_papers_columns():
    """WNLI and the diagnostic sets are in neither average."""
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
def test_diagnostic_sets_share_the_prompt_of_their_task(names):
    """A diagnostic set is answered by the model of its training task."""
    assert len({json.dumps([getattr(TASKS[name], key) for key in PROMPT]) for name in names}) == 1


def test_other_tasks_have_distinct_prompts():
    groups = [{"mnli", "mnli_mm", "ax", "cb"}, {"rte", "superglue_rte", "axb", "axg"}]
    names = [name for name in SIZES if not any(name in group for group in groups)] + ["mnli", "rte"]
    assert len({TASKS[name].description for name in names}) == len(names) == 15


# ----------------------------------------------------------------------------------------------------- the real files

REAL = {  # rows of the sample folder; fewer than the official number give a warning
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
        # a cell merged with its neighbour, or half of a quoted one
        assert not any("\t" in text or "\n" in text for e in examples for text in e.fields.values() if name in GLUE)


@pytest.mark.parametrize("name", ["cola", "sst2", "rte", "superglue_rte", "wnli", "cb", "copa", "multirc"])
def test_the_fallback_label_is_the_most_frequent_of_the_training_file(data_root, name):
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
            # official spans include their ends: an off-by-one error would cut or join words
            assert example.kept["entity"] == example.kept["entity"].strip()
    right = [e for e in read("record", "validation", data_root) if e.label == "true"]
    assert {e.kept["query"] for e in right} == {query["idx"] for query in queries["validation"]}
