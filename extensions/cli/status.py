"""The command that watches runs: status."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from extensions.cli.app import command, console


@command
def status(
    runs: Annotated[
        list[Path] | None, typer.Argument(help="run folders, or folders of these; default: runs/", metavar="[RUN]...")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="a JSON list, one object per run")] = False,
) -> None:
    """What runs do now, or how they ended: step, ETA, validation, warnings, disk, and the command to resume."""
    from extensions.runs.status import find_runs, run_status, status_lines, status_table

    found = [run_status(run) for run in find_runs(runs or [Path("runs")])]
    if as_json:
        print(json.dumps([one.as_json() for one in found], indent=2))
    elif len(found) == 1:
        console.print("\n".join(status_lines(found[0])))
    else:
        console.print(status_table(found))
        for one in found:
            if one.resume is not None:
                why = f"{one.run}: {one.state}" + (f": {one.why}" if one.why else "")
                console.print(f"{why}\n  resume with: {one.resume}")
