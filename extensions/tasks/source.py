"""Where the rows of a task are, and what its evaluation server takes: the keys `source` and `submission`."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

SPLITS = ("train", "validation", "test")


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

    def is_held_out(self, split: str) -> bool:
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
