"""Prompts and answers as tokens of five families of tokenizers."""

import pytest
import sentencepiece
from tokenizer_families import (
    ANSWERED,
    CORPUS,
    EVERY_TASK,
    MERGING,
    TEXTS,
    answers_of,
    llama,
    qwen2,
    rows_of,
    saved,
)
from tokenizers.processors import TemplateProcessing

from extensions.prefix.tree import Sample, common_prefix, pack
from extensions.prompts import CLOSE, PromptEncoder, parse_answer, prompt_text, surface_forms
from extensions.tasks import TASKS


@pytest.fixture(scope="module", params=MERGING)
def merging(request, tmp_path_factory):
    """Tokenizers that may take an answer's first letters into the prompt's last token."""
    return MERGING[request.param](tmp_path_factory.mktemp("merging") / request.param)


def test_llama_tokens_are_sentencepieces(tmp_path):
    family = llama(tmp_path / "llama")
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "llama" / "tokenizer.model"))
    for text in CORPUS + ANSWERED:
        assert family.tokenizer(text)["input_ids"] == [pieces.bos_id(), *pieces.encode(text)]


@EVERY_TASK
def test_prompts_decode_to_their_text(family, task):
    for fields in rows_of(task):
        ids, text = family.encoder().encode(task, fields)
        assert text == prompt_text(task, fields)
        assert family.decode(ids) == family.read(text)
        assert family.tokenizer.eos_token_id not in ids
        bos = family.tokenizer.bos_token_id
        assert ids.count(bos) == (1 if family.space else 0) and (not family.space or ids[0] == bos)


@EVERY_TASK
def test_the_shared_prefix_is_the_tasks_own_text(family, task):
    rows = [family.encoder().encode(task, fields) for fields in rows_of(task)]
    shared = common_prefix([ids for ids, _ in rows])
    prefix = family.decode(rows[0][0][:shared]).rstrip("\ufffd")  # it may end within a character
    before = prompt_text(task, dict.fromkeys(task.fields, "\0")).split("\0")[0]
    assert before.startswith(prefix), "it holds no data"
    assert prefix.startswith(before.rpartition(" ")[0]), "it is all but the last word before the data"
    for ids, text in rows:
        assert text.startswith(prefix)
        assert family.decode(ids[:shared] + ids[shared:]) == family.read(text)


@EVERY_TASK
def test_packing_keeps_the_tokens_of_the_whole_text(family, task):
    """Ids are split, not text: the rest of a prompt is never tokenized alone."""
    samples, texts = [], []
    for fields, word in zip(rows_of(task), list(answers_of(task)) * len(TEXTS), strict=False):
        ids, text = family.encoder().encode(task, fields)
        samples.append(Sample(ids, family.encoder().answer_ids(ids, text, word)))
        texts.append(f"{text} {word} {CLOSE}")
    packed = pack(samples)
    shared = common_prefix([sample.prompt for sample in samples])
    assert packed.prefix_tokens >= shared > 20
    start = 0
    for sample, text, places in zip(samples, texts, packed.places, strict=True):
        target = packed.targets[start : start + len(sample.response)].tolist()
        start += len(sample.response)
        whole = [*packed.input_ids[0, places].tolist(), target[-1]]
        assert whole == [*sample.prompt, *sample.response] == family.tokenizer(text)["input_ids"]


@EVERY_TASK
def test_a_cut_prompt_keeps_all_but_its_long_field(family, task):
    task = task.model_copy(update={"truncate": [task.long_field]})
    others = {name: "stays whole" for name in task.fields}
    fields = others | {task.long_field: "\U0001f600 Anna wrote 25 letters; \u65e5\u672c didn't. " * 20}
    start, end = prompt_text(task, others | {task.long_field: "\0"}).split("\0")
    shortest = len(family.tokenizer(start + end)["input_ids"])
    for room in (3, 40, 111):
        ids, text = family.encoder(shortest + room).encode(task, fields)
        assert len(ids) <= shortest + room and ids == family.tokenizer(text)["input_ids"]
        assert text.startswith(start) and text.endswith(end)
        assert fields[task.long_field].startswith(text[len(start) : len(text) - len(end)])
        assert family.decode(ids) == text


@EVERY_TASK
def test_answers_follow_the_prompt_as_in_the_whole_text(family, task):
    for fields in rows_of(task):
        ids, text = family.encoder().encode(task, fields)
        for word, expected in answers_of(task).items():
            answer = family.encoder().answer_ids(ids, text, word)
            whole = family.tokenizer(f"{text} {word} {CLOSE}")["input_ids"]
            assert ids + answer == whole, "the end of the prompt is the end of a token"
            assert family.decode(whole) == family.read(f"{text} {word} {CLOSE}")
            assert family.decode(answer) == family.alone(f" {word} {CLOSE}")
            assert parse_answer(family.decode(answer), task) == expected


@EVERY_TASK
def test_an_answer_that_merges_with_the_prompt_gets_its_own_tokens(merging, task):
    """Most of these merge only a form without the space before the answer."""
    merged, encoder = 0, merging.encoder()
    for fields in rows_of(task):
        ids, text = encoder.encode(task, fields)
        for word, expected in answers_of(task).items():
            for form, answer in zip(surface_forms(word), encoder.surface_ids(ids, text, word), strict=True):
                whole = merging.tokenizer(f"{text}{form}")["input_ids"]
                if whole[: len(ids)] == ids:
                    assert ids + answer == whole
                else:
                    merged += 1
                    alone = merging.tokenizer(form, add_special_tokens=False)["input_ids"]
                    assert answer == alone or merging.space, "a separate text begins with a space there"
                assert merging.decode(ids + answer) == merging.read(f"{text}{form}")
                assert merging.tokenizer.bos_token_id not in answer
                assert parse_answer(merging.decode(answer), task) == expected
    assert merged or task.is_regression, "these tokenizers merge by construction"


@EVERY_TASK
def test_answer_tokens_after_a_cut_prompt(family, task):
    """Answers are scored after prompts that were cut, too (ReCoRD)."""
    task = task.model_copy(update={"truncate": [task.long_field]})
    fields = dict.fromkeys(task.fields, "Anna slept. ") | {task.long_field: "Anna wrote 25 letters. " * 30}
    shortest = len(family.encoder().encode(task, fields | {task.long_field: ""})[0])
    encoder = family.encoder(shortest + 30)
    ids, text = encoder.encode(task, fields)
    for word in answers_of(task):
        assert ids + encoder.answer_ids(ids, text, word) == family.tokenizer(f"{text} {word} {CLOSE}")["input_ids"]


def test_an_appended_eos_is_left_out(tmp_path):
    plain = llama(tmp_path / "plain").encoder()
    family = llama(tmp_path / "eos", config={"add_eos_token": True})
    assert family.tokenizer("a")["input_ids"][-1] == family.tokenizer.eos_token_id
    for task in TASKS.values():
        ids, text = family.encoder().encode(task, rows_of(task)[0])
        assert (ids, text) == plain.encode(task, rows_of(task)[0]), "no EOS at the end of the prompt"
        for word in answers_of(task):
            assert family.encoder().answer_ids(ids, text, word) == plain.answer_ids(ids, text, word)


def test_other_appended_tokens_are_left_out(tmp_path):
    """Also if the appended token is not the EOS token of the tokenizer."""
    plain = qwen2(tmp_path / "plain")
    tokenizer = saved(plain.tokenizer, tmp_path / "ends")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<a>", "<b>", "<c>"]})
    first, second, third = tokenizer.convert_tokens_to_ids(["<a>", "<b>", "<c>"])
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<a> $A <b> <c>", special_tokens=[("<a>", first), ("<b>", second), ("<c>", third)]
    )
    assert tokenizer("x")["input_ids"][-2:] == [second, third] != [tokenizer.eos_token_id] * 2
    encoder = PromptEncoder(tokenizer, 10**6, False)
    for task in TASKS.values():
        for fields in rows_of(task)[:4]:
            ids, text = encoder.encode(task, fields)
            expected, same = plain.encoder().encode(task, fields)
            assert (ids, text) == ([first, *expected], same)
            for word in answers_of(task):
                assert encoder.answer_ids(ids, text, word) == plain.encoder().answer_ids(expected, text, word)


def test_no_space_is_added_before_an_answer(tmp_path):
    """In `<Judgement>Yes` there is none, but SentencePiece adds a space before a separate text."""
    family = MERGING["llama"](tmp_path / "llama", config={"add_eos_token": True})
    tokenizer, task = family.tokenizer, TASKS["cola"]
    encoder = family.encoder()
    ids, text = encoder.encode(task, {"sentence": "Mary slept."})
    assert tokenizer(f"{text}Yes{CLOSE}")["input_ids"][: len(ids)] != ids, "it merges"
    answer = encoder.surface_ids(ids, text, "Yes")[3]
    assert "".join(tokenizer.convert_ids_to_tokens(answer)) == f"Yes{CLOSE}"
    assert "".join(tokenizer.convert_ids_to_tokens(tokenizer("Yes")["input_ids"])) == "<s>\u2581Yes</s>"
