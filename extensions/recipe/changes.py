"""The effect of each recipe key on a run that goes on: what may change on resume, and what only in a fork.

The table of `extensions/runs/FAULTS.md` says what each effect means for the user.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from extensions.recipe.schema import Recipe, all_keys, dump_recipe, value_at

Effect = Literal[
    "none",  # no bit of the result
    "numerics",  # memory and speed: rounding, dropout masks, and random numbers of other processes
    "evaluation",  # which rows are answered and how, and which validation is best; not what an update computes
    "length",  # the number of iterations, and with it the schedule
    "learning",  # what an update computes: only in a fork
    "structure",  # what a checkpoint holds, or counts: not even in a fork
]

# Each key of a recipe, or a section of keys; the longest entry that matches is the key's.
EFFECTS: Mapping[str, Effect] = {
    "name": "none",
    "output_dir": "none",
    "fork": "none",  # read when the folder is made
    "checkpoint": "none",
    "logging": "none",
    "deepspeed.timeout": "none",
    "data.root": "none",  # the rows are hashed
    "model.path": "none",  # its files are hashed
    "model.trust_remote_code": "none",
    "ray.address": "none",
    "vllm.is_correction": "learning",
    "vllm.is_threshold": "learning",
    "vllm.probe_samples": "none",
    "vllm.probe_tolerance": "none",
    "model.attn_implementation": "numerics",
    "model.gradient_checkpointing": "numerics",
    "model.micro_batch_tokens": "numerics",
    "ppo.micro_batch_size": "numerics",
    "sft.micro_batch_size": "numerics",
    "evaluation.batch_size": "numerics",
    "evaluation.micro_batch_size": "numerics",
    "deepspeed": "numerics",
    "vllm": "numerics",
    "ray": "numerics",
    "evaluation": "evaluation",
    "max_steps": "length",
    "max_epochs": "length",
    "sft.max_steps": "length",
    "seed": "learning",
    "reward": "learning",
    "parser": "learning",
    "model": "learning",
    "lora": "learning",
    "data": "learning",
    "prompt": "learning",
    "rollout": "learning",
    "ppo": "learning",
    "sft": "learning",
    "encoder": "learning",
    "optimizer": "learning",
    "schedule": "learning",
    "method": "structure",
    "backend": "structure",
    "model.adapter": "structure",
    "lora.rank": "structure",
    "lora.target_modules": "structure",
    "ppo.advantage_estimator": "structure",
    "ppo.critic": "structure",
    "ppo.critic_from": "structure",
    "ppo.batch_size": "structure",
    "sft.batch_size": "structure",
    "optimizer.name": "structure",
    "sft.optimizer": "structure",
}


@dataclass(frozen=True)
class Change:
    """A key whose value differs between two recipes."""

    key: str
    was: Any
    now: Any

    @property
    def effect(self) -> Effect:
        return effect_of(self.key)

    def __str__(self) -> str:
        return f"{self.key}: was {self.was!r}, is {self.now!r}"


def effect_of(key: str) -> Effect:
    """The effect of a dotted key. Raises KeyError for a key without an entry."""
    parts = key.split(".")
    for length in range(len(parts), 0, -1):
        if (entry := ".".join(parts[:length])) in EFFECTS:
            return EFFECTS[entry]
    raise KeyError(key)


def changes(before: Mapping[str, Any], recipe: Recipe) -> list[Change]:
    """The keys of `recipe` that differ from a dumped one, by name, but for the files of tasks, whose rows are hashed.

    Args:
        before: content of a run's recipe.yaml; a key that it lacks counts as its default.
    """
    a, b = _flat(before), _flat(yaml.safe_load(dump_recipe(recipe)))
    new = {key: b[key] for key in b if key not in a and _is_default(recipe, key)}
    a |= new
    return [Change(key, a.get(key), b.get(key)) for key in sorted({*a, *b}) if a.get(key) != b.get(key)]


def _is_default(recipe: Recipe, key: str) -> bool:
    """Whether a key has its default, with which runs of earlier versions without the key were made."""
    field = all_keys().get(key)
    return field is not None and value_at(recipe, key) == field.get_default(call_default_factory=True)


def _flat(recipe: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value; own tasks without their files."""
    flat: dict[str, Any] = {}
    for key, value in recipe.items():
        if isinstance(value, dict) and f"{prefix}{key}" != "prompt.template_options":
            flat |= _flat(value, f"{prefix}{key}.")
        elif prefix == "data." and key == "tasks" and isinstance(value, list):
            own = [
                {k: v for k, v in task.items() if k != "source"} if isinstance(task, dict) else task for task in value
            ]
            flat["data.tasks"] = own
        else:
            flat[f"{prefix}{key}"] = value
    return flat
