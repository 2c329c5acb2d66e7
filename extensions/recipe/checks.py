"""Cross-field validation: keys that are each valid but contradict each other."""

from __future__ import annotations

import math
from pathlib import Path

from extensions.recipe.methods import GROUPED, Ppo
from extensions.recipe.schema import Recipe
from extensions.tasks import TASKS


def cross_field_errors(recipe: Recipe) -> list[str]:
    """One sentence per contradiction, naming the keys."""
    ppo, rollout, evaluation, zero_stage = recipe.ppo, recipe.rollout, recipe.evaluation, recipe.deepspeed.zero_stage
    names, schedule = [task.name for task in recipe.data.tasks], recipe.schedule
    trains, own_vllm = recipe.method in ("ppo", "sft"), rollout.backend == "vllm" and recipe.backend == "deepspeed"
    optimizer = "sft.optimizer" if recipe.method == "sft" else "optimizer.name"
    rules = [
        (
            trains and recipe.trained_with.name == "adafactor" and zero_stage > 0,
            f"deepspeed.zero_stage: {zero_stage} is incompatible with {optimizer}: adafactor. ZeRO flattens parameters "
            "into partitions, so Adafactor loses its row and column factors and silently becomes another optimizer. "
            f"Use zero_stage: 0 (LoRA state is tiny), or {optimizer}: adamw",
        ),
        (
            recipe.deepspeed.offload and zero_stage == 0,
            "deepspeed.offload: true needs deepspeed.zero_stage: 1, 2 or 3; at stage 0 nothing is offloaded",
        ),
        (
            rollout.min_new_tokens > rollout.max_new_tokens,
            f"rollout.response_budget: {rollout.response_budget}: expected [low, high] with low <= high",
        ),
        (
            ppo.mini_batch_size is not None and ppo.batch_size % ppo.mini_batch_size != 0,
            f"ppo.mini_batch_size: {ppo.mini_batch_size} does not divide ppo.batch_size: {ppo.batch_size}",
        ),
        (
            evaluation.patience > 0 and evaluation.every_steps == 0,
            "evaluation.patience needs evaluation.every_steps: early stopping needs validations",
        ),
        (
            (schedule.epochs or 0) > (recipe.max_epochs or math.inf),
            f"schedule.epochs: {schedule.epochs} is more than max_epochs: {recipe.max_epochs}, so the learning rate "
            "would not reach its end; lower it, or raise max_epochs",
        ),
        (
            schedule.epochs is not None and schedule.name == "constant" and schedule.warmup_ratio == 0,
            f"schedule.epochs: {schedule.epochs} has no effect on a constant learning rate without warmup; remove it, "
            "or set schedule.warmup_ratio",
        ),
        (
            evaluation.best_by == "likelihood"
            and not (evaluation.probabilities or evaluation.decoding == "likelihood"),
            "evaluation.best_by: likelihood needs evaluation.probabilities: true, or evaluation.decoding: likelihood; "
            "otherwise validations have no answers by likelihood",
        ),
        (
            recipe.fork is not None and _within(recipe.fork, recipe.run_dir),
            f"fork: {recipe.fork} is this run's own folder, or in it; give a fork another output_dir or name",
        ),
        (
            recipe.fork is not None and not trains,
            f"fork: only trainings have checkpoints to go on from; remove it for method: {recipe.method}",
        ),
        (
            recipe.backend == "ray" and recipe.method != "ppo",
            f"backend: ray supports only method: ppo; remove backend for method: {recipe.method}",
        ),
        (
            own_vllm and ppo.old_logprobs == "sampled",
            "ppo.old_logprobs: sampled is incompatible with rollout.backend: vllm, whose logprobs differ from the "
            "trainer's by rounding and which computes no values; use auto",
        ),
        (
            own_vllm and recipe.vllm.tensor_parallel_size > 1,
            f"vllm.tensor_parallel_size: {recipe.vllm.tensor_parallel_size} needs backend: ray; under DeepSpeed each "
            "rank has its own engine",
        ),
        (
            recipe.vllm.is_threshold[0] > recipe.vllm.is_threshold[1],
            f"vllm.is_threshold: {recipe.vllm.is_threshold}: expected [lowest, highest] importance weight",
        ),
        *_label_rules(recipe),
        *_correlation_rules(recipe),
        *_estimator_rules(recipe),
        (
            bool(recipe.prompt.template_options) and not recipe.prompt.chat_template,
            "prompt.template_options needs prompt.chat_template: true; the plain form has no template",
        ),
    ]
    errors = [message for broken, message in rules if broken]
    errors += [f"data.tasks: {name!r} is named twice" for name in sorted({n for n in names if names.count(n) > 1})]
    errors += [
        f"encoder.intermediate_for: {name!r} is neither a built-in task nor one of data.tasks"
        for name in recipe.encoder.intermediate_for
        if name not in TASKS and name not in names
    ]
    return errors


def _within(path: str, folder: Path) -> bool:
    return Path(path).resolve().is_relative_to(folder.resolve())


def _estimator_rules(recipe: Recipe) -> list[tuple[bool, str]]:
    """The advantage estimator against the keys that only some estimators have."""
    ppo, default = recipe.ppo, Ppo()
    estimator, k = ppo.advantage_estimator, ppo.samples_per_prompt
    of_critic = ("lam", "value_coef", "value_clip", "value_target", "critic", "critic_from")
    rules = [
        (
            estimator != "gae" and getattr(ppo, key) != getattr(default, key),
            f"ppo.{key}: {getattr(ppo, key)} applies to ppo.advantage_estimator: gae only; {estimator} has no critic. "
            "Remove the key",
        )
        for key in of_critic
    ]
    equal = [f"ppo.drop_equal_groups: {ppo.drop_equal_groups}".lower()] * ppo.drop_equal_groups
    equal += [f"ppo.resample_equal_groups: {ppo.resample_equal_groups}"] * (ppo.resample_equal_groups > 0)
    for key, broken in (
        *((key, k == 1) for key in equal),
        (f"ppo.advantage_estimator: {estimator}", estimator in GROUPED and k == 1),
    ):
        rules.append(
            (
                broken,
                f"{key} compares the responses to a prompt; ppo.samples_per_prompt: 1 gives one. Set it to 2 or more",
            )
        )
    rules += [
        (
            recipe.deepspeed.zero_stage == 3,
            f"{key} needs deepspeed.zero_stage: 0, 1 or 2: at stage 3 all ranks must run the same forwards",
        )
        for key in equal
    ]
    rules += [
        (
            estimator in GROUPED and ppo.gamma != 1.0,
            f"ppo.gamma: {ppo.gamma} is not discounted by ppo.advantage_estimator: {estimator}; remove it",
        ),
        (
            ppo.kl.estimator != default.kl.estimator and not ppo.kl.use_loss,
            f"ppo.kl.estimator: {ppo.kl.estimator} applies to ppo.kl.use_loss: true; the penalty in the reward is k1",
        ),
        (
            ppo.kl.use_loss and ppo.kl.init == 0,
            "ppo.kl.use_loss: true has no effect with ppo.kl.init: 0; give a coefficient, or remove it",
        ),
        (
            ppo.whiten_min_std > 0 and not ppo.whitens,
            f"ppo.whiten_min_std: {ppo.whiten_min_std} has no effect: advantages are not whitened with "
            f"ppo.advantage_estimator: {estimator}, ppo.whiten: {str(ppo.whiten).lower()}. Set it to 0",
        ),
    ]
    return rules


def _correlation_rules(recipe: Recipe) -> list[tuple[bool, str]]:
    """The SFT loss that is defined for scores only, and teaches no sampled answers."""
    used = recipe.method == "sft" and recipe.sft.loss == "correlation"
    key = "sft.loss: correlation"
    rules = [
        (
            used and not task.is_regression,
            f"{key} is a loss of regressions; {task.name} is a {task.kind} task. Leave it out of "
            "data.tasks, or use answer",
        )
        for task in recipe.data.tasks
    ]
    rules += [
        (
            used and recipe.evaluation.decoding != "likelihood",
            f"{key} needs evaluation.decoding: likelihood, not {recipe.evaluation.decoding}: it trains the mean over "
            "a task's scores, and a single sampled score says little about that",
        ),
        (
            used and recipe.sft.batch_size < 4,
            f"{key} needs sft.batch_size: 4 or more, not {recipe.sft.batch_size}: it compares the scores in a batch",
        ),
    ]
    return rules


def _label_rules(recipe: Recipe) -> list[tuple[bool, str]]:
    """Class balancing against the method and the kinds of the tasks."""
    data, is_encoder = recipe.data, recipe.method == "encoder"
    used = ["data.oversample: true"] * data.oversample
    used += [f"data.class_weights: {data.class_weights}"] * (data.class_weights != "none")
    rules = [(len(used) == 2, f"{' and '.join(used)} would balance the labels twice; use one of them")]
    for key in used:
        rules.append((is_encoder, f"{key} applies to the methods sft and ppo; remove it for an encoder"))
        rules += [
            (
                task.kind != "classification",
                f"{key}: {task.name} is a {task.kind} task, whose rows have no classes to balance; remove the key or "
                "the task",
            )
            for task in data.tasks
        ]
    rules += [
        (
            is_encoder and task.multi_label,
            f"data.tasks: {task.name} has several labels per row, which encoders do not support here; use ppo or sft",
        )
        for task in (*data.tasks, *filter(None, [recipe.encoder.intermediate]))
    ]
    return rules
