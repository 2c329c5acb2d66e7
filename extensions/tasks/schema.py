"""What a task may declare: prompt, answers, metrics, files, the evaluation server's format.

The entries of `extensions.tasks` and a recipe's own `data.tasks` have the same keys.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from decimal import Decimal
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from extensions.tasks.source import Source, Submission
from extensions.tasks.words import cell_label, fold, is_blank, nfc, normalize_answer, number_text

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
_OF_GROUPS = ("exact_match", "squad_f1", "squad_em", "gender_parity")
_OF_SCORES = ("pearson", "spearman", "mae", "rmse", "r2")
_OF_LABEL_SETS = ("f1_micro", "f1_macro", "subset_accuracy")
_SMALLER_IS_BETTER = ("mae", "rmse")
_DEFAULT_METRICS: dict[str, dict[str, list[str]]] = {
    "regression": {"metrics": ["pearson", "spearman"], "extra_metrics": ["mae", "rmse", "r2"]},
    "multi-label": {"metrics": ["f1_micro", "f1_macro"], "extra_metrics": ["subset_accuracy"]},
    "classification": {"metrics": ["accuracy"]},
}
_PLAIN_NUMBER = re.compile(r"-?[0-9]+(?:\.[0-9]+)?")  # that a model writes, and its answer is read as
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
    for key in value:
        if not isinstance(key, str) or not key.strip():
            raise ValueError(f"labels must be text, got {key!r}; YAML reads bare yes/no/1 otherwise: quote it")
    return {key: _only_text(words if isinstance(words, list) else [words]) for key, words in value.items()}


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


def _filled(parts: list[str]) -> list[str]:
    """The labels of a cell: nothing stands behind a separator at its end."""
    return [part for part in parts if part.strip()] or parts


def _only_text(words: list[Any]) -> list[str]:
    for word in words:
        if not isinstance(word, str):
            raise ValueError(f"label words must be text, got {word!r}; YAML reads bare yes/no/1 otherwise: quote it")
        if not word.strip() or "judgement" in word.lower() or "<" in word:
            raise ValueError(f"label word {word!r} is empty, or holds '<' or the word of the answer's own tags")
    return words


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
        ["accuracy"],
        description="metrics of the benchmark's table; their mean is the task's score. Default: accuracy; of scores "
        "pearson and spearman, with mae, rmse and r2 in extra_metrics; of several labels a row f1_micro and f1_macro, "
        "with subset_accuracy",
        min_length=1,
    )
    extra_metrics: list[Metric] = Field([], description="also reported, no part of the score")
    group_by: list[str] = Field(
        [], description="kept columns that say which rows are one question, where metrics need it"
    )
    fallback: str | None = Field(
        None, description="label for the evaluation server where the answer has a wrong format"
    )
    train_task: str | None = Field(
        None, description="built-in task of the same prompt whose training rows serve one that is only evaluated"
    )
    in_suite_average: bool = Field(False, description="counts in the average of its suite")
    truncate: Annotated[list[str], BeforeValidator(_list)] = Field(
        [], description="fields to shorten when the prompt is too long, the longest text of the row first; default: all"
    )
    source: Source = Field(Source(), description="files and columns")
    submission: Submission | None = Field(None, description="the evaluation server's format")

    @model_validator(mode="before")
    @classmethod
    def _metrics_of_its_kind(cls, value: Any) -> Any:
        if not isinstance(value, dict) or "metrics" in value:
            return value
        several = value.get("multi_label") is True
        kind = "multi-label" if several else "regression" if value.get("score_range") else "classification"
        return {**_DEFAULT_METRICS[kind], **value}

    @model_validator(mode="after")
    def _consistent(self) -> Task:
        if bool(self.labels) == (self.score_range is not None):
            raise ValueError("give either labels (classification) or score_range (regression)")
        if self.labels and len(self.labels) < 2:
            raise ValueError("labels needs at least two entries")
        if self.score_range and not 0 < self.score_range[1] - self.score_range[0] < math.inf:
            raise ValueError(f"score_range must be [low, high] with low < high, got {list(self.score_range)}")
        for key in ("question", "description", "answer_format"):
            _check_braces(key, getattr(self, key), placeholders=key == "question")
        if not self.fields:
            raise ValueError(
                "question uses no {field}: the model would never see the data; write the name of a column between "
                "single braces"
            )
        same = normalize_answer if self.is_exact or self.multi_label else fold
        words = [same(word) for group in self.labels.values() for word in group]
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
        metrics = [*self.metrics, *self.extra_metrics]
        for metric in metrics:
            if metric in _OF_POSITIVE and self.positive is None:
                raise ValueError(f"metric {metric} needs `positive`, the label that it is computed for")
            if metric in _OF_GROUPS and not self.group_by:
                raise ValueError(f"metric {metric} needs `group_by`, which says which rows are one question")
        unknown = [name for name in self.group_by if name not in self.source.keep]
        if unknown:
            raise ValueError(
                f"group_by: {unknown[0]!r} is not in source.keep ({', '.join(self.source.keep) or 'empty'})"
            )
        for metric in metrics:
            if (metric in _OF_SCORES) != self.is_regression or (self.multi_label and metric not in _OF_LABEL_SETS):
                raise ValueError(f"metric {metric} does not fit a {self.kind} task")
            if metric in ("f1_micro", "subset_accuracy") and not self.multi_label:
                raise ValueError(f"metric {metric} does not fit a {self.kind} task; multi_label: true has it")
        for metric in self.metrics:
            if metric in _SMALLER_IS_BETTER:
                raise ValueError(f"metrics: {metric} is smaller where answers are better; give it in extra_metrics")
        return self

    @model_validator(mode="after")
    def _answers_of_its_kind(self) -> Task:
        if self.score_decimals is not None:
            if self.score_range is None:
                raise ValueError("score_decimals goes with score_range alone")
            if any(round(end, self.score_decimals) != end for end in self.score_range):
                raise ValueError(
                    f"score_decimals: {self.score_decimals} rounds the ends of score_range: {list(self.score_range)}; "
                    "give ends of so many decimals"
                )
        if self.answer_match != "auto" and self.kind != "classification":
            raise ValueError(
                f"answer_match does not go with a {self.kind} task, whose answers have a form of their own"
            )
        if not self.multi_label:
            return self
        if self.score_range is not None:
            raise ValueError("multi_label: true goes with labels, not with score_range")
        if self.positive is not None:
            raise ValueError("positive does not go with multi_label: true; its F1 is over all labels")
        if self.submission is not None:
            raise ValueError("submission does not go with multi_label: true; the servers take one label a row")
        _only_text([self.no_label])
        separator = self.source.label_separator
        for label, words in self.labels.items():
            for text in (label, *words):
                if "," in text or (text == label and separator in text):
                    raise ValueError(
                        f"label {text!r} holds {',' if ',' in text else separator!r}, which is between the labels of a "
                        "multi_label task; give it another word, or another source.label_separator"
                    )
        taken = {normalize_answer(text) for label, words in self.labels.items() for text in (label, *words)}
        if "," in self.no_label or normalize_answer(self.no_label) in taken:
            raise ValueError(f"no_label: {self.no_label!r} is a label, or holds a comma; give another word")
        return self

    def _allows(self, answer: str) -> bool:
        if self.score_range is None:
            return self.is_label_set(answer) if self.multi_label else answer in self.labels
        try:
            return self.score_range[0] <= float(answer) <= self.score_range[1]
        except ValueError:
            return False

    @property
    def fields(self) -> tuple[str, ...]:
        """Names of the fields that the question uses, in order of first use."""
        return tuple(dict.fromkeys(match[1] for match in PLACEHOLDER.finditer(self.question) if match[1]))

    @property
    def text_columns(self) -> dict[str, str]:
        """Field -> name of its column; a field whose training file has no header is its own column."""
        named = {field: self.source.columns.get(field, field) for field in self.fields}
        return {field: column if isinstance(column, str) else field for field, column in named.items()}

    @property
    def is_regression(self) -> bool:
        return self.score_range is not None

    @property
    def kind(self) -> str:
        return "regression" if self.is_regression else "multi-label" if self.multi_label else "classification"

    @property
    def is_exact(self) -> bool:
        """Whether an answer must be one of a label's words; else it must hold one."""
        return self.answer_match == "exact" or (self.answer_match == "auto" and self.suite == "own")

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

    def group_of(self, kept: dict[str, Any]) -> tuple[str, ...]:
        """What the rows of one question have in common, from the kept columns; empty where each row is one."""
        return tuple(str(kept[name]) for name in self.group_by)

    def find_label(self, text: str) -> str | None:
        """The label that a text of the data is, up to its Unicode form (NFC); None if it is none."""
        return text if text in self.labels else next((one for one in self.labels if nfc(one) == nfc(text)), None)

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
        """Every label, the ends of a range, or label sets of all sizes that matter: none, one, all."""
        if self.score_range is not None:
            return [f"{score:g}" if float(f"{score:g}") == score else repr(score) for score in self.score_range]
        return [*self.labels, *((self.no_label, self.join_labels(self.labels)) if self.multi_label else ())]

    # ------------------------------------------------------------------------------------------ several labels a row

    def join_labels(self, labels: Iterable[str]) -> str:
        """The one string of a set of labels: in the task's order, joined by ", "; `no_label` where there is none."""
        wanted = set(labels)
        return ", ".join(label for label in self.labels if label in wanted) or self.no_label

    def split_labels(self, joined: str) -> tuple[str, ...]:
        """The labels in a string that `join_labels` made, in the task's order."""
        return () if joined == self.no_label else tuple(joined.split(", "))

    def is_label_set(self, text: str) -> bool:
        """Whether `join_labels` makes such a string."""
        return text == self.join_labels(self.split_labels(text))

    def parse_label_set(self, cell: Any) -> str:
        """The label set of a cell of the data, as `join_labels` gives it.

        Args:
            cell: a list of labels, or text with `source.label_separator` between them; null, NaN, empty text, an empty
                list and `no_label` are no label.

        Raises:
            ValueError: with those that are no labels of the task.
        """
        cell = cell.tolist() if hasattr(cell, "tolist") else cell
        if is_blank(cell) or (isinstance(cell, str) and cell.strip() == self.no_label):
            return self.no_label
        parts = cell if isinstance(cell, (list, tuple)) else _filled(str(cell).split(self.source.label_separator))
        texts = [cell_label(part) for part in parts]
        found = {text: self.find_label(text) for text in texts}
        unknown = [text for text, label in found.items() if label is None]
        if unknown:
            raise ValueError(
                f"{', '.join(map(repr, unknown))} not among the labels {', '.join(map(repr, self.labels))}"
            )
        return self.join_labels(label for label in found.values() if label is not None)
