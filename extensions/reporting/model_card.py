"""What people look at after a run: the before/after table and the model card."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from rich.markup import escape
from rich.table import Table

from extensions.evaluation.metrics import suite_average
from extensions.prompts import PromptEncoder
from extensions.recipe import Recipe, adapter_name
from extensions.reporting.tables import NOT_IN_PERCENT, cell_text, interval_text, metric_text, percent
from extensions.reporting.usage import usage
from extensions.tasks import SUITES, Task


def before_after_table(
    tasks: Sequence[Task], before: dict[str, Any] | None, after: dict[str, Any], split: str
) -> Table:
    """One row a task and metric, with format errors and predicted against gold label shares.

    In percent; mae, rmse and r2 as they are.

    Args:
        before: scores before training; None where there are none, and no column of them.
    """
    names = ["before", "after"] if before is not None else ["score"]
    plain = sorted({m for result in after.values() for m in result["metrics"]} & {*NOT_IN_PERCENT})
    unit = f"%; {', '.join(plain)} as they are" if plain else "%"
    table = Table(title=f"{' and '.join(names).capitalize()}, {split} split ({unit})", title_justify="left")
    for column in ("task", "metric", "majority", *names, "wrong format", "predicted (gold)"):
        table.add_column(column, justify="left" if column in ("task", "metric", "predicted (gold)") else "right")
    for task in [task for task in tasks if task.name in after]:
        new, old = after[task.name], (before or {}).get(task.name)
        for k, (metric, value) in enumerate(new["metrics"].items()):
            interval = new["intervals"][metric]
            ends = ", ".join(f"{end:.2f}" if metric in NOT_IN_PERCENT else f"{100 * end:.0f}" for end in interval)
            wrong = f"{100 * old['format_error_rate']:.1f} → " if old else ""
            gold, shares = new.get("gold_shares", {}), new.get("predicted_shares", {})
            parts = [f"{word} {100 * share:.0f} ({100 * gold.get(word, 0):.0f})" for word, share in shares.items()]
            table.add_row(
                escape(f"{task.display_name} ({new['samples']})") if k == 0 else "",
                metric,
                percent(new["majority"]) if metric in ("accuracy", "subset_accuracy") else "",
                *([metric_text(metric, old["metrics"].get(metric)) if old else "-"] if before is not None else []),
                f"{metric_text(metric, value)} [{ends}]",
                f"{wrong}{100 * new['format_error_rate']:.1f}" if k == 0 else "",
                escape("  ".join(parts)) if k == 0 else "",
            )
    for name, suite in SUITES.items():
        moments = [before, after] if before is not None else [after]
        means = [percent(suite_average(suite, _scores(scores))) for scores in moments]
        if means[-1] != "-":
            table.add_row(f"average, {name}", "", "", *means, "", "")
    return table


def _scores(scores: dict[str, Any]) -> dict[str, float]:
    return {name: result["score"] for name, result in scores.items()}


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
