"""Prompt sets in OpenRLHF's format, to train on the same prompts and labels with its own commands."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from extensions.common.errors import UserError
from extensions.data.example import Example
from extensions.data.examples import load_examples, load_training
from extensions.data.locate import is_labelled, is_present
from extensions.prompts import PromptEncoder, pack_label
from extensions.recipe import Recipe
from extensions.tasks import SPLITS


def export(recipe: Recipe, encoder: PromptEncoder, folder: Path, warn: Callable[[str], None]) -> dict[Path, int]:
    """Write `folder/TASK/SPLIT.jsonl` for each labelled split of each task.

    A line has `input` (the prompt text, truncated as in training), `label` (a string with task and gold answer, for
    reward_fns/nlu.py) and `datasource` (the task's name). `openrlhf.datasets` reads them with
    `--data.input_key input --data.label_key label`.

    Returns:
        File -> number of lines.

    Raises:
        UserError: a file is missing or malformed, a prompt cannot fit, or the folder cannot be written.
    """
    written: dict[Path, int] = {}
    for task in recipe.data.tasks:
        for split in SPLITS:
            if not is_labelled(task, split) or not (split == "train" or is_present(task, split, recipe.data.root)):
                continue
            if split == "train":
                examples = load_training(task, recipe.data.root, recipe.data.max_train_samples, recipe.seed, warn)
            else:
                examples = load_examples(task, split, recipe.data.root, recipe.seed, warn)
            path = folder / task.name / f"{split}.jsonl"
            temporary = path.with_suffix(".tmp")
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with temporary.open("w", encoding="utf-8") as file:
                    for example in examples:
                        file.write(json.dumps(_line(example, encoder), ensure_ascii=False) + "\n")
                temporary.replace(path)
            except OSError as error:
                raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error
            finally:
                with suppress(OSError):
                    temporary.unlink()
            written[path] = len(examples)
    return written


def _line(example: Example, encoder: PromptEncoder) -> dict[str, str]:
    _, text = encoder.encode(example.task, example.fields)
    return {"input": text, "label": pack_label(example.task, str(example.label)), "datasource": example.task.name}
