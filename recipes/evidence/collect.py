"""From run folders to the tables in `results/`: a line per run, per mean over seeds, per yardstick; and the answers."""

from __future__ import annotations

import csv
import io
import json
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from cells import DATA, Evidence, EvidenceCell, read_lines, training_seconds
from run import USAGE

from extensions.common.files import read_json, read_jsonl, write_text
from extensions.evaluation.bootstrap import weighted_metrics
from extensions.evaluation.metrics import Prediction, arrays_of
from extensions.reporting.finished_runs import DecodedScore, FinishedRun, YardstickScore, read_run
from extensions.tasks import Task, find_task

DATA_ROOT = "path/to/data"  # in place of this machine's folder
RESAMPLES = 2000
DECODINGS = ("sampled", "likelihood")
# The columns that identify a line; a line that is collected again replaces the old one.
KEYS = {
    "runs.csv": ("cell",),
    "answers.csv": ("cell", "decoding"),
    "means.csv": ("task", "method", "rows", "variant", "seconds_of", "decoding"),
    "yardsticks.csv": ("task", "kind", "rows", "seed"),
}

Line = dict[str, Any]


def collect(evidence: Evidence, data: Path = DATA) -> int:
    """Write the numbers of all finished cells to `data`; lines of cells without a run folder are kept.

    Returns:
        The number of finished cells.
    """
    runs = {cell: read_run(evidence.folder(cell)) for cell in evidence.cells if evidence.is_finished(cell)}
    sessions = read_jsonl(evidence.out / USAGE) if (evidence.out / USAGE).exists() else []
    data.mkdir(parents=True, exist_ok=True)

    def merge(name: str, found: Sequence[Line]) -> list[Line]:
        lines = _merged(read_lines(data / name), found, KEYS[name])
        write_lines(data / name, lines)
        return lines

    merge("runs.csv", [_run_line(evidence, cell, run, sessions) for cell, run in runs.items()])
    merge("yardsticks.csv", [line for cell, run in runs.items() for line in _yardstick_lines(cell, run)])
    answers = merge("answers.csv", [line for cell in runs for line in _answer_lines(evidence, cell)])
    merge("means.csv", _mean_lines(evidence, {(line["cell"], line["decoding"]): _arrays(line) for line in answers}))
    return len(runs)


def write_lines(path: Path, lines: Sequence[Line]) -> None:
    if not lines:
        return
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    write_text(path, text.getvalue())


def _merged(old: Iterable[Line], new: Iterable[Line], keys: Sequence[str]) -> list[Line]:
    """The lines by their keys, in a fixed order."""
    by_key = {tuple(str(line[key]) for key in keys): line for line in (*old, *new)}
    return [by_key[key] for key in sorted(by_key)]


def _key(cell: EvidenceCell) -> Line:
    return {
        "task": cell.task,
        "method": cell.method,
        "rows": cell.rows,
        "variant": cell.variant or "",
        "seconds_of": cell.seconds_of or "",
    }


def _run_line(evidence: Evidence, cell: EvidenceCell, run: FinishedRun, sessions: Sequence[Line]) -> Line:
    score, task = run.scores.after[cell.task], find_task(cell.task)
    metric, calibration = task.metrics[0], score.calibration
    by_likelihood = run.recipe.evaluation.decoding == "likelihood"
    own = [session for session in sessions if session["cell"] == cell.name]
    training = run.training
    cpu = training_seconds(run.folder)[0] if training.steps else None
    return {
        "cell": cell.name,
        **_key(cell),
        "seed": cell.seed,
        "metric": metric,
        **_value("sampled", None if by_likelihood else score, metric),
        **_value("likelihood", score if by_likelihood else score.likelihood, metric),
        "evaluated": score.samples,
        "wrong_format": _number(None if by_likelihood else score.format_error_rate),
        "parsers_differ": "" if score.parsers_differ is None else score.parsers_differ,
        "gold_shares": _shares(score.gold_shares),
        "sampled_shares": _shares({} if by_likelihood else score.predicted_shares),
        "likelihood_shares": _shares(
            score.predicted_shares if by_likelihood else score.likelihood.predicted_shares if score.likelihood else {}
        ),
        "ece": _number(calibration.ece if calibration else None),
        "log_loss": _number(calibration.log_loss if calibration else None),
        "brier": _number(calibration.brier if calibration else None),
        "steps": training.steps,
        "samples": training.samples,
        "training_s": _number(training.seconds, 1),
        "training_cpu_s": _number(cpu, 1),
        "run_s": _number(sum(s["wall_s"] for s in own), 1),
        "run_cpu_s": _number(sum(s["user_s"] + s["system_s"] for s in own), 1),
        "started": own[0]["started"] if own else "",
        **_machine(run, own),
        "command": _portable(evidence, own[-1]["command"]) if own else "",
    }


def _value(name: str, score: DecodedScore | None, metric: str) -> Line:
    found = (None, None, None) if score is None else (score.metrics[metric], *score.intervals[metric])
    return _triple(name, f"{name}_low", f"{name}_high", found)


def _triple(name: str, low: str, high: str, numbers: Sequence[float | None]) -> Line:
    """A number and its interval, empty without one."""
    return dict(zip((name, low, high), map(_number, numbers), strict=True))


def _number(value: float | None, digits: int = 6) -> float | str:
    return "" if value is None else round(value, digits)


def _shares(shares: Mapping[str, float]) -> str:
    return json.dumps({word: round(share, 4) for word, share in shares.items()}, ensure_ascii=False)


def _machine(run: FinishedRun, own: Sequence[Line]) -> Line:
    versions = read_json(run.folder / "versions.json")
    session = own[-1] if own else {}
    threads = f"OMP_NUM_THREADS={session['threads']}" if session.get("threads") else "all threads"
    packages = ", ".join(f"{name} {version}" for name, version in versions["packages"].items() if version)
    return {
        "commit": (versions["git"] or "unknown")[:12],
        "machine": f"{session.get('processor', '')}, {versions['processors']} processors, {threads}".strip(", "),
        "versions": f"Python {versions['python']}, {packages}",
    }


def _portable(evidence: Evidence, command: str) -> str:
    """A command without this machine's folders: `bash launch/METHOD.sh recipes/FILE KEYS`, from any checkout."""
    words = [f"data.root={DATA_ROOT}" if word.startswith("data.root=") else word for word in shlex.split(command)]
    words[1:3] = [str(Path(*Path(word).parts[-2:])) for word in words[1:3]]
    text = shlex.join(word for word in words if not word.startswith("name="))
    return text.replace(str(evidence.out), "runs/evidence")


def _yardstick_lines(cell: EvidenceCell, run: FinishedRun) -> list[Line]:
    if cell.seconds_of or cell.variant:
        return []
    metric = find_task(cell.task).metrics[0]

    def line(kind: str, score: YardstickScore) -> Line:
        value = {"task": cell.task, "kind": kind, "rows": cell.rows, "seed": cell.seed, "metric": metric}
        costs = {"train_rows": score.train_rows, "seconds": _number(score.seconds, 2)}
        return value | _value("value", score, metric) | costs

    found = run.scores.yardsticks.items()
    return [line(kind, scores[cell.task]) for kind, scores in found if cell.task in scores]


# ---------------------------------------------------------------------------------------------------------- answers

Arrays = tuple[np.ndarray, np.ndarray]  # golds and answers of `arrays_of`


def _answer_lines(evidence: Evidence, cell: EvidenceCell) -> Iterator[Line]:
    """The answers of a finished cell, of which later sessions, without its run folder, take means and differences."""
    records = read_jsonl(evidence.folder(cell) / "predictions_after.jsonl")
    found = {"sampled": [Prediction(**{key: value for key, value in r.items() if key != "fields"}) for r in records]}
    if evidence.recipe(cell).evaluation.decoding == "likelihood":
        found = {"likelihood": found["sampled"]}
    elif all(prediction.likelihood is not None for prediction in found["sampled"]):
        found["likelihood"] = [replace(prediction, answer=prediction.likelihood) for prediction in found["sampled"]]
    for decoding, predictions in found.items():
        golds, answers = (" ".join(map(str, array.tolist())) for array in arrays_of(find_task(cell.task), predictions))
        yield {"cell": cell.name, "decoding": decoding, "golds": golds, "answers": answers}


def _arrays(line: Mapping[str, str]) -> Arrays:
    """The golds and answers of a line: label indices, -1 for a wrong format, or scores."""
    golds, answers = (np.array([*map(float, line[key].split())]) for key in ("golds", "answers"))
    labels = find_task(line["cell"].partition("/")[0]).labels
    return (golds.astype(int), answers.astype(int)) if labels else (golds, answers)


# ------------------------------------------------------------------------------------------------- means over seeds


def _mean_lines(evidence: Evidence, answers: Mapping[tuple[str, str], Arrays]) -> list[Line]:
    """The mean over the seeds of each setting, and its difference to the method that its table compares with.

    Args:
        answers: by the cell's name and the decoding.
    """
    groups: dict[tuple[Any, ...], list[EvidenceCell]] = {}
    for cell in evidence.cells:
        groups.setdefault(tuple(_key(cell).values()), []).append(cell)
    lines = []
    for group, decoding in product(groups.values(), DECODINGS):
        own = {cell.seed: answers[cell.name, decoding] for cell in group if (cell.name, decoding) in answers}
        if not own:
            continue
        against = evidence.content["tables"][group[0].table]["against"]
        # At equal seconds the compared method is the one that gives the seconds, whose own cell has none.
        names = {seed: replace(group[0].like(against), seed=seed).name for seed in own}
        other = {seed: answers[name, decoding] for seed, name in names.items() if (name, decoding) in answers}
        pairs = [(own[seed], other[seed]) for seed in other if np.array_equal(own[seed][0], other[seed][0])]
        task = find_task(group[0].task)
        compared = bool(pairs) and group[0].method != against
        change = mean_interval(task, *map(list, zip(*pairs, strict=True))) if compared else (None, None, None)
        lines.append(
            _key(group[0])
            | {"decoding": decoding, "seeds": " ".join(map(str, sorted(own)))}
            | _triple("value", "low", "high", mean_interval(task, list(own.values())))
            | {"against": against if compared else ""}
            | _triple("difference", "difference_low", "difference_high", change)
        )
    return lines


def mean_interval(task: Task, runs: Sequence[Arrays], others: Sequence[Arrays] = ()) -> tuple[float, float, float]:
    """The task's first metric, averaged over runs on the same rows, less that of `others`; and its 95% interval.

    A bootstrap over the rows: a resample has the same rows in every run, so that a difference is a paired one. It
    does not hold the spread over seeds.
    """
    metric, count = task.metrics[0], len(runs[0][0])
    rng = np.random.default_rng(0)
    weights = np.concatenate([np.ones((1, count)), rng.multinomial(count, np.full(count, 1 / count), RESAMPLES)])
    positive = None if task.positive is None else list(task.labels).index(task.positive)

    def mean(many: Sequence[Arrays]) -> Any:
        return np.mean([weighted_metrics(weights, *one, len(task.labels), positive)[metric] for one in many], axis=0)

    values = mean(runs) - (mean(others) if others else 0)
    low, high = np.percentile(values[1:], [2.5, 97.5])
    return float(values[0]), float(low), float(high)
