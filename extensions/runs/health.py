"""Training health: warnings about a run that goes wrong, with the recipe keys to try.

collapse     the same answer to all prompts (`extensions.runs.answer_health`)
unpredicted  a label that no answer names, in training and in evaluations (there)
format       answers that lose the format, or never learn it (there)
kl           a KL, or a coefficient of its penalty, that is not finite or far from its target
gradient     no gradient reaches the adapters
reward       all rewards of a batch are equal
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from extensions.runs.answer_health import CollapseWatch, FormatWatch, UnpredictedWatch, unpredicted_in
from extensions.runs.watch import Metrics, Records, Watch
from extensions.tasks import Task


class HealthMonitor:
    """Warns when a training goes wrong, by the metrics and records of its iterations.

    Args:
        tasks: of the recipe; samples of other tasks count only for the format.
        kl_target: `ppo.kl.target`; None: there is no KL (SFT, `ppo.kl.init: 0`).
    """

    def __init__(self, tasks: Sequence[Task], kl_target: float | None) -> None:
        self.tasks = tasks
        self.reported: dict[str, list[str]] = {}  # task -> labels that no answer of the last validation named
        kl = [] if kl_target is None else [KlWatch(kl_target)]
        self.collapse = CollapseWatch(tasks)
        answers = [self.collapse, UnpredictedWatch(tasks, self.collapse)]
        self.watches: list[Watch] = [*answers, *kl, FormatWatch(), GradientWatch(), RewardWatch()]

    def step(self, metrics: Metrics, records: Records) -> list[str]:
        """The warnings of one iteration, usually none.

        Args:
            records: one per sample of the batch, in order, each with `task`, `answer` (None: wrong format) and `gold`.
        """
        return [text for watch in self.watches for text in watch.step(metrics, records)]

    def validation(self, step: int, scores: Mapping[str, Any]) -> list[str]:
        """Warnings of a validation: labels that no answer names, where they are others than in the one before.

        A collapse that the iteration before it has reported is not reported again.

        Args:
            scores: task name -> result, as `extensions.evaluation.metrics.score` returns it.
        """
        warnings = []
        for task in self.tasks:
            if task.name in scores:
                labels, text = unpredicted_in(task, scores[task.name], f"validation at step {step}")
                if (
                    text is not None
                    and task.name not in self.collapse.warned
                    and labels != self.reported.get(task.name)
                ):
                    warnings.append(text)
                self.reported[task.name] = labels
        return warnings

    def state(self) -> dict[str, Any]:
        """JSON state for checkpoints, with which a resumed run warns like an uninterrupted one."""
        return {watch.name: watch.state() for watch in self.watches} | {"reported": dict(self.reported)}

    def load_state(self, state: dict[str, Any]) -> None:
        for watch in self.watches:
            watch.load_state(state[watch.name])
        self.reported = dict(state["reported"])


@dataclass
class KlWatch(Watch):
    """A KL that is not finite or stays far above its target, and a penalty coefficient that has diverged.

    Warns of each at most once in `QUIET` iterations. The coefficient must also have passed that of the first iteration:
    one that the recipe sets outside the limits has not diverged.
    """

    name = "kl"
    FACTOR, IN_A_ROW, LOW, HIGH, QUIET = 5.0, 3, 1e-6, 1e3, 10
    SLOWER = "a lower optimizer.lr, a higher ppo.kl.init, ppo.max_grad_norm: 1 or less"
    CHECK_TEXT = "check rollouts.jsonl for text outside the prompt's language"

    target: float
    above: list[float] = field(default_factory=list)  # the last values above the limit, in a row
    first_coef: float | None = None
    iteration: int = 0
    quiet_until: dict[str, int] = field(default_factory=dict)

    def step(self, metrics: Metrics, records: Records) -> list[str]:
        if "kl" not in metrics:
            return []
        self.iteration += 1
        kl, coef = metrics["kl"], metrics.get("kl_coef")
        found = {"finite": self._not_finite(kl, coef), "far": self._far(kl, coef), "coef": self._diverged(kl, coef)}
        warnings = []
        for kind, text in found.items():
            if text is not None and self.iteration >= self.quiet_until.get(kind, 0):
                self.quiet_until[kind] = self.iteration + self.QUIET
                warnings.append(f"step {metrics['step']}: {text}")
        return warnings

    def _not_finite(self, kl: float | None, coef: float | None) -> str | None:
        if _finite(kl) and (coef is None or _finite(coef)):
            return None
        # An adaptive coefficient that a NaN has reached stays NaN.
        return (
            f"kl is {_shown(kl)} and kl_coef is {_shown(coef)}: a value has overflowed, and the run will not recover. "
            f"Train again with {self.SLOWER} or a smaller ppo.clip; {self.CHECK_TEXT}"
        )

    def _far(self, kl: float | None, coef: float | None) -> str | None:
        limit = self.FACTOR * self.target
        self.above = [*self.above, float(kl)][-self.IN_A_ROW :] if _finite(kl) and kl > limit else []
        if len(self.above) < self.IN_A_ROW:
            return None
        return (
            f"kl is above {limit:g} ({self.FACTOR:g} x ppo.kl.target: {self.target:g}) in {self.IN_A_ROW} iterations "
            f"in a row ({', '.join(map(_shown, self.above))}), with kl_coef {_shown(coef)}: the policy is leaving its "
            f"reference. Try {self.SLOWER}, or a smaller ppo.clip; {self.CHECK_TEXT}"
        )

    def _diverged(self, kl: float | None, coef: float | None) -> str | None:
        if not _finite(coef):
            return None
        first = self.first_coef = float(coef) if self.first_coef is None else self.first_coef
        change = f"to {coef:.3g} (from {first:.3g}), with kl {_shown(kl)} and ppo.kl.target: {self.target:g}"
        if coef > max(self.HIGH, first):
            return (
                f"kl_coef has grown {change}: the penalty outweighs every reward, and the KL does not come down. Try "
                f"{self.SLOWER}, a smaller ppo.clip, or a higher ppo.kl.target; {self.CHECK_TEXT}"
            )
        if coef < min(self.LOW, first):
            return (
                f"kl_coef has fallen {change}: nothing keeps the policy near its reference, since the KL stays below "
                "its target. Try a lower ppo.kl.target, ppo.kl.adaptive: false, or a higher ppo.kl.init"
            )
        return None


@dataclass
class GradientWatch(Watch):
    """No gradient reaches the adapters: a norm under `LEAST` in `IN_A_ROW` iterations in a row."""

    name = "gradient"
    IN_A_ROW, LEAST = 10, 1e-7

    still: int = 0  # iterations in a row, since the last warning

    def step(self, metrics: Metrics, records: Records) -> list[str]:
        norm = metrics.get("grad_norm")
        self.still = self.still + 1 if norm is not None and norm < self.LEAST else 0
        if self.still < self.IN_A_ROW:
            return []
        self.still = 0
        is_ppo = "reward_mean" in metrics
        second = f"reward_std {_shown(metrics['reward_std'])}" if is_ppo else f"loss {_shown(metrics.get('loss'))}"
        return [
            f"step {metrics['step']}: grad_norm is under {self.LEAST:g} in {self.IN_A_ROW} iterations in a row (now "
            f"{norm:.3g}, with {second}): the policy no longer changes. "
            + (
                "Try ppo.whiten: true, a small ppo.entropy_coef such as 0.01, or model.dtype: float32, and check "
                if is_ppo
                else "A loss near 0 is learned: stop early by evaluation.patience, or set fewer sft.max_steps. "
                "Otherwise try model.dtype: float32, and check "
            )
            + "lora.target_modules"
        ]


@dataclass
class RewardWatch(Watch):
    """All rewards of a batch are equal, in `IN_A_ROW` iterations in a row; a single sample is no batch."""

    name = "reward"
    IN_A_ROW = 20

    equal: int = 0  # iterations in a row, since the last warning
    right: int = 0  # those of them in which every answer was right

    def step(self, metrics: Metrics, records: Records) -> list[str]:
        mean, deviation = metrics.get("reward_mean"), metrics.get("reward_std")
        # The deviation of equal float32 rewards is not always 0, since their mean is rounded.
        if mean is None or deviation is None or len(records) == 1 or not deviation <= 1e-6 * abs(mean):
            self.equal = self.right = 0
            return []
        accuracy = metrics.get("accuracy")
        self.equal += 1
        self.right += accuracy == 1
        if self.equal < self.IN_A_ROW:
            return []
        solved = self.right == self.equal
        self.equal = self.right = 0
        if solved:
            return [
                f"step {metrics['step']}: every answer of the last {self.IN_A_ROW} batches is right (accuracy 1): the "
                "training samples are solved, and there is little left to learn. evaluation.patience, with "
                "evaluation.every_steps, stops early"
            ]
        return [
            f"step {metrics['step']}: within each of the last {self.IN_A_ROW} batches all rewards are equal (now "
            f"{mean:.3g}, with accuracy {_shown(accuracy)} and format_error_rate "
            f"{_shown(metrics.get('format_error_rate'))}): no answer is better than another, so the advantages are "
            "noise or zero. Try a larger ppo.batch_size, data.balanced: true, or a small ppo.entropy_coef such as "
            "0.01; check in rollouts.jsonl whether the task is solved, and if so stop early by evaluation.patience"
        ]


def _finite(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


def _shown(value: float | None) -> str:
    """A number as a warning shows it; JSON has null for what is not finite."""
    return "null" if value is None else f"{value:.3g}"
