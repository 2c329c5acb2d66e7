"""What `nlu init` prints: decisions with reasons, labels, prompts, warnings, and the commands that come next."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import torch

from extensions.data import spread
from extensions.errors import UserError
from extensions.plan import GPUS, Options, Planner
from extensions.recipe import Recipe
from extensions.scaffold.init import Draft

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
SHOWN = 3  # prompts
_ENDS = 700, 500  # characters of a prompt's beginning and end that are shown
START_S = 20.0  # of a run: imports, loading, the comparison of the model's paths
FORWARD = 0.5  # share of a training step that a forward alone takes: its backward computes no weights' gradients


def summary(made: Draft) -> list[str]:
    """Everything that was decided, in lines."""
    recipe, found = made.recipe, made.answers
    lines = [f"- {decision}" for decision in made.decisions]
    if found.score_range:
        low, high = found.score_range
        lines.append(f"scores: from {low:g} to {high:g}, with {found.decimals} decimals")
    elif found.counts:
        total = sum(found.counts.values())
        lines.append("labels, and the word that the model writes for each:")
        lines += [
            f"  {label!r}: {made.words[label]!r}, {count} rows ({count / total:.1%})"
            for label, count in found.counts.items()
        ]
    for number, row in enumerate(spread(made.data.train, SHOWN), start=1):
        _, text = made.encoder.encode(row.task, row.fields)
        answer = row.task.answer(row.label) if isinstance(row.label, str) and not found.separator else row.label
        lines += [f"prompt {number} of {len(made.data.train)} training rows; the right answer is {answer!r}:"]
        lines += [f"    {line}" for line in _without_middle(text).splitlines()]
    lines += [f"warning: {warning}" for warning in made.warnings]
    lines.append(f"{made.path}: written; {recipe.model.path}, {made.data.describe()}. Next:")
    return lines + _commands(made)


def _without_middle(text: str) -> str:
    start, end = _ENDS
    left_out = len(text) - start - end
    return text if left_out <= 0 else f"{text[:start]} [... {left_out} characters ...] {text[-end:]}"


def _commands(made: Draft) -> list[str]:
    recipe = made.recipe
    path, adapter = shlex.quote(str(made.path)), f"model.adapter=runs/{recipe.name}-sft/adapter"
    sft, ppo = (_relative(LAUNCH / f"{method}.sh") for method in ("sft", "ppo"))
    seconds = {method: expected_seconds(made, method) for method in ("sft", "ppo")}
    return [
        f"  bash {sft} {path}{_about(seconds['sft'])}",
        "      first, since the model does not know the form of the answers: PPO from scratch earns nothing but wrong "
        "formats",
        f"  nlu predict runs/{recipe.name}-sft new.csv --out answers.csv",
        f"  bash {ppo} {path} {adapter}{_about(seconds['ppo'])}",
        f"  nlu predict runs/{recipe.name} new.csv --out answers.csv",
    ]


def _relative(path: Path) -> str:
    try:
        return shlex.quote(path.relative_to(Path.cwd().resolve()).as_posix())
    except ValueError:
        return shlex.quote(os.fspath(path))


def _about(seconds: float | None) -> str:
    if seconds is None:
        return "   # nlu plan RECIPE says how long, for a GPU that it knows"
    if seconds < 5400:
        return f"   # about {max(1, round(seconds / 60))} minutes on this machine"
    return f"   # about {seconds / 3600:.1f} hours on this machine"


def expected_seconds(made: Draft, method: str) -> float | None:
    """Of a whole run here: steps as the planner expects them, evaluations by their forwards; None: not known."""
    options = _this_device(made.on_gpu)
    if options is None:
        return None
    recipe = Recipe.model_validate(made.recipe.model_dump() | {"method": method})
    try:
        plan = Planner(recipe, options).plan(1)
        sft = (
            plan
            if method == "sft"
            else Planner(Recipe.model_validate(recipe.model_dump() | {"method": "sft"}), options).plan(1)
        )
    except UserError:  # a family that the planner cannot count: the run itself is not affected
        return None
    validations = plan.steps // recipe.evaluation.every_steps
    rows = 2 * len(made.data.table) + validations * min(
        recipe.evaluation.validation_samples or len(made.data.table), len(made.data.table)
    )
    return START_S + plan.steps * plan.chosen.step_s + rows * FORWARD * sft.chosen.step_s / sft.batch_size


def _this_device(on_gpu: bool) -> Options | None:
    """The planner's options for this machine; None for a GPU that it does not know."""
    if not on_gpu:
        return Options(cpu=True, measure=True)
    name = torch.cuda.get_device_name(0).lower().replace(" ", "")
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    known = [key for key in GPUS if key.split("-")[0] in name]
    return Options(gpu=known[-1], gpu_memory=memory) if known else None
