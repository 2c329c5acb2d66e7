"""Entry point of the scripts in launch/, one process per rank: sets the environment, then runs the method's backend.

Nothing heavy is imported at the top, since the environment must be set before torch loads.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from extensions.common.console import escape_unencodable, say
from extensions.common.environment import prepare_environment
from extensions.distributed.run_in_progress import run_in_progress

if TYPE_CHECKING:
    from extensions.recipe import Recipe


def main(script: str, arguments: Sequence[str]) -> int:
    """Entry point of launch/SCRIPT.sh: [--local_rank=K] RECIPE [key.sub=value ...]. Returns the exit status."""
    prepare_environment()
    escape_unencodable()
    arguments = [argument for argument in arguments if not argument.startswith("--local_rank")]
    first = os.environ.get("LOCAL_RANK", "0") == "0"  # of this node, whose other ranks the launcher ends
    if first and "--print" not in arguments and (error := run_in_progress(script, arguments)) is not None:
        say(f"error: {error}", sys.stderr)
        return 2
    from extensions.runs.main import main as run_main

    if script == "encoder":
        from extensions.encoder.run import run_encoder

        return run_main(arguments, "encoder", run_encoder)
    if script == "ppo_ray":
        from extensions.ray_backend.driver import describe_run, start_run

        do = (lambda recipe: print(describe_run(recipe))) if "--print" in arguments else start_run
        return run_main([word for word in arguments if word != "--print"], "ppo", do, script, ["backend=ray"])
    return run_main(arguments, script, on_backend)


def on_backend(recipe: Recipe) -> None:
    """Run a recipe on the backend that it names."""
    if recipe.backend == "ray":
        from extensions.ray_backend.driver import start_run

        if os.environ.get("RANK", "0") == "0":  # Ray starts its own ranks
            start_run(recipe)
        return
    from extensions.runs.build import run

    run(recipe)
