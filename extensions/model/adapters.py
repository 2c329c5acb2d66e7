"""LoRA adapters: configuration, loading, hash."""

from __future__ import annotations

import copy
import hashlib
import re
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from transformers.modeling_utils import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from extensions.common.errors import UserError
from extensions.model.targets import matching, short_names, target_modules, tied_to_embedding
from extensions.recipe import Lora

WEIGHTS = "adapter_model.safetensors"
BASE_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")  # with these, peft changes the base's weights


def lora_config(base: PreTrainedModel, lora: Lora) -> LoraConfig:
    """PEFT's config for recipe section `lora`.

    Raises:
        UserError: `lora.target_modules` names modules that the model does not have, or that cannot have LoRA.
    """
    targets, names = target_modules(base, lora.target_modules)
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_rslora=lora.rslora,
        target_modules=targets,
        # Conv1D (GPT-2) keeps its weight as (in, out).
        fan_in_fan_out=all(isinstance(base.get_submodule(name), Conv1D) for name in names),
        task_type="CAUSAL_LM",
    )


def adapter_config(path: str) -> Any:
    """The config of the adapter in a folder.

    Raises:
        UserError: there is no adapter, or loading it could run code.
    """
    folder = Path(path)
    if not (folder / "adapter_config.json").is_file():
        raise UserError(
            f"model.adapter: {path!r} is not a folder with a PEFT adapter (adapter_config.json); a run leaves one as "
            "runs/NAME/adapter"
        )
    if not (folder / WEIGHTS).is_file():
        raise UserError(
            f"model.adapter: {path!r} has no adapter_model.safetensors. Other weights (adapter_model.bin) are pickles, "
            "which could run code, and are not read: convert the adapter to safetensors, peft's format since 2023"
        )
    config = PeftConfig.from_pretrained(path)
    if getattr(config, "megatron_config", None):
        raise UserError(
            f"model.adapter: {path!r} has a megatron_config, with which peft imports a Python module that the adapter "
            "names; remove megatron_config from its adapter_config.json"
        )
    return config


def load_adapter(base: PreTrainedModel, path: str, lora: Lora | None) -> PeftModel:
    """The base with the adapter in a folder.

    Args:
        lora: settings to continue training with: the dropout is taken from here, all else must match the adapter.
            None: any settings.

    Raises:
        UserError: there is no such adapter, it is more than plain LoRA, its weights do not match the base, or its
            settings do not match `lora`.
    """
    try:
        config = adapter_config(path)
        _refuse_more_than_lora(path, config)
        named, config.base_model_name_or_path = config.base_model_name_or_path, None  # so that peft records this base
        if not matching(base, config):
            raise _other_base(path, named, f"no layer of it has the names {_names(config.target_modules)}")
        if lora is not None:
            _refuse_other_settings(base, path, config, lora)
            config.lora_dropout = lora.dropout
        config.inference_mode = False
        lm = get_peft_model(base, config)
        _check_weights(lm, path, named)
        lm.load_adapter(path, "default", is_trainable=True)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, re.error, SafetensorError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"model.adapter: {path!r} cannot be put on the model: {' '.join(str(error).split())[:400]}"
        ) from error
    return lm


def _refuse_more_than_lora(path: str, config: Any) -> None:
    if not isinstance(config, LoraConfig):
        raise UserError(f"model.adapter: {path!r} is not a LoRA adapter but {config.peft_type}; only LoRA is used here")
    # Trained weights other than LoRA matrices stay on when the adapter is off: the reference would be wrong.
    init = config.init_lora_weights
    extras = {
        "modules_to_save": config.modules_to_save,
        "bias": None if config.bias == "none" else config.bias,
        "use_dora": config.use_dora,
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": config.alpha_pattern,
        "trainable_token_indices": config.trainable_token_indices,
        "target_parameters": config.target_parameters,
        "layer_replication": config.layer_replication,
        "init_lora_weights": init if isinstance(init, str) and init.startswith(BASE_INITS) else None,
    }
    strange = [f"{key}: {value}" for key, value in extras.items() if value]
    if strange:
        raise UserError(
            f"model.adapter: {path!r} is more than plain LoRA ({', '.join(strange)}), which would "
            "change the reference policy too; merge it into a model with peft's merge_and_unload, and set model.path "
            "to that model"
        )


def _refuse_other_settings(base: PreTrainedModel, path: str, config: LoraConfig, lora: Lora) -> None:
    own: dict[str, Any] = {"rank": config.r, "alpha": config.lora_alpha, "rslora": config.use_rslora}
    other = [f"lora.{key}={value}" for key, value in own.items() if getattr(lora, key) != value]
    everywhere = copy.copy(config)
    everywhere.layers_to_transform = None  # an adapter may cover only some blocks
    names = matching(base, everywhere)
    tied = tied_to_embedding(base, names)
    if tied is not None:
        raise UserError(
            f"model.adapter: {path!r} has LoRA on {tied}, whose weight is tied to the embedding in this model "
            "(tie_word_embeddings): a merged model cannot have one with LoRA and the other without. Train an adapter "
            "of other modules, lora.target_modules=auto"
        )
    if names != target_modules(base, lora.target_modules)[1]:
        other.append(f"lora.target_modules=[{_names(short_names(base, names))}]")
    if other:
        raise UserError(f"model.adapter: {path!r} was made with other settings; add: {' '.join(other)}")


def _check_weights(lm: PeftModel, path: str, named: str | None) -> None:
    """Compare names and shapes in the adapter's file with the LoRA matrices on the model.

    Raises:
        UserError: they differ, or the file has other weights of the base than the base.
    """
    wanted = {key: list(t.shape) for key, t in get_peft_model_state_dict(lm, save_embedding_layers=False).items()}
    weights = dict(lm.named_parameters(remove_duplicate=False))
    with safe_open(Path(path) / WEIGHTS, "pt") as file:
        found = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118 # no mapping
        # peft also saves the base's embedding and head where LoRA is on one of them.
        copies = {
            key
            for key in found.keys() & weights.keys() - wanted.keys()
            if torch.equal(file.get_tensor(key).to(weights[key]), weights[key])
        }
    kinds = {
        "missing": sorted(wanted.keys() - found.keys()),
        "without a layer in the model": sorted(found.keys() - wanted.keys() - copies),
        "of another shape": [
            f"{key}: {found[key]}, expected {shape}"
            for key, shape in sorted(wanted.items())
            if found.get(key, shape) != shape
        ],
    }
    wrong = [f"{len(keys)} {kind} ({'; '.join(keys[:2])})" for kind, keys in kinds.items() if keys]
    if wrong:
        raise _other_base(path, named, f"of {len(wanted)} weights expected in {WEIGHTS} {', '.join(wrong)}")


def _other_base(path: str, named: str | None, reason: str) -> UserError:
    made = f", {named!r} by its adapter_config.json" if named else ""
    return UserError(
        f"model.adapter: {path!r} does not match the model: {reason}. Set model.path to the model that it was trained "
        f"on{made}, or model.adapter to a complete adapter of this model"
    )


def _names(targets: Any) -> str:
    return targets if isinstance(targets, str) else ", ".join(sorted(targets or []))


def adapter_hash(folder: str | None) -> str | None:
    """sha256 of a PEFT adapter's config and weights; None without an adapter, or where its files are missing."""
    digest = hashlib.sha256()
    try:
        for name in ("adapter_config.json", "adapter_model.safetensors") if folder is not None else ():
            digest.update((Path(str(folder)) / name).read_bytes())
    except OSError:
        return None
    return digest.hexdigest() if folder is not None else None
