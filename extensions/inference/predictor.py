"""`Predictor`: a trained model that answers rows."""

from __future__ import annotations

import math
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from extensions.common.errors import UserError
from extensions.data import Example
from extensions.data.cells import text_of
from extensions.data.checks import check_lengths
from extensions.data.row_errors import RowError
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
from extensions.inference.location import Location, base_of, locate
from extensions.inference.manifest import Manifest
from extensions.model.loading import load_config, load_policy, load_tokenizer
from extensions.model.policy import Policy
from extensions.planner.devices import total_memory
from extensions.planner.limits import may_be_large, rank_memory_of
from extensions.prefix.limits import MemoryLimits
from extensions.prompts import CLOSE, PromptEncoder
from extensions.recipe import Evaluation, Lora, Model
from extensions.rollout.sampler import Sampler
from extensions.tasks import Task


@dataclass(frozen=True)
class Answer:
    """The answer to one row."""

    answer: str | float | None = None  # a label as in the training data, labels joined by ", ", or a score
    confidence: float | None = None  # probability of the answer among the task's; None without an answer
    probabilities: dict[str, float] | None = None  # per label (regression: per score), if requested
    raw: str | None = None  # the generated text, with decoding sample or greedy
    error: str | None = None  # why there is no answer


class Predictor:
    """A trained model that answers rows.

        predictor = Predictor.load("runs/tickets")
        (found,) = predictor.predict([{"subject": "Refund", "ticket body": "I was charged twice."}])
        print(found.answer, found.confidence)

    Attributes:
        location: folder of the model.
        manifest: its tasks, prompt format, decoding and calibration.
    """

    def __init__(self, location: Location, manifest: Manifest, encoder: PromptEncoder, sampler: Sampler) -> None:
        self.location, self.manifest, self.encoder, self.sampler = location, manifest, encoder, sampler
        self._lock = threading.Lock()  # a policy serves one role at a time

    @classmethod
    def load(
        cls,
        path: str | Path,
        model: str | None = None,
        device: str | None = None,
        trust_remote_code: bool = False,
    ) -> Predictor:
        """Load the model of a run folder, an adapter folder or a merged model.

        Args:
            path: the folder; if `runs/NAME` does not exist, `runs/NAME-sft` is used.
            model: folder or hub name of the base model, if it has moved since the training.
            device: cpu, cuda, cuda:1, ...; None: the GPU if there is one.
            trust_remote_code: run Python code that comes with the base model.

        Raises:
            UserError: there is no such model, its files are damaged, or the base differs from that of the training.
        """
        location = locate(path)
        manifest = Manifest.load(location.folder)
        base = base_of(location, manifest, model, trust_remote_code)
        if not (location.folder / "tokenizer_config.json").is_file():
            raise UserError(f"{location.folder}: has no tokenizer (tokenizer_config.json); copy the whole folder")
        # The tokenizer saved by the training: the base's may lack the tokens that end an answer.
        tokenizer = load_tokenizer(Model(path=str(location.folder), trust_remote_code=trust_remote_code))
        form = manifest.prompt
        shown = {name: list(rows) for name, rows in form.demonstrations.items()}
        encoder = PromptEncoder(
            tokenizer, form.max_tokens, form.chat_template, form.shots, shown, form.template_options
        )
        policy = _policy(base, manifest, _device(device))
        limits = _limits(base, policy)
        sampler = Sampler(policy, tokenizer, CLOSE, Evaluation().micro_batch_size, limits=limits)
        return cls(location, manifest, encoder, sampler)

    def predict(
        self,
        rows: Sequence[Mapping[str, Any]],
        probabilities: bool = False,
        decoding: Decoding = "likelihood",
        task: str | None = None,
        temperature: float | None = None,
        batch_size: int | None = None,
        progress: Callable[[int], None] = lambda answered: None,
        warn: Callable[[str], None] = warnings.warn,
    ) -> list[Answer]:
        """One answer per row, in order. A row that cannot be answered gets an error; the others are answered.

        Args:
            rows: column name, as in the training data -> text. Other columns are ignored.
            probabilities: also return the probability of each label.
            decoding: "likelihood" takes the most probable of the task's answers; "sample" and "greedy" generate one,
                as the paper does.
            task: name; required if the model has several tasks.
            temperature: calibration temperature; None: the fitted one (`nlu predict --temperature auto`), else 1.
            batch_size: rows per batch; None: the default of an evaluation.
            progress: called with the number of rows answered since the last call.
            warn: called with one line if texts are truncated; it names the first of these rows, which count from 0.

        Raises:
            UserError: an argument is invalid, the model has no such task, or its output is non-finite.
        """
        _check_arguments(rows, decoding, temperature, batch_size)
        chosen = self.manifest.task(task)
        names = dict.fromkeys(str(name) for row in rows if isinstance(row, Mapping) for name in row)
        if names:
            check_columns(chosen, names, "rows")
        compared = candidates(chosen, self.manifest.label_sets.get(chosen.name, ()))
        scale = self.temperature_of(chosen) if temperature is None else temperature
        answers: dict[int, Answer] = {}
        examples = []
        for index, row in enumerate(rows):
            try:
                examples.append(self.example(chosen, index, row))
            except UserError as error:
                detail = error.detail.lstrip(":, ") if isinstance(error, RowError) else str(error)
                answers[index] = Answer(error=detail)
        check_lengths(self.encoder, examples, "rows", warn)
        progress(len(answers))
        for batch in in_batches(examples, batch_size or Evaluation().batch_size):
            with self._lock:
                logprobs = self.log_likelihoods(compared, batch)
                calibrated = answer_probabilities(logprobs, scale)
                decisions = decide(compared, answer_probabilities(logprobs), calibrated)
                if decoding == "likelihood":
                    found = [Answer(d.answer, d.confidence, d.probabilities) for d in decisions]
                else:
                    found = self._generated(compared, batch, decoding, decisions, calibrated)
            for example, one in zip(batch, found, strict=True):
                answers[example.index] = one if probabilities else replace(one, probabilities=None)
            progress(len(batch))
        return [answers[index] for index in range(len(rows))]

    def temperature_of(self, task: Task) -> float:
        """The calibration temperature of a task; 1 if none was fitted."""
        return self.manifest.calibration.get(task.name) or 1.0

    def example(self, task: Task, index: int, row: Mapping[str, Any]) -> Example:
        """A row as an example without a label.

        Raises:
            UserError: a column or a text is missing, or the prompt cannot fit.
        """
        if not isinstance(row, Mapping):
            raise UserError(f"expected a dictionary of column and text, got {type(row).__name__}")
        where, own, may_lack = f"row {index + 1}", task.suite == "own", task.source.incomplete != "error"
        cells: dict[str | int, Any] = dict(row.items())
        fields = {name: text_of(cells, column, where, may_lack, own) for name, column in task.text_columns.items()}
        if own and not any(fields.values()):
            raise UserError("all texts are empty")
        self.encoder.check(task, fields)
        return Example(task, index, fields, None)

    def log_likelihoods(self, compared: Candidates, batch: Sequence[Example]) -> Tensor:
        """(rows, C) log-probabilities of the candidate answers, summed over their forms."""
        encoded = [self.encoder.encode(compared.task, row.fields) for row in batch]
        return log_likelihoods(compared, encoded, self.encoder, self.sampler)

    def _generated(
        self,
        compared: Candidates,
        batch: Sequence[Example],
        decoding: Decoding,
        decisions: Sequence[Decision],
        calibrated: Tensor,
    ) -> list[Answer]:
        """Generated answers, with confidences by likelihood."""
        budget, seed = self.manifest.max_new_tokens, self.manifest.seed
        answers = []
        for one, decision, row in zip(
            answer_batch(batch, self.encoder, self.sampler, budget, seed, decoding), decisions, calibrated, strict=True
        ):
            found = Answer(probabilities=decision.probabilities, raw=one.response)
            if one.answer is None:
                wrong = f"wrong format: {one.response[:60]!r} is not an answer of the task"
                answers.append(replace(found, error=wrong))
            else:
                answers.append(replace(found, answer=one.answer, confidence=confidence_of(compared, row, one.answer)))
        return answers


def _limits(base: Model, policy: Policy) -> MemoryLimits:
    """The bounds of forwards and caches that the device's memory allows, where rows may be long enough to matter."""
    lm, device = policy.causal_lm, policy.device
    config = load_config(base)
    longest = getattr(config.get_text_config(), "max_position_embeddings", None) or 2**15
    on_cpu, total, how = device.type == "cpu", total_memory(device), (policy.path.attention, policy.path.form)
    settings = Evaluation()
    memory = None
    if may_be_large(config, max(settings.batch_size, settings.micro_batch_size), longest, total, how[0]):
        dtype: Any = str(lm.dtype).removeprefix("torch.")
        known = base.model_copy(update={"dtype": dtype})
        memory = rank_memory_of(known, Lora(rank=1, target_modules="all-linear"), config, on_cpu, total, *how)
    advice = "Use a smaller --batch-size, or shorten the text"
    if memory is None:
        return MemoryLimits(warn=_to_stderr, advice=advice)
    return MemoryLimits(memory.limit(2**31, False), memory.cache_tokens, warn=_to_stderr, advice=advice)


def _to_stderr(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


def check_columns(task: Task, columns: Iterable[str], where: str) -> None:
    """Raise UserError if a column of the prompt is missing from `columns`, the columns of `where`."""
    needed, present = list(task.text_columns.values()), list(columns)
    missing = [column for column in needed if column not in present]
    if missing:
        raise UserError(
            f"{where}: no column {', '.join(map(repr, missing))}. Task {task.name} needs: "
            f"{', '.join(map(repr, needed))}; found: {', '.join(map(repr, present))[:1000]}. If rows have no such "
            "text, add the column with empty texts"
        )


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


def _policy(base: Model, manifest: Manifest, device: torch.device) -> Policy:
    def load(modules: Literal["auto", "all-linear"]) -> Policy:
        # A merged model gets a fresh adapter, which has no effect but needs target modules.
        lora = Lora(rank=1, target_modules=modules)
        temperature, seed = manifest.sampling_temperature, manifest.seed
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
            f"--device: {name!r} is not available ({' '.join(str(error).split())[:100]}); allowed: cpu, cuda, cuda:N"
        ) from error
    return device
