"""Prompt text against section 4.1 of the paper, and truncation."""

import re
from string import ascii_lowercase

import pytest
from transformers import AutoTokenizer

from extensions.common.errors import UserError
from extensions.prompts import CLOSE, OPEN, PromptEncoder, answer_format, prompt_text, render
from extensions.tasks import TASKS, Task

COLA, RTE = TASKS["cola"], TASKS["rte"]
EVERY_TASK = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)

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

# Written down here, not taken from the tasks: the answers that each asks for, and its fields.
FORMAT = {
    **dict.fromkeys(["acceptability", "cola", "qqp", "qnli", "mrpc", "rte", "wnli"], ("Yes", "No")),
    **dict.fromkeys(["boolq", "record", "superglue_rte", "wic", "wsc", "axb", "axg"], ("Yes", "No")),
    **dict.fromkeys(["reviews", "sst2"], ("Negative", "Positive")),
    **dict.fromkeys(["mnli", "mnli_mm", "ax", "cb"], ("entailment", "neutral", "contradiction")),
    "copa": ("First", "Second"),
    "multirc": ("True", "False"),
    "stsb": ("0.0", "5.0"),
}
FIELDS = {  # first the field that is cut from a prompt that is too long
    **dict.fromkeys(["acceptability", "reviews", "cola", "sst2"], ("sentence",)),
    **dict.fromkeys(["mnli", "mnli_mm", "ax", "cb", "stsb", "mrpc", "wnli"], ("sentence1", "sentence2")),
    **dict.fromkeys(["rte", "superglue_rte", "axb", "axg"], ("sentence1", "sentence2")),
    "qqp": ("question1", "question2"),
    "qnli": ("sentence", "question"),
    "boolq": ("passage", "question"),
    "copa": ("premise", "question", "choice1", "choice2"),
    "multirc": ("passage", "answer", "question"),
    "record": ("passage", "statement"),
    "wic": ("sentence1", "word", "sentence2"),
    "wsc": ("text", "pronoun", "noun"),
}

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def squeezed(text):
    return re.sub(r"\s+([.,])", r"\1", " ".join(text.split()))


def cutting(task):
    """The task with only its first field in FIELDS cut."""
    assert task.truncate in ([], [FIELDS[task.name][0]])
    return task.model_copy(update={"truncate": [FIELDS[task.name][0]]})


def own_task(**keys):
    entry = {"name": "own", "description": "Judge the text.", "question": 'Judge "{text}".', "labels": ["good", "bad"]}
    return Task.model_validate(entry | keys)


# --------------------------------------------------------------------------------------------------------- prompt


def test_the_cola_prompt_is_that_of_the_paper():
    assert squeezed(prompt_text(COLA, {"sentence": "{sentence}"})) == squeezed(PAPER_COLA)


@EVERY_TASK
def test_prompt_of_every_task_has_the_four_parts(task):
    fields = {name: f"value of {name}" for name in task.fields}
    text = prompt_text(task, fields)
    system, rest = text.split("The result you give should have the following form:\n")
    form, question, end = rest.split("\n", 1)[0], *rest.split("Prompt:\n")[1].split("Assistant:\n")
    assert re.fullmatch(r"System_prompt:\n  You are an assistant to .+\n", system), "one line"
    assert form == f"  {OPEN} {{{answer_format(task)}}} {CLOSE}"
    assert re.fullmatch(r"  Now .+\.\n", question), "one line"
    assert end == OPEN
    assert [text.count(part) for part in ("System_prompt:", "\nPrompt:\n", "\nAssistant:\n", CLOSE)] == [1, 1, 1, 1]
    assert (text.count(OPEN), text.count("{"), text.count("}")) == (2, 1, 1), "only the tags and braces of the format"
    assert re.search(r"\S {2,}| [.,?]|\.\.|,,|\t|\r", text) is None, "doubled or misplaced spaces and punctuation"
    assert re.search(r"\b(\w+) \1\b", text) is None, "a doubled word"
    assert text.isascii() and text.count('"') % 2 == 0
    for line in text.split("\n"):
        assert line == line.rstrip()


@EVERY_TASK
def test_every_field_is_rendered_where_it_is_declared(task):
    values = {name: f"[{letter * 5}]" for name, letter in zip(FIELDS[task.name], ascii_lowercase, strict=False)}
    system, question = render(task, values)
    expected = task.question
    for name, value in values.items():
        assert f'"{{{name}' in expected or name in ("question", "pronoun"), "data are in quotes"
        expected = expected.replace(f"{{{name}}}", value)
    assert question == f"Prompt:\n  {expected}\n"
    assert [question.count(value) for value in values.values()] == [1] * len(values)
    assert not any(value in system for value in values.values())
    assert prompt_text(task, values | {"unused": "never shown"}) == f"{system}{question}Assistant:\n{OPEN}"
    for name in values:
        with pytest.raises(KeyError, match=name):
            prompt_text(task, {other: value for other, value in values.items() if other != name})


@EVERY_TASK
def test_prompt_names_the_canonical_answers(task):
    system, question = render(task, dict.fromkeys(task.fields, "x"))
    words = FORMAT[task.name]
    quoted = [f'"{word}"' for word in words]
    form = re.search(r"<Judgement> \{Insert only (.+) here\} </Judgement>", system)[1]
    if task.is_regression:
        assert form == "a number between {} and {}".format(*words)
        assert task.score_range == tuple(map(float, words))
    else:
        assert form == f"{', '.join(quoted[:-1])} or {quoted[-1]}"
        assert {task.answer(label) for label in task.labels} == set(words)
        assert not any(word in question for word in quoted), "only the format names the answers"


def test_answer_format_is_made_from_the_labels():
    assert answer_format(own_task(labels=["a", "b", "c"])) == 'Insert only "a", "b" or "c" here'
    regression = own_task(labels={}, score_range=(0.0, 2.5), metrics=["pearson"])
    assert answer_format(regression) == "Insert only a number between 0 and 2.5 here"


@pytest.mark.parametrize(
    "value",
    ["{sentence2}", "{sentence1}{sentence2}", "{", "}", "{{x}}", "{0} %s %(x)s ${x} \\1 \\g<1>", "{__class__}", CLOSE],
)
def test_braces_and_placeholders_in_the_data_are_kept(value):
    text = prompt_text(RTE, {"sentence1": value, "sentence2": "second"})
    assert f'Now judge if the text "{value}" entails the text "second".' in text


@EVERY_TASK
def test_data_cannot_fill_another_field(task):
    names = FIELDS[task.name]
    values = {name: f"{{{names[(k + 1) % len(names)]}}}" for k, name in enumerate(names)}
    assert render(task, values)[1].count("{") == len(names)
    for name, value in values.items():
        assert value in prompt_text(task, dict.fromkeys(names, "") | {name: value})


def test_a_field_used_twice_is_filled_twice():
    task = own_task(question="Is {text} as good as {text}?")
    assert task.fields == ("text",)
    assert "Is this as good as this?" in prompt_text(task, {"text": "this"})


# ----------------------------------------------------------------------------------------- truncation and templates


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model("llama"))


def around(task, fields):
    """The prompt before and after the field that may be shortened."""
    return prompt_text(task, fields | {FIELDS[task.name][0]: "\0"}).split("\0")


def tokens(tokenizer, text):
    return len(tokenizer(text)["input_ids"])


def test_a_prompt_that_fits_is_unchanged(tokenizer):
    text = prompt_text(COLA, {"sentence": "Mary slept. "})
    ids, encoded = PromptEncoder(tokenizer, 10**6, False).encode(COLA, {"sentence": "Mary slept. "})
    assert encoded == text
    assert tokenizer.decode(ids) == text
    assert PromptEncoder(tokenizer, len(ids), False).encode(COLA, {"sentence": "Mary slept. "}) == (ids, text)


@EVERY_TASK
def test_any_limit_that_fits_leaves_the_rest_of_the_prompt_whole(tokenizer, task):
    task = cutting(task)
    long, *others = FIELDS[task.name]
    fields = {name: f"The {name}, which stays whole." for name in others}
    fields[long] = "Anna wrote a letter, and nobody slept: 5 of 7. " * 40
    start, end = around(task, fields)
    shortest, whole = (tokens(tokenizer, prompt_text(task, fields | {long: value})) for value in ("", fields[long]))
    for limit in (shortest, shortest + 1, shortest + 2, shortest + 17, shortest + 150, whole - 1):
        ids, text = PromptEncoder(tokenizer, limit, False).encode(task, fields)
        assert len(ids) <= limit and ids == tokenizer(text)["input_ids"]
        assert text.startswith(start) and text.endswith(end)
        kept = text[len(start) : len(text) - len(end)]
        assert fields[long].startswith(kept) and kept != fields[long]
        assert len(kept) >= limit - shortest - 10, "no more is cut than needed, within a few tokens"
    assert PromptEncoder(tokenizer, whole, False).encode(task, fields)[1] == prompt_text(task, fields)
    with pytest.raises(UserError, match=rf"task {task.name}: .* {shortest - 1} tokens .*'{long}'"):
        PromptEncoder(tokenizer, shortest - 1, False).encode(task, fields)


@EVERY_TASK
def test_a_long_other_field_is_never_shortened_where_the_task_names_one(tokenizer, task):
    task = cutting(task)
    long, *others = FIELDS[task.name]
    for name in others:
        fields = dict.fromkeys(FIELDS[task.name], "short") | {name: "The other text stays whole. " * 30, long: "x" * 99}
        start, end = around(task, fields)
        needed = tokens(tokenizer, start + end)
        _, text = PromptEncoder(tokenizer, needed + 9, False).encode(task, fields)
        assert text.startswith(start) and text.endswith(end) and fields[name] in text
        with pytest.raises(UserError, match=rf"task {task.name}: .*'{long}'"):
            PromptEncoder(tokenizer, needed - 9, False).encode(task, fields)


@pytest.mark.parametrize("task", [RTE, RTE.model_copy(update={"truncate": ["sentence2"]})], ids=["longest", "declared"])
@pytest.mark.parametrize("long", ["word " * 300, "日本語" * 100, "x" * 3000, "a b\u0301 \U0001f600" * 80])
def test_truncation_shortens_one_field_alone(tokenizer, task, long):
    shortened = (*task.truncate, "sentence1")[0]
    other = "sentence2" if shortened == "sentence1" else "sentence1"
    fields = {shortened: long, other: "Whole."}
    limit = tokens(tokenizer, prompt_text(task, fields | {shortened: ""})) + 40
    ids, text = PromptEncoder(tokenizer, limit, False).encode(task, fields)
    assert len(ids) <= limit
    assert tokenizer.decode(ids) == text
    start, end = prompt_text(task, fields | {shortened: "\0"}).split("\0")
    assert text.startswith(start) and text.endswith(end), "only the field may change"
    kept = text[len(start) : len(text) - len(end)]
    assert kept and long.startswith(kept), "only the end of the field is cut"
    assert len(ids) > limit - 30, "and no more of it than needed, within a few tokens"


@pytest.mark.parametrize("limit", [16, 100])
def test_the_error_of_an_impossible_limit(tokenizer, limit):
    fields = {"sentence1": "x" * 50, "sentence2": "y" * 2000}
    task = RTE.model_copy(update={"truncate": ["sentence1"]})
    assert limit < tokens(tokenizer, prompt_text(RTE, fields | {"sentence1": ""}))
    encoder = PromptEncoder(tokenizer, limit, False)
    for refuses in (encoder.encode, encoder.check):
        with pytest.raises(UserError, match=rf"rte.*{limit} tokens.*\('sentence1'\).*prompt\.max_tokens"):
            refuses(task, fields)


@pytest.mark.parametrize("truncate", [[], ["b", "c"]], ids=["all", "two"])
def test_the_longest_text_of_the_row_is_cut(tokenizer, truncate):
    task = own_task(question="a: {a}; b: {b}; c: {c}.", truncate=truncate)
    values = {"a": "one two three. ", "b": "alpha beta gamma. ", "c": "red green blue. "}
    for long in truncate or values:
        fields = {name: text.strip() for name, text in values.items()} | {long: values[long] * 60}
        start, end = prompt_text(task, fields | {long: "\0"}).split("\0")
        encoder = PromptEncoder(tokenizer, tokens(tokenizer, start + end) + 60, False)
        ids, text = encoder.encode(task, fields)
        assert text.startswith(start) and text.endswith(end) and len(ids) > encoder.max_tokens - 10
        kept = text[len(start) : len(text) - len(end)]
        assert kept and fields[long].startswith(kept)
        assert encoder.is_cut(task, fields) and not encoder.is_cut(task, values)
        assert encoder.truncated == {"own": 1} and not encoder.dropped


def test_texts_that_are_both_long_are_cut_to_one_length(tokenizer):
    task = own_task(question="a: {a}; b: {b}; c: {c}.")
    fields = {"a": "x" * 900, "b": "y" * 2000, "c": "short"}
    limit = tokens(tokenizer, prompt_text(task, fields | {"a": "", "b": ""})) + 120
    _, text = PromptEncoder(tokenizer, limit, False).encode(task, fields)
    kept = re.search(r"a: (x+); b: (y+); c: short\.", text)
    assert len(kept[1]) == len(kept[2]) > 20


@EVERY_TASK
def test_check_agrees_with_encode(tokenizer, task):
    task = cutting(task)
    fields = {name: "Anna slept. " * (40 if name == FIELDS[task.name][0] else 1) for name in FIELDS[task.name]}
    shortest = tokens(tokenizer, "".join(around(task, fields)))

    def refusal(call):
        try:
            call(task, fields)
        except UserError as error:
            return str(error)
        return None

    for limit in (shortest - 30, shortest - 1, shortest, shortest + 30, 10**4):
        encoder = PromptEncoder(tokenizer, limit, False)
        assert (refusal(encoder.encode) is None) == (limit >= shortest)
        assert refusal(encoder.check) == refusal(encoder.encode)


def test_chat_template(tiny_model):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model("llama"))
    with pytest.raises(UserError, match=r"prompt\.chat_template"):
        PromptEncoder(tokenizer, 512, True)
    tokenizer.chat_template = CHATML
    fields = {"sentence": "Mary {slept}."}
    text = PromptEncoder(tokenizer, 10**6, True).text(COLA, fields)
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


@EVERY_TASK
def test_chat_template_holds_the_same_parts(tiny_model, task):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model("llama"))
    tokenizer.chat_template = CHATML
    fields = {name: f"value of {name}" for name in task.fields}
    system, question = render(task, fields)
    expected = (
        f"<|im_start|>system\n{system.removeprefix('System_prompt:').strip()}<|im_end|>\n"
        f"<|im_start|>user\n{question.removeprefix('Prompt:').strip()}<|im_end|>\n<|im_start|>assistant\n{OPEN}"
    )
    assert PromptEncoder(tokenizer, 10**6, True).text(task, fields) == expected
