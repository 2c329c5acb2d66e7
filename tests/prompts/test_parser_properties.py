"""The parser and the reward on any text: long, random, and compared with an independent parser.

Expectations come from section 4.3 of the paper and the parser's docstring, never from running it.
"""

import math
import random
import re
import unicodedata
from itertools import cycle, islice

import pytest
from answer_words import COLA, KEYWORDS, STSB, own_task
from hypothesis import assume, example, given
from hypothesis import strategies as st

from extensions.prompts import CLOSE, OPEN, pack_label, parse_answer
from extensions.tasks import TASKS
from reward_fns.nlu import reward

# Kind -> text of about so many characters; a parser of more than linear time would take hours.
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
def test_a_megabyte_is_parsed(shape):
    reads(SHAPES[shape](1_000_000), (COLA, STSB))


@pytest.mark.slow
@pytest.mark.timeout(60)
@pytest.mark.parametrize("shape", SHAPES)
def test_five_megabytes_are_parsed(shape):
    reads(SHAPES[shape](5_000_000), (COLA, TASKS["mnli"], STSB))


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
    """Invariants of any text: a valid answer, and the reward that section 4.3 gives for it, in every call."""
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


# Texts composed so that the answer is known: each piece either names a label, or makes the format wrong, or
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
def test_answers_of_composed_texts(known):
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
def test_scores_of_composed_texts(pieces, data):
    text = "".join(piece + data.draw(st.sampled_from([" ", "\n", " \t", "\u00a0"])) for piece in pieces)
    closed = data.draw(st.sampled_from([CLOSE, CLOSE, "", "</Judgement ", "</judgement>"]))
    numbers = [NUMBERS[piece] for piece in pieces if piece in NUMBERS]
    read = len(numbers) == 1 and not any(piece in NO_NUMBERS for piece in pieces) and closed == CLOSE
    assert check(text + closed, STSB, "2.5") == (numbers[0] if read else None)


# The rules a second time, character by character and without the parser's patterns. It does not decide where the rules
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
    """(whether the rules decide the text, the answer that they require)."""
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
def test_the_oracle(task, head, expected):
    assert oracle(head + CLOSE, TASKS[task]) == expected
    assert oracle(head, TASKS[task]) == (True, None)


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
    right = wrong_format = decided = read = 0
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
            assert reward(text, label) == value, "a second call gives the same reward"
            decides, expected = oracle(text, task)
            assert not decides or answer == expected, repr(text)
            decided += decides
            read += decides and expected is not None
    # The test is empty unless the generator reaches every outcome and the oracle decides most texts.
    assert min(right, wrong_format, MILLION - right - wrong_format) > MILLION // 100, (right, wrong_format)
    assert decided > 0.8 * MILLION / 20 and read > 0.1 * MILLION / 20, (decided, read)
