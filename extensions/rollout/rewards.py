"""Loads a recipe's reward function and calls it; a faulty one stops the run with an error that names it."""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from extensions.common.errors import UserError
from extensions.data import Example
from extensions.distributed import watchdog
from extensions.prompts import pack_label, parse_answer
from extensions.rollout.reward_files import import_reward
from extensions.tasks import Task

BUILT_IN = Path(__file__).parents[2] / "reward_fns"  # found by path: its files import extensions, never the reverse


@dataclass(frozen=True)
class Reward:
    """The reward function of a file.

    It is `reward(text, label)` if the file defines that, else OpenRLHF's `reward_func(queries, prompts, labels)`. A
    file of the project receives labels that carry the task (`pack_label`), a user's file the label as it is in the
    data.
    """

    path: Path
    function: Callable[..., Any]
    batched: bool  # OpenRLHF's contract
    packed_labels: bool
    score: Callable[[str | float | None, str, Task], float] | None = None  # of a parsed answer; files of the project

    def label(self, example: Example) -> str:
        """The label that the function receives."""
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
        """The same, with the labels that `label` returns."""
        if not self.batched:
            rewards = []
            for text, label in zip(texts, labels, strict=True):
                watchdog.heartbeat()  # a reward that calls another model may be slow
                rewards.append(self._one(text, label))
            return rewards
        queries = [prompt + text for prompt, text in zip(prompts, texts, strict=True)]
        try:
            returned = self.function(queries, list(prompts), labels)["rewards"]
            values = returned.tolist() if hasattr(returned, "tolist") else list(returned)
        except Exception as error:
            raise UserError(f"{self._name} failed on a batch of {len(texts)} samples: {_named(error)}") from error
        if len(values) != len(texts):
            raise UserError(f"{self._name} returned {len(values)} rewards for {len(texts)} samples; expected one each")
        return [self._checked(value, text, label) for value, text, label in zip(values, texts, labels, strict=True)]

    def _one(self, text: str, label: str) -> float:
        try:
            value = self.function(text, label)
        except Exception as error:
            raise UserError(f"{self._name} raised {_named(error)}\n{_sample(text, label)}") from error
        return self._checked(value, text, label)

    def _checked(self, value: Any, text: str, label: str) -> float:
        if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
            value = value.item()  # a numpy or torch scalar
        if not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise UserError(
                f"{self._name} returned {value!r} ({type(value).__name__}); expected one finite number\n"
                f"{_sample(text, label)}"
            )
        return float(value)

    @property
    def _name(self) -> str:
        return f"reward function {_name_of(self.function)} of {self.path}"


def _name_of(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", repr(function))


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _sample(text: str, label: str) -> str:
    return f"  on text {text[:200]!r} with label {label!r}"


def load_reward(name: str) -> Reward:
    """The reward of recipe key `reward`: a file of reward_fns/ by its name, or the path of a Python file.

    Raises:
        UserError: there is no such file, it cannot be imported, or it defines neither `reward` nor `reward_func`.
    """
    built_in = {path.stem: path for path in BUILT_IN.glob("*.py") if path.stem != "__init__"}
    path = built_in.get(name, Path(name))
    if path.suffix != ".py" or not path.is_file():
        raise UserError(
            f"reward: {name!r} is neither a file of reward_fns/ ({', '.join(sorted(built_in))}) nor a .py file"
        )
    module, own = import_reward(path), name in built_in
    for attribute, batched, num_arguments in (("reward", False, 2), ("reward_func", True, 3)):
        function = getattr(module, attribute, None)
        if callable(function):
            _check_signature(function, num_arguments, path)
            return Reward(path, function, batched, own, getattr(module, "score", None) if own else None)
    raise UserError(f"{path}: defines neither reward(text, label) nor reward_func(queries, prompts, labels)")


def _check_signature(function: Callable[..., Any], num_arguments: int, path: Path) -> None:
    try:
        inspect.signature(function).bind(*[None] * num_arguments)
    except (TypeError, ValueError) as error:
        message = f"{_name_of(function)} cannot be called with {num_arguments} arguments: {error}"
        raise UserError(f"{path}: {message}") from error
