"""A sweep: tasks x a grid over recipe keys, each as its own run; the best of each task by validation.

Section 5.1 of the paper: single-task adapters, the batch size from {4, 8, 12, 16} by grid search on validation.

A sweep's folder holds

TASK/ppo.batch_size=8/     the run folder of a cell of the grid
logs/                      what the runs printed
sweep.json, .md, .csv      the table, written anew after every run
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
from extensions.common.files import read_json, read_jsonl
from extensions.data import check_trainable, has_split
from extensions.data.splits import table_split
from extensions.evaluation.metrics import mean_score
from extensions.recipe import Recipe, all_keys, load_recipe, value_at
from extensions.runs.resume import is_finished
from extensions.tasks import Task

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
        return ", ".join([self.task, *assignments(self.settings)])


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
    return Path(__file__).resolve().parents[2] / "launch" / f"{method}.sh"


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

    Cells do not evaluate before training, and of a grid they do not answer the test splits, unless `overrides` say so.

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
    recipes = _load_all(path, [[*overrides, *assignments(settings)] for settings in combinations], method)
    for (a, first), (b, second) in itertools.combinations(zip(combinations, recipes, strict=True), 2):
        if first == second:
            raise UserError(f"--grid: {_label(a)} and {_label(b)} are the same run; leave out one of them")
    base = recipes[0]
    if method == "encoder" and base.encoder.intermediate is not None and not together:
        raise UserError(
            "encoder.intermediate serves some tasks of a run, so a sweep over it needs --together (an encoder run "
            "fine-tunes a model for each task by itself)"
        )
    # Prompting is the baseline of all cells, and the test splits are for the best of them alone.
    wasted = ["evaluation.before", *(["evaluation.predict_test"] if len(combinations) > 1 else [])]
    spared = {key: False for key in wasted if method in ("ppo", "sft") and key not in given and key not in axes}
    out = out or Path("runs") / f"{base.name}-{method}-{'together-' if together else ''}sweep"

    cells = []
    for task, members in _groups(base, together, warn).items():
        for settings in combinations:
            own = {
                "data.tasks": members,
                "name": re.sub(r"[^\w.-]+", "-", "-".join([base.name, task, *assignments(settings)])),
                "output_dir": (out / _safe(task) / _safe(_label(settings))).as_posix(),
            }
            kept = [override for override in overrides if _key(override) not in own]
            cells.append((task, settings, [*kept, *assignments(settings), *assignments(spared | own)]))
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


def assignments(settings: Mapping[str, Any]) -> list[str]:
    """`key=value` of each, the values as one-line YAML."""
    return [f"{key}={as_yaml(value)}" for key, value in settings.items()]


def as_yaml(value: Any) -> str:
    """On one line; YAML itself breaks a text that has line breaks, JSON (which is YAML too) escapes them."""
    text = yaml.safe_dump(value, default_flow_style=True, width=sys.maxsize, allow_unicode=True, sort_keys=False)
    text = text.removesuffix("\n").removesuffix("\n...")
    return json.dumps(value, ensure_ascii=False) if "\n" in text else text


def _label(settings: Mapping[str, Any]) -> str:
    """What tells a cell from the others of its task; without a grid there is only one."""
    return ",".join(assignments(settings)) or "run"


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
    else:
        check_trainable(tasks)
    dumped = recipe.data.model_dump(mode="json")["tasks"]
    if together:
        return {TOGETHER: dumped}
    groups: dict[str, list[Any]] = {name: [] for name in learned}
    for task, entry in zip(tasks, dumped, strict=True):
        teacher = task.name if task.name in groups else task.train_task
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
        every, steps = recipe.evaluation.every_steps, recipe.training_steps()
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
            pairs = {key: (value_at(old, key), value_at(cell.recipe, key)) for key in all_keys() if key != "output_dir"}
            changed = [f"{key} was {was!r}, is {now!r}" for key, (was, now) in pairs.items() if was != now]
            if changed:
                problems.append(f"  {cell.folder}: {'; '.join(changed)}")
    if problems:
        raise UserError(
            "finished runs of another recipe are in the way; choose another --out, or move these folders away\n"
            + "\n".join(problems)
        )


# ------------------------------------------------------------------------------------------------------ the outcome


def outcome(cell: Cell) -> Outcome:
    """What the run folder of a cell tells."""
    if not is_finished(cell.folder):
        return Outcome()
    scores = read_json(cell.folder / "eval.json")
    learned = {t.name: scores["after"][t.name] for t in _learned(cell.recipe.data.tasks) if t.name in scores["after"]}
    split = " and ".join(sorted({scores["splits"][name] for name in learned}))
    table = mean_score(learned) if learned else None
    best = best_validation(cell.folder / "validation.jsonl", [task.name for task in _learned(cell.recipe.data.tasks)])
    training = scores.get("training", {})
    return Outcome(
        "finished",
        best if best is not None else table if split == "validation" else None,
        table,
        split,
        training.get("samples"),
        training.get("seconds"),
    )


def best_validation(path: Path, learned: Sequence[str]) -> float | None:
    """The best mean score of a run's validations; None where there were none.

    An encoder run learns one task after the other, so its lines are of one task each: the mean of their bests, over
    those that the run is judged by and not the intermediate one.
    """
    best: dict[tuple[str, ...], float] = {}
    for record in read_jsonl(path) if path.exists() else []:
        tasks = tuple(record["tasks"])
        if record["mean"] is not None and set(tasks) <= set(learned):  # what is not a number chooses nothing
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
