"""The model card of an adapter: training, scores, and code that answers a row with it (`model_card.md.j2`)."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from extensions.evaluation.likelihood import candidates
from extensions.prompts import CLOSE, PromptEncoder, prompt_text, surface_forms
from extensions.recipe import Recipe, adapter_name
from extensions.reporting.scores import (
    NO_VALUE,
    cell_text,
    change_text,
    has_likelihood,
    interval_text,
    metric_text,
    percent,
    shown_metrics,
)
from extensions.tasks import Task

# Hub names of the metrics that have another name there.
HUB_METRICS = {
    "matthews": "matthews_correlation",
    "pearson": "pearsonr",
    "spearman": "spearmanr",
    "r2": "r_squared",
    "squad_em": "exact_match",
    "subset_accuracy": "accuracy",
} | dict.fromkeys(("f1_macro", "f1_micro", "f1a", "squad_f1"), "f1")
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # values of vLLM's --max-lora-rank
FIRST_MARK = 0xE000  # private use area: characters that no prompt contains, as placeholders for the fields


def model_card(
    recipe: Recipe,
    scores: Mapping[str, Any],
    adapters: int = 1,
    encoder: PromptEncoder | None = None,
    label_sets: Mapping[str, Sequence[str]] | None = None,
) -> ModelCard:
    """The card that is saved with the adapter.

    Args:
        recipe: of the training; the card lists its tasks.
        scores: the content of eval.json; "before" may be missing.
        adapters: number of adapters that the card describes; more than one: one per task.
        encoder: of the run. None: a prompt that needs the tokenizer (chat template, demonstrations) is not shown.
        label_sets: multi-label task -> label sets of its training rows.
    """
    task, base = recipe.data.tasks[0], recipe.model.path
    answers = candidates(task, (label_sets or {}).get(task.name, ())).forms
    data = ModelCardData(
        library_name="peft",
        base_model=None if base.startswith("pip:") or os.path.exists(base) else base,
        tags=["lora", recipe.method, "text-classification"],
        model_name=recipe.name,
        eval_results=_eval_results(recipe.data.tasks, scores),
    )
    text = _template().render(
        card_data=data.to_yaml(),
        recipe=recipe,
        scores=scores,
        rows=_score_rows(recipe.data.tasks, scores),
        by_likelihood=has_likelihood(scores["after"]),
        adapters=adapters,
        task=task,
        prompt=_prompt_parts(recipe, encoder, task),
        answers=answers,
        forms=_forms(encoder, task, next(iter(answers.values()))[0]),
        max_prompt_tokens=None if encoder is None else encoder.max_tokens,
        max_tokens=_answer_budget(recipe, encoder, task, answers),
        lora_rank=next((rank for rank in VLLM_RANKS if rank >= recipe.lora.rank), recipe.lora.rank),
        close=CLOSE,
    )
    return ModelCard(text)


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(  # nosec B701 # Markdown, no HTML
        trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"repr": repr, "quote": shlex.quote, "change_text": change_text}
    environment.globals |= {"fenced": _fenced, "adapter_name": adapter_name}
    return environment.from_string(files(__package__).joinpath("model_card.md.j2").read_text(encoding="utf-8"))


def _fenced(language: str, caller: Callable[[], str]) -> str:
    """A Markdown code block, with a fence longer than any run of backticks in the code."""
    code = caller().rstrip("\n")
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", code)), 0)
    return f"{fence}{language}\n{code}\n{fence}\n"


def _score_rows(tasks: Sequence[Task], scores: Mapping[str, Any]) -> list[list[str]]:
    rows, by_likelihood = [], has_likelihood(scores["after"])
    for task in [task for task in tasks if task.name in scores["after"]]:
        new, old = scores["after"][task.name], (scores.get("before") or {}).get(task.name, {})
        other = (new.get("likelihood") or {}).get("metrics", {})
        for metric in shown_metrics(task, new):
            value = new["metrics"][metric]
            numbers = (
                metric_text(metric, old.get("metrics", {}).get(metric)),
                interval_text(metric, value, new["intervals"][metric]),
                *([metric_text(metric, other.get(metric))] if by_likelihood else []),
                NO_VALUE if task.is_ranked else f"{percent(new['format_error_rate'])}%",
                str(new["samples"]),
            )
            rows.append([cell_text(task.display_name), metric, *numbers])
    return rows


def _eval_results(tasks: Sequence[Task], scores: Mapping[str, Any]) -> list[EvalResult]:
    """The card's `model-index`, as fractions."""
    return [
        EvalResult(
            task_type="text-classification",
            dataset_type=task.source.hub.repo if task.source.hub else task.name,
            dataset_name=task.display_name,
            dataset_config=task.source.hub.config if task.source.hub else None,
            dataset_split=scores.get("splits", {}).get(task.name, scores["split"]),
            metric_type=HUB_METRICS.get(metric, metric),
            metric_name=metric,
            metric_value=scores["after"][task.name]["metrics"][metric],
        )
        for task in tasks
        if task.name in scores["after"]
        for metric in shown_metrics(task, scores["after"][task.name])
    ]


def _prompt_parts(recipe: Recipe, encoder: PromptEncoder | None, task: Task) -> dict[str, Any] | None:
    """The parts from which the card's code builds a prompt; None if that needs the tokenizer and there is no encoder.

    Returns:
        parts: the text around the fields, each a list of lines. columns: between the parts. row: an example.
    """
    fields = {field: chr(FIRST_MARK + k) for k, field in enumerate(task.fields)}
    if encoder is not None:
        text = encoder.text(task, fields, list(encoder.demonstrations.get(task.name, ()))[: encoder.shots])
    elif recipe.prompt.chat_template or recipe.prompt.shots:
        return None
    else:
        text = prompt_text(task, fields)
    columns = {mark: task.text_columns[field] for field, mark in fields.items()}
    pieces = re.split(f"([{''.join(columns)}])", text)
    return {
        "parts": [piece.splitlines(keepends=True) or [""] for piece in pieces[::2]],
        "columns": [columns[mark] for mark in pieces[1::2]],
        "row": {column: f"your {column}" for column in task.text_columns.values()},
    }


def _forms(encoder: PromptEncoder | None, task: Task, answer: str) -> list[str]:
    """The surface forms of `{}` that the tokenizer tells apart, tried on an answer."""
    forms = surface_forms("{}")
    if encoder is None:
        return list(forms)
    ids, text = encoder.encode(task, dict.fromkeys(task.fields, "a"))
    found: dict[tuple[int, ...], str] = {}
    for form, tokens in zip(forms, encoder.surface_ids(ids, text, answer), strict=True):
        found.setdefault(tuple(tokens), form)
    return list(found.values())


def _answer_budget(
    recipe: Recipe, encoder: PromptEncoder | None, task: Task, answers: Mapping[str, Iterable[str]]
) -> int:
    """Tokens of the longest answer with its closing tag, at least the recipe's budget."""
    budget = recipe.rollout.max_new_tokens
    if encoder is None:
        return budget
    ids, text = encoder.encode(task, dict.fromkeys(task.fields, "a"))
    found = [encoder.surface_ids(ids, text, word) for words in answers.values() for word in words]
    return max(budget, *(len(tokens) for forms in found for tokens in forms))
