"""The console command `nlu`: everything but the runs, which the scripts of launch/ start."""

from __future__ import annotations

from extensions.cli import inspect, planning, results, run  # noqa: F401 (each registers its commands)
from extensions.cli.app import app


def main() -> None:
    app()
