"""Builds a run from a recipe: data, prompt encoder, model, DeepSpeed engine, evaluator, trainer, run folder."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import transformers
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from extensions.common.console import Reporter
from extensions.common.errors import UserError
from extensions.common.files import sha256, write_json
from extensions.data import BatchOrder, class_weights, epoch_sizes, has_split, rows_of_epoch
from extensions.data.checks import check_lengths
from extensions.data.splits import RunData
from extensions.distributed import watchdog
from extensions.distributed.strategy import Strategy
from extensions.evaluation.evaluator import Evaluator
from extensions.evaluation.likelihood import candidates, compared_beside_sampled, label_sets_of
from extensions.inference.manifest import FILE_NAME, Manifest
from extensions.model.adapters import adapter_hash
from extensions.model.critic import critic_hash, critic_source
from extensions.model.loading import load_config, load_policy, load_tokenizer, model_identity
from extensions.model.prompt_encoder import recipe_encoder
from extensions.model.proof import Proof, proof_rows
from extensions.prompts import CLOSE, PromptEncoder
from extensions.recipe import Recipe, RunSchedule
from extensions.rollout.lora_sync import probe_samples
from extensions.rollout.reward_check import check_reward
from extensions.rollout.reward_files import reward_digest
from extensions.rollout.rewards import Reward, load_reward
from extensions.rollout.sampler import Sampler
from extensions.rollout.vllm_engine import require_installed
from extensions.rollout.vllm_sampler import LocalLoraSync, VllmSampler
from extensions.runs import resume
from extensions.runs.evaluation_run import EvaluationRun
from extensions.runs.folder import RunFolder
from extensions.runs.memory import run_memory
from extensions.runs.resume import input_rows
from extensions.runs.training_run import TrainingRun
from extensions.tasks import Task
from extensions.training.correlation import sft_trainer
from extensions.training.ppo import PpoTrainer
from extensions.training.trainer import Trainer


def run(recipe: Recipe) -> None:
    """Run a recipe under DeepSpeed on this rank."""
    prepare(recipe).go()


def prepare(recipe: Recipe) -> EvaluationRun | TrainingRun:
    """The run of a recipe, ready to `go`.

    Raises:
        UserError: invalid data, prompts, reward or folder, found before the model is loaded; or the model.
    """
    method, ppo = recipe.method, recipe.ppo
    max_grad_norm = recipe.sft.max_grad_norm if method == "sft" else ppo.max_grad_norm
    strategy = Strategy(recipe.seed, recipe.deepspeed, max_grad_norm)
    strategy.setup_distributed(timedelta(seconds=max(1800.0, recipe.deepspeed.timeout + 2 * watchdog.GRACE)))
    reporter = Reporter(active=strategy.is_rank_0())
    if not (reporter.active and sys.stderr.isatty()):
        transformers.utils.logging.disable_progress_bar()
    _check_ranks(recipe, strategy.world_size)
    if recipe.rollout.backend == "vllm":
        require_installed("vllm")
    reward = load_reward(recipe.reward)
    data = RunData.load(recipe, reporter.warn)
    schedule = run_schedule(recipe, data)
    if method == "ppo":
        check_reward(reward, data.train, reporter.warn)
    critic_from = critic_source(recipe, reporter.warn)
    tokenizer, config = load_tokenizer(recipe.model), load_config(recipe.model)
    encoder = make_encoder(recipe, data, tokenizer, config, reporter.warn)
    budgets = response_budgets(recipe, encoder, label_sets(recipe, data), reporter.warn)
    memory = run_memory(recipe, data, encoder, config, strategy)
    memory.check_longest(reporter.warn)
    sharded = recipe.deepspeed.zero_stage == 3
    size = strategy.world_size
    folder = open_folder(recipe, reward, data, reporter, size) if strategy.is_rank_0() else None
    strategy.barrier()  # until the folder exists
    reporter.info(f"{recipe.run_dir.name}: {data.describe()}; loading {recipe.model.path}")
    describe_start(recipe, critic_from, reporter)
    warn_of_another_parser(recipe, reporter.warn)

    policy = load_policy(
        recipe.model,
        recipe.lora,
        ppo.value_model if method == "ppo" else "none",
        recipe.rollout.temperature,
        strategy.device,
        recipe.seed,
        ppo.kl.reference if method == "ppo" and ppo.kl.init > 0 else "base",
        training=method != "eval",
        rows=proof_rows(data.train or data.table, encoder, config, recipe.rollout.max_new_tokens),
        same_forwards=sharded,
        critic_from=critic_from,
    )
    if len(paths := set(strategy.gather(str(policy.path)))) > 1:
        ways = "; ".join(sorted(paths))
        raise UserError(f"the ranks compute the model in different ways ({ways}); use devices of one kind")
    record_proof(policy.proof, folder, reporter)
    of_update, of_rollout, of_evaluation = memory.limits(policy.path, strategy, reporter)
    engine = None
    if method != "eval" or sharded:
        groups = policy.parameter_groups(recipe.trained_with.value_lr)
        engine = strategy.wrap(policy, groups, recipe.trained_with, recipe.schedule, schedule.updates)
    fixed_decode_steps = recipe.rollout.max_new_tokens if sharded else None
    make_sampler: Callable[..., Sampler] = Sampler
    if recipe.rollout.backend == "vllm":
        probed = probe_samples(data.train or data.table, encoder, recipe.vllm.probe_samples)
        make_sampler = partial(
            VllmSampler, LocalLoraSync(recipe, policy, strategy, probed, reporter.info, reporter.warn)
        )
    size = recipe.evaluation.micro_batch_size
    sampler = make_sampler(policy, tokenizer, CLOSE, size, fixed_decode_steps, of_evaluation)
    evaluator = Evaluator(recipe, strategy, reporter, sampler, encoder, recipe.run_dir, label_sets(recipe, data))
    if method == "eval":
        return EvaluationRun(recipe, strategy, reporter, folder, data, evaluator)
    order = make_order(recipe, data)
    trainer: Trainer
    if method == "sft":
        trainer = sft_trainer(recipe.sft)(policy, engine, strategy, encoder, order, recipe.sft, recipe.seed, of_update)
    else:
        size = ppo.micro_batch_size * ppo.samples_per_prompt
        sampler = make_sampler(policy, tokenizer, CLOSE, size, fixed_decode_steps, of_rollout)
        trainer = PpoTrainer(
            policy,
            engine,
            strategy,
            sampler,
            encoder,
            reward,
            order,
            ppo,
            budgets,
            recipe.seed,
            limits=of_update,
            correction=recipe.vllm if recipe.rollout.backend == "vllm" else None,
        )
    return TrainingRun(recipe, strategy, reporter, folder, data, evaluator, trainer, schedule)


def describe_start(recipe: Recipe, critic_from: Path | None, reporter: Reporter) -> None:
    """Print what a PPO run with an adapter or a critic of another run starts from."""
    adapter, kl = recipe.model.adapter, recipe.ppo.kl
    if recipe.method != "ppo" or (adapter is None and critic_from is None):
        return
    reference = "the base model" if adapter is None or kl.reference == "base" else "a frozen copy of it"
    reporter.info(
        f"policy from {adapter or 'a new adapter'}; KL reference: {reference if kl.init > 0 else 'none'}; value head: "
        f"{critic_from or 'new'}"
    )


def warn_of_another_parser(recipe: Recipe, warn: Callable[[str], None]) -> None:
    """Warn of an evaluation that judges the answers of a trained model by another rule than its training did."""
    folder = Path(recipe.model.adapter or recipe.model.path)
    if recipe.method != "eval" or not (folder / FILE_NAME).is_file():
        return
    try:
        trained = {task.parser for task in Manifest.load(folder).tasks}
    except UserError:  # of another version; an evaluation does not need it
        return
    if trained != {recipe.parser}:
        parser = trained.pop()
        warn(f"{folder} was trained with parser: {parser}, this evaluation has {recipe.parser}; set parser={parser}")


def label_sets(recipe: Recipe, data: RunData) -> dict[str, list[str]]:
    """Multi-label task -> label sets of its training rows; an evaluation run reads them from the model's nlu.json."""
    tasks = {task.name: task for task in recipe.data.tasks if task.multi_label}
    folder = Path(recipe.model.adapter or recipe.model.path)
    if recipe.method != "eval" or not tasks or not (folder / FILE_NAME).is_file():
        return label_sets_of(data.train)
    recorded = Manifest.load(folder).label_sets
    return {name: [one for one in recorded.get(name, []) if task.is_label_set(one)] for name, task in tasks.items()}


def record_proof(proof: Proof, folder: RunFolder | None, reporter: Reporter) -> None:
    """Print how the model is computed, and write the measured differences to the run folder."""
    reporter.info(str(proof))
    if folder is not None:
        write_json(folder.root / "model.json", proof.as_json())


def _inputs(recipe: Recipe, reward: Reward, data: RunData) -> dict[str, str | None]:
    """Hashes of what the run reads; a resumed run must read the same."""
    config = recipe.deepspeed.config
    return {
        resume.MODEL: model_identity(recipe.model.path),
        resume.ADAPTER: adapter_hash(recipe.model.adapter),
        resume.CRITIC: critic_hash(recipe),
        # Built-in rewards are covered by the project's version.
        resume.REWARD: None if reward.packed_labels else reward_digest(reward.path),
        **input_rows(data),
        # DeepSpeed's configuration reports a missing file.
        resume.DEEPSPEED: sha256(Path(config)) if config is not None and Path(config).is_file() else None,
    }


def _check_ranks(recipe: Recipe, world_size: int) -> None:
    sizes: dict[str, dict[str, int | None]] = {
        "ppo": {"ppo.batch_size": recipe.ppo.batch_size, "ppo.mini_batch_size": recipe.ppo.mini_batch_size},
        "sft": {"sft.batch_size": recipe.sft.batch_size},
    }
    for key, value in sizes.get(recipe.method, {}).items():
        if value is not None and value % world_size:
            raise UserError(
                f"{key}: {value} samples cannot be shared evenly by {world_size} ranks; use a multiple of {world_size}"
            )


def response_budgets(
    recipe: Recipe, encoder: PromptEncoder, label_sets: Mapping[str, Sequence[str]], warn: Callable[[str], None]
) -> dict[str, tuple[int, int]]:
    """Task -> its `response_budget`.

    Args:
        label_sets: multi-label task -> label sets of its training rows.
    """
    tasks = recipe.data.tasks
    return {task.name: response_budget(recipe, task, encoder, label_sets.get(task.name, ()), warn) for task in tasks}


def response_budget(
    recipe: Recipe, task: Task, encoder: PromptEncoder, label_sets: Sequence[str], warn: Callable[[str], None]
) -> tuple[int, int]:
    """Low and high end, in tokens, between which the response budget of each training row is drawn.

    The low end is that of rollout.response_budget, raised to the longest answer that fits the high end: a smaller
    budget cuts right answers, which then count as wrong format. Warns of the raise, and of answers that never fit.
    """
    low, high = recipe.rollout.response_budget
    tokens = encoder.answer_tokens(task, label_sets)
    is_drawn = recipe.method == "ppo" and has_split(task, "train")

    def describe(answer: str) -> str:
        return f"{task.display_name}: the answer {answer!r} and the closing tag are {tokens[answer]} tokens, more than "

    longest = max(tokens, key=lambda answer: tokens[answer])
    if tokens[longest] > high and (is_drawn or recipe.evaluation.decoding != "likelihood"):
        warn(
            f"{describe(longest)}the high end {high} of rollout.response_budget; raise that, or this answer is always "
            "cut off and counts as wrong format"
        )
    fitting = max((answer for answer in tokens if tokens[answer] <= high), key=lambda a: tokens[a], default=None)
    if fitting is None or tokens[fitting] <= low:
        return low, high
    if is_drawn:
        warn(
            f"{describe(fitting)}the low end of rollout.response_budget, which is raised from {low} to "
            f"{tokens[fitting]} for this task: a smaller budget cuts right answers off"
        )
    return tokens[fitting], high


def epoch_rows(recipe: Recipe, data: RunData) -> int:
    """Training rows per epoch over all tasks; repeated rows count each time."""
    return sum(epoch_sizes(data.train, recipe.data.oversample).values())


def run_schedule(recipe: Recipe, data: RunData) -> RunSchedule:
    """The iterations of a run. UserError: its learning rate would be zero for a part of them."""
    schedule = RunSchedule(recipe, epoch_rows(recipe, data))
    if recipe.method in ("ppo", "sft"):
        schedule.check()
    return schedule


def make_order(recipe: Recipe, data: RunData) -> BatchOrder:
    """The training rows of each batch."""
    settings = recipe.data
    sizes = epoch_sizes(data.train, settings.oversample)
    rows = rows_of_epoch(sizes, settings.mixing, settings.mixing_cap, settings.mixing_temperature)
    weights = class_weights(data.train) if settings.class_weights == "balanced" else None
    batch = recipe.training_batch
    return BatchOrder(data.train, batch, recipe.seed, settings.balanced, rows, settings.oversample, weights)


def make_encoder(
    recipe: Recipe, data: RunData, tokenizer: PreTrainedTokenizerBase, config: Any, warn: Callable[[str], None]
) -> PromptEncoder:
    """The prompt encoder of a run, checked on all its rows.

    Args:
        config: of the model.

    Raises:
        UserError: a prompt does not fit, or the tokenizer cannot write an answer.
    """
    encoder = recipe_encoder(recipe, tokenizer, config, data.demonstrations)
    for task in recipe.data.tasks:
        encoder.check_answers(task)
    for example in data.rows:
        encoder.check(example.task, example.fields)
    check_lengths(encoder, data.train, "training rows", warn)
    check_lengths(encoder, data.table, f"{data.split} rows", warn)
    if data.split != "validation":
        check_lengths(encoder, data.validation, "validation rows", warn)
    check_lengths(encoder, data.test, "test rows to answer", warn)
    known = label_sets(recipe, data)
    for task in recipe.data.tasks if recipe.evaluation.decoding != "likelihood" else []:
        compared = candidates(task, known.get(task.name, ()))
        if recipe.evaluation.probabilities and not compared_beside_sampled(recipe.evaluation, compared):
            warn(
                f"{task.display_name}: evaluations compute no probabilities beside the sampled answers: with "
                f"{compared.count} possible answers per row they would take several times as long. "
                "evaluation.decoding=likelihood or evaluation.best_by=likelihood computes them"
            )
    return encoder


def open_folder(recipe: Recipe, reward: Reward, data: RunData, reporter: Reporter, world_size: int) -> RunFolder:
    """Open the run folder; call it in one process."""
    steps = recipe.training_steps(epoch_rows(recipe, data)) if recipe.method in ("ppo", "sft") else None
    return RunFolder(recipe.run_dir, recipe, _inputs(recipe, reward, data), reporter, world_size, steps)
