"""The tiny form of a benchmark script as a process, and its table, for the tests that run them."""

import re
import sys
from pathlib import Path

from support import run_command

NUMBER = re.compile(r"\d+(?:\.\d+)?")


def tables(text: str) -> list[list[dict[str, str]]]:
    """The Markdown tables of a text; each row as column -> cell."""
    found = []
    for block in re.findall(r"(?:^\|.*\|$\n?)+", text, re.MULTILINE):
        header, _, *rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in block.splitlines()]
        found.append([dict(zip(header, row, strict=True)) for row in rows])
    return found


def run_tiny(script: str, folder: Path, *options: str) -> tuple[str, list[dict[str, str]]]:
    """Output and the table of a benchmark's tiny form."""
    shared = ["--tiny", "--folder", str(folder), "--threads", "1"]
    done = run_command([sys.executable, f"tests/bench/{script}.py", *shared, *options])
    assert done.returncode == 0, done.stdout + done.stderr
    (rows,) = tables(done.stdout)
    return done.stdout, rows


def check_figures(rows: list[dict[str, str]], names: set[str]) -> None:
    """Every cell except those of the columns `names` and phases that a backend lacks holds finite numbers alone."""
    assert rows
    for row in rows:
        for column, cell in row.items():
            assert not re.search(r"\b(nan|inf)\b", cell, re.IGNORECASE), (column, cell)
            assert column in names or cell == "-" or NUMBER.search(cell), (column, cell)
