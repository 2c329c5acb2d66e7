"""The one parser of a model's answers (section 4.3 of the paper)."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from functools import lru_cache

from extensions.prompts.template import CLOSE
from extensions.tasks import Task, fold, nfc, normalize_answer

# A letter or digit next to a keyword makes it another word; so does a hyphen or an apostrophe that joins it to one
# ("yes-man", "no's"). Marks and invisible characters are found by their Unicode category.
_NOT_AFTER_WORD = r"(?<!\w)(?<!\w[-'\u2019])"
_NOT_BEFORE_WORD = r"(?!\w|[-'\u2019]\w)"
_MARKS = {"Mn", "Mc", "Me", "Cf"}
_AUXILIARY = "is|are|was|were|do|does|did|ca|could|wo|would|sha|should|must|might|need|ought|ai|has|have|had"
_NEGATION = rf"(?:not|never|neither|nor|non|hardly|cannot|(?:{_AUXILIARY})n['\u2019]?t)"
_NUMBER = re.compile(r"[0-9]+(?:\.[0-9]+)?")
_SIGNED = re.compile(r"[-+]?[0-9]+(?:\.[0-9]+)?")
_DECIMAL = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,9})?")  # in the user's own data
_AROUND_NUMBER = "\"'`*()[]{}:;!?=~"
_LONE_SIGNS = {"-", "\u2212", "\u2013", "/", ".", ",", "%"}
_PART_OF_NUMBER = re.compile(
    r"\b(?:half|halves|thirds?|quarters?|fifths?|sixths?|sevenths?|eighths?|ninths?|tenths?|hundred(?:s|ths?)?"
    r"|thousand(?:s|ths?)?|(?:[mb]|tr)illions?|dozens?|per ?cent|point|minus|negative)\b",
    re.IGNORECASE,
)


@lru_cache(maxsize=256)
def _keywords(labels: tuple[tuple[str, tuple[str, ...]], ...]) -> tuple[re.Pattern[str], dict[str, str]]:
    """A pattern for a keyword (group 1, longest first) or a negation outside keywords (no group 1); word -> label."""
    labels = tuple((label, tuple(map(nfc, words))) for label, words in labels)
    label_of = {fold(word): label for label, words in labels for word in words}

    def one(word: str) -> str:
        spelled = r"\s+".join(re.escape(part) for part in word.split())
        # ASCII words match in ASCII only: otherwise U+017F would match an "s", and U+212A a "k".
        return f"(?{'ai' if word.isascii() else 'i'}:{spelled})"

    any_word = "|".join(one(word) for word in sorted((w for _, words in labels for w in words), key=len, reverse=True))
    # "no" has the boundaries of a keyword, because it may be one; "no-one" is another word.
    alone = rf"{_NOT_AFTER_WORD}(?:({any_word})|(?ai:no)){_NOT_BEFORE_WORD}"
    return re.compile(rf"{alone}|(?<!\w)(?ai:{_NEGATION})(?!\w)"), label_of


def parse_answer(text: str, task: Task) -> str | float | None:
    """The answer in a model's response: a label of the task, a score, or None for a wrong format.

    Section 4.3: only the text before the first closing tag counts, and it must not hold another tag. Never raises;
    linear in the length of `text`. The text before the tag is parsed by the kind of task: `_parse_label` (built-in
    tasks), `_parse_word` (own tasks), `_parse_label_set`, `_parse_score`; with `parser: paper` by `_search`, but for
    label sets, which the paper has none of.
    """
    head, closed, _ = text.partition(CLOSE)
    if closed and task.parser == "paper" and not task.multi_label:
        return _search(head, task)
    if not closed or "<" in head or "judgement" in head.lower():  # unclosed, nested, repeated or look-alike tags
        return None
    if task.score_range is not None:
        return _parse_score(head, *task.score_range)
    if task.multi_label:
        return _parse_label_set(head, task)
    return _parse_word(head, task.labels) if task.is_exact else _parse_label(head, task.labels)


def _search(head: str, task: Task) -> str | float | None:
    """The paper's plain search: the first number, or the label of the first keyword, whatever else the text holds."""
    if task.score_range is not None:
        low, high = task.score_range
        number = _SIGNED.search(head)
        return float(number[0]) + 0.0 if number and low <= float(number[0]) <= high else None
    pattern, label_of = _keywords(tuple((label, tuple(words)) for label, words in task.labels.items()))
    return next((label_of.get(fold(found[1])) for found in pattern.finditer(nfc(head)) if found[1]), None)


@lru_cache(maxsize=256)
def _bare_words(labels: tuple[tuple[str, tuple[str, ...]], ...]) -> dict[str, str]:
    return {normalize_answer(word): label for label, words in labels for word in words}


def _parse_word(head: str, labels: Mapping[str, list[str]]) -> str | None:
    """The label with the whole answer among its words, ignoring surrounding spaces, quotes and a full stop."""
    return _bare_words(tuple((label, tuple(words)) for label, words in labels.items())).get(normalize_answer(head))


def _parse_label_set(head: str, task: Task) -> str | None:
    """The label set (`Task.join_labels`) of comma-separated labels, each once, in any order; None if it is not one."""
    if normalize_answer(head) == normalize_answer(task.no_label):
        return task.no_label
    found: list[str] = []
    for part in head.split(",", len(task.labels)):
        label = _parse_word(part, task.labels)
        if label is None or label in found:
            return None
        found.append(label)
    return task.join_labels(found)


def _parse_label(head: str, labels: Mapping[str, list[str]]) -> str | None:
    """The one label with a keyword in the answer, as a whole word in any case and in NFC.

    Keywords of two labels, no keyword, and a negation outside keywords are a wrong format.
    """
    head = nfc(head)
    pattern, label_of = _keywords(tuple((label, tuple(words)) for label, words in labels.items()))
    found: set[str] = set()
    for match in pattern.finditer(head):
        beside = head[max(0, match.start() - 1) : match.start()] + head[match.end() : match.end() + 1]
        if match[1] is None or any(unicodedata.category(character) in _MARKS for character in beside):
            return None
        label = label_of.get(fold(match[1]))
        if label is None:  # matched by a case folding that lower() does not share
            return None
        found.add(label)
        if len(found) > 1:
            return None
    return found.pop() if found else None


def _parse_score(head: str, low: float, high: float) -> float | None:
    """The only number in the answer, a plain decimal in the range; signed if the range has negative numbers."""
    signed, form = low < 0, _SIGNED if low < 0 else _NUMBER
    numbers: list[float] = []
    for word in head.split():
        if len(word) == 1 and unicodedata.normalize("NFKC", word) in _LONE_SIGNS:
            return None
        if not any(map(str.isnumeric, word)):
            continue
        number = word.lstrip(_AROUND_NUMBER).rstrip(_AROUND_NUMBER + ".,")
        if signed:
            number = number.replace("\u2212", "-")
        if numbers or not form.fullmatch(number):  # 3/5, 2,5, .5, 1e400, -0, full-width digits, 4-5, 5 out of 5 ...
            return None
        numbers.append(float(number) + 0.0)  # no -0
    if not numbers or _PART_OF_NUMBER.search(head):
        return None
    return numbers[0] if low <= numbers[0] <= high else None


def is_label(label: str, task: Task) -> bool:
    """Whether an answer can equal a label of the data.

    True for a label of the task, a label set as `Task.join_labels` writes it, or a number in the range: a plain
    decimal, in the user's own data also with an exponent.
    """
    if task.score_range is None:
        return task.is_label_set(label) if task.multi_label else label in task.labels
    low, high = task.score_range
    form = _DECIMAL if task.suite == "own" else _NUMBER
    return form.fullmatch(label) is not None and low <= float(label) <= high
