"""Whether a command starts a run that is running already, known before torch is loaded or a port opened."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from extensions.common.errors import UserError
from extensions.common.run_lock import check_free
from extensions.recipe import load_recipe


def run_folder(script: str, arguments: Sequence[str]) -> Path | None:
    """The run folder of launch/SCRIPT.sh ARGUMENTS; None for an invalid command, which the run itself reports."""
    words = [word for word in arguments if not word.startswith("--")]
    with suppress(UserError, IndexError):
        return load_recipe(words[0], words[1:], script.removesuffix("_ray")).run_dir
    return None


def run_in_progress(script: str, arguments: Sequence[str]) -> str | None:
    """The error of a command whose run is running already."""
    folder = run_folder(script, arguments)
    try:
        if folder is not None:
            check_free(folder)
    except UserError as error:
        return str(error)
    return None
