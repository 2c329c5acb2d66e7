"""What a run does now, or how it ended: `nlu status`, from the files of the run folder. torch is not loaded."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from socket import gethostname
from typing import Any

import yaml
from rich.table import Table

from extensions.common.console import clock
from extensions.common.errors import UserError
from extensions.common.files import read_json, read_jsonl
from extensions.common.processes import is_here, killed_for
from extensions.common.run_lock import check_free
from extensions.common.status_file import is_alive, read_status

LATELY = 20  # steps whose mean time is shown
TAIL = 2**18  # bytes of metrics.jsonl that hold them
DEPTH = 3  # of run folders below a folder of runs
SHOWN_WARNINGS = 3
_SET_ASIDE = re.compile(r".*\.old\d+")


@dataclass
class RunStatus:
    """Sizes in bytes, times in seconds, scores from 0 to 1; None where a run has no such thing."""

    run: str
    state: str = "not started"  # or running, stopped, crashed, finished
    why: str | None = None  # how that is known, and the reason that the run recorded at its end
    exit_status: int | None = None
    process: dict[str, Any] | None = None
    heartbeat_age_s: float | None = None
    idle_s: float | None = None  # since the last progress, at the heartbeat
    phase: str | None = None
    rows: int | None = None  # of an evaluation
    rows_total: int | None = None
    step: int | None = None
    last_step: int | None = None
    validate_every: int | None = None  # iterations between validations; 0: there are none
    seconds_per_step: float | None = None
    eta_s: float | None = None  # of the evaluation in an evaluation, else of the training
    validation: dict[str, Any] | None = None  # step and score of the last one
    best: dict[str, Any] | None = None
    warnings: int = 0
    last_warnings: list[dict[str, Any]] = field(default_factory=list)
    disk_free: int | None = None
    checkpoint: str | None = None  # the newest
    checkpoint_size: int | None = None
    resume: str | None = None  # command; None while the process is alive, or after the end

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """The run folders among `paths` and below them; a path without any stands for a run that has not started."""
    return [run for path in paths for run in (list(_runs_below(path, DEPTH)) or [path])]


def _runs_below(path: Path, depth: int) -> Iterator[Path]:
    if (path / "recipe.yaml").is_file() and (path / "versions.json").is_file():
        yield path
    elif depth and path.is_dir():
        for folder in sorted(one for one in path.iterdir() if one.is_dir() and not _SET_ASIDE.fullmatch(one.name)):
            yield from _runs_below(folder, depth - 1)


def run_status(root: Path) -> RunStatus:
    """The status of the run in a folder."""
    found = RunStatus(str(root))
    if not (root / "recipe.yaml").is_file():
        found.why = "the folder has no recipe.yaml" if root.is_dir() else "there is no such folder"
        return found
    _read_state(root, found)
    metrics, validations, warnings = (
        _tail(root / "metrics.jsonl"),
        _read(root / "validation.jsonl"),
        _read_warnings(root),
    )
    if metrics and found.step is None:
        found.step = metrics[-1].get("step")
    found.seconds_per_step = _seconds_per_step(metrics[-LATELY:])
    key = _compared(root)
    scored = [{"step": one["step"], "score": one[key]} for one in validations if one.get(key) is not None]
    if scored:
        found.validation, found.best = scored[-1], max(scored, key=lambda one: one["score"])
    found.warnings, found.last_warnings = len(warnings), warnings[-SHOWN_WARNINGS:]
    found.disk_free = shutil.disk_usage(root).free
    newest = max((root / "checkpoints").glob("step-*"), key=_step_of, default=None)
    if newest is not None:
        found.checkpoint = newest.name
        found.checkpoint_size = sum(file.stat().st_size for file in newest.rglob("*") if file.is_file())
    return found


def _read_state(root: Path, found: RunStatus) -> None:
    status = read_status(root)
    if status is None:
        found.state, found.why = _without_status(root)
        return
    names = ("process", "phase", "rows", "rows_total", "step", "last_step", "validate_every", "idle_s", "exit_status")
    for name in names:
        setattr(found, name, status.get(name))
    found.eta_s = status.get("rows_eta_s" if found.rows_total else "eta_s")
    found.heartbeat_age_s = time.time() - status["heartbeat"]
    found.state, found.why = status["state"], status.get("reason")
    if found.state == "running":
        alive = is_alive(status)
        found.why = None if alive else _gone(status)
        if alive and not is_here(status["process"]):
            found.why = "by its heartbeat: its process cannot be looked up here, and the clocks are assumed to agree"
        found.state = "running" if alive else "crashed"
    if found.state != "running":
        found.eta_s = None
    if found.state not in ("running", "finished"):
        directory = status.get("directory")
        change = f"cd {shlex.quote(directory)} && " if directory and directory != os.getcwd() else ""
        found.resume = f"{change}{status.get('command')}" if status.get("command") else None


def _without_status(root: Path) -> tuple[str, str]:
    try:
        check_free(root)
    except UserError:
        return "running", "run.lock is held; there is no status.json"
    with suppress(OSError, UserError):
        if "after" in read_json(root / "eval.json"):
            return "finished", "there is no status.json; eval.json has the scores after the run"
    return "stopped", "how is not known: there is no status.json, or it is damaged"


def _gone(status: dict[str, Any]) -> str:
    """Why a run that says that it is running is not."""
    process, age = status["process"], clock(time.time() - status["heartbeat"])
    if not is_here(process):
        restarted = ": the machine, or its container, was restarted since" if process["host"] == gethostname() else ""
        return (
            f"no heartbeat for {age}; process {process['pid']} on {process['host']} cannot be looked up here{restarted}"
        )
    out_of_memory, sentence = killed_for(status.get("oom_kills", {}))
    cause = sentence if out_of_memory else sentence.rpartition("; ")[2]
    return f"process {process['pid']} is gone, {age} after its last heartbeat at most, and recorded no reason; {cause}"


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        return read_jsonl(path, skip_damaged=True)
    except OSError:
        return []


def _read_warnings(root: Path) -> list[dict[str, Any]]:
    return [record for record in _read(root / "warnings.jsonl") if "text" in record]


def _tail(path: Path) -> list[dict[str, Any]]:
    """The last records of a long JSONL file."""
    records = []
    with suppress(OSError), path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - TAIL))
        for line in file.read().split(b"\n")[:-1]:
            with suppress(ValueError):  # the first line may be a part of one
                if isinstance(record := json.loads(line), dict):
                    records.append(record)
    return records


def _seconds_per_step(metrics: Sequence[dict[str, Any]]) -> float | None:
    with suppress(KeyError, IndexError, TypeError, ZeroDivisionError):
        first, last = metrics[0], metrics[-1]
        return float((last["elapsed_s"] - first["elapsed_s"]) / (last["step"] - first["step"]))
    return None


def _compared(root: Path) -> str:
    """The key of validation.jsonl by which the run chooses its best step."""
    with suppress(OSError, yaml.YAMLError, AttributeError):
        recipe = yaml.safe_load((root / "recipe.yaml").read_text(encoding="utf-8"))
        if recipe.get("evaluation", {}).get("best_by") == "likelihood":
            return "likelihood_mean"
    return "mean"


def _step_of(checkpoint: Path) -> int:
    step = checkpoint.name.partition("-")[2]
    return int(step) if step.isdecimal() else -1


# ------------------------------------------------------------------------------------------------------- as text


def status_lines(status: RunStatus) -> list[str]:
    """The status of one run in words."""
    process = status.process
    of = f" (process {process['pid']} on {process['host']})" if process and status.state == "running" else ""
    code = f" with status {status.exit_status}" if status.exit_status else ""
    lines = [f"{status.run}: {status.state}{code}{of}" + (f": {status.why}" if status.why else "")]
    if status.phase is not None:
        rows = f", {status.rows} of {status.rows_total} rows" if status.rows_total else ""
        lines.append(f"  {'phase' if status.state == 'running' else 'last phase'}: {status.phase}{rows}")
    if status.step is not None:
        speed = f", {status.seconds_per_step:.3g} s per step lately" if status.seconds_per_step is not None else ""
        lines.append(f"  step: {_step(status)}{speed}{', ETA ' + _eta(status) if _eta(status) else ''}")
    if status.state == "running" and status.heartbeat_age_s is not None:
        idle = f", last progress {clock(status.idle_s)} before it" if status.idle_s is not None else ""
        lines.append(f"  heartbeat: {clock(status.heartbeat_age_s)} ago{idle}")
    every = f"every {status.validate_every} steps and after the last" if status.validate_every else None
    if status.validation is not None and status.best is not None:
        scores = f"{_score(status.validation)}; best {_score(status.best)}"
        lines.append(f"  validation: {scores}{f'; {every}' if every else ''}")
    elif every:
        lines.append(f"  validation: none yet; {every}")
    lines.append(f"  warnings: {status.warnings}" + (", the last ones:" if status.last_warnings else ""))
    lines += [f"    {_short(one['text'])}" for one in status.last_warnings]
    if status.disk_free is not None:
        size = f"; {status.checkpoint} takes {_bytes(status.checkpoint_size)}" if status.checkpoint_size else ""
        lines.append(f"  disk: {_bytes(status.disk_free)} left{size}")
    if status.resume is not None:
        lines.append(f"  resume with: {status.resume}")
    return lines


def status_table(statuses: Sequence[RunStatus]) -> Table:
    """One line per run."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("run", "state", "phase", "step", "s/step", "ETA", "validation", "best", "warnings"):
        table.add_column(column)
    for one in statuses:
        cells = [one.run, one.state, one.phase or "", _step(one)]
        cells += ["" if one.seconds_per_step is None else f"{one.seconds_per_step:.3g}", _eta(one)]
        cells += [_score(one.validation), _score(one.best), str(one.warnings or "")]
        table.add_row(*cells)
    return table


def _step(status: RunStatus) -> str:
    if status.step is None:
        return ""
    return f"{status.step} of {status.last_step}" if status.last_step is not None else str(status.step)


def _eta(status: RunStatus) -> str:
    return clock(status.eta_s) if status.state == "running" and status.eta_s is not None else ""


def _score(one: dict[str, Any] | None) -> str:
    return "" if one is None else f"{100 * one['score']:.1f} at step {one['step']}"


def _short(text: str, length: int = 200) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[: length - 3]}..."


def _bytes(count: int | None) -> str:
    size, units = float(count or 0), iter(("B", "KiB", "MiB", "GiB"))
    unit = next(units)
    while size >= 1024 and (larger := next(units, None)) is not None:
        size, unit = size / 1024, larger
    return f"{size:.3g} {unit}" if size < 1000 else f"{size:.0f} {unit}"
