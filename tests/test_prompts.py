"""Prompt text against section 4.1, truncation, and the answer parser against its written rules.

The expectations of the parser come from its docstring and the paper's section 4.3, never from running it.
"""

import math
import random
import re
import unicodedata

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from extensions.errors import UserError
from extensions.prompts import (
    CLOSE,
    OPEN,
    PromptEncoder,
    answer_format,
    chat_prompt_text,
    pack_label,
    parse_answer,
    prompt_text,
    render,
)
from extensions.tasks import TASKS, Task
from reward_fns.nlu import reward

COLA, SST2, RTE, STSB = (TASKS[name] for name in ("cola", "sst2", "rte", "stsb"))

# Typed from the paper, section 4.1; {sentence} is the placeholder. The paper breaks lines to fit its column.
PAPER_COLA = """
System_prompt:
  You are an assistant to analyze the linguistic properties
  of a sentence. The task is to decide the linguistic acceptability
  of a sentence. If the sentence is linguistically correct then it
  is acceptable, else it is not.
The result you give should have the following form:
  <Judgement> {Insert only "Yes" or "No" here} </Judgement>
Prompt:
  Now judge if the sentence "{sentence}" is linguistically acceptable
  .
Assistant:
  <Judgement>
"""

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def squeezed(text):
    return re.sub(r"\s+([.,])", r"\1", " ".join(text.split()))


def own_task(**keys):
    entry = {"name": "own", "description": "Judge the text.", "question": 'Judge "{text}".', "labels": ["good", "bad"]}
    return Task.model_validate(entry | keys)


# --------------------------------------------------------------------------------------------------------- prompt


def test_cola_prompt_is_the_papers():
    assert squeezed(prompt_text(COLA, {"sentence": "{sentence}"})) == squeezed(PAPER_COLA)


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_prompt_of_every_task_has_the_four_parts(task):
    fields = {name: f"value of {name}" for name in task.fields}
    text = prompt_text(task, fields)
    assert text.endswith(f"Assistant:\n{OPEN}")
    assert [text.count(part) for part in ("System_prompt:", "\nPrompt:\n", "\nAssistant:\n", CLOSE)] == [1, 1, 1, 1]
    assert f"{OPEN} {{{answer_format(task)}}} {CLOSE}\n" in text
    assert text.index("System_prompt:") < text.index(CLOSE) < text.index("\nPrompt:\n") < text.index("\nAssistant:\n")
    for value in fields.values():
        assert text.count(value) == 1
    assert re.search(r"\S {2,}", text) is None, "doubled spaces"
    assert re.search(r"\{\w+\}", text) is None, "a placeholder is left"
    for line in text.split("\n"):
        assert line == line.rstrip()


@pytest.mark.parametrize("task", [t for t in TASKS.values() if t.labels], ids=lambda task: task.name)
def test_prompt_names_the_canonical_answers(task):
    system, _ = render(task, dict.fromkeys(task.fields, "x"))
    for label in task.labels:
        assert f'"{task.answer(label)}"' in system


def test_answer_format_is_made_from_the_labels():
    assert answer_format(own_task(labels=["a", "b", "c"])) == 'Insert only "a", "b" or "c" here'
    regression = own_task(labels={}, score_range=(0.0, 2.5), metrics=["pearson"])
    assert answer_format(regression) == "Insert only a number between 0 and 2.5 here"


@pytest.mark.parametrize(
    "value",
    ["{sentence2}", "{sentence1}{sentence2}", "{", "}", "{{x}}", "{0} %s %(x)s ${x} \\1 \\g<1>", "{__class__}", CLOSE],
)
def test_braces_and_placeholders_inside_the_data_survive(value):
    text = prompt_text(RTE, {"sentence1": value, "sentence2": "second"})
    assert f'Now judge if the text "{value}" entails the text "second".' in text


def test_a_field_used_twice_is_filled_twice():
    task = own_task(question="Is {text} as good as {text}?")
    assert task.fields == ("text",)
    assert "Is this as good as this?" in prompt_text(task, {"text": "this"})


# ----------------------------------------------------------------------------------------- truncation and templates


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model("llama"))


def test_a_prompt_that_fits_is_not_touched(tokenizer):
    text = prompt_text(COLA, {"sentence": "Mary slept. "})
    ids, encoded = PromptEncoder(tokenizer, 10**6, False).encode(COLA, {"sentence": "Mary slept. "})
    assert encoded == text
    assert tokenizer.decode(ids) == text
    assert PromptEncoder(tokenizer, len(ids), False).encode(COLA, {"sentence": "Mary slept. "}) == (ids, text)


@pytest.mark.parametrize("task", [RTE, RTE.model_copy(update={"truncate": "sentence2"})], ids=["first", "declared"])
@pytest.mark.parametrize("long", ["word " * 300, "日本語" * 100, "x" * 3000, "a b\u0301 \U0001f600" * 80])
def test_truncation_shortens_one_field_alone(tokenizer, task, long):
    shortened = task.truncate or "sentence1"
    other = "sentence2" if shortened == "sentence1" else "sentence1"
    fields = {shortened: long, other: "The other text stays whole."}
    limit = len(tokenizer(prompt_text(task, fields | {shortened: ""}))["input_ids"]) + 40
    ids, text = PromptEncoder(tokenizer, limit, False).encode(task, fields)
    assert len(ids) <= limit
    assert tokenizer.decode(ids) == text
    start, end = (part.replace("\0", "") for part in prompt_text(task, fields | {shortened: "\0"}).split("\0"))
    assert text.startswith(start) and text.endswith(end), "only the field may change"
    kept = text[len(start) : len(text) - len(end)]
    assert kept and long.startswith(kept), "the end of the field is what goes"
    assert len(ids) > limit - 30, "and no more of it than needed, within a few tokens"


@pytest.mark.parametrize("limit", [16, 100])
def test_an_impossible_limit_is_explained(tokenizer, limit):
    needed = len(tokenizer(prompt_text(RTE, {"sentence1": "", "sentence2": "y" * 2000}))["input_ids"])
    assert limit < needed
    with pytest.raises(UserError, match=rf"rte.*{limit} tokens.*'sentence1'.*prompt\.max_tokens"):
        PromptEncoder(tokenizer, limit, False).encode(RTE, {"sentence1": "x" * 50, "sentence2": "y" * 2000})


def test_the_end_of_the_prompt_survives_any_limit(tokenizer):
    fields = {"sentence": "Anna wrote a letter to the teacher last week, " * 20}
    shortest = len(tokenizer(prompt_text(COLA, {"sentence": ""}))["input_ids"])
    for limit in range(shortest + 1, shortest + 60, 7):
        ids, text = PromptEncoder(tokenizer, limit, False).encode(COLA, fields)
        assert len(ids) <= limit
        assert text.endswith(f'" is linguistically acceptable.\nAssistant:\n{OPEN}')
        assert '<Judgement> {Insert only "Yes" or "No" here} </Judgement>' in text


def test_chat_template(tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model("llama"))
    with pytest.raises(UserError, match=r"prompt\.chat_template"):
        PromptEncoder(tokenizer, 512, True)
    tokenizer.chat_template = CHATML
    fields = {"sentence": "Mary {slept}."}
    text = chat_prompt_text(COLA, fields, tokenizer)
    assert text.startswith("<|im_start|>system\nYou are an assistant to analyze the linguistic properties")
    assert text.endswith(f"<|im_end|>\n<|im_start|>assistant\n{OPEN}")
    assert '<|im_start|>user\nNow judge if the sentence "Mary {slept}." is linguistically accept' in text
    assert '<Judgement> {Insert only "Yes" or "No" here} </Judgement><|im_end|>' in text
    assert "System_prompt:" not in text and "Prompt:" not in text
    encoder = PromptEncoder(tokenizer, 10**6, True)
    ids, encoded = encoder.encode(COLA, fields)
    assert encoded == text and tokenizer.decode(ids) == text
    shorter, cut = PromptEncoder(tokenizer, len(ids) - 2, True).encode(COLA, {"sentence": "Mary {slept}. " * 9})
    assert len(shorter) <= len(ids) - 2 and cut.endswith(f"assistant\n{OPEN}") and 'sentence "Mary' in cut


# --------------------------------------------------------------------------------------------------------- parser

NEGATION = "a negation that the pattern does not reach reads as the plain keyword"
MARKS = "combining marks and invisible characters outside the listed ranges do not count as part of a word"

CLASSIFICATION = [
    # the plain answers
    ("plain yes", COLA, "Yes</Judgement>", "1"),
    ("plain no", COLA, "No</Judgement>", "0"),
    ("spaces around", COLA, " \n\t Yes \r\n </Judgement>", "1"),
    ("no-break space", COLA, "\u00a0Yes\u00a0</Judgement>", "1"),
    ("lower case", COLA, "yes</Judgement>", "1"),
    ("upper case", COLA, "NO</Judgement>", "0"),
    ("mixed case", COLA, "yEs</Judgement>", "1"),
    ("full stop", COLA, "Yes.</Judgement>", "1"),
    ("quoted", COLA, '"No"</Judgement>', "0"),
    ("curly quotes", COLA, "“Yes”</Judgement>", "1"),
    ("bold", COLA, "**No**</Judgement>", "0"),
    ("braces of the format", COLA, "{Yes}</Judgement>", "1"),
    ("in a sentence", COLA, "The answer is: yes, I think</Judgement>", "1"),
    ("the same twice", COLA, "Yes, yes</Judgement>", "1"),
    ("two words of one label", COLA, "Yes, acceptable.</Judgement>", "1"),
    ("two negative words of one label", COLA, "No, not acceptable: unacceptable</Judgement>", "0"),
    ("second word of a label", COLA, "acceptable</Judgement>", "1"),
    ("label of two words", COLA, "not acceptable</Judgement>", "0"),
    ("label of two words over a line break", COLA, "Not \n acceptable.</Judgement>", "0"),
    ("label that holds the other", COLA, "Unacceptable</Judgement>", "0"),
    ("positive", SST2, " Positive </Judgement>", "1"),
    ("negative", SST2, "negative.</Judgement>", "0"),
    ("entailment", RTE, "entailment</Judgement>", "entailment"),
    ("not entailment", RTE, "not entailment</Judgement>", "not_entailment"),
    ("the label as the data spell it", RTE, "not_entailment</Judgement>", "not_entailment"),
    ("after the tag nothing counts", COLA, "Yes</Judgement> No", "1"),
    ("a second closing tag after the first", COLA, "Yes</Judgement></Judgement>", "1"),
    ("end token after the tag", COLA, "No</Judgement></s>", "0"),
    # no answer
    ("empty", COLA, "", None),
    ("tag alone", COLA, "</Judgement>", None),
    ("blank", COLA, "   </Judgement>", None),
    ("no keyword", COLA, "Maybe.</Judgement>", None),
    ("data label", COLA, "1</Judgement>", None),
    ("initial", COLA, "Y</Judgement>", None),
    ("synonym", COLA, "True, correct, right</Judgement>", None),
    ("keyword of another task", SST2, "Yes</Judgement>", None),
    # contradictions
    ("both labels", COLA, "Yes No</Judgement>", None),
    ("both labels, slash", COLA, "Yes/No</Judgement>", None),
    ("both labels of the prompt", COLA, 'Insert only "Yes" or "No" here</Judgement>', None),
    ("no problem: Yes", COLA, "no problem: Yes</Judgement>", None),
    ("both labels far apart", COLA, f"Yes{' x' * 500} no</Judgement>", None),
    ("both labels by other words", COLA, "Yes, it is not acceptable</Judgement>", None),
    ("no acceptable", COLA, "no acceptable</Judgement>", None),
    ("a word and its opposite", COLA, "acceptable or unacceptable</Judgement>", None),
    ("positive and negative", SST2, "positive, not negative</Judgement>", None),
    # negations
    ("not Yes", COLA, "not Yes</Judgement>", None),
    ("not No", COLA, "not No</Judgement>", None),
    ("NOT yes", COLA, "NOT yes</Judgement>", None),
    ("not quoted", COLA, 'not "Yes"</Judgement>', None),
    ("not positive", SST2, "not positive</Judgement>", None),
    ("not very positive", SST2, "not very positive</Judgement>", None),
    ("never positive", SST2, "never positive</Judgement>", None),
    ("isn't acceptable", COLA, "isn't acceptable</Judgement>", None),
    ("isn’t acceptable", COLA, "isn’t acceptable</Judgement>", None),
    ("isn't an entailment", RTE, "isn't an entailment</Judgement>", None),
    ("not unacceptable", COLA, "not unacceptable</Judgement>", None),
    ("not not acceptable", COLA, "not not acceptable</Judgement>", None),
    ("non-positive", SST2, "non-positive</Judgement>", None),
    ("neither", SST2, "neither positive</Judgement>", None),
    ("not linguistically acceptable", COLA, "not linguistically acceptable</Judgement>", None),
    ("not so positive", SST2, "not so positive</Judgement>", None),
    ("not, yes", COLA, "not, yes</Judgement>", None),
    ("not (yes)", COLA, "not (yes)</Judgement>", None),
    ("not `yes`", COLA, "not `yes`</Judgement>", None),
    ("not “yes”", COLA, "not “yes”</Judgement>", None),
    ("not, many spaces, yes", COLA, "not      yes</Judgement>", None),
    ("not a clear yes", COLA, "not a clear yes</Judgement>", None),
    ("cannot be acceptable", COLA, "cannot be acceptable</Judgement>", None),
    ("isnt acceptable", COLA, "isnt acceptable</Judgement>", None),
    ("not to be called positive", SST2, "not to be called positive</Judgement>", None),
    # a label inside a word
    ("Nothing", COLA, "Nothing</Judgement>", None),
    ("Yesterday", COLA, "Yesterday</Judgement>", None),
    ("Know", COLA, "Know</Judgement>", None),
    ("Nope", COLA, "Nope</Judgement>", None),
    ("eyes", COLA, "eyes</Judgement>", None),
    ("repeated without spaces", COLA, "YesYes</Judgement>", None),
    ("both without spaces", COLA, "YesNo</Judgement>", None),
    ("digit after", COLA, "Yes1</Judgement>", None),
    ("digit before", COLA, "0No</Judgement>", None),
    ("underscore", COLA, "Yes_</Judgement>", None),
    ("hyphenated", COLA, "yes-man</Judgement>", None),
    ("possessive", COLA, "No's</Judgement>", None),
    ("positively", SST2, "positively</Judgement>", None),
    ("unnegative", SST2, "unnegative</Judgement>", None),
    ("acceptable in a longer word", COLA, "acceptableness</Judgement>", None),
    ("non-Latin letter beside", COLA, "Yes日</Judgement>", None),
    ("split by a space", COLA, "Y es</Judgement>", None),
    # tags
    ("no closing tag", COLA, "Yes", None),
    ("cut closing tag", COLA, "Yes</Judgement", None),
    ("opening tag for the closing one", COLA, "Yes<Judgement>", None),
    ("closing tag in lower case", COLA, "Yes</judgement>", None),
    ("closing tag in upper case", COLA, "Yes</JUDGEMENT>", None),
    ("closing tag with a space", COLA, "Yes</ Judgement>", None),
    ("closing tag with a space at its end", COLA, "Yes</Judgement >", None),
    ("escaped", COLA, "Yes&lt;/Judgement&gt;", None),
    ("backslash", COLA, "Yes<\\/Judgement>", None),
    ("American spelling", COLA, "Yes</Judgment>", None),
    ("Cyrillic e in the tag", COLA, "Yes</Judg\u0435m\u0435nt>", None),
    ("zero-width space in the tag", COLA, "Yes</Judge\u200bment>", None),
    ("full-width brackets", COLA, "Yes＜/Judgement＞", None),
    ("repeated opening tag", COLA, "<Judgement>Yes</Judgement>", None),
    ("nested", COLA, "<Judgement><Judgement>Yes</Judgement></Judgement>", None),
    ("opening tag after the answer", COLA, "Yes<Judgement></Judgement>", None),
    ("reversed", COLA, "</Judgement>Yes<Judgement>", None),
    ("reversed, then closed", COLA, "</Judgement>Yes</Judgement>", None),
    ("wrong case, then closed", COLA, "Yes</judgement> No</Judgement>", None),
    ("look-alike with spaces, then closed", COLA, "Yes< / Judgement ></Judgement>", None),
    ("American spelling, then closed", COLA, "Yes</Judgment></Judgement>", None),
    ("Cyrillic tag, then closed", COLA, "Yes</Judg\u0435ment></Judgement>", None),
    # Unicode
    ("Cyrillic e", COLA, "Y\u0435s</Judgement>", None),
    ("Cyrillic o", COLA, "N\u043e</Judgement>", None),
    ("Greek Y", COLA, "\u03a5es</Judgement>", None),
    ("long s", COLA, "Ye\u017f</Judgement>", None),
    ("Kelvin sign", own_task(labels=["ok", "bad"]), "o\u212a</Judgement>", None),
    ("dotless i", SST2, "pos\u0131t\u0131ve</Judgement>", None),
    ("dotted capital I", SST2, "POS\u0130T\u0130VE</Judgement>", None),
    ("full-width letters", COLA, "Ｙｅｓ</Judgement>", None),
    ("mathematical bold", COLA, "𝐘𝐞𝐬</Judgement>", None),
    ("small capitals", COLA, "ɴᴏ</Judgement>", None),
    ("accent", COLA, "Yés</Judgement>", None),
    ("combining accent inside", COLA, "Ye\u0301s</Judgement>", None),
    ("combining accent at the end", COLA, "No\u0308</Judgement>", None),
    ("combining overlay", COLA, "Yes\u0336</Judgement>", None),
    ("zero-width space inside", COLA, "Y\u200bes</Judgement>", None),
    ("zero-width space at the end", COLA, "Yes\u200b</Judgement>", None),
    ("zero-width joiner before", COLA, "\u200dYes</Judgement>", None),
    ("word joiner after", COLA, "Yes\u2060</Judgement>", None),
    ("byte order mark before", COLA, "\ufeffYes</Judgement>", None),
    ("invisible, then letters", COLA, "No\u200bthing</Judgement>", None),
    ("soft hyphen inside", COLA, "Y\u00ades</Judgement>", None),
    ("enclosing keycap", COLA, "No\u20e3</Judgement>", None),
    ("combining mark of another block", COLA, "Yes\u1ab0</Judgement>", None),
    ("combining half mark", COLA, "Yes\ufe20</Judgement>", None),
    ("soft hyphen, then letters", COLA, "No\u00adthing</Judgement>", None),
    ("direction override", COLA, "\u202eYes</Judgement>", None),
    ("invisible separator", COLA, "No\u2063thing</Judgement>", None),
    ("Mongolian vowel separator", COLA, "No\u180ething</Judgement>", None),
    ("tag characters", COLA, "No\U000e0074\U000e0065</Judgement>", None),
    # control characters
    ("NUL inside", COLA, "Y\0es</Judgement>", None),
    ("NUL alone", COLA, "\0</Judgement>", None),
    ("NUL after a space", COLA, "Yes \0</Judgement>", "1"),
    ("bell and escape apart", COLA, "\x07 \x1b No \x7f</Judgement>", "0"),
    ("backspaces", COLA, "N\x08Y\x08</Judgement>", None),
    ("lone surrogate apart", COLA, "Yes \ud800</Judgement>", "1"),
    ("lone surrogate inside", COLA, "Y\udce9es</Judgement>", None),
    ("emoji apart", COLA, "No \U0001f600</Judgement>", "0"),
]


def ids_of(rows):
    values = [row.values if hasattr(row, "values") else row for row in rows]
    names = [f"{task.name}: {name}" for name, task, *_ in values]
    assert len(set(names)) == len(names), "two rows of one name"
    return names


@pytest.mark.parametrize("name, task, text, expected", CLASSIFICATION, ids=ids_of(CLASSIFICATION))
def test_parse_label(name, task, text, expected):
    assert parse_answer(text, task) == expected


ONE_NUMBER = "'exactly one number': the same number twice is taken for one"
LEADING = "a leading point or comma is stripped, so .5 reads as 5"
OTHER_NUMBER = "words beside the number make it another number"

SCORES = [
    # plain decimal numbers in [0, 5]
    ("integer", STSB, "3</Judgement>", 3.0),
    ("decimal", STSB, "3.5</Judgement>", 3.5),
    ("three decimals", STSB, "3.250</Judgement>", 3.25),
    ("lowest", STSB, "0</Judgement>", 0.0),
    ("lowest, decimal", STSB, "0.0</Judgement>", 0.0),
    ("highest", STSB, "5.0</Judgement>", 5.0),
    ("spaces around", STSB, " \n 4.2 \t</Judgement>", 4.2),
    ("quoted", STSB, '"4.2"</Judgement>', 4.2),
    ("end of a sentence", STSB, "The similarity is 4.2.</Judgement>", 4.2),
    ("bold", STSB, "**2.0**</Judgement>", 2.0),
    ("braces of the format", STSB, "{1.5}</Judgement>", 1.5),
    ("after the tag nothing counts", STSB, "2</Judgement> 3", 2.0),
    # none, or several
    ("empty", STSB, "</Judgement>", None),
    ("blank", STSB, " </Judgement>", None),
    ("no closing tag", STSB, "3.5", None),
    ("word", STSB, "three</Judgement>", None),
    ("two numbers", STSB, "3 4</Judgement>", None),
    ("every number", STSB, "0 1 2 3 4 5</Judgement>", None),
    ("out of", STSB, "4 out of 5</Judgement>", None),
    ("range", STSB, "3-4</Judgement>", None),
    ("range by a dash", STSB, "3–4</Judgement>", None),
    ("range in words", STSB, "3 to 4</Judgement>", None),
    ("the format", STSB, "a number between 0.0 and 5.0</Judgement>", None),
    ("the same twice", STSB, "3.0 3.0</Judgement>", None),
    ("5 out of 5", STSB, "5 out of 5</Judgement>", None),
    ("5 / 5", STSB, "5 / 5</Judgement>", None),
    ("digits apart", STSB, "2 2</Judgement>", None),
    # out of range
    ("above", STSB, "6</Judgement>", None),
    ("a little above", STSB, "5.0000001</Judgement>", None),
    ("far above", STSB, "99999999999999999999</Judgement>", None),
    ("negative", STSB, "-1</Judgement>", None),
    ("negative zero", STSB, "-0</Judgement>", None),
    ("negative zero, decimal", STSB, "-0.0</Judgement>", None),
    ("minus sign U+2212", STSB, "−1</Judgement>", None),
    # not plain decimal numbers
    ("not a number", STSB, "nan</Judgement>", None),
    ("infinity", STSB, "inf</Judgement>", None),
    ("Infinity", STSB, "Infinity</Judgement>", None),
    ("1e400", STSB, "1e400</Judgement>", None),
    ("1e-400", STSB, "1e-400</Judgement>", None),
    ("3e0", STSB, "3e0</Judgement>", None),
    ("hexadecimal", STSB, "0x3</Judgement>", None),
    ("binary", STSB, "0b11</Judgement>", None),
    ("underscore", STSB, "3_0</Judgement>", None),
    ("decimal comma", STSB, "2,5</Judgement>", None),
    ("thousands", STSB, "3,000</Judgement>", None),
    ("fraction", STSB, "3/5</Judgement>", None),
    ("fraction with spaces", STSB, "3 / 5</Judgement>", None),
    ("two points", STSB, "3.5.1</Judgement>", None),
    ("two points together", STSB, "3..5</Judgement>", None),
    ("point with spaces", STSB, "3 . 5</Judgement>", None),
    ("percent", STSB, "3%</Judgement>", None),
    ("times", STSB, "2*2</Judgement>", None),
    ("power", STSB, "2**2</Judgement>", None),
    ("superscript", STSB, "2²</Judgement>", None),
    ("superscript alone", STSB, "²</Judgement>", None),
    ("one half, one character", STSB, "½</Judgement>", None),
    ("three and one half", STSB, "3½</Judgement>", None),
    ("in a word", STSB, "b4</Judgement>", None),
    ("ordinal", STSB, "3rd</Judgement>", None),
    ("unit", STSB, "3kg</Judgement>", None),
    ("star", STSB, "4★</Judgement>", None),
    ("leading point", STSB, ".5</Judgement>", None),
    ("leading comma", STSB, ",5</Judgement>", None),
    ("leading point in a sentence", STSB, "about .5</Judgement>", None),
    ("ellipsis before", STSB, "...5</Judgement>", None),
    # fractions and multiples in words
    ("3 and a half", STSB, "3 and a half</Judgement>", None),
    ("half", STSB, "half of 5</Judgement>", None),
    ("three fifths", STSB, "3 fifths</Judgement>", None),
    ("point in words", STSB, "3 point five</Judgement>", None),
    ("quarters", STSB, "3 quarters</Judgement>", None),
    ("eighths", STSB, "3 eighths</Judgement>", None),
    ("hundred", STSB, "3 hundred</Judgement>", None),
    ("percent in words", STSB, "3 percent</Judgement>", None),
    ("minus in words", STSB, "minus 3</Judgement>", None),
    ("minus with a space", STSB, "- 3</Judgement>", None),
    # Unicode
    ("full-width digit", STSB, "３</Judgement>", None),
    ("full-width point", STSB, "3．5</Judgement>", None),
    ("Arabic digit", STSB, "٣</Judgement>", None),
    ("Devanagari digits", STSB, "३.५</Judgement>", None),
    ("Roman numeral", STSB, "Ⅲ</Judgement>", None),
    ("Chinese numeral", STSB, "三</Judgement>", None),
    ("mathematical digit", STSB, "𝟑</Judgement>", None),
    ("circled digit", STSB, "③</Judgement>", None),
    ("combining mark after", STSB, "3\u0301</Judgement>", None),
    ("keycap", STSB, "3\ufe0f\u20e3</Judgement>", None),
    ("zero-width space inside", STSB, "3\u200b5</Judgement>", None),
    ("zero-width space at the end", STSB, "3\u200b</Judgement>", None),
    ("no-break space inside", STSB, "3\u00a05</Judgement>", None),
    # control characters and tags
    ("NUL inside", STSB, "3\0.5</Judgement>", None),
    ("NUL apart", STSB, "\0 3 \0</Judgement>", 3.0),
    ("file separator inside", STSB, "3\x1c5</Judgement>", None),
    ("lone surrogate beside", STSB, "3\ud800</Judgement>", None),
    ("repeated tag", STSB, "<Judgement>3</Judgement>", None),
    ("closing tag in lower case, then closed", STSB, "3</judgement></Judgement>", None),
    ("tag within the number", STSB, "3</Judgement>.5</Judgement>", 3.0),
    ("words of a classification", STSB, "Yes</Judgement>", None),
]


@pytest.mark.parametrize("name, task, text, expected", SCORES, ids=ids_of(SCORES))
def test_parse_score(name, task, text, expected):
    answer = parse_answer(text, task)
    assert answer == expected
    assert answer is None or (isinstance(answer, float) and math.copysign(1, answer) > 0)


# Own tasks: the canonical answer of every label must be readable, whatever the words are.
OWN_WORDS = [
    ("longer word holds the shorter", ["positive", "very positive", "positive-ish"]),
    ("negations as labels", ["always", "never", "not sure"]),
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


@pytest.mark.parametrize(
    "name, words", OWN_WORDS, ids=[row.values[0] if hasattr(row, "values") else row[0] for row in OWN_WORDS]
)
def test_canonical_answers_of_own_tasks(name, words):
    task = own_task(labels=words)
    assert [parse_answer(f" {word}{CLOSE}", task) for word in words] == words
    assert [parse_answer(f"{word} or {words[0]}{CLOSE}", task) for word in words[1:]] == [None] * (len(words) - 1)


def test_a_score_range_below_zero_is_refused():
    """A sign is never part of an answer, so no answer could meet such a gold."""
    with pytest.raises(ValueError, match="0 <= low < high"):
        own_task(labels={}, score_range=(-1.0, 1.0), metrics=["pearson"])


MEGA = 1_000_000  # characters; a quadratic parser would need hours
SHAPES = {
    "one letter": "a" * MEGA,
    "spaces": " " * MEGA,
    "not and spaces": ("not" + " " * 5000) * (MEGA // 5000),
    "not not not": "not " * (MEGA // 4),
    "not a a a": "not " + "a " * (MEGA // 2),
    "not very very": "not very " * (MEGA // 9),
    "n't n't": "n't " * (MEGA // 4),
    "almost a keyword": "acceptabl" * (MEGA // 9),
    "not acceptabl": "not acceptabl " * (MEGA // 14),
    "keyword of one label": "Yes " * (MEGA // 4),
    "hyphens": "Yes-" * (MEGA // 4),
    "combining marks": "Yes" + "\u0301" * MEGA,
    "opening brackets": "<" * MEGA,
    "half tags": "</Judgemen" * (MEGA // 10),
    "digits": "1" * MEGA,
    "numbers": "3.3 " * (MEGA // 4),
    "points": "3" + "." * MEGA,
    "punctuation": "*" * MEGA + "3" + "*" * MEGA,
    "full-width digits": "３" * MEGA,
    "NULs": "\0" * MEGA,
    "surrogates": "\ud800" * MEGA,
    "line separators": "\u2028\x1c\x85" * (MEGA // 3),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_megabyte_returns(shape):
    for task in (COLA, STSB):
        assert valid(parse_answer(SHAPES[shape] + CLOSE, task), task)
        assert parse_answer(SHAPES[shape], task) is None


def valid(answer, task):
    if answer is None:
        return True
    if task.score_range is None:
        return answer in task.labels
    low, high = task.score_range
    return isinstance(answer, float) and low <= answer <= high


def check(text, task, gold):
    """What holds for any text: a valid answer, and the reward that section 4.3 gives for it, every time."""
    answer, value = parse_answer(text, task), reward(text, pack_label(task, gold))
    assert valid(answer, task), (text, answer)
    assert isinstance(value, float) and math.isfinite(value)
    if task.score_range is None:
        assert value == (-1.0 if answer is None else 1.0 if answer == gold else 0.0), (text, value)
    else:
        expected = -2.5 if answer is None else 2.5 - abs(answer - float(gold))
        assert -2.5 <= value <= 2.5 and math.isclose(value, expected, abs_tol=1e-12), (text, value)
    assert (parse_answer(text, task), reward(text, pack_label(task, gold))) == (answer, value)
    return answer


TASK = st.sampled_from(list(TASKS.values()))
FRAGMENTS = st.sampled_from(
    [
        *(
            "Yes",
            "No",
            "not",
            "n't",
            " ",
            "acceptable",
            "un",
            "positive",
            "negative",
            "entailment",
            "3",
            ".",
            "5",
            "-",
        ),
        *(
            "e9",
            OPEN,
            CLOSE,
            "<",
            "/",
            "\0",
            "\u0301",
            "\u200b",
            "\u017f",
            "\u212a",
            "\u0130",
            "½",
            "३",
            "\ud800",
            "\n",
            "nan",
            "inf",
            "_",
        ),
    ]
)
TEXT = st.one_of(st.text(st.characters(codec=None), max_size=60), st.lists(FRAGMENTS, max_size=12).map("".join))


@given(TASK, TEXT, st.booleans(), st.randoms(use_true_random=False))
@example(COLA, "Ye\u017f", True, random.Random(0))
@example(STSB, "5" * 400, True, random.Random(0))
def test_any_text_gets_an_answer_and_a_reward(task, text, closed, rng):
    gold = rng.choice(list(task.labels) or ["0", "2.5", "3.75", "5.000"])
    check(text + CLOSE * closed, task, gold)


WORD = st.text(st.characters(categories=("Lu", "Ll", "Nd"), max_codepoint=0x17F), min_size=1, max_size=6)


@given(st.lists(WORD, min_size=2, max_size=5, unique_by=str.lower), TEXT, st.booleans())
def test_own_tasks_never_raise_and_read_their_canonical_answers(words, text, closed):
    assume(not any("judgement" in word.lower() for word in words))
    assume(all("\u0130" not in word for word in words))  # a known fault, see OWN_WORDS
    task = own_task(labels=words)
    check(text + CLOSE * closed, task, words[0])
    for word in words:
        assert check(f"{word}{CLOSE}", task, word) == word


# ------------------------------------------------------------------------------------------------ a million answers

KEYWORDS = {  # of the oracle below, typed from the prompts
    "acceptability": {"yes": "1", "no": "0"},
    "cola": {"yes": "1", "no": "0"},
    "reviews": {"positive": "1", "negative": "0"},
    "sst2": {"positive": "1", "negative": "0"},
    "rte": {"yes": "entailment", "no": "not_entailment"},
    "stsb": {},
}
PIECES = [
    *("Yes", "No", "yes", "NO", "acceptable", "not acceptable", "unacceptable", "Positive", "negative", "entailment"),
    *("not ", "never ", "n't ", "isn't ", "non-", "cannot ", "no problem: ", "hardly ", "not_", "un", "neither "),
    *(OPEN, CLOSE, "</judgement>", "</Judgment>", "<", ">", "/", "< /Judgement>", "</Judg\u0435\u200bment>", "&lt;"),
    *("0", "1", "3", "5", "3.5", "5.0", "4.999", "6", "-1", "1e400", "nan", "inf", "2,5", "3/5", ".5", "½", "３", "²"),
    *(" ", "  ", "\n", "\t", "\u00a0", "\u2028", "\r\n", "\x1c", "\u3000"),
    *(".", ",", "!", "?", '"', "'", "’", "*", "(", ")", "{", "}", "-", "_", ":", ";", "`", "="),
    *(
        "\u0301",
        "\u200b",
        "\ufeff",
        "\u00ad",
        "\u202e",
        "\ufe0f",
        "\u0435",
        "\u043e",
        "\u017f",
        "\u212a",
        "\u0130",
        "\u0131",
        "Ｙ",
        "𝐘",
    ),
    *("\0", "\x07", "\x1b", "\x7f", "\ud800", "\udfff", "\U0001f600"),
    *("the ", "a ", "answer is ", "half", "point", "out of ", "thing", "terday", "x" * 50, "日本", "e", "s", "o", "w"),
]
PADS = ["", "", " ", "  ", "\n", " \n", "\t"]
ENDS = ["", "", ".", "!", ". ", " ", " \n", ","]


def oracle(text, keywords):
    """A verdict on the simple cases, by other means than the parser's: (whether it speaks, what it expects)."""
    head, *rest = text.split(CLOSE)
    if not rest:
        return True, None
    if not head.isascii():
        return False, None
    words = set(re.sub(r"[^a-z]+", " ", head.lower()).split())
    if "judgement" in words:
        return True, None
    if not keywords:
        return (True, None) if not any(map(str.isdigit, head)) else (False, None)
    if keywords.keys() <= words and re.fullmatch(r"[A-Za-z .,!?\n]*", head):
        return True, None  # both labels as plain words
    return False, None


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_a_million_hostile_answers(task):
    rng = random.Random(f"hostile {task.name}")
    keywords = KEYWORDS[task.name]
    golds = list(task.labels) or ["0", "1.25", "2.5", "4.800", "5.000"]
    packed = {gold: pack_label(task, gold) for gold in golds}
    seen = dict.fromkeys(["canonical", "oracle", "right", "wrong", "wrong format"], 0)
    for _ in range(1_000_000):
        gold = rng.choice(golds)
        if rng.random() < 0.2:  # the canonical answer, with spaces and punctuation
            if keywords:
                word, expected = rng.choice(list(keywords.items()))
                word = rng.choice([word, word.upper(), word.capitalize()])
            else:
                word = f"{rng.uniform(0, 5):.{rng.randrange(4)}f}"
                expected = float(word)
            text = f"{rng.choice(PADS)}{word}{rng.choice(ENDS)}{CLOSE}"
            kind, speaks = "canonical", True
        else:
            text = "".join(rng.choices(PIECES, k=rng.randint(0, 7)))
            if rng.random() < 0.7:
                text += CLOSE
            kind = "oracle"
            speaks, expected = oracle(text, keywords)
        answer, value = parse_answer(text, task), reward(text, packed[gold])
        if speaks:
            seen[kind] += 1
            assert answer == expected, repr(text)
        if answer is None:
            seen["wrong format"] += 1
            assert value == (-2.5 if task.is_regression else -1.0), repr(text)
        elif task.is_regression:
            assert type(answer) is float and 0 <= answer <= 5 and value == 2.5 - abs(answer - float(gold)), repr(text)
            seen["right" if value == 2.5 else "wrong"] += 1
        else:
            assert answer in task.labels and value == float(answer == gold), repr(text)
            seen["right" if value else "wrong"] += 1
    # The generator must reach every outcome, or the test says nothing.
    assert sum(seen[k] for k in ("right", "wrong", "wrong format")) == 1_000_000
    assert min(seen.values()) > 1000, seen


def test_the_tables_are_not_all_ascii_and_hold_every_outcome():
    rows = [row.values if hasattr(row, "values") else row for row in (*CLASSIFICATION, *SCORES)]
    categories = {unicodedata.category(c) for _, _, text, _ in rows for c in text}
    assert {"Mn", "Me", "Cf", "Cc", "Cs", "No", "Nl", "So"} <= categories
    assert sum(expected is not None for *_, expected in rows) >= 30
