"""The keys of a task: prompt, answers, metrics, files, the evaluation server's format.

The entries of `extensions.tasks` and a recipe's own `data.tasks` have the same keys.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from decimal import Decimal
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from extensions.tasks.rules import PLACEHOLDER, cross_field_problems, word_problems
from extensions.tasks.source import Source, Submission
from extensions.tasks.words import cell_label, is_blank, nfc, number_text

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
_DEFAULT_METRICS: dict[str, dict[str, list[str]]] = {
    "regression": {"metrics": ["pearson", "spearman"], "extra_metrics": ["mae", "rmse", "r2"]},
    "multi-label": {"metrics": ["f1_micro", "f1_macro"], "extra_metrics": ["subset_accuracy"]},
    "classification": {"metrics": ["accuracy"]},
}
GRID_POINTS = 11  # scores of a regression that answers by likelihood compare: equidistant over its range
_PLAIN_NUMBER = re.compile(r"-?[0-9]+(?:\.[0-9]+)?")  # the form that a model writes and the parser reads


def _refuse(problems: Iterator[str]) -> None:
    for problem in problems:
        raise ValueError(problem)


def _words_of_labels(value: Any) -> Any:
    """`labels: [a, b]` is short for `labels: {a: [a], b: [b]}`; a single word is short for a list of one."""
    if isinstance(value, list):
        for word in value:
            _refuse(word_problems(word))
        value = {word: [word] for word in value}
    if not isinstance(value, dict):
        return value
    labels = {label: words if isinstance(words, list) else [words] for label, words in value.items()}
    for label, words in labels.items():
        if not isinstance(label, str) or not label.strip():
            raise ValueError(
                f"labels must be text, got {label!r}; quote it: YAML does not read bare yes, no or 1 as text"
            )
        for word in words:
            _refuse(word_problems(word))
    return labels


def _list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _pair(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


Parser = Literal["strict", "paper"]


class Task(BaseModel):
    """One language-understanding task.

    The prompt has the four parts of the paper's section 4.1: description, answer format, question, and the opening
    tag. `labels` maps each label of the data to the words that mean it; the prompt asks for the first. A regression
    task has `score_range` instead.
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
        False, description="several labels may be right at once: the answer lists them, or is no_label"
    )
    no_label: str = Field("none", description="answer of a multi-label row without a label", min_length=1)
    answer_match: Literal["auto", "exact", "keyword"] = Field(
        "auto",
        description="exact: the answer is one of the label's words; keyword: it holds one (paper 4.3). auto: keyword "
        "for the built-in tasks, exact for your own",
    )
    parser: Parser = Field("strict", description="set by the recipe's `parser`, for all tasks")
    positive: str | None = Field(None, description="label that F1 is computed for")
    metrics: list[Metric] = Field(
        ["accuracy"],
        description="metrics of the benchmark's table; their mean is the task's score. Default: accuracy; for "
        "scores pearson and spearman, with mae, rmse and r2 in extra_metrics; for multi-label tasks f1_micro and "
        "f1_macro, with subset_accuracy",
        min_length=1,
    )
    extra_metrics: list[Metric] = Field([], description="also reported, not part of the score")
    group_by: list[str] = Field(
        [], description="kept columns whose values identify a question, for metrics over the rows of one question"
    )
    fallback: str | None = Field(
        None, description="label that the evaluation server gets for an answer of wrong format"
    )
    train_task: str | None = Field(
        None, description="built-in task with the same prompt, whose training rows a task without its own uses"
    )
    in_suite_average: bool = Field(False, description="counts in the average of its suite")
    truncate: Annotated[list[str], BeforeValidator(_list)] = Field(
        [], description="fields to shorten when the prompt is too long, the longest text of the row first; default: all"
    )
    source: Source = Field(Source(), description="files and columns")
    submission: Submission | None = Field(None, description="the evaluation server's format")

    @model_validator(mode="before")
    @classmethod
    def _default_metrics(cls, value: Any) -> Any:
        if not isinstance(value, dict) or "metrics" in value:
            return value
        multi_label = value.get("multi_label") is True
        kind = "multi-label" if multi_label else "regression" if value.get("score_range") else "classification"
        return {**_DEFAULT_METRICS[kind], **value}

    @model_validator(mode="after")
    def _consistent(self) -> Task:
        _refuse(cross_field_problems(self))
        return self

    @property
    def fields(self) -> tuple[str, ...]:
        """Fields of the question, in order of first use."""
        return tuple(dict.fromkeys(match[1] for match in PLACEHOLDER.finditer(self.question) if match[1]))

    @property
    def text_columns(self) -> dict[str, str]:
        """Field -> name of its column; the field's own name if the training file has no header."""
        named = {field: self.source.columns.get(field, field) for field in self.fields}
        return {field: column if isinstance(column, str) else field for field, column in named.items()}

    @property
    def is_regression(self) -> bool:
        return self.score_range is not None

    @property
    def kind(self) -> str:
        return "regression" if self.is_regression else "multi-label" if self.multi_label else "classification"

    @property
    def form(self) -> tuple[object, ...]:
        """Equal for tasks that one model can predict."""
        return self.fields, set(self.labels), self.score_range, self.multi_label

    @property
    def is_exact(self) -> bool:
        """Whether an answer must be one of a label's words, not only hold one."""
        return self.answer_match == "exact" or (self.answer_match == "auto" and self.suite == "own")

    def with_parser(self, parser: Parser) -> Task:
        """The task with its answers parsed by another rule."""
        return self if self.parser == parser else self.model_copy(update={"parser": parser})

    @property
    def display_name(self) -> str:
        return self.title or self.name

    @property
    def is_ranked(self) -> bool:
        """Whether rows are candidates for one answer; the most probable candidate is the prediction (ReCoRD)."""
        return any(metric in ("squad_f1", "squad_em") for metric in self.metrics)

    @property
    def long_field(self) -> str:
        """The field that the rows of one question share: the first of `truncate`, else of the question."""
        return self.truncate[0] if self.truncate else self.fields[0]

    def group_of(self, kept: dict[str, Any]) -> tuple[str, ...]:
        """Key of the question that a row belongs to, from the kept columns; empty if each row is a question."""
        return tuple(str(kept[name]) for name in self.group_by)

    def find_label(self, text: str) -> str | None:
        """The label equal to a text of the data in Unicode NFC, or None."""
        return text if text in self.labels else next((label for label in self.labels if nfc(label) == nfc(text)), None)

    def answer(self, label: str) -> str:
        """The words (or number) that the model should write for `label`."""
        if self.multi_label:
            return ", ".join(self.labels[one][0] for one in self.split_labels(label)) or self.no_label
        if not self.is_regression:
            return self.labels[label][0]
        if self.score_decimals is not None:
            return number_text(float(label), self.score_decimals)
        if not _PLAIN_NUMBER.fullmatch(label):  # 1e-05, +1
            label = f"{Decimal(repr(float(label))):f}"
        return label.lstrip("-") if float(label) == 0 else label

    @property
    def sample_labels(self) -> list[str]:
        """Every label, the ends of a range, or label sets of no label, each one label, and all."""
        if self.score_range is not None:
            return [f"{score:g}" if float(f"{score:g}") == score else repr(score) for score in self.score_range]
        return [*self.labels, *((self.no_label, self.join_labels(self.labels)) if self.multi_label else ())]

    @property
    def score_grid(self) -> list[str]:
        """Equidistant scores over a regression's range, as a model should write them.

        With the task's decimals; if it sets none, with the fewest that keep the scores distinct, at least one.
        """
        assert self.score_range is not None
        low, high = self.score_range
        scores = [low + (high - low) * k / (GRID_POINTS - 1) for k in range(GRID_POINTS)]
        decimals = self.score_decimals
        if decimals is None:
            distinct = (d for d in range(1, 6) if len({f"{score:.{d}f}" for score in scores}) == GRID_POINTS)
            decimals = next(distinct, 6)
        return [number_text(score, decimals) for score in scores]

    # Label sets of multi-label tasks.

    def join_labels(self, labels: Iterable[str]) -> str:
        """A label set as one string: labels in the task's order, joined by ", "; `no_label` for the empty set."""
        wanted = set(labels)
        return ", ".join(label for label in self.labels if label in wanted) or self.no_label

    def split_labels(self, joined: str) -> tuple[str, ...]:
        """Inverse of `join_labels`."""
        return () if joined == self.no_label else tuple(joined.split(", "))

    def is_label_set(self, text: str) -> bool:
        """Whether a text is a label set as `join_labels` writes it."""
        return text == self.join_labels(self.split_labels(text))

    def parse_label_set(self, cell: Any) -> str:
        """The label set of a cell of the data, as `join_labels` gives it.

        Args:
            cell: a list of labels, or text with `source.label_separator` between them; null, NaN, empty text, an empty
                list and `no_label` are the empty set.

        Raises:
            ValueError: names the parts that are not labels of the task.
        """
        cell = cell.tolist() if hasattr(cell, "tolist") else cell
        if is_blank(cell) or (isinstance(cell, str) and cell.strip() == self.no_label):
            return self.no_label
        if not isinstance(cell, (list, tuple)):
            parts = str(cell).split(self.source.label_separator)
            cell = [part for part in parts if part.strip()] or parts  # a trailing separator adds no label
        found = {text: self.find_label(text) for text in map(cell_label, cell)}
        unknown = [text for text, label in found.items() if label is None]
        if unknown:
            raise ValueError(
                f"{', '.join(map(repr, unknown))} not among the labels {', '.join(map(repr, self.labels))}"
            )
        return self.join_labels(label for label in found.values() if label is not None)
