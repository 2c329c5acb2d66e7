"""From benchmark files, generated rows or the user's own JSONL to checked examples, and their order.

Every file is read and checked whole before training starts: an error names the file, the line, the field and what
was expected.
"""

from __future__ import annotations

import bisect
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from extensions.errors import UserError
from extensions.generated import GENERATORS
from extensions.prompts import is_label, told_apart
from extensions.rows import ROWS
from extensions.tasks import Hub, Task


@dataclass(frozen=True)
class Example:
    """One row of a task."""

    task: Task
    index: int  # row number in its split, from 0: seeds its sampling, so that results do not depend on batch layout
    fields: dict[str, str]
    label: str | None  # as it stands in the data; None where the split is unlabelled
    pair: str | None = None  # rows that differ in one thing and in their label share one: drawn into the same batch
    kept: dict[str, Any] = field(default_factory=dict)  # columns of `source.keep`, such as official row numbers


HUB = "hub"  # value of data.root: download from the hub


def load_examples(
    task: Task,
    split: str,
    root: str | None,
    seed: int = 0,
    warn: Callable[[str], None] = lambda message: None,
) -> list[Example]:
    """All rows of `split`, checked.

    Args:
        root: folder of the official download, or of the hub's parquet files, or "hub" to download those (recipe key
            data.root); None means that file names stand by themselves.
        seed: of the candidates that a training query of ReCoRD keeps: one right, one wrong.
        warn: gets what is odd but no error: rows left out, another number of rows than the benchmark has.

    Raises:
        UserError: a file is missing or empty, or a row is malformed.
    """
    if task.source.generator is not None:
        rows = GENERATORS[task.source.generator](split)
        return [
            Example(task, i, {f: row[f] for f in task.fields}, row["label"], row["pair"]) for i, row in enumerate(rows)
        ]
    reader = _reader(task, split, root)
    examples: list[Example] = []
    skip = task.source.incomplete == "skip"
    may_lack = skip and split != "train"  # metrics and the evaluation server count every row
    for where, row in reader.rows():
        try:
            fields = {name: _text(row, reader.columns.get(name, name), where, may_lack) for name in task.fields}
        except _Incomplete:
            if not skip:
                raise
            reader.skipped += 1
            continue
        label = _label(row, reader, where) if reader.labelled else None
        kept = _kept(row, task, where)
        if "idx" in kept:
            kept["idx"] = _number(kept["idx"])
        examples.append(Example(task, len(examples), fields, label, None, kept))
    if not examples:
        raise UserError(f"{reader.path}: no rows; expected at least one for task {task.name}, split {split}")
    if reader.skipped:
        warn(f"{reader.path}: left out {reader.skipped} rows that lack a text or a column")
    found, official = len(units(examples)) if task.is_ranked else len(examples), task.source.sizes.get(split)
    found += reader.skipped
    if official is not None and found != official:
        what = "queries" if task.is_ranked else "rows"
        warn(f"{reader.path}: {found} {what}; the official {split} set of {task.display_name} has {official}")
    return one_right_one_wrong(examples, seed) if task.is_ranked and split == "train" else examples


def units(examples: Sequence[Example]) -> list[list[Example]]:
    """The examples by question (`task.unit`), in order of first appearance; single ones where the task has no unit."""
    found: dict[tuple[Any, ...], list[Example]] = {}
    for example in examples:
        key = example.task.unit_of(example.kept) or (example.index,)
        found.setdefault((example.task.name, *key), []).append(example)
    return list(found.values())


def one_right_one_wrong(examples: list[Example], seed: int) -> list[Example]:
    """For each question one right and one wrong candidate, chosen at random, as a pair of the same batch."""
    kept: list[Example] = []
    for number, unit in enumerate(units(examples)):
        rng = np.random.default_rng([seed, number])
        for label in dict.fromkeys(example.label for example in unit):
            options = [example for example in unit if example.label == label]
            chosen = options[rng.integers(len(options))]
            kept.append(replace(chosen, index=len(kept), pair=str(number)))
    return kept


def spread(examples: list[Example], limit: int | None) -> list[Example]:
    """About `limit` examples at equal distances, so that a sorted file still gives a fair sample.

    Questions stay whole: where several rows make one, as many questions are taken as fit in `limit`, at least one.
    """
    if limit is None or limit >= len(examples):
        return examples
    groups = units(examples)
    count = max(1, limit * len(groups) // len(examples))
    return [example for i in range(count) for example in groups[i * len(groups) // count]]


def has_split(task: Task, split: str) -> bool:
    return task.source.generator is not None or split in task.source.files


def check_trainable(tasks: Sequence[Task]) -> None:
    """UserError if none of the tasks has a training split."""
    if not any(has_split(task, "train") for task in tasks):
        names = ", ".join(task.name for task in tasks)
        raise UserError(f"data.tasks: {names} can only be evaluated; add a task that has a training split")


def is_labelled(task: Task, split: str) -> bool:
    return has_split(task, split) and split not in task.source.unlabelled


def is_present(task: Task, split: str, root: str | None) -> bool:
    """Whether the files of a split are there.

    Raises:
        UserError: `root` is the hub, and it cannot be read.
    """
    if not has_split(task, split) or task.source.generator is not None:
        return has_split(task, split)
    if root != HUB or task.suite == "own":
        return _find(task, split, None if root == HUB else root) is not None
    try:
        return bool(_download(task, split))
    except _Absent:
        return False


# ------------------------------------------------------------------------------------------------ where files are


def _find(task: Task, split: str, root: str | None) -> tuple[list[Path], bool] | None:
    """Files of a split and whether they are the hub's parquet files; None where there are none.

    In `root` itself, or in its folder named as the suite, so that one folder may hold GLUE and SuperGLUE.

    Raises:
        UserError: a name is too long for the file system, or no pattern.
    """
    for folder in [Path(root or ".")] + ([Path(root) / task.suite] if root is not None else []):
        path = folder / task.source.files[split]
        try:
            if path.is_file():
                return [path], False
            found = _parquet_files(task.source.hub, split, folder) if task.source.hub is not None else []
        except (OSError, ValueError, NotImplementedError) as error:
            raise UserError(
                f"{path}: cannot be looked up (task {task.name}, split {split}: {error}); check data.root and the "
                "task's source"
            ) from error
        if found:
            return found, True
    return None


def _parquet_files(hub: Hub, split: str, folder: Path) -> list[Path]:
    return next((found for pattern in hub.patterns(split) if (found := sorted(folder.glob(pattern)))), [])


class _Absent(UserError):
    """The hub's data set lacks the split."""


def _download(task: Task, split: str) -> list[Path]:
    """Parquet files of a split, from the hub or its local cache."""
    from huggingface_hub import snapshot_download

    hub = task.source.hub
    if hub is None:
        raise UserError(f"task {task.name} is not on the hub; set data.root to the folder of its files")
    patterns = list(hub.patterns(split))
    problem: Exception | None = None
    kind = UserError
    for revision in ("main", "refs/convert/parquet"):  # the second is the hub's own conversion of script data sets
        try:
            folder = snapshot_download(hub.repo, repo_type="dataset", revision=revision, allow_patterns=patterns)
        except Exception as error:
            problem = error
            continue
        found = _parquet_files(hub, split, Path(folder))
        if found:
            return found
        kind = _Absent
    raise kind(
        f"data.root: hub, but {hub.repo} could not be read from the hub (task {task.name}, split {split}: "
        f"{' '.join(str(problem or 'no parquet files there').split())[:300]}). Check the network, or set data.root to "
        "a folder with the official download"
    ) from problem


def _reader(task: Task, split: str, root: str | None) -> _Reader:
    if split not in task.source.files:
        raise UserError(f"task {task.name} has no {split} split: give its file as source.files.{split}")
    if root == HUB:
        if task.suite != "own":
            return _Reader(task, split, _download(task, split), True)
        root = None  # one's own files stand by themselves beside tasks of the hub
    if root is None and task.suite != "own":
        raise UserError(
            f"task {task.name} needs data.root, the folder that holds {task.source.files[split]} of the official "
            f"download, for example data.root=path/to/{task.suite}; data.root=hub downloads the rows"
        )
    found = _find(task, split, root)
    if found is None and root is not None and not Path(root).is_dir():
        raise UserError(f"data.root: {root!r} is not a folder; it should hold {task.source.files[split]}")
    if found is None:
        path = Path(root or ".") / task.source.files[split]
        raise UserError(f"{path}: no such file (task {task.name}, split {split}); check data.root and source.files")
    return _Reader(task, split, *found)


# ------------------------------------------------------------------------------------------------- how they read


class _Incomplete(UserError):
    """A row without one of its texts."""


class _Reader:
    """The rows of one split, with the columns of its layout."""

    def __init__(self, task: Task, split: str, files: list[Path], from_hub: bool) -> None:
        self.task, self.files, self.path = task, files, files[0]
        self.source = task.source.in_split(split)
        self.skipped = 0
        hub = self.source.hub if from_hub else None
        self.labelled = split not in self.source.unlabelled
        self.columns: dict[str, Any] = self.source.columns if hub is None else dict(hub.columns)
        self.label: str | int | None = self.source.label if hub is None else "label"
        self.classes = None if hub is None else hub.labels
        self._read = _read_parquet if hub is not None else _read_tsv if self.source.format == "tsv" else _read_jsonl

    def rows(self) -> Iterator[tuple[str, dict[str | int, Any]]]:
        """(where it stands, row), flat."""
        for path in self.files:
            for where, row in self._read(path, self):
                if self.source.rows is None:
                    yield where, row
                    continue
                try:
                    flat = list(ROWS[self.source.rows](row))  # type: ignore[arg-type]
                except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as error:
                    raise UserError(
                        f"{where}: not an object of {self.task.display_name}'s format ({type(error).__name__}: {error})"
                    ) from error
                for one in flat:
                    yield where, one  # type: ignore[misc]


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines, split at line feeds alone: the texts hold other characters that str.splitlines would split at."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            try:
                text = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                bad = raw[error.start : error.end].hex(" ")
                raise UserError(
                    f"{path}, line {number}: not valid UTF-8 at byte {error.start + 1} of the line ({bad}); "
                    "convert the file to UTF-8"
                ) from error
            text = text.rstrip("\r\n")
            if text:
                yield number, text


def _read_tsv(path: Path, reader: _Reader) -> Iterator[tuple[str, dict[str | int, Any]]]:
    """Rows of a TSV file without quoting, as GLUE has it: a quote is a character like any other."""
    source = reader.source
    header: list[str] | None = None
    expected = source.num_columns
    for number, line in _lines(path):
        cells = line.split("\t")
        if header is None and source.header:
            header, expected = cells, len(cells)
            continue
        if expected is not None and len(cells) != expected:
            if source.incomplete == "skip" and reader.labelled:
                reader.skipped += 1
                continue
            raise UserError(
                f"{path}, line {number}: {len(cells)} columns, expected {expected}"
                + (f" ({', '.join(header)})" if header else "")
                + f"; the line begins {line[:60]!r}"
            )
        yield f"{path}, line {number}", dict(zip(header, cells, strict=True)) if header else dict(enumerate(cells))


def _read_jsonl(path: Path, reader: _Reader) -> Iterator[tuple[str, dict[str | int, Any]]]:
    for number, line in _lines(path):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: not valid JSON ({error}); expected one object a line") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: expected a JSON object, got {type(row).__name__}")
        yield f"{path}, line {number}", row


def _read_parquet(path: Path, reader: _Reader) -> Iterator[tuple[str, dict[str | int, Any]]]:
    """Rows of the hub's form: labels are class numbers, -1 where there is none."""
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: cannot be read as parquet ({error}); download it again") from error
    number = 0
    try:
        for batch in file.iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", row
    except (OSError, ValueError, OverflowError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: cannot be read after row {number} ({error}); download it again") from error


def _cell(row: dict[str | int, Any], column: str | int, where: str) -> Any:
    if column not in row:
        have = ", ".join(map(str, row))
        raise UserError(f"{where}: no field {column!r}; the row has: {have[:200]}")
    return row[column]


SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can spell them, no tokenizer reads them


def _text(row: dict[str | int, Any], column: str | int, where: str, may_lack: bool) -> str:
    value = _cell(row, column, where)
    if value is None or (isinstance(value, str) and not value.strip()):
        if may_lack:
            return ""
        raise _Incomplete(f"{where}, field {column!r}: expected text, got {value!r}")
    if not isinstance(value, str):
        raise UserError(f"{where}, field {column!r}: expected text, got {value!r}")
    if SURROGATE.search(value):
        raise UserError(f"{where}, field {column!r}: {value[:60]!r} holds half of a surrogate pair, which is not text")
    return value.strip()


def _label(row: dict[str | int, Any], reader: _Reader, where: str) -> str:
    column, task = reader.label, reader.task
    assert column is not None, f"task {task.name} has a labelled split and no label column"
    value = _cell(row, column, where)
    if reader.classes and isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(reader.classes):
        value = reader.classes[value]
    if reader.classes is not None and isinstance(value, float):
        value = f"{value:g}"  # the hub has scores in 32 bits, where 3.8 is 3.799999952316284
    text = str(value).lower() if isinstance(value, bool) else str(value).strip()
    if task.score_range is None:
        label = task.label_of(text)
        if label is None:
            allowed = ", ".join(map(repr, task.labels))
            raise UserError(f"{where}, field {column!r}: label {text!r} is not one of {allowed} (task {task.name})")
        return label
    number = isinstance(value, (str, int, float)) and not isinstance(value, bool)
    if not number or not is_label(text, task):
        low, high = task.score_range
        raise UserError(f"{where}, field {column!r}: expected a number from {low:g} to {high:g}, got {text!r}")
    return text


def _kept(row: dict[str | int, Any], task: Task, where: str) -> dict[str, Any]:
    """The columns that stand beside a prediction, in JSON; those that tell questions apart must be there."""
    kept: dict[str, Any] = {}
    for name, column in task.source.keep.items():
        if column not in row and name not in task.unit:
            continue
        value = _cell(row, column, where)
        try:
            if type(value) is not int:
                json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise UserError(
                f"{where}, field {column!r}: {repr(value)[:60]} cannot stand in a file of predictions ({error}); "
                "expected text, numbers or lists of them"
            ) from error
        kept[name] = value
    return kept


def _number(value: Any) -> Any:
    """Row numbers are text in TSV and in some JSONL files."""
    return int(value) if isinstance(value, str) and re.fullmatch(r"-?[0-9]{1,18}", value) else value


def demonstrations(
    task: Task, train: Sequence[Example], count: int, kind: Literal["balanced", "random"], seed: int
) -> list[Example]:
    """Training rows to show before a query (section 5.2 of the paper): up to `count`, drawn by `seed`.

    No two have the same texts, and where several rows make one question (MultiRC, ReCoRD) each is about another text.

    Args:
        train: of the task, or of the one that teaches it.
        kind: "balanced" takes the labels in turn (of a regression the lower and upper halves of its scores), "random"
            any rows.
    """
    rng = np.random.default_rng([seed, zlib.crc32(task.name.encode())])
    classes: dict[Any, list[Example]] = {}
    middle = sum(task.score_range) / 2 if task.score_range else 0
    for row in rng.permutation(len(train)):
        label = train[row].label
        kind_of = float(str(label)) > middle if task.is_regression else label
        classes.setdefault(kind_of if kind == "balanced" else "any", []).append(train[row])
    turns = list(classes.values())
    found: dict[tuple[str, ...], Example] = {}
    for place in range(max(map(len, turns), default=0)):
        for rows in turns:
            if place < len(rows) and len(found) < count:
                found.setdefault(told_apart(task, rows[place].fields), rows[place])
    return list(found.values())


def rows_of_epoch(
    sizes: Mapping[str, int],
    mixing: Literal["proportional", "capped", "temperature", "uniform"],
    cap: int,
    temperature: float,
) -> dict[str, int]:
    """Rows of each task in an epoch of multi-task training.

    proportional: all of them; capped: at most `cap`; temperature: in proportion to size ** (1 / temperature), and
    uniform: the same of each, both of as many rows in all as there are, so that small tasks repeat and large ones wait.
    """
    if mixing == "proportional":
        return dict(sizes)
    if mixing == "capped":
        return {name: min(size, cap) for name, size in sizes.items()}
    power = 1 / temperature if mixing == "temperature" else 0.0
    weights = {name: size**power for name, size in sizes.items()}
    scale = sum(sizes.values()) / sum(weights.values())
    return {name: max(1, round(scale * weight)) for name, weight in weights.items()}


class BatchOrder:
    """Which examples make up the batch of a step: a pure function of (seed, step), so a resumed run needs no state.

    An epoch is one random order of the examples: tasks are mixed in proportion to their size, or as `rows` says.
    Minimal pairs stay next to each other. With `balanced`, the labels of each task take turns in that order, so that
    every batch holds about as many of each: a constant answer then earns the same in every batch, and no gradient.

    Args:
        rows: task name -> its rows in an epoch (`rows_of_epoch`); None: all. A task that gives fewer than it has goes
            on in the next epoch where it stopped, so each of its rows is seen before one is seen again.
    """

    def __init__(
        self,
        examples: list[Example],
        batch_size: int,
        seed: int,
        balanced: bool,
        rows: Mapping[str, int] | None = None,
    ) -> None:
        self.examples, self.batch_size, self.seed, self.balanced = examples, batch_size, seed, balanced
        groups: dict[str, list[int]] = {}
        for i, example in enumerate(examples):
            groups.setdefault(f"pair {example.task.name} {example.pair}" if example.pair else f"row {i}", []).append(i)
        self._units: dict[str, list[list[int]]] = {}
        for unit in groups.values():
            self._units.setdefault(examples[unit[0]].task.name, []).append(unit)
        sizes = Counter(example.task.name for example in examples)
        self._shares = {name: rows[name] / size for name, size in sizes.items()} if rows is not None else {}
        self._order = lru_cache(maxsize=4)(self._shuffled)  # a batch is of one epoch, or of two or three
        self._ends: list[int] = []  # number of positions up to the end of each epoch that was looked at

    def batch(self, step: int) -> list[Example]:
        """The `batch_size` examples of step `step` (from 0)."""
        return [self._at(p) for p in range(step * self.batch_size, (step + 1) * self.batch_size)]

    def _at(self, position: int) -> Example:
        while not self._ends or self._ends[-1] <= position:
            self._ends.append((self._ends[-1] if self._ends else 0) + len(self._order(len(self._ends))))
        epoch = bisect.bisect_right(self._ends, position)
        start = self._ends[epoch - 1] if epoch else 0
        return self.examples[self._order(epoch)[position - start]]

    def _shuffled(self, epoch: int) -> list[int]:
        rng = np.random.default_rng([self.seed, epoch])
        units = [unit for name in self._units for unit in self._drawn(name, epoch)]
        if not self.balanced:
            return [i for unit in rng.permutation(len(units)) for i in units[unit]]
        return _interleave(self.examples, units, rng)

    def _drawn(self, name: str, epoch: int) -> list[list[int]]:
        """The units of a task in an epoch."""
        units, share = self._units[name], self._shares.get(name, 1)
        if share == 1:
            return units
        number, count = list(self._units).index(name), max(1, round(share * len(units)))
        passes = cache(lambda n: np.random.default_rng([self.seed, number, n, 1]).permutation(len(units)))
        places = range(epoch * count, (epoch + 1) * count)
        return [units[passes(place // len(units))[place % len(units)]] for place in places]


def _interleave(examples: list[Example], units: list[list[int]], rng: np.random.Generator) -> list[int]:
    """A random order in which each class of units is spread evenly.

    The k-th of n units of a class gets the place (k + u) / n, u uniform in [0, 1), and places are sorted.
    """
    classes: dict[tuple[str, ...], list[list[int]]] = {}
    for unit in units:
        first = examples[unit[0]]
        labels = () if first.task.is_regression else sorted(str(examples[i].label) for i in unit)
        classes.setdefault((first.task.name, *labels), []).append(unit)
    placed: list[tuple[float, list[int]]] = []
    for members in classes.values():
        for rank, unit in enumerate(rng.permutation(len(members))):
            placed.append(((rank + rng.random()) / len(members), members[unit]))
    placed.sort(key=lambda pair: pair[0])
    return [i for _, unit in placed for i in unit]
