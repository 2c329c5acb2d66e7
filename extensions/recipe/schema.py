"""The recipe: everything that a run depends on, typed and checked. Defaults are defined only here.

A recipe is one self-contained YAML file; `key.sub=value` on the command line overrides it. Every error is reported at
once, with its key, its value, what is allowed and the nearest valid key, before any model is loaded.

Origins, as named in the descriptions: "paper" with a section; "authors" is the authors' public implementation or the
PPO library that it uses (TRL 0.11); "ours" is this project's choice.
"""

from __future__ import annotations

import math
from functools import reduce
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, model_validator

from extensions.recipe.methods import Encoder, Optimizer, Ppo, Schedule, Sft
from extensions.recipe.sections import (
    Checkpoint,
    Data,
    DeepSpeed,
    Evaluation,
    Logging,
    Lora,
    Model,
    Number,
    Prompt,
    Ray,
    Rollout,
    Section,
    Vllm,
)
from extensions.tasks import Parser

MANIFEST = "nlu.json"  # of an adapter or a merged model (`extensions.inference.manifest`)


class Recipe(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9][\w.-]*$", description="name of the run: letters, digits, . _ -")
    method: Literal["ppo", "sft", "eval", "encoder"] = Field(
        "ppo", description="what the run does; set by the script of launch/ that starts it"
    )
    seed: int = Field(0, ge=0, lt=2**32, description="random seed of everything")
    backend: Literal["deepspeed", "ray"] = Field(
        "deepspeed",
        description="training backend of PPO: DeepSpeed ranks around one shared base, or OpenRLHF's trainer on Ray and "
        "vLLM (launch/ppo_ray.sh) (ours)",
    )
    output_dir: str | None = Field(
        None,
        description="run folder, exactly there; null: runs/NAME, with -sft, -zero-shot, ... for other than PPO, and "
        "-fork",
    )
    fork: str | None = Field(
        None,
        description="run folder, or one of its checkpoints/step-N, from whose checkpoint this run goes on in a folder "
        "of its own; keys that change what is learned may differ (ours)",
    )
    max_steps: int = Field(1000, ge=1, description="PPO iterations: each samples and trains on one batch")
    max_epochs: Number | None = Field(
        None,
        gt=0,
        description="passes over the training rows after which training ends, if sooner; null: no limit (ours)",
    )
    model: Model = Field(description="the LLM")
    lora: Lora = Field(default_factory=Lora, description="the trained layers (paper 4.4)")
    data: Data = Field(description="tasks and files")
    prompt: Prompt = Field(default_factory=Prompt, description="paper 4.1")
    rollout: Rollout = Field(default_factory=Rollout, description="paper 5.1")
    reward: str = Field(
        "nlu", description="file in reward_fns/ by name, or path/to/my_reward.py with reward(text, label)"
    )
    parser: Parser = Field(
        "strict",
        description="rule that finds the answer in a response. strict: one keyword or number and no contradiction "
        "(ours); paper: the first keyword or number (paper 4.3)",
    )
    ppo: Ppo = Field(default_factory=Ppo, description="paper 4.3")
    optimizer: Optimizer = Field(default_factory=Optimizer, description="of PPO; SFT's differs as sft says (paper 5.1)")
    schedule: Schedule = Field(default_factory=Schedule, description="paper 5.1")
    sft: Sft = Field(default_factory=Sft, description="paper 4.2")
    encoder: Encoder = Field(default_factory=Encoder, description="paper 5.2")
    deepspeed: DeepSpeed = Field(default_factory=DeepSpeed, description="of backend: deepspeed")
    vllm: Vllm = Field(default_factory=Vllm, description="of rollout.backend: vllm and backend: ray")
    ray: Ray = Field(default_factory=Ray, description="of backend: ray")
    evaluation: Evaluation = Field(default_factory=Evaluation, description="validation and the before/after table")
    logging: Logging = Field(
        default_factory=Logging, description="records and trackers; metrics.jsonl is always written"
    )
    checkpoint: Checkpoint = Field(default_factory=Checkpoint, description="resume points")

    @model_validator(mode="after")
    def _tasks_have_the_parser(self) -> Recipe:
        own = [task.name for task in self.data.tasks if task.parser not in ("strict", self.parser)]
        if own:
            raise ValueError(
                f"data.tasks: {', '.join(own)}: parser is a key of the recipe, for all tasks; write it at the "
                "top level, as parser: paper"
            )
        self.data.tasks = [task.with_parser(self.parser) for task in self.data.tasks]
        return self

    @property
    def run_dir(self) -> Path:
        return Path(self.output_dir) if self.output_dir is not None else Path("runs") / f"{self.name}{self._suffix}"

    @property
    def _suffix(self) -> str:
        """Distinguishes the runs of one recipe by several methods."""
        if self.method != "eval":
            fork = "" if self.fork is None else "-fork"
            return fork if self.method == "ppo" else f"-{self.method}{fork}"
        shots = f"-{self.prompt.shots}-shot" if self.prompt.shots else "-zero-shot"
        if self.is_merged:
            shots = f"-merged{shots.removesuffix('-zero-shot')}"
        if self.model.adapter is not None:
            shots = f"-eval-{adapter_name(self.model.adapter)}{shots.removesuffix('-zero-shot')}"
        return shots if self.evaluation.decoding == "sample" else f"{shots}-{self.evaluation.decoding}"

    @property
    def is_merged(self) -> bool:
        """Whether `model.path` is a base with a trained adapter merged in, which `nlu merge` marks by a manifest."""
        return (Path(self.model.path) / MANIFEST).is_file()

    @property
    def trained_with(self) -> Optimizer:
        """The optimizer of the method."""
        if self.method != "sft":
            return self.optimizer
        return self.optimizer.model_copy(update={"name": self.sft.optimizer, "lr": self.sft.lr or self.optimizer.lr})

    def training_steps(self, rows: int | None = None) -> int:
        """Optimizer steps of SFT, iterations of PPO; at most `max_epochs` passes over `rows` training rows."""
        steps = self.max_steps
        if self.method == "sft":
            steps = self.sft.max_steps or max(1, round(steps * self.ppo.batch_size / self.sft.batch_size))
        if rows is not None and self.max_epochs is not None:
            steps = min(steps, math.ceil(self.max_epochs * rows / self.training_batch))
        return steps

    def num_updates(self, steps: int) -> int:
        """Optimizer steps of a training of `steps` iterations."""
        if self.method == "sft":
            return steps
        ppo = self.ppo
        return steps * ppo.epochs * (ppo.batch_size // (ppo.mini_batch_size or ppo.batch_size))

    @property
    def training_batch(self) -> int:
        """Samples per training step, over all ranks."""
        return self.sft.batch_size if self.method == "sft" else self.ppo.batch_size


def all_keys(section: type[BaseModel] = Recipe, prefix: str = "") -> dict[str, Any]:
    """Every dotted key of a recipe and its pydantic field."""
    keys: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            keys |= all_keys(field.annotation, f"{prefix}{name}.")
        else:
            keys[f"{prefix}{name}"] = field
    return keys


def value_at(recipe: Recipe, key: str) -> Any:
    """The value of a dotted key."""
    return reduce(getattr, key.split("."), recipe)


def adapter_name(path: str) -> str:
    """Name of an adapter: its folder, or the run's folder for a run's `adapter/`."""
    folder = Path(path)
    return folder.parent.name or folder.name if folder.name == "adapter" else folder.name


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML that loads back to the same recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110)
