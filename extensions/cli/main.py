"""The console command `nlu`. Training and evaluation runs are started by the scripts in launch/ instead."""

from __future__ import annotations

from extensions.cli import inspect, planning, results, run, status  # noqa: F401 (each registers its commands)
from extensions.cli.app import app


def main() -> None:
    app()
