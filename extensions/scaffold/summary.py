"""Output of `nlu init`: decisions with reasons, labels, prompts, warnings, and the next commands."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

import torch

from extensions.common.errors import UserError
from extensions.data import subsample_evenly
from extensions.planner import GPUS, Planner, PlanOptions
from extensions.recipe import RunSchedule
from extensions.scaffold.draft import Draft
from extensions.scaffold.entry import relative_path
from extensions.scaffold.recipe_text import comment

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
NUM_PROMPTS = 3
_ENDS = 700, 500  # printed characters of a prompt's beginning and end
START_S = 20.0  # of a run: imports, loading, the comparison of the model's paths
FORWARD_SHARE = 0.5  # of a training step: the backward computes no gradients of frozen weights


def summary(made: Draft) -> list[str]:
    """The lines to print."""
    recipe, target = made.recipe, made.entry.target
    lines = [f"- {comment(decision)}" for decision in made.decisions]
    if target.score_range:
        low, high = target.score_range
        lines.append(f"scores: from {low:.15g} to {high:.15g}, with {target.decimals} decimals")
    elif target.counts:
        total = sum(target.counts.values())
        lines.append("labels, and the word that the model writes for each:")
        lines += [
            f"  {label!r}: {made.entry.words[label]!r}, {count} rows ({count / total:.1%})"
            for label, count in target.counts.items()
        ]
    for number, row in enumerate(subsample_evenly(made.data.train, NUM_PROMPTS), start=1):
        _, text = made.encoder.encode(row.task, row.fields)
        answer = row.task.answer(row.label) if isinstance(row.label, str) and not target.separator else row.label
        lines += [f"prompt {number} of {len(made.data.train)} training rows; the right answer is {answer!r}:"]
        lines += [f"    {line}" for line in _without_middle(text).splitlines()]
    lines += [f"warning: {comment(warning)}" for warning in made.warnings]
    lines.append(f"{made.entry.path}: written; {recipe.model.path}, {made.data.describe()}. Next:")
    return lines + _commands(made)


def _without_middle(text: str) -> str:
    start, end = _ENDS
    left_out = len(text) - start - end
    return text if left_out <= 0 else f"{text[:start]} [... {left_out} characters ...] {text[-end:]}"


def _commands(made: Draft) -> list[str]:
    recipe = made.recipe
    path, adapter = shlex.quote(str(made.entry.path)), f"model.adapter=runs/{recipe.name}-sft/adapter"
    sft, ppo = (shlex.quote(relative_path(LAUNCH / f"{method}.sh")) for method in ("sft", "ppo"))
    seconds = expected_seconds(made)
    return [
        f"  bash {sft} {path}{_about(seconds.get('sft'))}",
        "      first, since the model does not know the answer format: PPO from scratch finds it only by chance",
        f"  nlu predict runs/{recipe.name}-sft new.csv --out answers.csv",
        f"  bash {ppo} {path} {adapter}{_about(seconds.get('ppo'))}",
        "      optional: PPO after SFT gains on some tasks and loses on others; keep the run with the better scores",
        f"  nlu predict runs/{recipe.name} new.csv --out answers.csv",
    ]


def _about(seconds: float | None) -> str:
    if seconds is None:
        return "   # nlu plan RECIPE estimates the time on a known GPU"
    if seconds < 5400:
        minutes = max(1, round(seconds / 60))
        return f"   # about {minutes} minute{'s' if minutes > 1 else ''} on this machine"
    return f"   # about {seconds / 3600:.1f} hours on this machine"


def expected_seconds(made: Draft) -> dict[str, float]:
    """Method -> seconds of a whole run on this machine: the planner's step times, and the forwards of evaluations.

    Empty if the planner does not know the device or the model family.
    """
    device = _this_device(made.on_gpu)
    if device is None:
        return {}
    # Sizes and token counts are given, so that the planner reads neither rows nor tokenizer.
    task = made.recipe.data.tasks[0]
    source = task.source.model_copy(update={"sizes": {"train": len(made.data.train)}})
    data = made.recipe.data.model_copy(update={"tasks": [task.model_copy(update={"source": source})]})
    prefix, suffix, answer = made.tokens
    seconds: dict[str, float] = {}
    evaluation = 0.0  # per row
    for method in ("sft", "ppo"):
        recipe = made.recipe.model_copy(update={"method": method, "data": data})
        budget = answer if method == "sft" else recipe.rollout.max_new_tokens
        options = replace(device, prefix_tokens=prefix, suffix_tokens=suffix, response_tokens=budget)
        try:
            plan = Planner(recipe, options).plan(1)
        except UserError:  # a family whose FLOPs cannot be counted without weights
            return {}
        step = plan.chosen.step_s
        evaluation = evaluation or FORWARD_SHARE * step / plan.batch_size
        validations = len(RunSchedule(recipe, plan.rows).validations)
        rows = 2 * len(made.data.table) + validations * len(made.data.validation)
        seconds[method] = START_S + plan.steps * step + rows * evaluation
        if device.measure:  # once is enough
            device = replace(device, measure=False, rate=plan.device.tflops, bandwidth=plan.device.bandwidth)
    return seconds


def _this_device(on_gpu: bool) -> PlanOptions | None:
    """The planner's options for this machine; None for an unknown GPU."""
    if not on_gpu:
        return PlanOptions(cpu=True, measure=True)
    name = torch.cuda.get_device_name(0).lower().replace(" ", "")
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    known = [key for key in GPUS if key.split("-")[0] in name]
    return PlanOptions(gpu=known[-1], gpu_memory=memory) if known else None
