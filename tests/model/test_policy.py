"""The shared-prefix forward against plain forwards, and the roles against stand-alone models."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support import ARCHITECTURES, CPU, make_policy, nested_prompts, samples
from torch import nn
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, MistralConfig, MptConfig, Qwen2Config

from extensions.common.errors import UserError
from extensions.model.loading import attention_of, load_policy, load_tokenizer
from extensions.model.policy import ForwardPath, ValueHead
from extensions.prefix.logprobs import token_entropy
from extensions.prefix.tree import Sample, pack
from extensions.recipe import Lora, Model


def plain(policy, sample, head=True):
    """Logprobs, entropy and values of one sample by an ordinary forward of the whole causal LM, without packing."""
    ids = torch.tensor([[*sample.prompt, *sample.response]])
    out = policy.lm.base_model.model(input_ids=ids, output_hidden_states=True, use_cache=False)
    first = len(sample.prompt) - 1
    logits = out.logits[0, first:-1].float()
    logprobs = logits.log_softmax(-1).gather(-1, torch.tensor(sample.response)[:, None])[:, 0]
    return logprobs, token_entropy(logits), policy.value_head(out.hidden_states[-1][0, first:-1])


def gradients(module):
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("nested", [False, True], ids=["prefix", "nested"])
def test_the_shared_prefix_forward_equals_the_plain_forward(tiny_model, architecture, checkpointing, nested):
    rows = (
        [Sample(prompt, [7, 8, 9][: 1 + i % 3]) for i, prompt in enumerate(nested_prompts())] if nested else samples()
    )
    packed_policy = make_policy(tiny_model(architecture), checkpointing=checkpointing).train()
    plain_policy = make_policy(tiny_model(architecture)).train()
    weights = torch.randn(sum(len(s.response) for s in rows), generator=torch.Generator().manual_seed(5))

    with packed_policy.role("actor"):
        out = packed_policy(pack(rows), entropy="differentiable")
        (out["logprobs"] @ weights + out["values"].square().sum() + out["entropy"].sum()).backward()
    with plain_policy.role("actor"):
        results = [plain(plain_policy, row) for row in rows]
        logprobs, entropy, values = (torch.cat([r[k] for r in results]) for k in range(3))
        (logprobs @ weights + values.square().sum() + entropy.sum()).backward()

    for name, expected in (("logprobs", logprobs), ("entropy", entropy), ("values", values)):
        torch.testing.assert_close(out[name], expected, atol=2e-5, rtol=1e-4)
    ours, theirs = gradients(packed_policy), gradients(plain_policy)
    assert ours.keys() == theirs.keys() and any("lora_A" in name for name in ours)
    for name in ours:
        torch.testing.assert_close(
            ours[name], theirs[name], atol=2e-5, rtol=1e-3, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["masked", "plain"])
def test_packed_masked_and_plain_forwards_are_equal(tiny_model, kind, implementation):
    policy, other = make_policy(tiny_model("qwen2")).eval(), make_policy(tiny_model("qwen2")).eval()
    other.use(ForwardPath(kind, implementation))
    assert policy.path.kind == "packed"
    packed = pack([Sample(prompt, [7, 8]) for prompt in nested_prompts()])
    with torch.no_grad(), policy.role("actor"), other.role("actor"):
        torch.testing.assert_close(policy.packed_states(packed), other.packed_states(packed), atol=2e-5, rtol=1e-4)


def test_the_attention_that_a_model_is_loaded_with():
    auto = Model(path="x")
    for config in (LlamaConfig(), Qwen2Config(), MistralConfig(sliding_window=64), Gemma2Config(), MptConfig()):
        assert attention_of(auto, config) == "packed"
    assert attention_of(Model(path="x", attn_implementation="eager"), LlamaConfig()) == "eager"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_batch_without_shared_prefixes_equals_the_plain_forward(tiny_model, architecture):
    policy = make_policy(tiny_model(architecture)).eval()
    rows = samples()
    alone = [Sample(row.prompt, row.response) for row in rows]
    with torch.no_grad(), policy.role("actor"):
        together, apart = policy(pack(rows)), policy(pack(alone))
        one_by_one = torch.cat([policy(pack([row]))["logprobs"] for row in rows])
    torch.testing.assert_close(together["logprobs"], apart["logprobs"], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(together["logprobs"], one_by_one, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_sample_does_not_depend_on_others(tiny_model, architecture):
    policy = make_policy(tiny_model(architecture)).eval()
    rows = samples()
    noisy = [
        rows[0],
        *(Sample([*r.prompt[:9], *[7] * (len(r.prompt) - 9)], [11] * len(r.response)) for r in rows[1:3]),
    ]
    with torch.no_grad(), policy.role("actor"):
        clean, dirty = policy(pack(rows[:3])), policy(pack(noisy))
    n = len(rows[0].response)
    torch.testing.assert_close(clean["logprobs"][:n], dirty["logprobs"][:n], atol=1e-6, rtol=1e-6)
    assert not torch.allclose(clean["logprobs"][n:], dirty["logprobs"][n:])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("critic", ["shared", "adapter"])
def test_reference_is_the_base_bit_for_bit(tiny_model, architecture, critic):
    """With the adapters off, the logits are those of the untouched model, not only close to them."""
    folder = tiny_model(architecture)
    policy = make_policy(folder, critic=critic).eval()
    base = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor([samples()[0].prompt])
    with torch.no_grad(), policy.role("reference"):
        ours = policy.trunk(input_ids=ids).last_hidden_state
    with torch.no_grad():
        assert torch.equal(ours, base.base_model(input_ids=ids).last_hidden_state)
        with policy.role("actor"):
            assert not torch.equal(ours, policy.trunk(input_ids=ids).last_hidden_state)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_role_gradients_are_those_of_stand_alone_models(tiny_model, architecture, checkpointing):
    """Actor and critic on one base, as in training, against two separate models that do not switch adapters."""
    folder, row = tiny_model(architecture), samples()[0]
    policy = make_policy(folder, critic="adapter", checkpointing=checkpointing).train()
    expected = {}
    for role in ("actor", "critic"):
        adapter = {"actor": "default", "critic": "critic"}[role]
        base = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
        lora = policy.lm.peft_config[adapter]
        config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, use_rslora=True, target_modules=lora.target_modules)
        alone = get_peft_model(base, config).train()
        theirs = {
            name.replace(f".{adapter}.", ".default."): p
            for name, p in policy.lm.named_parameters()
            if f".{adapter}." in name
        }
        for name, parameter in alone.named_parameters():
            if "lora_" in name:
                parameter.data.copy_(theirs[name])
        head = copy.deepcopy(policy.value_head)
        ids = torch.tensor([[*row.prompt, *row.response]])
        out = alone(input_ids=ids, output_hidden_states=True, use_cache=False)
        first = len(row.prompt) - 1
        if role == "actor":
            targets = torch.tensor(row.response)[:, None]
            out.logits[0, first:-1].float().log_softmax(-1).gather(-1, targets).sum().backward()
        else:
            head(out.hidden_states[-1][0, first:-1]).square().sum().backward()
        expected[role] = gradients(alone)

    with policy.role("actor"):
        policy(pack([row]), values=False)["logprobs"].sum().backward()
    with policy.role("critic"):
        policy(pack([row]), logprobs=False)["values"].square().sum().backward()
    ours = gradients(policy.lm)
    for role, adapter in (("actor", "default"), ("critic", "critic")):
        assert expected[role], role
        for name, gradient in expected[role].items():
            found = ours[name.replace(".default.", f".{adapter}.")]
            torch.testing.assert_close(found, gradient, atol=2e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")
    assert all("lora_" in name for name in ours), "a base weight got a gradient"


def test_roles_do_not_nest_and_a_forward_needs_one(tiny_model):
    policy = make_policy(tiny_model("llama"))
    with policy.role("actor"), pytest.raises(AssertionError, match="must span"), policy.role("critic"):
        pass
    with pytest.raises(AssertionError, match="needs a role"):
        policy(pack(samples()))


def test_only_adapters_and_head_are_trainable(tiny_model):
    policy = make_policy(tiny_model("llama"), critic="adapter")
    for name, parameter in policy.named_parameters():
        assert parameter.requires_grad == ("lora_" in name or name.startswith("value_head."))
    with policy.role("reference"):
        pass
    with policy.role("critic"):
        assert all(p.requires_grad for n, p in policy.named_parameters() if "lora_" in n)


def test_bfloat16_base_keeps_float32_adapters(tiny_model):
    policy = make_policy(tiny_model("llama"), dtype="bfloat16")
    assert policy.causal_lm.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for p in policy.trainable.values())
    with policy.role("actor"):
        assert all(v.dtype == torch.float32 for v in policy(pack(samples()), entropy="differentiable").values())


def test_value_head_starts_at_zero_and_is_an_mlp():
    head = ValueHead(8)
    assert (head(torch.randn(3, 8)) == 0).all()
    assert sum(isinstance(m, nn.Linear) for m in head.modules()) == 2


def test_saved_adapter_loads_with_plain_peft(tiny_model, tmp_path):
    from peft import PeftModel

    from extensions.distributed.strategy import trainable_state

    folder = tiny_model("qwen2")
    policy = make_policy(folder, critic="adapter").eval()
    state = trainable_state(policy)
    policy.save_adapter(tmp_path / "adapter", state)
    policy.save_critic(tmp_path / "critic", state)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter").eval()
    ids = torch.tensor([samples()[0].prompt])
    with torch.no_grad(), policy.role("actor"):
        torch.testing.assert_close(loaded(input_ids=ids).logits, policy.causal_lm(input_ids=ids).logits)
    assert {p.name for p in (tmp_path / "critic").iterdir()} >= {"value_head.safetensors", "critic"}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_lora_targets_of_each_family(tiny_model, architecture):
    policy = make_policy(tiny_model(architecture))
    targets = set(policy.lm.peft_config["default"].target_modules)
    assert targets == ({"Wqkv"} if architecture == "mpt" else {"q_proj", "v_proj"})


@pytest.mark.parametrize(
    ("model", "lora", "message"),
    [
        ({"path": "no/such/model"}, {}, "model.path: cannot load 'no/such/model'"),
        ({"path": "pip:no-such-package"}, {}, "package 'no-such-package' is not installed"),
        ({"path": "pip:pyyaml"}, {}, "holds 0 .gguf or .zip files"),
        ({"load_in_4bit": True}, {}, "load_in_4bit: true needs a GPU"),
        ({}, {"target_modules": ["qq_proj"]}, "no linear layer 'qq_proj'"),
    ],
)
def test_errors_of_wrong_models(tiny_model, monkeypatch, model, lora, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=message):
        load_policy(Model(**({"path": str(tiny_model("llama"))} | model)), Lora(**lora), "shared", 1.0, CPU, 0, "base")


def test_remote_code_is_off_unless_asked(tiny_model, tmp_path):
    """A model folder with its own Python code is refused."""
    import json
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(tiny_model("llama"), folder)
    config = json.loads((folder / "config.json").read_text())
    marker = tmp_path / "ran"
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\n")
    with pytest.raises(UserError, match=r"set model\.trust_remote_code: true"):
        load_policy(Model(path=str(folder)), Lora(), "shared", 1.0, CPU, 0, "base")
    assert not marker.exists()
    load_tokenizer(Model(path=str(tiny_model("llama"))))
