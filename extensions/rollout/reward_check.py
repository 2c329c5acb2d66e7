"""A reward, tried before training on gold, wrong and garbage answers to some rows of each label."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from extensions.common.errors import UserError
from extensions.data import Example
from extensions.prompts import written
from extensions.rollout.rewards import Reward
from extensions.tasks import Task

ROWS_PER_LABEL = 3


def check_reward(reward: Reward, examples: Sequence[Example], warn: Callable[[str], None]) -> None:
    """Warn of `reward_faults`, for each task.

    Raises:
        UserError: a fault that makes training impossible.
    """
    by_task: dict[str, list[Example]] = {}
    for example in examples:
        by_task.setdefault(example.task.name, []).append(example)
    for rows in by_task.values():
        for fault, fatal in reward_faults(reward, rows):
            if fatal:
                raise UserError(fault)
            warn(fault)


def reward_faults(reward: Reward, examples: Sequence[Example]) -> Iterator[tuple[str, bool]]:
    """Faults of a reward on the labelled rows of one task.

    Yields:
        (message, whether it makes training impossible): the reward raises or returns no finite number; it is
        constant; or, on all rows tried of a label, gold earns no more than another answer.
    """
    if not examples:
        return
    task, rewards = examples[0].task, set[float]()
    underpaid: dict[str, str] = {}  # label -> a comparison in which gold does not earn more
    by_label = _rows_by_label(examples)
    for label, rows in by_label.items():
        lost = []
        for row in rows:
            texts = [*(trial_response(kind, answer) for kind, answer in trial_answers(task, str(row.label))), ""]
            try:
                values = reward(texts, [""] * len(texts), [row] * len(texts))
            except UserError as error:
                yield f"{error}\n  (task {task.name}, a row with label {label!r})", True
                return
            rewards |= set(values)
            best = next((k for k in range(1, len(texts)) if values[k] >= values[0]), None)
            if best is not None:
                lost.append(f"{texts[best]!r} earns {values[best]:g}, gold {texts[0]!r} {values[0]:g}")
        if len(lost) == len(rows):
            underpaid[label] = lost[0]
    if len(rewards) == 1:
        yield (
            f"reward {reward.path}: it is {rewards.pop():g} for gold, wrong and garbage answers alike (task "
            f"{task.name}), so nothing can be learned from it; try it with nlu preview",
            True,
        )
    elif underpaid:
        shown = "; ".join(f"label {label!r}: {comparison}" for label, comparison in list(underpaid.items())[:3])
        yield (
            f"reward {reward.path}: the gold answer earns no more than a wrong one, or one without its closing tag, "
            f"for {len(underpaid)} of {len(by_label)} labels of task {task.name} ({shown}). The reward receives the "
            "label as it is in the data and the text as the model generates it, with spaces around "
            "the answer and with the tag",
            False,
        )


def trial_answers(task: Task, gold: str) -> list[tuple[str, str]]:
    """(kind, answer): gold first, then each wrong answer, then garbage."""
    right = task.answer(gold)
    if task.score_range is not None:
        low, high = task.score_range
        wrong = [f"{value:g}" for value in (low, (low + high) / 2, high) if value != float(right)]
    else:
        wrong = [task.answer(label) for label in task.sample_labels if label != gold]
    garbage = [("empty", ""), ("garbage", "As an AI language model, I"), ("garbage, unclosed", right)]
    return [("gold", right), *(("wrong", answer) for answer in wrong), *garbage]


def trial_response(kind: str, answer: str) -> str:
    """The response with this answer, as the prompt instructs it; garbage has no closing tag."""
    return answer if kind.startswith("garbage") else written(answer)


def _rows_by_label(examples: Sequence[Example]) -> dict[str, list[Example]]:
    """At most `ROWS_PER_LABEL` examples per label; for a regression, per half of its range of scores."""
    found: dict[str, list[Example]] = {}
    for example in examples:
        label = str(example.label)
        if example.task.score_range is not None:
            label = "upper half" if float(label) > sum(example.task.score_range) / 2 else "lower half"
        rows = found.setdefault(label, [])
        if len(rows) < ROWS_PER_LABEL:
            rows.append(example)
    return found
