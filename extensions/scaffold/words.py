"""The words of a task: a word per label, and the sentences of the prompt, with readable column names."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from extensions.common.errors import UserError
from extensions.scaffold.cells import NUMBER, shortened
from extensions.scaffold.target import Target
from extensions.tasks.words import normalize_answer

MAX_REPEATED = 12  # labels that the question repeats; longer lists are only in the answer format
_GENERIC = {"text", "texts", "sentence", "content", "body", "input", "document", "string", "value"}
_NO_LABELS = ("none", "none of these", "no label", "nothing applies")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def readable(name: Any, otherwise: str = "text") -> str:
    """A column's name as words: `ticketBody`, `ticket_body` and `Ticket-Body` are "ticket body"."""
    split = re.sub(r"(?<=[a-z0-9])(?=[A-Z][a-z])", " ", str(name))
    words = re.sub(r"[\s_\-.{}<>\"'`#:]+", " ", _CONTROL.sub(" ", split)).split()
    found = " ".join(word if len(word) > 1 and word.isupper() else word.lower() for word in words)
    return found[:60].strip() if any(map(str.isalnum, found)) else otherwise


def with_article(noun: str) -> str:
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"


def listed(items: Sequence[str], last: str = "and") -> str:
    """ "a", "a and b", "a, b and c"."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} {last} {items[-1]}"


def description(texts: Sequence[Any], label: Any, target: Target) -> str:
    """Part 1 of the prompt, as a sentence."""
    names = [readable(name) for name in texts]
    if len(names) == 1:
        read = "a text" if names[0] in _GENERIC else with_article(names[0])
    else:
        read = f"{listed([f'the {name}' for name in dict.fromkeys(names)])} of an entry"
    noun = readable(label, "label")
    if target.kind == "classification":
        action = f"names its {noun}"
    elif target.kind == "regression":
        action = f"gives its {noun} as a number {_range(target)}"
    else:
        action = f"lists the {noun} that apply" if _plural(noun) else f"lists every {noun} that applies"
    return f"You are an assistant that reads {read} and {action}."


def _range(target: Target) -> str:
    assert target.score_range is not None
    return "from {:.15g} to {:.15g}".format(*target.score_range)


def _plural(noun: str) -> bool:
    return noun.endswith("s") and not noun.endswith("ss")


def question(fields: Mapping[str, Any], label: Any, target: Target, words: Mapping[str, str]) -> str:
    """Part 3 of the prompt: a line per text, and the question.

    Args:
        fields: placeholder -> column.
        words: label -> its word; empty for a regression.
    """
    noun = readable(label, "label")
    names = [readable(column) for column in fields.values()]
    names = [f"{name} ({k})" if name in names[: k - 1] else name for k, name in enumerate(names, start=1)]
    lines = [f"{name[:1].upper()}{name[1:]}: {{{field}}}" for name, field in zip(names, fields, strict=True)]
    options = [f'"{word}"'.replace("{", "{{").replace("}", "}}") for word in words.values()]
    if len(options) > MAX_REPEATED:
        options = []
    if target.kind == "regression":
        asked = f"What is the {noun}, {_range(target)}?"
    elif target.kind == "classification":
        asked = f"What is the {noun}: {listed(options, 'or')}?" if options else f"What is the {noun}?"
    else:
        which = f"Which {noun} apply" if _plural(noun) else f"Which {noun} applies"
        asked = f"{which}: {listed(options)}?" if options else f"{which}?"
    return "\n  ".join([*lines, asked])


def label_words(labels: Sequence[str], given: Mapping[str, str], multi_label: bool) -> tuple[dict[str, str], list[str]]:
    """Label -> the word that the model writes for it, and notes on odd words.

    Words are lower case, with spaces in place of underscores and hyphens, and distinct.

    Args:
        given: label -> its word, the user's choice.

    Raises:
        UserError: `given` has an unknown label, or gives two labels the same word.
    """
    if given and not labels:
        raise UserError(
            f"--labels: {next(iter(given))!r} is no label: a regression has scores, no labels; leave --labels out, or "
            "say --kind classification if few numbers stand for classes"
        )
    unknown = [label for label in given if label not in labels]
    if unknown:
        raise UserError(
            f"--labels: {unknown[0]!r} is no label of the column; its labels are {', '.join(map(repr, labels))}"
        )
    notes: list[str] = []
    words = {
        label: _writable(given[label] if label in given else _default_word(label), multi_label) for label in labels
    }
    for number, label in enumerate(labels, start=1):
        if not words[label]:
            words[label] = f"label {number}"
            notes.append(
                f"label {label!r} has no letter or digit; its word is {words[label]!r}, --labels gives another"
            )
    _make_distinct(words, given, multi_label, notes)
    plain = [label for label in labels if label not in given and re.fullmatch(r"[-+]?[0-9.]+|true|false", words[label])]
    if plain:
        pairs = ",".join(f"{label}=WORD" for label in plain[:4])
        notes.append(
            f"{'all' if len(plain) == len(labels) else 'some'} labels are numbers or true/false, which say nothing "
            f"to the model; if they mean something, say what: --labels {pairs}"
        )
    return words, notes


def no_label_word(words: Mapping[str, str]) -> str:
    """The answer of a multi-label row without a label: distinct from all labels and words."""
    taken = {normalize_answer(text) for pair in words.items() for text in pair}
    return next((word for word in _NO_LABELS if word not in taken), "none of the labels")


def _default_word(label: str) -> str:
    number = re.fullmatch(r"(-?[0-9]+)\.0+", label)  # pandas writes a column of whole numbers with gaps so
    if number or re.fullmatch(r"-?[0-9.]+", label):
        return number[1] if number else label
    return " ".join(re.sub(r"[_\-]+", " ", label).split()).lower()


def _writable(word: str, multi_label: bool) -> str:
    """A word without what an answer cannot hold: the characters of its tags, and in a list the separator."""
    word = re.sub(r"judgement", "judgment", _CONTROL.sub(" ", word), flags=re.IGNORECASE)
    word = re.sub(r"[<>,]" if multi_label else r"[<>]", " ", word)
    word = " ".join(word.split()).strip("\"'`.“”‘’«» ")
    return word if any(not character.isspace() for character in word) else ""


def _make_distinct(words: dict[str, str], given: Mapping[str, str], multi_label: bool, notes: list[str]) -> None:
    """Give labels with the same word different ones: the label as written, else with a number. Note equal numbers."""
    equal = _clashes({label: float(label) for label in words if NUMBER.fullmatch(label)})
    notes += map(_hardly_different, equal)
    for group in _clashes({label: normalize_answer(word) for label, word in words.items()}):
        both = [label for label in group if label in given]
        if len(both) > 1:
            raise UserError(f"--labels: {both[0]!r} and {both[1]!r} have the same word, {words[both[0]]!r}")
        words |= {label: _writable(label, multi_label) or words[label] for label in group if label not in given}
    for group in _clashes({label: normalize_answer(word) for label, word in words.items()}):
        if not any(set(group) <= set(one) for one in equal):
            notes.append(_hardly_different(group))
        taken = {normalize_answer(word) for word in words.values()}
        unchanged = next((label for label in group if label in given), group[0])
        for label in group:
            if label != unchanged:
                numbered = (f"{words[label]} {n}" for n in range(2, len(words) + 3))
                words[label] = next(word for word in numbered if normalize_answer(word) not in taken)
                taken.add(normalize_answer(words[label]))


def _clashes(keys: Mapping[str, Any]) -> list[list[str]]:
    """Groups of labels with the same key."""
    groups: defaultdict[Any, list[str]] = defaultdict(list)
    for label, key in keys.items():
        groups[key].append(label)
    return [group for group in groups.values() if len(group) > 1]


def _hardly_different(labels: Sequence[str]) -> str:
    return (
        f"labels {listed([repr(shortened(label)) for label in labels])} are hardly different; if they are one, make "
        "them the same in the file"
    )
