"""Cross-field validation of a task: keys that are each valid but contradict each other."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from extensions.tasks.words import fold, nfc, normalize_answer

if TYPE_CHECKING:
    from extensions.tasks.schema import Task

# Two equal braces are one literal brace; otherwise the text between braces names a field (group 1), in any characters.
PLACEHOLDER = re.compile(r"\{\{|\}\}|\{(?!\s)([^{}\r\n]+)(?<!\s)\}")

_NEEDS_POSITIVE = ("f1", "f1a", "squad_f1", "squad_em")
_NEEDS_GROUPS = ("exact_match", "squad_f1", "squad_em", "gender_parity")
_OF_SCORES = ("pearson", "spearman", "mae", "rmse", "r2")
_OF_LABEL_SETS = ("f1_micro", "f1_macro", "subset_accuracy")
_LOWER_IS_BETTER = ("mae", "rmse")


def cross_field_problems(task: Task) -> Iterator[str]:
    """The contradictions of a task. Each check assumes that those before it passed, so only the first counts."""
    if bool(task.labels) == (task.score_range is not None):
        yield "give either labels (classification) or score_range (regression)"
    if task.labels and len(task.labels) < 2:
        yield "labels needs at least two entries"
    if task.score_range and not 0 < task.score_range[1] - task.score_range[0] < math.inf:
        yield f"score_range must be [low, high] with low < high, got {list(task.score_range)}"
    for key in ("question", "description", "answer_format"):
        yield from _brace_problems(key, getattr(task, key), placeholders=key == "question")
    if not task.fields:
        yield (
            "question uses no {field}: the model would never see the data; write the name of a column between single "
            "braces"
        )
    yield from _label_problems(task)
    yield from _metric_problems(task)
    if task.answer_match != "auto" and task.kind != "classification":
        yield f"answer_match does not apply to a {task.kind} task, whose answers have their own form"
    if task.score_decimals is not None:
        if task.score_range is None:
            yield "score_decimals needs score_range"
        elif any(round(end, task.score_decimals) != end for end in task.score_range):
            yield (
                f"score_decimals: {task.score_decimals} would round the ends of score_range {list(task.score_range)}; "
                "give ends with at most that many decimals"
            )
    if task.multi_label:
        yield from _multi_label_problems(task)


def _brace_problems(key: str, text: str, placeholders: bool) -> Iterator[str]:
    """A brace that is neither doubled nor part of a placeholder, or a placeholder where none is allowed."""
    stray = re.search(r"[{}]", PLACEHOLDER.sub(lambda match: "\0" * len(match[0]), text))
    if stray:
        at = stray.start()
        inside = re.match(r"\{\s*([^{}]*?)\s*\}", text[at:])
        name = " ".join(inside[1].split()) if inside else ""
        form = f"write {{{name}}}" if name else "a placeholder is the name of a column between braces, as {ticket body}"
        excerpt = text[max(0, at - 20) : at + 30]
        yield f"{key}: the brace in {excerpt!r} is not part of a placeholder; {form}, or {{{{ and }}}} for braces"
    name = next((match[1] for match in PLACEHOLDER.finditer(text) if match[1]), "")
    if name and not placeholders:
        yield (
            f"{key}: {{{name}}} is a placeholder, but this text is the same for all rows; put it into question, or "
            f"write {{{{{name}}}}} for the word in braces"
        )


def _label_problems(task: Task) -> Iterator[str]:
    compared = normalize_answer if task.is_exact or task.multi_label else fold
    words = [compared(word) for group in task.labels.values() for word in group]
    twice = sorted({word for word in words if words.count(word) > 1})
    if twice:
        yield f"label words must be distinct (ignoring case and Unicode form); used twice: {', '.join(twice)}"
    if len({nfc(label) for label in task.labels}) < len(task.labels):
        yield "labels must be distinct in Unicode NFC: two differ only in how marks are encoded"
    if task.fallback is not None and not _is_answer(task, task.fallback):
        yield f"fallback: {task.fallback!r} is not an answer of the task"
    for name in task.truncate:
        if name not in task.fields:
            yield f"truncate: {name!r} is not a field of the question ({', '.join(task.fields)})"
    if task.positive is not None and task.positive not in task.labels:
        yield f"positive: {task.positive!r} is not one of the labels ({', '.join(task.labels)})"


def _is_answer(task: Task, answer: str) -> bool:
    if task.score_range is None:
        return task.is_label_set(answer) if task.multi_label else answer in task.labels
    try:
        return task.score_range[0] <= float(answer) <= task.score_range[1]
    except ValueError:
        return False


def _metric_problems(task: Task) -> Iterator[str]:
    for name in task.group_by:
        if name not in task.source.keep:
            yield f"group_by: {name!r} is not in source.keep ({', '.join(task.source.keep) or 'empty'})"
    for metric in (*task.metrics, *task.extra_metrics):
        if metric in _NEEDS_POSITIVE and task.positive is None:
            yield f"metric {metric} needs `positive`, the label that it is computed for"
        if metric in _NEEDS_GROUPS and not task.group_by:
            yield f"metric {metric} needs `group_by`, which says which rows are one question"
        if (metric in _OF_SCORES) != task.is_regression or (task.multi_label and metric not in _OF_LABEL_SETS):
            yield f"metric {metric} does not fit a {task.kind} task"
        if metric in ("f1_micro", "subset_accuracy") and not task.multi_label:
            yield f"metric {metric} does not fit a {task.kind} task; it needs multi_label: true"
    for metric in task.metrics:
        if metric in _LOWER_IS_BETTER:
            yield f"metrics: a lower {metric} is better; give it in extra_metrics"


def _multi_label_problems(task: Task) -> Iterator[str]:
    if task.score_range is not None:
        yield "multi_label: true needs labels, not score_range"
    if task.positive is not None:
        yield "positive does not apply to multi_label: true; its F1 is over all labels"
    if task.submission is not None:
        yield "submission does not apply to multi_label: true; the servers take one label per row"
    yield from word_problems(task.no_label)
    for label, words in task.labels.items():
        for text in (label, *words):
            # An answer lists words between commas, a cell of the data lists labels between label_separator.
            found = "," if "," in text else task.source.label_separator
            if "," in text or (text == label and found in text):
                yield (
                    f"label {text!r} holds {found!r}, which separates the labels of a multi_label task; give it "
                    "another word, or another source.label_separator"
                )
    taken = {normalize_answer(text) for label, words in task.labels.items() for text in (label, *words)}
    if "," in task.no_label or normalize_answer(task.no_label) in taken:
        yield f"no_label: {task.no_label!r} is a label, or holds a comma; give another word"


def word_problems(word: object) -> Iterator[str]:
    """The reasons why a word cannot be an answer."""
    if not isinstance(word, str):
        # YAML 1.1 reads bare yes/no/on/off as booleans and 1 as a number; a silent `False` could match no answer.
        yield f"label words must be text, got {word!r}; quote it: YAML does not read bare yes, no or 1 as text"
    elif not word.strip() or "judgement" in word.lower() or "<" in word:
        yield f"label word {word!r} is empty, or holds '<' or the word of the answer tags"
