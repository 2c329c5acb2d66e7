"""A run on the Ray backend, from its recipe to its folder; launch/ppo_ray.sh calls `start_run` and `describe_run`."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

import torch
import transformers

from extensions.common.console import Reporter
from extensions.common.errors import ProcessGone, UserError
from extensions.common.processes import killed_for, oom_kills
from extensions.data.splits import RunData
from extensions.distributed import signals
from extensions.evaluation.evaluator import Evaluator
from extensions.evaluation.likelihood import label_sets_of
from extensions.model.critic import critic_source
from extensions.model.loading import load_config, load_tokenizer
from extensions.model.proof import proof_rows
from extensions.ray_backend import cluster
from extensions.ray_backend.arguments import command, differences, key_table, namespace, unsupported
from extensions.recipe import Recipe
from extensions.rollout.lora_sync import SyncProbe, probe_samples
from extensions.rollout.reward_check import check_reward
from extensions.rollout.rewards import load_reward
from extensions.rollout.vllm_engine import check_vllm_supports, require_installed, set_vllm_environment, vllm_dtype
from extensions.runs.build import (
    describe_start,
    make_encoder,
    make_order,
    open_folder,
    record_proof,
    response_budgets,
    run_schedule,
)

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")


def describe_run(recipe: Recipe) -> str:
    """The text of `--print`: OpenRLHF's command, where each key takes effect, and the differences."""
    shape = cluster.shape_of(recipe, torch.cuda.device_count())
    return "\n".join(
        [
            "# OpenRLHF's command for this recipe, for reading: run as it is, it would not sync its adapters.",
            command(recipe, shape),
            "\n# Where each key takes effect.",
            *(f"{key} = {value}: {place}" for key, (value, place) in key_table(recipe).items()),
            "\n# Differences from the DeepSpeed backend.",
            *(f"- {difference}" for difference in differences(recipe)),
        ]
    )


def _run(recipe: Recipe) -> None:
    if errors := unsupported(recipe):
        raise UserError("\n".join(errors))
    for name in LAUNCHER_VARIABLES:  # the groups set their own
        os.environ.pop(name, None)
    reporter = Reporter(active=True)
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    set_vllm_environment()
    reward, data = load_reward(recipe.reward), RunData.load(recipe, reporter.warn)
    schedule = run_schedule(recipe, data)
    check_reward(reward, data.train, reporter.warn)
    critic_from = critic_source(recipe, reporter.warn)
    config, tokenizer = load_config(recipe.model), load_tokenizer(recipe.model)
    check_vllm_supports(config)
    encoder = make_encoder(recipe, data, tokenizer, config, reporter.warn)
    label_sets = label_sets_of(data.train)
    budgets = response_budgets(recipe, encoder, label_sets, reporter.warn)
    shape = cluster.shape_of(recipe, cluster.join(recipe))
    args = namespace(recipe, shape)
    folder = open_folder(recipe, reward, data, reporter, shape.ranks)
    reporter.info(f"{recipe.run_dir.name}: {data.describe()}; {recipe.model.path} on Ray")
    describe_start(recipe, critic_from, reporter)
    for difference in differences(recipe):
        reporter.info(f"- {difference}")
    cluster.ensure(recipe, shape)

    # Here, since they import ray and vllm.
    import ray

    from extensions.ray_backend.groups import RaySampler, start_groups
    from extensions.ray_backend.models import RayStrategy
    from extensions.ray_backend.trainer import RayTrainer, RayTrainingRun

    try:
        with signals.caught():  # ray.init has replaced the handlers
            rows = proof_rows(data.train, encoder, config, recipe.rollout.max_new_tokens)
            strategy = RayStrategy(recipe, args, rows)
            groups = start_groups(recipe, shape, strategy, schedule.updates)
            record_proof(groups.call_actor("proof"), folder, reporter)
            warn = reporter.warn if recipe.vllm.corrects else None
            probe = SyncProbe(vllm_dtype(recipe, shape.on_cpu), recipe.vllm.probe_tolerance, warn)
            probed = probe_samples(data.train, encoder, recipe.vllm.probe_samples)
            order = make_order(recipe, data)
            trainer = RayTrainer(recipe, strategy, groups, encoder, reward, order, probe, probed, budgets)
            sampler: Any = RaySampler(groups, recipe.rollout.temperature, trainer.sync.refresh)
            evaluator = Evaluator(recipe, strategy, reporter, sampler, encoder, recipe.run_dir, label_sets)
            RayTrainingRun(recipe, strategy, reporter, folder, data, evaluator, trainer, schedule).go()
    finally:
        ray.shutdown()


def start_run(recipe: Recipe) -> None:
    """Train by PPO on Ray and write the run folder. Errors of other processes are raised as their causes.

    Raises:
        UserError: ray or vllm is not installed.
        ProcessGone: a process of a group or a vLLM engine has died.
    """
    require_installed("ray", "vllm")
    import ray

    kills = oom_kills()
    try:
        _run(recipe)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        while isinstance(cause, ray.exceptions.RayTaskError):
            cause = cause.cause
        if type(cause).__name__ == "EngineDeadError":  # vLLM's
            raise ProcessGone(_gone("a vLLM engine's process", cause, kills)) from error
        raise (cause if isinstance(cause, Exception) else error) from error
    except ray.exceptions.RayActorError as error:
        raise ProcessGone(_gone("a process of the Ray backend", error, kills)) from error


def _gone(what: str, error: Any, kills: Mapping[str, int]) -> str:
    """The message of a process that has died.

    Args:
        kills: `oom_kills` at the start of the run.
    """
    out_of_memory, sentence = killed_for(kills)
    cause = f" ({sentence})" if out_of_memory else ""
    return (
        f"{what} is gone{cause}: {' '.join(str(error).split())[:600]}\nRay's logs are in "
        "/tmp/ray/session_latest/logs. Run the same command again: it resumes from the last checkpoint"
    )
