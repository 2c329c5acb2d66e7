"""Archives for the GLUE and SuperGLUE evaluation servers, from the predictions of runs.

An archive is encoded, decoded again and checked before it is written.
"""

from __future__ import annotations

import io
import json
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from extensions.common.errors import UserError
from extensions.common.files import write_bytes
from extensions.data import HUB, Example
from extensions.data.cells import SURROGATE
from extensions.evaluation.metrics import Prediction
from extensions.evaluation.server_files import check_files, encode, official_rows, row_id, server_rows, submitted_tasks
from extensions.tasks import SUITES, Task

PREDICTIONS = "predictions_test.jsonl"  # in a run folder
MAX_BYTES = 10**9  # decompressed files of an archive, in total; GLUE's have about 4 MB


@dataclass(frozen=True)
class ArchiveEntry:
    """One file of an archive."""

    task: Task
    rows: int
    fallbacks: int  # answers with a wrong format, replaced by the task's fallback label
    filled: bool  # filled by the majority baseline, without predictions


def make_archive(
    sources: Sequence[Path], suite: str, out: Path, data_root: str | None = None, fill: str | None = None
) -> list[ArchiveEntry]:
    """Write the archive of a suite from run folders or files of predictions.

    The server expects an answer to every row, so a wrong format gets the task's `fallback` label. Archives of the same
    predictions are byte-identical.

    Args:
        sources: run folders, or JSONL files with `task`, `index` and `answer` (null for a wrong format) per line.
        data_root: folder of the official test files, to check every row number; None: official sizes are checked.
        fill: "majority" gives the fallback label to every row of a task without predictions.

    Raises:
        UserError: a task has no predictions, a row has none or two, a source is malformed, or `out` cannot be written.
    """
    _check_root(data_root)
    if out.is_dir():
        raise UserError(f"{out}: is a folder; expected the name of the archive")
    by_task, tasks = read_predictions(sources), submitted_tasks(suite)
    known = {task.name for task in tasks.values()}
    if not known & by_task.keys():
        raise UserError(f"no predictions for {suite}; those found are for: {', '.join(sorted(by_task))}")
    missing = [task.name for task in tasks.values() if task.name not in by_task]
    if missing and fill is None:
        raise UserError(
            f"no predictions for {', '.join(missing)}; the server expects every file. Add runs that have them "
            "(evaluation.predict_test=true), or fill them with --fill majority"
        )
    entries, files = [], {}
    # Read once, since QQP has 390965 rows.
    references = {task.name: official_rows(task, data_root) for task in tasks.values()}
    for file, task in tasks.items():
        filled = task.name in missing
        predictions = _majority(task, references[task.name]) if filled else by_task[task.name]
        rows = server_rows(task, predictions)
        files[file] = encode(task, rows)
        fallbacks = 0 if filled or task.is_ranked else sum(p.answer is None for p in predictions)
        entries.append(ArchiveEntry(task, len(rows), fallbacks, filled))
    _raise(f"{suite} submission", check_files(files, suite, lambda task: references[task.name]))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, text in files.items():  # ZipInfo has a fixed date
            archive.writestr(zipfile.ZipInfo(name), text, zipfile.ZIP_DEFLATED)
    try:
        write_bytes(out, buffer.getvalue())
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror or error})") from error
    return entries


def archive_table(entries: Sequence[ArchiveEntry]) -> Table:
    """The files of an archive, their rows, and how many answers were replaced."""
    table = Table("file", "rows", "wrong format, given the fallback label", "from")
    for entry in entries:
        assert entry.task.submission is not None
        share = f"{entry.fallbacks} ({100 * entry.fallbacks / entry.rows:.1f}%)"
        wrong = "-" if entry.filled or entry.task.is_ranked else f"{share}, {entry.task.fallback!r}"
        origin = "majority baseline" if entry.filled else "predictions"
        table.add_row(entry.task.submission.file, str(entry.rows), wrong, origin)
    return table


def check_archive(path: Path, suite: str, data_root: str | None = None) -> None:
    """Check an archive, written here or by another program.

    Raises:
        UserError: with every problem, one per line.
    """
    _check_root(data_root)
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            size = sum(info.file_size for info in archive.infolist())  # zipfile never decompresses more than this
            contents = {name: archive.read(name) for name in dict.fromkeys(names)} if size <= MAX_BYTES else {}
    except Exception as error:  # zipfile raises many types: damaged, encrypted, unknown compression ...
        raise UserError(f"{path}: cannot be read as a zip archive ({error})") from error
    if size > MAX_BYTES:
        raise UserError(
            f"{path}: its files are {size} bytes decompressed, more than the {MAX_BYTES} allowed; no submission is "
            "that large, so give the archive that `nlu submit` wrote"
        )
    files = {}
    for name, content in contents.items():
        try:
            files[name] = content.decode("utf-8")
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            raise UserError(f"{path}: {name}, line {line}: not valid UTF-8 ({error.reason})") from error
    twice = sorted({name for name in names if names.count(name) > 1})
    problems = [f"{name}: is in the archive twice" for name in twice]
    _raise(str(path), problems + check_files(files, suite, partial(official_rows, data_root=data_root)))


def _check_root(data_root: str | None) -> None:
    if data_root not in (None, HUB) and not Path(data_root).is_dir():
        raise UserError(f"--data-root: {data_root!r} is not a folder")


def _raise(source: str, problems: Sequence[str]) -> None:
    if problems:
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise UserError(f"{source}: {len(problems)} problem(s)\n{lines}")


def _majority(task: Task, reference: list[Example] | None) -> list[Prediction]:
    """The fallback label for every row; for ReCoRD the first entity of each query."""
    if reference is None and task.group_by and task.submission is not None and task.submission.nesting:
        raise UserError(
            f"--fill needs --data-root with {task.source.files['test']}: the rows of {task.display_name} are nested"
        )
    kept = [{}] * task.source.sizes["test"] if reference is None else [example.kept for example in reference]
    return [Prediction(task.name, i, "", task.fallback, None, columns) for i, columns in enumerate(kept)]


# ------------------------------------------------------------------------------------------------- predictions


def read_predictions(sources: Sequence[Path]) -> dict[str, list[Prediction]]:
    """Predictions by task, in row order.

    Raises:
        UserError: a source is missing or malformed, or a row is answered twice.
    """
    tasks = {task.name: task for suite in SUITES.values() for task in suite}
    found: dict[str, dict[int, Prediction]] = {}
    for source in sources:
        path = source / PREDICTIONS if source.is_dir() else source
        if not path.is_file():
            hint = "; run with evaluation.predict_test=true to write it" if source.is_dir() else ""
            raise UserError(f"{path}: no such file{hint}")
        try:
            lines = path.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read as UTF-8 text ({error})") from error
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                prediction = _prediction(line, tasks)
                rows = found.setdefault(prediction.task, {})
                if prediction.index in rows:
                    raise ValueError(f"row {prediction.index} of {prediction.task} is answered twice")
            except ValueError as error:
                raise UserError(f"{path}, line {number}: {error}") from error
            rows[prediction.index] = prediction
    if not found:
        raise UserError(f"{', '.join(map(str, sources))}: no predictions")
    return {name: [rows[index] for index in sorted(rows)] for name, rows in found.items()}


def _prediction(line: str, tasks: dict[str, Task]) -> Prediction:
    """A line of a predictions file. Raises ValueError if it is malformed."""
    try:
        record = json.loads(line)
        name, index, answer = record["task"], record["index"], record["answer"]
        kept, probability = record.get("kept", {}), record.get("positive_probability")
        log_odds = record.get("positive_log_odds")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"expected an object with task, index and answer ({error!r})") from error
    if not isinstance(name, str) or name not in tasks:
        raise ValueError(f"unknown task {name!r}; allowed: {', '.join(tasks)}")
    task = tasks[name]
    if not _is_index(index):
        raise ValueError(f"index {index!r} is not a row number from 0")
    if task.score_range is None:
        fits, allowed = isinstance(answer, str) and answer in task.labels, ", ".join(task.labels)
    else:
        low, high = task.score_range
        fits, allowed = _is_between(answer, low, high), f"a number from {low:g} to {high:g}"
    if not (fits or answer is None):
        raise ValueError(f"answer {answer!r}; allowed for {name}: {allowed}, or null for a wrong format")
    if not (probability is None or _is_between(probability, 0, 1)):
        raise ValueError(f"positive_probability {probability!r} is not a probability")
    if not (log_odds is None or _is_between(log_odds, -sys.float_info.max, sys.float_info.max)):
        raise ValueError(f"positive_log_odds {log_odds!r} is not a finite number")
    if not isinstance(kept, dict) or (task.group_by and any(key not in kept for key in task.source.keep)):
        raise ValueError(f"`kept` must hold {', '.join(task.source.keep)} for {name}")
    response, gold = str(record.get("response", "")), record.get("gold")
    prediction = Prediction(name, index, response, answer, gold, kept, probability, positive_log_odds=log_odds)
    row = row_id(task, prediction)
    if not all(map(_is_index, row if isinstance(row, tuple) else [row])):
        raise ValueError(f"`kept` has {row!r}, expected row numbers from 0")
    if task.is_ranked:
        entity = kept["entity"]
        if not isinstance(entity, str) or not entity.strip() or SURROGATE.search(entity):  # UTF-8 has no surrogates
            raise ValueError(f"`kept` has the entity {entity!r}, expected text")
    return prediction


def _is_index(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_between(value: Any, low: float, high: float) -> bool:
    return type(value) in (int, float) and low <= value <= high
