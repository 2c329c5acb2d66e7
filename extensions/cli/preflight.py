"""Checks of a recipe's reward, data, tokenizer and prompts, before a model is loaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from extensions.common.errors import UserError
from extensions.data import Example
from extensions.data.splits import RunData
from extensions.recipe import Recipe, RunSchedule
from extensions.rollout.reward_check import reward_faults
from extensions.rollout.rewards import load_reward

Warn = Callable[[str], None]


def needs_root(recipe: Recipe) -> bool:
    """Whether data.root must still be given on the command line, as for the project's own recipes."""
    return recipe.data.root is None and any(task.suite in ("glue", "superglue") for task in recipe.data.tasks)


def problems(recipe: Recipe, warn: Warn, planned: Callable[[RunSchedule], None] = lambda _: None) -> list[str]:
    """All errors in the reward, data and model files that a valid recipe names, and in its prompts.

    Args:
        planned: gets the schedule of a training.
    """
    found: list[str] = []

    def result_of(check: Callable[[], Any]) -> Any:
        try:
            return check()
        except UserError as error:
            found.append(str(error))
            return None

    if recipe.method == "encoder":
        from extensions.encoder.jobs import load_jobs

        result_of(partial(load_reward, recipe.reward))
        jobs = None if needs_root(recipe) else result_of(partial(load_jobs, recipe, warn))
        result_of(partial(_check_encoder, recipe, [row for job in jobs or [] for row in job.data.rows], warn))
        return found
    reward = result_of(partial(load_reward, recipe.reward))
    if recipe.fork is not None:
        from extensions.runs.resume import fork_source

        result_of(partial(fork_source, recipe))
    from extensions.model.critic import critic_source

    result_of(partial(critic_source, recipe))
    parts = []
    if not needs_root(recipe):
        parts = [result_of(partial(RunData.of_task, recipe, task, warn)) for task in recipe.data.tasks]
    for data in parts:
        if data is not None and reward is not None:
            found += [fault for fault, _ in reward_faults(reward, data.train or data.table)]
    whole = result_of(partial(RunData.joined, recipe, parts)) if parts and all(parts) else None
    result_of(partial(_check_model_files, recipe, whole or RunData(), warn))
    if recipe.method in ("ppo", "sft"):
        from extensions.runs.build import epoch_rows

        schedule = RunSchedule(recipe, epoch_rows(recipe, whole) if whole else None)
        result_of(schedule.check)
        planned(schedule)
    return found


def _check_encoder(recipe: Recipe, rows: Sequence[Example], warn: Warn) -> None:
    """Check that an encoder's configuration and tokenizer load, and that every row fits."""
    from extensions.encoder.model import load_collator
    from extensions.model.hub import HubUnreachable

    try:
        collator = load_collator(recipe.model, recipe.encoder.max_tokens)
    except HubUnreachable as error:
        warn(f"the model was not checked. {error}")
        return
    collator.check(rows)


def _check_model_files(recipe: Recipe, data: RunData, warn: Warn) -> None:
    """Check that configuration and tokenizer load, every prompt fits, and the tokenizer can encode every answer."""
    from extensions.model.hub import HubUnreachable
    from extensions.model.loading import load_config, load_tokenizer
    from extensions.runs.build import label_sets, make_encoder, response_budgets
    from extensions.runs.memory import check_memory

    try:
        config, tokenizer = load_config(recipe.model), load_tokenizer(recipe.model)
    except HubUnreachable as error:
        warn(f"the model was not checked. {error}")
        return
    encoder = make_encoder(recipe, data, tokenizer, config, warn)
    response_budgets(recipe, encoder, label_sets(recipe, data), warn)
    check_memory(recipe, data, encoder, config, warn)
