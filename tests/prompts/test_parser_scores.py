"""Scores in hostile answers.

Expectations come from section 4.3 of the paper and the parser's docstring, never from running it.
"""

import math
import unicodedata

import pytest
from answer_words import STSB, own_task

from extensions.prompts import CLOSE, pack_label, parse_answer
from reward_fns.nlu import reward

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


def test_names_of_rows_are_unique():
    names = [name for name, *_ in SCORES]
    assert len(set(names)) == len(names)


def test_the_table_covers_every_kind_of_character_and_every_outcome():
    categories = {unicodedata.category(character) for _, text, _ in SCORES for character in text}
    assert {"Mn", "Me", "Cf", "Cc", "Cs", "Lo", "So", "No", "Nl", "Nd"} <= categories
    assert 20 <= sum(expected is not None for *_, expected in SCORES) <= len(SCORES) - 50
