"""Small runs that are interrupted and resumed, and how their results are compared."""

import errno
import os
import shutil
from pathlib import Path

import torch
import yaml
from support import adapter_of, timeless, write_recipe

from extensions.common.files import read_json, read_jsonl

RESUMABLE = {
    "checkpoint": {"every_steps": 1},
    "evaluation": {"max_samples": 2, "every_steps": 1, "validation_samples": 2},
    "logging": {"tensorboard": False},
}


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def with_reward(folder: Path, body: str) -> str:
    """A recipe's `reward`: a file whose function has this body."""
    path = folder / "my_reward.py"
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    path.write_text(
        f"import os, random, signal, time\ncalls = 0\n\n\ndef reward(text, label):\n    global calls\n{lines}\n"
    )
    return str(path)


def own_task(rows: Path) -> dict:
    """A task of two labels, with the same rows in training and validation."""
    return {
        "name": "own",
        "description": "Say a or b.",
        "question": "{text}",
        "labels": ["a", "b"],
        "source": {"files": {"train": str(rows), "validation": str(rows)}},
    }


def three_steps(folder: Path, model: Path, **more) -> Path:
    """The recipe of the fixture `unfinished`, for another run."""
    return write_recipe(folder, model, output_dir=str(folder / "run"), max_steps=3, seed=3, **RESUMABLE | more)


def again(unfinished, folder) -> Path:
    """A copy of the unfinished run; returns its recipe."""
    shutil.copytree(unfinished / "run", folder / "run")
    recipe = yaml.safe_load((unfinished / "recipe.yaml").read_text()) | {"output_dir": str(folder / "run")}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


def assert_ended_as(whole: Path, run: Path) -> None:
    ours, theirs = adapter_of(run), adapter_of(whole)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in theirs)
    for name in ("metrics.jsonl", "validation.jsonl"):
        assert timeless(run / name) == timeless(whole / name)
    for name in ("rollouts.jsonl", "predictions_before.jsonl", "predictions_after.jsonl"):
        assert read_jsonl(run / name) == read_jsonl(whole / name)
    found, expected = read_json(run / "eval.json"), read_json(whole / "eval.json")
    assert found["after"] == expected["after"] and found["before"] == expected["before"]
    assert reproducible(found["yardsticks"]) == reproducible(expected["yardsticks"])


def reproducible(yardsticks: dict) -> dict:
    """Yardsticks without their times, and without those of embeddings, whose last bits depend on the heap (torch)."""
    return {
        kind: {task: {**result, "seconds": None} for task, result in results.items()}
        for kind, results in yardsticks.items()
        if kind != "embeddings"
    }
