"""Labels in hostile answers, for every built-in task.

Expectations come from section 4.3 of the paper and the parser's docstring, never from running it.
"""

import unicodedata
from itertools import permutations

import pytest
from answer_words import GROUPS, KEYWORDS, own_task, wide

from extensions.prompts import CLOSE, parse_answer
from extensions.tasks import TASKS, fold


def test_every_task_has_its_keywords_here():
    assert KEYWORDS.keys() == TASKS.keys()
    assert sorted(name for _, names in GROUPS.values() for name in names) == sorted(KEYWORDS.keys() - {"stsb"})
    for name, task in TASKS.items():
        assert {fold(word): label for label, words in task.labels.items() for word in words} == KEYWORDS[name]
        assert task.is_regression == (name == "stsb")
    for words, names in GROUPS.values():
        for name in names:
            assert sorted(KEYWORDS[name][word.lower()] for word in words) == sorted(TASKS[name].labels)


CYRILLIC = str.maketrans("aceiopAO", "\u0430\u0441\u0435\u0456\u043e\u0440\u0410\u041e")


def bold(word):
    return "".join(chr(ord(letter) + (0x1D3BF if letter.isupper() else 0x1D3B9)) for letter in word)


def inside(word, character):
    return f"{word[0]}{character}{word[1:]}"


def mixed(word):
    return "".join(letter.swapcase() if k % 2 else letter.lower() for k, letter in enumerate(word))


A, B = "the first word's label", "the second word's label"
# Answers made of a word of each of two labels, as spelled in the prompt, in either order.
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


# Answers that only the words of some tasks form: (group, name, text before the closing tag, word that is read).
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


def test_the_kelvin_sign_is_not_a_k():
    assert parse_answer("o\u212a" + CLOSE, own_task(labels=["ok", "bad"])) is None


@pytest.mark.parametrize("rows", [HOSTILE, OF_SOME], ids=["hostile", "of some"])
def test_names_of_rows_are_unique(rows):
    names = [row[:2] if rows is OF_SOME else row[0] for row in rows]
    assert len(set(names)) == len(names)


def test_the_tables_cover_every_kind_of_character_and_every_outcome():
    texts = [write("Yes", "No") for _, write, _ in HOSTILE]
    categories = {unicodedata.category(character) for text in texts for character in text}
    assert {"Mn", "Me", "Cf", "Cc", "Cs", "Lo", "So"} <= categories
    for rows in (HOSTILE, OF_SOME):
        read = sum(expected is not None for *_, expected in rows)
        assert 20 <= read <= len(rows) - 50
