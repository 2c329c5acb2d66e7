"""A sweep: tasks x a grid over recipe keys, each as its own run; the best of each task by validation.

Section 5.1 of the paper: single-task adapters, the batch size from {4, 8, 12, 16} by grid search on validation.

A sweep's folder holds

TASK/ppo.batch_size=8/     the run folder of a cell of the grid
logs/                      what the runs printed
sweep.json, .md, .csv      the table, written anew after every run
best.json                  run folders of the best cells, for `nlu report`
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import io
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

import yaml
from rich.markup import escape
from rich.table import Table

from extensions.data import has_split
from extensions.errors import UserError
from extensions.metrics import mean_score
from extensions.recipe import Recipe, all_keys, load_recipe
from extensions.run import Reporter, read_json, read_jsonl, write_json, write_text
from extensions.run_data import table_split
from extensions.tasks import SUITES, Task

GRIDS: dict[str, dict[str, list[Any]]] = {"ppo": {"ppo.batch_size": [4, 8, 12, 16]}}  # by method (paper 5.1)
TOGETHER = "together"  # stands for the task where one run learns all of them

# Keys that a sweep sets itself, and what the user gives instead.
OWN_KEYS = {
    "data.tasks": "give the tasks outside of the grid, as data.tasks=..., each gets runs of its own",
    "name": "give name=... outside of the grid, each run adds its task and values",
    "output_dir": "choose the folder of the sweep by --out",
    "method": "choose it by --method",
}


@dataclass(frozen=True)
class Cell:
    """One run of a sweep."""

    task: str  # the task that it learns, or TOGETHER
    settings: dict[str, Any]  # grid key -> value
    recipe: Recipe  # resolved, as the run itself resolves it
    arguments: list[str]  # key=value ..., behind the recipe's path

    @property
    def folder(self) -> Path:
        return self.recipe.run_dir

    @property
    def title(self) -> str:
        return ", ".join([self.task, *_assignments(self.settings)])


@dataclass(frozen=True)
class Sweep:
    """A plan: cells in the order in which they run, task by task."""

    path: Path  # of the recipe
    method: str
    out: Path
    cells: list[Cell]

    def command(self, cell: Cell, launcher: Sequence[str]) -> list[str]:
        """`deepspeed launch/ppo.sh RECIPE key=value ...`, from the present folder."""
        return [*launcher, str(script(self.method)), str(self.path), *cell.arguments]

    def log(self, cell: Cell) -> Path:
        return self.out / "logs" / f"{cell.folder.relative_to(self.out).as_posix().replace('/', '-')}.log"


@dataclass(frozen=True)
class Outcome:
    """What a cell has come to; scores are fractions of 1."""

    status: str = "open"  # finished; failed (in this session); open: not run yet, or stopped on the way
    validation: float | None = None  # what the best cell is chosen by
    table: float | None = None  # mean score after training, over the tasks that the cell learns
    split: str | None = None  # of `table`
    samples: int | None = None  # of training
    seconds: float | None = None  # of training


def script(method: str) -> Path:
    """The launch script of a method, in the repository that this package stands in."""
    return Path(__file__).resolve().parent.parent / "launch" / f"{method}.sh"


# --------------------------------------------------------------------------------------------------------- the plan


def parse_grid(texts: Sequence[str]) -> dict[str, list[Any]]:
    """`KEY=V1,V2,...` as key -> values, which are YAML; lists in brackets stay lists.

    Raises:
        UserError: no such key or not one for a grid, no values, not YAML, a key given twice.
    """
    grid: dict[str, list[Any]] = {}
    keys = all_keys()
    for text in texts:
        key, _, values = (part.strip() for part in text.partition("="))
        if key in OWN_KEYS:
            raise UserError(f"--grid {text}: {key} is set by the sweep; {OWN_KEYS[key]}")
        if key not in keys:
            near = difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]}?" if near else "."
            raise UserError(f"--grid {text}: no recipe key is called {key!r}{hint} `nlu show RECIPE --keys` lists all")
        if key in grid:
            raise UserError(f"--grid {text}: {key} is given twice; give all its values at once, as {key}=V1,V2")
        try:
            parsed = yaml.safe_load(f"[{values}]")
        except (yaml.YAMLError, ValueError) as error:
            raise UserError(f"--grid {text}: the values are not valid YAML ({' '.join(str(error).split())})") from error
        if not parsed:
            raise UserError(f"--grid {text}: no values; expected KEY=V1,V2, for example ppo.batch_size=4,8")
        grid[key] = parsed
    return grid


def parse_launcher(text: str) -> list[str]:
    """Program and options, split as a shell does.

    Raises:
        UserError: nothing in it, or a quote that is not closed.
    """
    try:
        launcher = shlex.split(text)
    except ValueError as error:
        raise UserError(f"--launcher {text!r}: {error}") from error
    if not launcher:
        raise UserError("--launcher: empty; expected what starts launch scripts, for example 'deepspeed --num_gpus 4'")
    return launcher


def plan(
    path: Path,
    overrides: Sequence[str],
    method: str,
    grid: Sequence[str],
    together: bool,
    out: Path | None,
    warn: Callable[[str], None],
) -> Sweep:
    """The cells of a sweep, all of them checked.

    Args:
        overrides: `key.sub=value`, of every run.
        grid: `KEY=V1,V2` each; none: that of the method in `GRIDS`, less the keys that `overrides` set.
        together: one run learns all tasks of the recipe (multi-task), not one a task (single-task).
        out: folder; None: runs/NAME-METHOD-sweep, or runs/NAME-METHOD-together-sweep.
        warn: gets the tasks that are left out.

    Raises:
        UserError: with every wrong key or value of all cells; two cells that are the same; a grid whose best cell no
            validation could tell; a cell that is finished already, by another recipe.
    """
    given = {_key(override) for override in overrides}
    axes = parse_grid(grid) or {key: values for key, values in GRIDS.get(method, {}).items() if key not in given}
    for key in ("output_dir", "method"):
        if key in given:
            raise UserError(f"{key}=... does not go with a sweep; {OWN_KEYS[key]}")
    for key in given & axes.keys():
        raise UserError(f"{key} is in the grid and also set for all runs; leave out one of them")
    combinations = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    recipes = _load_all(path, [[*overrides, *_assignments(settings)] for settings in combinations], method)
    for (a, first), (b, second) in itertools.combinations(zip(combinations, recipes, strict=True), 2):
        if first == second:
            raise UserError(f"--grid: {_label(a)} and {_label(b)} are the same run; leave out one of them")
    base = recipes[0]
    out = out or Path("runs") / f"{base.name}-{method}-{'together-' if together else ''}sweep"

    cells = []
    for task, members in _groups(base, together, warn).items():
        for settings in combinations:
            own = {
                "data.tasks": members,
                "name": re.sub(r"[^\w.-]+", "-", "-".join([base.name, task, *_assignments(settings)])),
                "output_dir": (out / _safe(task) / _safe(_label(settings))).as_posix(),
            }
            kept = [override for override in overrides if _key(override) not in own]
            cells.append((task, settings, [*kept, *_assignments(settings), *_assignments(own)]))
    resolved = _load_all(path, [arguments for *_, arguments in cells], method)
    sweep = Sweep(
        path,
        method,
        out,
        [Cell(task, settings, r, a) for (task, settings, a), r in zip(cells, resolved, strict=True)],
    )
    if len(combinations) > 1:
        _check_choice(sweep)
    _check_finished(sweep)
    return sweep


def _key(override: str) -> str:
    return override.partition("=")[0].strip()


def _assignments(settings: Mapping[str, Any]) -> list[str]:
    """`key=value` of each, the values as one-line YAML."""
    return [f"{key}={_yaml(value)}" for key, value in settings.items()]


def _yaml(value: Any) -> str:
    """On one line; YAML itself breaks a text that has line breaks, JSON (which is YAML too) escapes them."""
    text = yaml.safe_dump(value, default_flow_style=True, width=sys.maxsize, allow_unicode=True, sort_keys=False)
    text = text.removesuffix("\n").removesuffix("\n...")
    return json.dumps(value, ensure_ascii=False) if "\n" in text else text


def _label(settings: Mapping[str, Any]) -> str:
    """What tells a cell from the others of its task; without a grid there is only one."""
    return ",".join(_assignments(settings)) or "run"


def _safe(label: str) -> str:
    """A folder's name that is the same each time; what had to be changed or cut is told apart by a hash."""
    name = re.sub(r"[^\w.,=-]+", "_", label).lstrip(".")[:100]
    return name if name == label else f"{name}-{hashlib.sha256(label.encode()).hexdigest()[:8]}"


def _load_all(path: Path, many: Sequence[Sequence[str]], method: str) -> list[Recipe]:
    """The recipe under each list of overrides; what is wrong in any of them at once, each error only once."""
    recipes, errors = [], []
    for overrides in many:
        try:
            recipes.append(load_recipe(path, list(overrides), method))
        except UserError as error:
            errors.append(str(error))
    if errors:
        raise UserError("\n".join(dict.fromkeys(errors)))
    return recipes


def _groups(recipe: Recipe, together: bool, warn: Callable[[str], None]) -> dict[str, list[Any]]:
    """Task -> the tasks of its runs, as a recipe's data.tasks names them.

    A task that can only be evaluated (MNLI-mm, AX, AX-b, AX-g) goes along with the one that teaches it; prompting
    learns nothing, so there each task is by itself.

    Raises:
        UserError: none of the tasks can be learned.
    """
    tasks = recipe.data.tasks
    learned = [task.name for task in _learned(tasks)]
    if recipe.method == "eval":
        learned = [task.name for task in tasks]
    elif not any(has_split(task, "train") for task in tasks):
        raise UserError(f"data.tasks: {', '.join(learned)} can only be evaluated; add a task that has a training split")
    dumped = recipe.data.model_dump(mode="json")["tasks"]
    if together:
        return {TOGETHER: dumped}
    groups: dict[str, list[Any]] = {name: [] for name in learned}
    for task, entry in zip(tasks, dumped, strict=True):
        teacher = task.name if task.name in groups else task.taught_by
        if teacher in groups:
            groups[teacher].append(entry)
        else:
            by = f" without {teacher}, which teaches it" if teacher else ""
            warn(f"{task.display_name} is left out: it can only be evaluated{by}; add {teacher or 'a training split'}")
    return groups


def _learned(tasks: Sequence[Task]) -> list[Task]:
    """The tasks that a run is judged by: those that it can learn, or all where it can learn none."""
    return [task for task in tasks if has_split(task, "train")] or list(tasks)


def _check_choice(sweep: Sweep) -> None:
    """Refuse a grid whose cells would leave nothing to choose by: a test split must not choose."""
    for cell in sweep.cells:
        recipe = cell.recipe
        every, steps = recipe.evaluation.every_steps, recipe.training_steps
        if recipe.method == "encoder" or (recipe.method != "eval" and 0 < every <= steps):
            continue
        unfit = [task.name for task in _learned(recipe.data.tasks) if table_split(recipe, task) != "validation"]
        if unfit:
            remedy = (
                "set evaluation.split=validation"
                if recipe.method == "eval"
                else f"set evaluation.every_steps (it is {every}) to at most the {steps} steps of a run"
            )
            raise UserError(
                f"{cell.title}: nothing tells the best of the grid, since the table of {', '.join(unfit)} is of the "
                f"test split and no validation takes place; {remedy}"
            )


def _check_finished(sweep: Sweep) -> None:
    """Refuse folders in which another recipe has finished: its result would stand in the table as this one's."""
    problems = []
    for cell in sweep.cells:
        if is_finished(cell.folder):
            old = load_recipe(cell.folder / "recipe.yaml")
            pairs = {key: (_at(old, key), _at(cell.recipe, key)) for key in all_keys() if key != "output_dir"}
            changed = [f"{key} was {was!r}, is {now!r}" for key, (was, now) in pairs.items() if was != now]
            if changed:
                problems.append(f"  {cell.folder}: {'; '.join(changed)}")
    if problems:
        raise UserError(
            "finished runs of another recipe are in the way; choose another --out, or move these folders away\n"
            + "\n".join(problems)
        )


def _at(recipe: Recipe, key: str) -> Any:
    return reduce(getattr, key.split("."), recipe)


# ------------------------------------------------------------------------------------------------------ the outcome


def is_finished(folder: Path) -> bool:
    """Whether a run in the folder has come to its end."""
    return (folder / "eval.json").exists() and "after" in read_json(folder / "eval.json")


def outcome(cell: Cell) -> Outcome:
    """What the run folder of a cell tells."""
    if not is_finished(cell.folder):
        return Outcome()
    scores = read_json(cell.folder / "eval.json")
    learned = {t.name: scores["after"][t.name] for t in _learned(cell.recipe.data.tasks) if t.name in scores["after"]}
    split = " and ".join(sorted({scores["splits"][name] for name in learned}))
    table = mean_score(learned) if learned else None
    best = best_validation(cell.folder / "validation.jsonl")
    training = scores.get("training", {})
    return Outcome(
        "finished",
        best if best is not None else table if split == "validation" else None,
        table,
        split,
        training.get("samples"),
        training.get("seconds"),
    )


def best_validation(path: Path) -> float | None:
    """The best mean score of a run's validations; None where there were none.

    An encoder run learns one task after the other, so its lines are of one task each: the mean of their bests.
    """
    best: dict[tuple[str, ...], float] = {}
    for record in read_jsonl(path) if path.exists() else []:
        if record["mean"] is not None:  # a score that is not a number chooses nothing
            tasks = tuple(record["tasks"])
            best[tasks] = max(record["mean"], best.get(tasks, record["mean"]))
    return sum(len(tasks) * mean for tasks, mean in best.items()) / sum(map(len, best)) if best else None


def choose(cells: Sequence[Cell], outcomes: Sequence[Outcome]) -> list[int]:
    """Numbers of the best cells, one a task: by validation, the first of equals; a cell without rivals needs none."""
    best = []
    for task in dict.fromkeys(cell.task for cell in cells):
        group = [k for k, cell in enumerate(cells) if cell.task == task]
        scored = {k: v for k in group if (v := outcomes[k].validation) is not None}
        if scored:
            best.append(max(scored, key=lambda k: scored[k]))
        elif len(group) == 1 and outcomes[group[0]].status == "finished":
            best += group
    return best


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
        flat = [{**row, "settings": ",".join(_assignments(row["settings"]))} for row in rows]
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
            lines = [(row["best"], [*map(_yaml, row["settings"].values()), *_shown(row)]) for row in rows]
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
    table = _percent(row["table"]) + (f" ({row['split']})" if row["split"] else "")
    samples = "-" if row["samples"] is None else str(row["samples"])
    seconds = "-" if row["seconds"] is None else f"{row['seconds']:.0f}"
    status = f"{row['status']}, best" if row["best"] else row["status"]
    return [_percent(row["validation"]), table, samples, seconds, status]


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
                    reporter.say(f"{head} finished already, validation {_percent(outcome(cell).validation)}")
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
    reporter.say(f"{head} started, log {log}")
    start = time.monotonic()
    status = _execute(sweep.command(cell, [*launcher, *_port(launcher)]), log)
    seconds = f"{time.monotonic() - start:.0f} s"
    if status == 0 and is_finished(cell.folder):
        reporter.say(f"{head} finished in {seconds}, validation {_percent(outcome(cell).validation)}")
    else:
        records.failed[number] = status
        why = f"failed with status {status}" if status else "ended without a result (no scores in eval.json)"
        tail = "".join(f"\n    {line}" for line in _tail(log))
        reporter.warn(f"{head} {why} after {seconds}; the end of {log}:{tail}")
    records.write()


def _conclude(records: Records, reporter: Reporter) -> None:
    """The table, what failed, and what to do next."""
    sweep, best = records.sweep, records.best()
    reporter.console.print(records.table())
    for number, status in records.failed.items():
        cell = sweep.cells[number]
        reporter.warn(f"failed with status {status}: {cell.title}; log {sweep.log(cell)}")
    if records.failed:
        reporter.say("the same command runs what is left once more")
    if best:
        reporter.say(f"next: {shlex.join(['nlu', 'report', str(sweep.out)])}")
    for suite in SUITES:
        answered = [
            str(cell.folder)
            for cell in best
            if (cell.folder / "predictions_test.jsonl").exists()
            and any(task.suite == suite for task in cell.recipe.data.tasks)
        ]
        if answered:
            reporter.say(f"      {shlex.join(['nlu', 'submit', *answered, '--suite', suite])}")


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


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"
