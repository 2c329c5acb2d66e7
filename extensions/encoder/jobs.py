"""The encoder models that a recipe fine-tunes, and the rows that each of them predicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from extensions.common.errors import UserError
from extensions.data import check_trainable, has_split, is_labelled, load_examples, load_training, subsample_evenly
from extensions.data.examples import Warn
from extensions.data.splits import RunData
from extensions.recipe import Recipe
from extensions.tasks import Task


@dataclass
class Job:
    """Fine-tuning on one task, and the rows that its model predicts."""

    task: Task
    data: RunData  # validation selects the epoch; table and test include evaluation-only tasks of this model
    start: str | None = None  # task whose fine-tuned encoder it starts from; None: the model of the recipe


def load_jobs(recipe: Recipe, warn: Warn) -> list[Job]:
    """The jobs of a recipe, the intermediate task first.

    Raises:
        UserError: no task has training rows, a task has no labelled validation rows, or an error of `RunData.of_task`.
    """
    tasks, first = recipe.data.tasks, recipe.encoder.intermediate
    trained = [task for task in tasks if has_split(task, "train")]
    check_trainable(tasks)
    # RunData reads validation rows only if a run validates; encoders validate after every epoch.
    evaluation = recipe.evaluation.model_copy(update={"every_steps": 1})
    settings = recipe.model_copy(update={"evaluation": evaluation})
    jobs: dict[str, Job] = {}
    if first is not None:
        jobs[first.name] = _intermediate(recipe, first, trained, warn)
    for task in trained:  # may replace the job of the intermediate task
        _check_labelled(task)
        served = first is not None and task.name in recipe.encoder.intermediate_for and task.name != first.name
        start = first.name if first is not None and served else None
        jobs[task.name] = Job(task, RunData.of_task(settings, task, warn), start)
    for task in (task for task in tasks if not has_split(task, "train")):
        job = jobs.get(task.train_task or "")
        if job is None or task.form != job.task.form:
            warn(
                f"{task.display_name} is left out: it has no training rows, and encoders answer it by the model of "
                f"{task.train_task or 'the task in its train_task'}, which is not in data.tasks with the same fields "
                "and labels"
            )
        else:
            job.data = RunData.joined(settings, [job.data, RunData.of_task(settings, task, warn)])
    return list(jobs.values())


def _intermediate(recipe: Recipe, task: Task, trained: Sequence[Task], warn: Warn) -> Job:
    """The job of the intermediate task, without rows in the table."""
    wanted = recipe.encoder.intermediate_for
    if not any(other.name in wanted and other.name != task.name for other in trained):
        raise UserError(
            f"encoder.intermediate: no task would start from {task.name}, since none of encoder.intermediate_for "
            f"({', '.join(wanted) or 'empty'}) is in data.tasks; leave it out, or add such a task"
        )
    if not has_split(task, "train"):
        raise UserError(f"encoder.intermediate: {task.name} has no training rows; choose a task that has, such as mnli")
    _check_labelled(task)
    train = load_training(task, recipe.data.root, recipe.data.max_train_samples, recipe.seed, warn)
    validation = load_examples(task, "validation", recipe.data.root, recipe.seed, warn)
    kept = subsample_evenly(validation, recipe.evaluation.validation_samples)
    return Job(task, RunData(train=train, validation=kept))


def _check_labelled(task: Task) -> None:
    if not is_labelled(task, "validation"):
        raise UserError(
            f"task {task.name} has no labelled validation split, which selects the epoch to keep; give its file as "
            "source.files.validation"
        )
