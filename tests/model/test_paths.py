"""Forward paths: an inexact path is not used, a model without an exact path is refused, training equals sampling."""

import pytest
import torch
from architectures import load, rows
from safetensors.torch import load_file, save_file
from support import CPU, make_policy, write_recipe
from transformers import AutoTokenizer, GPT2Config, MistralConfig

from extensions.common.errors import UserError
from extensions.common.files import read_json
from extensions.data import Example
from extensions.model import loading
from extensions.model.anatomy import Anatomy, examine
from extensions.model.loading import load_policy
from extensions.model.proof import proof_rows, windows_of
from extensions.prefix import attention
from extensions.prefix.logprobs import LogitTransform
from extensions.prefix.tree import pack
from extensions.prompts import PromptEncoder
from extensions.recipe import Lora, Model
from extensions.runs.main import main
from extensions.tasks import TASKS


def test_an_inexact_path_is_not_used(family, monkeypatch):
    """Packed attention without the window: another path is used, and the output of the run says why."""
    monkeypatch.setattr(attention, "_restricted", lambda mask, repeats, visible: mask)
    policy = load(family("mistral"))
    assert policy.path.kind == "masked"
    (why,) = policy.proof.rejected
    assert why.startswith("packed") and "off by up to" in why and why in str(policy.proof)


def test_a_model_without_an_exact_path_is_refused(family, monkeypatch):
    def wrong(lm):
        found = examine(lm)
        return Anatomy(found.trunk, found.hidden_size, LogitTransform(scale=1.01))

    monkeypatch.setattr(loading, "examine", wrong)
    with pytest.raises(UserError, match=r"LlamaForCausalLM has no exact path here.*no shared prefixes.*off by up to"):
        load(family("llama"))


@pytest.mark.parametrize(("model_type", "cache"), [("rwkv", "none"), ("lfm2", "padded")])
def test_paths_with_equally_many_forwards_on_all_ranks(family, model_type, cache):
    """One batch per length of the rows would need different numbers of forwards on the ranks (ZeRO 3)."""
    model = Model(path=str(family(model_type)))
    policy = load_policy(model, Lora(), "none", 1.0, CPU, 0, "base", same_forwards=True)
    assert (policy.path.kind, policy.path.cache) == ("plain", cache)


def test_weights_that_are_nan_are_refused(family):
    path = family("llama")
    weights = load_file(path / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0] = torch.nan
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="NaN or infinite"):
        load(path)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("model_type", ["gpt2", "phimoe", "opt"])
def test_training_mode_equals_the_policy_that_sampled(family, model_type, checkpointing):
    """The base's dropout (0.1 here) and a stochastic router are off, also with gradient checkpointing."""
    path = family(model_type)
    if model_type == "gpt2":
        GPT2Config.from_pretrained(path, attn_pdrop=0.1, resid_pdrop=0.1, embd_pdrop=0.1).save_pretrained(path)
    policy = make_policy(path, checkpointing=checkpointing)
    packed = pack(rows())
    with policy.role("actor"):
        sampled = policy.eval()(packed)["logprobs"]
        again = policy.train()(packed)["logprobs"]
    assert torch.equal(sampled, again)
    assert any(module.training for name, module in policy.named_modules() if "lora_dropout" in name)


@pytest.mark.slow
def test_a_run_prints_its_forward_path(tiny_model, tmp_path, capsys):
    recipe = write_recipe(tmp_path, tiny_model("llama"), output_dir=str(tmp_path / "run"))
    assert main([str(recipe), "evaluation.before=false", "model.attn_implementation=eager"]) == 0
    found = read_json(tmp_path / "run" / "model.json")
    assert found["path"]["kind"] == "masked" and found["forward"]["largest"] < 5e-5
    assert found["model"] in capsys.readouterr().out


@pytest.mark.parametrize(("beyond", "longest"), [(0, 3), (1, 60)])
def test_proof_rows_exceed_a_window_if_rows_of_the_run_do(tiny_model, beyond, longest):
    """Two short rows, and the shortest other row whose prompt and answer exceed the window."""
    encoder = PromptEncoder(AutoTokenizer.from_pretrained(tiny_model("llama")), 500, False)
    task, texts = TASKS["sst2"], (60, 1, 2, 3)
    examples = [Example(task, k, {"sentence": " ".join(["good"] * words)}, "1") for k, words in enumerate(texts)]
    window = len(encoder.encode(task, examples[0].fields)[0]) + 8 - beyond
    found = proof_rows(examples, encoder, MistralConfig(sliding_window=window), 8)
    assert [encoder.tokenizer.decode(sample.prompt).count("good") for sample in found] == [1, 2, longest]
    assert windows_of(MistralConfig(sliding_window=window)) == [window]
