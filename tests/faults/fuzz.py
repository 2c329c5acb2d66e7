"""Feeds mutated files and answers to everything that reads what users or models wrote.

    python tests/faults/fuzz.py                                  # thousands of cases of each target
    python tests/faults/fuzz.py recipe archive --seconds 300     # and five minutes of atheris for each

Only UserError may come out, within five seconds of CPU time; what a reader accepts must serve those who use it next.
Every input that breaks this is saved, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
# ruff: noqa: E402 (what follows is found by way of this line)
sys.path[:0] = [path for path in (str(ROOT), str(ROOT / "tests")) if path not in sys.path]

import pyarrow
import pyarrow.parquet
import yaml
from official import official, write_benchmarks

from extensions.common.errors import UserError
from extensions.data import by_question, load_examples
from extensions.evaluation.metrics import Prediction, score_all
from extensions.evaluation.submission import check_archive, make_archive, read_predictions
from extensions.prompts import CLOSE, pack_label, parse_answer, prompt_text, unpack_label
from extensions.recipe import all_keys, dump_recipe, load_recipe, value_at
from extensions.reporting.finished_runs import find_runs
from extensions.reporting.report import write_report
from extensions.tasks import SUITES, TASKS, Task
from reward_fns.nlu import reward

CASES, SEED = 2000, 0
LONGEST, LONGEST_GUIDED = 200_000, 10_000  # bytes of a case; of atheris, which is slow where code is instrumented
CPU_SECONDS = 5  # of a case; more is a hang
MEMORY = 4 << 30  # bytes that the process may take beyond what it has at the start

# ------------------------------------------------------------------------------------------------------- counting


class Hang(BaseException):
    """A case took too long; no reader catches it."""


@dataclass(frozen=True)
class Crash:
    target: str
    data: bytes
    error: str  # type, message, and the innermost line of the project

    @property
    def file_name(self) -> str:
        return f"{self.target}-{hashlib.sha256(self.data).hexdigest()[:16]}"


@dataclass
class Counts:
    cases: int = 0
    accepted: int = 0
    refused: int = 0
    uncaught: list[Crash] = field(default_factory=list)


@dataclass(frozen=True)
class Target:
    """Something that reads."""

    name: str
    read: Callable[[bytes], None]  # UserError if it refuses the input
    seeds: Callable[[], Sequence[bytes]]  # valid inputs


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raises Hang after so much CPU time, which other processes do not change."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Hang(f"more than {seconds:g} s")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def feed(target: Target, data: bytes, counts: Counts, slowdown: int = 1) -> None:
    """One case, by code that is `slowdown` times as slow as it is for users."""
    counts.cases += 1
    try:
        with limited(slowdown * CPU_SECONDS):
            target.read(data)
        counts.accepted += 1
    except UserError:
        counts.refused += 1
    except (Exception, Hang) as error:
        counts.uncaught.append(Crash(target.name, data, described(error)))


def described(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(ROOT) and ".venv" not in frame.filename]
    where = next((f"{Path(f.filename).name}:{f.lineno}" for f in reversed(own) if f.name != "stop"), "?")
    return f"{type(error).__name__} at {where}: {' '.join(str(error).split())[:200]}"


def run(target: Target, cases: int, seed: int) -> Counts:
    """The seeded engine: the same cases every time."""
    rng, corpus, counts = random.Random(f"{target.name} {seed}"), target.seeds(), Counts()
    for _ in range(cases):
        feed(target, mutated(rng.choice(corpus), rng, corpus), counts)
    return counts


# -------------------------------------------------------------------------------------------------------- mutating

NASTY = [
    *(b"\x00", b"\xef\xbb\xbf", b"\r", b"\r\n", b"\n", b"\t", b"\x85", b"\xe2\x80\xa8", b"\xff", b"\xed\xa0\x80", b" "),
    *(b"\\ud800", b'"\\ud800"', b"\\u0000", b'"\\0"', b"\xf0\x9f\x98\x80", "\u0130\u017f\u212a\u0665".encode()),
    *(b"1e999", b"-1e999", b"NaN", b"Infinity", b"-0", b"1e-400", b"9" * 400, b"9" * 5000, b"0x" + b"f" * 5000),
    *(b"18446744073709551616", b"2147483648", b"-1", b"0", b"1.5", b"0b1", b"1_000", b"1:1:1", b".inf", b".nan"),
    *(b"null", b"true", b"no", b"~", b"[]", b"{}", b'""', b"''", b"[[]]", b'{"a": {}}', b"x" * 300, b"../x", b"/"),
    *(b"2020-13-45", b"2020-01-01", b"2001-12-14t21:59:43.10-99:99", b"0001-01-01 00:00:00+23:59", b"=", b"<<: "),
    *(b"!!binary x", b"!!binary YQ==", b"!!float x", b"!!int ''", b"!!bool x", b"!!null x", b"!!timestamp x"),
    *(b"!!set {a, b}", b"!!omap [a: 1]", b"!!pairs [a: 1]", b"!!map [1]", b"!!seq {a: 1}", b"!!str {a: 1}"),
    *(b"!!python/object:os.system x", b"!!python/object/apply:os.getcwd []", b"!x y", b"!<tag:a,2000:b> c"),
    *(b"&a ", b"*a", b"&a [*a]", b"&a {b: *a}", b"<<: *a\n", b"<<: {seed: 1}\n", b"<<: [1]\n"),
    *(b"? ", b"? [a]\n: b\n", b"{[a]: b}", b"{{a: b}: c}", b"{1: 2}", b"{1.5: 2}", b"{null: 1}", b"{true: 1}"),
    *(b"{2020-01-01: 1}", b"|\n", b">-\n", b"---\n", b"...\n", b"%YAML 9.9\n", b"%TAG ! x\n"),
    *(b"- ", b": ", b"#", b'"', b"'", b"\\", b"@", b"`"),
    *(b"</Judgement>", b"<Judgement>", b"Yes", b"No", b"not ", b"2.5", b"entailment", b'"label": 1', b"@placeholder"),
]  # fmt: skip
NASTY.append(  # a billion laughs
    b"a: &l0 [x, x, x, x, x, x, x, x, x]\n"
    + b"".join(b"b%d: &l%d [%s]\n" % (n, n, b", ".join([b"*l%d" % (n - 1)] * 9)) for n in range(1, 11))
)
JUNK: list[Any] = [
    *(None, True, False, 0, 1, -1, 1.5, "", " ", "x", "\ud800", "\x00", [], {}, [None], {"a": 1}, [[]], "1", "NaN"),
    *(math.inf, math.nan, 1e308, 10**400, 2**63, 2**31, "9" * 5000, "x" * 300, {"": ""}, ["a", 1], 5e-324, "../x", "/"),
]
WORD = re.compile(rb"[\w.+-]+")


def mutated(data: bytes, rng: random.Random, corpus: Sequence[bytes]) -> bytes:
    """`data` after one to six changes."""
    for _ in range(rng.choice([1, 1, 1, 2, 3, 6])):
        inside = _inside_archive if data[:2] == b"PK" else _inside_parquet if data[:4] == b"PAR1" else None
        if inside is not None and rng.random() < 0.7:
            data = inside(data, rng)
        else:
            data = rng.choice(CHANGES)(data, rng, corpus)
        data = data[:LONGEST]
    return data


def _span(data: bytes, rng: random.Random, longest: int = 40) -> tuple[int, int]:
    start = rng.randrange(len(data) + 1)
    return start, min(len(data), start + rng.randint(0, longest))


def _flip(data: bytes, rng: random.Random, corpus: Sequence[bytes]) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4) if data else 0):
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _delete(data: bytes, rng: random.Random, corpus: Sequence[bytes]) -> bytes:
    start, end = _span(data, rng, rng.choice([1, 10, 1000]))
    return data[:start] + data[end:]


def _repeat(data: bytes, rng: random.Random, corpus: Sequence[bytes]) -> bytes:
    start, end = _span(data, rng)
    return data[:end] + data[start:end] * rng.choice([1, 2, 50, 3000]) + data[end:]


def _splice(data: bytes, rng: random.Random, corpus: Sequence[bytes]) -> bytes:
    other = rng.choice(corpus)
    return data[: rng.randrange(len(data) + 1)] + other[rng.randrange(len(other) + 1) :]


def _insert(data: bytes, rng: random.Random, corpus: Sequence[bytes]) -> bytes:
    start, end = _span(data, rng, rng.choice([0, 0, 5]))
    return data[:start] + rng.choice(NASTY) + data[end:]


def _replace_word(data: bytes, rng: random.Random, corpus: Sequence[bytes]) -> bytes:
    words = list(WORD.finditer(data[:LONGEST]))
    if not words:
        return data
    word = rng.choice(words)
    new = rng.choice([*NASTY, rng.choice(words)[0]])
    return data[: word.start()] + new + data[word.end() :]


def _nest(data: bytes, rng: random.Random, corpus: Sequence[bytes]) -> bytes:
    start, _ = _span(data, rng, 0)
    opening, closing = rng.choice([(b"[", b"]"), (b"{a: ", b"}"), (b'{"a": ', b"}"), (b"- ", b""), (b"<", b">")])
    depth = rng.choice([2, 30, 150, 300, 900, 20000])
    return data[:start] + opening * depth + rng.choice([b"", b"1"]) + closing * depth + data[start:]


def _lines(data: bytes, rng: random.Random, corpus: Sequence[bytes]) -> bytes:
    lines = data.split(b"\n")
    here, there = rng.randrange(len(lines)), rng.randrange(len(lines))
    kind = rng.choice(["swap", "repeat", "drop", "indent", "join"])
    if kind == "swap":
        lines[here], lines[there] = lines[there], lines[here]
    elif kind == "repeat":
        lines.insert(there, lines[here])
    elif kind == "drop":
        del lines[here]
    elif kind == "indent":
        lines[here] = b"  " + lines[here]
    else:
        lines[here : here + 2] = [b"".join(lines[here : here + 2])]
    return b"\n".join(lines)


def _value(data: bytes, rng: random.Random, corpus: Sequence[bytes]) -> bytes:
    """One value of one JSON line, or of a YAML document without tags."""
    lines = data.split(b"\n")
    here = rng.randrange(len(lines))
    try:
        return b"\n".join([*lines[:here], _changed_json(lines[here], rng), *lines[here + 1 :]])
    except (ValueError, RecursionError):
        start = re.search(rb":[ ]+", lines[here])
        if start is None:
            return data
        return b"\n".join([*lines[:here], lines[here][: start.end()] + rng.choice(NASTY), *lines[here + 1 :]])


def _changed_json(text: bytes, rng: random.Random) -> bytes:
    whole = json.loads(text)
    places: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
            places.append((value, key))
            walk(value[key])

    walk(whole)
    if not places:
        return json.dumps(rng.choice(JUNK)).encode()
    inside, key = rng.choice(places)
    kind = rng.choice(["junk", "junk", "drop", "other", "rename"])
    if kind == "junk":
        inside[key] = rng.choice(JUNK)
    elif kind == "other":
        inside[key] = json.loads(json.dumps((other := rng.choice(places))[0][other[1]]))
    elif kind == "drop" or isinstance(inside, list):
        del inside[key]
    else:
        inside[rng.choice(["x", "\ud800", "", "label", "idx"])] = inside.pop(key)
    return json.dumps(whole).encode()


CHANGES = (_flip, _delete, _repeat, _splice, _nest, _lines, *[_insert, _replace_word, _value] * 2)


def _inside_archive(data: bytes, rng: random.Random) -> bytes:
    """One member is changed, and the archive is written anew."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
    except Exception:
        return data
    if members:
        name = rng.choice(list(members))
        content = members.pop(name)
        kind = rng.choice(["content"] * 6 + ["drop", "rename", "copy"])
        if kind == "content":
            members[name] = rng.choice(CHANGES)(content, rng, list(members.values()) or [b""])
        elif kind != "drop":
            members[rng.choice(["x.tsv", "../x", "/x", "x" * 300, "a/", "\u2028", ""])] = content
        if kind == "copy":
            members[name] = content
    raw = io.BytesIO()
    method = rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
    with zipfile.ZipFile(raw, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name or "empty"), content, method)
    changed = bytearray(raw.getvalue())
    if rng.random() < 0.2:  # flags and methods of the first header: encrypted, unknown compression
        changed[rng.choice([6, 7, 8, 9])] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _inside_parquet(data: bytes, rng: random.Random) -> bytes:
    """One column gets other values or is dropped, and the file is written anew."""
    try:
        table = pyarrow.parquet.read_table(io.BytesIO(data))
    except Exception:
        return data
    if not table.num_columns:
        return data
    place = rng.randrange(table.num_columns)
    name, count = table.column_names[place], table.num_rows
    table = table.remove_column(place)
    if rng.random() < 0.9:
        table = table.append_column(rng.choice([name, name, name, "label", ""]), rng.choice(_columns(count)))
    return parquet(table)


def parquet(table: pyarrow.Table) -> bytes:
    raw = io.BytesIO()
    pyarrow.parquet.write_table(table, raw)
    return raw.getvalue()


def _columns(count: int) -> list[pyarrow.Array]:
    """A column of each type that a parquet file may have."""
    values = [
        *([1] * count, [-1] * count, [2**62] * count, [None] * count, ["x"] * count, [" "] * count, [b"\xff"] * count),
        *([math.nan] * count, [math.inf] * count, [True] * count, [[1]] * count, [{"a": 1}] * count, ["\x00"] * count),
    ]
    typed = [
        *(pyarrow.timestamp("ns"), pyarrow.date32(), pyarrow.time64("us"), pyarrow.duration("us"), pyarrow.float32()),
        *(pyarrow.int8(), pyarrow.uint64(), pyarrow.decimal128(20, 3)),
    ]
    made = [pyarrow.array(value) for value in values]
    made += [pyarrow.array([1] * count, type=kind) for kind in typed[:-1]]
    made.append(pyarrow.array(["1.5"] * count).cast(typed[-1]))
    made.append(pyarrow.array(["x"] * count).dictionary_encode())
    return made


# ---------------------------------------------------------------------------------------------------------- targets


@cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="nlu-fuzz-")


def scratch(name: str) -> Path:
    folder = Path(_scratch().name) / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def written(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def loose_text(data: bytes) -> str:
    """Any text, halves of surrogate pairs among it: what a model or a JSON file may spell."""
    try:
        return data.decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return data.decode("utf-8", "surrogateescape")


# ----- recipes

SHIPPED = sorted((ROOT / "recipes").glob("*.yaml"))
BASE = b"name: trial\nmodel: {path: some/model}\ndata: {tasks: [cola]}\n"
OWN = b"""\
name: own
model: {path: some/model}
data:
  tasks:
    - name: mine
      description: Judge the text.
      question: 'Judge "{text}" of {place}.'
      labels: {good: [Good, fine], bad: [Bad]}
      metrics: [accuracy, f1_macro]
      group_by: [group]
      source:
        files: {train: train.jsonl, validation: train.jsonl}
        keep: {group: group}
    - name: other
      description: Judge the text.
      question: "Judge {text}."
      score_range: [0, 5]
      metrics: [pearson]
      source: {format: tsv, header: false, columns: {text: 0}, label: 1, num_columns: 2, files: {train: train.tsv}}
    - name: signed
      description: Judge the text.
      question: "Judge {text}."
      score_range: [-1, 1]
      score_decimals: 2
      source: {format: jsonl, files: {train: signed.jsonl}}
    - name: several
      description: Name the topics.
      question: "Name those of {text}."
      labels: {s: [Sports], m: [Money, cash]}
      multi_label: true
      no_label: nothing
      source: {format: jsonl, label_separator: ";", files: {train: several.jsonl}}
"""
OWN_FILES = {
    "train.jsonl": b'{"text": "a", "place": "b", "label": "good", "group": 1}\n'
    b'{"text": "c", "place": "d", "label": "bad", "group": 1}\n',
    "train.tsv": b"one\t2.5\nanother\t5\n",
    "signed.jsonl": b'{"text": "a", "label": -0.5}\n{"text": "b", "label": "1e-05"}\n',
    "several.jsonl": b'{"text": "a", "label": ["m", "s"]}\n{"text": "b", "label": "s;m"}\n'
    b'{"text": "c", "label": null}\n',
}


def read_recipe(data: bytes) -> None:
    use_recipe(written(scratch("recipe") / "recipe.yaml", data))


def read_overrides(data: bytes) -> None:
    """A valid recipe and one override a line."""
    use_recipe(written(scratch("override") / "recipe.yaml", BASE), loose_text(data).split("\n"))


def use_recipe(path: Path, overrides: Sequence[str] = ()) -> None:
    recipe = load_recipe(path, overrides)
    again = written(path.with_name("again.yaml"), dump_recipe(recipe).encode())
    assert load_recipe(again) == recipe, "the resolved recipe loads to another one"
    assert not any(math.isnan(value_at(recipe, key)) for key in all_keys() if isinstance(value_at(recipe, key), float))
    assert recipe.training_steps(100) > 0
    os.fsencode(recipe.run_dir)
    for task in recipe.data.tasks:
        prompt_text(task, dict.fromkeys(task.fields, "x")).encode()
        for gold in task.sample_labels:
            assert unpack_label(pack_label(task, gold))[1] == gold


def read_own(data: bytes) -> None:
    """A recipe that describes its own tasks, and their rows."""
    folder = scratch("own")
    for name, content in OWN_FILES.items():
        written(folder / name, content)
    recipe = load_recipe(written(folder / "recipe.yaml", data))
    for task in recipe.data.tasks:
        for split in task.source.files if task.suite == "own" else ():
            use_examples(task, load_examples(task, split, str(folder)))


# ----- data


def use_examples(task: Task, examples: Sequence[Any]) -> None:
    """What training, evaluation and the files of predictions do with rows."""
    predictions = []
    for example in examples:
        prompt_text(task, example.fields).encode()
        record = asdict(Prediction(task.name, example.index, "", None, example.label, example.kept))
        json.dumps(record, ensure_ascii=False).encode()
        if example.label is not None:
            answer = parse_answer(task.answer(example.label) + CLOSE, task)
            assert answer is not None, "no answer can equal the label"
            gold = answer if task.is_regression else example.label
            predictions.append(Prediction(task.name, example.index, "", gold, example.label, example.kept))
    by_question(examples)
    if predictions:
        score_all([task], predictions, intervals=False)


def data_target(name: str, task: str, splits: Sequence[str] = ("train", "validation", "test")) -> Target:
    """The official file of a task, read as each of its splits; accepted if it is one of them."""

    def read(data: bytes) -> None:
        folder, refused = scratch(name), []
        for split in splits:
            written(folder / TASKS[task].source.files[split], data)
            try:
                use_examples(TASKS[task], load_examples(TASKS[task], split, str(folder)))
            except UserError as error:
                refused.append(error)
        if len(refused) == len(splits):
            raise refused[0]

    return Target(name, read, lambda: [official(task, split)[1].encode() for split in splits])


TICKETS = Task.model_validate(
    {
        "name": "tickets",
        "description": "Name the team.",
        "question": '"{subject}" "{ticket body}"',
        "labels": ["sales", "it"],
        "source": {"label": "team", "incomplete": "keep", "unknown_labels": "skip"}
        | {"files": {"train": "rows.csv"}, "split": {"validation": 0.3}},
    }
)
TICKET_ROWS = (
    "subject,ticket body,team\r\n"
    + "".join(f'"a, {k}","two ""{k}""\nlines",{"it" if k % 2 else "sales"}\r\n' for k in range(8))
).encode()


def ticket_files() -> list[bytes]:
    return [TICKET_ROWS, TICKET_ROWS.replace(b",", b"\t"), TICKET_ROWS.decode().encode("utf-16")]


def read_table(data: bytes) -> None:
    """One's own file, as CSV and TSV, whole and in two splits."""
    folder, refused = scratch("table"), []
    for name in ("rows.csv", "rows.tsv"):
        written(folder / name, data)
        task = TICKETS.model_copy(update={"source": TICKETS.source.model_copy(update={"files": {"train": name}})})
        try:
            parts = [load_examples(task, split, str(folder)) for split in ("train", "validation")]
        except UserError as error:
            refused.append(error)
            continue
        for part in parts:
            use_examples(task, part)
        rows = [example.kept["row"] for part in parts for example in part]
        assert len(set(rows)) == len(rows), "a row is on both sides"
    if len(refused) == 2:
        raise refused[0]


PARQUET = ("cola", "stsb", "qnli", "boolq", "multirc", "record", "wsc", "axg")


def read_parquet(data: bytes) -> None:
    """The hub's form, read as several tasks."""
    folder, refused = scratch("parquet"), []
    for name in PARQUET:
        task = TASKS[name]
        split = next(iter(task.source.files))
        hub = task.source.hub
        assert hub is not None
        written(folder / hub.patterns(split)[0].replace("*", "0"), data)
        try:
            use_examples(task, load_examples(task, split, str(folder)))
        except UserError as error:
            refused.append(error)
    if len(refused) == len(PARQUET):
        raise refused[0]


def hub_files() -> list[bytes]:
    rows: list[dict[str, list[Any]]] = [
        {"sentence": ["a", "b"], "label": [0, 1], "idx": [0, 1]},
        {"sentence1": ["a", "b"], "sentence2": ["c", "d"], "label": [3.8, 0.0], "idx": [0, 1]},
        {"question": ["a", "b"], "sentence": ["c", "d"], "label": [0, 1], "idx": [0, 1]},
        {"question": ["a", "b"], "passage": ["c", "d"], "label": [0, 1], "idx": [0, 1]},
        {"premise": ["a", "b"], "hypothesis": ["c", "d"], "label": [0, 1], "idx": [0, 1]},
        {
            "paragraph": ["a", "a"],
            "question": ["b", "b"],
            "answer": ["c", "d"],
            "idx": [{"paragraph": 0, "question": 0, "answer": n} for n in (0, 1)],
            "label": [0, 1],
        },
        {
            "passage": ["Ann met Bob.", "Bob left."],
            "query": ["@placeholder met Bob", "@placeholder left"],
            "entities": [["Ann", "Bob"], ["Bob", "Al"]],
            "answers": [["Ann"], ["Bob"]],
            "idx": [{"passage": 0, "query": n} for n in (0, 1)],
        },
        {
            "text": ["Sam told Al that he won.", "He won, and he knew."],
            "span1_index": [0, 0],
            "span2_index": [4, 3],
            "span1_text": ["Sam", "Won"],
            "span2_text": ["he", "he"],
            "label": [1, 0],
            "idx": [0, 1],
        },
    ]
    return [parquet(pyarrow.table(columns)) for columns in rows]


# ----- archives, predictions, runs


@cache
def benchmarks() -> Path:
    return write_benchmarks(scratch("benchmarks"))


@cache
def predictions_of(suite: str) -> bytes:
    lines = []
    for task in SUITES[suite]:
        for example in load_examples(task, "test", str(benchmarks())):
            answer = float(str(task.fallback)) if task.is_regression else task.fallback
            positive_probability = 0.5 if task.is_ranked else None
            prediction = Prediction(task.name, example.index, "", answer, None, example.kept, positive_probability)
            lines.append(json.dumps(asdict(prediction), ensure_ascii=False))
    return "".join(f"{line}\n" for line in lines).encode()


def read_answers(data: bytes) -> None:
    """The rows that `nlu submit` takes, as the archive of each suite."""
    source = written(scratch("predictions") / "predictions_test.jsonl", data)
    by_task, refused = read_predictions([source]), []
    assert all(by_task.values())
    for suite in SUITES:
        try:
            make_archive([source], suite, source.with_name("sent.zip"), str(benchmarks()), fill="majority")
        except UserError as error:
            refused.append(error)
    if len(refused) == len(SUITES):
        raise refused[0]


def read_archive(data: bytes) -> None:
    path, refused = written(scratch("archive") / "sent.zip", data), []
    for suite in SUITES:
        try:
            check_archive(path, suite, str(benchmarks()))
        except UserError as error:
            refused.append(error)
    if len(refused) == len(SUITES):
        raise refused[0]


@cache
def archives() -> tuple[bytes, ...]:
    folder = scratch("archives")
    made = []
    for suite in SUITES:
        source = written(folder / f"{suite}.jsonl", predictions_of(suite))
        make_archive([source], suite, folder / f"{suite}.zip", str(benchmarks()))
        made.append((folder / f"{suite}.zip").read_bytes())
    return tuple(made)


RUN_FILES = ("recipe.yaml", "eval.json", "metrics.jsonl", "validation.jsonl", "best.json")


@cache
def run_files() -> dict[str, bytes]:
    """A finished PPO run on SST-2, RTE and a task of its own."""
    recipe = yaml.safe_load(OWN)
    recipe["data"]["tasks"] = ["sst2", "rte", recipe["data"]["tasks"][0]]
    raw = written(scratch("draft") / "recipe.yaml", yaml.safe_dump(recipe).encode())
    resolved = load_recipe(raw)
    after = {}
    for task in resolved.data.tasks:
        metrics = {"accuracy": 0.75} | ({"f1_macro": 0.5} if task.name == "mine" else {})
        shares = {words[0]: 1 / len(task.labels) for words in task.labels.values()}
        after[task.name] = {
            "score": sum(metrics.values()) / len(metrics),
            "metrics": metrics,
            "intervals": {name: [value - 0.05, value + 0.05] for name, value in metrics.items()},
            "samples": 200,
            "format_error_rate": 0.0,
            "majority": 0.5,
            "gold_shares": shares,
            "predicted_shares": shares,
        }
    training = {"tasks": list(after), "steps": 2, "samples": 32, "seconds": 9.5, "started_from": None}
    evaluated = {"method": "ppo", "split": "validation", "before": after, "after": after, "training": training}
    iterations = [
        {"step": k, "samples": 16 * k, "elapsed_s": 5.0 * k, "reward_mean": 0.1 * k, "accuracy": 0.5} for k in (1, 2)
    ]
    validations = [{"step": k, "samples": 16 * k, "seconds": 4.0, "mean": 0.5, "tasks": {"sst2": {}}} for k in (1, 2)]
    return {
        "recipe.yaml": dump_recipe(resolved).encode(),
        "eval.json": json.dumps(evaluated).encode(),
        "metrics.jsonl": b"".join(json.dumps(line).encode() + b"\n" for line in iterations),
        "validation.jsonl": b"".join(json.dumps(line).encode() + b"\n" for line in validations),
    }


def damaged_files() -> list[bytes]:
    sweep = {"best.json": b'["first", "second"]'}
    return [name.encode() + b"\n" + text for name, text in (run_files() | sweep).items()]


def read_run(data: bytes) -> None:
    """A folder of runs of which one has a damaged file: its name is the first line. `nlu report` without pictures."""
    name, _, content = data.partition(b"\n")
    file = next((one for one in RUN_FILES if one.encode() == name), RUN_FILES[len(data) % len(RUN_FILES)])
    folder = scratch("runs")
    for other in RUN_FILES:
        for place in (folder, folder / "first"):
            (place / other).unlink(missing_ok=True)
    for other, text in run_files().items():
        written(folder / "first" / other, text)
        written(folder / "second" / other, text)
    written(folder / file if file == "best.json" else folder / "first" / file, content)
    runs = find_runs([folder], lambda message: None)
    shutil.rmtree(report := scratch("report"))
    with mock.patch.multiple(
        "extensions.reporting.report", reward_curves=lambda *a: None, accuracy_curves=lambda *a: None
    ):
        write_report(runs, report)


# ----- what models write


KINDS = [
    Task.model_validate({"name": "own", "description": "Judge.", "question": "{text}"} | keys)
    for keys in (
        {"labels": ["Yes", "No"]},
        {"score_range": [-1, 5]},
        {"labels": ["Yes", "No"], "multi_label": True},
    )
]


def read_response(data: bytes) -> None:
    """Any text is a response; its reward is one of those allowed, and the lowest exactly for a wrong format."""
    text = loose_text(data)
    for task in (*TASKS.values(), *KINDS):
        answer = parse_answer(text, task)
        if task.multi_label:
            assert answer is None or task.is_label_set(str(answer))
            allowed, wrong, golds = {-1.0, 0.0, 0.5, 1.0}, -1.0, task.sample_labels
        elif task.score_range is None:
            assert answer is None or answer in task.labels
            allowed, wrong, golds = {-1.0, 0.0, 1.0}, -1.0, list(task.labels)
        else:
            low, high = task.score_range
            assert answer is None or (isinstance(answer, float) and low <= answer <= high)
            allowed, wrong, golds = None, -(high - low) / 2, [*task.sample_labels, str((low + high) / 2)]
        for gold in golds:
            value = reward(text, pack_label(task, gold))
            assert value in allowed if allowed else wrong <= value <= -wrong, f"reward {value} for {task.name}"
            if answer is None or allowed:
                assert (value == wrong) == (answer is None), f"reward {value} for answer {answer!r} of {task.name}"


def read_label(data: bytes) -> None:
    """The string that a reward gets; ValueError is its way to refuse."""
    try:
        task, gold = unpack_label(loose_text(data))
    except ValueError as error:
        raise UserError(str(error)) from error
    assert isinstance(gold, str), f"gold {gold!r}"
    for text in (f"Yes{CLOSE}", f"2.5{CLOSE}", ""):
        assert math.isfinite(reward(text, loose_text(data)))
    assert unpack_label(pack_label(task, gold))[1] == gold


def responses() -> list[bytes]:
    words = sorted({word for task in TASKS.values() for group in task.labels.values() for word in group})
    texts = [
        *words,
        "-0.5",
        "No, Yes",
        "none",
        "3.5",
        "0",
        "5.0",
        " Yes, because it is.",
        "**No**",
        "The answer is 4.25.",
    ]
    return [f"{text}{CLOSE}".encode() for text in texts]


def labels() -> list[bytes]:
    known = [pack_label(task, next(iter(task.labels), "2.5")) for task in TASKS.values()]
    path = written(scratch("labels") / "recipe.yaml", OWN)
    own = [pack_label(task, task.sample_labels[-1]) for task in load_recipe(path).data.tasks]
    return [label.encode() for label in (*known, *own)]


TARGETS = {
    target.name: target
    for target in (
        Target("recipe", read_recipe, lambda: [BASE, OWN, *(path.read_bytes() for path in SHIPPED)]),
        Target("override", read_overrides, lambda: [b"ppo.batch_size=8\ndata.tasks=cola,rte", b"reward=a/b\nseed=3"]),
        Target("own", read_own, lambda: [OWN]),
        data_target("tsv", "qnli"),
        data_target("cola", "cola"),
        data_target("stsb", "stsb"),
        data_target("jsonl", "boolq"),
        data_target("multirc", "multirc"),
        data_target("record", "record"),
        data_target("wsc", "wsc"),
        data_target("axg", "axg", ("test",)),
        Target("parquet", read_parquet, hub_files),
        Target("table", read_table, ticket_files),
        Target("predictions", read_answers, lambda: [predictions_of(suite) for suite in SUITES]),
        Target("archive", read_archive, archives),
        Target("runs", read_run, damaged_files),
        Target("parser", read_response, responses),
        Target("labels", read_label, labels),
    )
}  # fmt: skip

# ---------------------------------------------------------------------------------------------------------- atheris

# Modules must be imported under instrumentation, so another interpreter does it.
INSTRUMENTED = """\
import sys
import atheris
sys.path.insert(0, sys.argv.pop(1))
names = "comparison data metrics prompts recipe results rows run submit tables tasks".split()
with atheris.instrument_imports(include=[f"extensions.{name}" for name in names] + ["yaml", "json", "zipfile"]):
    import fuzz
fuzz.explore(*sys.argv[1:])
"""


def atheris_is_there() -> bool:
    try:
        import atheris  # noqa: F401
    except ImportError:
        return False
    return True


def run_atheris(target: Target, seconds: float, seed: int) -> Counts:
    """The coverage-guided engine, in another process."""
    with tempfile.TemporaryDirectory(prefix="nlu-fuzz-") as folder:
        arguments = [str(Path(__file__).parent), target.name, f"{seconds:g}", str(seed), folder]
        process = subprocess.run(
            [sys.executable, "-c", INSTRUMENTED, *arguments], capture_output=True, text=True, cwd=folder
        )
        report = Path(folder) / "counts.json"
        if process.returncode or not report.exists():
            raise RuntimeError(f"atheris stopped with status {process.returncode}:\n{process.stderr[-3000:]}")
        record = json.loads(report.read_text())
        crashes = [Crash(target.name, bytes.fromhex(data), error) for data, error in record.pop("uncaught")]
        return Counts(**record, uncaught=crashes)


def explore(name: str, seconds: str, seed: str, folder: str) -> None:
    """What that process does: atheris chooses the cases, half of them by our mutator. Does not return."""
    import atheris

    target, counts, corpus = TARGETS[name], Counts(), TARGETS[name].seeds()
    limit_memory()
    for n, data in enumerate(corpus):
        written(Path(folder) / "corpus" / str(n), data)
    end = time.monotonic() + float(seconds)

    def one(data: bytes) -> None:
        feed(target, data, counts, slowdown=6)
        if time.monotonic() > end:
            record = asdict(counts) | {"uncaught": [(crash.data.hex(), crash.error) for crash in counts.uncaught]}
            (Path(folder) / "counts.json").write_text(json.dumps(record))
            _scratch().cleanup()
            os._exit(0)

    def mutator(data: bytes, longest: int, number: int) -> bytes:
        rng = random.Random(number)
        if rng.random() < 0.5:
            return mutated(data, rng, corpus)[:longest]
        return atheris.Mutate(data, longest)

    lengths = [f"-max_len={LONGEST_GUIDED}", "-rss_limit_mb=0", "-timeout=100"]  # the limits are ours
    atheris.Setup(
        ["fuzz", f"-seed={int(seed) + 1}", *lengths, "-verbosity=0", str(Path(folder) / "corpus")],
        one,
        custom_mutator=mutator,
    )
    atheris.Fuzz()


def limit_memory() -> None:
    """So that an input which takes all memory ends in MemoryError."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    soft = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


# ------------------------------------------------------------------------------------------------------ command line


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Feed mutated input to everything that reads input.")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"default: all of {', '.join(TARGETS)}")
    parser.add_argument("--cases", type=int, default=CASES, help="of the seeded mutator, for each target")
    parser.add_argument("--seconds", type=float, default=0, help="of atheris, for each target; 0: none")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--crashes", type=Path, default=Path("fuzz-crashes"), help="folder for the inputs that crash")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.targets if name not in TARGETS]
    if unknown:
        parser.error(f"unknown target {unknown[0]!r}; allowed: {', '.join(TARGETS)}")
    if options.seconds and not atheris_is_there():
        parser.error("--seconds needs atheris, which the extra `dev` installs on Linux with Python 3.11")
    limit_memory()
    crashes: list[Crash] = []
    print(f"{'target':12} {'engine':8} {'cases':>8} {'accepted':>9} {'refused':>8} {'uncaught':>9}")
    for name in options.targets or TARGETS:
        engines: dict[str, Callable[[], Counts]] = {}
        if options.cases:
            engines["seeded"] = lambda: run(TARGETS[name], options.cases, options.seed)  # noqa: B023
        if options.seconds:
            engines["atheris"] = lambda: run_atheris(TARGETS[name], options.seconds, options.seed)  # noqa: B023
        for engine, start in engines.items():
            counts = start()
            numbers = f"{counts.cases:8} {counts.accepted:9} {counts.refused:8} {len(counts.uncaught):9}"
            print(f"{name:12} {engine:8} {numbers}", flush=True)
            crashes += counts.uncaught
    for crash in crashes:
        written(options.crashes / crash.file_name, crash.data)
    seen: set[str] = set()
    for crash in crashes:
        kind = crash.error.partition(":")[0] + crash.error.partition(":")[2].partition(":")[0]
        if kind not in seen:
            seen.add(kind)
            print(f"{options.crashes / crash.file_name}: {crash.error}")
    return 1 if crashes else 0


if __name__ == "__main__":
    sys.exit(main())
