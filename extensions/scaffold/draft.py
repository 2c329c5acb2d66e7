"""From the entry of a task to a recipe: settings by the model, the text, and a trial load."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from extensions.common.errors import UserError
from extensions.common.files import write_text
from extensions.data.splits import RunData
from extensions.model.loading import load_config, load_tokenizer, prompt_limit
from extensions.planner.flops import ModelShape
from extensions.prefix.tree import common_prefix
from extensions.prompts import PromptEncoder
from extensions.recipe import Model, Recipe, load_recipe
from extensions.scaffold import settings
from extensions.scaffold.entry import InitRequest, TaskEntry, is_unbalanced
from extensions.scaffold.recipe_text import recipe_text
from extensions.tasks import Task, is_blank

MAX_TOKENIZED = 500  # rows whose tokens are counted


@dataclass(frozen=True)
class Draft:
    """A recipe that loads, and the decisions behind it."""

    entry: TaskEntry
    text: str
    recipe: Recipe  # loaded from `text`
    data: RunData
    encoder: PromptEncoder
    decisions: list[str]
    warnings: list[str]
    tokens: tuple[int, int, int]  # of the shared prefix, of the rest of a prompt, of an answer; means
    on_gpu: bool


def draft(entry: TaskEntry, request: InitRequest, on_gpu: bool) -> Draft:
    """The recipe, loaded with its data; nothing is written.

    Raises:
        UserError: the model's configuration or tokenizer cannot be loaded, or rows cannot be used and no key skips
            them.
    """
    model = Model(path=request.model)
    tokenizer, config = load_tokenizer(model), load_config(model)
    source, target = entry.source, entry.target
    recipe = Recipe.model_validate(
        {"name": entry.task["name"], "model": {"path": request.model}, "data": {"tasks": [entry.task]}}
    )
    task = recipe.data.tasks[0]
    counting = PromptEncoder(tokenizer, 10**9, False)
    counting.check_answers(task)
    rows = [row for row in entry.tables["train"].rows if task.multi_label or not is_blank(row.get(source["label"]))]
    prompts = _prompts(counting, task, rows)
    lengths = np.array([len(ids) for ids in prompts])
    answer_tokens = list(map(len, counting.label_ids(task).values()))
    fixed = len(counting.encode(task, dict.fromkeys(task.fields, ""))[0])
    chosen = settings.choose_settings(
        ModelShape.of(config, recipe.lora).parameters,
        round(len(rows) * (1 - sum(source.get("split", {}).values()))),
        int(np.percentile(lengths, 95)),
        fixed,
        prompt_limit(recipe, config) + recipe.rollout.max_new_tokens,
        _longest_answer(counting, task, rows),
        on_gpu,
        task.is_regression,
    )
    if fixed >= chosen.max_tokens:
        raise UserError(
            f"model.path: {request.model!r} reads {chosen.max_tokens} tokens of a prompt here, and without its texts "
            f"it has {fixed} already; shorten the labels (--labels LABEL=WORD,...), or take a --model with a longer "
            "context"
        )
    share = float(np.mean(lengths > chosen.max_tokens))
    cut = f"about {share:.1%} of the training rows are longer, and cut" if share else "all training rows fit"
    decisions = [*entry.decisions, f"prompts: at most {chosen.max_tokens} tokens; {cut}"]
    weights = target.kind == "classification" and is_unbalanced(target.counts)
    if weights:
        decisions.append("data.class_weights: balanced, and macro F1 as the score: labels are rare")
    total = sum(target.counts.values()) or 1
    text = recipe_text(
        data=request.data,
        path=entry.path,
        model=request.model,
        s=chosen,
        weights=weights,
        task=entry.task,
        target=target,
        words=entry.words,
        shares={label: f"{count / total:.1%}" for label, count in target.counts.items()},
        sizes={split: len(table.rows) for split, table in entry.tables.items()},
        incomplete=sum("" in _fields(task, row).values() for table in entry.tables.values() for row in table.rows),
        cut=cut,
    )
    warnings = list(entry.warnings)
    resolved, data = _loaded(text, entry.path.parent, warnings.append)
    encoder = PromptEncoder(tokenizer, chosen.max_tokens, False)
    prefix = common_prefix(prompts) if len(prompts) > 1 else 0
    rest = round(float(np.minimum(lengths, chosen.max_tokens).mean())) - prefix
    tokens = prefix, max(1, rest), round(float(np.mean(answer_tokens)))
    return Draft(entry, text, resolved, data, encoder, decisions, warnings, tokens, on_gpu)


def _fields(task: Task, row: Any) -> dict[str, str]:
    cells = {name: row.get(task.source.columns.get(name, name)) for name in task.fields}
    return {name: "" if is_blank(cell) else str(cell).strip() for name, cell in cells.items()}


def _prompts(encoder: PromptEncoder, task: Task, rows: Sequence[Any]) -> list[list[int]]:
    """Prompts of at most `MAX_TOKENIZED` evenly spaced rows, untruncated."""
    count = min(MAX_TOKENIZED, len(rows))
    return [encoder.encode(task, _fields(task, rows[k * len(rows) // count]))[0] for k in range(count)]


def _longest_answer(encoder: PromptEncoder, task: Task, rows: Sequence[Any]) -> int:
    """Tokens of the longest answer with its tag, of a multi-label task those of the longest label set in the data."""
    sets = {task.parse_label_set(row.get(task.source.label)) for row in rows} if task.multi_label else ()
    return max(encoder.answer_tokens(task, sets).values())


def _loaded(text: str, folder: Path, warn: Callable[[str], None]) -> tuple[Recipe, RunData]:
    """The recipe and its data, read as `nlu validate` does once the recipe is in its folder."""
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "recipe.yaml"
        file.write_text(text, encoding="utf-8")
        recipe = load_recipe(file, folder=folder)
    return recipe, RunData.load(recipe, warn)


def write(made: Draft) -> None:
    """Write the recipe atomically. Raises UserError if the disk refuses."""
    try:
        write_text(made.entry.path, made.text)
    except OSError as error:
        raise UserError(
            f"{made.entry.path}: cannot be written ({error.strerror or error}); name another with --out"
        ) from error
