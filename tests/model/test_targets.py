"""Modules that get LoRA in the families of transformers; models are built on the meta device, without weights."""

import re

import pytest
import torch
from conftest import save_tiny_model
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from support import CPU, make_policy, samples
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, GPT2Config
from transformers.pytorch_utils import Conv1D

from extensions.common.errors import UserError
from extensions.model.adapters import lora_config
from extensions.model.loading import load_policy
from extensions.planner.flops import ModelShape
from extensions.prefix.tree import pack
from extensions.recipe import Lora, Model

Q_AND_V = {"q_proj", "v_proj"}
SPLIT = (
    "llama qwen2 qwen3 gemma2 gemma3_text phi gptj gpt_neo opt mistral mixtral starcoder2 cohere granite olmo2 olmo3"
)
SPLIT += " stablelm gpt_oss recurrent_gemma nemotron_h falcon_h1"
# Model type -> names, read off the attention of its modeling file in transformers 5.15.
CHOICES: dict[str, set[str]] = {
    **{key: Q_AND_V for key in SPLIT.split()},
    **{key: {"query_key_value"} for key in ("gpt_neox", "bloom", "falcon", "persimmon")},
    **{key: {"qkv_proj"} for key in ("phi3", "phi4_multimodal", "codegen")},
    **{key: {"c_attn"} for key in ("gpt2", "gpt_bigcode", "openai-gpt")},
    "mpt": {"Wqkv"},
    "bert": {"query", "value"},
    "ctrl": {"Wq", "Wv"},
    "xlm": {"q_lin", "v_lin"},
    "deepseek_v3": {"q_b_proj", "kv_b_proj"},  # multi-head latent attention: both from a compressed state
    "deepseek_v32": {"q_b_proj", "kv_b_proj"},  # not the indexer, which chooses the tokens that are attended to
    "jetmoe": {"kv_proj"},  # its queries are experts, one tensor
    "jamba": Q_AND_V,
    "olmo_hybrid": Q_AND_V,  # in attention and linear attention
    "qwen3_5_text": {"q_proj", "v_proj", "in_proj_qkv"},
    "qwen3_next": {"q_proj", "v_proj", "in_proj_qkvz"},
    "minimax": {"q_proj", "v_proj", "qkv_proj"},
    "zamba": Q_AND_V,
    "mamba": {"in_proj"},
    "mamba2": {"in_proj"},
    "falcon_mamba": {"in_proj"},
    "xlstm": {"q", "v"},
    "rwkv": {"attention.receptance", "attention.value"},  # receptance is its query; feed_forward has both names too
    "bart": {"self_attn.q_proj", "self_attn.v_proj"},  # encoder_attn is not used by a decoder alone
}
# Settings that a type needs besides its defaults: some are broken, some have none of their special layers.
SETTINGS = {
    "lfm2": {"layer_types": ["conv", "full_attention"] * 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 16},
    "bamba": {"attn_layer_indices": [3]},
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "reformer": {"is_decoder": True},
}
# Type -> names and the number of its layers that have them, of 32.
HYBRIDS = {"lfm2": 16, "lfm2_moe": 16, "granitemoehybrid": 16, "bamba": 1, "jamba": 4, "qwen3_5_text": 8}
# Need another package, another model, or a configuration that transformers 5.15 cannot make by itself.
NOT_BUILT = {
    "dbrx",
    "dots1",
    "gemma3n",
    "gemma4_assistant",
    "gemma4_unified_assistant",
    "musicgen",
    "musicgen_melody",
}
REFUSED = {"xlnet"}  # its projections are no linear layers


def build(model_type, **settings):
    config = AutoConfig.for_model(model_type, **SETTINGS.get(model_type, {}), **settings)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def choose(model, wanted="auto"):
    """The `target_modules` passed to peft, and the names of the layers that get LoRA."""
    config = lora_config(model, Lora(target_modules=wanted))
    targets = config.target_modules
    with torch.device("meta"):
        base = get_peft_model(model, config).get_base_model()
    return targets, {name for name, module in base.named_modules() if isinstance(module, LoraLayer)}


@pytest.mark.parametrize("model_type", CHOICES)
def test_auto_takes_query_and_value(model_type):
    targets, layers = choose(build(model_type))
    assert targets == CHOICES[model_type]
    if model_type in ("llama", "qwen3"):
        assert len(layers) == 64, "two in each of 32 blocks"


@pytest.mark.parametrize("model_type", HYBRIDS)
def test_auto_takes_the_blocks_of_a_hybrid_that_have_them(model_type):
    _, layers = choose(build(model_type))
    assert sum(name.endswith(".q_proj") for name in layers) == HYBRIDS[model_type]
    assert sum(name.endswith(".v_proj") for name in layers) == HYBRIDS[model_type]


def test_auto_excludes_other_modalities():
    targets, layers = choose(build("gemma3"))
    assert isinstance(targets, str), "the same names in the vision tower: a regular expression"
    expected = {f"model.language_model.layers.{k}.self_attn.{p}_proj" for k in range(26) for p in "qv"}
    assert layers == expected


ELSEWHERE = re.compile(r"mlp|ffn|feed_forward|expert|router|vision|image|audio|speech|patcher|indexer|embed")


@pytest.mark.slow
def test_auto_in_every_family():
    """The targets are inside token mixers, or the error says what to do."""
    types = {config.model_type for config in MODEL_FOR_CAUSAL_LM_MAPPING}
    refused = set()
    for model_type in sorted(types - NOT_BUILT):
        model = build(model_type)
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        linear = {n for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
        outer = {name for name, module in model.named_modules() if module is head or module is embedding}
        try:
            _, layers = choose(model)
        except UserError as error:
            refused.add(model_type)
            assert re.search(r"finds no query and value .* lora\.target_modules=\[NAME, \.\.\.\], or use", str(error))
            continue
        assert layers and layers <= linear - outer, model_type
        assert not any(ELSEWHERE.search(name.rpartition(".")[0]) for name in layers), model_type
        assert any(re.search("att|mixer|mamba|lstm|temporal", name) for name in layers), model_type
    assert refused == REFUSED and len(types) > 150


# ------------------------------------------------------------------------------------------------- all-linear, lists


def test_all_linear_is_every_linear_layer_but_the_head():
    every = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    targets, layers = choose(build("llama"), "all-linear")
    assert targets == every and len(layers) == 7 * 32


def test_all_linear_excludes_layers_that_peft_refuses():
    """Mamba's kernels take the weight of out_proj, not its output."""
    targets, _ = choose(build("mamba2"), "all-linear")
    assert targets == {"in_proj"}


def test_all_linear_continues_from_its_adapter(tiny_model, tmp_path):
    model = Model(path=str(tiny_model("llama")))
    made = load_policy(model, Lora(rank=4, target_modules="all-linear"), "none", 1.0, CPU, 0, "base")
    made.lm.save_pretrained(tmp_path, save_embedding_layers=False)
    again = model.model_copy(update={"adapter": str(tmp_path)})
    load_policy(again, Lora(rank=4, target_modules="all-linear"), "none", 1.0, CPU, 0, "start")
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    load_policy(again, Lora(rank=4, target_modules=names), "none", 1.0, CPU, 0, "start")
    advice = re.escape("add: lora.target_modules=[down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj]")
    with pytest.raises(UserError, match=advice):
        load_policy(again, Lora(rank=4), "none", 1.0, CPU, 0, "start")


@pytest.mark.parametrize(
    ("model_type", "targets", "parts"),
    [
        ("llama", ["qproj"], ["no linear layer 'qproj'; did you mean 'q_proj'?", "attention: k_proj, o_proj, q_proj"]),
        (
            "llama",
            ["q_proj", "zz"],
            ["no linear layer 'zz'. Its linear layers: attention: k_", "others: down_proj"],
        ),
        ("llama", ["embed_tokens"], ["'embed_tokens'", "is Embedding", "attention: k_proj"]),
        ("jetmoe", ["input_linear"], ["is JetMoeParallelExperts", "attention: kv_proj"]),
        ("mamba2", ["out_proj"], ["without its LoRA"]),
        ("gemma2", ["q_proj", "lm_head"], ["'lm_head' is tied to the embedding", "tie_word_embeddings", "remove it"]),
        ("gemma2", ["embed_tokens"], ["'embed_tokens' is tied to the embedding", "tie_word_embeddings"]),
    ],
)
def test_errors_of_wrong_targets(model_type, targets, parts):
    with pytest.raises(UserError) as caught:
        lora_config(build(model_type), Lora(target_modules=targets))
    assert str(caught.value).startswith("lora.target_modules: ")
    for part in parts:
        assert part in str(caught.value)


def test_the_head_of_an_untied_model_can_have_lora():
    assert choose(build("llama"), ["q_proj", "lm_head"])[0] == {"q_proj", "lm_head"}


# ------------------------------------------------------------------------------------------------------------- GPT-2


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """Folder of a tiny GPT-2, whose layers are Conv1D."""
    folder = tmp_path_factory.mktemp("gpt2")
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512, "bos_token_id": None, "eos_token_id": 0}
    save_tiny_model(folder, lambda vocabulary: GPT2Config(vocab_size=vocabulary, **sizes))
    return folder


def test_gpt2_gets_a_gradient(gpt2, recwarn):
    """Its weights are (in, out): B A is added transposed, and peft does not warn about fan_in_fan_out."""
    policy = make_policy(gpt2).eval()
    assert not [w for w in recwarn if "fan_in_fan_out" in str(w.message)]
    with policy.role("actor"):
        policy(pack(samples()))["logprobs"].sum().backward()
    grads = {name: p.grad for name, p in policy.trainable.items() if "lora_" in name}
    assert len(grads) == 4 and all(g is not None and g.abs().sum() > 0 for g in grads.values())
    layer = policy.causal_lm.transformer.h[0].attn.c_attn
    x = torch.randn(3, 32)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    weight = load_file(gpt2 / "model.safetensors")["transformer.h.0.attn.c_attn.weight"]
    expected = x @ weight + layer.base_layer.bias + layer.scaling["default"] * (x @ a.T @ b.T)
    torch.testing.assert_close(layer(x), expected)


def test_the_plan_counts_conv1d():
    """124 million parameters: 12 blocks of 12 x 768^2 in linear layers."""
    shape = ModelShape.of(GPT2Config(), Lora(rank=4))
    assert shape.linear == 12 * 12 * 768**2
    assert shape.lora == 12 * 4 * (768 + 3 * 768) and shape.lora_tensors == 24
