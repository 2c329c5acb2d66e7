"""Every benchmark runs in its tiny form and prints finite figures. No test asserts a time."""

import re
import sys
from pathlib import Path

import pytest
from support import free_port, run_command

pytestmark = pytest.mark.slow
NUMBER = re.compile(r"\d+(?:\.\d+)?")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One for all benchmarks, which share the tiny model."""
    return tmp_path_factory.mktemp("bench")


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


def test_train(folder):
    text, rows = run_tiny("train", folder)
    assert [row["system"] for row in rows] == ["ours", "hf-sft", "ours-sft"]
    assert list(rows[0])[1:] == [
        "s/iteration (min - max)",
        "samples/s",
        "by phase, s",
        "peak RSS, GB",
        "base weights, GB",
    ]
    check_figures(rows, {"system"})
    for phase in ("rollout", "reference", "update"):
        assert re.search(rf"{phase} [0-9.]+", rows[0]["by phase, s"])
    assert "trl: skipped, its environment is not installed" in text
    for claim in ("floor of PPO", "PPO here / Hugging Face SFT", "Hugging Face SFT / SFT here", "PPO here / SFT here"):
        (line,) = [line for line in text.splitlines() if line.startswith(f"- {claim}")]
        assert len(NUMBER.findall(line)) >= 3 and not re.search(r"\b(nan|inf)\b", line)


def test_evaluation(folder):
    _, rows = run_tiny("evaluation", folder)
    ours = ["job", "dtype", "rows/s here", "rows/s generate", "generate / here, s (min - max)", "right format"]
    assert len(rows) == 1 and list(rows[0]) == ours
    check_figures(rows, {"job", "dtype"})
    assert rows[0]["right format"].endswith("of 8")


def test_predict(folder):
    _, rows = run_tiny("predict", folder)
    ours = ["rows", "rows/s here", "rows/s generate", "generate / here, s (min - max)", "right", "wrong format"]
    assert len(rows) == 1 and list(rows[0]) == ours and rows[0]["rows"] == "8"
    check_figures(rows, set())


def test_ranks(folder):
    _, rows = run_tiny("ranks", folder, "--port", str(free_port()))
    assert [row["ranks"] for row in rows] == ["1", "2"]
    assert list(rows[0])[1:] == ["s/iteration (min - max)", "speed-up"] and rows[0]["speed-up"] == "1.00"
    check_figures(rows, set())


def test_checkpoints(folder):
    _, rows = run_tiny("checkpoints", folder)
    assert len(rows) == 1
    assert list(rows[0])[1:] == ["s/step", "s/checkpoint", "checkpoint / step", "MB per checkpoint"]
    check_figures(rows, {"optimizer"})


def test_engines(folder):
    text, rows = run_tiny("engines", folder)
    ours = ["backend", "rollout", "reference", "update", "sync", "step", "until first step", "GiB", "step, ratio"]
    assert list(rows[0]) == ours
    present = {row["backend"] for row in rows}
    for name in ("deepspeed, hf", "deepspeed, vllm", "ray, vllm"):
        assert name in present or f"{name}: skipped" in text
    check_figures(rows, {"backend"})
