"""Warnings about the answers: one answer to all prompts, labels that no answer names, wrong formats."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from extensions.evaluation.metrics import unanswered
from extensions.runs.watch import Metrics, Records, Watch
from extensions.tasks import Task

SHOWN = 8  # labels that a warning names


@dataclass
class CollapseWatch(Watch):
    """A policy that gives the same answer to all prompts although the gold labels vary.

    Looks at the last `WINDOW` classification answers of each task that have the right format; warns at most once per
    window and task.
    """

    name = "collapse"
    WINDOW, SHARE, GOLD_SHARE = 160, 0.95, 0.85

    tasks: Sequence[Task]
    answers: dict[str, list[list[str]]] = field(default_factory=dict)  # task -> its last [answer, gold]
    seen: dict[str, int] = field(default_factory=dict)
    quiet_until: dict[str, int] = field(default_factory=dict)  # in answers seen
    warned: list[str] = field(default_factory=list)  # tasks of the last iteration's warnings

    def step(self, metrics: Metrics, records: Records) -> list[str]:
        warnings = []
        self.warned = []
        for task in self.tasks:
            own = [
                [task.answer(r["answer"]), task.answer(r["gold"])]
                for r in records
                if r["task"] == task.name and r["answer"] is not None and not task.is_regression
            ]
            if own and (text := self._add(task.name, own)):
                warnings.append(text)
                self.warned.append(task.name)
        return warnings

    def _add(self, task: str, answers: list[list[str]]) -> str | None:
        recent = self.answers[task] = [*self.answers.get(task, []), *answers][-self.WINDOW :]
        self.seen[task] = self.seen.get(task, 0) + len(answers)
        if len(recent) < self.WINDOW or self.seen[task] < self.quiet_until.get(task, 0):
            return None
        answer, count = Counter(answer for answer, _ in recent).most_common(1)[0]
        gold = max(Counter(gold for _, gold in recent).values())
        if count < self.SHARE * self.WINDOW or gold > self.GOLD_SHARE * self.WINDOW:
            return None
        self.quiet_until[task] = self.seen[task] + self.WINDOW
        return (
            f"{task}: {count / self.WINDOW:.0%} of the last {self.WINDOW} answers are {answer!r}; the policy may have "
            "collapsed to one class. Try a larger ppo.batch_size, data.balanced: true, a lower optimizer.lr, a higher "
            "ppo.kl.init, or a small ppo.entropy_coef such as 0.01"
        )


@dataclass
class UnpredictedWatch(Watch):
    """A label that no answer names while the rows ask for it; warns once until the label is answered again.

    Counts the rows of the label that got an answer of right format since any answer last named it, and warns at
    `LEAST`: a policy that gives the label to one in seven of its rows leaves 20 of them without it in 4.6% of the cases
    (0.86 ** 20), so its recall is below 14% at 95% confidence. Where the task collapses in the same iteration, that
    warning covers its labels.
    """

    name = "unpredicted"
    LEAST = 20

    tasks: Sequence[Task]
    collapse: CollapseWatch  # of the same iteration
    missed: dict[str, dict[str, int]] = field(default_factory=dict)  # task -> label -> its rows since it was answered
    silent: dict[str, list[str]] = field(default_factory=dict)  # task -> labels that have been reported

    def step(self, metrics: Metrics, records: Records) -> list[str]:
        warnings = []
        for task in self.tasks:
            own = [r for r in records if r["task"] == task.name and r["answer"] is not None and not task.is_regression]
            if own:
                due = self._count(task, own)
                if due and task.name not in self.collapse.warned:
                    counts = {label: self.missed[task.name][label] for label in due}
                    warnings.append(_unpredicted_text(task, counts, f"step {metrics['step']}: "))
        return warnings

    def _count(self, task: Task, records: Records) -> list[str]:
        """Labels that have reached `LEAST` in this iteration, in the task's order."""
        missed, silent = self.missed.setdefault(task.name, {}), self.silent.setdefault(task.name, [])
        named = {label for r in records for label in _labels(task, r["answer"])}
        asked = Counter(label for r in records for label in _labels(task, r["gold"]))
        for label in task.labels:
            missed[label] = 0 if label in named else missed.get(label, 0) + asked[label]
        due = [label for label in task.labels if missed[label] >= self.LEAST and label not in silent]
        self.silent[task.name] = [label for label in silent if missed[label]] + due
        return due


def unpredicted_in(
    task: Task, result: Mapping[str, Any], where: str, method: str = "ppo"
) -> tuple[list[str], str | None]:
    """Labels of the gold rows that no answer of an evaluation names, and the warning about them.

    A label counts if at least one of its rows is expected to have an answer of right format.

    Args:
        result: of the task, as `extensions.evaluation.metrics.score` returns it.
        where: the evaluation, for the warning.
        method: of the run, for what to try.
    """
    labels = {task.answer(label): label for label in task.labels} if not task.is_regression else {}
    answered = result["samples"] * (1 - (result["format_error_rate"] or 0.0))
    shares = {labels[word]: result["gold_shares"][word] for word in unanswered(result) if word in labels}
    counts = {label: round(share * result["samples"]) for label, share in shares.items() if share * answered >= 1}
    return list(counts), _unpredicted_text(task, counts, f"{where}: ", method) if counts else None


def unpredicted_warnings(tasks: Iterable[Task], scores: Mapping[str, Any], where: str, method: str) -> list[str]:
    """The warnings of `unpredicted_in` for the results of several tasks."""
    found = [unpredicted_in(task, scores[task.name], where, method)[1] for task in tasks if task.name in scores]
    return [text for text in found if text is not None]


def _unpredicted_text(task: Task, counts: Mapping[str, int], start: str, method: str = "ppo") -> str:
    named = [f"{task.answer(label)!r} ({count} rows)" for label, count in counts.items()]
    more = ", ".join(named[:SHOWN]) + (f" and {len(named) - SHOWN} more labels" if len(named) > SHOWN else "")
    rows = f"more training rows of {'it' if len(named) == 1 else 'them'}"
    if method == "eval":
        advice = "look at the prompt (nlu preview), and try demonstrations (prompt.shots) or training (launch/sft.sh)"
    elif method == "encoder":
        advice = f"try {rows}, a lower encoder.lr, or more encoder.epochs"
    else:
        balance = "data.balanced: true, data.oversample: true or data.class_weights: balanced, "
        if task.multi_label:  # its rows have no classes to balance
            balance = ""
        advice = f"try {rows}, {balance}a lower optimizer.lr, or more steps"
    return f"{start}{task.name}: no answer names {more}; {advice}"


def _labels(task: Task, answer: Any) -> Sequence[str]:
    return task.split_labels(str(answer)) if task.multi_label else (str(answer),)


@dataclass
class FormatWatch(Watch):
    """A policy that loses the answer format (warns at most once per window), or never learns it (warns twice).

    The first hint comes after `IN_A_ROW` iterations in a row without a single right format, whatever the batch size,
    where the policy has not had the format before.
    The format is lost where the share of wrong formats in the last `WINDOW` samples of all tasks is at least `LOST`
    after a window with at most `HAD`. It was never learned where no window of the first `FIRST` samples has a share
    under `NEVER`.
    """

    name = "format"
    WINDOW, LOST, HAD, NEVER, FIRST, IN_A_ROW = 160, 0.9, 0.5, 0.95, 640, 5

    wrong: list[int] = field(default_factory=list)  # of the last samples: 1 for a wrong format
    least: int = WINDOW  # wrong formats of the best window so far
    seen: int = 0
    right: int = 0  # answers of right format so far
    all_wrong: int = 0  # iterations in a row
    hinted: bool = False
    quiet_until: int = 0  # in samples seen

    def step(self, metrics: Metrics, records: Records) -> list[str]:
        warnings = [text] if (text := self._hint(metrics, records)) else []
        for record in records:  # one by one, so that the windows do not depend on the batch size
            self.wrong = [*self.wrong, int(record["answer"] is None)][-self.WINDOW :]
            self.seen += 1
            self.right += record["answer"] is not None
            if len(self.wrong) == self.WINDOW:
                self.least = min(self.least, sum(self.wrong))
            if self.seen == self.FIRST and self.least >= self.NEVER * self.WINDOW:
                warnings.append(
                    f"step {metrics['step']}: at least {self.least / self.WINDOW:.0%} of any {self.WINDOW} answers of "
                    f"the first {self.FIRST} have a wrong format, so there is hardly a reward to learn from. Look at "
                    "rollouts.jsonl; try several responses per prompt (ppo.samples_per_prompt: 8, "
                    "ppo.advantage_estimator: rloo), a larger rollout.response_budget, ppo.whiten_min_std: 0.3, "
                    "demonstrations (prompt.shots), or another model.path"
                )
        count = sum(self.wrong)
        lost = count >= self.LOST * self.WINDOW and self.least <= self.HAD * self.WINDOW
        if lost and self.seen >= self.quiet_until:
            self.quiet_until = self.seen + self.WINDOW
            warnings.append(
                f"step {metrics['step']}: {count / self.WINDOW:.0%} of the last {self.WINDOW} answers have a wrong "
                f"format, after {self.least / self.WINDOW:.0%} earlier: the policy has lost the format. Look at "
                "rollouts.jsonl, then train again with a lower optimizer.lr or a higher ppo.kl.init. "
                "evaluation.every_steps keeps the adapter of the best validation, from which model.adapter can start"
            )
        return warnings

    def _hint(self, metrics: Metrics, records: Records) -> str | None:
        self.all_wrong = self.all_wrong + 1 if records and all(r["answer"] is None for r in records) else 0
        had = self.right > (1 - self.LOST) * self.seen or self.least <= self.HAD * self.WINDOW
        if self.hinted or self.all_wrong < self.IN_A_ROW or had:
            return None
        self.hinted = True
        return (
            f"step {metrics['step']}: every answer of the last {self.IN_A_ROW} iterations has a wrong format, so all "
            "rewards are equal and there is nothing to learn from. Teach the format first, by supervised fine-tuning: "
            "bash launch/sft.sh RECIPE, then the same command as now with model.adapter=runs/NAME-sft/adapter. Or try "
            "several responses per prompt (ppo.samples_per_prompt: 8, ppo.advantage_estimator: rloo), demonstrations "
            "(prompt.shots) or a larger rollout.response_budget; rollouts.jsonl has the answers"
        )
