"""The keys `source` and `submission` of a task: its files and columns, and the format of its evaluation server."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

SPLITS = ("train", "validation", "test")


class SplitFormat(BaseModel):
    """Differences of the file of one split from the others."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    columns: dict[str, str | int] | None = Field(None, description="field -> column name or index")
    label: str | int | None = Field(None, description="column of the label")
    header: bool | None = Field(None, description="whether the first TSV line names the columns")


class Hub(BaseModel):
    """The same rows in a data set of the Hugging Face hub, as parquet files."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    repo: str = Field(description="data set on the hub")
    config: str = Field("", description="its configuration (folder); default: none, splits are found by file name")
    splits: dict[str, str] = Field({}, description="split -> its name on the hub, if different")
    columns: dict[str, str] = Field({}, description="field -> its column on the hub, if different")
    labels: list[str] = Field([], description="label of each class number on the hub; default: the number itself")

    def patterns(self, split: str) -> tuple[str, ...]:
        """Globs of a split's parquet files, as uploaded or as converted by the hub."""
        name = self.splits.get(split, split)
        if not self.config:
            return f"data/{name}-*.parquet", f"{name}-*.parquet", f"{name}.parquet", f"default/{name}/*.parquet"
        return f"{self.config}/{name}-*.parquet", f"{self.config}/{name}/*.parquet"


class Split(BaseModel):
    """Shares of the training file to hold out: random by `seed`, stratified, rows of equal texts in the same part."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    validation: float = Field(0.0, ge=0, lt=1, description="share of the rows for validation")
    test: float = Field(0.0, ge=0, lt=1, description="share of the rows for the test split")
    seed: int = Field(0, ge=0, description="of the split; not the run's seed, so that all runs share one test split")


class Source(BaseModel):
    """Files of a task, and the meaning of their columns."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    generator: Literal["acceptability", "reviews"] | None = Field(
        None, description="generates the rows instead of files"
    )
    format: Literal["auto", "csv", "tsv", "jsonl", "parquet"] = Field(
        "auto", description="of the files; auto: by their suffix"
    )
    quoting: Literal["csv", "none"] = Field(
        "csv", description="of CSV and TSV; csv: RFC 4180, as in pandas; none: a quote is a character (GLUE)"
    )
    separator: str | None = Field(None, description="of CSV; null: detected in the header among , ; | and tab")
    encoding: str = Field("utf-8", description="of CSV, TSV and JSONL; a byte order mark overrides it")
    files: dict[str, str] = Field({}, description="split (train, validation, test) -> file, relative to data.root")
    columns: dict[str, str | int] = Field({}, description="field -> column name, or index without a header")
    label: str | int | None = Field("label", description="column of the label")
    header: bool = Field(True, description="whether the first TSV line names the columns")
    num_columns: int | None = Field(None, description="TSV columns per row, without a header")
    split: Split | None = Field(None, description="hold out parts of files.train for splits without a file")
    label_separator: str = Field(
        ",", min_length=1, description="between the labels in a text cell of a multi-label task"
    )
    unlabelled: list[str] = Field([], description="splits whose rows have no label")
    exceptions: dict[str, SplitFormat] = Field({}, description="split -> how its file differs")
    keep: dict[str, str] = Field(
        {}, description="name -> column to copy into predictions, such as an official row number"
    )
    rows: Literal["multirc", "record", "wsc", "winogender"] | None = Field(
        None, description="function of extensions/data/nested.py that turns an object of the file into rows"
    )
    incomplete: Literal["error", "skip", "keep"] = Field(
        "error",
        description="what to do with a row without a text; skip: exclude it from training only; keep: empty text",
    )
    unknown_labels: Literal["error", "skip"] = Field(
        "error", description="what to do with a row whose label is empty or not one of the task's; skip: exclude it"
    )
    sizes: dict[str, int] = Field({}, description="official number of rows (ReCoRD: queries) of each split")
    hub: Hub | None = Field(None, description="the same rows in a data set of the hub")

    @model_validator(mode="after")
    def _known_splits(self) -> Source:
        for split in (*self.files, *self.unlabelled, *self.exceptions, *self.sizes):
            if split not in SPLITS:
                raise ValueError(f"unknown split {split!r}; allowed: {', '.join(SPLITS)}")
        if self.separator is not None and (len(self.separator) != 1 or self.separator in '"\r\n'):
            raise ValueError(f"separator: {self.separator!r} expected one character, not a quote or a line end")
        if self.split is None:
            return self
        if self.split.validation + self.split.test >= 1:
            raise ValueError("split: validation and test leave no rows for training; together they must be below 1")
        if self.generator is not None or ("train" not in self.files and self.hub is None):
            raise ValueError("split: no training file to hold rows out of; give files.train")
        for name in ("validation", "test"):
            if getattr(self.split, name) and name in self.files:
                raise ValueError(f"split.{name}: files.{name} is given too; remove one of them")
        return self

    def is_held_out(self, split: str) -> bool:
        """Whether a split is held out of the training file."""
        return self.split is not None and split != "train" and getattr(self.split, split) > 0

    def in_split(self, split: str) -> Source:
        """This source with the exceptions of `split` applied."""
        exception = self.exceptions.get(split)
        return self.model_copy(update=exception.model_dump(exclude_none=True)) if exception else self


class Submission(BaseModel):
    """Format of the benchmark's evaluation server."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    file: str = Field(
        description="name in the archive (letters, digits, . _ -); .tsv or .jsonl decides the format",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*\.(tsv|jsonl)$",
    )
    labels: dict[str, str | int] = Field({}, description="label -> its form on the server, if different")
    nesting: Literal["multirc", "record"] | None = Field(
        None, description="groups the rows of one question into one object"
    )
