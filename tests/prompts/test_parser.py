"""The answer parser and the reward against their written rules, for every task and any text.

Expectations come from section 4.3 of the paper and the parser's docstring, never from running it.
"""

import math
import random
import re
import unicodedata
from itertools import cycle, islice, permutations

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from extensions.prompts import CLOSE, OPEN, pack_label, parse_answer
from extensions.tasks import TASKS, Task, fold
from reward_fns.nlu import reward

COLA, STSB = TASKS["cola"], TASKS["stsb"]

# Typed from the prompts and the data sets: what each word of an answer means.
YES_NO, TRUE_FALSE = {"yes": "1", "no": "0"}, {"yes": "true", "no": "false"}
ACCEPTABLE = {"acceptable": "1", "not acceptable": "0", "unacceptable": "0"}
SENTIMENT = {"positive": "1", "negative": "0"}
ENTAILED = {"yes": "entailment", "entailment": "entailment"}
NOT_ENTAILED = dict.fromkeys(["no", "not entailment", "not_entailment"], "not_entailment")
THREE_WAYS = {"entailment": "entailment", "neutral": "neutral", "contradiction": "contradiction"}
KEYWORDS = {
    **dict.fromkeys(["acceptability", "cola"], YES_NO | ACCEPTABLE),
    **dict.fromkeys(["reviews", "sst2"], SENTIMENT),
    **dict.fromkeys(["qqp", "mrpc", "wnli"], YES_NO),
    **dict.fromkeys(["rte", "superglue_rte", "axb", "axg"], ENTAILED | NOT_ENTAILED),
    **dict.fromkeys(["mnli", "mnli_mm", "ax", "cb"], THREE_WAYS),
    **dict.fromkeys(["boolq", "record", "wic", "wsc"], TRUE_FALSE),
    "qnli": {"yes": "entailment", "no": "not_entailment"},
    "copa": {"first": "0", "second": "1"},
    "multirc": {"true": "1", "false": "0"},
    "stsb": {},
}
# The words that the prompts ask for; tasks of one group are read alike.
GROUPS = {
    "acceptability": (["Yes", "No"], ["acceptability", "cola"]),
    "sentiment": (["Positive", "Negative"], ["reviews", "sst2"]),
    "yes or no": (["Yes", "No"], ["qqp", "mrpc", "wnli", "qnli", "boolq", "record", "wic", "wsc"]),
    "entailment": (["Yes", "No"], ["rte", "superglue_rte", "axb", "axg"]),
    "three ways": (["entailment", "neutral", "contradiction"], ["mnli", "mnli_mm", "ax", "cb"]),
    "choice": (["First", "Second"], ["copa"]),
    "truth": (["True", "False"], ["multirc"]),
}


def own_task(**keys):
    """A task by the keyword rule, with labels of its own."""
    entry = {"name": "own", "description": "Judge the text.", "question": 'Judge "{text}".', "labels": ["good", "bad"]}
    return Task.model_validate(entry | ({} if "score_range" in keys else {"answer_match": "keyword"}) | keys)


def test_every_task_has_its_keywords_here():
    assert KEYWORDS.keys() == TASKS.keys()
    assert sorted(name for _, names in GROUPS.values() for name in names) == sorted(KEYWORDS.keys() - {"stsb"})
    for name, task in TASKS.items():
        assert {fold(word): label for label, words in task.labels.items() for word in words} == KEYWORDS[name]
        assert task.is_regression == (name == "stsb")
    for words, names in GROUPS.values():
        for name in names:
            assert sorted(KEYWORDS[name][word.lower()] for word in words) == sorted(TASKS[name].labels)


# ------------------------------------------------------------------------------------------------- the answer's words

CYRILLIC = str.maketrans("aceiopAO", "\u0430\u0441\u0435\u0456\u043e\u0440\u0410\u041e")


def wide(word):
    return "".join(chr(ord(letter) + 0xFEE0) for letter in word)


def bold(word):
    return "".join(chr(ord(letter) + (0x1D3BF if letter.isupper() else 0x1D3B9)) for letter in word)


def inside(word, character):
    return f"{word[0]}{character}{word[1:]}"


def mixed(word):
    return "".join(letter.swapcase() if k % 2 else letter.lower() for k, letter in enumerate(word))


A, B = "the first word's label", "the second word's label"
# Of two words of different labels, in the spelling of the prompt, every way round.
HOSTILE = [
    # the plain answers
    ("plain", lambda a, b: f"{a}</Judgement>", A),
    ("spaces around", lambda a, b: f" \n\t {a} \r\n </Judgement>", A),
    ("no-break space", lambda a, b: f"\u00a0{a}\u00a0</Judgement>", A),
    ("ideographic space, line separator", lambda a, b: f"\u3000{a}\u2028</Judgement>", A),
    ("lower case", lambda a, b: f"{a.lower()}</Judgement>", A),
    ("upper case", lambda a, b: f"{a.upper()}</Judgement>", A),
    ("mixed case", lambda a, b: f"{mixed(a)}</Judgement>", A),
    ("full stop", lambda a, b: f"{a}.</Judgement>", A),
    ("exclamation marks", lambda a, b: f"{a}!!!</Judgement>", A),
    ("quoted", lambda a, b: f'"{a}"</Judgement>', A),
    ("single quotes", lambda a, b: f"'{a}'</Judgement>", A),
    ("curly quotes", lambda a, b: f"“{a}”</Judgement>", A),
    ("guillemets", lambda a, b: f"«{a}»</Judgement>", A),
    ("bold", lambda a, b: f"**{a}**</Judgement>", A),
    ("code", lambda a, b: f"`{a}`</Judgement>", A),
    ("braces of the format", lambda a, b: f"{{{a}}}</Judgement>", A),
    ("brackets", lambda a, b: f"[({a})]</Judgement>", A),
    ("in a sentence", lambda a, b: f"The answer is: {a}, I think</Judgement>", A),
    ("the same twice", lambda a, b: f"{a}, {a.lower()}</Judgement>", A),
    ("the same a thousand times", lambda a, b: f"{f'{a} ' * 1000}</Judgement>", A),
    ("far behind", lambda a, b: f"{' x' * 5000} {a}</Judgement>", A),
    ("a look-alike of the other beside it", lambda a, b: f"{a} {b.translate(CYRILLIC)}</Judgement>", A),
    ("a longer word of the other beside it", lambda a, b: f"{a}, x{b}x</Judgement>", A),
    ("dash with spaces", lambda a, b: f"{a} - so I think</Judgement>", A),
    ("two dashes", lambda a, b: f"{a}--so I think</Judgement>", A),
    ("numbers beside", lambda a, b: f"100 {a} 5.0</Judgement>", A),
    # what follows the tag
    ("after the tag nothing counts", lambda a, b: f"{a}</Judgement> {b}", A),
    ("no matter what", lambda a, b: f"{a}</Judgement><Judgement>not {b}</judgement>", A),
    ("a second closing tag", lambda a, b: f"{a}</Judgement></Judgement>", A),
    ("a second answer", lambda a, b: f"{a}</Judgement>{b}</Judgement>", A),
    ("end token", lambda a, b: f"{a}</Judgement></s>", A),
    ("the answer alone after the tag", lambda a, b: f"</Judgement>{a}</Judgement>", None),
    # no answer
    ("empty", lambda a, b: "", None),
    ("tag alone", lambda a, b: "</Judgement>", None),
    ("blank", lambda a, b: " \t\n </Judgement>", None),
    ("no keyword", lambda a, b: "Maybe.</Judgement>", None),
    ("a number", lambda a, b: "1</Judgement>", None),
    ("punctuation", lambda a, b: "...!?</Judgement>", None),
    ("initial", lambda a, b: f"{a[0]}</Judgement>", None),
    ("cut short", lambda a, b: f"{a[:-1]}</Judgement>", None),
    ("last letter twice", lambda a, b: f"{a}{a[-1]}</Judgement>", None),
    # contradictions
    ("both", lambda a, b: f"{a} {b}</Judgement>", None),
    ("both, slash", lambda a, b: f"{a}/{b}</Judgement>", None),
    ("both, comma", lambda a, b: f"{a},{b}</Judgement>", None),
    ("both, as the prompt names them", lambda a, b: f'Insert only "{a}" or "{b}" here</Judgement>', None),
    ("both, far apart", lambda a, b: f"{a}{' x' * 5000} {b.lower()}</Judgement>", None),
    ("both, three times", lambda a, b: f"{a} {a} {b}</Judgement>", None),
    ("both, other case", lambda a, b: f"{a.upper()} {b.lower()}</Judgement>", None),
    ("both, line break", lambda a, b: f"{a}\n{b}</Judgement>", None),
    ("both, emoji between", lambda a, b: f"{a}\U0001f600{b}</Judgement>", None),
    ("both, NUL between", lambda a, b: f"{a}\0{b}</Judgement>", None),
    ("one, then not the other", lambda a, b: f"{a}, not {b}</Judgement>", None),
    # negations
    ("not", lambda a, b: f"not {a}</Judgement>", None),
    ("NOT", lambda a, b: f"NOT {a.upper()}</Judgement>", None),
    ("not the", lambda a, b: f"not the {a.lower()}</Judgement>", None),
    ("not quoted", lambda a, b: f'not "{a}"</Judgement>', None),
    ("not in brackets", lambda a, b: f"not ({a})</Judgement>", None),
    ("not, comma", lambda a, b: f"not, {a}</Judgement>", None),
    ("not, many spaces", lambda a, b: f"not{' ' * 500}{a}</Judgement>", None),
    ("not, no-break space", lambda a, b: f"not\u00a0{a}</Judgement>", None),
    ("not far before", lambda a, b: f"not to be called, by any means, {a}</Judgement>", None),
    ("not behind", lambda a, b: f"{a}? Certainly not</Judgement>", None),
    ("not not", lambda a, b: f"not not {a}</Judgement>", None),
    ("isn't", lambda a, b: f"isn't {a}</Judgement>", None),
    ("isn’t", lambda a, b: f"It isn’t {a}.</Judgement>", None),
    ("isnt", lambda a, b: f"isnt {a}</Judgement>", None),
    ("mustn't", lambda a, b: f"mustn't be {a}</Judgement>", None),
    ("won't", lambda a, b: f"I won't say {a}</Judgement>", None),
    ("DOESN'T", lambda a, b: f"DOESN'T MEAN {a}</Judgement>", None),
    ("cannot", lambda a, b: f"cannot be {a}</Judgement>", None),
    ("never", lambda a, b: f"never {a}</Judgement>", None),
    ("neither", lambda a, b: f"neither {a}</Judgement>", None),
    ("hardly", lambda a, b: f"hardly {a}</Judgement>", None),
    ("nor", lambda a, b: f"nor {a}</Judgement>", None),
    ("non", lambda a, b: f"non {a.lower()}</Judgement>", None),
    ("non-", lambda a, b: f"non-{a.lower()}</Judgement>", None),
    ("knot is no negation", lambda a, b: f"The knot: {a}</Judgement>", A),
    ("notable is no negation", lambda a, b: f"Notably {a}</Judgement>", A),
    # a label inside a word
    ("letter before", lambda a, b: f"x{a}</Judgement>", None),
    ("letter after", lambda a, b: f"{a}x</Judgement>", None),
    ("plural", lambda a, b: f"{a}es</Judgement>", None),
    ("adverb", lambda a, b: f"{a}ly</Judgement>", None),
    ("un-", lambda a, b: f"un{a.lower()}</Judgement>", None),
    ("repeated without spaces", lambda a, b: f"{a}{a}</Judgement>", None),
    ("both without spaces", lambda a, b: f"{a}{b}</Judgement>", None),
    ("digit after", lambda a, b: f"{a}1</Judgement>", None),
    ("digit before", lambda a, b: f"0{a}</Judgement>", None),
    ("underscore after", lambda a, b: f"{a}_</Judgement>", None),
    ("underscores around", lambda a, b: f"_{a}_</Judgement>", None),
    ("hyphen after", lambda a, b: f"{a}-ish</Judgement>", None),
    ("hyphen before", lambda a, b: f"semi-{a}</Judgement>", None),
    ("possessive", lambda a, b: f"{a}'s</Judgement>", None),
    ("curly possessive", lambda a, b: f"{a}’s</Judgement>", None),
    ("other letters beside", lambda a, b: f"{a}日</Judgement>", None),
    ("accented letter beside", lambda a, b: f"é{a}</Judgement>", None),
    ("split by a space", lambda a, b: f"{inside(a, ' ')}</Judgement>", None),
    ("split by a line break", lambda a, b: f"{inside(a, chr(10))}</Judgement>", None),
    ("split by a hyphen", lambda a, b: f"{inside(a, '-')}</Judgement>", None),
    ("spaced out", lambda a, b: f"{' '.join(a)}</Judgement>", None),
    ("backwards", lambda a, b: f"{a[::-1]}</Judgement>", None),
    # tags
    ("no closing tag", lambda a, b: a, None),
    ("cut closing tag", lambda a, b: f"{a}</Judgement", None),
    ("opening tag for the closing one", lambda a, b: f"{a}<Judgement>", None),
    ("closing tag in lower case", lambda a, b: f"{a}</judgement>", None),
    ("closing tag in upper case", lambda a, b: f"{a}</JUDGEMENT>", None),
    ("closing tag with a space", lambda a, b: f"{a}</ Judgement>", None),
    ("closing tag with a space at its end", lambda a, b: f"{a}</Judgement >", None),
    ("closing tag over two lines", lambda a, b: f"{a}</Judge\nment>", None),
    ("escaped", lambda a, b: f"{a}&lt;/Judgement&gt;", None),
    ("backslash", lambda a, b: f"{a}<\\/Judgement>", None),
    ("American spelling", lambda a, b: f"{a}</Judgment>", None),
    ("Cyrillic e in the tag", lambda a, b: f"{a}</Judg\u0435m\u0435nt>", None),
    ("zero-width space in the tag", lambda a, b: f"{a}</Judge\u200bment>", None),
    ("full-width brackets", lambda a, b: f"{a}＜/Judgement＞", None),
    ("full-width tag", lambda a, b: f"{a}{wide('</Judgement>')}", None),
    ("repeated opening tag", lambda a, b: f"<Judgement>{a}</Judgement>", None),
    ("nested", lambda a, b: f"<Judgement><Judgement>{a}</Judgement></Judgement>", None),
    ("opening tag after the answer", lambda a, b: f"{a}<Judgement></Judgement>", None),
    ("reversed", lambda a, b: f"</Judgement>{a}<Judgement>", None),
    ("two answers, each in tags", lambda a, b: f"{a}<Judgement>{b}</Judgement>", None),
    ("wrong case, then closed", lambda a, b: f"{a}</judgement></Judgement>", None),
    ("spaces, then closed", lambda a, b: f"{a}< / Judgement ></Judgement>", None),
    ("American spelling, then closed", lambda a, b: f"{a}</Judgment></Judgement>", None),
    ("Cyrillic tag, then closed", lambda a, b: f"{a}</Judg\u0435ment></Judgement>", None),
    ("escaped, then closed", lambda a, b: f"&lt;Judgement&gt;{a}</Judgement>", None),
    ("square brackets, then closed", lambda a, b: f"[Judgement]{a}</Judgement>", None),
    ("another tag, then closed", lambda a, b: f"<b>{a}</b></Judgement>", None),
    ("less than, then closed", lambda a, b: f"{a} < 3</Judgement>", None),
    # Unicode
    ("Cyrillic letters", lambda a, b: f"{a.translate(CYRILLIC)}</Judgement>", None),
    ("full-width letters", lambda a, b: f"{wide(a)}</Judgement>", None),
    ("mathematical bold", lambda a, b: f"{bold(a)}</Judgement>", None),
    ("combining accent inside", lambda a, b: f"{inside(a, chr(0x301))}</Judgement>", None),
    ("combining accent at the end", lambda a, b: f"{a}\u0308</Judgement>", None),
    ("combining overlay", lambda a, b: f"{a}\u0336</Judgement>", None),
    ("combining mark of another block", lambda a, b: f"{a}\u1ab0</Judgement>", None),
    ("combining half mark", lambda a, b: f"{a}\ufe20</Judgement>", None),
    ("enclosing keycap", lambda a, b: f"{a}\u20e3</Judgement>", None),
    ("variation selector", lambda a, b: f"{a}\ufe0f</Judgement>", None),
    ("zero-width space inside", lambda a, b: f"{inside(a, chr(0x200B))}</Judgement>", None),
    ("zero-width space at the end", lambda a, b: f"{a}\u200b</Judgement>", None),
    ("zero-width joiner before", lambda a, b: f"\u200d{a}</Judgement>", None),
    ("word joiner after", lambda a, b: f"{a}\u2060</Judgement>", None),
    ("byte order mark before", lambda a, b: f"\ufeff{a}</Judgement>", None),
    ("invisible, then letters", lambda a, b: f"{a}\u200bthing</Judgement>", None),
    ("invisible separator, then letters", lambda a, b: f"{a}\u2063thing</Judgement>", None),
    ("Mongolian vowel separator", lambda a, b: f"{a}\u180ething</Judgement>", None),
    ("soft hyphen inside", lambda a, b: f"{inside(a, chr(0xAD))}</Judgement>", None),
    ("soft hyphen, then letters", lambda a, b: f"{a}\u00adthing</Judgement>", None),
    ("tag characters", lambda a, b: f"{a}\U000e0074\U000e0065</Judgement>", None),
    ("right-to-left mark beside", lambda a, b: f"\u200f{a}\u200f</Judgement>", None),
    ("right-to-left override beside", lambda a, b: f"\u202e{a}</Judgement>", None),
    ("right-to-left isolates beside", lambda a, b: f"\u2067{a}\u2069</Judgement>", None),
    ("right-to-left mark apart", lambda a, b: f"\u200f {a} \u200f</Judgement>", A),
    ("Hebrew beside it", lambda a, b: f"כן {a}</Judgement>", A),
    ("Arabic full stop", lambda a, b: f"{a}۔</Judgement>", A),
    ("emoji apart", lambda a, b: f"{a} \U0001f600</Judgement>", A),
    ("emoji beside", lambda a, b: f"\u2705{a}\U0001f600</Judgement>", A),
    ("emoji of several characters apart", lambda a, b: f"\U0001f469\u200d\U0001f52c {a} \u2764\ufe0f</Judgement>", A),
    ("full-width punctuation", lambda a, b: f"：{a}。</Judgement>", A),
    # control characters
    ("NUL inside", lambda a, b: f"{inside(a, chr(0))}</Judgement>", None),
    ("NUL alone", lambda a, b: "\0</Judgement>", None),
    ("NUL around", lambda a, b: f"\0{a}\0</Judgement>", A),
    ("bell and escape apart", lambda a, b: f"\x07 \x1b {a} \x7f</Judgement>", A),
    ("backspaces", lambda a, b: f"{inside(a, chr(8))}\x08</Judgement>", None),
    ("lone surrogate apart", lambda a, b: f"{a} \ud800</Judgement>", A),
    ("lone surrogate inside", lambda a, b: f"{inside(a, chr(0xDCE9))}</Judgement>", None),
    ("file separator inside", lambda a, b: f"{inside(a, chr(0x1C))}</Judgement>", None),
]


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize(("name", "write", "expected"), HOSTILE, ids=[name for name, *_ in HOSTILE])
def test_hostile_answers(name, write, expected, group):
    words, tasks = GROUPS[group]
    for a, b in permutations(words, 2):
        text = write(a, b)
        for task in tasks:
            assert parse_answer(text, TASKS[task]) == (KEYWORDS[task][a.lower()] if expected == A else None), text


# What only the words of some tasks can do: (group, name, text before the closing tag, the word that it counts as).
OF_SOME = [
    ("acceptability", "two words of one label", "Yes, acceptable.", "yes"),
    ("acceptability", "all words of the other", "No, not acceptable: unacceptable", "no"),
    ("acceptability", "acceptable", "acceptable", "yes"),
    ("acceptability", "not acceptable", "not acceptable", "no"),
    ("acceptability", "not acceptable, line break", "Not \n acceptable.", "no"),
    ("acceptability", "NOT ACCEPTABLE", "It is NOT ACCEPTABLE!", "no"),
    ("acceptability", "unacceptable", "Unacceptable", "no"),
    ("acceptability", "a word and its opposite", "acceptable or unacceptable", None),
    ("acceptability", "acceptable and not acceptable", "acceptable, not acceptable", None),
    ("acceptability", "no acceptable", "no acceptable", None),
    ("acceptability", "not unacceptable", "not unacceptable", None),
    ("acceptability", "not not acceptable", "not not acceptable", None),
    ("acceptability", "not, comma", "not, acceptable", None),
    ("acceptability", "not so", "not linguistically acceptable", None),
    ("acceptability", "not a part", "not acceptable, not", None),
    ("acceptability", "un-acceptable", "un-acceptable", None),
    ("acceptability", "not-acceptable", "not-acceptable", None),
    ("acceptability", "isn't acceptable", "isn't acceptable", None),
    ("acceptability", "Yes, isn't acceptable", "Yes, it isn't acceptable", None),
    ("acceptability", "in a longer word", "acceptableness", None),
    ("acceptability", "synonyms", "True, correct, right", None),
    ("acceptability", "joined by a NUL", "not\0acceptable", None),
    ("acceptability", "words of others", "Positive, first", None),
    ("yes or no", "acceptable", "acceptable", None),
    ("yes or no", "entailment", "entailment", None),
    ("yes or no", "True", "True", None),
    *[
        (group, *row)
        for group in ("acceptability", "yes or no", "entailment")
        for row in (
            ("no problem: Yes", "no problem: Yes", None),
            ("no problem: No", "no problem: No", "no"),
            ("Nothing", "Nothing", None),
            ("Nothing, then Yes", "Nothing speaks against it: Yes", "yes"),
            ("None", "None", None),
            ("Nope", "Nope", None),
            ("Know", "Know", None),
            ("Yesterday", "Yesterday", None),
            ("eyes", "eyes", None),
            ("yes-man", "yes-man", None),
            ("no-one", "no-one says Yes", "yes"),
            ("nobody", "Nobody", None),
            ("Yes and no", "Yes and no", None),
            ("long s", "Ye\u017f", None),
            ("Greek Y", "\u03a5es", None),
            ("Greek N", "\u039do", None),
            ("small capitals", "ɴᴏ", None),
            ("accent", "Yés", None),
            ("numero sign", "\u2116", None),
        )
    ],
    ("sentiment", "keyword of another task", "Yes", None),
    ("sentiment", "no positive", "no positive", None),
    ("sentiment", "not very positive", "not very positive", None),
    ("sentiment", "non-positive", "non-positive", None),
    ("sentiment", "positively", "positively", None),
    ("sentiment", "unnegative", "unnegative", None),
    ("sentiment", "neutral", "Neutral", None),
    ("sentiment", "mixed", "positive and negative", None),
    ("sentiment", "dotless i", "pos\u0131t\u0131ve", None),
    ("sentiment", "dotted capital I", "POS\u0130T\u0130VE", None),
    ("entailment", "entailment", "entailment", "yes"),
    ("entailment", "Entailment in a sentence", "It is an Entailment.", "yes"),
    ("entailment", "Yes, entailment", "Yes, entailment", "yes"),
    ("entailment", "not entailment", "not entailment", "no"),
    ("entailment", "Not Entailment", "Not \t Entailment!", "no"),
    ("entailment", "as the data spell it", "not_entailment", "no"),
    ("entailment", "as the data spell it, upper case", "NOT_ENTAILMENT", "no"),
    ("entailment", "all words of the other", "No: not_entailment, not entailment", "no"),
    ("entailment", "no entailment", "no entailment", None),
    ("entailment", "Yes, not entailment", "Yes, not entailment", None),
    ("entailment", "entailment and not", "entailment or not entailment", None),
    ("entailment", "not an entailment", "not an entailment", None),
    ("entailment", "isn't an entailment", "isn't an entailment", None),
    ("entailment", "non-entailment", "non-entailment", None),
    ("entailment", "not-entailment", "not-entailment", None),
    ("entailment", "not not entailment", "not not entailment", None),
    ("entailment", "not not_entailment", "not not_entailment", None),
    ("entailment", "not__entailment", "not__entailment", None),
    ("entailment", "entailments", "entailments", None),
    ("entailment", "entails", "entails", None),
    ("entailment", "neutral", "neutral", None),
    ("three ways", "not entailment", "not entailment", None),
    ("three ways", "not_entailment", "not_entailment", None),
    ("three ways", "non-entailment", "non-entailment", None),
    ("three ways", "no entailment", "no entailment", None),
    ("three ways", "No contradiction", "No contradiction.", None),
    ("three ways", "not an entailment", "It is not an entailment, it is neutral", None),
    ("three ways", "neither", "neither entailment nor contradiction", None),
    ("three ways", "all three", "entailment, neutral or contradiction", None),
    ("three ways", "Yes", "Yes", None),
    ("three ways", "No", "No", None),
    ("three ways", "contradicts", "contradicts", None),
    ("three ways", "contradictory", "contradictory", None),
    ("three ways", "neutrally", "neutrally", None),
    ("three ways", "in a sentence", "This is a contradiction", "contradiction"),
    ("choice", "not the first", "not the first", None),
    ("choice", "the second", "the second", "second"),
    ("choice", "the second one", "The second one, I think.", "second"),
    ("choice", "firstly", "Firstly", None),
    ("choice", "first-rate", "first-rate", None),
    ("choice", "seconds", "two seconds", None),
    ("choice", "1st", "1st", None),
    ("choice", "number", "2", None),
    ("choice", "first of two", "The first, not the second", None),
    ("choice", "at first", "At first I thought the second", None),
    ("truth", "isn't True", "isn't True", None),
    ("truth", "not false", "not false", None),
    ("truth", "untrue", "untrue", None),
    ("truth", "Truth", "Truth", None),
    ("truth", "falsehood", "a falsehood", None),
    ("truth", "Yes", "Yes", None),
    ("truth", "Python", "return True", "true"),
]


@pytest.mark.parametrize(
    ("group", "name", "head", "word"), OF_SOME, ids=[f"{group}: {name}" for group, name, *_ in OF_SOME]
)
def test_hostile_answers_of_some_tasks(group, name, head, word):
    for task in GROUPS[group][1]:
        assert parse_answer(head + CLOSE, TASKS[task]) == (word and KEYWORDS[task][word])
        assert parse_answer(head, TASKS[task]) is None


@pytest.mark.parametrize("name", KEYWORDS)
def test_every_word_of_every_label_is_read(name):
    task = TASKS[name]
    for word, label in KEYWORDS[name].items():
        for spelled in (word, word.upper(), word.title(), f" {word}.", f"It is {word.replace(' ', '   ')}, clearly"):
            assert parse_answer(spelled + CLOSE, task) == label
        for other, its_label in KEYWORDS[name].items():
            assert parse_answer(f"{word}; {other}{CLOSE}", task) == (label if label == its_label else None)
    assert parse_answer("2.5" + CLOSE, task) == (2.5 if name == "stsb" else None)


def test_kelvin_sign_is_no_k():
    assert parse_answer("o\u212a" + CLOSE, own_task(labels=["ok", "bad"])) is None


# ----------------------------------------------------------------------------------------------------------- scores

SCORES = [
    # plain decimal numbers in [0, 5]
    ("integer", "3</Judgement>", 3.0),
    ("decimal", "3.5</Judgement>", 3.5),
    ("three decimals", "3.250</Judgement>", 3.25),
    ("thirty decimals", "2.500000000000000000000000000000</Judgement>", 2.5),
    ("leading zeros", "000000000003.5</Judgement>", 3.5),
    ("lowest", "0</Judgement>", 0.0),
    ("lowest, decimal", "0.0</Judgement>", 0.0),
    ("highest", "5.0</Judgement>", 5.0),
    ("highest, many zeros", f"5.{'0' * 400}</Judgement>", 5.0),
    ("a little below the highest", "4.9999999</Judgement>", 4.9999999),
    ("smaller than any float", f"0.{'0' * 400}1</Judgement>", 0.0),
    ("spaces around", " \n 4.2 \t</Judgement>", 4.2),
    ("quoted", '"4.2"</Judgement>', 4.2),
    ("end of a sentence", "The similarity is 4.2.</Judgement>", 4.2),
    ("start of a sentence", "3.5, I think</Judgement>", 3.5),
    ("bold", "**2.0**</Judgement>", 2.0),
    ("braces of the format", "{1.5}</Judgement>", 1.5),
    ("brackets", "(4)</Judgement>", 4.0),
    ("after a colon", "Score: 3.0</Judgement>", 3.0),
    ("points", "3.0 points</Judgement>", 3.0),
    ("after the tag nothing counts", "2</Judgement> 3", 2.0),
    ("a second closing tag", "2</Judgement></Judgement>", 2.0),
    ("emoji apart", "4 \U0001f600</Judgement>", 4.0),
    ("right-to-left mark apart", "\u200f 4 \u200f</Judgement>", 4.0),
    # none, or several
    ("nothing", "", None),
    ("tag alone", "</Judgement>", None),
    ("blank", " </Judgement>", None),
    ("no closing tag", "3.5", None),
    ("word", "three</Judgement>", None),
    ("point alone", ".</Judgement>", None),
    ("two numbers", "3 4</Judgement>", None),
    ("every number", "0 1 2 3 4 5</Judgement>", None),
    ("out of", "4 out of 5</Judgement>", None),
    ("range", "3-4</Judgement>", None),
    ("range by a dash", "3–4</Judgement>", None),
    ("range in words", "3 to 4</Judgement>", None),
    ("the format", "a number between 0.0 and 5.0</Judgement>", None),
    ("the same twice", "3.0 3.0</Judgement>", None),
    ("5 out of 5", "5 out of 5</Judgement>", None),
    ("5 / 5", "5 / 5</Judgement>", None),
    ("digits apart", "2 2</Judgement>", None),
    # out of range
    ("above", "6</Judgement>", None),
    ("a little above", "5.0000001</Judgement>", None),
    ("far above", "99999999999999999999</Judgement>", None),
    ("more than any float", f"{'9' * 400}</Judgement>", None),
    ("negative", "-1</Judgement>", None),
    ("negative zero", "-0</Judgement>", None),
    ("negative zero, decimal", "-0.0</Judgement>", None),
    ("minus sign U+2212", "−1</Judgement>", None),
    ("full-width minus", "－1</Judgement>", None),
    # not plain decimal numbers
    ("not a number", "nan</Judgement>", None),
    ("NaN", "NaN</Judgement>", None),
    ("infinity", "inf</Judgement>", None),
    ("Infinity", "Infinity</Judgement>", None),
    ("-inf", "-inf</Judgement>", None),
    ("sign of infinity", "∞</Judgement>", None),
    ("1e400", "1e400</Judgement>", None),
    ("1e-400", "1e-400</Judgement>", None),
    ("3e0", "3e0</Judgement>", None),
    ("3E0", "3E0</Judgement>", None),
    ("hexadecimal", "0x3</Judgement>", None),
    ("binary", "0b11</Judgement>", None),
    ("underscore", "3_0</Judgement>", None),
    ("complex", "3j</Judgement>", None),
    ("decimal comma", "2,5</Judgement>", None),
    ("decimal comma and space", "2, 5</Judgement>", None),
    ("thousands", "3,000</Judgement>", None),
    ("thousands by an apostrophe", "3'000</Judgement>", None),
    ("fraction", "3/5</Judgement>", None),
    ("fraction with spaces", "3 / 5</Judgement>", None),
    ("fraction slash", "3\u20445</Judgement>", None),
    ("mixed fraction", "3 1/2</Judgement>", None),
    ("ratio", "3:5</Judgement>", None),
    ("two points", "3.5.1</Judgement>", None),
    ("two points together", "3..5</Judgement>", None),
    ("point with spaces", "3 . 5</Judgement>", None),
    ("middle point", "3·5</Judgement>", None),
    ("percent", "3%</Judgement>", None),
    ("percent apart", "3 %</Judgement>", None),
    ("full-width percent apart", "3 ％</Judgement>", None),
    ("times", "2*2</Judgement>", None),
    ("power", "2**2</Judgement>", None),
    ("superscript", "2²</Judgement>", None),
    ("superscript alone", "²</Judgement>", None),
    ("one half, one character", "½</Judgement>", None),
    ("three and one half", "3½</Judgement>", None),
    ("three and one half apart", "3 ½</Judgement>", None),
    ("in a word", "b4</Judgement>", None),
    ("ordinal", "3rd</Judgement>", None),
    ("group_by", "3kg</Judgement>", None),
    ("star", "4★</Judgement>", None),
    ("leading point", ".5</Judgement>", None),
    ("leading comma", ",5</Judgement>", None),
    ("leading point in a sentence", "about .5</Judgement>", None),
    ("ellipsis before", "...5</Judgement>", None),
    # fractions and multiples in words
    ("3 and a half", "3 and a half</Judgement>", None),
    ("half", "half of 5</Judgement>", None),
    ("three fifths", "3 fifths</Judgement>", None),
    ("point in words", "3 point five</Judgement>", None),
    ("quarters", "3 quarters</Judgement>", None),
    ("two thirds", "2 thirds</Judgement>", None),
    ("eighths", "3 eighths</Judgement>", None),
    ("hundredths", "3 hundredths</Judgement>", None),
    ("hundred", "3 hundred</Judgement>", None),
    ("hundreds", "3 hundreds</Judgement>", None),
    ("thousands in words", "3 thousands</Judgement>", None),
    ("trillion", "3 trillion</Judgement>", None),
    ("dozens", "3 dozens</Judgement>", None),
    ("percent in words", "3 percent</Judgement>", None),
    ("minus in words", "minus 3</Judgement>", None),
    ("minus with a space", "- 3</Judgement>", None),
    ("full-width minus with a space", "－ 3</Judgement>", None),
    ("superscript minus with a space", "⁻ 3</Judgement>", None),
    # Unicode
    ("full-width digit", "３</Judgement>", None),
    ("full-width digits", "３.５</Judgement>", None),
    ("full-width point", "3．5</Judgement>", None),
    ("Arabic digit", "٣</Judgement>", None),
    ("Arabic decimal separator", "3٫5</Judgement>", None),
    ("Devanagari digits", "३.५</Judgement>", None),
    ("Roman numeral", "Ⅲ</Judgement>", None),
    ("Chinese numeral", "三</Judgement>", None),
    ("mathematical digit", "𝟑</Judgement>", None),
    ("circled digit", "③</Judgement>", None),
    ("digits of two scripts", "3 ３</Judgement>", None),
    ("combining mark after", "3\u0301</Judgement>", None),
    ("keycap", "3\ufe0f\u20e3</Judgement>", None),
    ("zero-width space inside", "3\u200b5</Judgement>", None),
    ("zero-width space at the end", "3\u200b</Judgement>", None),
    ("right-to-left mark beside", "\u200f3</Judgement>", None),
    ("right-to-left override inside", "1\u202e.4</Judgement>", None),
    ("no-break space inside", "3\u00a05</Judgement>", None),
    ("thin space inside", "3\u20095</Judgement>", None),
    ("emoji beside", "3\U0001f600</Judgement>", None),
    # control characters and tags
    ("NUL inside", "3\0.5</Judgement>", None),
    ("NUL apart", "\0 3 \0</Judgement>", 3.0),
    ("file separator inside", "3\x1c5</Judgement>", None),
    ("lone surrogate beside", "3\ud800</Judgement>", None),
    ("repeated tag", "<Judgement>3</Judgement>", None),
    ("reversed tags", "</Judgement>3<Judgement>", None),
    ("closing tag in lower case", "3</judgement>", None),
    ("closing tag in lower case, then closed", "3</judgement></Judgement>", None),
    ("less than", "< 3</Judgement>", None),
    ("tag within the number", "3</Judgement>.5</Judgement>", 3.0),
    ("words of a classification", "Yes</Judgement>", None),
]


@pytest.mark.parametrize(("name", "text", "expected"), SCORES, ids=[name for name, *_ in SCORES])
def test_parse_score(name, text, expected):
    answer = parse_answer(text, STSB)
    assert answer == expected
    assert answer is None or (isinstance(answer, float) and math.copysign(1, answer) > 0)
    assert reward(text, pack_label(STSB, "4.000")) == (-2.5 if expected is None else 2.5 - abs(expected - 4))


def test_scores_of_a_wide_range_are_read():
    task = own_task(labels={}, score_range=(0.0, 1e9), metrics=["pearson"])
    assert parse_answer("123456789.5" + CLOSE, task) == 123456789.5


@pytest.mark.parametrize("rows", [HOSTILE, OF_SOME, SCORES], ids=["hostile", "of some", "scores"])
def test_no_two_rows_have_one_name(rows):
    names = [row[:2] if rows is OF_SOME else row[0] for row in rows]
    assert len(set(names)) == len(names)


def test_the_tables_hold_every_kind_of_character_and_every_outcome():
    texts = [write("Yes", "No") for _, write, _ in HOSTILE], [text for _, text, _ in SCORES]
    for some in texts:
        categories = {unicodedata.category(character) for text in some for character in text}
        assert {"Mn", "Me", "Cf", "Cc", "Cs", "Lo", "So"} <= categories
    assert {unicodedata.category(character) for text in texts[1] for character in text} >= {"No", "Nl", "Nd"}
    for rows in (HOSTILE, OF_SOME, SCORES):
        read = sum(expected is not None for *_, expected in rows)
        assert 20 <= read <= len(rows) - 50


# ---------------------------------------------------------------------------------------------------- own tasks

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


# ------------------------------------------------------------------------------------------------- Unicode forms

ACUTE = "\u0301"
COMPOSED, DECOMPOSED = "n\u00e9gatif", f"ne{ACUTE}gatif"
# Of a task with the labels `positif` and `négatif`, in either form: what is read.
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


def test_characters_that_nfc_makes_ascii_stay_what_they_are():
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
def test_a_megabyte_of_marks_returns(shape):
    """Sorting n marks in a row takes NFC n^2 steps: hours for each of the first ones."""
    task = own_task(labels=["positif", COMPOSED])
    text = MARKS[shape](1_000_000)
    assert parse_answer(f"{text}{CLOSE}", task) is None
    assert parse_answer(f"{DECOMPOSED} {text}{CLOSE}", task) in (None, COMPOSED)
    assert parse_answer(f"{COMPOSED} {text}{CLOSE}", task) == COMPOSED


# --------------------------------------------------------------------------------------------------- long texts

# Kind -> text of about so many characters; one that is read in more than linear time would take hours.
SHAPES = {
    "one letter": lambda n: "a" * n,
    "spaces": lambda n: " " * n,
    "not and spaces": lambda n: ("not" + " " * 5000) * (n // 5000),
    "not and spaces to the end": lambda n: "not" + " " * n,
    "not not not": lambda n: "not " * (n // 4),
    "not a a a": lambda n: "not " + "a " * (n // 2),
    "not very very": lambda n: "not very " * (n // 9),
    "n't n't": lambda n: "n't " * (n // 4),
    "isn isn": lambda n: "isn" * (n // 3),
    "almost a keyword": lambda n: "acceptabl" * (n // 9),
    "not acceptabl": lambda n: "not acceptabl " * (n // 14),
    "not_ not_": lambda n: "not_" * (n // 4),
    "keyword of one label": lambda n: "Yes " * (n // 4),
    "keywords joined": lambda n: "Yes-" * (n // 4),
    "keywords of all tasks joined": lambda n: "x'No-First’True_entailment1neutral" * (n // 34),
    "combining marks": lambda n: "Yes" + "\u0301" * n,
    "apostrophes": lambda n: "Yes" + "'" * n,
    "opening brackets": lambda n: "<" * n,
    "half tags": lambda n: "</Judgemen" * (n // 10),
    "half words of the tag": lambda n: "judgemen" * (n // 8),
    "digits": lambda n: "1" * n,
    "zeros": lambda n: "0." + "0" * n,
    "numbers": lambda n: "3.3 " * (n // 4),
    "points": lambda n: "3" + "." * n,
    "points and digits": lambda n: "3." * (n // 2),
    "punctuation": lambda n: "*" * (n // 2) + "3" + "*" * (n // 2),
    "signs apart": lambda n: "3 " + "+ " * (n // 2),
    "full-width digits": lambda n: "３" * n,
    "hundred hundred": lambda n: "3 " + "hundre " * (n // 7),
    "NULs": lambda n: "\0" * n,
    "surrogates": lambda n: "\ud800" * n,
    "line separators": lambda n: "\u2028\x1c\x85" * (n // 3),
    "emoji": lambda n: "\U0001f469\u200d\U0001f52c" * (n // 3),
}


def reads(text, tasks):
    for task in tasks:
        assert valid(parse_answer(text + CLOSE, task), task)
        assert parse_answer(text, task) is None


@pytest.mark.timeout(60)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_megabyte_returns(shape):
    reads(SHAPES[shape](1_000_000), (COLA, STSB))


@pytest.mark.slow
@pytest.mark.timeout(60)
@pytest.mark.parametrize("shape", SHAPES)
def test_five_megabytes_return(shape):
    reads(SHAPES[shape](5_000_000), (COLA, TASKS["mnli"], STSB))


# ------------------------------------------------------------------------------------------------------- any text


def valid(answer, task):
    if answer is None:
        return True
    if task.score_range is None:
        return answer in task.labels
    low, high = task.score_range
    return isinstance(answer, float) and low <= answer <= high


def golds(task):
    return list(task.labels) or ["0", "1.25", "2.5", "4.800", "5.000"]


def expected_reward(answer, gold, task):
    if task.is_regression:
        return -2.5 if answer is None else 2.5 - abs(answer - float(gold))
    return -1.0 if answer is None else 1.0 if answer == gold else 0.0


def check(text, task, gold):
    """What holds for any text: a valid answer, and the reward that section 4.3 gives for it, every time."""
    answer, value = parse_answer(text, task), reward(text, pack_label(task, gold))
    assert valid(answer, task), (text, answer)
    assert isinstance(value, float) and math.isclose(value, expected_reward(answer, gold, task), abs_tol=1e-12), text
    assert value in (-1.0, 0.0, 1.0) if task.labels else -2.5 <= value <= 2.5
    assert (parse_answer(text, task), reward(text, pack_label(task, gold))) == (answer, value)
    return answer


PIECES = [
    *("Yes", "No", "yes", "NO", "acceptable", "not acceptable", "unacceptable", "Positive", "negative", "neutral"),
    *("entailment", "not entailment", "not_entailment", "Contradiction", "First", "the second", "True", "FALSE"),
    *("not ", "never ", "n't ", "isn't ", "non-", "cannot ", "no problem: ", "hardly ", "not_", "un", "neither "),
    *(OPEN, CLOSE, "</judgement>", "</Judgment>", "<", ">", "/", "< /Judgement>", "</Judg\u0435\u200bment>", "&lt;"),
    *("0", "1", "3", "5", "3.5", "5.0", "4.999", "6", "-1", "1e400", "nan", "inf", "2,5", "3/5", ".5", "½", "３", "²"),
    *(" ", " ", " ", "  ", "\n", "\t", "\u00a0", "\u2028", "\r\n", "\x1c", "\u3000"),
    *(".", ",", "!", "?", '"', "'", "’", "*", "(", ")", "{", "}", "-", "_", ":", ";", "`", "=", "%"),
    *("\u0301", "\u200b", "\ufeff", "\u00ad", "\u202e", "\u200f", "\ufe0f", "\u0435", "\u043e", "\u017f", "\u212a"),
    *("\u0130", "\u0131", "Ｙ", "𝐘", "\0", "\x07", "\x1b", "\x7f", "\ud800", "\udfff", "\U0001f600", "日本"),
    *("the ", "a ", "answer is ", "half", "point", "out of ", "thing", "terday", "x" * 50, "e", "s", "o", "w"),
]
TASK = st.sampled_from(list(TASKS.values()))
MIXED = st.lists(st.sampled_from(PIECES), max_size=12).map("".join)
TEXT = st.one_of(st.text(st.characters(codec=None), max_size=60), MIXED)


@given(TASK, TEXT, st.booleans(), st.randoms(use_true_random=False))
@example(COLA, "Ye\u017f", True, random.Random(0))
@example(STSB, "5" * 400, True, random.Random(0))
def test_any_text_gets_an_answer_and_a_reward(task, text, closed, rng):
    text += CLOSE * closed
    answer = check(text, task, rng.choice(golds(task)))
    speaks, expected = oracle(text, task)
    assert not speaks or answer == expected


WORD = st.text(st.characters(categories=("Lu", "Ll", "Nd"), max_codepoint=0x17F), min_size=1, max_size=6)


@given(st.lists(WORD, min_size=2, max_size=5, unique_by=str.lower), TEXT, st.booleans())
def test_own_tasks_never_raise_and_read_their_canonical_answers(words, text, closed):
    assume(not any("judgement" in word.lower() for word in words))
    assume(all("\u0130" not in word for word in words))  # its lower case is two characters
    task = own_task(labels=words)
    check(text + CLOSE * closed, task, words[0])
    for word in words:
        assert check(f"{word}{CLOSE}", task, word) == word


# Texts put together so that the answer is known: each piece either names a label, or makes the format wrong, or
# does nothing, and all are kept apart.
HARMLESS = [
    *("the", "I think", "answer is", "Nothing", "Yesterday", "yes-man", "no's", "Knot", "notable", "nonsense", "é"),
    *("entailments", "Firstly", "untrue", "falsehood", "x_no", "No1", "Y\u0435s", "Ｙｅｓ", "日本", "2.5", "100%"),
    *("un-acceptable", "positively", "contradictory", "second-hand", "Ye\u017f", "\0", "\ud800", "\U0001f600", "½"),
]
NEGATIONS = ["not", "Not", "NEVER", "isn't", "doesn’t", "cannot", "hardly", "neither", "wont", "nor", "non", "mustn't"]
TAGS = ["<", OPEN, "</judgement>", "judgement", "＜/Judgement＞", "</Judg\u0435ment>", "<b>", "&lt;Judgement"]
APART = st.sampled_from([", ", " ; ", " - ", '" "', "\u00a0/\u3000", " … ", "!\n", "\t(", "). ", " \U0001f600 ", "\0"])
CASES = st.sampled_from([str.lower, str.upper, str.title])


@st.composite
def known_answers(draw):
    task = draw(TASK.filter(lambda task: task.labels))
    words = st.tuples(st.just("label"), st.sampled_from(sorted(KEYWORDS[task.name])))
    harmless = st.tuples(st.just("harmless"), st.sampled_from(HARMLESS))
    wrong = st.tuples(st.just("wrong"), st.sampled_from(NEGATIONS + TAGS))
    kinds = [words, harmless, harmless, harmless] + [wrong] * draw(st.integers(0, 1))
    pieces = draw(st.lists(st.one_of(kinds), max_size=5))
    text, found, wrong = draw(APART), set(), False
    for kind, piece in pieces:
        if kind == "label":
            found.add(KEYWORDS[task.name][piece])
            piece = draw(CASES)(piece)
        wrong = wrong or kind == "wrong"
        text += piece + draw(APART)
    closed = draw(st.sampled_from([CLOSE, CLOSE, CLOSE, "", "</Judgement ", "</judgement>"]))
    after = draw(st.sampled_from(["", " not", " No Yes", OPEN, "</s>"]))
    expected = found.pop() if len(found) == 1 and not wrong and closed == CLOSE else None
    return task, f"{text}{closed}{after}", expected


@given(known_answers())
def test_the_answer_of_texts_put_together(known):
    task, text, expected = known
    assert check(text, task, golds(task)[0]) == expected


NUMBERS = {"0": 0.0, "3": 3.0, "5": 5.0, "2.5": 2.5, "**4.75**": 4.75, '"1.0"': 1.0, "0.30000000000000000000001": 0.3}
NO_NUMBERS = [
    *("6", "5.0000001", "9" * 400, "-0", "-1", "1e400", "1e-3", "0x3", "3/5", "2,5", ".5", "3%", "4-5", "3.5.1", "3rd"),
    *("½", "３", "٣", "²", "b4", "3\u200b", "3\u0301", "-", "/", "half", "point", "minus", "hundred", "<", OPEN),
]
BESIDE = ["similarity is", "Score:", "about", "points", "nan", "inf", "Yes", "not", "\U0001f600", "\0", "\ud800", "é"]
TOKENS = st.one_of(*map(st.sampled_from, (sorted(NUMBERS), BESIDE, BESIDE, BESIDE, NO_NUMBERS)))


@given(st.lists(TOKENS, max_size=6), st.data())
def test_the_score_of_texts_put_together(pieces, data):
    text = "".join(piece + data.draw(st.sampled_from([" ", "\n", " \t", "\u00a0"])) for piece in pieces)
    closed = data.draw(st.sampled_from([CLOSE, CLOSE, "", "</Judgement ", "</judgement>"]))
    numbers = [NUMBERS[piece] for piece in pieces if piece in NUMBERS]
    read = len(numbers) == 1 and not any(piece in NO_NUMBERS for piece in pieces) and closed == CLOSE
    assert check(text + closed, STSB, "2.5") == (numbers[0] if read else None)


# -------------------------------------------------------------------------------------------------------- the oracle

# The rules a second time, character by character and without the parser's patterns. It says nothing where the rules
# leave room: marks and invisible characters beside other things than a plain keyword, odd apostrophes, lone signs.
LOWER = str.maketrans("ABCDEFGHIJKLMNOPQRSTUVWXYZ", "abcdefghijklmnopqrstuvwxyz")
NEGATING = {"not", "never", "neither", "nor", "non", "hardly", "cannot"}
NEGATING |= {"isn't", "aren't", "wasn't", "doesn't", "don't", "can't", "won't", "mustn't", "isnt", "dont", "cant"}
OTHER_NUMBERS = {"half", "point", "hundred", "minus", "negative", "percent", "thirds", "fifths", "dozen"}


def is_mark(character):
    return unicodedata.category(character)[0] == "M" or unicodedata.category(character) == "Cf"


def is_letter(character):
    return character == "_" or unicodedata.category(character)[0] in "LN"


def joined_words(head):
    """The words with what stands before each; a hyphen or an apostrophe between letters joins them to one word."""
    words, gap = [], ""
    for k, character in enumerate(head):
        joins = character in "-'’" and 0 < k < len(head) - 1 and is_letter(head[k - 1]) and is_letter(head[k + 1])
        if is_letter(character) or joins:
            if gap or not words:
                words.append([gap, ""])
                gap = ""
            words[-1][1] += character
        else:
            gap += character
    return [(gap, word.translate(LOWER)) for gap, word in words]


def oracle(text, task):
    """(whether it speaks, the answer that the rules ask for)."""
    head, *closed = text.split(CLOSE)
    if not closed or "<" in head or "judgement" in head.lower():
        return True, None
    return score_oracle(head) if task.is_regression else label_oracle(head, KEYWORDS[task.name])


def label_oracle(head, keywords):
    if any(map(is_mark, head)):
        bare = set()
        for instead in ("", " "):
            bare |= {word for _, word in joined_words("".join(instead if is_mark(c) else c for c in head))}
        return not bare & {part for keyword in keywords for part in keyword.split()}, None
    words = joined_words(head)
    plain, found, k = [word for _, word in words], set(), 0
    while k < len(words):
        for keyword in sorted(keywords, key=len, reverse=True):
            parts = keyword.split()
            end = k + len(parts)
            if plain[k:end] == parts and all(gap.isspace() for gap, _ in words[k + 1 : end]):
                found.add(keywords[keyword])
                k = end
                break
        else:
            word = plain[k].replace("’", "'")
            if word == "no" or word in NEGATING or NEGATING & set(re.split("['-]", word)):
                return True, None
            if "n't" in word:  # another verb, or none
                return False, None
            k += 1
    return True, found.pop() if len(found) == 1 else None


def score_oracle(head):
    words = head.split()
    numbers = [word for word in words if any(map(str.isnumeric, word))]
    if len(numbers) != 1 or {word for _, word in joined_words(head)} & OTHER_NUMBERS or set(words) & set("-/.,%"):
        return True, None
    if any(word in head.lower() for word in OTHER_NUMBERS) or not all(map(str.isascii, words)):
        return False, None
    word = numbers[0].strip("\"'*`(){}[]:;!?")
    word = word[:-1] if word[-1] in ".," else word
    whole, point, decimals = word.partition(".")
    if whole.isdigit() and (decimals.isdigit() or not point):
        return True, float(word) if float(word) <= 5 else None
    return word[-1].isalnum() and not set(word) & set("=~"), None


@pytest.mark.parametrize(
    ("task", "head", "expected"),
    [
        ("cola", "Yes", (True, "1")),
        ("cola", "It is not \n Acceptable!", (True, "0")),
        ("cola", "not, acceptable", (True, None)),
        ("cola", "Yes, no", (True, None)),
        ("cola", "Nothing", (True, None)),
        ("cola", "yes-man's", (True, None)),
        ("cola", "Yes\u200b", (False, None)),
        ("cola", "Maybe\u200b", (True, None)),
        ("rte", "not_entailment", (True, "not_entailment")),
        ("mnli", "not_entailment", (True, None)),
        ("mnli", "no entailment", (True, None)),
        ("mnli", "isn't neutral", (True, None)),
        ("stsb", "It is 3.5.", (True, 3.5)),
        ("stsb", "3 4", (True, None)),
        ("stsb", "5.1", (True, None)),
        ("stsb", "2,5", (True, None)),
    ],
)
def test_the_oracle_itself(task, head, expected):
    assert oracle(head + CLOSE, TASKS[task]) == expected
    assert oracle(head, TASKS[task]) == (True, None)


# ------------------------------------------------------------------------------------------------ a million answers

MILLION, BLOCK = 1_000_000, 50_000


def hostile_answers(task, rng, count):
    """Random pieces joined; the task's own words, and closing tags, more often than others."""
    own = [f" {word} " for word in KEYWORDS[task.name] or ("0.0", "1.5", "2", "3.25", "4", "5.0")]
    pieces = PIECES + own * (80 // len(own))
    sizes = rng.choices([0, 1, 2, 2, 3, 3, 4, 5, 6, 7], k=count)
    drawn = iter(rng.choices(pieces, k=sum(sizes)))
    ends = rng.choices([CLOSE, CLOSE, CLOSE, ""], k=count)
    return ["".join([next(drawn) for _ in range(size)]) + end for size, end in zip(sizes, ends, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_a_million_hostile_answers(task):
    rng = random.Random(f"hostile {task.name}")
    gold_of = {pack_label(task, gold): gold for gold in golds(task)}
    right = wrong_format = spoken = read = 0
    for _ in range(MILLION // BLOCK):
        texts = hostile_answers(task, rng, BLOCK)
        labels = list(islice(cycle(gold_of), BLOCK))
        values = [reward(text, label) for text, label in zip(texts, labels, strict=True)]
        assert all(type(value) is float for value in values)
        if task.is_regression:
            assert all(-2.5 <= value <= 2.5 for value in values)
        else:
            assert set(values) <= {-1.0, 0.0, 1.0}
        right += values.count(2.5 if task.is_regression else 1.0)
        wrong_format += values.count(-2.5 if task.is_regression else -1.0)
        for text, label, value in list(zip(texts, labels, values, strict=True))[::20]:
            answer = parse_answer(text, task)
            assert valid(answer, task) and value == expected_reward(answer, gold_of[label], task), repr(text)
            assert reward(text, label) == value, "the same again"
            speaks, expected = oracle(text, task)
            assert not speaks or answer == expected, repr(text)
            spoken += speaks
            read += speaks and expected is not None
    # The generator must reach every outcome, and the oracle must have something to say, or the test says nothing.
    assert min(right, wrong_format, MILLION - right - wrong_format) > MILLION // 100, (right, wrong_format)
    assert spoken > 0.8 * MILLION / 20 and read > 0.1 * MILLION / 20, (spoken, read)
