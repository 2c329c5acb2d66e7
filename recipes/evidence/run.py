"""Runs the cells of `cells.yaml` one after the other, unattended.

    python recipes/evidence/run.py path/to/data                       # all cells; the same command continues
    python recipes/evidence/run.py path/to/data --only '^sst2/' --minutes 60
    nice -n 10 python recipes/evidence/run.py path/to/data            # with low priority
    python recipes/evidence/run.py path/to/data --missing             # the cells that results/ has no numbers of
    python recipes/evidence/run.py path/to/data --list                # the commands, and which cells are finished

Finished cells are skipped, and a stopped one resumes from its last checkpoint. A failed cell does not stop the others.
Several of these may run at once: each takes the next cell that no other has. OMP_NUM_THREADS sets the threads of a run.
Every cell imports this checkout when it starts: run them in one that does not change (git worktree add --detach).
"""

from __future__ import annotations

import argparse
import fcntl
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Container, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from cells import Evidence, EvidenceCell, measured

from extensions.common.errors import UserError
from extensions.common.files import jsonl

USAGE = "usage.jsonl"  # one line per session of a cell: its command, seconds and machine
POLL_S = 0.5


class Runner:
    """One pass over the cells.

    Args:
        only: cells whose name matches; the others that these need run too.
        deadline: of `time.monotonic`, when the running cell is asked to save and to stop; None: none.
    """

    def __init__(self, evidence: Evidence, cells: Sequence[EvidenceCell], deadline: float | None = None) -> None:
        self.evidence, self.cells, self.deadline = evidence, cells, deadline
        self.failed: list[EvidenceCell] = []

    def run(self) -> int:
        """Returns the exit status: 1 if a cell failed."""
        waiting = []
        for number, cell in enumerate(self.cells, start=1):
            head = f"[{number}/{len(self.cells)}] {cell.name}:"
            if self.deadline is not None and time.monotonic() >= self.deadline:
                print("the time is over; the same command continues")
                break
            if self.evidence.is_finished(cell):
                continue
            if missing := [one.name for one in self.evidence.needs(cell) if not self.evidence.is_finished(one)]:
                waiting.append(f"{head} needs {', '.join(missing)}")
            elif (lock := self._claim(cell)) is None:
                print(f"{head} another process runs it")
            else:
                with lock:
                    self._run(cell, head)
        print("\n".join([*waiting, *(f"{cell.name}: failed, log {self._log(cell)}" for cell in self.failed)]))
        return 1 if self.failed else 0

    def _claim(self, cell: EvidenceCell) -> IO[str] | None:
        """A file whose closing releases the cell; None if another process has it."""
        path = self._log(cell).with_suffix(".lock")
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        return file

    def _log(self, cell: EvidenceCell) -> Path:
        return self.evidence.out / "logs" / f"{cell.name.replace('/', '-')}.log"

    def _run(self, cell: EvidenceCell, head: str) -> None:
        command = self.evidence.command(cell)
        print(f"{head} started, log {self._log(cell)}", flush=True)
        start, now = time.monotonic(), datetime.now(UTC)
        status, user, system = self._execute(command, self._log(cell))
        record: dict[str, Any] = {
            "cell": cell.name,
            "command": shlex.join(command),
            "started": now.isoformat(timespec="seconds"),
            "wall_s": round(time.monotonic() - start, 1),
            "user_s": round(user, 1),
            "system_s": round(system, 1),
            "status": status,
            "load": round(os.getloadavg()[0], 1),
            "nice": os.nice(0),
            "threads": os.environ.get("OMP_NUM_THREADS"),
            "processor": _processor(),
        }
        with (self.evidence.out / USAGE).open("a", encoding="utf-8") as file:
            file.write(jsonl([record]))
        if self.evidence.is_finished(cell):
            print(f"{head} finished, {record['wall_s']:.0f} s, {user + system:.0f} s of a processor", flush=True)
        elif status == 0:
            print(f"{head} stopped, resumes next time", flush=True)
        else:
            self.failed.append(cell)
            print(f"{head} failed with status {status}; the end of its log:", flush=True)
            print("".join(self._log(cell).read_text(errors="replace").splitlines(keepends=True)[-8:]))

    def _execute(self, command: Sequence[str], log: Path) -> tuple[int, float, float]:
        """Exit status, user and system seconds of a command with all its descendants. Its output goes to a log."""
        with log.open("a", encoding="utf-8") as file:
            file.write(f"$ {shlex.join(command)}\n")
            file.flush()
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
        asked = False
        while True:
            try:
                pid, status, usage = os.wait4(process.pid, os.WNOHANG)
                if pid:
                    process.returncode = os.waitstatus_to_exitcode(status)
                    return process.returncode, usage.ru_utime, usage.ru_stime
                if not asked and self.deadline is not None and time.monotonic() >= self.deadline:
                    asked = True
                    process.send_signal(signal.SIGTERM)  # launch.sh passes it on; the run saves and ends
                time.sleep(POLL_S)
            except KeyboardInterrupt:
                process.send_signal(signal.SIGTERM)
                process.wait()
                raise


def _processor() -> str:
    """Model of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def chosen(evidence: Evidence, only: str | None, known: Container[str] = ()) -> list[EvidenceCell]:
    """The cells whose name matches and is not known, in order, and those that they need."""
    wanted = [c for c in evidence.cells if (only is None or re.search(only, c.name)) and c.name not in known]
    names = {cell.name for cell in wanted} | {one.name for cell in wanted for one in evidence.needs(cell)}
    found = [cell for cell in evidence.cells if cell.name in names]
    return list({cell.name: cell for cell in found}.values())


def check(evidence: Evidence, cells: Sequence[EvidenceCell]) -> None:
    """UserError: with every invalid key of the cells whose recipes are known before any has run."""
    errors = []
    for cell in cells:
        try:
            if not cell.seconds_of:
                evidence.recipe(cell)
        except UserError as error:
            errors.append(f"{cell.name}: {error}")
    if errors:
        raise UserError("\n".join(errors))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="folder that holds glue/ and superglue/")
    parser.add_argument("overrides", nargs="*", help="key=value of every cell")
    parser.add_argument("--out", type=Path, default=Path("runs/evidence"), help="folder of the runs")
    parser.add_argument("--only", help="cells whose name matches this regular expression, and those that they need")
    parser.add_argument("--missing", action="store_true", help="cells without numbers in results/, and those they need")
    parser.add_argument("--minutes", type=float, help="after which the running cell saves and stops")
    parser.add_argument("--list", action="store_true", help="print the cells and run none")
    args = parser.parse_args(arguments)
    evidence = Evidence.load(args.root.resolve(), args.out, args.overrides)
    try:
        cells = chosen(evidence, args.only, measured() if args.missing else ())
        if not cells:
            raise UserError(f"--only {args.only}: no cell of {len(evidence.cells)} matches; --list shows their names")
        check(evidence, cells)
    except (UserError, re.error) as error:
        print(error, file=sys.stderr)
        return 2
    if args.list:
        for cell in cells:
            ready = all(evidence.is_finished(one) for one in evidence.needs(cell))
            state = "finished" if evidence.is_finished(cell) else "open"
            print(f"# {cell.name}: {state}")
            print(shlex.join(evidence.command(cell)) if ready or not cell.seconds_of else "# needs earlier cells")
        return 0
    deadline = None if args.minutes is None else time.monotonic() + 60 * args.minutes
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # else it would end and leave its run behind
    try:
        return Runner(evidence, cells, deadline).run()
    except KeyboardInterrupt:
        print("stopped; the same command continues")
        return 130


if __name__ == "__main__":
    sys.exit(main())
