"""The cells of a sweep: tasks x a grid over recipe keys, one run each; the best of each task by validation.

Section 5.1 of the paper: single-task adapters, the batch size from {4, 8, 12, 16} by grid search on validation.

A sweep's folder holds

TASK/ppo.batch_size=8/     the run folder of a cell
logs/                      the output of the runs
sweep.json, .md, .csv      the table, rewritten after every run
best.json                  run folders of the best cells, for `nlu report`
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from extensions.common.errors import UserError
from extensions.data import check_trainable, has_split, is_labelled
from extensions.data.splits import table_split
from extensions.recipe import Recipe, RunSchedule, all_keys, load_recipe, value_at
from extensions.runs.resume import is_finished
from extensions.tasks import Task

GRIDS: dict[str, dict[str, list[Any]]] = {"ppo": {"ppo.batch_size": [4, 8, 12, 16]}}  # by method (paper 5.1)
TOGETHER = "together"  # in place of the task where one run learns all of them

# Keys that change by which rows or answers a run is scored: cells that differ in them could not be compared.
SCORING_KEYS = tuple(
    f"evaluation.{key}" for key in ("split", "max_samples", "validation_samples", "decoding", "best_by")
)

# Keys that a sweep sets itself, and what to give instead.
OWN_KEYS = {
    "data.tasks": "give the tasks outside of the grid, as data.tasks=..., each gets its own runs",
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
    arguments: list[str]  # key=value ..., after the recipe's path

    @property
    def folder(self) -> Path:
        return self.recipe.run_dir

    @property
    def title(self) -> str:
        return ", ".join([self.task, *assignments(self.settings)])


@dataclass(frozen=True)
class Sweep:
    """Cells in the order in which they run, task by task."""

    path: Path  # of the recipe
    method: str
    out: Path
    cells: list[Cell]

    def command(self, cell: Cell, launcher: Sequence[str]) -> list[str]:
        """`deepspeed launch/ppo.sh RECIPE key=value ...`, from the current folder."""
        return [*launcher, str(script(self.method)), str(self.path), *cell.arguments]

    def log(self, cell: Cell) -> Path:
        return self.out / "logs" / f"{cell.folder.relative_to(self.out).as_posix().replace('/', '-')}.log"


def script(method: str) -> Path:
    """The launch script of a method, in this package's repository."""
    return Path(__file__).resolve().parents[2] / "launch" / f"{method}.sh"


def parse_launcher(text: str) -> list[str]:
    """Program and options, split as a shell does.

    Raises:
        UserError: empty, or an unclosed quote.
    """
    try:
        if launcher := shlex.split(text):
            return launcher
    except ValueError as error:
        raise UserError(f"--launcher {text!r}: {error}") from error
    raise UserError("--launcher: empty; expected what starts launch scripts, for example 'deepspeed --num_gpus 4'")


def parse_grid(texts: Sequence[str]) -> dict[str, list[Any]]:
    """`KEY=V1,V2,...` as key -> values, which are YAML; lists in brackets stay lists.

    Raises:
        UserError: an unknown key or not one for a grid, no values, not YAML, a key given twice.
    """
    grid: dict[str, list[Any]] = {}
    keys = all_keys()
    for text in texts:
        key, _, values = (part.strip() for part in text.partition("="))
        if key in OWN_KEYS:
            raise UserError(f"--grid {text}: {key} is set by the sweep; {OWN_KEYS[key]}")
        if key in SCORING_KEYS:
            raise UserError(
                f"--grid {text}: cells with different values of {key} would be scored by other rows or answers, and "
                "could not be compared; set it for all of them, outside of the grid"
            )
        if key not in keys:
            near = difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]}?" if near else "."
            raise UserError(f"--grid {text}: no recipe key is called {key!r}{hint} `nlu show RECIPE --keys` lists all")
        if key in grid:
            raise UserError(f"--grid {text}: {key} is given twice; give all its values at once, as {key}=V1,V2")
        try:
            grid[key] = yaml.safe_load(f"[{values}]")
        except (yaml.YAMLError, ValueError) as error:
            raise UserError(f"--grid {text}: the values are not valid YAML ({' '.join(str(error).split())})") from error
        if not grid[key]:
            raise UserError(f"--grid {text}: no values; expected KEY=V1,V2, for example ppo.batch_size=4,8")
    return grid


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
        overrides: `key.sub=value`, for every run.
        grid: `KEY=V1,V2` each; empty: that of the method in `GRIDS`, without the keys that `overrides` set.
        together: one run learns all tasks of the recipe (multi-task), not one run per task (single-task).
        out: folder; None: runs/NAME-METHOD-sweep, or runs/NAME-METHOD-together-sweep.
        warn: gets the tasks that are left out.

    Cells skip the evaluation before training and, in a grid, the answers to the test splits, unless `overrides` set
    these keys. In a grid their tables are of the validation splits: those scores choose the best cell.

    Raises:
        UserError: with every wrong key or value of all cells; two cells that are the same; a grid without validation
            rows to choose the best cell by; a cell that is finished already, with another recipe.
    """
    given = {_key(override) for override in overrides}
    axes = parse_grid(grid) or {key: values for key, values in GRIDS.get(method, {}).items() if key not in given}
    for key in ("output_dir", "method"):
        if key in given:
            raise UserError(f"{key}=... cannot be set for all runs of a sweep; {OWN_KEYS[key]}")
    for key in given & axes.keys():
        raise UserError(f"{key} is in the grid and also set for all runs; leave out one of them")
    combinations = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    recipes = _load_all(path, [[*overrides, *assignments(settings)] for settings in combinations], method)
    for (a, first), (b, second) in itertools.combinations(zip(combinations, recipes, strict=True), 2):
        if first == second:
            raise UserError(f"--grid: {_label(a)} and {_label(b)} are the same run; leave out one of them")
    base = recipes[0]
    if method == "encoder" and base.encoder.intermediate is not None and not together:
        raise UserError(
            "encoder.intermediate serves some tasks of a run, so a sweep over it needs --together (an encoder run "
            "fine-tunes a separate model per task)"
        )
    # Prompting is the baseline of all cells, and the test splits are for the best of them only.
    wasted = ["evaluation.before", *(["evaluation.predict_test"] if len(combinations) > 1 else [])]
    preset: dict[str, Any] = {key: False for key in wasted if method in ("ppo", "sft")}
    preset |= {"evaluation.split": "validation"} if len(combinations) > 1 else {}
    preset = {key: value for key, value in preset.items() if key not in given and key not in axes}
    out = out or Path("runs") / f"{base.name}-{method}-{'together-' if together else ''}sweep"

    cells: list[tuple[str, dict[str, Any], list[str]]] = []
    for task, members in _groups(base, together, warn).items():
        for settings in combinations:
            own = {
                "data.tasks": members,
                "name": re.sub(r"[^\w.-]+", "-", "-".join([base.name, task, *assignments(settings)])),
                "output_dir": (out / _folder_name(task) / _folder_name(_label(settings))).as_posix(),
            }
            kept = [override for override in overrides if _key(override) not in own]
            cells.append((task, settings, [*kept, *assignments(settings | preset | own)]))
    resolved = _load_all(path, [arguments for *_, arguments in cells], method)
    sweep = Sweep(path, method, out, [Cell(t, s, r, a) for (t, s, a), r in zip(cells, resolved, strict=True)])
    if len(combinations) > 1:
        _check_choice(sweep)
        _compare_validations(sweep, warn)
    _check_finished(sweep)
    return sweep


def _key(override: str) -> str:
    return override.partition("=")[0].strip()


def assignments(settings: Mapping[str, Any]) -> list[str]:
    """`key=value` of each, the values as one-line YAML."""
    return [f"{key}={as_yaml(value)}" for key, value in settings.items()]


def as_yaml(value: Any) -> str:
    """On one line. YAML breaks a text that has line breaks; JSON, which is YAML too, escapes them."""
    text = yaml.safe_dump(value, default_flow_style=True, width=sys.maxsize, allow_unicode=True, sort_keys=False)
    text = text.removesuffix("\n").removesuffix("\n...")
    return json.dumps(value, ensure_ascii=False) if "\n" in text else text


def _label(settings: Mapping[str, Any]) -> str:
    """Distinguishes a cell from the others of its task; without a grid there is only one."""
    return ",".join(assignments(settings)) or "run"


def _folder_name(label: str) -> str:
    """A valid and reproducible name of a folder; a hash keeps labels apart that are changed or cut."""
    name = re.sub(r"[^\w.,=-]+", "_", label).lstrip(".")[:100]
    return name if name == label else f"{name}-{hashlib.sha256(label.encode()).hexdigest()[:8]}"


def _load_all(path: Path, many: Sequence[Sequence[str]], method: str) -> list[Recipe]:
    """The recipe under each list of overrides. UserError: with the errors of all of them, each only once."""
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
    """Task -> the tasks of its runs, as data.tasks of a recipe names them.

    A task that can only be evaluated (MNLI-mm, AX, AX-b, AX-g) joins its `train_task`; prompting learns nothing, so
    there each task is a group.

    Raises:
        UserError: none of the tasks can be learned.
    """
    tasks, entries = recipe.data.tasks, recipe.data.model_dump(mode="json")["tasks"]
    if recipe.method != "eval":
        check_trainable(tasks)
    if together:
        return {TOGETHER: entries}
    groups: dict[str, list[Any]] = {t.name: [] for t in (tasks if recipe.method == "eval" else learned_tasks(tasks))}
    for task, entry in zip(tasks, entries, strict=True):
        name = task.name if task.name in groups else task.train_task
        if name in groups:
            groups[name].append(entry)
        else:
            reason = f"it can only be evaluated{f' with {name}, its train_task' if name else ''}"
            warn(f"{task.display_name} is left out: {reason}; add {name or 'a training split'}")
    return groups


def learned_tasks(tasks: Sequence[Task]) -> list[Task]:
    """The tasks whose scores count: those that a run can learn, or all if it can learn none."""
    return [task for task in tasks if has_split(task, "train")] or list(tasks)


def _check_choice(sweep: Sweep) -> None:
    """UserError for a grid whose tables are not of validation rows: a test split must not choose."""
    for cell in sweep.cells:
        for task in learned_tasks(cell.recipe.data.tasks):
            if not is_labelled(task, "validation"):
                raise UserError(
                    f"{cell.title}: {task.name} has no labelled validation split to choose the best cell by; give its "
                    "file as source.files.validation, or hold rows out: source.split: {validation: 0.1}"
                )
            if table_split(cell.recipe, task) != "validation":
                raise UserError(
                    f"{cell.title}: evaluation.split: {cell.recipe.evaluation.split}: a test split must not choose the "
                    "best cell; leave the key out. The sweep prints the command that evaluates the best one on it"
                )


def _compare_validations(sweep: Sweep, warn: Callable[[str], None]) -> None:
    """Warn of cells that keep the best of many more validations than others."""
    for name, group in itertools.groupby(sweep.cells, key=lambda cell: cell.task):
        counts = []
        for recipe in (cell.recipe for cell in group if cell.recipe.method in ("ppo", "sft")):
            sizes = [task.source.sizes.get("train") for task in recipe.data.tasks if has_split(task, "train")]
            known = None not in sizes and recipe.data.max_train_samples is None
            counts.append(len(RunSchedule(recipe, sum(filter(None, sizes)) if known else None).validations))
        if counts and max(counts) > 2 * min(counts):
            warn(
                f"{name}: its cells have {min(counts)} to {max(counts)} validations each, and the best of more is "
                "higher by chance. A fraction, such as evaluation.every_steps=0.05, gives all of them the same number"
            )


def _check_finished(sweep: Sweep) -> None:
    """UserError for folders in which another recipe has finished: the table would show its result as the cell's."""
    problems = []
    for cell in sweep.cells:
        if is_finished(cell.folder):
            old = load_recipe(cell.folder / "recipe.yaml")
            pairs = {key: (value_at(old, key), value_at(cell.recipe, key)) for key in all_keys() if key != "output_dir"}
            changed = [f"{key} was {was!r}, is {now!r}" for key, (was, now) in pairs.items() if was != now]
            problems += [f"  {cell.folder}: {'; '.join(changed)}"] if changed else []
    if problems:
        remedy = "choose another --out, or move these folders away"
        problems.insert(0, f"runs of another recipe have finished in folders of this sweep; {remedy}")
        raise UserError("\n".join(problems))
