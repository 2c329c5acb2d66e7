"""Records of the samples of a batch: lines of rollouts.jsonl, the batch of a failed step, and the metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from extensions.data import Example
from extensions.evaluation.metrics import WRONG_FORMAT, shares
from extensions.prefix.tree import Sample
from extensions.tasks import Task

SHOWN_LABELS = 6  # labels whose shares the console has


def rollout_record(
    example: Example,
    prompt: str,
    response: str,
    answer: str | float | None,
    reward: float,
    kl: float,
    num_tokens: int,
) -> dict[str, Any]:
    """A line of rollouts.jsonl; the metrics of the batch are computed from these."""
    return {
        "task": example.task.name,
        "index": example.index,
        "prompt": prompt,
        "response": response,
        "answer": answer,
        "gold": example.label,
        "reward": reward,
        "kl": kl,
        "tokens": num_tokens,
    }


def debug_record(example: Example, prompt: str, response: str, sample: Sample) -> dict[str, Any]:
    """A sample of a failed batch, for `nlu replay`."""
    return {
        "task": example.task.name,
        "index": example.index,
        "gold": example.label,
        "prompt": prompt,
        "response": response,
        "prompt_ids": list(sample.prompt),
        "response_ids": list(sample.response),
    }


def batch_metrics(records: Sequence[dict[str, Any]], tasks: Mapping[str, Task]) -> dict[str, Any]:
    """Rewards, format errors, accuracy and label shares of a batch; accuracy is over the classification samples."""
    rewards = np.array([r["reward"] for r in records], np.float32)
    present = sorted({r["task"] for r in records})
    classified = [r for r in records if not tasks[r["task"]].is_regression]
    predicted: dict[str, float] = {}
    for name in present:
        answers = [r["answer"] for r in classified if r["task"] == name]
        if answers:
            prefix = f"{name}: " if len(tasks) > 1 else ""
            predicted |= {f"{prefix}{word}": share for word, share in shares(tasks[name], answers).items()}
    return {
        "reward_mean": float(rewards.mean()),
        "reward_std": float(rewards.std()),
        "reward_by_task": {name: float(rewards[[r["task"] == name for r in records]].mean()) for name in present},
        "format_error_rate": sum(r["answer"] is None for r in records) / len(records),
        "accuracy": sum(r["answer"] == r["gold"] for r in classified) / len(classified) if classified else None,
        "predicted_shares": predicted,
    }


def summary_lines(metrics: dict[str, Any]) -> tuple[str, str]:
    """Reward, accuracy and format errors of one iteration; then KL, throughput and the answers' shares."""
    kl = "-" if metrics["kl"] is None else f"{metrics['kl']:.2f}"
    accuracy = "" if metrics["accuracy"] is None else f"acc {metrics['accuracy']:.2f}  "
    line = f"reward {metrics['reward_mean']:+.2f}  {accuracy}wrong format {metrics['format_error_rate']:.0%}"
    equal = metrics.get("equal_groups")
    groups = "" if equal is None else f"equal groups {equal:.0%}  "
    rate = f"{metrics['samples_per_s']:.1f} samples/s"
    if "packed_tokens" in metrics:
        packed, logical = (
            metrics[name] / sum(metrics["seconds"].values()) for name in ("packed_tokens", "logical_tokens")
        )
        rate += f" ({packed:.0f} packed tokens/s, {logical:.0f} logical)"
    details = f"kl {kl}  {groups}{rate}  {shares_text(metrics['predicted_shares'])}"
    return line, details.rstrip()


def shares_text(found: Mapping[str, float]) -> str:
    """Shares of the most frequent answers, without the wrong formats; long labels are shortened."""
    answers = {word: share for word, share in found.items() if not word.endswith(WRONG_FORMAT)}
    top = sorted(answers, key=lambda word: -answers[word])[:SHOWN_LABELS]
    words = [f"{word if len(word) <= 24 else f'{word[:23]}…'} {answers[word]:.0%}" for word in answers if word in top]
    return ", ".join(words) + (f" and {len(answers) - len(top)} more" if len(answers) > len(top) else "")
