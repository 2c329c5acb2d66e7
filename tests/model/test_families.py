"""The recipes of the three model families, each with a tiny random model in place of the 7B model."""

import shutil

import pytest
from official import write_benchmarks
from support import ROOT

from extensions.common.files import read_json, read_jsonl
from extensions.model import policy
from extensions.model.loading import load_policy
from extensions.recipe import load_recipe
from extensions.runs.main import main

FAMILIES = {"llama": "llama2", "qwen2": "qwen2_5", "mpt": "mpt"}
SMALL = [
    "lora.rank=4",
    "data.max_train_samples=24",
    "rollout.response_budget=[2, 4]",
    "max_steps=2",
    "ppo.batch_size=4",
    "ppo.epochs=2",
    "sft.batch_size=6",
    "evaluation.max_samples=2",
    "checkpoint.every_steps=1",
]


def recipe_of(architecture):
    return ROOT / "recipes" / f"{FAMILIES[architecture]}_glue_mt.yaml"


def test_families_differ_only_in_the_model():
    """Recipes differ in their name, their model and the names of MPT's layers."""
    recipes = [load_recipe(recipe_of(a)).model_dump() for a in FAMILIES]
    other = {key for key in recipes[0] if any(recipe[key] != recipes[0][key] for recipe in recipes)}
    assert other == {"name", "model", "lora"}
    assert [recipe["lora"]["target_modules"] for recipe in recipes] == ["auto", "auto", ["Wqkv"]]


@pytest.mark.parametrize("architecture", FAMILIES)
def test_targets_attention_and_dtype_of_each_family(tiny_model, architecture):
    import torch

    recipe = load_recipe(recipe_of(architecture), [f"model.path={tiny_model(architecture)}"])
    loaded = load_policy(recipe.model, recipe.lora, "shared", 1.0, torch.device("cpu"), 0, "base")
    trained = {name.split(".")[-4] for name in loaded.trainable if "lora_" in name}
    assert trained == ({"Wqkv"} if architecture == "mpt" else {"q_proj", "v_proj"})
    assert loaded.causal_lm.config._attn_implementation == "packed"
    assert loaded.causal_lm.dtype == torch.bfloat16 and {p.dtype for p in loaded.trainable.values()} == {torch.float32}


@pytest.fixture(scope="module")
def benchmarks(tmp_path_factory):
    return write_benchmarks(tmp_path_factory.mktemp("benchmarks"))


CHAT = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}<|assistant|>"


@pytest.fixture
def chat_model(tiny_model, tmp_path):
    """`chat_model(architecture)`: the tiny model with a chat template."""

    def make(architecture):
        folder = shutil.copytree(tiny_model(architecture), tmp_path / f"{architecture} chat")
        (folder / "chat_template.jinja").write_text(CHAT)
        return folder

    return make


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "dtype", "chat"),
    [("llama", "float32", False), ("llama", "bfloat16", True), ("qwen2", "bfloat16", True), ("mpt", "bfloat16", False)],
)
def test_a_recipe_runs_by_every_method(chat_model, benchmarks, tmp_path, monkeypatch, architecture, dtype, chat):
    """PPO-MT, SFT-MT, PPO after SFT, zero-shot and few-shot on four tasks, one regression among them."""
    monkeypatch.chdir(tmp_path)
    if architecture == "qwen2":  # its vocabulary is large: logits by chunks
        monkeypatch.setattr(policy, "LOGITS_AT_ONCE", 400 * 20)
    model = chat_model(architecture)
    command = [str(recipe_of(architecture)), f"model.path={model}", f"data.root={benchmarks}", *SMALL]
    command += [f"model.dtype={dtype}", f"prompt.chat_template={str(chat).lower()}"]
    command += ["data.tasks=[sst2, stsb, mnli, mnli_mm]", "data.mixing=temperature", "name=run"]
    assert main(command, "sft") == 0
    assert main(command) == 0
    assert main([*command, "name=after", "model.adapter=runs/run-sft/adapter"]) == 0
    assert main(command, "eval") == 0
    assert main([*command, "prompt.shots=1", "evaluation.decoding=likelihood"], "eval") == 0
    for folder in ("run-sft", "run", "after", "run-zero-shot", "run-1-shot-likelihood"):
        scores = read_json(tmp_path / "runs" / folder / "eval.json")["after"]
        assert scores.keys() == {"sst2", "stsb", "mnli", "mnli_mm"}
    prompt = read_jsonl(tmp_path / "runs" / "run" / "rollouts.jsonl")[0]["prompt"]
    assert prompt.startswith("<|system|>") == chat and prompt.endswith("<Judgement>")
    assert scores["sst2"]["format_error_rate"] == 0, "a label is always chosen"
    assert len(read_jsonl(tmp_path / "runs" / "run" / "predictions_test.jsonl")) == 12, "three rows per task"
