"""Running a sweep: its cells one after the other, and the table that is written anew after each."""

from __future__ import annotations

import csv
import io
import itertools
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from extensions.common.console import Reporter
from extensions.common.errors import UserError
from extensions.common.files import read_json, write_json, write_text
from extensions.data import has_split
from extensions.reporting.scores import percent
from extensions.runs.resume import is_finished
from extensions.sweeps.grid import Cell, Outcome, Sweep, as_yaml, assignments, choose, outcome, script
from extensions.tasks import SUITES

# ------------------------------------------------------------------------------------------------------ the records


@dataclass
class Records:
    """The files of a sweep, and its table."""

    sweep: Sweep
    failed: dict[int, int] = field(default_factory=dict)  # number of a cell -> exit status, of this session

    def outcomes(self) -> list[Outcome]:
        found = [outcome(cell) for cell in self.sweep.cells]
        return [Outcome("failed") if k in self.failed else one for k, one in enumerate(found)]

    def best(self) -> list[Cell]:
        return [self.sweep.cells[k] for k in choose(self.sweep.cells, self.outcomes())]

    def write(self) -> None:
        """sweep.json, sweep.md, sweep.csv and best.json, each whole or not at all."""
        out, rows = self.sweep.out, self._rows()
        write_json(out / "sweep.json", {"recipe": str(self.sweep.path), "method": self.sweep.method, "cells": rows})
        write_text(out / "sweep.md", self._markdown())
        text = io.StringIO()
        flat = [{**row, "settings": ",".join(assignments(row["settings"]))} for row in rows]
        writer = csv.DictWriter(text, list(flat[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(flat)
        write_text(out / "sweep.csv", text.getvalue())
        write_json(out / "best.json", [row["folder"] for row in rows if row["best"]])

    def _rows(self) -> list[dict[str, Any]]:
        outcomes = self.outcomes()
        best = choose(self.sweep.cells, outcomes)
        return [
            {
                "task": cell.task,
                "settings": cell.settings,
                "folder": cell.folder.relative_to(self.sweep.out).as_posix(),
                **asdict(result),
                "best": k in best,
            }
            for k, (cell, result) in enumerate(zip(self.sweep.cells, outcomes, strict=True))
        ]

    def blocks(self) -> Iterator[tuple[str, list[str], list[tuple[bool, list[str]]]]]:
        """For each task its name, the heads of the columns and the lines, each with whether it is the best."""
        for task, group in itertools.groupby(self._rows(), key=lambda row: row["task"]):
            rows = list(group)
            lines = [(row["best"], [*map(as_yaml, row["settings"].values()), *_shown(row)]) for row in rows]
            yield task, [*rows[0]["settings"], "validation", "table", "samples", "seconds", "status"], lines

    def _markdown(self) -> str:
        text = [
            f"# Sweep of {self.sweep.path} by {self.sweep.method}\n\n"
            "Mean scores in percent. The best of each task, in bold, has the best validation score; the table is of "
            "the split that stands beside it. Samples and seconds are of training.\n"
        ]
        for task, heads, lines in self.blocks():
            text.append(f"\n## {task}\n\n{_line(heads)}{_line(['---:'] * (len(heads) - 1) + ['---'])}")
            text += [_line([f"**{one}**" for one in line] if best else line) for best, line in lines]
        return "".join(text)

    def table(self) -> Table:
        """The same for a console."""
        table = Table("task", title=f"Sweep by {self.sweep.method} (%)", title_justify="left")
        for task, heads, lines in self.blocks():
            if len(table.columns) == 1:
                for head in heads:
                    table.add_column(head, justify="right")
            for k, (best, line) in enumerate(lines):
                cells = [task if k == 0 else "", *line]
                table.add_row(*map(escape, cells), style="bold" if best else None, end_section=k == len(lines) - 1)
        return table


def _shown(row: Mapping[str, Any]) -> list[str]:
    table = percent(row["table"]) + (f" ({row['split']})" if row["split"] else "")
    samples = "-" if row["samples"] is None else str(row["samples"])
    seconds = "-" if row["seconds"] is None else f"{row['seconds']:.0f}"
    status = f"{row['status']}, best" if row["best"] else row["status"]
    return [percent(row["validation"]), table, samples, seconds, status]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


# ------------------------------------------------------------------------------------------------------- the running


def left(sweep: Sweep) -> list[Cell]:
    """The cells that have not finished."""
    return [cell for cell in sweep.cells if not is_finished(cell.folder)]


def run(sweep: Sweep, launcher: Sequence[str]) -> int:
    """Run what is left of a sweep, one cell after the other, and tell how it goes. Returns the exit status.

    A failed run does not stop the others: status 1 at the end. Interrupted: status 130, after the running cell was
    stopped; the same sweep goes on from there.

    Args:
        launcher: program and options in front of the launch script; `deepspeed` gets a free port for each run.

    Raises:
        UserError: no such launcher or launch script, or the folder cannot be written.
    """
    reporter, records = Reporter(active=True), Records(sweep)
    launcher = _found(launcher)
    if not script(sweep.method).is_file():
        raise UserError(f"{script(sweep.method)} is not there; install the project from its repository: pip install -e")
    try:
        (sweep.out / "logs").mkdir(parents=True, exist_ok=True)
        _warn_of_others(sweep, reporter)
        records.write()
    except OSError as error:
        raise UserError(f"--out: cannot write to {sweep.out} ({error.strerror or error}); choose another") from error
    status = 0
    try:
        with _interrupted_by(signal.SIGTERM, signal.SIGHUP):
            for number, cell in enumerate(sweep.cells):
                head = f"[{number + 1}/{len(sweep.cells)}] {cell.title}:"
                if is_finished(cell.folder):
                    reporter.info(f"{head} finished already, validation {percent(outcome(cell).validation)}")
                    continue
                _run_cell(number, head, launcher, records, reporter)
    except KeyboardInterrupt:
        reporter.warn("interrupted; the same command goes on with what is left")
        status = 130
    records.write()
    _conclude(records, reporter)
    return status or (1 if records.failed else 0)


def _run_cell(number: int, head: str, launcher: Sequence[str], records: Records, reporter: Reporter) -> None:
    sweep = records.sweep
    cell = sweep.cells[number]
    log = sweep.log(cell)
    reporter.info(f"{head} started, log {log}")
    start = time.monotonic()
    status = _execute(sweep.command(cell, [*launcher, *_port(launcher)]), log)
    seconds = f"{time.monotonic() - start:.0f} s"
    if status == 0 and is_finished(cell.folder):
        reporter.info(f"{head} finished in {seconds}, validation {percent(outcome(cell).validation)}")
    else:
        records.failed[number] = status
        tail = "".join(f"\n    {line}" for line in _tail(log))
        reporter.warn(f"{head} {_failure(status)} after {seconds}; the end of {log}:{tail}")
    records.write()


def _failure(status: int) -> str:
    return f"failed with status {status}" if status else "ended without a result (no scores in eval.json)"


def collect(sweep: Sweep) -> None:
    """Write and print the table of what is finished, and run nothing: for runs that a scheduler started."""
    records = Records(sweep)
    try:
        sweep.out.mkdir(parents=True, exist_ok=True)
        records.write()
    except OSError as error:
        raise UserError(f"--out: cannot write to {sweep.out} ({error.strerror or error}); choose another") from error
    _conclude(records, Reporter(active=True))


def _conclude(records: Records, reporter: Reporter) -> None:
    """The table, what failed, and what to do next."""
    sweep, best = records.sweep, records.best()
    reporter.console.print(records.table())
    for number, status in records.failed.items():
        cell = sweep.cells[number]
        reporter.warn(f"{cell.title}: {_failure(status)}; log {sweep.log(cell)}")
    if records.failed:
        reporter.info("the same command runs what is left once more")
    if best:
        reporter.info(f"next: {shlex.join(['nlu', 'report', str(sweep.out)])}")
    for suite in SUITES:
        answered = [
            str(cell.folder)
            for cell in best
            if (cell.folder / "predictions_test.jsonl").exists()
            and any(task.suite == suite for task in cell.recipe.data.tasks)
        ]
        if answered:
            reporter.info(f"      {shlex.join(['nlu', 'submit', *answered, '--suite', suite])}")
    for cell in best if sweep.method in ("ppo", "sft") else []:
        if not cell.recipe.evaluation.predict_test and any(has_split(t, "test") for t in cell.recipe.data.tasks):
            command = ["deepspeed", str(script("eval")), str(sweep.path), *cell.arguments]
            command = [word for word in command if not word.startswith(("output_dir=", "evaluation.predict_test="))]
            answers = [f"model.adapter={cell.folder / 'adapter'}", "evaluation.predict_test=true"]
            reporter.info(f"      {shlex.join([*command, *answers])}")


def _warn_of_others(sweep: Sweep, reporter: Reporter) -> None:
    """Say that a table which was here before gives way to another."""
    path = sweep.out / "sweep.json"
    own = {cell.folder.relative_to(sweep.out).as_posix() for cell in sweep.cells}
    others = [row["folder"] for row in read_json(path)["cells"] if row["folder"] not in own] if path.exists() else []
    if others:
        shown = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        reporter.warn(
            f"{path} was of another sweep, {len(others)} of whose runs are not in this one ({shown}); they stay where "
            "they are but leave the table. --out keeps sweeps apart"
        )


def _found(launcher: Sequence[str]) -> list[str]:
    """The launcher with its program's path: on PATH, or beside this Python where its environment is not active."""
    beside = f"{os.environ.get('PATH', os.defpath)}{os.pathsep}{Path(sys.executable).parent}"
    program = shutil.which(launcher[0], path=beside)
    if program is None:
        raise UserError(
            f"--launcher: {shlex.join(launcher)!r}: no such program; expected one that starts launch scripts, with its "
            "options, for example 'deepspeed --num_gpus 4' or 'bash'"
        )
    return [program, *launcher[1:]]


def _port(launcher: Sequence[str]) -> list[str]:
    """A free port for DeepSpeed's ranks, so that two sweeps on a machine do not meet on the default one."""
    if Path(launcher[0]).name != "deepspeed" or any(option.startswith("--master_port") for option in launcher):
        return []
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return ["--master_port", str(probe.getsockname()[1])]


def _execute(command: Sequence[str], log: Path) -> int:
    """Run a command, its output added to a log; returns its exit status. An exception here stops all its processes."""
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ {shlex.join(command)}\n")
        file.flush()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return process.wait()
        except BaseException:
            _stop(process)
            raise


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a launcher and its ranks, which are one process group: some time to end by themselves, then at once."""
    try:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=30)
    except (ProcessLookupError, subprocess.TimeoutExpired):
        pass
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@contextmanager
def _interrupted_by(*signals: signal.Signals) -> Iterator[None]:
    """Signals that would end this process and leave its run behind do what Ctrl-C does; nohup's ignoring stays."""
    before = {one: signal.getsignal(one) for one in signals}
    for one, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(one, signal.default_int_handler)
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def _tail(log: Path, lines: int = 12) -> list[str]:
    """The last lines of the last run in a log."""
    text = log.read_text(encoding="utf-8", errors="replace").splitlines()
    start = max(k for k, line in enumerate(text) if line.startswith("$ "))
    return [line for line in text[start + 1 :] if line.strip()][-lines:]
