"""Keywords of own tasks, and Unicode forms of words and answers.

Expectations come from section 4.3 of the paper and the parser's docstring, never from running it.
"""

import unicodedata

import pytest
from answer_words import own_task, wide

from extensions.prompts import CLOSE, pack_label, parse_answer
from reward_fns.nlu import reward

# The canonical answer of every label must be readable, whatever the words are.
OWN_WORDS = [
    ("longer word holds the shorter", ["positive", "very positive", "positive-ish"]),
    ("negations as labels", ["always", "never", "not sure"]),
    ("no in a label", ["no", "no idea", "idea"]),
    ("symbols", ["C", "C++", "C#"]),
    ("numbers", ["1", "1.5", "15"]),
    ("letters", ["A", "B", "C"]),
    ("regular expression characters", ["a.c", "abc", "(a|b)*", "^$", "[x]", "\\w"]),
    ("hyphens", ["toxic", "non-toxic"]),
    ("apostrophes", ["can", "can't"]),
    ("German", ["ja", "nein", "weiß nicht"]),
    ("Chinese", ["是", "否"]),
    ("Greek with a final sigma", ["ΝΑΙ ΣΩΣΤΟΣ", "όχι"]),
    ("Turkish dotted capital", ["İyi", "kötü"]),
    ("spaces in a row", ["not  good", "good"]),
    ("accented", ["Où", "là"]),
]


@pytest.mark.parametrize("name, words", OWN_WORDS, ids=[name for name, _ in OWN_WORDS])
def test_canonical_answers_of_own_tasks(name, words):
    task = own_task(labels=words)
    assert [parse_answer(f" {word}{CLOSE}", task) for word in words] == words
    assert [parse_answer(f"{word} or {words[0]}{CLOSE}", task) for word in words[1:]] == [None] * (len(words) - 1)


ACUTE = "\u0301"
COMPOSED, DECOMPOSED = "n\u00e9gatif", f"ne{ACUTE}gatif"
# A task with the labels `positif` and `négatif`, in either Unicode form, and the label that is read.
FORMS = [
    ("composed", f"{COMPOSED}</Judgement>", True),
    ("decomposed", f"{DECOMPOSED}</Judgement>", True),
    ("upper case, decomposed", f"NE{ACUTE}GATIF</Judgement>", True),
    ("upper case, composed", "N\u00c9GATIF</Judgement>", True),
    ("U+0341, which NFC makes U+0301", "ne\u0341gatif</Judgement>", True),
    ("both forms", f"{COMPOSED}, {DECOMPOSED}</Judgement>", True),
    ("in a sentence", f"C'est {DECOMPOSED}.</Judgement>", True),
    ("after a word of many marks", f"e{ACUTE * 30} {DECOMPOSED}</Judgement>", True),
    ("without its mark", "negatif</Judgement>", False),
    ("another mark", "ne\u0300gatif</Judgement>", False),
    ("two marks", f"ne{ACUTE}{ACUTE}gatif</Judgement>", False),
    ("a mark more at the end", f"{DECOMPOSED}{ACUTE}</Judgement>", False),
    ("mark before its letter", f"n{ACUTE}egatif</Judgement>", False),
    ("zero-width joiner before the mark", f"ne\u200d{ACUTE}gatif</Judgement>", False),
    ("part of a word", f"{DECOMPOSED}s</Judgement>", False),
    ("the other as well", f"{DECOMPOSED} positif</Judgement>", False),
    ("a mark on the closing tag", f"{DECOMPOSED}</Judgement>\u0338", True),
    ("a mark within the closing tag", f"{DECOMPOSED}</Judgement\u0338>", False),
    ("a mark on a bracket", f"<\u0338{DECOMPOSED}</Judgement>", False),
    ("compatibility forms", "n\u00e9gati\ufb01</Judgement>", False),
    ("full-width letters", f"{wide('n')}\u00e9gatif</Judgement>", False),
]


@pytest.mark.parametrize("label", [COMPOSED, DECOMPOSED], ids=["label composed", "label decomposed"])
@pytest.mark.parametrize(("name", "text", "read"), FORMS, ids=[name for name, *_ in FORMS])
def test_forms_of_a_label(name, text, read, label):
    for labels in (["positif", label], {"0": ["positif"], "1": ["mauvais", label]}):
        task = own_task(labels=labels)
        gold = label if isinstance(labels, list) else "1"
        assert parse_answer(text, task) == (gold if read else None)
        assert reward(text, pack_label(task, gold)) == (1.0 if read else -1.0)


WORDS = [
    "\ud55c\uad6d\uc5b4",
    "Vie\u0323\u0302t",
    "\u1e9b\u0323",
    "\u212bngstro\u0308m",
    "\u03d3",
    "\u0130st",
    "\u1fb4",
]


@pytest.mark.parametrize("word", WORDS)
def test_all_canonical_forms_of_a_word_are_one(word):
    forms = {word, *(unicodedata.normalize(form, word) for form in ("NFC", "NFD"))}
    for label in forms:
        task = own_task(labels=["other", label])
        for written in forms:
            assert parse_answer(f"{written}{CLOSE}", task) == label


@pytest.mark.parametrize(
    "labels",
    [[COMPOSED, DECOMPOSED], {"a": [COMPOSED], "b": [f"NE{ACUTE}GATIF"]}, {COMPOSED: ["x"], DECOMPOSED: ["y"]}],
)
def test_labels_that_differ_in_form_alone_are_refused(labels):
    with pytest.raises(ValueError, match="must be distinct"):
        own_task(labels=labels)


def test_characters_that_nfc_makes_ascii_are_kept():
    task = own_task(labels=["ok", COMPOSED])
    assert parse_answer(f"o\u212a{CLOSE}", task) is None
    assert parse_answer(f"{DECOMPOSED} \u212a\u037e\u1fef{CLOSE}", task) == COMPOSED


MARKS = {
    "marks in the wrong order": lambda n: "e" + f"{ACUTE}\u0316" * (n // 2),
    "marks of one kind, then of a lower": lambda n: "e" + ACUTE * (n // 2) + "\u0316" * (n // 2),
    "marks that decompose": lambda n: "e" + "\u0344" * n,
    "letters that decompose into marks": lambda n: "\u0f71" + "\u0f73" * n,
    "thirty marks a letter": lambda n: ("e" + f"{ACUTE}\u0316" * 15) * (n // 31),
    "jamo": lambda n: "\u1100\u1161\u11a8" * (n // 3),
    "surrogates and marks": lambda n: f"\ud800{ACUTE}" * (n // 2),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("shape", MARKS)
def test_a_megabyte_of_marks_is_parsed(shape):
    """NFC sorts n marks in a row in n^2 steps, which would take hours for the first shapes."""
    task = own_task(labels=["positif", COMPOSED])
    text = MARKS[shape](1_000_000)
    assert parse_answer(f"{text}{CLOSE}", task) is None
    assert parse_answer(f"{DECOMPOSED} {text}{CLOSE}", task) in (None, COMPOSED)
    assert parse_answer(f"{COMPOSED} {text}{CLOSE}", task) == COMPOSED
