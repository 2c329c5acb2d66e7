"""Fixtures of the tests of runs."""

import shutil

import pytest
from resumable import three_steps

from extensions.runs import build
from extensions.runs.main import main


@pytest.fixture(scope="session")
def unfinished(tiny_model, tmp_path_factory):
    """A PPO run that was killed before its last evaluation (`run`), and the same run uninterrupted (`whole`)."""
    folder = tmp_path_factory.mktemp("unfinished")
    path = three_steps(folder, tiny_model("llama"))
    assert main([str(path), "checkpoint.keep=5"]) == 0
    shutil.copytree(folder / "run", folder / "whole")
    (folder / "run" / "eval.json").unlink()
    return folder


@pytest.fixture
def untried(monkeypatch):
    """Skips the check of the reward before a run."""
    monkeypatch.setattr(build, "check_reward", lambda reward, examples, warn: None)
