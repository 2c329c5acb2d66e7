"""The files that the GLUE and SuperGLUE evaluation servers accept: writing, reading and checking one of them.

The answers to a task are a list of (row number, label as the server spells it) in the order of the test file.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from extensions.common.errors import UserError
from extensions.data import Example, is_present, load_examples
from extensions.evaluation.metrics import Prediction, best_candidate, groups_of
from extensions.tasks import SUITES, Submission, Task

RowId = int | tuple[int, int, int]  # row number; in MultiRC numbers of passage, question and answer
Rows = list[tuple[RowId, str | int]]


def submitted_tasks(suite: str) -> dict[str, Task]:
    """File name -> task, for all files of a suite's archive."""
    return {task.submission.file: task for task in SUITES[suite] if task.submission is not None}


def _submission(task: Task) -> Submission:
    assert task.submission is not None, "a task of `submitted_tasks`"
    return task.submission


def server_rows(task: Task, predictions: Sequence[Prediction]) -> Rows:
    """Row numbers and labels as the server spells them, in the order of `predictions`.

    A wrong format gets the task's `fallback` label; ReCoRD's answer is the best candidate of each query.
    """
    submission = _submission(task)
    if submission.nesting == "record":
        groups = groups_of(task, predictions)
        return [(group[0].kept["query"], best_candidate(task, group).kept["entity"]) for group in groups]
    assert task.fallback is not None
    rows: Rows = []
    for prediction in predictions:
        answer = task.fallback if prediction.answer is None else prediction.answer
        label = f"{float(answer):.3f}" if task.is_regression else submission.labels.get(str(answer), str(answer))
        rows.append((row_id(task, prediction), label))
    return rows


def row_id(task: Task, row: Prediction | Example) -> RowId:
    """The row id that the server expects."""
    nesting = _submission(task).nesting
    if nesting == "multirc":
        return row.kept["paragraph"], row.kept["question"], row.kept["answer"]
    return row.kept["query"] if nesting == "record" else row.kept.get("idx", row.index)


# ------------------------------------------------------------------------------------------------------ formats


def encode(task: Task, rows: Rows) -> str:
    """The text of a task's file."""
    submission = _submission(task)
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
    """The rows of a task's file, written by `encode` or by another program.

    Raises:
        UserError: the file is malformed; the message names file and line.
    """
    submission = _submission(task)
    file = submission.file
    if "\r" in text:
        first = text.count("\n", 0, text.index("\r")) + 1
        raise UserError(f"{file}, line {first}: contains a carriage return; lines must end in a line feed alone")
    rows: Rows = []
    lines = text.removesuffix("\n").split("\n")
    if file.endswith(".tsv"):
        if lines[0] != "index\tprediction":
            raise UserError(f"{file}, line 1: expected the header 'index\\tprediction', got {lines[0]!r}")
        for number, line in enumerate(lines[1:], start=2):
            cells = line.split("\t")
            if len(cells) != 2 or not re.fullmatch("[0-9]{1,18}", cells[0]):
                raise UserError(f"{file}, line {number}: expected a row number and a label, got {line[:80]!r}")
            rows.append((int(cells[0]), cells[1]))
        return rows
    passages: set[int] = set()
    for number, line in enumerate(lines, start=1):
        try:
            one = json.loads(line)
            if submission.nesting == "multirc":
                rows += _answers(_index(one, passages), one["passage"]["questions"])
            else:
                rows.append((_index(one), _label(one)))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{file}, line {number}: not the format that the server expects ({error!r})") from error
    return rows


def _answers(passage: int, questions: Any) -> Rows:
    seen: set[int] = set()
    rows: Rows = []
    for question in questions:
        number = _index(question, seen)
        rows += [((passage, number, _index(answer)), _label(answer)) for answer in question["answers"]]
        if not question["answers"]:
            raise ValueError(f"question {number} has no answers")
    if not rows:
        raise ValueError("no questions")
    return rows


def _index(record: Any, seen: set[int] | None = None) -> int:
    """The row number of a JSON object, a strict integer: not true, 0.0 or "0".

    Args:
        seen: earlier row numbers, which must differ, since the server expects one object per passage and question.
    """
    value = record["idx"]
    if type(value) is not int:
        raise ValueError(f"idx {value!r} is not an integer")
    if seen is not None:
        if value in seen:
            raise ValueError(f"idx {value} occurs twice")
        seen.add(value)
    return value


def _label(record: Any) -> str | int:
    if not isinstance(record["label"], (str, int)):
        raise ValueError(f"label of type {type(record['label']).__name__}")
    return record["label"]


# ------------------------------------------------------------------------------------------------------- checks


def official_rows(task: Task, data_root: str | None) -> list[Example] | None:
    """Rows of the official test file; None if it does not exist."""
    if data_root is None or not is_present(task, "test", data_root):
        return None
    return load_examples(task, "test", data_root)


def check_files(
    files: dict[str, str], suite: str, reference_of: Callable[[Task], Sequence[Example] | None]
) -> list[str]:
    """Every problem of an archive's files, one sentence each; empty if the server accepts them.

    Args:
        files: file name -> text.
        reference_of: task -> its `official_rows`; None: only the official sizes are checked.
    """
    tasks = submitted_tasks(suite)
    problems = [f"{name}: is missing" for name in tasks if name not in files]
    problems += [f"{name}: is no file of a {suite} submission" for name in files if name not in tasks]
    for name, task in tasks.items():
        if name in files:
            try:
                rows, reference = decode(task, files[name]), reference_of(task)
            except UserError as error:
                problems.append(str(error))
            else:
                found = _row_problems(task, [number for number, _ in rows], reference)
                problems += [f"{name}: {problem}" for problem in found + _label_problems(task, rows, reference)]
    return problems


def _row_problems(task: Task, found: list[RowId], reference: Sequence[Example] | None) -> list[str]:
    """Missing, repeated, unknown and misplaced rows. Without its official file, MultiRC's row ids are unknown."""
    size = task.source.sizes["test"]
    expected: list[RowId] | None = None if _submission(task).nesting == "multirc" else list(range(size))
    if reference is not None:
        expected = list(dict.fromkeys(row_id(task, example) for example in reference))
        size = len(expected)
    counts, known = Counter(found), set(found if expected is None else expected)
    faults = {
        "more than once": [number for number, count in counts.items() if count > 1],
        "missing": [number for number in expected or () if number not in counts],
        "not in the test set": [number for number in counts if number not in known],
    }
    problems = [f"{len(found)} rows, expected {size}"] if len(found) != size else []
    problems += [f"row {_listed(numbers)} {fault}" for fault, numbers in faults.items() if numbers]
    if expected is not None and not problems and found != expected:
        first = next(i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b)
        problems.append(f"wrong order: got row {found[first]}, expected row {expected[first]}")
    return problems


def _label_problems(task: Task, rows: Rows, reference: Sequence[Example] | None) -> list[str]:
    """The first label that the server does not accept, if any."""
    submission = _submission(task)
    if submission.nesting == "record":
        entities: dict[RowId, set[str]] = {}
        for example in reference or ():
            entities.setdefault(example.kept["query"], set()).add(example.kept["entity"])
        expected = "the text of an entity of its passage"

        def is_allowed(number: RowId, label: str | int) -> bool:
            return isinstance(label, str) and bool(label.strip()) and label in entities.get(number, {label})

    elif task.score_range is not None:
        low, high = task.score_range
        expected = f"a number from {low:g} to {high:g}"

        def is_allowed(number: RowId, label: str | int) -> bool:
            decimal = re.fullmatch(r"-?[0-9]+(\.[0-9]+)?(e-?[0-9]+)?", str(label))
            return decimal is not None and low <= float(label) <= high

    else:
        allowed = [submission.labels.get(label, label) for label in task.labels]
        typed = {(type(one), one) for one in allowed}  # True is not 1
        expected = f"one of {', '.join(map(repr, allowed))}"

        def is_allowed(number: RowId, label: str | int) -> bool:
            return (type(label), label) in typed

    wrong = next(((number, label) for number, label in rows if not is_allowed(number, label)), None)
    return [] if wrong is None else [f"row {wrong[0]}: label {wrong[1]!r}, expected {expected}"]


def _listed(numbers: Sequence[RowId]) -> str:
    return ", ".join(map(str, numbers[:3])) + (f" and {len(numbers) - 3} others" if len(numbers) > 3 else "")
