"""Training health: what goes wrong in a run, told while it goes, with the keys of the recipe to try.

collapse   one answer to everything
kl         overflow of the KL, or of the coefficient of its penalty
format     answers that lose the format, or never find it
gradient   no gradient
reward     no reward that differs from the others of its batch
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any, Protocol

from extensions.tasks import Task


class _Part(Protocol):
    """One kind of trouble; `name` is where its state stands in that of the whole watch."""

    name: str

    def step(self, metrics: dict[str, Any], records: Sequence[dict[str, Any]]) -> list[str]: ...
    def state(self) -> dict[str, Any]: ...
    def load_state(self, state: dict[str, Any]) -> None: ...


class HealthMonitor:
    """Notices a training that goes wrong, from the metrics and the records of its iterations; speaks seldom.

    Args:
        tasks: of the recipe; samples of others count only for the format.
        kl_target: `ppo.kl.target`; None where there is no KL (SFT, `ppo.kl.init: 0`).
    """

    def __init__(self, tasks: Sequence[Task], kl_target: float | None) -> None:
        self._parts: list[_Part] = [CollapseWatch(tasks), FormatWatch(), GradientWatch(), RewardWatch()]
        if kl_target is not None:
            self._parts.insert(1, KlWatch(kl_target))

    def step(self, metrics: dict[str, Any], records: Sequence[dict[str, Any]]) -> list[str]:
        """The warnings of one iteration, usually none."""
        return [text for part in self._parts for text in part.step(metrics, records)]

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold so that a resumed run warns as one that never stopped; JSON."""
        return {part.name: part.state() for part in self._parts}

    def load_state(self, state: dict[str, Any]) -> None:
        for part in self._parts:
            part.load_state(state[part.name])


class CollapseWatch:
    """Notices a policy that gives one answer to everything, while the data do not.

    Looks at the classification answers of the last `window` samples of a task; speaks at most once in `window`. A
    wrong format is no answer.
    """

    name = "collapse"

    def __init__(self, tasks: Sequence[Task], window: int = 160, share: float = 0.95) -> None:
        self.tasks = [task for task in tasks if not task.is_regression]
        self.window, self.share = window, share
        self._answers: dict[str, deque[tuple[str, str]]] = {}
        self._quiet_until: Counter[str] = Counter()
        self._seen: Counter[str] = Counter()

    def step(self, metrics: dict[str, Any], records: Sequence[dict[str, Any]]) -> list[str]:
        said = []
        for task in self.tasks:
            own = [
                (task.answer(r["answer"]), task.answer(r["gold"]))
                for r in records
                if r["task"] == task.name and r["answer"] is not None
            ]
            if own and (text := self._add(task.name, own)):
                said.append(text)
        return said

    def _add(self, task: str, answers: Sequence[tuple[str, str]]) -> str | None:
        """Take (answer, gold) pairs that have the right format; a warning when the task has collapsed."""
        recent = self._answers.setdefault(task, deque(maxlen=self.window))
        recent.extend(answers)
        self._seen[task] += len(answers)
        if len(recent) < self.window or self._seen[task] < self._quiet_until[task]:
            return None
        answer, count = Counter(a for a, _ in recent).most_common(1)[0]
        gold = max(Counter(g for _, g in recent).values())
        if count < self.share * self.window or gold > 0.85 * self.window:
            return None
        self._quiet_until[task] = self._seen[task] + self.window
        return (
            f"{task}: {count / self.window:.0%} of the last {self.window} answers are {answer!r}; the policy may have "
            "collapsed to one class. Try a larger ppo.batch_size, data.balanced: true, a lower optimizer.lr, a higher "
            "ppo.kl.init, or a small ppo.entropy_coef such as 0.01"
        )

    def state(self) -> dict[str, Any]:
        return {
            task: {
                "answers": [list(pair) for pair in recent],
                "seen": self._seen[task],
                "quiet_until": self._quiet_until[task],
            }
            for task, recent in self._answers.items()
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self._answers = {
            task: deque(((answer, gold) for answer, gold in own["answers"]), maxlen=self.window)
            for task, own in state.items()
        }
        self._seen = Counter({task: own["seen"] for task, own in state.items()})
        self._quiet_until = Counter({task: own["quiet_until"] for task, own in state.items()})


class KlWatch:
    """Notices a KL that is not finite or stays far above its target, and a penalty that has run away from its start.

    Speaks of each at most once in `quiet` iterations. The coefficient is compared with that of the first iteration
    too: one that the recipe sets outside the limits has not run away.
    """

    name = "kl"

    def __init__(
        self, target: float, factor: float = 5.0, row: int = 3, low: float = 1e-6, high: float = 1e3, quiet: int = 10
    ) -> None:
        self.target, self.factor, self.row, self.low, self.high, self.quiet = target, factor, row, low, high, quiet
        self._over: deque[float] = deque(maxlen=row)  # the last values above the limit, in a row
        self._start: float | None = None  # coefficient of the first iteration
        self._iteration = 0
        self._quiet_until: Counter[str] = Counter()

    def step(self, metrics: dict[str, Any], records: Sequence[dict[str, Any]]) -> list[str]:
        if "kl" not in metrics:
            return []
        self._iteration += 1
        kl, coef = metrics["kl"], metrics.get("kl_coef")
        found = {
            "finite": self._not_finite(kl, coef),
            "far": self._far(kl, coef),
            "coef": self._run_away(kl, coef),
        }
        said = []
        for kind, text in found.items():
            if text is not None and self._iteration >= self._quiet_until[kind]:
                self._quiet_until[kind] = self._iteration + self.quiet
                said.append(f"step {metrics['step']}: {text}")
        return said

    def _not_finite(self, kl: float | None, coef: float | None) -> str | None:
        if _finite(kl) and (coef is None or _finite(coef)):
            return None
        # It does not pass by itself: an adaptive coefficient that a NaN has reached stays one.
        return (
            f"kl is {_shown(kl)} and kl_coef is {_shown(coef)}: a number has overflowed, and the run will not recover. "
            "Train again with a lower optimizer.lr, ppo.max_grad_norm: 1 or less, a higher ppo.kl.init or a smaller "
            "ppo.clip; check rollouts.jsonl for text outside the prompt's language"
        )

    def _far(self, kl: float | None, coef: float | None) -> str | None:
        limit = self.factor * self.target
        if kl is None or not math.isfinite(kl) or kl <= limit:
            self._over.clear()
            return None
        self._over.append(float(kl))
        if len(self._over) < self.row:
            return None
        values = ", ".join(f"{value:.3g}" for value in self._over)
        return (
            f"kl is above {limit:g} ({self.factor:g} x ppo.kl.target: {self.target:g}) in {self.row} iterations in a "
            f"row ({values}), with kl_coef {_shown(coef)}: the policy is leaving its reference. Try a lower "
            "optimizer.lr, a higher ppo.kl.init, ppo.max_grad_norm: 1 or less, or a smaller ppo.clip; check "
            "rollouts.jsonl for text outside the prompt's language"
        )

    def _run_away(self, kl: float | None, coef: float | None) -> str | None:
        if coef is None or not math.isfinite(coef):
            return None
        if self._start is None:
            self._start = float(coef)
        if coef > max(self.high, self._start):
            return (
                f"kl_coef has grown to {coef:.3g} (from {self._start:.3g}), with kl {_shown(kl)} and ppo.kl.target: "
                f"{self.target:g}: the penalty outweighs every reward, and the KL does not come down. Try a lower "
                "optimizer.lr, a higher ppo.kl.init, ppo.max_grad_norm: 1 or less, a smaller ppo.clip, or a higher "
                "ppo.kl.target; check rollouts.jsonl for text outside the prompt's language"
            )
        if coef < min(self.low, self._start):
            return (
                f"kl_coef has fallen to {coef:.3g} (from {self._start:.3g}), with kl {_shown(kl)} and ppo.kl.target: "
                f"{self.target:g}: nothing keeps the policy near its reference, since the KL stays below its target. "
                "Try a lower ppo.kl.target, ppo.kl.adaptive: false, or a higher ppo.kl.init"
            )
        return None

    def state(self) -> dict[str, Any]:
        return {
            "over": list(self._over),
            "start": self._start,
            "iteration": self._iteration,
            "quiet_until": dict(self._quiet_until),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self._over = deque(state["over"], maxlen=self.row)
        self._start, self._iteration = state["start"], state["iteration"]
        self._quiet_until = Counter(state["quiet_until"])


class FormatWatch:
    """Notices a policy that loses the answer format (told at most once in `window`), or never finds it (told once).

    Args:
        window: samples, of all tasks, that a share of wrong formats is over.
        lost, had: the format is lost where the share is at least `lost` after a window with at most `had`.
        never, first: it was never found where no window of the first `first` samples has a share under `never`.
    """

    name = "format"

    def __init__(
        self, window: int = 160, lost: float = 0.9, had: float = 0.5, never: float = 0.95, first: int = 640
    ) -> None:
        self.window, self.lost, self.had, self.never, self.first = window, lost, had, never, first
        self._wrong: deque[bool] = deque(maxlen=window)
        self._least = window  # wrong formats of the best window so far
        self._seen = 0
        self._quiet_until = 0

    def step(self, metrics: dict[str, Any], records: Sequence[dict[str, Any]]) -> list[str]:
        said = []
        for record in records:  # one by one: the windows do not depend on the batch size
            self._wrong.append(record["answer"] is None)
            self._seen += 1
            if len(self._wrong) == self.window:
                self._least = min(self._least, sum(self._wrong))
            if self._seen == self.first and self._least >= self.never * self.window:
                said.append(
                    f"step {metrics['step']}: at least {self._least / self.window:.0%} of any {self.window} answers of "
                    f"the first {self.first} have a wrong format, so there is hardly a reward to learn from. Look at "
                    "rollouts.jsonl; try a larger rollout.response_budget, a larger ppo.batch_size, "
                    "ppo.whiten_min_std: 0.3, demonstrations (prompt.shots), or another model.path"
                )
        count = sum(self._wrong)
        lost = count >= self.lost * self.window and self._least <= self.had * self.window
        if lost and self._seen >= self._quiet_until:
            self._quiet_until = self._seen + self.window
            said.append(
                f"step {metrics['step']}: {count / self.window:.0%} of the last {self.window} answers have a wrong "
                f"format, after {self._least / self.window:.0%} earlier: the policy has lost the format. Look at "
                "rollouts.jsonl, then train again with a lower optimizer.lr or a higher ppo.kl.init. "
                "evaluation.every_steps keeps the adapter of the best validation, from which model.adapter can start"
            )
        return said

    def state(self) -> dict[str, Any]:
        return {
            "wrong": [int(wrong) for wrong in self._wrong],
            "least": self._least,
            "seen": self._seen,
            "quiet_until": self._quiet_until,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self._wrong = deque((bool(wrong) for wrong in state["wrong"]), maxlen=self.window)
        self._least, self._seen, self._quiet_until = state["least"], state["seen"], state["quiet_until"]


class GradientWatch:
    """Notices that no gradient reaches the adapters: a norm under `least` in `row` iterations in a row."""

    name = "gradient"

    def __init__(self, row: int = 10, least: float = 1e-7) -> None:
        self.row, self.least = row, least
        self._still = 0  # iterations in a row, since the last warning

    def step(self, metrics: dict[str, Any], records: Sequence[dict[str, Any]]) -> list[str]:
        norm = metrics.get("grad_norm")
        self._still = self._still + 1 if norm is not None and norm < self.least else 0
        if self._still < self.row:
            return []
        self._still = 0
        beginning = f"step {metrics['step']}: grad_norm is under {self.least:g} in {self.row} iterations in a row"
        if "reward_mean" in metrics:
            return [
                f"{beginning} (now {norm:.3g}, with reward_std {_shown(metrics['reward_std'])}): the policy no longer "
                "changes. Try ppo.whiten: true, a small ppo.entropy_coef such as 0.01, or model.dtype: float32, and "
                "check lora.target_modules"
            ]
        return [
            f"{beginning} (now {norm:.3g}, with loss {_shown(metrics.get('loss'))}): the policy no longer changes. A "
            "loss near 0 is learned: stop early by evaluation.patience, or set fewer sft.max_steps. Otherwise try "
            "model.dtype: float32, and check lora.target_modules"
        ]

    def state(self) -> dict[str, Any]:
        return {"still": self._still}

    def load_state(self, state: dict[str, Any]) -> None:
        self._still = state["still"]


class RewardWatch:
    """Notices that no reward differs within its batch, in `row` iterations in a row; a single sample is no batch."""

    name = "reward"

    def __init__(self, row: int = 20) -> None:
        self.row = row
        self._equal = 0  # iterations in a row, since the last warning
        self._right = 0  # those of them in which every answer was right

    def step(self, metrics: dict[str, Any], records: Sequence[dict[str, Any]]) -> list[str]:
        mean, deviation = metrics.get("reward_mean"), metrics.get("reward_std")
        if mean is None or deviation is None or len(records) == 1:
            equal = False
        else:
            equal = deviation <= 1e-6 * abs(mean)  # not always 0 for equal float32 rewards: their mean is rounded
        if not equal:
            self._equal = self._right = 0
            return []
        accuracy = metrics.get("accuracy")
        self._equal += 1
        self._right += accuracy == 1
        if self._equal < self.row:
            return []
        solved = self._right == self._equal
        self._equal = self._right = 0
        if solved:
            return [
                f"step {metrics['step']}: every answer of the last {self.row} batches is right (accuracy 1): the "
                "training samples are solved, and there is little left to learn. evaluation.patience, with "
                "evaluation.every_steps, stops early"
            ]
        return [
            f"step {metrics['step']}: within each of the last {self.row} batches all rewards are equal (now "
            f"{mean:.3g}, with accuracy {_shown(accuracy)} and format_error_rate "
            f"{_shown(metrics.get('format_error_rate'))}): no answer is better than another, so the advantages are "
            "noise or zero. Try a larger ppo.batch_size, data.balanced: true, or a small ppo.entropy_coef such as "
            "0.01; check in rollouts.jsonl whether the task is solved, and if so stop early by evaluation.patience"
        ]

    def state(self) -> dict[str, Any]:
        return {"equal": self._equal, "right": self._right}

    def load_state(self, state: dict[str, Any]) -> None:
        self._equal, self._right = state["equal"], state["right"]


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _shown(value: float | None) -> str:
    """A number as a warning shows it; JSON has null for what is not finite."""
    return "null" if value is None else f"{value:.3g}"
