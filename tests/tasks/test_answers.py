"""Answers of own tasks: exact labels, scores below zero, several labels per row."""

import json
import math
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from own_answers import SIGNED, TOPICS, own

from extensions.common.errors import UserError
from extensions.data import load_examples
from extensions.prompts import CLOSE, answer_format, is_label, pack_label, parse_answer, unpack_label
from extensions.tasks import TASKS, Task
from reward_fns.nlu import reward, reward_func


def read(answer, task):
    return parse_answer(f"{answer}{CLOSE}", task)


FRENCH = own(labels=["positif", "négatif"])
GERMAN = own(labels=["positiv", "nicht positiv"])
CHINESE = own(labels={"1": ["正面"], "0": ["负面"]})
STARS = own(labels=["1", "2", "3", "4", "5"])
ARABIC = own(labels={"+": ["إيجابي"], "-": ["سلبي"]})
HEBREW = own(labels={"+": ["חיובי"], "-": ["שָׁלוֹם"]})
KEYS = own(labels={"007": ["Bond"], "true": ["Yes"], "4": ["four"], "<none>": ["Nothing"], "a, b": ["Both"]})
ODD = own(labels={"us": ["U.S."], "quote": ["rock 'n'"], "stop": ["."], "kelvin": ["\u212a"], "k": ["kk"]})
RLM, LRM, RLE, PDF, RLI, PDI, ALM = "\u200f", "\u200e", "\u202b", "\u202c", "\u2067", "\u2069", "\u061c"

ANSWERS = [
    (FRENCH, "positif", "positif"),
    (FRENCH, " Positif.\n", "positif"),
    (FRENCH, '"positif".', "positif"),
    (FRENCH, '"positif."', "positif"),
    (FRENCH, "« positif »", "positif"),
    (FRENCH, "„négatif“", "négatif"),
    (FRENCH, unicodedata.normalize("NFD", "NÉGATIF"), "négatif"),
    (FRENCH, "`positif`", "positif"),
    (FRENCH, "pas positif", None),
    (FRENCH, "positif, je crois", None),
    (FRENCH, "positif négatif", None),
    (FRENCH, "positif..", None),
    (FRENCH, "positif!", None),
    (FRENCH, "positifs", None),
    (FRENCH, "negatif", None),
    (FRENCH, "", None),
    (FRENCH, '"."', None),
    (GERMAN, "nicht  positiv", "nicht positiv"),
    (GERMAN, "positiv", "positiv"),
    (GERMAN, "gar nicht positiv", None),
    (CHINESE, "正面", "1"),
    (CHINESE, "「正面」", "1"),
    (CHINESE, "“正面”。", "1"),
    (CHINESE, "正面。", "1"),
    (CHINESE, "正面｡", "1"),
    (CHINESE, "不 正面", None),
    (CHINESE, "不正面", None),
    (CHINESE, "是正面", None),
    (CHINESE, "1", None),  # a key is no word
    (STARS, "4", "4"),
    (STARS, "4.", "4"),
    (STARS, "4.7", None),
    (STARS, "4.0", None),
    (STARS, "-1", None),
    (STARS, "−1", None),
    (STARS, "4/5", None),
    (STARS, "４", None),
    (STARS, "not 4", None),
    (ARABIC, "إيجابي", "+"),
    (ARABIC, f"{RLM}إيجابي{RLM}", "+"),
    (ARABIC, f"{RLE}إيجابي{PDF}۔", "+"),
    (ARABIC, f"{RLI}«سلبي»{PDI}.", "-"),
    (ARABIC, f'{ALM}"سلبي".{LRM}', "-"),
    (ARABIC, "ليس إيجابي", None),
    (ARABIC, "غير إيجابي", None),
    (HEBREW, f"{RLM}חיובי.{RLM}", "+"),
    (HEBREW, "״חיובי״"[1:-1], "+"),
    (HEBREW, unicodedata.normalize("NFD", "שָׁלוֹם"), "-"),
    (HEBREW, "לא חיובי", None),
    (KEYS, "bond", "007"),
    (KEYS, "yes", "true"),
    (KEYS, "FOUR", "4"),
    (KEYS, "nothing", "<none>"),
    (KEYS, "Both", "a, b"),
    (KEYS, "007", None),
    (KEYS, "true", None),
    (ODD, "U.S.", "us"),
    (ODD, "u.s", "us"),
    (ODD, "U.S..", None),
    (ODD, "rock 'n'", "quote"),
    (ODD, "\"Rock 'n'\".", "quote"),
    (ODD, ".", "stop"),
    (ODD, "\u212a", "kelvin"),
    (ODD, "K", None),  # what is written in ASCII alone is read as such
    (ODD, "k\u212a", None),
]


@pytest.mark.parametrize("task, answer, expected", ANSWERS, ids=lambda x: "" if isinstance(x, Task) else repr(x))
def test_an_answer_is_a_word_of_a_label(task, answer, expected):
    assert read(answer, task) == expected
    assert read(answer + "<", task) is None and parse_answer(answer, task) is None
    for gold in task.labels:
        packed = pack_label(task, gold)
        assert reward(f"{answer}{CLOSE}", packed) == (-1.0 if expected is None else float(expected == gold))


def test_the_keyword_rule_can_be_chosen_and_is_packed_with_the_label():
    task = own(labels=["positif", "négatif"], answer_match="keyword")
    assert read("C'est positif, je crois.", task) == "positif"
    assert reward(f"C'est positif.{CLOSE}", pack_label(task, "positif")) == 1.0
    assert reward(f"C'est positif.{CLOSE}", pack_label(FRENCH, "positif")) == -1.0


def test_a_built_in_task_can_be_exact():
    task = TASKS["sst2"].model_copy(update={"answer_match": "exact"})
    assert read("It is Positive.", task) is None and read("Positive.", task) == "1"
    assert read("It is Positive.", TASKS["sst2"]) == "1"


@pytest.mark.parametrize("labels", [["a", "A."], ["a", '"a"'], {"x": ["yes"], "y": [" yes\u200f"]}])
def test_ambiguous_words_are_refused(labels):
    with pytest.raises(ValueError, match="must be distinct"):
        own(labels=labels)


@pytest.mark.parametrize(
    "labels", [[True, "b"], {1: ["a"], "b": ["b"]}, {"a": [True], "b": ["b"]}, {" ": ["a"], "b": "b"}]
)
def test_labels_that_are_not_text_are_refused(labels):
    with pytest.raises(ValueError, match="must be text"):
        own(labels=labels)


WORDS = st.lists(st.text(min_size=1, max_size=8), min_size=2, max_size=5)


@given(WORDS, st.text(max_size=20))
def test_any_words_are_read_from_their_answers(words, text):
    try:
        task = own(labels=words)
    except ValueError:
        return
    for word in words:
        assert read(word, task) == word == read(f' "{word}" ', task)
        assert unpack_label(pack_label(task, word))[1] == word
    assert read(text, task) in (*words, None)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("piece", ["a", " ", '"', ".", ",", "e\u0301\u0316", RLM, "positif, ", "1", "-"])
def test_an_answer_of_a_megabyte_is_parsed(piece):
    several = own(labels=["positif", "négatif"], multi_label=True)
    for task in (FRENCH, several, own(score_range=[-1, 1])):
        assert read(piece * (1_000_000 // len(piece)), task) is None


SCORES = [
    ("-0.5", -0.5),
    ("−0.5", -0.5),  # U+2212
    ("+0.5", 0.5),
    ("0.5", 0.5),
    ("The score is -1.", -1.0),
    ("(-0.25)", -0.25),
    ("-0", 0.0),
    ("-1.01", None),
    ("1.5", None),
    ("- 0.5", None),
    ("minus 0.5", None),
    ("--1", None),
    ("+-1", None),
    ("-.5", None),
    ("0-1", None),
    ("1e-1", None),
    ("-1 or 1", None),
    ("–0.5", None),  # a dash
    ("", None),
]


@pytest.mark.parametrize("answer, expected", SCORES)
def test_scores_below_zero(answer, expected):
    found = read(answer, SIGNED)
    assert found == expected and (found is None or math.copysign(1, found) == (-1 if expected < 0 else 1))
    value = reward(f"{answer}{CLOSE}", pack_label(SIGNED, "-0.5"))
    assert value == pytest.approx(-1.0 if expected is None else 1 - abs(expected + 0.5))


@pytest.mark.parametrize("answer", ["-0.5", "+0.5", "-0", "−1"])
def test_a_range_without_negative_numbers_reads_no_sign(answer):
    assert read(answer, own(score_range=[0, 1])) is None and read(answer, TASKS["stsb"]) is None


GOLDS = [
    ("-0.5", "-0.5"),
    ("1e-05", "0.00001"),
    ("0.333333", "0.333333"),
    ("-0.0", "0.0"),
    ("+1", "1.0"),
    (".5", "0.5"),
]
GOLDS += [("-1E0", "-1.0"), ("1.", "1.0"), ("-1e-7", "-0.0000001"), ("1e-999999", "0.0")]


@pytest.mark.parametrize("gold, written", GOLDS)
def test_gold_scores_of_own_tasks(gold, written):
    assert is_label(gold, SIGNED) and SIGNED.answer(gold) == written
    assert read(written, SIGNED) == pytest.approx(float(gold))
    assert reward(f"{written}{CLOSE}", pack_label(SIGNED, gold)) == pytest.approx(1.0)
    assert not is_label("1e-05", TASKS["stsb"]) and not is_label(".5", TASKS["stsb"])


@pytest.mark.parametrize(
    "gold", ["nan", "inf", "-inf", "1.1", "-2", "", "1e", "0x1", "1_0", "１", "- 1", "1e9999999999"]
)
def test_invalid_gold_scores(gold):
    assert not is_label(gold, SIGNED)


@pytest.mark.parametrize(
    "decimals, gold, written",
    [
        (1, "0.333333", "0.3"),
        (2, "-0.004", "0.00"),
        (0, "-0.4", "0"),
        (0, "-0.6", "-1"),
        (2, "1e-05", "0.00"),
        (1, "1", "1.0"),
    ],
)
def test_rounded_scores(decimals, gold, written):
    assert own(score_range=[-1, 1], score_decimals=decimals).answer(gold) == written


REFUSED = [
    ({"score_range": [1, -1]}, "low < high"),
    ({"score_range": [-math.inf, 0]}, "low < high"),
    ({"score_range": [-1e308, 1e308]}, "low < high"),
    ({"score_range": [0, math.nan]}, "low < high"),
    ({"score_range": [-0.05, 1], "score_decimals": 1}, "score_decimals"),
    ({"labels": ["a", "b"], "score_decimals": 1}, "score_decimals"),
    ({"score_range": [0, 1], "answer_match": "exact"}, "answer_match"),
    ({"score_range": [0, 1], "metrics": ["accuracy"]}, "does not fit a regression"),
    ({"score_range": [0, 1], "metrics": ["mae"]}, "give it in extra_metrics"),
    ({"score_range": [0, 1], "metrics": ["r2", "rmse"]}, "give it in extra_metrics"),
    ({"score_range": [0, 1], "multi_label": True}, "multi_label"),
    ({"labels": ["a", "b"], "metrics": ["r2"]}, "does not fit a classification"),
    ({"labels": ["a", "b"], "metrics": ["f1_micro"]}, "it needs multi_label: true"),
    ({"labels": ["a", "b"], "multi_label": True, "metrics": ["accuracy"]}, "does not fit a multi-label"),
    ({"labels": ["a", "b"], "multi_label": True, "positive": "a"}, "positive"),
    ({"labels": ["a", "b"], "multi_label": True, "answer_match": "keyword"}, "answer_match"),
    ({"labels": ["a, b", "c"], "multi_label": True}, "'a, b' holds ','"),
    ({"labels": {"a": ["x,y"], "b": ["b"]}, "multi_label": True}, "'x,y' holds ','"),
    ({"labels": ["a;b", "c"], "multi_label": True, "source": {"label_separator": ";"}}, "label_separator"),
    ({"labels": ["a", "None"], "multi_label": True}, "no_label"),
    ({"labels": ["a", "b"], "multi_label": True, "no_label": "x, y"}, "no_label"),
    ({"labels": ["a", "b"], "multi_label": True, "no_label": "<none>"}, "<none>"),
]


@pytest.mark.parametrize("keys, message", REFUSED, ids=[str(keys) for keys, _ in REFUSED])
def test_keys_that_do_not_fit_the_kind_of_task_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        own(**keys)


SETS = [
    ("Sports", "s"),
    ("money, SPORTS.", "s, m"),
    ("Money,Politics,Sports", "s, p, m"),
    ('"Sports", "Money".', "s, m"),
    ('"Sports, Money"', "s, m"),
    ("none", "none"),
    (' "None". ', "none"),
    ("", None),
    (",", None),
    ("Sports,", None),
    ("Sports, Sports", None),
    ("Politics, policy", None),  # the same label twice
    ("Sports and Money", None),
    ("Sports; Money", None),
    ("none, Sports", None),
    ("Sports, none", None),
    ("Sports, Weather", None),
    ("not Sports", None),
    ("s, m", None),  # keys are no words
    ("Sports, Politics, Money, Sports", None),
]


@pytest.mark.parametrize("answer, expected", SETS)
def test_lists_of_labels(answer, expected):
    assert read(answer, TOPICS) == expected


@pytest.mark.parametrize("gold, written", [("s", "Sports"), ("p, m", "Politics, Money"), ("none", "none")])
def test_label_sets_are_written_by_their_words(gold, written):
    assert TOPICS.answer(gold) == written and read(written, TOPICS) == gold
    assert unpack_label(pack_label(TOPICS, gold))[1] == gold


def test_the_prompt_lists_the_answers():
    text = answer_format(TOPICS)
    assert all(f'"{word}"' in text for word in ("Sports", "Politics", "Money", "none")) and "comma" in text
    assert answer_format(SIGNED) == "Insert only a number between -1 and 1 here"
    assert answer_format(own(score_range=[-1e6, 12345678])) == "Insert only a number between -1000000 and 12345678 here"


@pytest.mark.parametrize("label", ["m, s", "s,m", "s, s", "", "x", "s, x", "Sports", "none, s", " s", ", "])
def test_invalid_label_sets(label):
    assert not is_label(label, TOPICS)
    with pytest.raises(ValueError, match="pack_label"):
        unpack_label(json.dumps({"task": "x", "gold": label, "labels": TOPICS.labels, "multi_label": True}))


CELLS = [
    ("m,s", "s, m"),
    (" s ", "s"),
    (["p", "s"], "s, p"),
    (("m",), "m"),
    (np.array(["m", "p"]), "p, m"),
    ("s,s", "s"),
    ("s,", "s"),
]
CELLS += [(None, "none"), ("", "none"), ("  ", "none"), ([], "none"), (float("nan"), "none"), ("none", "none")]


@pytest.mark.parametrize("cell, expected", CELLS, ids=lambda x: repr(x))
def test_cells_of_label_sets(cell, expected):
    assert TOPICS.parse_label_set(cell) == expected and is_label(expected, TOPICS)


@pytest.mark.parametrize(
    "cell, unknown", [("s;m", "'s;m'"), ("s,x,y", "'x', 'y'"), (["s", None], "'None'"), (3, "'3'")]
)
def test_unknown_labels_of_a_cell_are_named(cell, unknown):
    with pytest.raises(ValueError) as caught:
        TOPICS.parse_label_set(cell)
    assert str(caught.value) == f"{unknown} not among the labels 's', 'p', 'm'"


def test_cells_with_another_separator_and_other_types():
    task = own(labels=["true", "1", "é"], multi_label=True, source={"label_separator": "|"})
    assert task.parse_label_set("1|true") == "true, 1" and task.parse_label_set([True, 1]) == "true, 1"
    assert task.parse_label_set("e\u0301") == "é"


def test_rows_of_a_file(tmp_path):
    source = {"files": {"train": "train.jsonl"}, "format": "jsonl"}
    task = own(labels=TOPICS.labels, multi_label=True, source=source)
    rows = [{"text": "a", "label": ["m", "s"]}, {"text": "b", "label": None}, {"text": "c", "label": "p"}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [example.label for example in load_examples(task, "train", str(tmp_path))] == ["s, m", "none", "p"]
    (tmp_path / "train.jsonl").write_text(json.dumps({"text": "a", "label": "s,weather"}) + "\n")
    with pytest.raises(UserError, match="weather"):
        load_examples(task, "train", str(tmp_path))


REWARDS = [("s, m", "s, m", 1.0), ("s, m", "s", 0.5), ("s", "s, p, m", 1 / 3), ("s", "m", 0.0), ("none", "none", 1.0)]
REWARDS += [("none", "s", 0.0), ("s", "none", 0.0), ("s, p", "p, m", 1 / 3)]


@pytest.mark.parametrize("gold, answer, expected", REWARDS)
def test_rewards_by_overlap(gold, answer, expected):
    packed = pack_label(TOPICS, gold)
    assert reward(f"{TOPICS.answer(answer)}{CLOSE}", packed) == pytest.approx(expected)
    assert reward(f"Weather{CLOSE}", packed) == reward(TOPICS.answer(answer), packed) == -1.0
    result = reward_func(["pSports" + CLOSE, "pWeather" + CLOSE], ["p", "p"], [pack_label(TOPICS, "s"), packed])
    assert result["rewards"].tolist() == [1.0, -1.0] and result["scores"].tolist() == [1.0, 0.0]


@pytest.mark.parametrize("gold", ["4", "4.0", "4.000"])
def test_a_score_of_stsb_has_one_form(gold):
    """Its files write one score in several ways; what SFT trains is what likelihood compares."""
    stsb = TASKS["stsb"]
    assert stsb.answer(gold) == "4.0" and stsb.answer(gold) in stsb.score_grid
