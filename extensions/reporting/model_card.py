"""The model card of an adapter."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from extensions.prompts import PromptEncoder
from extensions.recipe import Recipe, adapter_name
from extensions.reporting.scores import cell_text, interval_text, metric_text, percent
from extensions.reporting.usage import usage
from extensions.tasks import Task

CARD = """---
{{ card_data }}
---

# {{ name }}

{{ what }} for `{{ base }}`, trained by {{ method }} on {{ tasks }}{{ start }}
(method: *Improving the Language Understanding Capabilities of Large Language Models Using Reinforcement Learning*).

{{ samples }} samples in {{ steps }} {{ step }}, {{ minutes }} minutes. Evaluated on the {{ split }} split by
{{ decoding }}; in percent (mae, rmse and r2 as they are), with 95% bootstrap intervals.

| task | metric | before | after | wrong format after | rows |
|---|---|---|---|---|---|
{% for row in rows -%}
| {{ row | join(" | ") }} |
{% endfor %}
## Use

{{ usage }}

A prompt is the four-part form of the training (see `recipe.yaml` and `nlu preview`); it ends with `<Judgement>`, and
the answer is what stands before `</Judgement>`.

## Limits

The adapter knows the tasks above in this one prompt form. It was optimised for {{ objective }}, and its answers carry
the biases of the base model and of the data. The label shares in `eval.json` show whether it prefers a class.
"""
METHODS = {"ppo": "PPO with a rule-based reward", "sft": "supervised fine-tuning on prompts and gold answers"}
# The hub's names of metrics, where they differ from ours.
HUB_METRICS = {"matthews": "matthews_correlation", "pearson": "pearsonr", "spearman": "spearmanr", "f1_macro": "f1"}
HUB_METRICS |= {"f1a": "f1", "squad_f1": "f1", "squad_em": "exact_match", "f1_micro": "f1", "r2": "r_squared"}
HUB_METRICS |= {"subset_accuracy": "accuracy"}


def model_card(
    recipe: Recipe,
    scores: dict[str, Any],
    split: str,
    samples: int,
    steps: int,
    seconds: float,
    adapters: int = 1,
    encoder: PromptEncoder | None = None,
    seen: Mapping[str, Sequence[str]] | None = None,
) -> ModelCard:
    """The card that stands beside the adapter.

    Args:
        recipe: of the training; its tasks are those of the card.
        scores: `eval.json`: "after", and "before" where the base was evaluated too.
        split: of these.
        samples: that the training saw, in `steps` iterations and `seconds`.
        adapters: that the card is for; more than one: one for each task.
        encoder: of the run, and `seen` its label sets: see `usage`.
    """
    path, adapter = recipe.model.path, recipe.model.adapter
    on_hub = path if not path.startswith("pip:") and not os.path.exists(path) else None
    data = ModelCardData(
        library_name="peft",
        base_model=on_hub,
        tags=["lora", recipe.method, "text-classification"],
        model_name=recipe.name,
        eval_results=_eval_results(recipe.data.tasks, scores, split),
    )
    return ModelCard.from_template(
        data,
        template_str=CARD,
        name=recipe.name,
        what="A LoRA adapter" if adapters == 1 else f"{adapters} LoRA adapters, one a task,",
        base=path,
        method=METHODS[recipe.method],
        start="" if adapter is None else f", started from the adapter `{adapter_name(adapter)}`",
        tasks=", ".join(task.display_name for task in recipe.data.tasks),
        samples=samples,
        steps=steps,
        step="iterations" if recipe.method == "ppo" else "optimizer steps",
        minutes=f"{seconds / 60:.1f}",
        split=split,
        decoding=_decoding(recipe),
        rows=_card_rows(recipe.data.tasks, scores),
        usage=usage(recipe, encoder, seen or {}),
        objective=f"the reward named in the recipe (`{recipe.reward}`)" if recipe.method == "ppo" else "gold answers",
    )


def _decoding(recipe: Recipe) -> str:
    return {
        "sample": f"sampling one answer at temperature {recipe.rollout.temperature}",
        "greedy": "greedy decoding",
        "likelihood": "taking the most probable of the task's answers",
    }[recipe.evaluation.decoding]


def _card_rows(tasks: Sequence[Task], scores: dict[str, Any]) -> list[list[str]]:
    rows = []
    for task in [task for task in tasks if task.name in scores["after"]]:
        new, old = scores["after"][task.name], (scores.get("before") or {}).get(task.name, {})
        for metric, value in new["metrics"].items():
            numbers = (
                metric_text(metric, old.get("metrics", {}).get(metric)),
                interval_text(metric, value, new["intervals"][metric]),
                f"{percent(new['format_error_rate'])}%",
                str(new["samples"]),
            )
            rows.append([cell_text(task.display_name), metric, *numbers])
    return rows


def _eval_results(tasks: Sequence[Task], scores: dict[str, Any], split: str) -> list[EvalResult]:
    """The card's `model-index`, as fractions."""
    return [
        EvalResult(
            task_type="text-classification",
            dataset_type=task.source.hub.repo if task.source.hub else task.name,
            dataset_name=task.display_name,
            dataset_config=task.source.hub.config if task.source.hub else None,
            dataset_split=scores.get("splits", {}).get(task.name, split),
            metric_type=HUB_METRICS.get(metric, metric),
            metric_name=metric,
            metric_value=value,
        )
        for task in tasks
        if task.name in scores["after"]
        for metric, value in scores["after"][task.name]["metrics"].items()
    ]
