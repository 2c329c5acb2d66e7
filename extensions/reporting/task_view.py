"""One task of a run as its page shows it: errors with their text, changed answers, points of a regression."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from extensions.data.sampling import evenly
from extensions.evaluation.metrics import WRONG_FORMAT
from extensions.reporting.run_view import RunView
from extensions.tasks import Task

MAX_ERRORS = 5_000  # per task, the most confident ones
MAX_TEXT = 2_000  # characters of a field or response
MAX_POINTS = 2_000  # of a scatter plot
MAX_PROBABILITIES = 6  # per row, the largest


def word_of(task: Task, answer: Any) -> str:
    """An answer as the page prints it: the label's words, the score, or "wrong format"."""
    if answer is None:
        return WRONG_FORMAT
    if task.is_regression:
        return f"{float(answer):g}"
    try:
        return task.answer(str(answer))
    except KeyError:  # a label that the recipe does not list
        return str(answer)


def confidence(task: Task, prediction: Mapping[str, Any]) -> float | None:
    """The model's probability of its answer. Multi-label: of the wrong decision that it is most sure of."""
    probabilities, answer = prediction.get("probabilities"), prediction.get("answer")
    if not probabilities or answer is None or task.is_regression:
        return None
    if not task.multi_label:
        return probabilities.get(str(answer))
    chosen, gold = (set(task.split_labels(str(one))) for one in (answer, prediction.get("gold")))
    sure = [
        p if label in chosen else 1 - p for label, p in probabilities.items() if (label in chosen) != (label in gold)
    ]
    return max(sure, default=None)


def is_error(task: Task, prediction: Mapping[str, Any]) -> bool:
    answer, gold = prediction.get("answer"), prediction.get("gold")
    if task.is_regression:
        return answer is None or float(answer) != float(str(gold))
    return answer != gold


def size_of_error(task: Task, prediction: Mapping[str, Any]) -> float | None:
    """What the errors of a task are sorted by: confidence; in a regression the distance from the gold score."""
    if not task.is_regression:
        return confidence(task, prediction)
    answer = prediction.get("answer")
    return None if answer is None else abs(float(answer) - float(str(prediction["gold"])))


def error_list(view: RunView, task: Task) -> dict[str, Any] | None:
    """The wrong answers after training, the most confident first, for the page's script; None without answers.

    Returns:
        kind, field names, labels, number of rows and of errors, and `rows`: lists of index, gold, answer, confidence
        (or distance), the answer before (null if unknown), its being right, field texts, response, probabilities.
    """
    after = view.predictions("after", task.name)
    if not after:
        return None
    before = {line["index"]: line for line in view.predictions("before", task.name)}
    errors = [line for line in after if line.get("gold") is not None and is_error(task, line)]
    sizes = {line["index"]: size_of_error(task, line) for line in errors}
    errors.sort(key=lambda line: (sizes[line["index"]] is None, -(sizes[line["index"]] or 0.0), line["index"]))
    names = list(dict.fromkeys(name for line in errors[:MAX_ERRORS] for name in line["fields"]))
    rows = []
    for line in errors[:MAX_ERRORS]:
        old = before.get(line["index"])
        rows.append(
            [
                line["index"],
                word_of(task, line["gold"]),
                word_of(task, line["answer"]),
                sizes[line["index"]],
                None if old is None else word_of(task, old["answer"]),
                None if old is None else not is_error(task, old),
                [cut(str(line["fields"].get(name, ""))) for name in names],
                cut(line["response"]),
                _largest(task, line.get("probabilities")),
            ]
        )
    return {
        "regression": task.is_regression,
        "fields": names,
        "labels": [] if task.is_regression else sorted({word for row in rows for word in row[1:3]}),
        "total": len(after),
        "errors": len(errors),
        "has_sizes": any(row[3] is not None for row in rows),
        "has_before": bool(before),
        "rows": rows,
    }


def cut(text: str) -> str:
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]} … ({len(text) - MAX_TEXT} more characters)"


def _largest(task: Task, probabilities: Mapping[str, float] | None) -> list[tuple[str, float]]:
    """The largest probabilities, by word."""
    ordered = sorted((probabilities or {}).items(), key=lambda item: -item[1])[:MAX_PROBABILITIES]
    return [(word_of(task, label), round(p, 4)) for label, p in ordered]


def changes(view: RunView, task: Task) -> dict[str, int] | None:
    """Rows by being right before and after; None without both."""
    if task.is_regression:
        return None
    before = {line["index"]: line for line in view.predictions("before", task.name)}
    after = {line["index"]: line for line in view.predictions("after", task.name)}
    common = before.keys() & after.keys()
    if not common:
        return None
    count = Counter((not is_error(task, before[i]), not is_error(task, after[i])) for i in common)
    return {
        "right before and after": count[True, True],
        "became right": count[False, True],
        "became wrong": count[True, False],
        "wrong before and after": count[False, False],
    }


def points(view: RunView, task: Task, moment: str) -> list[tuple[float, float, int]]:
    """Gold score, answer and row of a regression's parsed answers, at most `MAX_POINTS`, evenly spaced."""
    lines = [line for line in view.predictions(moment, task.name) if line["answer"] is not None and line.get("gold")]
    return [(float(line["gold"]), float(line["answer"]), line["index"]) for line in evenly(lines, MAX_POINTS)]


# ------------------------------------------------------------------------------------------------ over the run


def histories(view: RunView, task: Task) -> list[dict[str, Any]]:
    """How the answer to each followed row changed over the validations.

    Returns:
        Per row: index, fields, gold, `spans` (first and last step with the same response, response, answer, whether it
        is right), and `chances`: (step, probability of the gold label) per validation with probabilities.
    """
    by_row: dict[int, list[tuple[int, dict[str, Any]]]] = {}
    for record in view.validations:
        for answer in record.get("answers", []):
            if answer["task"] == task.name:
                by_row.setdefault(answer["index"], []).append((record["step"], answer))
    return [_history(task, index, found) for index, found in sorted(by_row.items())]


def _history(task: Task, index: int, found: Sequence[tuple[int, dict[str, Any]]]) -> dict[str, Any]:
    gold = str(found[0][1]["gold"])
    spans = []
    for _, same in groupby(found, key=lambda item: (item[1]["response"], item[1]["answer"])):
        steps, answers = zip(*same, strict=True)
        spans.append(
            {
                "first": steps[0],
                "last": steps[-1],
                "response": cut(answers[0]["response"]),
                "answer": word_of(task, answers[0]["answer"]),
                "right": not is_error(task, answers[0]),
            }
        )
    chances = [(s, a["probabilities"][gold]) for s, a in found if gold in (a.get("probabilities") or {})]
    fields = {name: cut(str(text)) for name, text in (found[0][1].get("fields") or {}).items()}
    return {"index": index, "fields": fields, "gold": word_of(task, gold), "spans": spans, "chances": chances}


def rollout_samples(view: RunView, task: Task, most: int = 12) -> list[dict[str, Any]]:
    """Training rollouts of a task, evenly spaced over the steps."""
    lines = [line for line in view.records("rollouts.jsonl") if line.get("task") == task.name and "response" in line]
    picked = [lines[i * (len(lines) - 1) // max(1, most - 1)] for i in range(most)] if len(lines) > most else lines
    return [
        {
            "step": line["step"],
            "index": line["index"],
            "response": cut(line["response"]),
            "answer": word_of(task, line.get("answer")),
            "gold": word_of(task, line.get("gold")),
            "right": not is_error(task, line),
            "reward": line.get("reward"),
        }
        for line in picked
    ]
