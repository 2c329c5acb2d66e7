"""Adapters that do not match the model are refused everywhere; a merge writes exactly base plus adapter, or nothing."""

import json
import os
import shutil
import sys

import pytest
import torch
import yaml
from conftest import save_tiny_model, tiny_config
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from support import CPU, run_command, write_recipe
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from extensions.common.errors import UserError
from extensions.model import merge
from extensions.model.loading import load_policy
from extensions.model.merge import merge_adapter
from extensions.recipe import Lora, Model
from extensions.runs.main import main as run_main

WEIGHTS = "adapter_model.safetensors"
SETTINGS = {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": ["q_proj", "v_proj"]}
LORA = Lora(rank=4, alpha=8)
Q0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def plain_adapter(folder, base, embeddings=False, **settings):
    """An adapter saved by plain peft, with non-zero B matrices."""
    lm = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**(SETTINGS | settings)))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in lm.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.2, generator=generator)
    lm.save_pretrained(folder, **({} if embeddings else {"save_embedding_layers": False}))
    return folder


@pytest.fixture
def llama(tiny_model):
    return tiny_model("llama")


@pytest.fixture
def adapter(llama, tmp_path):
    return plain_adapter(tmp_path / "adapter", llama)


def changed(adapter, change):
    """The adapter with its weights replaced by `change(tensors)`."""
    save_file(change(load_file(adapter / WEIGHTS)), adapter / WEIGHTS, metadata={"format": "pt"})
    return adapter


def renamed(tensors):
    return {key.replace(".model.model.", ".model.language_model."): tensor for key, tensor in tensors.items()}


def half(tensors):
    return {key: tensor for key, tensor in tensors.items() if ".layers.0." in key}


def twice(tensors):
    return tensors | {key.replace(".layers.1.", ".layers.2."): t.clone() for key, t in tensors.items()}


def wider(tensors):
    """Weights for a hidden size of 48; the base has 32."""
    return {key: torch.zeros(4, 48) if "lora_A" in key else t for key, t in tensors.items()}


MISFITS = {
    "renamed": (
        renamed,
        ["of 8 weights expected", f"8 missing ({Q0}; ", "8 without a layer in the model (base_model.model.lan"],
    ),
    "half of the layers": (half, ["4 missing (base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight; "]),
    "more layers": (twice, ["4 without a layer in the model (base_model.model.model.layers.2.self_attn.q_proj.lora_A"]),
    "another size": (wider, [f"4 of another shape ({Q0}: [4, 48], expected [4, 32]; "]),
}


@pytest.mark.parametrize("change, parts", MISFITS.values(), ids=MISFITS)
@pytest.mark.parametrize("reference", ["start", "base", None], ids=["reference", "training", "evaluation"])
def test_an_adapter_of_another_model_is_refused(llama, adapter, change, parts, reference):
    """The error says what differs and what to do; the base alone is not scored under the adapter's name."""
    model = Model(path=str(llama), adapter=str(changed(adapter, change)))
    with pytest.raises(UserError) as caught:
        load_policy(model, LORA, "none", 1.0, CPU, 0, reference or "base", training=reference is not None)
    for part in [f"model.adapter: {str(adapter)!r} does not match the model", *parts, "Set model.path to", str(llama)]:
        assert part in str(caught.value)


def test_an_adapter_of_another_family_is_refused(tiny_model, adapter):
    model = Model(path=str(tiny_model("mpt")), adapter=str(adapter))
    with pytest.raises(UserError, match=r"does not match the model: no layer of it has the names q_proj, v_proj\. Set"):
        load_policy(model, LORA, "none", 1.0, CPU, 0, "base", training=False)


def test_a_truncated_file_is_refused(llama, adapter):
    (adapter / WEIGHTS).write_bytes((adapter / WEIGHTS).read_bytes()[:1000])
    with pytest.raises(UserError, match=r"model\.adapter: .* cannot be put on the model: .*[hH]eader"):
        load_policy(Model(path=str(llama), adapter=str(adapter)), LORA, "none", 1.0, CPU, 0, "base", training=False)


@pytest.mark.parametrize("method", ["eval", "ppo", "sft"])
def test_a_run_with_an_adapter_of_another_model_exits_with_status_2(
    llama, adapter, tmp_path, monkeypatch, capsys, method
):
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path, llama, lora={"alpha": 8})
    assert run_main([str(recipe), f"model.adapter={changed(adapter, renamed)}"], method) == 2
    error = capsys.readouterr().err
    assert "does not match the model" in error and Q0 in error and "Traceback" not in error


PLAIN = {
    "other layers": {"target_modules": ["k_proj", "down_proj"]},
    "a regular expression": {"target_modules": r".*layers\.1\..*(up|down)_proj"},
    "some blocks": {"layers_to_transform": [1]},
    "all-linear": {"target_modules": "all-linear"},
    "no rslora": {"use_rslora": False, "task_type": "CAUSAL_LM"},
    "head, with a copy of it": {"target_modules": ["q_proj", "lm_head"], "embeddings": True},
}


@pytest.mark.parametrize("settings", PLAIN.values(), ids=PLAIN)
def test_complete_adapters_of_plain_peft_are_evaluated(llama, tmp_path, settings):
    folder = plain_adapter(tmp_path / "adapter", llama, **settings)
    ids = torch.arange(5, 25)[None]
    expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), folder).eval()(ids).logits
    model = Model(path=str(llama), adapter=str(folder), attn_implementation="eager")
    policy = load_policy(model, LORA, "none", 1.0, CPU, 0, "base", training=False).eval()
    with policy.role("actor"), torch.no_grad():
        torch.testing.assert_close(policy.causal_lm(input_ids=ids).logits, expected)


def test_an_adapter_of_some_blocks_is_trained_on(llama, tmp_path):
    folder = plain_adapter(tmp_path / "adapter", llama, layers_to_transform=[1])
    policy = load_policy(Model(path=str(llama), adapter=str(folder)), LORA, "none", 1.0, CPU, 0, "start")
    assert len(policy.trainable) == 4 and all(".layers.1." in name for name in policy.trainable)


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights: pissa"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_r"),
    ],
)
def test_an_adapter_that_changes_the_base_is_refused(llama, adapter, settings, part):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | settings))
    with pytest.raises(UserError, match=rf"more than plain LoRA \({part}"):
        load_policy(Model(path=str(llama), adapter=str(adapter)), LORA, "none", 1.0, CPU, 0, "base", training=False)


def test_a_head_that_differs_from_the_base_is_refused(llama, tmp_path):
    folder = plain_adapter(tmp_path / "adapter", llama, target_modules=["lm_head"], embeddings=True)
    changed(folder, lambda tensors: {k: t + ("base_layer" in k) for k, t in tensors.items()})
    with pytest.raises(UserError, match=r"1 without a layer in the model \(base_model\.model\.lm_head\.base_layer"):
        load_policy(Model(path=str(llama), adapter=str(folder)), LORA, "none", 1.0, CPU, 0, "base", training=False)


# --------------------------------------------------------------------------------------------------------- nlu merge


def nlu_merge(recipe, *arguments):
    """The real command."""
    code = "from extensions.cli.main import main; main()"
    return run_command([sys.executable, "-c", code, "merge", str(recipe), *map(str, arguments)])


def tree(folder):
    return sorted(path.relative_to(folder) for path in folder.rglob("*"))


@pytest.mark.slow
def test_the_command_merges_and_reports_its_check(llama, adapter, tmp_path):
    recipe = write_recipe(tmp_path, llama)
    (tmp_path / "new").mkdir()
    done = nlu_merge(recipe, tmp_path / "new", f"model.adapter={adapter}")
    assert done.returncode == 0, done.stderr
    assert f"merged model: {tmp_path / 'new'}" in done.stdout
    assert "4 layers merged, float32; logprobs of" in done.stdout and "differ by" in done.stdout
    ids = torch.arange(5, 25)[None]
    expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), adapter).eval()(ids).logits
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "new").eval()
    torch.testing.assert_close(merged(ids).logits, expected, atol=1e-4, rtol=1e-4)
    text = "The book was read by Anna."
    assert AutoTokenizer.from_pretrained(tmp_path / "new").encode(text) == AutoTokenizer.from_pretrained(llama).encode(
        text
    )
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    again = nlu_merge(recipe, tmp_path / "new", f"model.adapter={adapter}")
    assert again.returncode == 2 and "is not empty" in again.stderr and again.stdout == ""


@pytest.mark.slow
def test_the_command_refuses_an_adapter_of_another_model(llama, adapter, tmp_path):
    recipe = write_recipe(tmp_path, llama)
    changed(adapter, renamed)
    before = tree(tmp_path)
    done = nlu_merge(recipe, tmp_path / "deep" / "new", f"model.adapter={adapter}")
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    assert "does not match the model" in done.stderr and Q0 in done.stderr
    assert tree(tmp_path) == before


@pytest.mark.parametrize("change, parts", MISFITS.values(), ids=MISFITS)
def test_an_adapter_of_another_model_is_not_merged(llama, adapter, tmp_path, change, parts):
    changed(adapter, change)
    before = tree(tmp_path)
    with pytest.raises(UserError, match="does not match the model") as caught:
        merge_adapter(Model(path=str(llama), adapter=str(adapter)), tmp_path / "deep" / "new")
    assert all(part in str(caught.value) for part in parts)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("target", "part"),
    [("file", "exists and is no folder"), ("full", "is not empty"), ("file/new", "cannot be written there")],
)
def test_merging_overwrites_nothing(llama, adapter, tmp_path, monkeypatch, target, part):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    before = tree(tmp_path)
    monkeypatch.setattr(merge, "load_base", lambda *_: pytest.fail("the model was loaded first"))
    with pytest.raises(UserError, match=part):
        merge_adapter(Model(path=str(llama), adapter=str(adapter)), tmp_path / target)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_merging_keeps_the_dtype_and_rounds_once(llama, tmp_path, dtype):
    """The dtype is that of the base's files, and a delta is added in float32, so that a small one is not lost."""
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(llama, dtype=dtype).save_pretrained(base)
    AutoTokenizer.from_pretrained(llama).save_pretrained(base)
    adapter = plain_adapter(tmp_path / "adapter", llama)
    merged = merge_adapter(Model(path=str(base), adapter=str(adapter)), tmp_path / "merged")
    assert f"4 layers merged, {dtype}" in str(merged)
    ours, old, lora = (load_file(next(f.glob("*.safetensors"))) for f in (tmp_path / "merged", base, adapter))
    assert ours.keys() == old.keys() and {str(t.dtype) for t in ours.values()} == {f"torch.{dtype}"}
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == dtype
    for name, weight in old.items():
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        if f"{key}A.weight" in lora:
            delta = lora[f"{key}B.weight"] @ lora[f"{key}A.weight"] * (8 / 4**0.5)
            weight = (weight.float() + delta).to(weight.dtype)
        assert torch.equal(ours[name], weight), name


def test_merging_saves_the_original_configuration_of_the_base(llama, adapter, tmp_path, monkeypatch):
    """Changes to the configuration that loading makes for a run are not saved."""
    base = shutil.copytree(llama, tmp_path / "base")
    config = json.loads((base / "config.json").read_text()) | {"attention_dropout": 0.1}
    (base / "config.json").write_text(json.dumps(config))

    def without_dropout(*arguments):
        loaded = load_base(*arguments)
        loaded.config.attention_dropout = 0.0
        return loaded

    load_base = merge.load_base
    monkeypatch.setattr(merge, "load_base", without_dropout)
    merge_adapter(Model(path=str(base), adapter=str(adapter)), tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "config.json").read_text()) == config


def test_a_base_with_unused_sampling_settings_is_merged(llama, adapter, tmp_path):
    """transformers loads such a generation_config.json and refuses to save it."""
    base = shutil.copytree(llama, tmp_path / "base")
    (base / "generation_config.json").write_text(json.dumps({"temperature": 0.9, "top_p": 0.6}))
    merge_adapter(Model(path=str(base), adapter=str(adapter)), tmp_path / "merged")
    assert "temperature" not in json.loads((tmp_path / "merged" / "generation_config.json").read_text())


def test_the_head_of_a_tied_model_is_not_merged(tmp_path):
    """The embedding would change with it: the tiny model's logits did by 17.6."""
    base = tmp_path / "base"

    def tied(vocabulary):
        config = tiny_config("llama", vocabulary)
        assert isinstance(config, LlamaConfig)
        config.tie_word_embeddings = True
        return config

    save_tiny_model(base, tied)
    adapter = plain_adapter(tmp_path / "adapter", base, target_modules=["q_proj", "lm_head"])
    model = Model(path=str(base), adapter=str(adapter))
    with pytest.raises(UserError, match=r"LoRA on lm_head, whose weight is also that of model\.embed_tokens"):
        merge_adapter(model, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    with pytest.raises(UserError, match=r"LoRA on lm_head, .* lora\.target_modules=auto"):
        load_policy(model, LORA, "none", 1.0, CPU, 0, "start")


def test_a_merged_model_that_differs_is_not_written(llama, adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(merge, "_merge", lambda lm, path: 4)
    before = tree(tmp_path)
    with pytest.raises(UserError, match=r"merged: not written: the merged model differs from base and adapter: 4"):
        merge_adapter(Model(path=str(llama), adapter=str(adapter)), tmp_path / "merged")
    assert tree(tmp_path) == before


def test_a_full_disk_leaves_no_files(llama, adapter, tmp_path, monkeypatch):
    before = tree(tmp_path)

    def full(self, folder, **_):
        (folder / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.LlamaForCausalLM.save_pretrained", full)
    with pytest.raises(UserError, match=r"cannot be written there: .*No space left"):
        merge_adapter(Model(path=str(llama), adapter=str(adapter)), tmp_path / "deep" / "merged")
    assert tree(tmp_path) == before


FAMILIES = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4},  # weights are (in, out)
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},  # casts what its head reads
    "qwen3_5_text": {  # every other block has linear attention
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
    },
}


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_are_merged(tmp_path, family):
    """In bfloat16, but compared in float32: only the merged weights are rounded."""
    tokens = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": None}
    base = tmp_path / "base"
    save_tiny_model(base, lambda size: AutoConfig.for_model(family, vocab_size=size, **FAMILIES[family], **tokens))
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(base)
    made = load_policy(Model(path=str(base), attn_implementation="eager"), LORA, "none", 1.0, CPU, 0, "base")
    for name, parameter in made.lm.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.2)
    made.lm.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    merged = merge_adapter(Model(path=str(base), adapter=str(tmp_path / "adapter")), tmp_path / "merged")
    assert merged.layers == (3 if family == "qwen3_5_text" else 2) and merged.dtype == torch.bfloat16
    assert 0 < merged.mean < 0.01 < merged.effect
    assert merged.mean < merged.effect / 10
    configs = [json.loads((folder / "config.json").read_text()) for folder in (base, tmp_path / "merged")]
    assert configs[0] == configs[1], "dropout and all"


def test_merging_into_a_relative_path_with_the_usual_permissions(llama, adapter, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = yaml.safe_load(write_recipe(tmp_path, llama).read_text())
    merge_adapter(Model(path=recipe["model"]["path"], adapter=str(adapter)), tmp_path.__class__("one/two"))
    (tmp_path / "three").mkdir()
    assert (tmp_path / "one" / "two").stat().st_mode == (tmp_path / "three").stat().st_mode
    assert os.listdir(tmp_path / "one") == ["two"]
