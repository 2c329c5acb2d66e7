"""The console command `nlu`. Training and evaluation runs are started by the scripts in launch/ instead."""

from __future__ import annotations

import sys

from extensions.cli import inspect, planning, results, run, status  # noqa: F401 (each registers its commands)
from extensions.cli.app import app
from extensions.common.console import escape_unencodable


def main() -> None:
    escape_unencodable()
    if not (sys.stdout.encoding or "utf-8").lower().startswith("utf"):
        app.rich_markup_mode = None  # typer (0.29) draws the boxes of --help in Unicode only
    app()
