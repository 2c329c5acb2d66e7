"""The Typer app `nlu`, and what its commands share: arguments, console, errors.

Commands import their dependencies inside the function, since `nlu --help` must not load torch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from extensions.common.console import DataConsole, escape_unencodable, say
from extensions.common.errors import UserError

app = typer.Typer(
    name="nlu",
    help="PPO with LoRA for language understanding. Train with: deepspeed launch/ppo.sh RECIPE [key.sub=value ...]; "
    "also sft.sh, eval.sh and encoder.sh.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = DataConsole(soft_wrap=True, width=None if sys.stdout.isatty() else 160)

RecipePath = Annotated[Path, typer.Argument(help="recipe file", metavar="RECIPE")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key.sub=value ...", metavar="[KEY=VALUE]...")]
OutputFolder = Annotated[Path, typer.Argument(help="folder to write", metavar="DIR")]

Command = TypeVar("Command", bound=Callable[..., Any])


@contextmanager
def _user_errors() -> Iterator[None]:
    escape_unencodable()
    try:
        yield
    except UserError as error:
        say(f"error: {error}", sys.stderr)
        raise typer.Exit(2) from None


def command(function: Command) -> Command:
    """Register a command of `nlu`. A `UserError` is printed without a traceback; the exit status is 2."""
    return app.command()(_user_errors()(function))


def warn(message: str) -> None:
    say(f"warning: {message}", sys.stderr)


def prompt_encoder(recipe: Any) -> Any:
    """The recipe's prompt encoder, with its demonstrations.

    Raises:
        UserError: the recipe is for `launch/encoder.sh`.
    """
    if recipe.method == "encoder":
        raise UserError("this recipe is for launch/encoder.sh, and encoders have no prompts; give a recipe of an LLM")
    from extensions.model.loading import load_config
    from extensions.model.prompt_encoder import load_recipe_encoder

    return load_recipe_encoder(recipe, load_config(recipe.model), recipe.data.tasks, warn)
