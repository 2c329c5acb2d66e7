"""Archives for the GLUE and SuperGLUE evaluation servers.

A task's answers are a list of (row number, label as the server calls it) in the order of the test file; three formats
write and read such lists. What was written is read back and checked before the archive gets its name.
"""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from extensions.common.errors import UserError
from extensions.data import HUB, Example, is_present, load_examples
from extensions.data.cells import SURROGATE
from extensions.evaluation.metrics import Prediction, best_candidate, groups_of
from extensions.tasks import SUITES, Task

PREDICTIONS = "predictions_test.jsonl"  # of a run folder
LARGEST = 10**9  # bytes of an archive's files together; those of GLUE are about 4 MB
Id = int | tuple[int, int, int]  # row number; of MultiRC passage, question and answer
Rows = list[tuple[Id, str | int]]


@dataclass(frozen=True)
class ArchiveEntry:
    """One file of an archive."""

    task: Task
    rows: int
    fallbacks: int  # answers with a wrong format, which got the task's fallback label
    filled: bool  # by the baseline, for want of predictions


def make_archive(
    sources: Sequence[Path], suite: str, out: Path, data_root: str | None = None, fill: str | None = None
) -> list[ArchiveEntry]:
    """Write the archive of a suite from run folders or files of predictions.

    A wrong format gets the task's `fallback` label, always the same one, since the server wants an answer to every
    row. ReCoRD's answer is the most probable candidate (`extensions.evaluation.metrics.best_candidate`).

    Args:
        sources: run folders, or JSONL files with `task`, `index` and `answer` (null for a wrong format) in each line.
        data_root: folder with the official test files, whose row numbers are then checked; else official sizes are.
        fill: "majority" gives the fallback label to every row of a task without predictions.

    Raises:
        UserError: a task has no predictions, a row has none or two, a source is malformed, or `out` cannot be written.
    """
    _check_root(data_root)
    if out.is_dir():
        raise UserError(f"{out}: is a folder; expected the name of the archive")
    by_task = read_predictions(sources)
    unknown = sorted(set(by_task) - {task.name for task in _tasks(suite)})
    if len(unknown) == len(by_task):
        raise UserError(f"no predictions for {suite}; those found are for: {', '.join(unknown)}")
    missing = [task for task in _tasks(suite) if task.name not in by_task]
    if missing and fill is None:
        raise UserError(
            f"no predictions for {', '.join(task.name for task in missing)}; the server wants every file. Add runs "
            "that have them (evaluation.predict_test=true), or fill them with --fill majority"
        )
    entries, files = [], {}
    references: dict[str, list[Example] | None] = {}  # read once: QQP's test set has 390965 rows
    for task in _tasks(suite):
        reference = references[task.name] = _reference(task, data_root)
        filled = task.name not in by_task
        predictions = _majority(task, reference) if filled else by_task[task.name]
        assert task.submission is not None
        rows = server_rows(task, predictions)
        files[task.submission.file] = encode(task, rows)
        fallbacks = 0 if filled or task.is_ranked else sum(p.answer is None for p in predictions)
        entries.append(ArchiveEntry(task, len(rows), fallbacks, filled))
    problems = _problems(files, suite, lambda task: references[task.name])
    if problems:
        raise UserError(_listed(f"{suite} submission", problems))
    temporary = out.with_name(f"{out.name}.tmp")
    try:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, text in files.items():
                info = zipfile.ZipInfo(name)  # with a fixed date: the same predictions give the same bytes
                info.compress_type = zipfile.ZIP_DEFLATED
                archive.writestr(info, text)
        os.replace(temporary, out)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise UserError(f"{out}: cannot be written ({error.strerror or error})") from error
    return entries


def check_archive(path: Path, suite: str, data_root: str | None = None) -> None:
    """Check an archive made here or elsewhere.

    Raises:
        UserError: with every problem, one a line.
    """
    _check_root(data_root)
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            size = sum(info.file_size for info in archive.infolist())  # zipfile unpacks no more than it says there
            contents = {name: archive.read(name) for name in dict.fromkeys(names)} if size <= LARGEST else {}
    except Exception as error:  # of many types: damaged, encrypted, of an unknown compression ...
        raise UserError(f"{path}: cannot be read as a zip archive ({error})") from error
    if size > LARGEST:
        raise UserError(
            f"{path}: its files are {size} bytes unpacked, more than the {LARGEST} that are read; no submission is so "
            "large, so give the archive that `nlu submit` wrote"
        )
    files = {}
    for name, content in contents.items():
        try:
            files[name] = content.decode("utf-8")
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            raise UserError(f"{path}: {name}, line {line}: not valid UTF-8 ({error.reason})") from error
    twice = sorted({name for name in names if names.count(name) > 1})
    problems = [f"{name}: is in the archive twice" for name in twice] + check_files(files, suite, data_root)
    if problems:
        raise UserError(_listed(str(path), problems))


def _check_root(data_root: str | None) -> None:
    if data_root not in (None, HUB) and not Path(data_root).is_dir():
        raise UserError(f"--data-root: {data_root!r} is not a folder")


def _tasks(suite: str) -> list[Task]:
    return [task for task in SUITES[suite] if task.submission is not None]


def _listed(what: str, problems: list[str]) -> str:
    return f"{what}: {len(problems)} problem(s)\n" + "\n".join(f"  {problem}" for problem in problems)


# ------------------------------------------------------------------------------------------------- predictions


def read_predictions(sources: Sequence[Path]) -> dict[str, list[Prediction]]:
    """Predictions by task, each task's in the order of its rows.

    Raises:
        UserError: a source is missing or malformed, or a row is answered twice.
    """
    tasks = {task.name: task for suite in SUITES.values() for task in suite}
    found: dict[str, dict[int, Prediction]] = {}
    for source in sources:
        path = source / PREDICTIONS if source.is_dir() else source
        if not path.is_file():
            hint = "; train with evaluation.predict_test=true to have it" if source.is_dir() else ""
            raise UserError(f"{path}: no such file{hint}")
        try:
            lines = path.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read as UTF-8 text ({error})") from error
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            prediction = _prediction(line, where, tasks)
            rows = found.setdefault(prediction.task, {})
            if prediction.index in rows:
                raise UserError(f"{where}: row {prediction.index} of {prediction.task} is answered twice")
            rows[prediction.index] = prediction
    if not found:
        raise UserError(f"{', '.join(map(str, sources))}: no predictions")
    return {name: [rows[index] for index in sorted(rows)] for name, rows in found.items()}


def _prediction(line: str, where: str, tasks: dict[str, Task]) -> Prediction:
    try:
        record = json.loads(line)
        name, index, answer = record["task"], record["index"], record["answer"]
        kept, positive_probability = record.get("kept", {}), record.get("positive_probability")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{where}: expected an object with task, index and answer ({error!r})") from error
    if not isinstance(name, str) or name not in tasks:
        raise UserError(f"{where}: unknown task {name!r}; allowed: {', '.join(tasks)}")
    task = tasks[name]
    if not isinstance(index, int) or isinstance(index, bool) or index < 0:
        raise UserError(f"{where}: index {index!r} is not a row number from 0")
    if task.score_range is None:
        word = isinstance(answer, str) and answer in task.labels
        fits, allowed = answer is None or word, ", ".join(task.labels)
    else:
        low, high = task.score_range
        fits, allowed = answer is None or _between(answer, low, high), f"a number from {low:g} to {high:g}"
    if not fits:
        raise UserError(f"{where}: answer {answer!r}; allowed for {name}: {allowed}, or null for a wrong format")
    if positive_probability is not None and not _between(positive_probability, 0, 1):
        raise UserError(f"{where}: positive_probability {positive_probability!r} is not a probability")
    if not isinstance(kept, dict) or (task.group_by and any(key not in kept for key in task.source.keep)):
        raise UserError(f"{where}: `kept` must hold {', '.join(task.source.keep)} for {name}")
    prediction = Prediction(
        name, index, str(record.get("text", "")), answer, record.get("gold"), kept, positive_probability
    )
    row = _id(task, prediction)
    if not all(type(part) is int and part >= 0 for part in (row if isinstance(row, tuple) else (row,))):
        raise UserError(f"{where}: `kept` has {row!r} where row numbers from 0 should be")
    if task.is_ranked and not _is_text(kept["entity"]):
        raise UserError(f"{where}: `kept` has the entity {kept['entity']!r}, expected text")
    return prediction


def _between(value: Any, low: float, high: float) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


def _is_text(value: Any) -> bool:
    """JSON can spell halves of surrogate pairs; UTF-8 cannot."""
    return isinstance(value, str) and bool(value.strip()) and not SURROGATE.search(value)


def server_rows(task: Task, predictions: Sequence[Prediction]) -> Rows:
    """Row numbers and labels as the server has them, in the order of `predictions`."""
    submission = task.submission
    assert submission is not None and task.fallback is not None
    if submission.nesting == "record":
        return [
            (group[0].kept["query"], best_candidate(task, group).kept["entity"])
            for group in groups_of(task, predictions)
        ]
    rows: Rows = []
    for prediction in predictions:
        answer = task.fallback if prediction.answer is None else prediction.answer
        label = f"{float(answer):.3f}" if task.is_regression else submission.labels.get(str(answer), str(answer))
        rows.append((_id(task, prediction), label))
    return rows


def _id(task: Task, row: Prediction | Example) -> Id:
    assert task.submission is not None
    if task.submission.nesting == "multirc":
        return row.kept["paragraph"], row.kept["question"], row.kept["answer"]
    return row.kept["query"] if task.submission.nesting == "record" else row.kept.get("idx", row.index)


def _reference(task: Task, data_root: str | None) -> list[Example] | None:
    """Rows of the test file, if there is a folder with it."""
    if data_root is None or not is_present(task, "test", data_root):
        return None
    return load_examples(task, "test", data_root)


def _majority(task: Task, reference: list[Example] | None) -> list[Prediction]:
    """The fallback label for every row; ReCoRD gets each query's first entity."""
    if reference is None and task.group_by and task.submission is not None and task.submission.nesting:
        raise UserError(
            f"--fill needs --data-root with {task.source.files['test']}: {task.display_name}'s rows are nested"
        )
    count = task.source.sizes["test"] if reference is None else len(reference)
    kept = [{}] * count if reference is None else [example.kept for example in reference]
    return [Prediction(task.name, i, "", task.fallback, None, kept[i]) for i in range(count)]


# ------------------------------------------------------------------------------------------------------ formats


def encode(task: Task, rows: Rows) -> str:
    """The text of a task's file."""
    submission = task.submission
    assert submission is not None
    if submission.file.endswith(".tsv"):
        return "index\tprediction\n" + "".join(f"{number}\t{label}\n" for number, label in rows)
    objects: list[dict[str, Any]] = [{"idx": number, "label": label} for number, label in rows]
    if submission.nesting == "multirc":
        passages: dict[int, dict[int, list[dict[str, Any]]]] = {}
        for number, label in rows:
            assert isinstance(number, tuple)
            passage, question, answer = number
            passages.setdefault(passage, {}).setdefault(question, []).append({"idx": answer, "label": label})
        objects = [
            {"idx": p, "passage": {"questions": [{"idx": q, "answers": answers} for q, answers in questions.items()]}}
            for p, questions in passages.items()
        ]
    return "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in objects)


def decode(task: Task, text: str) -> Rows:
    """What `encode` wrote, or another program.

    Raises:
        UserError: naming file and line.
    """
    submission = task.submission
    assert submission is not None
    if "\r" in text:
        first = text.count("\n", 0, text.index("\r")) + 1
        raise UserError(
            f"{submission.file}, line {first}: holds a carriage return; lines must end in a line feed alone"
        )
    rows: Rows = []
    lines = text.removesuffix("\n").split("\n")
    if submission.file.endswith(".tsv"):
        if lines[0] != "index\tprediction":
            raise UserError(f"{submission.file}, line 1: expected the header 'index\\tprediction', got {lines[0]!r}")
        for number, line in enumerate(lines[1:], start=2):
            cells = line.split("\t")
            if len(cells) != 2 or not re.fullmatch("[0-9]{1,18}", cells[0]):
                got = repr(line[:80])
                raise UserError(f"{submission.file}, line {number}: expected a row number and a label, got {got}")
            rows.append((int(cells[0]), cells[1]))
        return rows
    passages: set[int] = set()
    for number, line in enumerate(lines, start=1):
        try:
            one = json.loads(line)
            if submission.nesting == "multirc":
                rows += _answers(_new(one["idx"], passages), one["passage"]["questions"])
            else:
                rows.append((_whole(one["idx"]), _label(one["label"])))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{submission.file}, line {number}: not of the server's form ({error!r})") from error
    return rows


def _answers(passage: int, questions: Any) -> Rows:
    seen: set[int] = set()
    rows: Rows = []
    for question in questions:
        number = _new(question["idx"], seen)
        rows += [((passage, number, _whole(answer["idx"])), _label(answer["label"])) for answer in question["answers"]]
        if not question["answers"]:
            raise ValueError(f"question {number} has no answers")
    if not rows:
        raise ValueError("no questions")
    return rows


def _whole(value: Any) -> int:
    """A row number of JSON: true, 0.0 and "0" are none."""
    if type(value) is not int:
        raise ValueError(f"idx {value!r} is not a whole number")
    return value


def _new(value: Any, seen: set[int]) -> int:
    """A row number that must occur once: the server reads one object for each passage and each question."""
    if _whole(value) in seen:
        raise ValueError(f"idx {value} stands twice")
    seen.add(value)
    return value


def _label(value: Any) -> str | int:
    if not isinstance(value, (str, int)):
        raise ValueError(f"label of type {type(value).__name__}")
    return value


# --------------------------------------------------------------------------------------------------- validation


def check_files(files: dict[str, str], suite: str, data_root: str | None = None) -> list[str]:
    """Every problem of an archive's files, one sentence each; empty if the server will take them."""
    return _problems(files, suite, lambda task: _reference(task, data_root))


def _problems(files: dict[str, str], suite: str, reference_of: Callable[[Task], list[Example] | None]) -> list[str]:
    by_file = {task.submission.file: task for task in _tasks(suite) if task.submission is not None}
    problems = [f"{name}: is missing" for name in by_file if name not in files]
    problems += [f"{name}: is no file of a {suite} submission" for name in files if name not in by_file]
    for name, task in by_file.items():
        if name in files:
            try:
                problems += [
                    f"{name}: {problem}" for problem in _check_rows(task, decode(task, files[name]), reference_of(task))
                ]
            except UserError as error:
                problems.append(str(error))
    return problems


def _check_rows(task: Task, rows: Rows, reference: list[Example] | None) -> list[str]:
    problems = []
    found = [number for number, _ in rows]
    expected: list[Id] | None = None
    if reference is not None:
        expected = list(dict.fromkeys(_id(task, example) for example in reference))
    elif task.submission is not None and task.submission.nesting != "multirc":
        expected = list(range(task.source.sizes["test"]))
    size = task.source.sizes["test"] if expected is None else len(expected)
    if len(found) != size:
        problems.append(f"{len(found)} rows, expected {size}")
    seen: set[Any] = set()
    twice = [number for number in found if number in seen or seen.add(number)]  # type: ignore[func-returns-value]
    if twice:
        problems.append(f"row {_shown(twice)} more than once")
    if expected is not None:
        lacking, known = [number for number in expected if number not in seen], set(expected)
        extra = [number for number in found if number not in known]
        if lacking:
            problems.append(f"row {_shown(lacking)} missing")
        if extra:
            problems.append(f"row {_shown(extra)} not in the test set")
        if not twice and not lacking and not extra and found != expected:
            first = next(i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b)
            problems.append(f"wrong order: row {found[first]} stands where {expected[first]} should")
    return problems + _check_labels(task, rows, reference)


def _check_labels(task: Task, rows: Rows, reference: list[Example] | None) -> list[str]:
    submission = task.submission
    assert submission is not None
    if submission.nesting == "record":
        entities: dict[Id, set[str]] = {}
        for example in reference or []:
            entities.setdefault(example.kept["query"], set()).add(example.kept["entity"])
        for number, label in rows:
            if not isinstance(label, str) or not label.strip():
                return [f"row {number}: label {label!r}, expected the text of an entity"]
            if number in entities and label not in entities[number]:
                return [f"row {number}: label {label!r} is no entity of its passage"]
        return []
    if task.score_range is not None:
        low, high = task.score_range
        for number, label in rows:
            decimal = re.fullmatch(r"-?[0-9]+(\.[0-9]+)?(e-?[0-9]+)?", str(label))
            if not decimal or not low <= float(label) <= high:
                return [f"row {number}: label {label!r}, expected a number from {low:g} to {high:g}"]
        return []
    allowed = [submission.labels.get(label, label) for label in task.labels]
    for number, label in rows:
        if not any(label == one and type(label) is type(one) for one in allowed):
            return [f"row {number}: label {label!r}, expected one of {', '.join(map(repr, allowed))}"]
    return []


def _shown(numbers: Sequence[Id]) -> str:
    return ", ".join(map(str, numbers[:3])) + (f" and {len(numbers) - 3} others" if len(numbers) > 3 else "")
