"""The comparison at load: it finds damaged files and wrong paths, also if rounding or short rows would hide them."""

import json
from types import SimpleNamespace

import pytest
import torch
from architectures import load, quiet, rows, save
from conftest import save_tiny_model, tiny_tokenizer
from safetensors.torch import load_file, save_file
from support import CPU, write_recipe
from tiny_models import causal_classes, shrunk
from transformers import AutoModelForCausalLM, T5Config

from extensions.common.errors import UserError
from extensions.data import Example
from extensions.distributed.strategy import Strategy
from extensions.model import loading
from extensions.model.loading import load_base, load_policy, prompt_limit
from extensions.model.precision import computing_in_float32
from extensions.model.proof import proof_rows
from extensions.prefix.limits import PackLimit
from extensions.prefix.tree import Sample, pack
from extensions.prompts import PromptEncoder
from extensions.recipe import DeepSpeed, Lora, Model, Optimizer, Schedule, load_recipe
from extensions.tasks import TASKS


def loaded(folder, samples=(), **model):
    return load_policy(
        Model(path=str(folder), **model), Lora(rank=4, dropout=0.0), "none", 1.0, CPU, 0, "base", rows=samples
    )


def ids(count, seed):
    return torch.randint(5, 300, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_rounding_does_not_hide_an_encoder(model_type, tmp_path):
    with quiet(), pytest.raises(UserError, match="is not causal"):
        save(model_type, tmp_path)
        loaded(tmp_path, rows(), dtype="bfloat16")


def test_rounding_does_not_hide_a_wrong_path(tmp_path):
    """ALiBi from the mask of a pack is wrong for every sample, by less than the rounding of bfloat16."""
    with quiet():
        save("bloom", tmp_path)
        policy = loaded(tmp_path, rows(), dtype="bfloat16")
    assert policy.path.kind == "plain" and {p.dtype for p in policy.causal_lm.parameters() if not p.requires_grad} == {
        torch.bfloat16
    }


def test_small_weights_do_not_hide_a_wrong_path(tmp_path):
    """A convolution over a pack mixes samples; at initial weights by no more than 2e-5 nats."""
    with quiet():
        config_class, _ = causal_classes()["lfm2"]
        save_tiny_model(tmp_path, lambda vocabulary: shrunk(config_class, vocab_size=vocabulary))
        assert loaded(tmp_path, rows()).path.kind == "plain"


def test_sdpa_without_capped_scores_is_refused(tmp_path):
    with quiet(), pytest.raises(UserError, match=r"sdpa ignores attn_logit_softcapping 0.5"):
        save("gemma2", tmp_path)
        loaded(tmp_path, rows(), attn_implementation="sdpa")


@pytest.mark.parametrize("size", [1e-4, 1.0])
def test_a_stochastic_forward_is_refused(size, tmp_path, monkeypatch):
    def noisy(*args):
        base = load_base(*args)
        base.model.layers[1].register_forward_hook(lambda *a: a[2] + size * torch.randn_like(a[2]))
        return base

    monkeypatch.setattr(loading, "load_base", noisy)
    with quiet(), pytest.raises(UserError, match=r"different logits for the same tokens|not a function of"):
        save("llama", tmp_path)
        loaded(tmp_path, rows())


def test_computing_in_float32_restores_the_weights(tmp_path):
    with quiet():
        save("llama", tmp_path)
        lm = load_base(Model(path=str(tmp_path), dtype="bfloat16"), CPU)
    before = {name: weight.clone() for name, weight in lm.state_dict().items()}
    handle = lm.model.layers[2].mlp.register_forward_hook(lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError), computing_in_float32(lm):
        lm(input_ids=torch.tensor([[5, 6, 7]]))
    handle.remove()
    after = lm.state_dict()
    assert all(after[name].dtype == w.dtype and torch.equal(after[name], w) for name, w in before.items())


@pytest.mark.parametrize("own", [4, 60])
def test_llama_4_scales_by_position_at_every_length(own, tmp_path):
    """Its scale grows from index 40 of a forward on; packs of 12 rows that are shorter or longer than that."""
    config_class, _ = causal_classes()["llama4_text"]
    with quiet():
        config = shrunk(config_class, floor_scale=40, attn_scale=1.0, attn_temperature_tuning=True)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
        policy = loaded(tmp_path, [Sample(ids(6, 1), ids(3, 2)), Sample(ids(9, 3), ids(4, 4))])
        lm = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    samples = [Sample(ids(own, 20 + k), ids(6, 60 + k)) for k in range(12)]
    policy.eval()
    with policy.role("actor"), torch.no_grad():
        found = policy(pack(samples), values=False)["logprobs"]
        decoder = policy.prefill([s.prompt for s in samples], PackLimit(12), 6)
        decoded = [policy.logits(decoder.states)]
        decoded.append(policy.logits(decoder.step(torch.tensor([samples[i].response[0] for i in decoder.order]))))
        own_logits = [lm(torch.tensor([[*s.prompt, *s.response]])).logits[0, own - 1 : -1] for s in samples]
    targets = [torch.tensor(s.response)[:, None] for s in samples]
    expected = [x.log_softmax(-1).gather(-1, t)[:, 0] for x, t in zip(own_logits, targets, strict=True)]
    torch.testing.assert_close(found, torch.cat(expected), atol=1e-5, rtol=1e-5)
    for step, logits in enumerate(decoded):
        wanted = torch.stack([own_logits[i][step] for i in decoder.order])
        torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=1e-5)


def test_longrope_limits_the_context_to_its_original_length(tmp_path):
    config_class, _ = causal_classes()["phi3"]
    factors = {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
    config = shrunk(
        config_class,
        max_position_embeddings=4096,
        original_max_position_embeddings=512,
        rope_parameters={"rope_type": "longrope", "rope_theta": 10000.0, "factor": 8.0} | factors,
    )
    recipe = load_recipe(write_recipe(tmp_path, tmp_path), ["rollout.response_budget=[3, 12]"], "ppo")
    assert prompt_limit(recipe, config) == 500
    assert prompt_limit(recipe, shrunk(causal_classes()["llama"][0], max_position_embeddings=4096)) == 4084


def test_a_window_that_only_the_response_exceeds_is_compared():
    task = TASKS["sst2"]
    examples = [Example(task, k, {"sentence": "a fine film " * (k + 1)}, next(iter(task.labels))) for k in range(3)]
    encoder = PromptEncoder(tiny_tokenizer(), 1000, False)
    shortest = len(encoder.encode(task, examples[0].fields)[0])
    window = shortest + 20

    def found(**config):
        text = SimpleNamespace(**config)
        return proof_rows(examples, encoder, SimpleNamespace(get_text_config=lambda: text), 32)

    assert max(len(s.prompt) + len(s.response) for s in found(vocab_size=400, sliding_window=window)) > window
    with pytest.raises(UserError, match=r"400 tokens, but config.json says vocab_size 100"):
        found(vocab_size=100)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda w, c: w.pop("model.layers.1.self_attn.q_proj.weight"), "1 weights are missing from its files"),
        (lambda w, c: w.update({"model.layers.9.mlp.up_proj.weight": torch.ones(2, 2)}), "have no place in the model"),
        (lambda w, c: w.update({"model.layers.1.mlp.up_proj.bias": torch.ones(64)}), "have no place in the model"),
        (lambda w, c: c.update(num_hidden_layers=5), "9 weights are missing from its files"),
        (lambda w, c: c.update(num_hidden_layers=3), "9 weights have no place in the model"),
        (lambda w, c: c.update(hidden_size="big"), "cannot load"),
        (lambda w, c: c.update(num_attention_heads=0), "cannot load"),
        (lambda w, c: w.update({"model.layers.1.mlp.up_proj.weight": torch.ones(2, 2)}), "cannot load"),
    ],
)
def test_files_of_different_models_are_refused(damage, said, tmp_path):
    with quiet():
        save("llama", tmp_path)
        weights, config = load_file(tmp_path / "model.safetensors"), json.loads((tmp_path / "config.json").read_text())
        damage(weights, config)
        save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match=said):
            load(tmp_path)


def test_unsupported_gradient_checkpointing_is_refused(tmp_path):
    with quiet(), pytest.raises(UserError, match="gradient_checkpointing: true, but transformers has none for CTRL"):
        save("ctrl", tmp_path)
        loaded(tmp_path, gradient_checkpointing=True)


def test_convolutions_are_not_sharded(tmp_path):
    """DeepSpeed does not gather weights that are read without a call of their module."""
    with quiet():
        save("lfm2", tmp_path)
        policy = loaded(tmp_path)
    strategy = Strategy(0, DeepSpeed(zero_stage=3), 0.0)
    strategy.setup_distributed()
    with pytest.raises(UserError, match=r"zero_stage: 3 cannot shard a model .*layers.0.conv.conv"):
        strategy.wrap(policy, policy.parameter_groups(), Optimizer(), Schedule(), 1)


def test_truncated_weights_are_refused(tmp_path):
    with quiet():
        save("llama", tmp_path)
        path = tmp_path / "model.safetensors"
        path.write_bytes(path.read_bytes()[:5000])
        with pytest.raises(UserError, match="cannot load"):
            load(tmp_path)


def test_a_model_without_a_causal_lm_is_refused_by_its_name(tmp_path):
    T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=40).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"is no decoder-only language model: .* no causal LM for T5Config$"):
        load_base(Model(path=str(tmp_path)), CPU)
