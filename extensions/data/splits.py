"""The examples of a run: which splits of which tasks a recipe trains on, evaluates and answers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache

from extensions.common.errors import UserError
from extensions.data import (
    Example,
    check_classes,
    check_trainable,
    demonstrations,
    has_split,
    is_labelled,
    is_present,
    load_examples,
    load_training,
    subsample_evenly,
)
from extensions.data.checks import check_rows
from extensions.prompts import Demonstration
from extensions.recipe import Recipe
from extensions.tasks import Task, find_task

Warn = Callable[[str], None]


@dataclass
class RunData:
    """The examples of a run. A task without a training split (MNLI-mm, AX, AX-b, AX-g) is evaluated only.

    Where the run trains nothing, training rows are read for demonstrations alone.
    """

    train: list[Example] = field(default_factory=list)
    table: list[Example] = field(default_factory=list)  # of the before/after table
    validation: list[Example] = field(default_factory=list)  # of the validations while training
    test: list[Example] = field(default_factory=list)  # to be answered for the evaluation server
    splits: dict[str, str] = field(default_factory=dict)  # task name -> split of its rows in the table
    demonstrations: dict[str, list[Demonstration]] = field(
        default_factory=dict
    )  # task name -> what its prompts may show

    @staticmethod
    def load(recipe: Recipe, warn: Warn) -> RunData:
        """All tasks of a recipe.

        Raises:
            UserError: see `of_task` and `join_labels`.
        """
        return RunData.joined(recipe, [RunData.of_task(recipe, task, warn) for task in recipe.data.tasks])

    @staticmethod
    def joined(recipe: Recipe, parts: Sequence[RunData]) -> RunData:
        """The examples of all tasks of a recipe from those of each.

        Raises:
            UserError: the run trains, and no task has a training split; or it balances rows of one label alone.
        """
        data = RunData()
        for part in parts:
            data.train += part.train
            data.table += part.table
            data.validation += part.validation
            data.test += part.test
            data.splits |= part.splits
            data.demonstrations |= part.demonstrations
        if recipe.method != "eval":
            check_trainable(recipe.data.tasks)
        if recipe.data.oversample or recipe.data.class_weights != "none":
            check_classes(data.train)
        return data

    @staticmethod
    def of_task(recipe: Recipe, task: Task, warn: Warn) -> RunData:
        """The examples of one task.

        Raises:
            UserError: a file that is needed is missing, or a row is malformed.
        """
        root, trained = recipe.data.root, has_split(task, "train")
        data = RunData()
        warn = cache(warn)  # the splits of one file have the same faults

        @cache
        def rows(split: str) -> list[Example]:
            return load_examples(task, split, root, recipe.seed, warn)

        if trained and recipe.method != "eval":
            data.train = load_training(task, root, recipe.data.max_train_samples, recipe.seed, warn)
        if recipe.prompt.shots:
            data.demonstrations = {task.name: load_demonstrations(recipe, task, data.train, warn)}
        split = table_split(recipe, task)
        if not is_labelled(task, split):
            raise UserError(
                f"task {task.name} has no labelled {split} split for the before/after table; give its file as "
                f"source.files.{split}, or hold rows out of the training file: source.split: {{{split}: 0.1}}"
            )
        table: list[Example] = []
        if trained or is_present(task, split, root):
            table = rows(split)
            data.table, data.splits = subsample_evenly(table, recipe.evaluation.max_samples), {task.name: split}
        else:
            warn(f"{task.display_name} is not in the table: {task.source.files.get(split, split)} is not there")
        if data.train and recipe.evaluation.every_steps:
            data.validation = subsample_evenly(rows("validation"), recipe.evaluation.validation_samples)
        if recipe.evaluation.predict_test and has_split(task, "test"):
            data.test = rows("test")
        seen: dict[str, list[Example]] = {split: table, "validation": data.validation}
        if task.suite == "own" and data.train:
            seen = {name: rows(name) for name in ("validation", "test") if _is_there(task, name, root)}
        check_rows(task, data.train, {name: part for name, part in seen.items() if part}, warn)
        return data

    def fingerprint(self) -> str:
        """sha256 of all rows of the run, wherever their files are."""
        digest = hashlib.sha256()
        for name, rows in (("train", self.train), ("table", self.table), ("validation", self.validation)):
            digest.update(f"{name} {len(rows)}".encode())
            for row in rows:
                digest.update(repr((row.task.name, row.index, row.fields, row.label, row.pair)).encode())
        digest.update(repr([(row.task.name, row.index, row.fields) for row in self.test]).encode())
        digest.update(repr(self.demonstrations).encode())
        return digest.hexdigest()

    @property
    def split(self) -> str:
        """The split, or splits, of the table."""
        return " and ".join(sorted(set(self.splits.values())))

    def describe(self) -> str:
        tasks = list(dict.fromkeys(example.task.display_name for example in self.train))
        training = f"{', '.join(tasks)}: {len(self.train)} training rows, " if tasks else ""
        return f"{training}{len(self.table)} {self.split} rows"


def _is_there(task: Task, split: str, root: str | None) -> bool:
    return has_split(task, split) and is_present(task, split, root)


def table_split(recipe: Recipe, task: Task) -> str:
    """The split of a task's rows in the table: what `evaluation.split` says, where the task has it."""
    split = recipe.evaluation.split
    if split == "auto" or not (has_split(task, "train") or is_labelled(task, split)):
        return "test" if is_labelled(task, "test") else "validation"
    return split


def load_demonstrations(recipe: Recipe, task: Task, train: list[Example], warn: Warn) -> list[Demonstration]:
    """The demonstrations of a task, one more than a prompt shows: a row's own is passed over.

    Args:
        train: training rows of the task; empty: they are read, from the task that teaches this one if need be.

    Raises:
        UserError: the task has no training split, nor one that teaches it.
    """
    count = recipe.prompt.shots
    teacher = task if has_split(task, "train") else find_task(task.train_task) if task.train_task else None
    if teacher is None:
        raise UserError(
            f"prompt.shots: {count}, but task {task.name} has no training rows to show; give source.files.train, or "
            "name in train_task the built-in task that has its prompt"
        )
    if (teacher.fields, teacher.labels, teacher.score_range) != (task.fields, task.labels, task.score_range):
        raise UserError(
            f"task {task.name}: train_task: {teacher.name} has other fields or labels; name a task of the same prompt"
        )
    if not train:
        train = load_training(teacher, recipe.data.root, recipe.data.max_train_samples, recipe.seed)
    rows = demonstrations(teacher, train, count + 1, recipe.prompt.demonstrations, recipe.seed)
    if len(rows) <= count:
        warn(f"{task.display_name}: only {len(rows)} different training rows for {count} demonstrations")
    return [(row.fields, teacher.answer(str(row.label))) for row in rows]
