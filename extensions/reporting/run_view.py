"""A run folder, finished or not, as its page shows it: records, status, results, what can be said about them."""

from __future__ import annotations

import csv
import fcntl
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic_core import PydanticUndefined

from extensions.common.files import read_json, read_jsonl
from extensions.recipe import Recipe, adapter_name, all_keys, load_recipe, value_at
from extensions.reporting.rows import printed_name
from extensions.reporting.yardstick_lines import missing_yardstick, rows_text, score_interval, yardstick_name
from extensions.tasks import Task

METHODS = {"ppo": "PPO", "sft": "Supervised fine-tuning", "eval": "Evaluation", "encoder": "Encoder fine-tuning"}
YARDSTICKS = {
    "majority": "Majority class",
    "tfidf": "TF-IDF + linear model",
    "embeddings": "Sentence embeddings + linear model",
}
MEAN = "Mean of the training scores"  # the yardstick "majority" of a regression


@dataclass(frozen=True)
class Moment:
    """One result of one task: before, after, by likelihood, a yardstick, or the latest validation.

    `path` is its place in eval.json, parts joined by "/"; in validation.jsonl for the latest validation.
    """

    kind: str  # before, after, latest, likelihood, before-likelihood, majority, tfidf, embeddings
    title: str
    path: str
    result: dict[str, Any]

    @property
    def score(self) -> float:
        return float(self.result["score"])

    def interval(self, metric: str) -> list[float] | None:
        return self.result.get("intervals", {}).get(metric)


@dataclass(frozen=True)
class RunView:
    folder: Path
    recipe: Recipe
    scores: dict[str, Any]  # eval.json; empty before the first evaluation
    iterations: list[dict[str, Any]]
    validations: list[dict[str, Any]]
    warnings: list[dict[str, Any]]
    versions: dict[str, Any]
    model: dict[str, Any]  # model.json
    last_step: int | None = None  # of the whole training, where the run itself writes the page
    running: bool | None = None  # whether a process writes to the folder; None: unknown
    _files: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    @property
    def is_finished(self) -> bool:
        return "after" in self.scores

    @property
    def is_running(self) -> bool:
        running = is_locked(self.folder) if self.running is None else self.running
        return running and not self.is_finished

    @property
    def status(self) -> str:
        return "finished" if self.is_finished else "running" if self.is_running else "stopped"

    @property
    def step(self) -> int:
        return max((record["step"] for record in (*self.iterations, *self.validations)), default=0)

    @property
    def likelihood_validations(self) -> list[dict[str, Any]]:
        """The validations whose score by likelihood is another number than the score; none with that decoding."""
        return [] if self.recipe.evaluation.decoding == "likelihood" else self.validations

    @property
    def training(self) -> dict[str, Any]:
        """Tasks, steps, samples and seconds of the training, so far."""
        if self.scores.get("training"):
            return dict(self.scores["training"])
        last = self.iterations[-1] if self.iterations else {}
        return {"steps": self.step, "samples": last.get("samples", 0), "seconds": last.get("elapsed_s", 0.0)}

    @property
    def tasks(self) -> list[Task]:
        """The tasks with a result or, before the first one, all of the recipe."""
        found = {*self.scores.get("after", {}), *self.scores.get("before", {})}
        found |= {name for v in self.validations for name in v.get("tasks", {})}
        return [task for task in self.recipe.data.tasks if task.name in found or not found]

    def split_of(self, task: str) -> str:
        return str(self.scores.get("splits", {}).get(task) or self.scores.get("split", "validation"))

    def records(self, name: str) -> list[dict[str, Any]]:
        """The lines of a JSONL file of the folder; none if it is missing."""
        if name not in self._files:
            self._files[name] = _lines(self.folder / name)
        return self._files[name]

    def predictions(self, moment: str, task: str) -> list[dict[str, Any]]:
        """The answers "before" or "after" to the rows of a task. Earlier versions named the response `text`."""
        lines = [line for line in self.records(f"predictions_{moment}.jsonl") if line.get("task") == task]
        return [{"response": line.get("text", ""), "fields": {}} | line for line in lines]

    @cached_property
    def suspects(self) -> list[dict[str, str]]:
        path = self.folder / "label_suspects.csv"
        if not path.exists():
            return []
        with path.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))

    # ------------------------------------------------------------------------------------------------ results

    def moments(self, task: Task) -> list[Moment]:
        """The results of a task in the order of the page's columns."""
        return list(self._moments(task))

    def _moments(self, task: Task) -> Iterator[Moment]:
        name = task.name
        titles = {"before": "Before", "after": "After" if "before" in self.scores else "Score"}
        for kind in ("before", "after"):
            result = self.scores.get(kind, {}).get(name)
            if result is None:
                continue
            yield Moment(kind, titles[kind], f"{kind}/{name}", result)
            if result.get("likelihood") and self.recipe.evaluation.decoding != "likelihood":
                key = "likelihood" if kind == "after" else "before-likelihood"
                title = f"{titles[kind]}, by likelihood"
                yield Moment(key, title, f"{kind}/{name}/likelihood", result["likelihood"])
        if not self.is_finished:
            for record in [v for v in self.validations if name in v.get("tasks", {})][-1:]:
                title = f"Validation, step {record['step']}"
                yield Moment("latest", title, f"validation/{record['step']}/{name}", record["tasks"][name])
        for kind, results in self.scores.get("yardsticks", {}).items():
            if results.get(name):
                title = yardstick_title(kind, [task])
                yield Moment(kind, title, f"yardsticks/{kind}/{name}", results[name])

    def yardstick_facts(self) -> list[str]:
        """Per yardstick: its training rows and seconds; what is missing."""
        facts, yardsticks = [], self.scores.get("yardsticks", {})
        for kind, results in yardsticks.items():
            found = [result for result in results.values() if result and result.get("train_rows")]
            if kind != "majority" and found:
                rows = {key: sum(r.get(key) or r["train_rows"] for r in found) for key in ("train_rows", "run_rows")}
                seconds = sum(r.get("seconds") or 0 for r in found)
                facts.append(f"{yardstick_title(kind, self.tasks)}: {rows_text(rows)} training rows, {seconds:.1f} s")
        return [*facts, *filter(None, [missing_yardstick(yardsticks)])]

    # ------------------------------------------------------------------------------------------------ facts

    def facts(self) -> list[tuple[str, str]]:
        """What was run, on what, for how long: name and text."""
        recipe, training = self.recipe, self.training
        started = f"from {adapter_name(str(recipe.model.adapter))}" if recipe.model.adapter else None
        lora = f"LoRA, rank {recipe.lora.rank}" + (f", {started}" if started else "")
        trained = recipe.method in ("ppo", "sft")
        rows = [f"{m.result['samples']} {self.split_of(t.name)}" for t in self.tasks[:1] for m in self.moments(t)[:1]]
        if len(self.tasks) > 1:
            results = self.scores.get("after") or self.scores.get("before") or {}
            rows = [f"{sum(r['samples'] for r in results.values())} in {len(results)} tasks"] if results else []
        facts = [
            ("Method", METHODS[recipe.method]),
            ("Model", printed_name(recipe.model.path)),
            ("Adapter", lora if trained else started),
            ("Tasks", ", ".join(task.display_name for task in self.tasks)),
            ("Trained", f"{training['samples']} samples in {training['steps']} steps" if training["samples"] else None),
            ("Training time", duration(training["seconds"]) if training["seconds"] else None),
            ("Evaluated rows", rows[0] if rows else None),
            ("Decoding", recipe.evaluation.decoding if recipe.method != "encoder" else None),
            ("Last record", self._date()),
        ]
        return [(name, text) for name, text in facts if text]

    def _date(self) -> str:
        files = [self.folder / name for name in ("eval.json", "metrics.jsonl", "validation.jsonl", "recipe.yaml")]
        newest = max(path.stat().st_mtime for path in files if path.exists())
        return f"{datetime.fromtimestamp(newest, UTC):%Y-%m-%d %H:%M} UTC"

    def progress(self) -> str:
        """The status in words."""
        if self.is_finished or self.recipe.method == "eval":
            return self.status
        of = f" of {self.last_step}" if self.last_step else ""
        return f"{self.status}, step {self.step}{of}" if self.step or of else self.status

    def changed_keys(self) -> list[tuple[str, str, str]]:
        """Keys that differ from their defaults: key, value, default."""
        found = []
        for key, spec in all_keys().items():
            value, default = value_at(self.recipe, key), spec.get_default(call_default_factory=True)
            if key not in ("name", "method", "data.tasks", "output_dir") and value != default:
                found.append((key, plain_value(value), "" if default is PydanticUndefined else plain_value(default)))
        return found

    def command(self) -> str:
        """The command that runs the recipe of the folder again, in a new one."""
        method, ranks = self.recipe.method, self.versions.get("world_size") or 1
        script = f"launch/{method}{'_ray' if self.recipe.backend == 'ray' else ''}.sh"
        start = "bash" if ranks == 1 or self.recipe.backend == "ray" else f"deepspeed --num_gpus {ranks}"
        return f"{start} {script} {self.folder}/recipe.yaml output_dir={self.folder}-again"

    def phases(self) -> list[tuple[str, float]]:
        """Seconds of training per phase."""
        total: dict[str, float] = {}
        for record in self.iterations:
            for phase, seconds in record.get("seconds", {}).items():
                total[phase] = total.get(phase, 0.0) + seconds
        return sorted(total.items(), key=lambda item: -item[1])


def read_view(folder: Path, last_step: int | None = None, running: bool | None = None) -> RunView:
    """The run in `folder`.

    Args:
        last_step: of the whole training, if known.
        running: whether a process writes to the folder; None: its lock tells.

    Raises:
        UserError: recipe.yaml is invalid, or a JSON file is damaged.
        OSError: recipe.yaml or another file cannot be read.
    """
    files = [folder / name for name in ("eval.json", "versions.json", "model.json")]
    scores, versions, model = (read_json(path) if path.exists() else {} for path in files)
    records = (_lines(folder / name) for name in ("metrics.jsonl", "validation.jsonl", "warnings.jsonl"))
    iterations, validations, warnings = records
    recipe = load_recipe(folder / "recipe.yaml")
    return RunView(folder, recipe, scores, iterations, validations, warnings, versions, model, last_step, running)


def is_locked(folder: Path) -> bool:
    """Whether a process writes to the run folder."""
    try:
        with (folder / "run.lock").open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def _lines(path: Path) -> list[dict[str, Any]]:
    return read_jsonl(path, skip_damaged=True) if path.exists() else []


def plain_value(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(plain_value, value))
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def duration(seconds: float) -> str:
    """`48 s`, `5 min 21 s`, `2 h 5 min`."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


# --------------------------------------------------------------------------------------------------- conclusions


@dataclass(frozen=True)
class Conclusion:
    tone: str  # good, bad, unclear
    text: str


def conclusions(view: RunView) -> list[Conclusion]:
    """Whether the run learned, and whether it beats the yardsticks, in sentences; none before it is finished.

    A validation has other rows than the yardsticks, and no interval.
    """
    changes: dict[str, list[tuple[Task, Moment, Moment]]] = {"good": [], "bad": [], "unclear": []}
    not_beaten: dict[str, list[str]] = {}
    narrow: dict[str, list[str]] = {}  # yardstick -> tasks on which its score is within the model's interval
    present: set[str] = set()
    for task in view.tasks:
        by_kind = {moment.kind: moment for moment in view.moments(task)}
        new, old = by_kind.get("after"), by_kind.get("before")
        if new is None:
            continue
        if old is not None:
            changes[_change(task, old, new)].append((task, old, new))
        for kind in YARDSTICKS.keys() & by_kind.keys():
            present.add(kind)
            bar = by_kind[kind].score
            named = f"{task.display_name} ({100 * new.score:.1f} against {100 * bar:.1f})"
            if new.score <= bar:
                not_beaten.setdefault(kind, []).append(named)
            elif score_interval(task, new.result)[0] <= bar:
                narrow.setdefault(kind, []).append(named)
    found = [Conclusion(tone, text) for tone, text in _change_texts(changes, "majority" not in not_beaten)]
    for kind in YARDSTICKS:
        if kind in not_beaten:
            found.append(
                Conclusion("bad", f"Does not beat {_inline(kind, view.tasks)} on {_listed(not_beaten[kind])}.")
            )
        if kind in narrow:
            text = f"Not clearly above {_inline(kind, view.tasks)} on {_listed(narrow[kind])}."
            found.append(Conclusion("unclear", text))
    clear = present - not_beaten.keys() - narrow.keys()
    if better := [_inline(kind, view.tasks) for kind in YARDSTICKS if kind in clear]:
        where = " on every task" if len(view.tasks) > 1 else ""
        found.append(Conclusion("good", f"Beats {_listed(better)}{where}."))
    return found


def _change(task: Task, before: Moment, after: Moment) -> str:
    """Whether the first metric rose or fell by more than its 95% interval."""
    metric = task.metrics[0]
    low, high = after.interval(metric) or [after.result["metrics"][metric]] * 2
    old = before.result["metrics"][metric]
    return "good" if old < low else "bad" if old > high else "unclear"


def _change_texts(changes: dict[str, list[tuple[Task, Moment, Moment]]], learned: bool) -> Iterator[tuple[str, str]]:
    """Args: learned: no score is below that of a constant answer, so that a rise is more than a better format."""
    total = sum(map(len, changes.values()))
    alone = {"good": "It learned" if learned else "The score rose", "bad": "It got worse", "unclear": "No clear change"}
    several = {"good": "The score rose", "bad": "The score fell", "unclear": "No clear change"}
    for tone, found in changes.items():
        if found and total == 1:
            _, before, after = found[0]
            note = ", within the 95% interval" if tone == "unclear" and before.score != after.score else ""
            yield tone, f"{alone[tone]}: {100 * before.score:.1f} before, {100 * after.score:.1f} after{note}."
        elif found:
            names = _listed([task.display_name for task, *_ in found])
            yield tone, f"{several[tone]} on {len(found)} of {total} tasks: {names}."


def yardstick_title(kind: str, tasks: Sequence[Task]) -> str:
    """Name of a yardstick of these tasks."""
    if kind == "majority":
        return MEAN if all(task.is_regression for task in tasks) else YARDSTICKS[kind]
    names = {yardstick_name(kind, task) for task in tasks}
    name = names.pop() if len(names) == 1 else YARDSTICKS[kind]
    return name[0].upper() + name[1:]


def _inline(kind: str, tasks: Sequence[Task]) -> str:
    title = yardstick_title(kind, tasks)
    return f"the {title.lower()}" if kind == "majority" else title.replace("Sent", "sent")


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
