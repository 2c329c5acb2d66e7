"""Console output: data as they are, in any encoding; messages, warnings and progress of a run."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any, TextIO

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

_CONTROL = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")  # all but tab and line feed; half surrogates
LINE = 68  # columns of the live line besides its bar, with a reward of two digits and six digits of steps


def visible(text: str) -> str:
    """The text with control characters as backslash escapes: raw, they would act on the terminal."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def escape_unencodable() -> None:
    """Write characters that the console's encoding lacks as backslash escapes, which Python does on stderr only."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def say(text: str, file: TextIO | None = None) -> None:
    """Print lines that may hold data."""
    print(visible(text), file=file, flush=True)


class DataConsole(Console):
    """A rich console that prints texts as they are: no markup (`[red]`), emoji codes (`1:100:3`) or highlighting."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    @property
    def encoding(self) -> str:
        """That of the stream; rich (15.0) takes UTF-8 for standard output, and would draw boxes that ASCII lacks."""
        return (getattr(self.file, "encoding", None) or "utf-8").lower()

    def render_str(self, text: str, **options: Any) -> Text:
        shown = visible(text)
        if not self.encoding.startswith("utf"):  # here rather than by the stream, so that columns are wide enough
            shown = shown.encode(self.encoding, "backslashreplace").decode(self.encoding)
        return super().render_str(shown, **options)


class Reporter:
    """Console output of one process: a live bar on a terminal, one line per iteration elsewhere.

    Args:
        active: False suppresses all output; it is True on rank 0 only.

    Attributes:
        done: iterations so far.
        warnings: each distinct warning -> iterations done when it was first printed.
        record: called with the step and text of each new warning; set by the run folder.
        changed: called at each new phase; set by the run folder.
        last_step: iterations of the whole run, if known.
        validate_every: iterations between its validations, if known; 0: none.
    """

    def __init__(self, active: bool) -> None:
        self.active = active
        width = None if sys.stdout.isatty() else 120
        escape_unencodable()
        self.console = DataConsole(file=sys.stdout, width=width, quiet=not active)
        self.done = 0
        self.warnings: dict[str, int] = {}
        self.record: Callable[[int, str], None] | None = None
        self.changed: Callable[[], None] | None = None
        self.last_step: int | None = None
        self.validate_every: int | None = None
        self._phase = "loading"
        self._rows = (0, 0)  # done and all, of an evaluation
        self._rows_eta: float | None = None  # seconds until its end
        self._eta: float | None = None  # seconds until the end of the training
        self._bar: _Bar | None = None
        self._started = self._phase_started = self._last_progress = time.monotonic()

    def info(self, text: str) -> None:
        self.console.print(text, soft_wrap=True)

    def warn(self, text: str) -> None:
        self.console.print(f"warning: {text}", style="yellow", soft_wrap=True)
        if text not in self.warnings:
            self.warnings[text] = self.done
            if self.record is not None:
                self.record(self.done, text)

    def phase(self, name: str) -> None:
        """Say what the run does from here on, for its status file; nothing is printed."""
        if name != self._phase:
            self._phase, self._rows, self._rows_eta = name, (0, 0), None
            if self.changed is not None:
                self.changed()

    def status(self) -> dict[str, Any]:
        """What the run does now, as JSON; called in other threads."""
        done, total = self._rows
        rows = {"rows": done, "rows_total": total, "rows_eta_s": self._rows_eta} if total else {}
        steps = {"step": self.done, "last_step": self.last_step, "validate_every": self.validate_every}
        return {"phase": self._phase, **rows, **steps, "eta_s": self._eta}

    def progress(self, done: int, total: int) -> None:
        """Report the number of evaluated rows, at most once per minute."""
        self._rows = (done, total)
        if done == 0:
            self._phase_started = self._last_progress = time.monotonic()
        else:
            self._rows_eta = (time.monotonic() - self._phase_started) / done * max(0, total - done)
        if done and time.monotonic() - self._last_progress >= 60:
            self._last_progress = time.monotonic()
            self.info(f"  {done} of {total} rows")

    def begin(self, total: int, first: int) -> None:
        """Start the progress display of `total` iterations, of which `first` are done."""
        self._started, self._first, self._total, self.done = time.monotonic(), first, total, first
        self.last_step = total
        if self.active and self.console.is_terminal:
            bar = BarColumn(bar_width=max(4, min(40, self.console.width - LINE)))
            self._bar = _Bar(
                MofNCompleteColumn(), bar, TextColumn("{task.description}", markup=False), console=self.console
            )
            self._bar.start()
            self._task = self._bar.add_task("", total=total, completed=first)

    def step(self, done: int, line: str, details: str = "") -> None:
        """Report one iteration.

        Args:
            done: iterations so far.
            line: its most important metrics, in at most 45 columns.
            details: more of them; a second line on a terminal, cut at its width.
        """
        self.done = done
        seconds = time.monotonic() - self._started
        self._eta = seconds / max(1, done - self._first) * (self._total - done)
        line = f"{line}  ETA {clock(self._eta)}"
        if self._bar is not None:
            self._bar.details = visible(details)
            self._bar.update(self._task, completed=done, description=visible(line))
        else:
            self.info(f"step {done:>4}/{self._total}  {line}  {details}".rstrip())

    def end(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class _Bar(Progress):
    """A bar with a line of details below it."""

    details = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.details:
            yield Text(self.details, no_wrap=True, overflow="ellipsis")


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"
