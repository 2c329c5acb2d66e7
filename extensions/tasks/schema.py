"""What a task may declare: prompt, answers, metrics, files, the evaluation server's format.

The entries of `extensions.tasks` and a recipe's own `data.tasks` have the same keys.
"""

from __future__ import annotations

import math
import re
import unicodedata
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

SPLITS = ("train", "validation", "test")
Metric = Literal[
    "accuracy",
    "matthews",
    "f1",
    "f1_macro",
    "pearson",
    "spearman",
    "f1a",
    "exact_match",
    "squad_f1",
    "squad_em",
    "gender_parity",
    "balanced_accuracy",
    "f1_micro",
    "subset_accuracy",
    "mae",
    "rmse",
    "r2",
]
_OF_POSITIVE = ("f1", "f1a", "squad_f1", "squad_em")
_OF_RANKING = ("squad_f1", "squad_em")
_OF_UNITS = ("exact_match", "squad_f1", "squad_em", "gender_parity")
# A pair of equal braces stands for one; else what is between braces names a field (group 1), whatever its characters.
PLACEHOLDER = re.compile(r"\{\{|\}\}|\{(?!\s)([^{}\r\n]+)(?<!\s)\}")


def _words_of_labels(value: Any) -> Any:
    """`labels: [a, b]` is short for `labels: {a: [a], b: [b]}`; a lone word is short for a list of one.

    YAML 1.1 reads bare yes/no/on/off as booleans and 1 as a number: refused, since a silent `False` would be a
    label that no answer can match.
    """
    if isinstance(value, list):
        value = {word: [word] for word in _only_text(value)}
    if not isinstance(value, dict):
        return value
    _only_text(list(value))
    return {key: _only_text(words if isinstance(words, list) else [words]) for key, words in value.items()}


_MOST_MARKS = 30  # that follow each other in any writing (the Stream-Safe Text Format of UAX 15)
_SPLITS_INTO_MARKS = "\u0f73\u0f75\u0f81"  # no marks by their class, but two each when decomposed
_ASCII_OTHERWISE = re.compile("([\u037e\u1fef\u212a])")  # Greek question mark and varia, Kelvin sign


def nfc(text: str) -> str:
    """Unicode NFC, in which answers are compared: a letter and its mark are one character where there is one.

    Linear: text with more marks in a row than any writing has stays as it is, since sorting them is quadratic. So do
    characters that NFC makes ASCII: only what is written in ASCII is read as such.
    """
    if text.isascii():
        return text
    marks = 0
    for character in text:
        marks = marks + 1 if unicodedata.combining(character) or character in _SPLITS_INTO_MARKS else 0
        if marks > _MOST_MARKS:
            return text
    return "".join(
        part if _ASCII_OTHERWISE.match(part) else unicodedata.normalize("NFC", part)
        for part in _ASCII_OTHERWISE.split(text)
    )


def fold(word: str) -> str:
    """A label word as answers are compared: case, the width of spaces and the Unicode form (NFC) do not count."""
    return " ".join(nfc(nfc(word).lower()).split())


def _check_braces(key: str, text: str, placeholders: bool) -> None:
    """ValueError for a brace that is neither of a placeholder nor doubled, or of a placeholder where none may be."""
    bare = PLACEHOLDER.sub(lambda match: "\0" * len(match[0]), text)
    found = re.search(r"[{}]", bare)
    if found:
        at = found.start()
        shown = text[max(0, at - 20) : at + 30]
        inside = re.match(r"\{\s*([^{}]*?)\s*\}", text[at:])
        name = " ".join(inside[1].split()) if inside else ""
        form = f"write {{{name}}}" if name else "a placeholder is the name of a column between braces, as {ticket body}"
        raise ValueError(f"{key}: the brace in {shown!r} is of no placeholder; {form}, or {{{{ and }}}} for braces")
    named = next((match[1] for match in PLACEHOLDER.finditer(text) if match[1]), None)
    if named and not placeholders:
        raise ValueError(
            f"{key}: {{{named}}} is a placeholder, and this text is the same for all rows; put it into question, or "
            f"write {{{{{named}}}}} for the word in braces"
        )


def _list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _pair(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _only_text(words: list[Any]) -> list[str]:
    for word in words:
        if not isinstance(word, str):
            raise ValueError(f"label words must be text, got {word!r}; YAML reads bare yes/no/1 otherwise: quote it")
        if not word.strip() or "judgement" in word.lower() or "<" in word:
            raise ValueError(f"label word {word!r} is empty, or holds '<' or the word of the answer's own tags")
    return words


class SplitFormat(BaseModel):
    """How the file of one split differs from the others."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    columns: dict[str, str | int] | None = Field(None, description="field -> column name or index")
    label: str | int | None = Field(None, description="column of the label")
    header: bool | None = Field(None, description="whether the first TSV line names the columns")


class Hub(BaseModel):
    """The same rows in a data set of the Hugging Face hub, as parquet files."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    repo: str = Field(description="data set on the hub")
    config: str = Field("", description="its configuration (folder); default: the files' own names say it")
    splits: dict[str, str] = Field({}, description="split -> name there, where it differs")
    columns: dict[str, str] = Field({}, description="field -> column there, where it differs from the field")
    labels: list[str] = Field([], description="label of each class number there; default: the number itself")

    def patterns(self, split: str) -> tuple[str, ...]:
        """Globs of a split's parquet files, as people upload them and as the hub converts them."""
        name = self.splits.get(split, split)
        if not self.config:
            return f"data/{name}-*.parquet", f"{name}-*.parquet", f"{name}.parquet", f"default/{name}/*.parquet"
        return f"{self.config}/{name}-*.parquet", f"{self.config}/{name}/*.parquet"


class Split(BaseModel):
    """Shares of the training file that are held out: drawn by `seed`, stratified, rows of equal texts on one side."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    validation: float = Field(0.0, ge=0, lt=1, description="share of the rows for validation")
    test: float = Field(0.0, ge=0, lt=1, description="share of the rows for the test split")
    seed: int = Field(0, ge=0, description="of the draw; apart from the run's, so that runs share their test split")


class Source(BaseModel):
    """Where the rows of a task are, and which column is what."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    generator: Literal["acceptability", "reviews"] | None = Field(None, description="makes the rows; no files then")
    format: Literal["auto", "csv", "tsv", "jsonl", "parquet"] = Field(
        "auto", description="of the files; auto: by their suffix"
    )
    quoting: Literal["csv", "none"] = Field(
        "csv", description="of CSV and TSV: as RFC 4180 and pandas have it, or a quote is a character (GLUE)"
    )
    separator: str | None = Field(None, description="of CSV; null: the one of , ; | and tab that the header shows")
    encoding: str = Field("utf-8", description="of CSV, TSV and JSONL; a byte order mark says it by itself")
    files: dict[str, str] = Field({}, description="split (train, validation, test) -> file, relative to data.root")
    columns: dict[str, str | int] = Field({}, description="field -> column name, or index where there is no header")
    label: str | int | None = Field("label", description="column of the label")
    header: bool = Field(True, description="whether the first TSV line names the columns")
    num_columns: int | None = Field(None, description="TSV columns of a row, where there is no header")
    split: Split | None = Field(None, description="hold out parts of files.train, where a split has no file")
    label_separator: str = Field(",", min_length=1, description="between the labels of a multi-label cell of text")
    unlabelled: list[str] = Field([], description="splits whose rows carry no label")
    exceptions: dict[str, SplitFormat] = Field({}, description="split -> how its file differs")
    keep: dict[str, str] = Field({}, description="name -> column kept in predictions, such as an official row number")
    rows: Literal["multirc", "record", "wsc", "winogender"] | None = Field(
        None, description="function of extensions/data/nested.py that makes an object of the file into rows"
    )
    incomplete: Literal["error", "skip", "keep"] = Field(
        "error",
        description="what to do with a row that lacks a text; skip: leave it out of training, keep it elsewhere; keep: "
        "the text is empty",
    )
    unknown_labels: Literal["error", "skip"] = Field(
        "error", description="what to do with a row whose label is empty or no label of the task; skip: leave it out"
    )
    sizes: dict[str, int] = Field({}, description="official number of rows (ReCoRD: queries) of each split")
    hub: Hub | None = Field(None, description="the same rows on the hub")

    @model_validator(mode="after")
    def _known_splits(self) -> Source:
        for split in (*self.files, *self.unlabelled, *self.exceptions, *self.sizes):
            if split not in SPLITS:
                raise ValueError(f"unknown split {split!r}; allowed: {', '.join(SPLITS)}")
        if self.separator is not None and (len(self.separator) != 1 or self.separator in '"\r\n'):
            raise ValueError(f"separator: {self.separator!r} is not one character that may stand between cells")
        if self.split is None:
            return self
        if self.split.validation + self.split.test >= 1:
            raise ValueError("split: validation and test leave no rows for training; together they must be below 1")
        if self.generator is not None or ("train" not in self.files and self.hub is None):
            raise ValueError("split: there is no training file to hold rows out of; give files.train")
        for name in ("validation", "test"):
            if getattr(self.split, name) and name in self.files:
                raise ValueError(f"split.{name}: files.{name} is given already; leave one of them out")
        return self

    def is_drawn(self, split: str) -> bool:
        """Whether the rows of a split are held out of the training file."""
        return self.split is not None and split != "train" and getattr(self.split, split) > 0

    def in_split(self, split: str) -> Source:
        """The same source with the exceptions of `split` applied."""
        exception = self.exceptions.get(split)
        return self.model_copy(update=exception.model_dump(exclude_none=True)) if exception else self


class Submission(BaseModel):
    """What the benchmark's evaluation server takes."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    file: str = Field(
        description="name in the archive (letters, digits, . _ -); .tsv or .jsonl decides the format",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\.(tsv|jsonl)$",
    )
    labels: dict[str, str | int] = Field({}, description="label -> what the server calls it, where that differs")
    nesting: Literal["multirc", "record"] | None = Field(None, description="rows of one question in one object")


class Task(BaseModel):
    """One language-understanding task.

    The prompt has the four parts of the paper's section 4.1: description, answer format, question, and the opening
    tag. `labels` maps each label, as it stands in the data, to the words that mean it; the first is the one that the
    prompt asks for. A regression task has `score_range` instead.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: str = Field(description="name in recipes, metrics and tables", pattern=r"^[A-Za-z0-9][\w.-]*$")
    suite: Literal["glue", "superglue", "generated", "own"] = Field("own", description="benchmark that it belongs to")
    title: str = Field("", description="name as the benchmark prints it")
    description: str = Field(description="part 1: what the task is, for the model", min_length=1)
    answer_format: str = Field("", description="part 2: what to insert between the tags; default: made from the labels")
    question: str = Field(
        description="part 3: the query, with {field} placeholders: any name of a column; {{ and }} are braces",
        min_length=1,
    )
    labels: Annotated[dict[str, list[str]], BeforeValidator(_words_of_labels)] = Field(
        {}, description="label in the data -> words that mean it, the canonical one first"
    )
    score_range: Annotated[tuple[float, float] | None, BeforeValidator(_pair)] = Field(
        None, description="lowest and highest score of a regression task"
    )
    score_decimals: int | None = Field(
        None, ge=0, le=6, description="decimals of the scores that the model should write; null: as in the data"
    )
    multi_label: bool = Field(
        False, description="several labels may be right at once: the answer lists them, or is the word of no_label"
    )
    no_label: str = Field("none", description="answer of a multi-label row without a label", min_length=1)
    answer_match: Literal["auto", "exact", "keyword"] = Field(
        "auto",
        description="exact: the answer is one of the label's words; keyword: it holds one (paper 4.3). auto: keyword "
        "for the built-in tasks, exact for one's own",
    )
    positive: str | None = Field(None, description="label that F1 is computed for")
    metrics: list[Metric] = Field(
        ["accuracy"], description="metrics of the benchmark's table; their mean is the task's score", min_length=1
    )
    more_metrics: list[Metric] = Field([], description="also reported, no part of the score")
    unit: list[str] = Field([], description="kept columns that say which rows are one question, where metrics need it")
    fallback: str | None = Field(
        None, description="label for the evaluation server where the answer has a wrong format"
    )
    taught_by: str | None = Field(
        None, description="built-in task of the same prompt whose training rows serve one that is only evaluated"
    )
    averaged: bool = Field(False, description="counts in the average of its suite")
    truncate: Annotated[list[str], BeforeValidator(_list)] = Field(
        [], description="fields to shorten when the prompt is too long, the longest text of the row first; default: all"
    )
    source: Source = Field(Source(), description="files and columns")
    submission: Submission | None = Field(None, description="the evaluation server's format")

    @model_validator(mode="after")
    def _consistent(self) -> Task:
        if bool(self.labels) == (self.score_range is not None):
            raise ValueError("give either labels (classification) or score_range (regression)")
        if self.labels and len(self.labels) < 2:
            raise ValueError("labels needs at least two entries")
        if self.score_range and not 0 <= self.score_range[0] < self.score_range[1] < math.inf:
            raise ValueError(f"score_range must be [low, high] with 0 <= low < high, got {list(self.score_range)}")
        for key in ("question", "description", "answer_format"):
            _check_braces(key, getattr(self, key), placeholders=key == "question")
        if not self.fields:
            raise ValueError(
                "question uses no {field}: the model would never see the data; write the name of a column between "
                "single braces"
            )
        words = [fold(word) for group in self.labels.values() for word in group]
        twice = sorted({word for word in words if words.count(word) > 1})
        if twice:
            raise ValueError(
                f"label words must be distinct (case and Unicode form do not count); used twice: {', '.join(twice)}"
            )
        if len({nfc(label) for label in self.labels}) < len(self.labels):
            raise ValueError("labels must be distinct in Unicode NFC: two are the same but for how marks are written")
        if self.fallback is not None and not self._allows(self.fallback):
            raise ValueError(f"fallback: {self.fallback!r} is no answer of the task")
        for name in self.truncate:
            if name not in self.fields:
                raise ValueError(f"truncate: {name!r} is not a field of the question ({', '.join(self.fields)})")
        if self.positive is not None and self.positive not in self.labels:
            raise ValueError(f"positive: {self.positive!r} is not one of the labels ({', '.join(self.labels)})")
        metrics = [*self.metrics, *self.more_metrics]
        for metric in metrics:
            if metric in _OF_POSITIVE and self.positive is None:
                raise ValueError(f"metric {metric} needs `positive`, the label that it is computed for")
            if metric in _OF_UNITS and not self.unit:
                raise ValueError(f"metric {metric} needs `unit`, which says which rows are one question")
        unknown = [name for name in self.unit if name not in self.source.keep]
        if unknown:
            raise ValueError(f"unit: {unknown[0]!r} is not in source.keep ({', '.join(self.source.keep) or 'empty'})")
        numeric = {"pearson", "spearman"}
        wrong = [m for m in metrics if (m in numeric) != (self.score_range is not None)]
        if wrong:
            kind = "regression" if self.score_range else "classification"
            raise ValueError(f"metric {wrong[0]} does not fit a {kind} task")
        return self

    def _allows(self, answer: str) -> bool:
        if self.score_range is None:
            return answer in self.labels
        try:
            return self.score_range[0] <= float(answer) <= self.score_range[1]
        except ValueError:
            return False

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the fields that the question uses, in order of first use."""
        return tuple(dict.fromkeys(match[1] for match in PLACEHOLDER.finditer(self.question) if match[1]))

    @property
    def is_regression(self) -> bool:
        return self.score_range is not None

    @property
    def display_name(self) -> str:
        return self.title or self.name

    @property
    def is_ranked(self) -> bool:
        """Whether rows are candidates for one answer, of which the best supported is the prediction (ReCoRD)."""
        return any(metric in _OF_RANKING for metric in self.metrics)

    @property
    def long_field(self) -> str:
        """The field whose text rows of one question share: the first of `truncate`, else of the question."""
        return self.truncate[0] if self.truncate else self.fields[0]

    def unit_of(self, kept: dict[str, Any]) -> tuple[str, ...]:
        """What the rows of one question have in common, from the kept columns; empty where each row is one."""
        return tuple(str(kept[name]) for name in self.unit)

    def label_of(self, text: str) -> str | None:
        """The label that a text of the data is, up to its Unicode form (NFC); None if it is none."""
        return text if text in self.labels else next((one for one in self.labels if nfc(one) == nfc(text)), None)

    def answer(self, label: str) -> str:
        """The word (or number) that the model should write for `label`."""
        return label if self.is_regression else self.labels[label][0]
