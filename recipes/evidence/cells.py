"""The cells of `cells.yaml`: one run each, with the command that makes it."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import yaml

from extensions.common.files import read_jsonl
from extensions.recipe import Recipe, load_recipe
from extensions.runs.resume import is_finished
from extensions.sweeps.grid import assignments, script

HERE = Path(__file__).parent
DATA = HERE / "results"


@dataclass(frozen=True)
class EvidenceCell:
    """One run."""

    table: str
    task: str
    method: str
    rows: int  # labelled rows; prompting reads 5 of them, or none
    seed: int
    variant: str | None = None
    seconds_of: str | None = None  # method whose cell of the same task, rows and seed gives the training seconds

    @property
    def name(self) -> str:
        """Of its run folder."""
        parts = [self.method, str(self.rows), f"seed{self.seed}", self.variant, self.seconds_of and "equal-seconds"]
        return f"{self.task}/{'-'.join(part for part in parts if part)}"

    def like(self, method: str) -> EvidenceCell:
        """The cell of another method with the same task, rows and seed."""
        return EvidenceCell("", self.task, method, self.rows, self.seed, self.variant)


@dataclass(frozen=True)
class Evidence:
    """The content of `cells.yaml`, for one folder of data and one of runs."""

    content: Mapping[str, Any]
    root: Path  # holds glue/ and superglue/
    out: Path
    overrides: Sequence[str] = ()  # key=value of every cell, after its own

    @classmethod
    def load(cls, root: Path, out: Path, overrides: Sequence[str] = (), path: Path = HERE / "cells.yaml") -> Evidence:
        return cls(yaml.safe_load(path.read_text(encoding="utf-8")), root, out, overrides)

    @property
    def cells(self) -> list[EvidenceCell]:
        """In the order in which they run."""
        return list(_cells(self.content["blocks"]))

    def folder(self, cell: EvidenceCell) -> Path:
        return self.out / cell.name

    def is_finished(self, cell: EvidenceCell) -> bool:
        return is_finished(self.folder(cell))

    def method(self, cell: EvidenceCell) -> Mapping[str, Any]:
        return self.content["methods"][cell.method]

    def needs(self, cell: EvidenceCell) -> list[EvidenceCell]:
        """The cells that must be finished first."""
        source = self.method(cell).get("from")
        needed = [cell.like(source)] if source else []
        return needed + ([cell.like(cell.seconds_of), cell.like(cell.method)] if cell.seconds_of else [])

    def arguments(self, cell: EvidenceCell) -> list[str]:
        """`key=value` after the recipe's path; those of a cell with `seconds_of` or `from` need finished runs."""
        method = self.method(cell)
        variant = self.content["variants"][cell.variant]["keys"] if cell.variant else {}
        keys = {"data.root": str(self.root), "data.tasks": cell.task, "data.max_train_samples": cell.rows}
        keys |= {"seed": cell.seed, "max_steps": cell.rows // 16}
        keys |= self.content["common"] | self.content["tasks"].get(cell.task, {}) | variant | method.get("keys", {})
        if "from" in method:
            keys["model.adapter"] = str(self.folder(cell.like(method["from"])) / "adapter")
        if cell.seconds_of:
            keys["sft.max_steps" if method["script"] == "sft" else "max_steps"] = self.affordable_steps(cell)
        name = {"name": cell.name.replace("/", "-"), "output_dir": str(self.folder(cell))}
        return [*assignments(keys), *self.overrides, *assignments(name)]

    def affordable_steps(self, cell: EvidenceCell) -> int:
        """Steps of the method in the training seconds of the cell that gives them."""
        seconds, _ = training_seconds(self.folder(cell.like(str(cell.seconds_of))))
        own, steps = training_seconds(self.folder(cell.like(cell.method)))
        return max(1, round(seconds / (own / steps)))

    def command(self, cell: EvidenceCell) -> list[str]:
        return ["bash", str(script(self.method(cell)["script"])), str(self._recipe_file(cell)), *self.arguments(cell)]

    def recipe(self, cell: EvidenceCell) -> Recipe:
        """The recipe of a cell, checked. UserError: with every invalid key."""
        return load_recipe(self._recipe_file(cell), self.arguments(cell), self.method(cell)["script"])

    def _recipe_file(self, cell: EvidenceCell) -> Path:
        return HERE.parent / self.method(cell).get("recipe", "smollm2.yaml")


def _cells(blocks: Sequence[Mapping[str, Any]]) -> Iterator[EvidenceCell]:
    for block in blocks:
        axes = (block["tasks"], block["seeds"], block["rows"], block["methods"])
        for task, seed, rows, method in product(*axes):
            yield EvidenceCell(block["table"], task, method, rows, seed, block.get("variant"), block.get("seconds_of"))


def training_seconds(run: Path) -> tuple[float, int]:
    """Processor seconds of a finished run's training, and its steps."""
    lines = read_jsonl(run / "metrics.jsonl")
    return sum(line["cpu_s"] for line in lines), len(lines)


def read_lines(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def measured(data: Path = DATA) -> set[str]:
    """Names of the cells whose numbers are in `results/`."""
    return {line["cell"] for line in read_lines(data / "runs.csv")}
