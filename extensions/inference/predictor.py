"""The model of a run, loaded once, and its answers to rows."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from extensions.common.errors import UserError
from extensions.data import Example
from extensions.data.readers import FaultyRow, text_of
from extensions.evaluation.answers import Decoding, answer_batch, in_batches
from extensions.evaluation.likelihood import (
    Candidates,
    Decision,
    answer_probabilities,
    candidates,
    confidence_of,
    decide,
    log_likelihoods,
)
from extensions.inference import handover
from extensions.inference.handover import HandOver
from extensions.inference.location import Location, base_of, locate
from extensions.model.loading import load_policy, load_tokenizer
from extensions.model.policy import Policy
from extensions.prompts import CLOSE, PromptEncoder
from extensions.recipe import Evaluation, Lora, Model
from extensions.rollout.sampler import Sampler
from extensions.tasks import Task


@dataclass(frozen=True)
class Answer:
    """The answer to one row."""

    answer: str | float | None  # label as in the training data, several joined by ", ", or score; None: see `error`
    confidence: float | None  # probability of the answer among the task's; None where there is no answer
    probabilities: dict[str, float] | None  # by label (regression: by number); where they were asked for
    raw: str | None  # what the model wrote, by decoding sample or greedy
    error: str | None  # why there is no answer


class Predictor:
    """A trained model that answers rows.

        predictor = Predictor.load("runs/tickets")
        (found,) = predictor.predict([{"subject": "Refund", "ticket body": "I was charged twice."}])
        print(found.answer, found.confidence)

    Attributes:
        location: where the model is.
        handed: what its run left for answering: tasks, prompt form, decoding, calibration.
    """

    def __init__(self, location: Location, handed: HandOver, encoder: PromptEncoder, sampler: Sampler) -> None:
        self.location, self.handed, self.encoder, self.sampler = location, handed, encoder, sampler
        self._lock = threading.Lock()  # a policy computes in one role at a time

    @classmethod
    def load(
        cls,
        path: str | Path,
        model: str | None = None,
        device: str | None = None,
        trust_remote_code: bool = False,
    ) -> Predictor:
        """Load the model of a run folder, an adapter's folder or a merged model.

        Args:
            path: the folder; where `runs/NAME` is not there, `runs/NAME-sft` is taken.
            model: folder or hub name of the base model, where it is elsewhere than it was in the training.
            device: cpu, cuda, cuda:1, ...; None: the GPU if there is one.
            trust_remote_code: run Python code that comes with the base model.

        Raises:
            UserError: there is no such model, its files are damaged, or the base is another one.
        """
        location = locate(path)
        handed = handover.read(location.folder)
        base = base_of(location, handed, model, trust_remote_code)
        if not (location.folder / "tokenizer_config.json").is_file():
            raise UserError(f"{location.folder}: has no tokenizer (tokenizer_config.json); copy the whole folder")
        # The training's own: the base's may lack the tokens that end an answer.
        tokenizer = load_tokenizer(Model(path=str(location.folder), trust_remote_code=trust_remote_code))
        form = handed.prompt
        shown = {name: list(rows) for name, rows in form.demonstrations.items()}
        encoder = PromptEncoder(
            tokenizer, form.max_tokens, form.chat_template, form.shots, shown, form.template_options
        )
        policy = _policy(base, handed, _device(device))
        return cls(location, handed, encoder, Sampler(policy, tokenizer, CLOSE, Evaluation().micro_batch_size))

    def predict(
        self,
        rows: Sequence[Mapping[str, Any]],
        probabilities: bool = False,
        decoding: Decoding = "likelihood",
        task: str | None = None,
        temperature: float | None = None,
        batch_size: int | None = None,
        progress: Callable[[int], None] = lambda answered: None,
    ) -> list[Answer]:
        """One answer for each row, in their order. A row that cannot be answered has an error and stops no other.

        Args:
            rows: column name, as in the training data -> text. Other columns are ignored.
            probabilities: also give the probability of each label.
            decoding: "likelihood" takes the most probable of the task's answers; "sample" and "greedy" have the model
                write one, as the paper does.
            task: name; needed where the model knows several.
            temperature: of the probabilities; None: that which was fitted (`nlu predict --temperature auto`), else 1.
            batch_size: rows that are answered together; None: as an evaluation does.
            progress: is called with the number of rows that have been answered since the last call.

        Raises:
            UserError: an argument is wrong, the task is not known, or the model gives non-finite output.
        """
        _check_arguments(rows, decoding, temperature, batch_size)
        known = self.handed.task(task)
        _check_columns(rows, known)
        compared = candidates(known, self.handed.label_sets.get(known.name, ()))
        scale = self.temperature_of(known) if temperature is None else temperature
        answers: list[Answer | None] = [None] * len(rows)
        examples = []
        for index, row in enumerate(rows):
            try:
                examples.append(self.example(known, index, row))
            except UserError as error:
                said = error.fault.detail.lstrip(":, ") if isinstance(error, FaultyRow) else str(error)
                answers[index] = Answer(None, None, None, None, said)
        progress(len(rows) - len(examples))
        for batch in in_batches(examples, batch_size or Evaluation().batch_size):
            with self._lock:
                logprobs = self.log_likelihoods(compared, batch)
                chances = answer_probabilities(logprobs, scale)
                decisions = decide(compared, answer_probabilities(logprobs), chances)
                found = [Answer(d.answer, d.confidence, d.probabilities, None, None) for d in decisions]
                if decoding != "likelihood":
                    found = self._written(compared, batch, decoding, decisions, chances)
            for example, one in zip(batch, found, strict=True):
                answers[example.index] = one if probabilities else _without_probabilities(one)
            progress(len(batch))
        assert None not in answers, "each row has been answered, or has an error"
        return [one for one in answers if one is not None]

    def temperature_of(self, task: Task) -> float:
        """The calibration temperature of a task; 1 where none was fitted."""
        return self.handed.calibration.get(task.name) or 1.0

    def example(self, task: Task, index: int, row: Mapping[str, Any]) -> Example:
        """A row as an example without a label.

        Raises:
            UserError: a column or a text is missing, or the prompt cannot fit.
        """
        where, own = f"row {index + 1}", task.suite == "own"
        if not isinstance(row, Mapping):
            raise UserError(f"expected a dictionary of column and text, got {type(row).__name__}")
        may_lack = task.source.incomplete != "error"
        cells: dict[str | int, Any] = {name: value for name, value in row.items()}
        fields = {name: text_of(cells, column, where, may_lack, own) for name, column in task.text_columns.items()}
        if own and not any(fields.values()):
            raise UserError("all texts are empty")
        self.encoder.check(task, fields)
        return Example(task, index, fields, None)

    def log_likelihoods(self, compared: Candidates, batch: Sequence[Example]) -> Tensor:
        """(rows, C) log-probabilities of the answers, summed over their forms."""
        encoded = [self.encoder.encode(compared.task, row.fields) for row in batch]
        return log_likelihoods(compared, encoded, self.encoder, self.sampler)[0]

    def _written(
        self,
        compared: Candidates,
        batch: Sequence[Example],
        decoding: Decoding,
        decisions: Sequence[Decision],
        chances: Tensor,
    ) -> list[Answer]:
        """Answers that the model writes, with the confidence that their likelihood gives them."""
        handed = self.handed
        written = answer_batch(batch, self.encoder, self.sampler, handed.max_new_tokens, handed.seed, decoding)
        found = []
        for one, decision, row in zip(written, decisions, chances, strict=True):
            if one.answer is None:
                wrong = f"wrong format: {one.text[:60]!r} is no answer of the task"
                found.append(Answer(None, None, decision.probabilities, one.text, wrong))
                continue
            confidence = confidence_of(compared, row, one.answer)
            found.append(Answer(one.answer, confidence, decision.probabilities, one.text, None))
        return found


def _check_arguments(rows: Any, decoding: str, temperature: float | None, batch_size: int | None) -> None:
    if not isinstance(rows, Sequence) or isinstance(rows, str):
        raise UserError(
            f"rows: got {type(rows).__name__}; expected a list of rows, each a dictionary of column and text (of a "
            'pandas data frame: df.to_dict("records"))'
        )
    if decoding not in get_args(Decoding):
        raise UserError(f"decoding: got {decoding!r}; allowed: {', '.join(get_args(Decoding))}")
    if temperature is not None and not 0 < temperature < math.inf:
        raise UserError(f"temperature: got {temperature!r}; allowed: a number above 0")
    if batch_size is not None and batch_size < 1:
        raise UserError(f"batch_size: got {batch_size!r}; allowed: a whole number from 1")


def _check_columns(rows: Sequence[Any], task: Task) -> None:
    """Raises UserError where a column that the prompt shows stands in none of the rows: a name that is misspelt."""
    names = dict.fromkeys(str(name) for row in rows if isinstance(row, Mapping) for name in row)
    missing = [column for column in task.text_columns.values() if column not in names]
    if missing and names:
        raise UserError(
            f"rows: none has the column {', '.join(map(repr, missing))} of task {task.name}; they have: "
            f"{', '.join(map(repr, names))[:1000]}. Where there is no such text, give an empty one"
        )


def _without_probabilities(one: Answer) -> Answer:
    return replace(one, probabilities=None)


def _policy(base: Model, handed: HandOver, device: torch.device) -> Policy:
    def load(modules: Literal["auto", "all-linear"]) -> Policy:
        # Of a merged model the fresh adapter, which changes nothing, needs some layers that can have one.
        lora = Lora(rank=1, target_modules=modules)
        temperature, seed = handed.sampling_temperature, handed.seed
        return load_policy(base, lora, "none", temperature, device, seed, "base", training=False)

    try:
        return load("auto")
    except UserError as error:
        if base.adapter is not None or "lora.target_modules" not in str(error):
            raise
        return load("all-linear")


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"--device: {name!r} is not here ({' '.join(str(error).split())[:100]}); allowed: cpu, cuda, cuda:N"
        ) from error
    return device
