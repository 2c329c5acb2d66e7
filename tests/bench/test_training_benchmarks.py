"""Benchmarks of training run in their tiny form and print finite figures. No test asserts a time."""

import re

import pytest
from benchmark_tables import NUMBER, check_figures, run_tiny
from support import free_port

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One for all benchmarks of this file, which share the tiny model."""
    return tmp_path_factory.mktemp("bench")


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
    for claim in (
        "tokens per second",
        "floor of PPO",
        "PPO here / Hugging Face SFT",
        "Hugging Face SFT / SFT here",
        "PPO here / SFT here",
    ):
        (line,) = [line for line in text.splitlines() if line.startswith(f"- {claim}")]
        assert len(NUMBER.findall(line)) >= 3 and not re.search(r"\b(nan|inf)\b", line)


def test_samples(folder):
    _, rows = run_tiny("samples", folder)
    assert [row["responses per prompt"] for row in rows] == ["1", "2"]
    check_figures(rows, set())
    assert 1 < float(rows[1]["packed tokens, times k = 1"]) < 2, "the prompt is packed once"


def test_ranks(folder):
    _, rows = run_tiny("ranks", folder, "--port", str(free_port()))
    assert [row["ranks"] for row in rows] == ["1", "2"]
    assert list(rows[0])[1:] == ["s/iteration (min - max)", "speed-up"] and rows[0]["speed-up"] == "1.00"
    check_figures(rows, set())
