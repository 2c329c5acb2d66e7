"""The recipe of a run: schema and defaults, cross-field validation, loading with every error at once."""

from extensions.recipe.loader import load_recipe
from extensions.recipe.schema import (
    MAY_CHANGE,
    Data,
    DeepSpeed,
    Evaluation,
    Lora,
    Model,
    Optimizer,
    Ppo,
    Recipe,
    Schedule,
    Sft,
    adapter_name,
    all_keys,
    dump_recipe,
    value_at,
)

__all__ = [
    "MAY_CHANGE",
    "Data",
    "DeepSpeed",
    "Evaluation",
    "Lora",
    "Model",
    "Optimizer",
    "Ppo",
    "Recipe",
    "Schedule",
    "Sft",
    "adapter_name",
    "all_keys",
    "dump_recipe",
    "load_recipe",
    "value_at",
]
