"""Cross-field validation: keys that are each allowed but contradict each other."""

from __future__ import annotations

from extensions.recipe.schema import Recipe
from extensions.tasks import TASKS


def cross_field_errors(recipe: Recipe) -> list[str]:
    """Keys that are each allowed but do not go together; one sentence each, naming the keys."""
    errors = []
    ppo, rollout, names = recipe.ppo, recipe.rollout, [task.name for task in recipe.data.tasks]
    key = {"ppo": "optimizer.name", "sft": "sft.optimizer"}.get(recipe.method)
    if key and recipe.trained_with.name == "adafactor" and recipe.deepspeed.zero_stage > 0:
        errors.append(
            f"deepspeed.zero_stage: {recipe.deepspeed.zero_stage} does not go with {key}: adafactor. ZeRO "
            "flattens parameters into partitions, so Adafactor loses its row and column factors and silently becomes "
            f"another optimizer. Use zero_stage: 0 (LoRA state is tiny), or {key}: adamw"
        )
    if recipe.deepspeed.offload and recipe.deepspeed.zero_stage == 0:
        errors.append("deepspeed.offload: true needs deepspeed.zero_stage: 1, 2 or 3; at stage 0 nothing is offloaded")
    if rollout.min_new_tokens > rollout.max_new_tokens:
        errors.append(
            f"rollout.response_budget: {rollout.response_budget}: the low end comes first and is at most the high end"
        )
    if ppo.mini_batch_size is not None and ppo.batch_size % ppo.mini_batch_size:
        errors.append(f"ppo.mini_batch_size: {ppo.mini_batch_size} does not divide ppo.batch_size: {ppo.batch_size}")
    if recipe.evaluation.patience and not recipe.evaluation.every_steps:
        errors.append("evaluation.patience needs evaluation.every_steps: without validations nothing can stop early")
    if recipe.backend == "ray" and recipe.method != "ppo":
        errors.append(f"backend: ray trains by PPO alone; leave backend out for method: {recipe.method}")
    if rollout.backend == "vllm" and recipe.backend == "deepspeed":
        if ppo.old_logprobs == "sampled":
            errors.append(
                "ppo.old_logprobs: sampled does not go with rollout.backend: vllm, whose logprobs are rounded "
                "otherwise than the trainer's and which knows no values; use auto"
            )
        if recipe.vllm.tensor_parallel_size > 1:
            errors.append(
                f"vllm.tensor_parallel_size: {recipe.vllm.tensor_parallel_size} needs backend: ray; under DeepSpeed "
                "each rank has an engine of its own"
            )
    errors += _of_labels(recipe)
    if recipe.prompt.template_options and not recipe.prompt.chat_template:
        errors.append("prompt.template_options needs prompt.chat_template: true; the plain form has no template")
    for name in sorted({name for name in names if names.count(name) > 1}):
        errors.append(f"data.tasks: {name!r} is named twice")
    for name in recipe.encoder.intermediate_for:
        if name not in TASKS and name not in names:
            errors.append(f"encoder.intermediate_for: {name!r} is neither a built-in task nor one of data.tasks")
    return errors


def _of_labels(recipe: Recipe) -> list[str]:
    """What does not fit the labels of the tasks."""
    errors, data = [], recipe.data
    used = ["data.oversample: true"] * data.oversample
    used += [f"data.class_weights: {data.class_weights}"] * (data.class_weights != "none")
    if len(used) == 2:
        errors.append(f"{used[0]} and {used[1]} would balance the labels twice; use one of them")
    for key in used:
        if recipe.method == "encoder":
            errors.append(f"{key} is of method sft and ppo; an encoder does not take it: leave it out")
        for task in data.tasks:
            if task.kind != "classification":
                errors.append(
                    f"{key}: {task.name} is a {task.kind} task, whose rows have no classes to balance; leave the key "
                    "out, or the task"
                )
    if recipe.method == "encoder":
        errors += [
            f"data.tasks: {task.name} has several labels a row, which an encoder here does not learn; use ppo or sft"
            for task in (*data.tasks, *filter(None, [recipe.encoder.intermediate]))
            if task.multi_label
        ]
    return errors
