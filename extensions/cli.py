"""The console command `nlu`: what needs no training run. Training is `launch/ppo.sh`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from extensions.errors import UserError

app = typer.Typer(
    name="nlu",
    help="PPO with LoRA for language understanding. Train with: deepspeed launch/ppo.sh RECIPE [key.sub=value ...]",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
RecipePath = Annotated[Path, typer.Argument(help="recipe file", metavar="RECIPE")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key.sub=value ...", metavar="[KEY=VALUE]...")]
console = Console(highlight=False, soft_wrap=True)


@contextmanager
def _user_errors() -> Iterator[None]:
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None


@app.command()
def validate(recipe: RecipePath, overrides: Overrides = None) -> None:
    """Check a recipe, its reward and its data files, without loading a model; print every error at once."""
    from extensions.recipe import load_recipe

    with _user_errors():
        checked = load_recipe(recipe, overrides or [])
        problems = _problems(checked)
        if problems:
            raise UserError(f"{recipe}: {len(problems)} error(s)\n" + "\n".join(f"  {p}" for p in problems))
    names = ", ".join(task.display_name for task in checked.data.tasks)
    console.print(
        f"{recipe}: valid ({checked.model.path}; {names}; {checked.max_steps} iterations of {checked.ppo.batch_size})",
        markup=False,
    )
    if _needs_root(checked):
        console.print("data files not checked: set data.root to the folder of the official download", markup=False)


def _needs_root(recipe: Any) -> bool:
    """Whether the recipe leaves data.root to the command line, as the shipped ones do."""
    return recipe.data.root is None and any(task.suite in ("glue", "superglue") for task in recipe.data.tasks)


def _problems(recipe: Any) -> list[str]:
    """Errors in the reward file and the data files that a valid recipe names."""
    from extensions.data import has_split, load_examples
    from extensions.rewards import load_reward

    checks: list[Callable[[], Any]] = [partial(load_reward, recipe.reward)]
    if not _needs_root(recipe):
        for task in recipe.data.tasks:
            for split in ("train", "validation", "test"):
                if split == "train" or has_split(task, split):
                    checks.append(partial(load_examples, task, split, recipe.data.root))
    problems = []
    for check in checks:
        try:
            check()
        except UserError as error:
            problems.append(str(error))
    return problems


@app.command()
def show(
    recipe: RecipePath,
    overrides: Overrides = None,
    keys: Annotated[bool, typer.Option("--keys", help="list every key with its unit and origin instead")] = False,
) -> None:
    """Print the resolved recipe, with every default filled in."""
    from extensions.recipe import all_keys, dump_recipe, load_recipe

    with _user_errors():
        resolved = load_recipe(recipe, overrides or [])
    if keys:
        for key, field in all_keys().items():
            console.print(f"{key}: {field.description}", markup=False)
    else:
        print(dump_recipe(resolved), end="")


@app.command()
def preview(
    recipe: RecipePath,
    overrides: Overrides = None,
    n: Annotated[int, typer.Option("-n", min=1, help="examples a task")] = 2,
) -> None:
    """Show rendered prompts, what is prompt, response and loss, and the reward of gold, wrong and garbage answers."""
    from extensions.data import load_examples
    from extensions.packing import Sample, pack
    from extensions.policy import load_tokenizer
    from extensions.prompts import CLOSE, PromptEncoder
    from extensions.recipe import load_recipe
    from extensions.rewards import load_reward

    with _user_errors():
        resolved = load_recipe(recipe, overrides or [])
        reward = load_reward(resolved.reward)
        tokenizer = load_tokenizer(resolved.model)
        encoder = PromptEncoder(tokenizer, resolved.prompt.max_tokens or 10**6, resolved.prompt.chat_template)
        for task in resolved.data.tasks:
            examples = load_examples(task, "train", resolved.data.root)[:n]
            encoded = [encoder.encode(task, example.fields) for example in examples]
            answers = [_answers(task, str(example.label)) for example in examples]
            responses = [
                tokenizer(f"{options[0][1]}{CLOSE}", add_special_tokens=False)["input_ids"] for options in answers
            ]
            packed = pack([Sample(ids, r, task.name) for (ids, _), r in zip(encoded, responses, strict=True)])
            for k, example in enumerate(examples):
                ids, text = encoded[k]
                console.rule(_escaped(f"{task.display_name}, training row {example.index}"))
                console.print(
                    f"[cyan]{_escaped(text)}[/cyan][bold green]{_escaped(answers[k][0][1] + CLOSE)}[/bold green]"
                )
                console.print(
                    f"\nprompt (blue): {len(ids)} tokens, no loss; the first {packed.prefix_tokens} stand once for all "
                    f"rows shown. response (green): {len(responses[k])} tokens when gold, with policy and value loss",
                    markup=False,
                )
                console.print(
                    " ".join(repr(tokenizer.decode([t], clean_up_tokenization_spaces=False)) for t in responses[k]),
                    markup=False,
                )
                table = Table("answer", "text", "reward")
                for kind, answer in answers[k]:
                    response = answer if kind.startswith("garbage") else f"{answer}{CLOSE}"
                    value = reward([response], [text], [example])[0]
                    table.add_row(kind, _escaped(repr(response)), f"{value:+.2f}")
                console.print(table)


def _answers(task: Any, gold: str) -> list[tuple[str, str]]:
    """(kind, answer): gold first, then each wrong answer, then garbage."""
    if task.score_range is not None:
        low, high = task.score_range
        wrong = [("wrong", f"{value:g}") for value in (low, (low + high) / 2, high) if value != float(gold)]
    else:
        wrong = [("wrong", task.answer(label)) for label in task.labels if label != gold]
    return [
        ("gold", task.answer(gold)),
        *wrong,
        ("empty", ""),
        ("garbage", "As an AI language model, I"),
        ("garbage, unclosed", task.answer(gold)),
    ]


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


@app.command()
def tasks() -> None:
    """List the built-in tasks."""
    from extensions.tasks import TASKS

    table = Table("name", "suite", "fields", "answers", "metrics")
    for task in TASKS.values():
        answers = (
            "{:g} to {:g}".format(*task.score_range)
            if task.score_range
            else " / ".join(w[0] for w in task.labels.values())
        )
        table.add_row(task.name, task.suite, ", ".join(task.fields), answers, ", ".join(task.metrics))
    console.print(table)


@app.command()
def env() -> None:
    """Print versions and devices, for bug reports."""
    import torch

    from extensions.run import versions

    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] or ["cpu"]
    print(json.dumps(versions() | {"devices": devices, "threads": torch.get_num_threads()}, indent=2))


def main() -> None:
    app()
