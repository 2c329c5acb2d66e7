"""A tiny random model of every causal-LM architecture that transformers lists.

Dimensions are shrunk by the names that configurations give them; what a configuration derives from them is derived
again. What cannot be built this way is listed by the harness with the reason.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PretrainedConfig

LAYERS = 4  # hybrid models repeat a pattern of up to four kinds of layers

# Name of a dimension -> its small value. A name that no configuration has is not used.
SMALL: dict[str, int] = {
    **dict.fromkeys(
        ("hidden_size", "d_model", "n_embd", "dim", "model_dim", "embedding_size", "word_embed_proj_dim"), 32
    ),
    **dict.fromkeys(("dim_model", "emb_dim", "lru_width"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "n_inner", "dim_ff"), 64),
    **dict.fromkeys(("ffn_hidden_size", "moe_intermediate_size", "shared_expert_intermediate_size", "dff"), 64),
    **dict.fromkeys(
        ("shared_intermediate_size", "intermediate_size_mlp", "expert_ffn_hidden_size", "block_ff_dim"), 64
    ),
    **dict.fromkeys(
        ("block_ff_dim", "moe_shared_expert_intermediate_size", "dense_intermediate_size", "ffn_size", "inner_dim"), 64
    ),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), LAYERS
    ),
    **dict.fromkeys(("encoder_layers", "num_decoder_layers", "num_encoder_layers", "num_blocks"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "num_decoder_attention_heads", "num_encoder_attention_heads"), 4),
    **dict.fromkeys(
        ("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads", "num_global_key_value_heads"), 2
    ),
    **dict.fromkeys(("swa_num_attention_heads", "index_n_heads", "linear_num_value_heads", "mamba_n_heads"), 4),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "mamba_num_heads", "num_mem_heads"), 4),
    **dict.fromkeys(("head_dim", "v_head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "d_kv", "dim_head"), 8),
    **dict.fromkeys(("rotary_dim", "swa_head_dim", "swa_v_head_dim", "global_head_dim", "d_head"), 8),
    **dict.fromkeys(("index_head_dim", "linear_key_head_dim", "linear_value_head_dim", "kv_channels"), 8),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "o_lora_rank"), 16),
    **dict.fromkeys(("vocab_size", "n_vocab", "vocab_size_per_layer_input", "embedding_vocab_size"), 400),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_length"), 512),
    **dict.fromkeys(("num_local_experts", "n_routed_experts", "num_experts", "moe_num_experts", "num_moe_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "moe_top_k", "num_experts_per_token"), 2),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size", "mamba_d_head", "mamba_head_dim"), 8),
    **dict.fromkeys(("n_groups", "mamba_n_groups", "n_group", "topk_group", "mamba_ngroups", "n_shared_experts"), 1),
    **dict.fromkeys(("time_step_rank", "mamba_dt_rank", "hidden_size_per_layer_input"), 8),
    **dict.fromkeys(
        ("sliding_window", "attention_chunk_size", "local_attention", "window_size", "attention_window_size"), 24
    ),
}
SPECIAL = {"eos_token_id": 0, "pad_token_id": 1, "bos_token_id": 2, "decoder_start_token_id": 2}

# Values that must match in some configurations, and the switch to an encoder's decoder form.
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_expand": 2}
DECODER = {"is_decoder": True}
CHANGES: dict[str, dict[str, Any]] = {
    "bamba": MAMBA | {"attn_layer_indices": [1, 3]},
    "blenderbot": {"encoder_layers": LAYERS},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gemma2": {"attn_logit_softcapping": 0.5},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.0] * LAYERS,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granite": {"logits_scaling": 8.0},
    "granitemoe": {"logits_scaling": 8.0},
    "granitemoehybrid": MAMBA | {"layer_types": ["mamba", "attention"] * 2, "logits_scaling": 8.0},
    "granitemoeshared": {"logits_scaling": 8.0},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "hyperclovax": {"logits_scaling": 0.5},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"head_dim": 8},
    "mamba2": {"num_heads": 8, "head_dim": 8, "expand": 2},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "reformer": DECODER | {"axial_pos_embds": False},
    "vaultgemma": {"attn_logit_softcapping": 0.5},
    "xmod": DECODER | {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["mamba", "hybrid"] * 2},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2},
}


def shrunk(config_class: type[PretrainedConfig], **changes: Any) -> PretrainedConfig:
    """A small configuration of a class."""
    return config_class(**(_small(config_class()) | CHANGES.get(config_class.model_type, {}) | changes))


def _small(config: PretrainedConfig) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in {**config.to_dict(), **vars(config)}.items():
        if isinstance(value, PretrainedConfig):
            found[name] = {**_small(value), "model_type": value.model_type}
        elif name in SMALL and isinstance(value, int) and not isinstance(value, bool) and value > SMALL[name]:
            found[name] = SMALL[name]
    if "qk_rope_head_dim" in found:  # latent attention: the heads' size is a sum of its own, and no two share a key
        found.pop("head_dim", None)
        found["num_key_value_heads"] = SMALL["num_attention_heads"]
    return found | {name: token for name, token in SPECIAL.items() if getattr(config, name, None) is not None}


def causal_classes() -> dict[str, tuple[type[PretrainedConfig], type[torch.nn.Module]]]:
    """Model type -> configuration and model class."""
    found = {}
    for config_class in MODEL_FOR_CAUSAL_LM_MAPPING:
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
        found[config_class.model_type] = (
            config_class,
            model_class[0] if isinstance(model_class, tuple) else model_class,
        )
    return found
