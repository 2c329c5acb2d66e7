"""The other benchmarks run in their tiny form and print finite figures. No test asserts a time."""

import pytest
from benchmark_tables import check_figures, run_tiny

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One for all benchmarks of this file, which share the tiny model."""
    return tmp_path_factory.mktemp("bench")


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


def test_hot_spots(folder):
    text, rows = run_tiny("hot_spots", folder)
    names = [row["operations"] for row in rows]
    assert {"products of layers, adapters and head", "softmax"} <= {*names}
    check_figures([{"s": row["s"], "calls": row["calls"]} for row in rows], set())
    assert sum(float(row["share"].rstrip("%")) for row in rows) == pytest.approx(100, abs=5)
    assert "at the machine's rate" in text


def test_products(folder):
    text, rows = run_tiny("products", folder)
    assert [row["in x out"] for row in rows] == ["512x256"] and "oneDNN is taken" in text
    check_figures(rows, {"dtype", "in x out"})


def test_checkpoints(folder):
    _, rows = run_tiny("checkpoints", folder)
    assert len(rows) == 1
    assert list(rows[0])[1:] == ["s/step", "s/checkpoint", "checkpoint / step", "MB per checkpoint", "portable copy"]
    check_figures(rows, {"optimizer"})


def test_engines(folder):
    text, rows = run_tiny("engines", folder)
    ours = ["backend", "rollout", "reference", "update", "sync", "step", "until first step", "GiB", "step, ratio"]
    assert list(rows[0]) == ours
    present = {row["backend"] for row in rows}
    for name in ("deepspeed, hf", "deepspeed, vllm", "ray, vllm"):
        assert name in present or f"{name}: skipped" in text
    check_figures(rows, {"backend"})
