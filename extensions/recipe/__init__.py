"""The recipe of a run: schema and defaults, cross-field validation, loading with every error at once."""

from extensions.recipe.changes import Change, changes
from extensions.recipe.loader import load_recipe
from extensions.recipe.methods import AdvantageEstimator, Optimizer, Ppo, Schedule, Sft
from extensions.recipe.run_schedule import RunSchedule
from extensions.recipe.schema import MANIFEST, Recipe, adapter_name, all_keys, dump_recipe, value_at
from extensions.recipe.sections import Data, DeepSpeed, Evaluation, Lora, Model, Vllm

__all__ = [
    "MANIFEST",
    "AdvantageEstimator",
    "Change",
    "Data",
    "DeepSpeed",
    "Evaluation",
    "Lora",
    "Model",
    "Optimizer",
    "Ppo",
    "Recipe",
    "RunSchedule",
    "Schedule",
    "Sft",
    "Vllm",
    "adapter_name",
    "all_keys",
    "changes",
    "dump_recipe",
    "load_recipe",
    "value_at",
]
