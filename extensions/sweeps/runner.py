"""Running the cells of a sweep one after the other."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from extensions.common.console import Reporter
from extensions.common.errors import UserError
from extensions.common.files import read_json
from extensions.data import has_split
from extensions.reporting.scores import percent
from extensions.reporting.yardstick_lines import print_yardsticks
from extensions.runs.resume import is_finished
from extensions.sweeps.grid import Cell, Sweep, script
from extensions.sweeps.records import SweepRecords, outcome
from extensions.tasks import SUITES


def unfinished(sweep: Sweep) -> list[Cell]:
    return [cell for cell in sweep.cells if not is_finished(cell.folder)]


def run(sweep: Sweep, launcher: Sequence[str]) -> int:
    """Run the unfinished cells of a sweep and report on them. Returns the exit status.

    A failed run does not stop the others: status 1 at the end. An interrupt stops the running cell: status 130; the
    same sweep then continues with the unfinished cells.

    Args:
        launcher: program and options before the launch script; `deepspeed` gets a free port per run.

    Raises:
        UserError: no such launcher or launch script, or the folder cannot be written.
    """
    reporter, records = Reporter(active=True), SweepRecords(sweep)
    launcher = _resolved(launcher)
    if not script(sweep.method).is_file():
        raise UserError(f"{script(sweep.method)} is missing; install the project from its repository: pip install -e")
    with _writable(sweep):
        (sweep.out / "logs").mkdir(parents=True, exist_ok=True)
        _warn_of_others(sweep, reporter)
        records.write()
    status = 0
    try:
        with ExitStack() as stack:
            for one in (signal.SIGTERM, signal.SIGHUP):  # else these end this process and leave its run behind
                if signal.getsignal(one) is not signal.SIG_IGN:  # nohup
                    stack.callback(signal.signal, one, signal.signal(one, signal.default_int_handler))
            for index, cell in enumerate(sweep.cells):
                head = f"[{index + 1}/{len(sweep.cells)}] {cell.title}:"
                if is_finished(cell.folder):
                    reporter.info(f"{head} finished already, validation {percent(outcome(cell).validation)}")
                else:
                    _run_cell(index, head, launcher, records, reporter)
    except KeyboardInterrupt:
        reporter.warn("interrupted; the same command continues with the unfinished runs")
        status = 130
    records.write()
    _conclude(records, reporter)
    return status or (1 if records.failed else 0)


def collect(sweep: Sweep) -> None:
    """Write and print the table of the finished cells, and run nothing: for runs that a scheduler started."""
    records = SweepRecords(sweep)
    with _writable(sweep):
        sweep.out.mkdir(parents=True, exist_ok=True)
        records.write()
    _conclude(records, Reporter(active=True))


@contextmanager
def _writable(sweep: Sweep) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"--out: cannot write to {sweep.out} ({error.strerror or error}); choose another") from error


def _run_cell(index: int, head: str, launcher: Sequence[str], records: SweepRecords, reporter: Reporter) -> None:
    sweep = records.sweep
    cell = sweep.cells[index]
    log = sweep.log(cell)
    reporter.info(f"{head} started, log {log}")
    start = time.monotonic()
    status = _execute(sweep.command(cell, [*launcher, *_port_option(launcher)]), log)
    seconds = f"{time.monotonic() - start:.0f} s"
    if status == 0 and is_finished(cell.folder):
        reporter.info(f"{head} finished in {seconds}, validation {percent(outcome(cell).validation)}")
    else:
        records.failed[index] = status
        tail = "".join(f"\n    {line}" for line in _tail(log))
        reporter.warn(f"{head} {_failure(status)} after {seconds}; the end of {log}:{tail}")
    records.write()


def _failure(status: int) -> str:
    return f"failed with status {status}" if status else "ended without a result (no scores in eval.json)"


def _conclude(records: SweepRecords, reporter: Reporter) -> None:
    """The table, the failures, and the commands to run next."""
    sweep = records.sweep
    best = [cell for cell, row in zip(sweep.cells, records.rows(), strict=True) if row["best"]]
    reporter.console.print(records.table())
    print_yardsticks([task for cell in best for task in cell.recipe.data.tasks], _yardsticks(best), reporter)
    for index, status in records.failed.items():
        cell = sweep.cells[index]
        reporter.warn(f"{cell.title}: {_failure(status)}; log {sweep.log(cell)}")
    if records.failed:
        reporter.info("the same command runs the unfinished cells again")
    for task in records.incomparable():
        reporter.warn(
            f"{task}: no best cell, since the cells were evaluated on different rows; give each the same seed, "
            "data.root and files"
        )
    if len(sweep.cells) > len({cell.task for cell in sweep.cells}):
        reporter.info(f"validation: {records.compared_by}")
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
            own = ("output_dir=", "evaluation.predict_test=", "evaluation.split=")  # of the sweep
            command = [word for word in command if not word.startswith(own)]
            answers = [f"model.adapter={cell.folder / 'adapter'}", "evaluation.predict_test=true"]
            reporter.info(f"      {shlex.join([*command, *answers])}")


def _yardsticks(cells: Sequence[Cell]) -> dict[str, dict[str, Any]]:
    """Yardstick -> task -> result, of the training rows of these cells."""
    found: dict[str, dict[str, Any]] = {}
    for cell in cells:
        for kind, results in read_json(cell.folder / "eval.json").get("yardsticks", {}).items():
            found.setdefault(kind, {}).update(results)
    return found


def _warn_of_others(sweep: Sweep, reporter: Reporter) -> None:
    """Warn that the table of another sweep in this folder is replaced."""
    path = sweep.out / "sweep.json"
    own = {cell.folder.relative_to(sweep.out).as_posix() for cell in sweep.cells}
    others = [row["folder"] for row in read_json(path)["cells"] if row["folder"] not in own] if path.exists() else []
    if others:
        shown = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        reporter.warn(
            f"{path} is of another sweep, {len(others)} of whose runs are not in this one ({shown}); their folders "
            "stay, but they leave the table. Give each sweep its own --out to keep both tables"
        )


def _resolved(launcher: Sequence[str]) -> list[str]:
    """The launcher with its program's path: on PATH, or beside this Python if its environment is not active."""
    path = f"{os.environ.get('PATH', os.defpath)}{os.pathsep}{Path(sys.executable).parent}"
    program = shutil.which(launcher[0], path=path)
    if program is None:
        raise UserError(
            f"--launcher: {shlex.join(launcher)!r}: no such program; expected one that starts launch scripts, with its "
            "options, for example 'deepspeed --num_gpus 4' or 'bash'"
        )
    return [program, *launcher[1:]]


def _port_option(launcher: Sequence[str]) -> list[str]:
    """A free port for DeepSpeed's ranks on one node, so that two sweeps on a machine do not share the default one."""
    given = ("--master_port", "--hostfile", "-H")
    if Path(launcher[0]).name != "deepspeed" or any(option.startswith(given) for option in launcher):
        return []
    return ["--master_port", "0"]  # `extensions.distributed.rendezvous`


def _execute(command: Sequence[str], log: Path) -> int:
    """Run a command and append its output to a log; returns its exit status. An exception stops its process group."""
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ {shlex.join(command)}\n")
        file.flush()
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return process.wait()
        except BaseException:
            with suppress(ProcessLookupError):  # the launcher and its ranks get 30 s to end by themselves
                os.killpg(process.pid, signal.SIGTERM)
                try:
                    process.wait(timeout=30)
                except subprocess.TimeoutExpired:
                    pass
                finally:
                    os.killpg(process.pid, signal.SIGKILL)
            raise


def _tail(log: Path, lines: int = 12) -> list[str]:
    """The last lines of the last run in a log."""
    text = log.read_text(encoding="utf-8", errors="replace").splitlines()
    start = max(k for k, line in enumerate(text) if line.startswith("$ "))
    return [line for line in text[start + 1 :] if line.strip()][-lines:]
