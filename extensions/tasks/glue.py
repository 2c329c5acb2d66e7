"""GLUE, in the order of the columns of the paper's Table 1. `files` is the official download, `hub` is nyu-mll/glue."""

from __future__ import annotations

from typing import Any

from extensions.tasks.shared import (
    ACCEPTABILITY,
    ENTAILMENT,
    NEGATIVE_POSITIVE,
    NLI_COLUMNS,
    THREE_WAY_ENTAILMENT,
    YES_NO,
    sizes,
)

_THREE_WAY = {"columns": NLI_COLUMNS, "labels": ["entailment", "neutral", "contradiction"]}  # as the hub numbers them
_TSV = {"format": "tsv", "quoting": "none", "unlabelled": ["test"], "keep": {"idx": "index"}}


def _files(folder: str) -> dict[str, str]:
    return {"train": f"{folder}/train.tsv", "validation": f"{folder}/dev.tsv", "test": f"{folder}/test.tsv"}


def _hub(config: str, **keys: Any) -> dict[str, Any]:
    return {"repo": "nyu-mll/glue", "config": config, **keys}


ENTRIES: list[dict[str, Any]] = [
    {
        "name": "mnli",
        "title": "MNLI-m",
        **THREE_WAY_ENTAILMENT,
        "in_suite_average": True,
        "fallback": "entailment",
        "source": {
            **_TSV,
            "files": {**_files("MNLI"), "validation": "MNLI/dev_matched.tsv", "test": "MNLI/test_matched.tsv"},
            "label": "gold_label",
            "sizes": sizes(392702, 9815, 9796),
            "hub": _hub("mnli", splits={"validation": "validation_matched", "test": "test_matched"}, **_THREE_WAY),
        },
        "submission": {"file": "MNLI-m.tsv"},
    },
    {
        "name": "mnli_mm",  # evaluation only: the other domain of the same task
        "title": "MNLI-mm",
        **THREE_WAY_ENTAILMENT,
        "train_task": "mnli",
        "in_suite_average": True,
        "fallback": "entailment",
        "source": {
            **_TSV,
            "files": {"validation": "MNLI/dev_mismatched.tsv", "test": "MNLI/test_mismatched.tsv"},
            "label": "gold_label",
            "sizes": {"validation": 9832, "test": 9847},
            "hub": _hub(
                "mnli", splits={"validation": "validation_mismatched", "test": "test_mismatched"}, **_THREE_WAY
            ),
        },
        "submission": {"file": "MNLI-mm.tsv"},
    },
    {
        "name": "qqp",
        "title": "QQP",
        "description": "You are an assistant to compare the meaning of questions. The task is to decide whether two "
        "questions are duplicates. If the same answer would settle both then they are duplicates, else they are not.",
        "answer_format": YES_NO,
        "question": 'Now judge if the questions "{question1}" and "{question2}" are duplicates.',
        "labels": {"1": ["Yes"], "0": ["No"]},
        "positive": "1",
        "metrics": ["f1"],
        "in_suite_average": True,
        "fallback": "0",
        "source": {
            **_TSV,
            "files": _files("QQP"),
            "label": "is_duplicate",
            "keep": {"idx": "id"},
            "incomplete": "skip",  # a few rows of the official files have an empty question or lack columns
            "sizes": sizes(363846, 40430, 390965),
            "hub": _hub("qqp"),
        },
        "submission": {"file": "QQP.tsv"},
    },
    {
        "name": "qnli",
        "title": "QNLI",
        "description": "You are an assistant to analyze whether texts answer questions. The task is to decide whether "
        "a sentence contains the answer to a question.",
        "answer_format": YES_NO,
        "question": 'Now judge if the sentence "{sentence}" contains the answer to the question "{question}".',
        "labels": {"entailment": ["Yes"], "not_entailment": ["No"]},
        "positive": "entailment",
        "in_suite_average": True,
        "fallback": "entailment",
        "source": {
            **_TSV,
            "files": _files("QNLI"),
            "sizes": sizes(104743, 5463, 5463),
            "hub": _hub("qnli", labels=["entailment", "not_entailment"]),
        },
        "submission": {"file": "QNLI.tsv"},
    },
    {
        "name": "sst2",
        "title": "SST-2",
        "description": "You are an assistant to analyze the sentiment of movie reviews. The task is to decide whether "
        "the sentiment of a piece of a review is positive or negative.",
        "answer_format": NEGATIVE_POSITIVE,
        "question": 'Now judge the sentiment of the review "{sentence}".',
        "labels": {"1": ["Positive"], "0": ["Negative"]},
        "positive": "1",
        "in_suite_average": True,
        "fallback": "1",
        "source": {**_TSV, "files": _files("SST-2"), "sizes": sizes(67349, 872, 1821), "hub": _hub("sst2")},
        "submission": {"file": "SST-2.tsv"},
    },
    {
        "name": "cola",
        "title": "CoLA",
        **ACCEPTABILITY,
        "metrics": ["matthews"],
        "in_suite_average": True,
        "fallback": "1",
        "source": {
            **_TSV,
            "files": _files("CoLA"),
            "columns": {"sentence": 3},
            "label": 1,
            "header": False,
            "num_columns": 4,
            "exceptions": {"test": {"header": True, "columns": {"sentence": "sentence"}}},
            "sizes": sizes(8551, 1043, 1063),
            "hub": _hub("cola"),
        },
        "submission": {"file": "CoLA.tsv"},
    },
    {
        "name": "stsb",
        "title": "STS-B",
        "description": "You are an assistant to compare the meaning of sentences. The task is to rate how similar two "
        "sentences are in meaning, on a scale from 0 (nothing in common) to 5 (the same meaning).",
        "answer_format": "Insert only a number between 0.0 and 5.0 here",
        "question": 'Now rate the similarity of the sentences "{sentence1}" and "{sentence2}".',
        "score_range": [0.0, 5.0],
        "score_decimals": 1,
        "metrics": ["spearman"],
        "extra_metrics": ["pearson"],
        "in_suite_average": True,
        "fallback": "2.5",
        "source": {
            **_TSV,
            "files": _files("STS-B"),
            "label": "score",
            "sizes": sizes(5749, 1500, 1379),
            "hub": _hub("stsb"),
        },
        "submission": {"file": "STS-B.tsv"},
    },
    {
        "name": "mrpc",
        "title": "MRPC",
        "description": "You are an assistant to compare the meaning of sentences. The task is to decide whether two "
        "sentences from the news are paraphrases. If they say the same in different words then they are paraphrases, "
        "else they are not.",
        "answer_format": YES_NO,
        "question": 'Now judge if the sentences "{sentence1}" and "{sentence2}" are paraphrases.',
        "labels": {"1": ["Yes"], "0": ["No"]},
        "positive": "1",
        "metrics": ["f1"],
        "in_suite_average": True,
        "fallback": "1",
        "source": {
            **_TSV,
            "files": _files("MRPC"),
            "columns": {"sentence1": "#1 String", "sentence2": "#2 String"},
            "label": "Quality",
            "sizes": sizes(3668, 408, 1725),
            "hub": _hub("mrpc"),
        },
        "submission": {"file": "MRPC.tsv"},
    },
    {
        "name": "rte",
        "title": "RTE",
        **ENTAILMENT,
        "in_suite_average": True,
        "source": {
            **_TSV,
            "files": _files("RTE"),
            "sizes": sizes(2490, 277, 3000),
            "hub": _hub("rte", labels=["entailment", "not_entailment"]),
        },
        "submission": {"file": "RTE.tsv"},
    },
    {
        "name": "wnli",
        "title": "WNLI",
        "description": "You are an assistant to analyze what pronouns refer to. The task is to decide whether a second "
        "text follows from a first. It repeats a part of the first, with a pronoun replaced by what it may refer to: "
        "if the pronoun does refer to that then the second text follows, else it does not.",
        "answer_format": YES_NO,
        "question": 'Now judge if the text "{sentence1}" implies the text "{sentence2}".',
        "labels": {"1": ["Yes"], "0": ["No"]},
        "positive": "1",
        "fallback": "0",
        "source": {**_TSV, "files": _files("WNLI"), "sizes": sizes(635, 71, 146), "hub": _hub("wnli")},
        "submission": {"file": "WNLI.tsv"},
    },
    {
        "name": "ax",  # evaluation only; the labelled file is a separate download
        "title": "AX",
        **THREE_WAY_ENTAILMENT,
        "train_task": "mnli",
        "metrics": ["matthews"],
        "fallback": "entailment",
        "source": {
            **_TSV,
            "files": {"validation": "diagnostic/diagnostic-full.tsv", "test": "diagnostic/diagnostic.tsv"},
            "exceptions": {
                "validation": {"columns": {"sentence1": "Premise", "sentence2": "Hypothesis"}, "label": "Label"}
            },
            "sizes": {"validation": 1104, "test": 1104},
            "hub": _hub("ax", **_THREE_WAY),
        },
        "submission": {"file": "AX.tsv"},
    },
]
