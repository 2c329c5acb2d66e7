"""DeepSpeed's launcher without its faults (checked with DeepSpeed 0.19.6): the `deepspeed` of .venv, by setup.sh.

- `accelerator/real_accelerator.py:199` warns in each process that it has found no accelerator: of the launcher's two
  processes it says nothing about the run, whose model.json names the device.
- `launcher/launch.py:341` logs an error of `sigkill_handler` for every exit status but 0, below the error that the rank
  has printed itself. A rank killed by a signal has printed none, so this module reports it, and writes it to the run's
  status.json.
- `launcher/runner.py:651` exits with status 0 when its per-node process (launch.py) is killed by a signal.
- Every run takes port 29500. Here the ranks of one node meet at a free one (`extensions.distributed.rendezvous`),
  unless --master_port or MASTER_PORT gives another.

`deepspeed --log_level info` prints all of DeepSpeed's messages but the warning.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from extensions.common.console import say
from extensions.common.processes import killed_for, oom_kills
from extensions.common.status_file import end_for
from extensions.distributed.run_in_progress import run_folder, run_in_progress
from extensions.distributed.signals import deepspeed_command

NO_ACCELERATOR = "Setting accelerator to CPU."
LESS_MEMORY = (
    "Less memory: a smaller ppo.micro_batch_size, sft.micro_batch_size or evaluation.batch_size, "
    "model.gradient_checkpointing=true"
)


def main(arguments: Sequence[str] | None = None) -> None:
    """`deepspeed ARGUMENTS`. Raises SystemExit with the exit status of the first rank that failed."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    own = next((k for k, word in enumerate(words) if _is_own(word)), None)
    started, kills = time.time(), oom_kills()
    run = (Path(words[own]).stem, words[own + 1 :]) if own is not None else None
    if run is not None and (error := run_in_progress(*run)) is not None:
        say(f"error: {error}", sys.stderr)
        sys.exit(2)
    status, reason = _launch(words, run is not None)
    if reason is not None:
        if reason.endswith("SIGKILL"):
            out_of_memory, sentence = killed_for(kills)
            reason += f" ({sentence})" + (f"\n{LESS_MEMORY}" if out_of_memory else "")
        resume = f"\nresume with: {deepspeed_command(words)}" if run is not None else ""
        say(f"error: {reason}{resume}", sys.stderr)
    if status and run is not None and (folder := run_folder(*run)) is not None:
        end_for(folder, started, status, reason)
    sys.exit(status)


def _launch(words: Sequence[str], is_run: bool) -> tuple[int, str | None]:
    """DeepSpeed's launcher: the exit status, and how a process that could not say so ended.

    Args:
        is_run: whether the ranks are those of a script of launch/.
    """
    # Before deepspeed is imported, which chooses the accelerator.
    logging.getLogger("DeepSpeed").addFilter(lambda record: not record.getMessage().startswith(NO_ACCELERATOR))
    from deepspeed.accelerator import get_accelerator
    from deepspeed.launcher import runner

    parse, default_port = runner.parse_args, runner.TORCH_DISTRIBUTED_DEFAULT_PORT
    started: list[subprocess.Popen[Any]] = []  # the last is the per-node process, or starts those of all nodes

    def parse_quietly(words: Sequence[str]) -> object:
        port = os.environ.get("MASTER_PORT", "0")
        parsed = parse(["--log_level", "critical", "--master_port", port, *words])
        parsed.quiet = False  # an alias of `--log_level error`
        # Other programs do not know port 0, and several nodes need one that all know.
        if parsed.master_port == 0 and (not is_run or os.path.isfile(parsed.hostfile)):
            parsed.master_port = default_port
        return parsed

    class Started(subprocess.Popen):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            started.append(self)

    recorded = types.ModuleType("subprocess")
    vars(recorded).update(vars(subprocess), Popen=Started)
    runner.subprocess, runner.parse_args = recorded, parse_quietly
    os.environ.setdefault("DS_ACCELERATOR", get_accelerator()._name)  # for the second process and the ranks
    try:
        runner.main(words)
    except SystemExit as end:
        if not isinstance(end.code, int):
            raise
        name = _signal_of(end.code)
        return end.code, f"a rank was killed by {name}" if name is not None else None
    code = started[-1].returncode if started else 0
    if code >= 0:
        return 0, None
    name = signal.Signals(-code).name
    return 256 + code, f"DeepSpeed's per-node launcher, the parent of the ranks, was killed by {name}"


def _is_own(word: str) -> bool:
    """Whether a word of a command is a script of launch/, of this checkout or of another one."""
    path = Path(word).resolve()
    checkout = path.parent.parent
    return path.match("launch/*.sh") and (checkout / "extensions" / "distributed" / "rendezvous.py").is_file()


def _signal_of(status: int) -> str | None:
    """The signal behind an exit status of DeepSpeed's launcher, which exits with -N for a rank killed by signal N."""
    try:
        return signal.Signals(256 - status).name
    except ValueError:
        return None
