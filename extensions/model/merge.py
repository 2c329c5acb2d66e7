"""Base and adapter as one plain model."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel

from extensions.errors import UserError
from extensions.model.adapters import adapter_config
from extensions.model.loading import load_base, load_tokenizer
from extensions.recipe import Model


def merge_adapter(model: Model, folder: Path) -> None:
    """Write base and adapter of `model` as one plain model with its tokenizer, to be used as `model.path`.

    Raises:
        UserError: `model.adapter` is missing, or one of the two cannot be loaded.
    """
    if model.adapter is None:
        raise UserError(
            "model.adapter: missing; name the adapter to merge, for example model.adapter=runs/NAME/adapter"
        )
    adapter_config(model.adapter)
    lm = PeftModel.from_pretrained(load_base(model, torch.device("cpu")), model.adapter)
    lm.merge_and_unload(safe_merge=True).save_pretrained(str(folder))
    load_tokenizer(model).save_pretrained(str(folder))
