"""No response budget that PPO draws cuts a right answer that fits the high end."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from extensions.data import Example
from extensions.planner.tokens import TaskTokens, typical_batch
from extensions.prompts import PromptEncoder
from extensions.recipe import Recipe
from extensions.rollout.sampler import Response
from extensions.runs.build import response_budgets
from extensions.training.ppo import PpoTrainer

SOURCE = {"files": {"train": "rows.csv"}}
KINDS = {  # keys of the task, label sets of its rows, tokens of its longest right answer
    "labels": ({"labels": {"a": ["x" * 17, "y" * 30], "b": ["x" * 4]}}, [], 17),  # the prompt asks for the first word
    "score": ({"score_range": [0, 5], "score_decimals": 4}, [], 6),
    "score by the grid": ({"score_range": [1, 2]}, [], 3),
    "label sets": ({"labels": ["a" * 8, "b" * 8, "c" * 8], "multi_label": True}, [f"{'a' * 8}, {'b' * 8}"], 18),
    "label sets unknown": ({"labels": ["a" * 8, "b" * 8], "multi_label": True}, [], 18),
    "ranked": ({"labels": {"0": ["No"], "1": ["Yes"]}, "positive": "1", "metrics": ["squad_f1"], "group_by": ["q"],
                "source": SOURCE | {"keep": {"q": "q", "entity": "e", "answers": "a"}}}, [], 3),
}  # fmt: skip


class Letters(PromptEncoder):
    """A token per letter, and none for the tag."""

    def __init__(self):
        self.max_tokens = 10**6

    def label_ids(self, task, labels=None):
        return {label: list(task.answer(label)) for label in labels or task.sample_labels}

    def encode(self, task, fields):
        return [1, 2], "text"


def recipe_of(keys, low, high, **more):
    task = {"name": "own", "description": "-", "question": "{text}", "source": SOURCE} | keys
    given = {"data": {"tasks": [task]}, "rollout": {"response_budget": [low, high]}, "model": {"path": "x"}}
    return Recipe.model_validate({"name": "trial"} | given | more)


def budget_of(recipe, label_sets=()):
    warnings = []
    return response_budgets(recipe, Letters(), {"own": label_sets}, warnings.append)["own"], warnings


@pytest.mark.parametrize(("keys", "label_sets", "longest"), KINDS.values(), ids=KINDS)
def test_the_low_end_holds_the_longest_right_answer(keys, label_sets, longest):
    assert budget_of(recipe_of(keys, longest, 32), label_sets) == ((longest, 32), [])
    budget, (said,) = budget_of(recipe_of(keys, longest - 1, 32), label_sets)
    assert budget == (longest, 32)
    assert said.startswith("own: the answer '") and f"are {longest} tokens, more than the low end" in said
    assert f"raised from {longest - 1} to {longest} for this task" in said


def test_answers_beyond_the_high_end_are_reported_and_the_others_still_fit():
    keys = {"labels": ["x" * 40, "y" * 20]}
    budget, warnings = budget_of(recipe_of(keys, 12, 32))
    assert budget == (20, 32) and len(warnings) == 2
    assert "are 40 tokens, more than the high end 32" in warnings[0] and "from 12 to 20" in warnings[1]
    assert budget_of(recipe_of(keys, 12, 16))[0] == (12, 16)
    by_likelihood = recipe_of(keys, 12, 40, evaluation={"decoding": "likelihood"})
    assert len(budget_of(by_likelihood)[1]) == 1, "rollouts are sampled all the same"


@pytest.mark.parametrize("method", ["sft", "eval"])
def test_only_ppo_draws_budgets(method):
    assert budget_of(recipe_of({"labels": ["x" * 17, "y"]}, 12, 32, method=method))[1] == []


def test_rollouts_and_the_planner_use_the_budget_of_the_rows_task():
    """With the paper's 12 to 32, draws below 17 would cut 24% of the right answers of 17 tokens."""
    recipe = recipe_of({"labels": ["x" * 17, "y"]}, 12, 32)
    (task,), asked = recipe.data.tasks, []

    def sample(requests):
        asked.extend(requests)
        return [Response([1], torch.zeros(1), torch.zeros(1), "") for _ in requests]

    trainer = SimpleNamespace(
        encoder=Letters(),
        ppo=SimpleNamespace(samples_per_prompt=1),
        order=SimpleNamespace(weight=lambda example: 1.0),
        seed=0,
        budgets=response_budgets(recipe, Letters(), {}, [].append) | {"short": (12, 32)},
        strategy=SimpleNamespace(world_size=1, rank=0),
        sampler=SimpleNamespace(session=torch.no_grad, sample=sample),
        policy=SimpleNamespace(device="cpu"),
    )
    for name, low in (("own", 17), ("short", 12)):
        asked.clear()
        examples = [Example(task.model_copy(update={"name": name}), i, {"text": ""}, "y") for i in range(500)]
        PpoTrainer.sample(trainer, examples, 0, range(500))
        assert {request.budget for request in asked} == set(range(low, 33))
    planned = typical_batch([TaskTokens("own", 500, 2, [1], [1], [17, 1, 40])], 160, (12, 32))
    assert np.unique([row.response for row in planned]).tolist() == list(range(17, 33))
