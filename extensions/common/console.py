"""What a run prints."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class Reporter:
    """What a run prints: a live bar on a terminal, one quiet line an iteration elsewhere. Silent but on rank 0."""

    def __init__(self, active: bool) -> None:
        self.active = active
        width = None if sys.stdout.isatty() else 120
        self.console = Console(file=sys.stdout, width=width, highlight=False, quiet=not active)
        self._bar: Progress | None = None
        self._started = self._spoke = time.monotonic()

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        self.console.print(f"warning: {text}", style="yellow", markup=False, soft_wrap=True)

    def progress(self, done: int, total: int) -> None:
        """How far an evaluation is, at most once a minute."""
        if done == 0:
            self._spoke = time.monotonic()
        elif time.monotonic() - self._spoke >= 60:
            self._spoke = time.monotonic()
            self.say(f"  {done} of {total} rows")

    def begin(self, total: int, first: int) -> None:
        """Start the progress of `total` iterations, of which `first` are done."""
        self._started, self._first, self._total = time.monotonic(), first, total
        if self.active and self.console.is_terminal:
            columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
            self._bar = Progress(*columns, console=self.console)
            self._bar.start()
            self._task = self._bar.add_task("", total=total, completed=first)

    def step(self, record: dict[str, Any]) -> None:
        """Show the metrics of one iteration."""
        done = record["step"]
        seconds = time.monotonic() - self._started
        eta = seconds / max(1, done - self._first) * (self._total - done)
        if "reward_mean" not in record:
            self._show(
                done,
                f"loss {record['loss']:.3f}  of the answer {record['answer_loss']:.3f}  "
                f"{record['samples_per_s']:.1f} samples/s  ETA {_clock(eta)}",
            )
            return
        shares = " ".join(f"{name} {share:.0%}" for name, share in record["predicted_shares"].items())
        kl = "-" if record["kl"] is None else f"{record['kl']:.2f}"
        accuracy = "" if record["accuracy"] is None else f"acc {record['accuracy']:.2f}  "
        self._show(
            done,
            f"reward {record['reward_mean']:+.2f}  {accuracy}wrong format {record['format_error_rate']:.0%}  "
            f"kl {kl}  {shares}  {record['samples_per_s']:.1f} samples/s  ETA {_clock(eta)}",
        )

    def _show(self, done: int, line: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=done, description=line)
        else:
            self.say(f"step {done:>4}/{self._total}  {line}")

    def end(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"
