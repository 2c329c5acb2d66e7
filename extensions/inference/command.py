"""`nlu predict`: reads a table, and writes it with answers."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from extensions.common.console import DataConsole, say
from extensions.common.environment import keep_freed_memory
from extensions.common.errors import UserError
from extensions.data.cells import LabelColumn, label_of
from extensions.evaluation.answers import Decoding
from extensions.evaluation.likelihood import candidates
from extensions.evaluation.metrics import Prediction, score
from extensions.inference.calibration import fit_on_validation
from extensions.inference.location import locate
from extensions.inference.manifest import FILE_NAME, Manifest
from extensions.inference.predictor import Answer, Predictor, check_columns
from extensions.inference.tables import STDIN, InputTable, output_format, read_input, render_table, write_output
from extensions.reporting.scores import before_after_table, calibration_text, class_table
from extensions.tasks import Task, is_blank


@dataclass(frozen=True)
class PredictOptions:
    """The options of `nlu predict`."""

    run: str
    input: str | None
    out: Path | None
    texts: Sequence[str]  # KEY=VALUE
    probabilities: bool
    decoding: Decoding
    task: str | None
    temperature: str | None  # auto, or a number
    model: str | None
    batch_size: int | None
    device: str | None
    format: str | None  # format of standard input and output
    prefix: str  # prefix of the added columns' names
    trust_remote_code: bool


def run_predict(options: PredictOptions) -> None:
    """Run the command. Messages go to standard error; with --out the score table goes to standard output.

    Raises:
        UserError: the model, the input or an option is invalid. Single rows that cannot be answered do not raise.
    """
    messages = _console(stderr=True)
    # Everything that does not need the model is checked before it is loaded.
    location = locate(options.run)
    if location.note:
        messages.print(location.note)
    task = Manifest.load(location.folder).task(options.task)
    temperature = _temperature(options.temperature)
    source = _input(options)
    row = _texts(task, options.texts) if options.texts else None
    kind = output_format(options.out, options.format)
    table = read_input(source, task, options.format) if source is not None else None
    if table is not None:
        check_columns(task, table.columns, table.name)
        _check_added_names(table, task, options)
    read_from_file = source is not None and source != STDIN
    if read_from_file and options.out is not None and options.out.exists() and options.out.samefile(str(source)):
        raise UserError(f"--out: {str(options.out)!r} is the input itself; name another file")

    keep_freed_memory()
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    predictor = Predictor.load(location.folder, options.model, options.device, options.trust_remote_code)
    predictor.location = location

    def warn(text: str) -> None:
        messages.print(f"warning: {text}", markup=False)

    if options.temperature == "auto":
        _calibrate(predictor, task, messages)
    elif temperature is None and predictor.manifest.calibration.get(task.name) is not None:
        messages.print(f"probabilities at temperature {predictor.temperature_of(task):.3f}, fitted on validation rows")
    if row is not None:
        (one,) = predictor.predict([row], True, options.decoding, task.name, temperature, warn=warn)
        _print_answer(one)
    if table is None:
        return
    start = time.monotonic()
    with _bar(messages, len(table.rows)) as progress:
        rows: Sequence[Any] = table.rows
        answers = predictor.predict(  # with probabilities, which cost nothing and are scored
            rows, True, options.decoding, task.name, temperature, options.batch_size, progress, warn
        )
    answers = [Answer(error=table.errors[k]) if k in table.errors else one for k, one in enumerate(answers)]
    seconds = time.monotonic() - start
    write_output(options.out, render_table(table, _added_columns(task, answers, options, kind), kind))
    messages.print(f"{len(answers)} rows in {seconds:.1f} s ({len(answers) / seconds:.1f} rows/s)")
    unanswered = sum(one.error is not None for one in answers)
    if unanswered:
        column = f"{options.prefix}error"
        messages.print(f"{unanswered} of {len(answers)} rows have no answer; see the column {column!r}")
    _score(task, table, answers, messages if options.out is None else _console())


# ------------------------------------------------------------------------------------------------------------- options


def _temperature(text: str | None) -> float | None:
    if text is None or text == "auto":
        return None
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise UserError(f"--temperature: got {text!r}; allowed: auto, or a number above 0 (1: uncalibrated)")
    return value


def _input(options: PredictOptions) -> str | None:
    """The file to read; None if none is needed."""
    if options.texts:
        if options.input is not None or options.out is not None:
            raise UserError("--text answers one row and prints it; leave INPUT and --out out")
        return None
    if options.input is None and options.temperature == "auto":
        return None
    if options.input is None and sys.stdin.isatty():
        raise UserError(
            "nothing to answer: name a file (CSV, TSV, JSONL, parquet), pipe rows in, or use --text KEY=VALUE"
        )
    return STDIN if options.input is None else options.input


def _texts(task: Task, texts: Sequence[str]) -> dict[str, str]:
    """The row of `--text KEY=VALUE`; a key is a column or a field."""
    columns = task.text_columns
    row: dict[str, str] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        column = columns.get(key, key)
        if not equals or column not in columns.values():
            raise UserError(
                f"--text: got {text[:80]!r}; expected KEY=VALUE, where KEY is one of: {', '.join(columns.values())}"
            )
        row[column] = value
    missing = [column for column in columns.values() if column not in row]
    if missing:
        raise UserError(f"--text: {', '.join(missing)} missing; give each as --text {missing[0]}=...")
    return row


def _check_added_names(table: InputTable, task: Task, options: PredictOptions) -> None:
    names = ["answer", "confidence", "error"] + (["raw"] if options.decoding != "likelihood" else [])
    names += list(_probability_names(task).values()) if options.probabilities else []
    clash = [name for name in (f"{options.prefix}{name}" for name in names) if name in table.columns]
    if clash:
        raise UserError(
            f"{table.name}: has the column {', '.join(map(repr, clash))} already; rename it, or give the added columns "
            "other names with --prefix, for example --prefix model_"
        )


def _probability_names(task: Task) -> dict[str, str]:
    labels = list(task.labels) if task.score_range is None else candidates(task).keys
    return {label: f"p({label})" for label in labels}


# ------------------------------------------------------------------------------------------------------------- answers


def _added_columns(task: Task, answers: Sequence[Answer], options: PredictOptions, kind: str) -> dict[str, list[Any]]:
    """Name -> values of the added columns."""

    def number(value: float | None) -> Any:
        return f"{value:.6f}" if value is not None and kind in ("csv", "tsv") else value

    columns: dict[str, list[Any]] = {
        "answer": [one.answer for one in answers],
        "confidence": [number(one.confidence) for one in answers],
    }
    if options.probabilities:
        for label, name in _probability_names(task).items():
            columns[name] = [number(one.probabilities[label]) if one.probabilities else None for one in answers]
    if options.decoding != "likelihood":
        columns["raw"] = [one.raw for one in answers]
    if any(one.error is not None for one in answers):
        columns["error"] = [one.error for one in answers]
    return {f"{options.prefix}{name}": values for name, values in columns.items()}


def _print_answer(one: Answer) -> None:
    if one.answer is None:
        raise UserError(f"no answer: {one.error}")
    say(f"answer      {one.answer}")
    say(f"confidence  {one.confidence:.3f}")
    if one.raw is not None:
        say(f"raw         {one.raw!r}")
    for k, (label, probability) in enumerate(sorted((one.probabilities or {}).items(), key=lambda item: -item[1])):
        say(f"{'' if k else 'p':<12}{probability:.3f}  {label}")


def _console(stderr: bool = False) -> DataConsole:
    width = None if (sys.stderr if stderr else sys.stdout).isatty() else 160
    return DataConsole(stderr=stderr, soft_wrap=True, width=width)


@contextmanager
def _bar(console: DataConsole, total: int) -> Iterator[Callable[[int], None]]:
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("rows"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        shown = bar.add_task("", total=total)
        yield lambda done: bar.advance(shown, done)


def _calibrate(predictor: Predictor, task: Task, messages: DataConsole) -> None:
    """Fit the temperature, report it, and store it in the manifest."""
    with _bar(messages, 0) as progress:
        found = fit_on_validation(predictor, task, lambda text: messages.print(f"warning: {text}"), progress)
    calibration = predictor.manifest.calibration | {task.name: found.temperature}
    predictor.manifest = predictor.manifest.model_copy(update={"calibration": calibration})
    folder = predictor.location.folder
    try:
        predictor.manifest.save(folder)
        messages.print(f"{found}; stored in {folder / FILE_NAME}")
    except OSError as error:
        messages.print(f"{found}; not stored: {folder} cannot be written ({error.strerror})")


# -------------------------------------------------------------------------------------------------------------- scores


def _score(task: Task, table: InputTable, answers: Sequence[Answer], console: DataConsole) -> None:
    """Print scores, classes and calibration if the input has the task's label column."""
    column = task.source.label
    if not isinstance(column, str) or column not in table.columns:
        return
    if all(is_blank(row.get(column)) for row in table.rows):
        console.print(f"not scored: the column {column!r} is empty")
        return
    if task.group_by:
        console.print(f"not scored: the metrics of {task.display_name} are per question, over several rows")
        return
    labels, predictions = LabelColumn(task, column, table.classes), []
    for index, (row, one) in enumerate(zip(table.rows, answers, strict=True)):
        try:
            gold = label_of(row, labels, "")
        except UserError:
            continue
        found = one.probabilities
        predictions.append(Prediction(task.name, index, one.raw or "", one.answer, gold, probabilities=found))
    if not predictions:
        console.print(f"not scored: no row of column {column!r} has a label of the task")
        return
    left = len(answers) - len(predictions)
    if left:
        console.print(f"{left} rows without a label of the task are not in the scores")
    result = score(task, predictions)
    console.print(before_after_table([task], None, {task.name: result}, "given"))
    if "classes" in result:
        console.print(class_table(task, result))
    if "calibration" in result:
        console.print(calibration_text(result))
