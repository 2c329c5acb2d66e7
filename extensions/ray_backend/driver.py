"""What launch/ppo_ray.sh runs: [--print] RECIPE [key.sub=value ...]."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import transformers

from extensions.common.console import Reporter
from extensions.common.errors import ProcessGone, UserError
from extensions.data.splits import RunData
from extensions.distributed import signals
from extensions.evaluation.likelihood import label_sets_of
from extensions.model.loading import load_config, load_tokenizer
from extensions.model.proof import proof_rows
from extensions.ray_backend import cluster, openrlhf
from extensions.ray_backend.arguments import arguments, command, differences, refused, shape_of, where
from extensions.recipe import Recipe
from extensions.rollout.lora_sync import SyncProbe, probe_samples
from extensions.rollout.reward_check import check_reward
from extensions.rollout.rewards import load_reward
from extensions.rollout.vllm_engine import check_vllm_supports, require_installed, set_vllm_environment, vllm_dtype
from extensions.runs.build import (
    epoch_rows,
    make_encoder,
    make_order,
    num_updates,
    open_folder,
    record_proof,
)

FORGOTTEN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")  # of a launcher above


def show(recipe: Recipe) -> str:
    """What `--print` prints: OpenRLHF's command, where each key goes, and what differs."""
    shape = shape_of(recipe, torch.cuda.device_count())
    lines = [
        "# OpenRLHF's command for this recipe, to be read: by itself it would not sync its adapters.",
        command(recipe, shape),
    ]
    lines += ["", "# Where each key goes."]
    lines += [f"{key} = {value}: {place}" for key, (value, place) in where(recipe).items()]
    lines += ["", "# Otherwise than in the DeepSpeed loop.", *(f"- {one}" for one in differences(recipe))]
    return "\n".join(lines)


def run(recipe: Recipe) -> None:
    """Train by PPO on Ray and write the run folder."""
    if errors := refused(recipe):
        raise UserError("\n".join(errors))
    for name in FORGOTTEN:
        os.environ.pop(name, None)
    reporter = Reporter(active=True)
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    set_vllm_environment()
    reward, data = load_reward(recipe.reward), RunData.load(recipe, reporter.warn)
    check_reward(reward, data.train, reporter.warn)
    config = load_config(recipe.model)
    check_vllm_supports(config)
    tokenizer = load_tokenizer(recipe.model)
    encoder = make_encoder(recipe, data, tokenizer, config, reporter.warn)
    shape = shape_of(recipe, cluster.join(recipe))
    options = arguments(recipe, shape)
    openrlhf.parse(options)  # its own checks
    folder = open_folder(recipe, reward, data, reporter)
    reporter.info(f"{recipe.run_dir.name}: {data.describe()}; {recipe.model.path} on Ray")
    for one in differences(recipe):
        reporter.info(f"- {one}")

    import ray

    cluster.ensure(recipe, shape)
    # These import vllm and ray, and OpenRLHF's modules that do.
    from openrlhf.trainer.ppo_utils.samples_generator import SamplesGenerator

    from extensions.ray_backend import trainer as own
    from extensions.ray_backend.models import RayStrategy
    from extensions.ray_backend.workers import CriticActor, Engines, PolicyActor, ReferenceActor

    rows = proof_rows(data.train, encoder, config, recipe.rollout.max_new_tokens)
    steps = recipe.training_steps(epoch_rows(recipe, data))
    updates = num_updates(recipe, steps)

    def make(
        pretrain: str, strategy: Any, actor: Any, critic: Any, _: Any, reference: Any, engines: Any, **more: Any
    ) -> Any:
        generator = SamplesGenerator(strategy, None, None, None, engines)
        groups = own.Groups(actor, critic, engines, generator)
        padded = load_tokenizer(recipe.model)
        padded.pad_token = padded.pad_token or padded.eos_token  # what stands in padding changes nothing

        def fit() -> None:
            probe = SyncProbe(vllm_dtype(recipe, shape.on_cpu), recipe.vllm.probe_tolerance)
            probed = probe_samples(data.train, encoder, recipe.vllm.probe_samples)
            order = make_order(recipe, data)
            parts = (padded, encoder, reward, order, probe, probed)
            record_proof(groups.proof(), folder, reporter)
            trainer = own.RayTrainer(recipe, strategy, groups, critic, reference, *parts)
            evaluator = own.evaluator(recipe, strategy, reporter, trainer, label_sets_of(data.train))
            own.RayTrainingRun(recipe, strategy, reporter, folder, data, evaluator, trainer, steps).go()

        return SimpleNamespace(fit=fit, get_max_steps=lambda: updates)

    module = openrlhf.MODULE
    parts = {
        f"{module}:get_strategy": lambda args: RayStrategy(recipe, args, rows),
        f"{module}:PolicyModelActor": ray.remote(num_gpus=1)(PolicyActor),
        f"{module}:ReferenceModelActor": ray.remote(num_gpus=1)(ReferenceActor),
        f"{module}:CriticModelActor": ray.remote(num_gpus=1)(CriticActor),
        "openrlhf.trainer.ray.vllm_engine:RolloutRayActor": Engines(recipe, shape.on_cpu),
        "openrlhf.trainer.ppo_trainer:PPOTrainer": InProcessActor(make, ray.put),
    }
    try:
        with signals.caught():  # Ray has put handlers of its own in their place
            openrlhf.train(options, parts)
    finally:
        ray.shutdown()


class InProcessActor:
    """Stands for a class of Ray's, but its one object lives in this process.

    OpenRLHF makes an actor of its trainer; here it is the driver, which has the terminal, the signals and the folder.
    """

    def __init__(self, make: Callable[..., Any], put: Callable[[Any], Any]) -> None:
        self.make, self.put = make, put

    def remote(self, *args: Any, **kwargs: Any) -> Any:
        made = self.make(*args, **kwargs)

        def method(name: str) -> Any:
            return SimpleNamespace(remote=lambda *a, **k: self.put(getattr(made, name)(*a, **k)))

        return SimpleNamespace(fit=method("fit"), get_max_steps=method("get_max_steps"))


def start_run(recipe: Recipe) -> None:
    """`run`, whose errors are those of the process that had them.

    Raises:
        UserError: ray or vllm is missing.
        ProcessGone: a worker or an engine is gone.
    """
    require_installed("ray", "vllm")
    import ray

    try:
        run(recipe)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        while isinstance(cause, ray.exceptions.RayTaskError):
            cause = cause.cause
        if _is_dead_engine(cause):
            raise ProcessGone(_gone("a vLLM engine's process", cause)) from error
        raise (cause if isinstance(cause, Exception) else error) from error
    except ray.exceptions.RayActorError as error:
        raise ProcessGone(_gone("a process of the engine", error)) from error


def _is_dead_engine(error: Any) -> bool:
    return type(error).__name__ == "EngineDeadError"


def _gone(what: str, error: Any) -> str:
    said = " ".join(str(error).split())
    return (
        f"{what} is gone, mostly for lack of memory: {said[:600]}\nRay's logs are in /tmp/ray/session_latest/logs. Run "
        "the same command again: it resumes from the last checkpoint"
    )
