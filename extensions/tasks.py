"""The tasks: one declarative entry each.

To add a task to the project, add an entry to `TASKS`; to use your own data, write the same keys in a recipe under
`data.tasks`. Nothing else in the code knows a task by name.
"""

from __future__ import annotations

import difflib
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from extensions.errors import UserError

SPLITS = ("train", "validation", "test")
PLACEHOLDER = re.compile(r"\{(\w+)\}")


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


def fold(word: str) -> str:
    """A label word as answers are compared: case and the width of spaces do not count."""
    return " ".join(word.lower().split())


def _pair(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _only_text(words: list[Any]) -> list[str]:
    for word in words:
        if not isinstance(word, str):
            raise ValueError(f"label words must be text, got {word!r}; YAML reads bare yes/no/1 otherwise: quote it")
        if not word.strip() or "judgement" in word.lower():
            raise ValueError(f"label word {word!r} is empty or holds the word of the answer's own tags")
    return words


class Source(BaseModel):
    """Where the rows of a task are, and which column is what."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    generator: Literal["acceptability", "reviews"] | None = Field(None, description="makes the rows; no files then")
    format: Literal["tsv", "jsonl"] = Field("jsonl", description="of the files")
    files: dict[str, str] = Field({}, description="split (train, validation, test) -> file, relative to data.root")
    columns: dict[str, str | int] = Field({}, description="field -> column name, or index where there is no header")
    label: str | int | None = Field("label", description="column of the label")
    header: bool = Field(True, description="whether the first TSV line names the columns")
    unlabelled: list[str] = Field([], description="splits whose rows carry no label")
    num_columns: int | None = Field(None, description="TSV columns of a row, where there is no header")
    unlabelled_header: bool = Field(True, description="whether unlabelled TSV files have a header")
    unlabelled_columns: dict[str, str | int] | None = Field(
        None, description="columns of unlabelled files, if different"
    )

    @model_validator(mode="after")
    def _known_splits(self) -> Source:
        for split in (*self.files, *self.unlabelled):
            if split not in SPLITS:
                raise ValueError(f"unknown split {split!r}; allowed: {', '.join(SPLITS)}")
        return self


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
    question: str = Field(description="part 3: the query, with {field} placeholders", min_length=1)
    labels: Annotated[dict[str, list[str]], BeforeValidator(_words_of_labels)] = Field(
        {}, description="label in the data -> words that mean it, the canonical one first"
    )
    score_range: Annotated[tuple[float, float] | None, BeforeValidator(_pair)] = Field(
        None, description="lowest and highest score of a regression task"
    )
    positive: str | None = Field(None, description="label that F1 is computed for")
    metrics: list[Literal["accuracy", "matthews", "f1", "f1_macro", "pearson", "spearman"]] = Field(
        ["accuracy"], description="metrics, the main one first", min_length=1
    )
    truncate: str | None = Field(None, description="field to shorten when the prompt is too long; default: the first")
    source: Source = Field(Source(), description="files and columns")

    @model_validator(mode="after")
    def _consistent(self) -> Task:
        if bool(self.labels) == (self.score_range is not None):
            raise ValueError("give either labels (classification) or score_range (regression)")
        if self.labels and len(self.labels) < 2:
            raise ValueError("labels needs at least two entries")
        if self.score_range and not 0 <= self.score_range[0] < self.score_range[1]:
            raise ValueError(f"score_range must be [low, high] with 0 <= low < high, got {list(self.score_range)}")
        if not self.fields:
            raise ValueError("question uses no {field}: the model would never see the data")
        words = [fold(word) for group in self.labels.values() for word in group]
        twice = sorted({word for word in words if words.count(word) > 1})
        if twice:
            raise ValueError(f"label words must be distinct (case does not count); used twice: {', '.join(twice)}")
        if self.truncate is not None and self.truncate not in self.fields:
            raise ValueError(f"truncate: {self.truncate!r} is not a field of the question ({', '.join(self.fields)})")
        if self.positive is not None and self.positive not in self.labels:
            raise ValueError(f"positive: {self.positive!r} is not one of the labels ({', '.join(self.labels)})")
        if "f1" in self.metrics and self.positive is None:
            raise ValueError("metric f1 needs `positive`, the label that it is computed for")
        numeric = {"pearson", "spearman"}
        wrong = [m for m in self.metrics if (m in numeric) != (self.score_range is not None)]
        if wrong:
            kind = "regression" if self.score_range else "classification"
            raise ValueError(f"metric {wrong[0]} does not fit a {kind} task")
        return self

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the fields that the question uses, in order of first use."""
        return tuple(dict.fromkeys(PLACEHOLDER.findall(self.question)))

    @property
    def is_regression(self) -> bool:
        return self.score_range is not None

    @property
    def display_name(self) -> str:
        return self.title or self.name

    def column(self, field: str, split: str) -> str | int:
        """Column of `field` in the files of `split`; by default the field's own name."""
        columns = self.source.columns
        if split in self.source.unlabelled and self.source.unlabelled_columns is not None:
            columns = self.source.unlabelled_columns
        return columns.get(field, field)

    def answer(self, label: str) -> str:
        """The word (or number) that the model should write for `label`."""
        return label if self.is_regression else self.labels[label][0]


_YES_NO = 'Insert only "Yes" or "No" here'
# In this order both answers are about as likely at first: with "Positive" first SmolLM2-135M-Instruct gives it 97% of
# the time on generated reviews, and sampling hardly ever tries the other.
_NEGATIVE_POSITIVE = 'Insert only "Negative" or "Positive" here'

_ACCEPTABILITY = {
    # Section 4.1 of the paper gives this prompt.
    "description": "You are an assistant to analyze the linguistic properties of a sentence. The task is to decide the "
    "linguistic acceptability of a sentence. If the sentence is linguistically correct then it is acceptable, else it "
    "is not.",
    "answer_format": _YES_NO,
    "question": 'Now judge if the sentence "{sentence}" is linguistically acceptable.',
    "labels": {"1": ["Yes", "acceptable"], "0": ["No", "not acceptable", "unacceptable"]},
    "positive": "1",
}

_ENTRIES: list[dict[str, Any]] = [
    {
        "name": "acceptability",
        "suite": "generated",
        "title": "Acceptability",
        **_ACCEPTABILITY,
        "metrics": ["accuracy", "matthews"],
        "source": {"generator": "acceptability"},
    },
    {
        "name": "reviews",
        "suite": "generated",
        "title": "Reviews",
        "description": "You are an assistant to analyze the sentiment of reviews. The task is to decide whether the "
        "sentiment of a review is positive or negative.",
        "answer_format": _NEGATIVE_POSITIVE,
        "question": 'Now judge the sentiment of the review "{sentence}".',
        "labels": {"1": ["Positive"], "0": ["Negative"]},
        "positive": "1",
        "metrics": ["accuracy", "matthews"],
        "source": {"generator": "reviews"},
    },
    {
        "name": "cola",
        "suite": "glue",
        "title": "CoLA",
        **_ACCEPTABILITY,
        "metrics": ["matthews", "accuracy"],
        "source": {
            "format": "tsv",
            "files": {"train": "CoLA/train.tsv", "validation": "CoLA/dev.tsv", "test": "CoLA/test.tsv"},
            "columns": {"sentence": 3},
            "label": 1,
            "header": False,
            "num_columns": 4,
            "unlabelled": ["test"],
            "unlabelled_columns": {"sentence": "sentence"},
        },
    },
    {
        "name": "sst2",
        "suite": "glue",
        "title": "SST-2",
        "description": "You are an assistant to analyze the sentiment of movie reviews. The task is to decide whether "
        "the sentiment of a piece of a review is positive or negative.",
        "answer_format": _NEGATIVE_POSITIVE,
        "question": 'Now judge the sentiment of the review "{sentence}".',
        "labels": {"1": ["Positive"], "0": ["Negative"]},
        "positive": "1",
        "metrics": ["accuracy"],
        "source": {
            "format": "tsv",
            "files": {"train": "SST-2/train.tsv", "validation": "SST-2/dev.tsv", "test": "SST-2/test.tsv"},
            "unlabelled": ["test"],
        },
    },
    {
        "name": "rte",
        "suite": "glue",
        "title": "RTE",
        "description": "You are an assistant to analyze the logical relation between two texts. The task is to decide "
        "whether the second text follows from the first. If a person who reads the first text would conclude that the "
        "second is most likely true then it is an entailment, else it is not.",
        "answer_format": _YES_NO,
        "question": 'Now judge if the text "{sentence1}" entails the text "{sentence2}".',
        "labels": {"entailment": ["Yes", "entailment"], "not_entailment": ["No", "not entailment", "not_entailment"]},
        "positive": "entailment",
        "metrics": ["accuracy"],
        "source": {
            "format": "tsv",
            "files": {"train": "RTE/train.tsv", "validation": "RTE/dev.tsv", "test": "RTE/test.tsv"},
            "unlabelled": ["test"],
        },
    },
    {
        "name": "stsb",
        "suite": "glue",
        "title": "STS-B",
        "description": "You are an assistant to compare the meaning of sentences. The task is to rate how similar two "
        "sentences are in meaning, on a scale from 0 (nothing in common) to 5 (the same meaning).",
        "answer_format": "Insert only a number between 0.0 and 5.0 here",
        "question": 'Now rate the similarity of the sentences "{sentence1}" and "{sentence2}".',
        "score_range": [0.0, 5.0],
        "metrics": ["spearman", "pearson"],
        "source": {
            "format": "tsv",
            "files": {"train": "STS-B/train.tsv", "validation": "STS-B/dev.tsv", "test": "STS-B/test.tsv"},
            "label": "score",
            "unlabelled": ["test"],
        },
    },
]

TASKS: dict[str, Task] = {entry["name"]: Task.model_validate(entry) for entry in _ENTRIES}


def find_task(name: str) -> Task:
    """The built-in task called `name`; `UserError` with the nearest names otherwise."""
    if name in TASKS:
        return TASKS[name]
    near = difflib.get_close_matches(name.lower().replace("-", ""), TASKS, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise UserError(f"unknown task {name!r}{hint} Built-in tasks: {', '.join(TASKS)}. Or describe your own task here.")
