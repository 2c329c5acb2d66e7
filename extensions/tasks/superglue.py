"""SuperGLUE (Table 2 of the paper). `files` is the official download, `hub` is aps/super_glue."""

from __future__ import annotations

from typing import Any

from extensions.tasks.shared import ENTAILMENT, NLI_COLUMNS, THREE_WAY_ENTAILMENT, YES_NO, sizes

_JSONL = {"format": "jsonl", "unlabelled": ["test"], "keep": {"idx": "idx"}}
_BOOLEAN = {"true": ["Yes"], "false": ["No"]}


def _files(folder: str) -> dict[str, str]:
    return {"train": f"{folder}/train.jsonl", "validation": f"{folder}/val.jsonl", "test": f"{folder}/test.jsonl"}


def _hub(config: str, **keys: Any) -> dict[str, Any]:
    return {"repo": "aps/super_glue", "config": config, **keys}


ENTRIES: list[dict[str, Any]] = [
    {
        "name": "boolq",
        "title": "BoolQ",
        "description": "You are an assistant to answer questions about a text. The task is to decide whether the "
        "answer to a question is yes or no according to the text.",
        "answer_format": YES_NO,
        "question": 'Now read the text "{passage}" and answer the question "{question}?".',
        "labels": _BOOLEAN,
        "positive": "true",
        "in_suite_average": True,
        "fallback": "true",
        "truncate": "passage",
        "source": {
            **_JSONL,
            "files": _files("BoolQ"),
            "sizes": sizes(9427, 3270, 3245),
            "hub": _hub("boolq", labels=["false", "true"]),
        },
        "submission": {"file": "BoolQ.jsonl"},
    },
    {
        "name": "cb",
        "title": "CB",
        **THREE_WAY_ENTAILMENT,
        "metrics": ["f1_macro", "accuracy"],
        "in_suite_average": True,
        "fallback": "contradiction",
        "source": {
            **_JSONL,
            "files": _files("CB"),
            "columns": NLI_COLUMNS,
            "sizes": sizes(250, 56, 250),
            "hub": _hub("cb", columns=NLI_COLUMNS, labels=["entailment", "contradiction", "neutral"]),
        },
        "submission": {"file": "CB.jsonl"},
    },
    {
        "name": "copa",
        "title": "COPA",
        "description": "You are an assistant to analyze causes and effects. The task is to decide which of two "
        "statements is more likely the cause or the effect of a premise.",
        "answer_format": 'Insert only "First" or "Second" here',
        "question": 'Now judge which is more likely the {question} of the premise "{premise}": the first, "{choice1}", '
        'or the second, "{choice2}".',
        "labels": {"0": ["First"], "1": ["Second"]},
        "positive": "1",
        "in_suite_average": True,
        "fallback": "1",
        "truncate": "premise",
        "source": {**_JSONL, "files": _files("COPA"), "sizes": sizes(400, 100, 500), "hub": _hub("copa")},
        "submission": {"file": "COPA.jsonl", "labels": {"0": 0, "1": 1}},
    },
    {
        "name": "multirc",
        "title": "MultiRC",
        "description": "You are an assistant to check answers to questions about a text. A question may have several "
        "correct answers. The task is to decide whether one given answer is correct.",
        "answer_format": 'Insert only "True" or "False" here',
        "question": 'Now read the text "{passage}" and judge if the answer "{answer}" to the question "{question}" is '
        "correct.",
        "labels": {"1": ["True"], "0": ["False"]},
        "positive": "1",
        "metrics": ["f1a", "exact_match"],
        "group_by": ["paragraph", "question"],
        "in_suite_average": True,
        "fallback": "0",
        "truncate": "passage",
        "source": {
            **_JSONL,
            "files": _files("MultiRC"),
            "rows": "multirc",
            "incomplete": "skip",  # three training answers are empty
            "keep": {"paragraph": "paragraph_idx", "question": "question_idx", "answer": "answer_idx"},
            "sizes": sizes(27243, 4848, 9693),
            "hub": _hub("multirc"),
        },
        "submission": {"file": "MultiRC.jsonl", "labels": {"0": 0, "1": 1}, "nesting": "multirc"},
    },
    {
        "name": "record",
        "title": "ReCoRD",
        "description": "You are an assistant to check statements against a text from the news. In the statement a name "
        "from the text was filled in. The task is to decide whether the statement with that name is right.",
        "answer_format": YES_NO,
        "question": 'Now read the text "{passage}" and judge if the statement "{statement}" is right.',
        "labels": _BOOLEAN,
        "positive": "true",
        "metrics": ["squad_f1", "squad_em"],
        "group_by": ["query"],
        "in_suite_average": True,
        "fallback": "false",
        "truncate": "passage",
        "source": {
            **_JSONL,
            "files": _files("ReCoRD"),
            "rows": "record",
            "keep": {"passage": "passage_idx", "query": "query_idx", "entity": "entity", "answers": "answers"},
            "sizes": sizes(100730, 10000, 10000),
            "hub": _hub("record"),
        },
        "submission": {"file": "ReCoRD.jsonl", "nesting": "record"},
    },
    {
        "name": "superglue_rte",
        "title": "RTE",
        **ENTAILMENT,
        "in_suite_average": True,
        "source": {
            **_JSONL,
            "files": _files("RTE"),
            "columns": NLI_COLUMNS,
            "sizes": sizes(2490, 277, 3000),
            "hub": _hub("rte", columns=NLI_COLUMNS, labels=["entailment", "not_entailment"]),
        },
        "submission": {"file": "RTE.jsonl"},
    },
    {
        "name": "wic",
        "title": "WiC",
        "description": "You are an assistant to analyze the meaning of words. The task is to decide whether a word has "
        "the same meaning in two sentences.",
        "answer_format": YES_NO,
        "question": 'Now judge if the word "{word}" has the same meaning in the sentences "{sentence1}" and '
        '"{sentence2}".',
        "labels": _BOOLEAN,
        "positive": "true",
        "in_suite_average": True,
        "fallback": "true",
        "truncate": "sentence1",
        "source": {
            **_JSONL,
            "files": _files("WiC"),
            "sizes": sizes(5428, 638, 1400),
            "hub": _hub("wic", labels=["false", "true"]),
        },
        "submission": {"file": "WiC.jsonl"},
    },
    {
        "name": "wsc",
        "title": "WSC",
        "description": "You are an assistant to analyze what pronouns refer to. The task is to decide whether the "
        "pronoun that stands between asterisks in a text refers to a given part of the text.",
        "answer_format": YES_NO,
        "question": 'Now read the text "{text}" and judge if the pronoun "*{pronoun}*" refers to "{noun}".',
        "truncate": "text",
        "labels": _BOOLEAN,
        "positive": "true",
        "in_suite_average": True,
        "fallback": "false",
        "source": {
            **_JSONL,
            "files": _files("WSC"),
            "rows": "wsc",
            "sizes": sizes(554, 104, 146),
            "hub": _hub("wsc", labels=["false", "true"]),
        },
        "submission": {"file": "WSC.jsonl", "labels": {"true": "True", "false": "False"}},
    },
    {
        "name": "axb",  # evaluation only, labelled
        "title": "AX-b",
        **ENTAILMENT,
        "train_task": "superglue_rte",
        "metrics": ["matthews"],
        "source": {
            "files": {"test": "AX-b/AX-b.jsonl"},
            "keep": {"idx": "idx"},
            "sizes": {"test": 1104},
            "hub": _hub("axb", labels=["entailment", "not_entailment"]),
        },
        "submission": {"file": "AX-b.jsonl"},
    },
    {
        "name": "axg",  # evaluation only, labelled; rows in pairs that differ in the gender of one pronoun
        "title": "AX-g",
        **ENTAILMENT,
        "train_task": "superglue_rte",
        "metrics": ["gender_parity", "accuracy"],
        "group_by": ["pair"],
        "source": {
            "files": {"test": "AX-g/AX-g.jsonl"},
            "columns": NLI_COLUMNS,
            "rows": "winogender",
            "keep": {"idx": "idx", "pair": "pair_id"},
            "sizes": {"test": 356},
            "hub": _hub("axg", columns=NLI_COLUMNS, labels=["entailment", "not_entailment"]),
        },
        "submission": {"file": "AX-g.jsonl"},
    },
]
