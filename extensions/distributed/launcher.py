"""DeepSpeed's launcher without its noise (checked with DeepSpeed 0.19.6): the `deepspeed` of .venv, by launch/setup.sh.

- `accelerator/real_accelerator.py:199` warns in each process that it has found no accelerator: of the launcher's two
  processes it says nothing about the run, whose model.json names the device.
- `launcher/launch.py:341` logs an error of `sigkill_handler` for every exit status but 0, below the error that the rank
  has printed itself. A rank killed by a signal has printed none, so this module reports it.

`deepspeed --log_level info` prints all of DeepSpeed's messages but the warning.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence

NO_ACCELERATOR = "Setting accelerator to CPU."


def main(arguments: Sequence[str] | None = None) -> None:
    """`deepspeed ARGUMENTS`. Raises SystemExit with the exit status of the first rank that failed."""
    # Before deepspeed is imported, which chooses the accelerator.
    logging.getLogger("DeepSpeed").addFilter(lambda record: not record.getMessage().startswith(NO_ACCELERATOR))
    from deepspeed.accelerator import get_accelerator
    from deepspeed.launcher import runner

    parse = runner.parse_args

    def parse_quietly(words: Sequence[str]) -> object:
        parsed = parse(["--log_level", "critical", *words])
        parsed.quiet = False  # an alias of `--log_level error`
        return parsed

    runner.parse_args = parse_quietly
    os.environ.setdefault("DS_ACCELERATOR", get_accelerator()._name)  # for the second process and the ranks
    try:
        runner.main(sys.argv[1:] if arguments is None else arguments)
    except SystemExit as end:
        if isinstance(end.code, int) and (name := _signal_of(end.code)) is not None:
            print(
                f"error: a rank was killed by {name}; most are killed for lack of memory", file=sys.stderr, flush=True
            )
        raise


def _signal_of(status: int) -> str | None:
    """The signal behind an exit status of DeepSpeed's launcher, which exits with -N for a rank killed by signal N."""
    try:
        return signal.Signals(256 - status).name
    except ValueError:
        return None
