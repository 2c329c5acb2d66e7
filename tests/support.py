"""Helpers of several test files: tiny policies and samples, small recipes, and the launch command."""

import os
import re
import socket
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from extensions.common.errors import UserError
from extensions.common.files import read_jsonl
from extensions.distributed.nonfinite import NonFiniteCheck
from extensions.evaluation.answers import answer_batch, in_batches
from extensions.model.loading import load_policy
from extensions.prefix.tree import Sample
from extensions.prompts import CLOSE
from extensions.recipe import Lora, Model
from extensions.sweeps.grid import plan
from extensions.tasks import Task

# Words that a tiny encoder can tell apart.
GOOD, BAD = ("good", "great", "fine", "lovely"), ("bad", "awful", "dull", "poor")
THINGS = ("book", "film", "play", "song", "meal", "city", "game", "room")

# A classification of three labels, for metrics.
THREE = Task.model_validate(
    {
        "name": "three",
        "description": "-",
        "question": "{text}",
        "labels": {"a": ["Alpha"], "b": ["Beta"], "c": ["Gamma"]},
        "positive": "a",
        "metrics": ["f1_macro", "f1", "accuracy", "matthews"],
    }
)

ARCHITECTURES = ("llama", "qwen2", "mpt")
CPU = torch.device("cpu")


def words(text):
    return re.findall(r"[a-z]+", text.lower())


def pairs(rows):
    """The minimal pairs of generated rows, each as label -> row."""
    found = defaultdict(dict)
    for row in rows:
        assert row["label"] not in found[row["pair"]]
        found[row["pair"]][row["label"]] = row
    return list(found.values())


def forms_of(words):
    """The written forms that likelihood sums: of the first word with and without each space, of the others one."""
    first, *others = words
    plain = [f" {first}{CLOSE}", f"{first} {CLOSE}", f"{first}{CLOSE}"]
    return [f" {first} {CLOSE}", *plain, *(f" {word} {CLOSE}" for word in others)]


def make_policy(folder, critic="shared", checkpointing=False, seed=3, dropout=0.0, dtype="float32"):
    """A policy whose adapters and value head are not at their neutral initial values."""
    model = Model(path=str(folder), gradient_checkpointing=checkpointing, dtype=dtype)
    policy = load_policy(model, Lora(rank=4, alpha=8, dropout=dropout), critic, 1.0, CPU, seed, "base")
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name or name.startswith("value_head.out"):
            parameter.data.normal_(std=0.3, generator=generator)
    return policy


def samples(vocabulary=200, shared=20, seed=0):
    """Two groups: rows of different lengths behind a long common prefix, and rows that share little."""
    generator = torch.Generator().manual_seed(seed)

    def ids(n):
        return torch.randint(5, vocabulary, (n,), generator=generator).tolist()

    prefix = ids(shared)
    rows = [Sample(prefix + ids(n), ids(m)) for n, m in ((4, 3), (7, 1), (2, 6))]
    return rows + [Sample(ids(n), ids(m)) for n, m in ((5, 2), (8, 4))]


def nested_prompts():
    """A task's prefix, two passages under it, questions; one prompt twice, and one that begins another."""
    generator = torch.Generator().manual_seed(5)

    def ids(n):
        return torch.randint(5, 200, (n,), generator=generator).tolist()

    task, one, other, question = ids(20), ids(24), ids(40), ids(6)
    return [
        [*task, *one, *question],
        [*task, *other, *ids(3)],
        [*task, *one, *ids(2)],
        [*task, *other, *ids(9)],
        [*task, *one, *question],
        [*task, *one],
        ids(7),
    ]


ROOT = Path(__file__).parent.parent


def write_recipe(folder: Path, model: Path, **sections) -> Path:
    recipe = {
        "name": "tiny",
        "max_steps": 2,
        "model": {"path": str(model)},
        "lora": {"rank": 4, "dropout": 0.0},
        "data": {"tasks": ["acceptability"], "max_train_samples": 64},
        "rollout": {"response_budget": [3, 6]},
        "ppo": {"batch_size": 4, "micro_batch_size": 2, "epochs": 2},
        "optimizer": {"name": "adamw", "lr": 1e-2},
        "evaluation": {"max_samples": 4},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(merged(recipe, sections)))
    return path


def sweep_recipe(folder, **sections):
    """A recipe of two tasks for sweeps, without a model."""
    base = {"data": {"tasks": ["sst2", "cola"]}, "evaluation": {"every_steps": 1}}
    return write_recipe(folder, Path("model"), **base | sections)


def planned_sweep(path, *overrides, method="ppo", grid=(), together=False, out=Path("out"), warnings=None):
    return plan(path, overrides, method, grid, together, out, [].append if warnings is None else warnings.append)


def merged(recipe: dict, sections: dict) -> dict:
    """A recipe with other keys; within a section the others stay."""
    both = {key: recipe[key] | value for key, value in sections.items() if isinstance(value, dict) and key in recipe}
    return recipe | sections | both


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment() -> dict[str, str]:
    """For a process of its own, with this environment's programs first on PATH."""
    programs = Path(sys.executable).parent
    # A run in this process is a process group of its own, described in the environment.
    group = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    return {k: v for k, v in os.environ.items() if k not in group} | {
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "VIRTUAL_ENV": str(programs.parent),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def run_command(
    command: list[str], timeout: float = 500, cwd: Path = ROOT, variables: dict[str, str] | None = None
) -> subprocess.CompletedProcess:
    """A command in the repository root, or another folder."""
    env = environment() | (variables or {})
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=env, cwd=cwd)


def launch(
    recipe: Path,
    *overrides: str,
    ranks: int = 1,
    port: int | None = None,
    launcher: list[str] | None = None,
    method: str = "ppo",
) -> subprocess.CompletedProcess:
    """`deepspeed LAUNCHER launch/METHOD.sh` as a user types it.

    Without options of the launcher, the ranks alone, in the environment that it makes for them: its two processes take
    17 processor seconds.
    """
    if launcher is not None:
        return run_command(["deepspeed", *launcher, f"launch/{method}.sh", str(recipe), *overrides])
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port or free_port()), "WORLD_SIZE": str(ranks)}
    group |= {"LOCAL_SIZE": str(ranks), "CROSS_RANK": "0", "CROSS_SIZE": "1"}

    def run(rank: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-u", f"launch/{method}.sh", f"--local_rank={rank}", str(recipe), *overrides]
        return run_command(command, variables=group | {"RANK": rank, "LOCAL_RANK": rank})

    with ThreadPoolExecutor(ranks) as pool:
        done = list(pool.map(run, map(str, range(ranks))))
    status = next((one.returncode for one in done if one.returncode), 0)
    stdout, stderr = ("".join(getattr(one, name) for one in done) for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess(done[0].args, status, stdout, stderr)


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    """The trained weights of a run: the adapter, and the value head if there is one."""
    head = folder / "critic" / "value_head.safetensors"
    return load_file(folder / "adapter" / "adapter_model.safetensors") | (load_file(head) if head.exists() else {})


def timeless(path: Path) -> list[dict]:
    """Records of a run without their times."""
    clocks = ("seconds", "samples_per_s", "elapsed_s", "cpu_s")
    return [{key: value for key, value in line.items() if key not in clocks} for line in read_jsonl(path)]


class PlainEngine:
    """Stands in for DeepSpeed's engine and strategy: plain forward and backward on one rank."""

    world_size, rank = 1, 0

    def __init__(self, policy):
        self.policy = policy
        self.nonfinite = NonFiniteCheck({})

    def __call__(self, *args, **kwargs):
        return self.policy(*args, **kwargs)

    def update(self, engine, loss, last):
        loss.backward()

    def discard(self, engine):
        self.policy.zero_grad()
        return True

    def sum(self, values):
        return values

    def gather(self, item):
        return [item]


def predict(examples, encoder, sampler, batch_size, max_new_tokens, seed, decoding="sample", **options):
    """One prediction per example of one task, in order, on one rank."""
    batches, settings = in_batches(examples, batch_size), (encoder, sampler, max_new_tokens, seed, decoding)
    answered = [p for batch in batches for p in answer_batch(batch, *settings, **options)]
    by_index = {prediction.index: prediction for prediction in answered}
    return [by_index[example.index] for example in examples]


def toy(name, labels=("good", "bad")):
    return {
        "name": name,
        "description": "Judge.",
        "question": 'Judge "{text}".',
        "labels": list(labels),
        "source": {"files": {"train": "train.jsonl", "validation": "validation.jsonl"}},
    }


def gradients(policy):
    found = {name: p.grad.clone() for name, p in policy.trainable.items()}
    policy.zero_grad()
    return found


BASE_RECIPE = """\
name: trial
model:
  path: some/model
data:
  tasks: [cola]
"""

OWN_TASK_RECIPE = """\
name: trial
model: {path: some/model}
data:
  tasks:
    - name: mine
      description: Judge the text.
      question: 'Judge "{text}".'
      labels: {good: [Good, fine], bad: [Bad]}
      metrics: [accuracy, f1_macro]
      source: {format: jsonl, files: {train: train.jsonl, validation: dev.jsonl}}
    - sst2
"""


def refused(load, text, *overrides):
    """The message with which `load` refuses a recipe."""
    with pytest.raises(UserError) as caught:
        load(text, *overrides)
    message = str(caught.value)
    assert "Traceback" not in message and "pydantic" not in message
    return message
