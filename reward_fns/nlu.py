"""The paper's rule-based reward (section 4.3), for every task that declares its answers.

`label` is the string of `extensions.prompts.pack_label`: it holds the task and the gold label.
The same file works in OpenRLHF unchanged: `openrlhf.cli.train_ppo_ray --reward.remote_url reward_fns/nlu.py`.
"""

from __future__ import annotations

from typing import Any

from extensions.prompts import parse_answer, response_text, unpack_label
from extensions.tasks import Task


def score(answer: str | float | None, gold: str, task: Task) -> float:
    """Classification: 1 right, 0 wrong, -1 wrong format. Regression: 2.5 - |answer - gold|, -2.5 wrong format.

    The 2.5 is half the width of STS-B's range; other ranges use half their width. Several labels per row: the Jaccard
    index of the two label sets (1 if both are empty), -1 wrong format.
    """
    if task.multi_label and answer is not None:
        found, wanted = set(task.split_labels(str(answer))), set(task.split_labels(gold))
        return len(found & wanted) / len(found | wanted) if found | wanted else 1.0
    if task.score_range is None:
        return -1.0 if answer is None else float(answer == gold)
    half = (task.score_range[1] - task.score_range[0]) / 2
    return -half if answer is None else half - abs(float(answer) - float(gold))


def reward(text: str, label: str) -> float:
    """Reward of a response. Never raises on any `text`; ValueError if `label` was not made by `pack_label`."""
    task, gold = unpack_label(label)
    return score(parse_answer(text, task), gold, task)


def reward_func(queries: list[str], prompts: list[str], labels: list[str]) -> dict[str, Any]:
    """OpenRLHF's contract: rewards and scores as float tensors of shape (n,), and what to log.

    `scores` is 1 for a right answer, so that OpenRLHF's own logs show accuracy; `queries` hold prompt and response.
    """
    import torch

    answers, rewards, right = [], [], []
    for query, prompt, label in zip(queries, prompts, labels, strict=True):
        task, gold = unpack_label(label)
        answers.append(parse_answer(response_text(query, prompt), task))
        rewards.append(score(answers[-1], gold, task))
        right.append(rewards[-1] / score(float(gold) if task.is_regression else gold, gold, task))
    wrong_format = torch.tensor([answer is None for answer in answers], dtype=torch.float32)
    return {
        "rewards": torch.tensor(rewards, dtype=torch.float32),
        "scores": torch.tensor(right, dtype=torch.float32).clamp(min=0),
        "extra_logs": {"format_error_rate": wrong_format},
    }
