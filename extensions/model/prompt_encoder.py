"""The prompt encoder of a recipe: its model's tokenizer and context, its prompt form, its demonstrations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from extensions.data.splits import load_demonstrations
from extensions.model.loading import load_tokenizer, prompt_limit
from extensions.prompts import Demonstration, PromptEncoder
from extensions.recipe import Recipe
from extensions.tasks import Task


def recipe_encoder(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    config: Any,
    demonstrations: Mapping[str, Sequence[Demonstration]],
) -> PromptEncoder:
    """The encoder of a recipe's prompts.

    Args:
        config: of the model.
        demonstrations: task name -> what its prompts show.

    Raises:
        UserError: the recipe asks for longer prompts than the model's context holds.
    """
    prompt, limit = recipe.prompt, prompt_limit(recipe, config)
    return PromptEncoder(tokenizer, limit, prompt.chat_template, prompt.shots, demonstrations, prompt.template_options)


def load_recipe_encoder(
    recipe: Recipe, config: Any, tasks: Sequence[Task], warn: Callable[[str], None]
) -> PromptEncoder:
    """The same for some tasks of a recipe whose training rows have not been loaded yet."""
    shots = recipe.prompt.shots
    demonstrations = {task.name: load_demonstrations(recipe, task, [], warn) for task in tasks} if shots else {}
    return recipe_encoder(recipe, load_tokenizer(recipe.model), config, demonstrations)
