"""From the nested objects of SuperGLUE's files to flat rows.

Each function takes one object, of the official file or of the hub's flat form, and yields rows; a task names its
function in `source.rows`. A malformed object raises KeyError, TypeError, ValueError, IndexError,
AttributeError or OverflowError.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

Row = dict[str, Any]


def multirc(row: Row) -> Iterator[Row]:
    """One row per answer. Official files nest answers in questions in passages; the hub's are already flat."""
    if "paragraph" in row:
        idx = (row["idx"][name] for name in ("paragraph", "question", "answer"))
        found = [(row["paragraph"], row["question"], row["answer"], row.get("label"), *idx)]
    else:
        text = row["passage"]["text"]
        found = [
            (
                text,
                question["question"],
                answer["text"],
                answer.get("label"),
                row["idx"],
                question["idx"],
                answer["idx"],
            )
            for question in row["passage"]["questions"]
            for answer in question["answers"]
        ]
    names = ("passage", "question", "answer", "label", "paragraph_idx", "question_idx", "answer_idx")
    for values in found:
        yield dict(zip(names, values, strict=True))


def record(row: Row) -> Iterator[Row]:
    """One row per query and distinct entity, in order of first mention, with the entity filled in at the placeholder.

    An entity is right if it equals an answer after SQuAD's normalisation, as in the metric. The official character
    spans include their ends.
    """
    from transformers.data.metrics.squad_metrics import normalize_answer  # lazy: loads torch, which takes seconds

    if "entities" in row:
        passage, entities, passage_idx = row["passage"], row["entities"], row["idx"]["passage"]
        queries = [(row["query"], row["idx"]["query"], row.get("answers"))]
    else:
        passage, passage_idx = row["passage"]["text"], row["idx"]
        spans = sorted(row["passage"]["entities"], key=lambda span: span["start"])
        entities = [passage[span["start"] : span["end"] + 1] for span in spans]
        queries = [(qa["query"], qa["idx"], [a["text"] for a in qa.get("answers", [])]) for qa in row["qas"]]
    text = highlights(passage)
    for query, query_idx, answers in queries:
        if "@placeholder" not in query:
            raise ValueError(f"the query {query[:60]!r} has no @placeholder")
        answers = list(dict.fromkeys(answers or []))
        right = {normalize_answer(answer) for answer in answers}
        candidates = list(dict.fromkeys(entity for entity in entities if entity.strip()))
        if not candidates:
            raise ValueError("the passage has no entities")
        for entity in candidates:
            yield {
                "passage": text,
                "statement": query.replace("@placeholder", entity),
                "label": normalize_answer(entity) in right if answers else None,
                "passage_idx": passage_idx,
                "query_idx": query_idx,
                "entity": entity,
                "answers": answers,
            }


def highlights(passage: str) -> str:
    """ReCoRD's passage with its "@highlight" lines as plain sentences."""
    parts = [part.strip() for part in passage.split("@highlight")]
    return " ".join(part if part.endswith((".", "?", "!", '"', "'")) else f"{part}." for part in parts if part)


def wsc(row: Row) -> Iterator[Row]:
    """Mark the pronoun with asterisks in the text, since it may occur more than once.

    `span2_index` counts words. It is a few words off in some official rows, so the nearest occurrence is used.
    """
    target = row.get("target", row)
    text, pronoun, index = " ".join(row["text"].split()), target["span2_text"].strip(), target["span2_index"]
    found = list(re.finditer(rf"(?<!\w){re.escape(pronoun)}(?!\w)", text, re.IGNORECASE))
    if not pronoun or not found:
        raise ValueError(f"the text does not hold the pronoun {pronoun!r}")
    at = min(found, key=lambda match: abs(text.count(" ", 0, match.start()) - index))
    yield row | {
        "text": f"{text[: at.start()]}*{at[0]}*{text[at.end() :]}",
        "pronoun": pronoun,
        "noun": target["span1_text"],
    }


def winogender(row: Row) -> Iterator[Row]:
    """Add `pair_id`, which the hub's form lacks; the two rows of a pair are consecutive."""
    yield row if "pair_id" in row else row | {"pair_id": int(row["idx"]) // 2}


ROWS: dict[str, Callable[[Row], Iterator[Row]]] = {
    "multirc": multirc,
    "record": record,
    "wsc": wsc,
    "winogender": winogender,
}
