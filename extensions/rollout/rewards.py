"""Loads a recipe's reward and calls it so that a faulty one stops the run and says why."""

from __future__ import annotations

import importlib.util
import inspect
import math
import numbers
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import reward_fns
from extensions.common.errors import UserError
from extensions.data import Example
from extensions.distributed import watchdog
from extensions.prompts import CLOSE, pack_label, parse_answer
from extensions.tasks import Task

BUILT_IN = Path(next(iter(reward_fns.__path__)))


@dataclass(frozen=True)
class Reward:
    """A reward file in use.

    Calls `reward(text, label)` where the file has it, else OpenRLHF's `reward_func(queries, prompts, labels)`. A file
    of the project gets labels that carry the task (`pack_label`); a user's file gets the label as it stands in the
    data.
    """

    path: Path
    function: Callable[..., Any]
    batched: bool  # OpenRLHF's contract
    packed_labels: bool
    score: Callable[[str | float | None, str, Task], float] | None = None  # of a parsed answer; files of the project

    def label(self, example: Example) -> str:
        assert example.label is not None, "a reward needs labelled examples"
        return pack_label(example.task, example.label) if self.packed_labels else example.label

    def __call__(
        self,
        texts: Sequence[str],
        prompts: Sequence[str],
        examples: Sequence[Example],
        answers: Sequence[str | float | None] | None = None,
    ) -> list[float]:
        """One finite number per response.

        Args:
            answers: parsed from the texts, where that was done before.

        Raises:
            UserError: the function raised, or returned another type, another length or a non-finite number.
        """
        if self.score is not None:
            if answers is None:
                answers = [parse_answer(text, example.task) for text, example in zip(texts, examples, strict=True)]
            pairs = zip(answers, examples, strict=True)
            return [float(self.score(answer, str(example.label), example.task)) for answer, example in pairs]
        return self.of_labels(texts, prompts, [self.label(example) for example in examples])

    def of_labels(self, texts: Sequence[str], prompts: Sequence[str], labels: Sequence[str]) -> list[float]:
        """The same, for labels as `label` gives them."""
        if not self.batched:
            found = []
            for text, label in zip(texts, labels, strict=True):
                watchdog.heartbeat()  # a reward may ask another model, and take its time
                found.append(self._one(text, label))
            return found
        queries = [prompt + text for prompt, text in zip(prompts, texts, strict=True)]
        try:
            result = self.function(queries, list(prompts), labels)
            rewards = result["rewards"]
            values = rewards.tolist() if hasattr(rewards, "tolist") else list(rewards)
        except Exception as error:
            raise UserError(f"{self._name} failed on a batch of {len(texts)} samples: {_named(error)}") from error
        if len(values) != len(texts):
            raise UserError(f"{self._name} returned {len(values)} rewards for {len(texts)} samples; expected one each")
        return [self._checked(value, text, label) for value, text, label in zip(values, texts, labels, strict=True)]

    def _one(self, text: str, label: str) -> float:
        try:
            value = self.function(text, label)
        except Exception as error:
            raise UserError(
                f"{self._name} raised {_named(error)}\n  on text {text[:200]!r} with label {label!r}"
            ) from error
        return self._checked(value, text, label)

    def _checked(self, value: Any, text: str, label: str) -> float:
        if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
            value = value.item()  # a numpy or torch scalar
        if not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise UserError(
                f"{self._name} returned {value!r} ({type(value).__name__}); expected one finite number\n"
                f"  on text {text[:200]!r} with label {label!r}"
            )
        return float(value)

    @property
    def _name(self) -> str:
        return f"reward function {_name_of(self.function)} of {self.path}"


def _name_of(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", repr(function))


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def load_reward(name: str) -> Reward:
    """The reward of recipe key `reward`: a file of reward_fns/ by its name, or a path to a Python file.

    Raises:
        UserError: no such file, it does not import, or it has neither `reward` nor `reward_func`.
    """
    built_in = {path.stem: path for path in BUILT_IN.glob("*.py") if path.stem != "__init__"}
    path = built_in.get(name, Path(name))
    if path.suffix != ".py" or not path.is_file():
        raise UserError(
            f"reward: {name!r} is neither a file of reward_fns/ ({', '.join(sorted(built_in))}) nor a .py file"
        )
    module = _import_file(path)
    own = name in built_in
    for attribute, batched, arguments in (("reward", False, 2), ("reward_func", True, 3)):
        function = getattr(module, attribute, None)
        if callable(function):
            _check_signature(function, arguments, path)
            return Reward(path, function, batched, own, getattr(module, "score", None) if own else None)
    raise UserError(f"{path}: defines neither reward(text, label) nor reward_func(queries, prompts, labels)")


def _import_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"reward_file_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses in it look their module up
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UserError(f"{path}: cannot be imported: {_named(error)}") from error
    return module


def _check_signature(function: Callable[..., Any], arguments: int, path: Path) -> None:
    try:
        inspect.signature(function).bind(*[None] * arguments)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: {_name_of(function)} cannot be called with {arguments} arguments: {error}") from error


# ------------------------------------------------------------------------------------------------ a trial of a reward

TRIED = 3  # rows of each label


def reward_faults(reward: Reward, examples: Sequence[Example]) -> Iterator[tuple[str, bool]]:
    """What a reward does that cannot be meant, on some rows of each label of one task: gold, wrong answers, garbage.

    Yields:
        (sentence, whether no training can go on with it): it raises or returns no number; it is constant; or gold
        earns no more than a wrong answer, on all rows tried of a label.
    """
    if not examples:
        return
    task, rewards = examples[0].task, set[float]()
    unpaid: dict[str, str] = {}
    by_label = _by_label(examples)
    for label, rows in by_label.items():
        lost = []
        for row in rows:
            texts = [*(written(kind, answer) for kind, answer in trial_answers(task, str(row.label))), ""]
            try:
                values = reward(texts, [""] * len(texts), [row] * len(texts))
            except UserError as error:
                yield f"{error}\n  (task {task.name}, a row with the label {label!r})", True
                return
            rewards |= set(values)
            above = [k for k in range(1, len(texts)) if values[k] >= values[0]]
            lost += [f"{texts[k]!r} earns {values[k]:g}, gold {texts[0]!r} {values[0]:g}" for k in above[:1]]
        if len(lost) == len(rows):
            unpaid[label] = lost[0]
    if len(rewards) == 1:
        yield (
            f"reward {reward.path}: it is {rewards.pop():g} for gold, wrong and garbage answers alike (task "
            f"{task.name}), so nothing can be learned from it; try it with nlu preview",
            True,
        )
    elif unpaid:
        shown = "; ".join(f"label {label!r}: {what}" for label, what in list(unpaid.items())[:3])
        yield (
            f"reward {reward.path}: the gold answer earns no more than a wrong one, or one without its closing tag, "
            f"for {len(unpaid)} of {len(by_label)} labels of task {task.name} ({shown}). The reward gets "
            "the label as it stands in the data and the text as the model writes it, with the tag",
            False,
        )


def check_reward(reward: Reward, examples: Sequence[Example], warn: Callable[[str], None]) -> None:
    """`reward_faults` of each task.

    Raises:
        UserError: no training can go on with it.
    """
    by_task: dict[str, list[Example]] = {}
    for example in examples:
        by_task.setdefault(example.task.name, []).append(example)
    for rows in by_task.values():
        for fault, fatal in reward_faults(reward, rows):
            if fatal:
                raise UserError(fault)
            warn(fault)


def trial_answers(task: Task, gold: str) -> list[tuple[str, str]]:
    """(kind, answer): gold first, then each wrong answer, then garbage."""
    right = task.answer(gold)
    if task.score_range is not None:
        low, high = task.score_range
        wrong = [("wrong", f"{value:g}") for value in (low, (low + high) / 2, high) if value != float(right)]
    else:
        wrong = [("wrong", task.answer(label)) for label in task.sample_labels if label != gold]
    return [
        ("gold", right),
        *wrong,
        ("empty", ""),
        ("garbage", "As an AI language model, I"),
        ("garbage, unclosed", right),
    ]


def written(kind: str, answer: str) -> str:
    """The response that such an answer is: garbage has no closing tag."""
    return answer if kind.startswith("garbage") else f"{answer}{CLOSE}"


def _by_label(examples: Sequence[Example]) -> dict[str, list[Example]]:
    """At most `TRIED` examples of each label; of a regression of the lower and the upper half of its scores."""
    found: dict[str, list[Example]] = {}
    for example in examples:
        label = str(example.label)
        if example.task.score_range is not None:
            label = "upper half" if float(label) > sum(example.task.score_range) / 2 else "lower half"
        rows = found.setdefault(label, [])
        if len(rows) < TRIED:
            rows.append(example)
    return found
