"""LoRA adapters: which layers get them, and loading those that were trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel
from torch import nn
from transformers.modeling_utils import PreTrainedModel

from extensions.errors import UserError
from extensions.recipe import Lora

# Query and value projections by their names in the model families; the first that fits is taken (authors: q and v).
LORA_TARGETS = (["q_proj", "v_proj"], ["Wqkv"], ["query_key_value"], ["c_attn"])


def lora_config(base: nn.Module, lora: Lora) -> LoraConfig:
    """PEFT's configuration of a recipe's adapters.

    Raises:
        UserError: `lora.target_modules` names layers that the model does not have.
    """
    linear = {name.rpartition(".")[2] for name, module in base.named_modules() if isinstance(module, nn.Linear)}
    targets = lora.target_modules
    if targets == "auto":
        fitting = next((names for names in LORA_TARGETS if linear.issuperset(names)), None)
        if fitting is None:
            raise UserError(
                f"lora.target_modules: auto knows no names for this model; choose from: {', '.join(sorted(linear))}"
            )
        targets = fitting
    missing = [name for name in targets if name not in linear]
    if missing:
        raise UserError(
            f"lora.target_modules: the model has no linear layer {missing[0]!r}; it has: {', '.join(sorted(linear))}"
        )
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        use_rslora=lora.rslora,
        target_modules=list(targets),
        task_type="CAUSAL_LM",
    )


def adapter_config(path: str) -> Any:
    """The configuration of the adapter in a folder.

    Raises:
        UserError: there is none, or loading it could run code.
    """
    folder = Path(path)
    if not (folder / "adapter_config.json").is_file():
        raise UserError(
            f"model.adapter: {path!r} is not a folder with a PEFT adapter (adapter_config.json); a run leaves one as "
            "runs/NAME/adapter"
        )
    if not (folder / "adapter_model.safetensors").is_file():
        raise UserError(
            f"model.adapter: {path!r} has no adapter_model.safetensors. Other weights (adapter_model.bin) are pickles, "
            "which could run code, and are not read: ask for the adapter in safetensors, peft's format since 2023"
        )
    config = PeftConfig.from_pretrained(path)
    if getattr(config, "megatron_config", None):
        raise UserError(
            f"model.adapter: {path!r} has a megatron_config, with which peft imports a Python module that the adapter "
            "names; remove megatron_config from its adapter_config.json"
        )
    return config


def load_adapter(base: PreTrainedModel, path: str, lora: Lora | None) -> PeftModel:
    """The base with the adapter in a folder. With `lora` it goes on training with that dropout; all else must agree."""
    try:
        config = adapter_config(path)
        if not isinstance(config, LoraConfig):
            raise UserError(
                f"model.adapter: {path!r} is not a LoRA adapter but {config.peft_type}; only LoRA is used here"
            )
        # What trains other weights than LoRA matrices stays on where the adapter is off: the reference would be wrong.
        extras = {
            "modules_to_save": config.modules_to_save,
            "bias": None if config.bias == "none" else config.bias,
            "use_dora": config.use_dora,
            "rank_pattern": config.rank_pattern,
            "alpha_pattern": config.alpha_pattern,
            "trainable_token_indices": config.trainable_token_indices,
        }
        strange = [f"{key}: {value}" for key, value in extras.items() if value]
        if strange:
            raise UserError(
                f"model.adapter: {path!r} is more than plain LoRA ({', '.join(strange)}), which this project does not "
                "keep apart from the base; merge it into a model of its own with peft's merge_and_unload, and set "
                "model.path to that"
            )
        if lora is not None:
            own: dict[str, Any] = {"rank": config.r, "alpha": config.lora_alpha, "rslora": config.use_rslora}
            targets = config.target_modules
            wanted = lora_config(base, lora).target_modules
            other = [f"lora.{key}={value}" for key, value in own.items() if getattr(lora, key) != value]
            if targets != wanted:
                names = targets if isinstance(targets, str) else f"[{', '.join(sorted(targets or []))}]"
                other.append(f"lora.target_modules={names}")
            if other:
                raise UserError(f"model.adapter: {path!r} was made with other settings; add: {' '.join(other)}")
            config.lora_dropout = lora.dropout
        return PeftModel.from_pretrained(base, path, is_trainable=True, config=config)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"model.adapter: {path!r} cannot be put on the model: {' '.join(str(error).split())[:400]}"
        ) from error
