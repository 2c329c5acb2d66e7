"""The examples of a run: the splits that a recipe trains on, evaluates and predicts."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Literal

from extensions.common.errors import UserError
from extensions.data.balance import check_classes
from extensions.data.checks import check_rows
from extensions.data.example import Example
from extensions.data.examples import Warn, load_examples, load_training
from extensions.data.locate import check_trainable, has_split, is_labelled, is_present
from extensions.data.sampling import demonstrations, subsample_evenly
from extensions.prompts import Demonstration
from extensions.recipe import Recipe
from extensions.tasks import Task, find_task


@dataclass
class RunData:
    """The examples of a run. Tasks without a training split (MNLI-mm, AX, AX-b, AX-g) are only evaluated.

    A run that does not train reads training rows only for demonstrations.
    """

    train: list[Example] = field(default_factory=list)
    table: list[Example] = field(default_factory=list)  # rows of the before/after table
    validation: list[Example] = field(default_factory=list)  # rows of the validations during training
    test: list[Example] = field(default_factory=list)  # rows to predict for the evaluation server
    splits: dict[str, str] = field(default_factory=dict)  # task name -> split of its rows in the table
    demonstrations: dict[str, list[Demonstration]] = field(default_factory=dict)  # task name -> shown in its prompts

    @staticmethod
    def load(recipe: Recipe, warn: Warn) -> RunData:
        """All tasks of a recipe.

        Raises:
            UserError: see `of_task` and `joined`.
        """
        return RunData.joined(recipe, [RunData.of_task(recipe, task, warn) for task in recipe.data.tasks])

    @staticmethod
    def joined(recipe: Recipe, parts: Sequence[RunData]) -> RunData:
        """The examples of all tasks of a recipe from those of each.

        Raises:
            UserError: the run trains and no task has a training split, or it balances a task that has only one label.
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
        warn = cache(warn)  # splits held out of one file repeat its warnings

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
            warn(f"{task.display_name} is not in the table: {task.source.files.get(split, split)} does not exist")
        if data.train and recipe.evaluation.every_steps:
            data.validation = subsample_evenly(rows("validation"), recipe.evaluation.validation_samples)
        if recipe.evaluation.predict_test and has_split(task, "test"):
            data.test = rows("test")
        others = {split: table, "validation": data.validation}
        if task.suite == "own" and data.train:
            others = {name: rows(name) for name in ("validation", "test") if is_present(task, name, root)}
        check_rows(task, data.train, {name: part for name, part in others.items() if part}, warn)
        return data

    def fingerprint(self, *parts: Literal["train", "table", "validation", "test"]) -> str:
        """sha256 of the rows of these parts, independent of file locations; `train` includes the demonstrations."""
        digest = hashlib.sha256()
        for name in parts:
            rows: list[Example] = getattr(self, name)
            digest.update(f"{name} {len(rows)}".encode())
            for row in rows:
                digest.update(repr((row.task.name, row.index, row.fields, row.label, row.pair)).encode())
        if "train" in parts:
            digest.update(repr(self.demonstrations).encode())
        return digest.hexdigest()

    @property
    def rows(self) -> list[Example]:
        return [*self.train, *self.table, *self.validation, *self.test]

    @property
    def split(self) -> str:
        """The split, or splits, of the table."""
        return " and ".join(sorted(set(self.splits.values())))

    def describe(self) -> str:
        tasks = list(dict.fromkeys(example.task.display_name for example in self.train))
        training = f"{', '.join(tasks)}: {len(self.train)} training rows, " if tasks else ""
        return f"{training}{len(self.table)} {self.split} rows"


def table_split(recipe: Recipe, task: Task) -> str:
    """The split of a task's rows in the table: `evaluation.split`, if the task has it."""
    split = recipe.evaluation.split
    if split == "auto" or not (has_split(task, "train") or is_labelled(task, split)):
        return "test" if is_labelled(task, "test") else "validation"
    return split


def load_demonstrations(recipe: Recipe, task: Task, train: list[Example], warn: Warn) -> list[Demonstration]:
    """The demonstrations of a task: one more than a prompt shows, since a row must not be a demonstration for itself.

    Args:
        train: training rows of the task; if empty, they are read, from its `train_task` if it has none itself.

    Raises:
        UserError: neither the task nor its `train_task` has a training split.
    """
    count = recipe.prompt.shots
    trained = task if has_split(task, "train") else find_task(task.train_task) if task.train_task else None
    if trained is None:
        raise UserError(
            f"prompt.shots: {count}, but task {task.name} has no training rows to show; give source.files.train, or "
            "set train_task to the built-in task that has its prompt"
        )
    if (trained.fields, trained.labels, trained.score_range) != (task.fields, task.labels, task.score_range):
        raise UserError(
            f"task {task.name}: train_task: {trained.name} has other fields or labels; name a task of the same prompt"
        )
    if not train:
        train = load_training(trained, recipe.data.root, recipe.data.max_train_samples, recipe.seed)
    rows = demonstrations(trained, train, count + 1, recipe.prompt.demonstrations, recipe.seed)
    if len(rows) <= count:
        warn(f"{task.display_name}: only {len(rows)} different training rows for {count} demonstrations")
    return [(row.fields, trained.answer(str(row.label))) for row in rows]
