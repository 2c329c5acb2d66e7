"""The GPU that the process of a rank's vLLM engine sees, with a stand-in for vllm."""

import os
import sys
from types import ModuleType

import pytest
import torch

from extensions.rollout.vllm_engine import VllmEngine


@pytest.fixture
def made(monkeypatch):
    """What each `vllm.LLM` was made with, and the GPUs that its process would see."""
    found = []

    class LLM:
        def __init__(self, **arguments):
            found.append((os.environ.get("CUDA_VISIBLE_DEVICES"), arguments))
            if arguments.get("model") == "too large":
                raise RuntimeError("no memory")

    module = ModuleType("vllm")
    module.LLM = LLM
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "WARNING")
    return found


@pytest.mark.parametrize(
    ("visible", "seen"),
    [(None, ["0", "1", "2", "3"]), ("4,5, 6,7", ["4", "5", "6", "7"]), ("GPU-a,GPU-b,MIG-c,GPU-d", None)],
    ids=["all", "numbers", "names"],
)
def test_the_engine_of_each_rank_is_on_the_ranks_own_gpu(made, monkeypatch, visible, seen):
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    for rank in range(4):
        VllmEngine({"model": "m"}, True, torch.device("cuda", rank))
    assert [devices for devices, _ in made] == (seen or visible.split(","))
    assert all(arguments["enable_sleep_mode"] for _, arguments in made)
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == visible, "this process keeps its own"


def test_a_failed_start_leaves_the_environment_as_it_was(made, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    with pytest.raises(RuntimeError, match="no memory"):
        VllmEngine({"model": "too large"}, False, torch.device("cuda", 1))
    assert made[0][0] == "3" and os.environ["CUDA_VISIBLE_DEVICES"] == "2,3"


def test_an_engine_on_a_cpu_neither_sleeps_nor_hides_devices(made, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    VllmEngine({"model": "m"}, True, torch.device("cpu"))
    assert made == [(None, {"model": "m", "enable_sleep_mode": False})]
