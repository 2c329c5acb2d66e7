"""Runs that several tests of reports read."""

import pytest
from run_folders import ADAPTER, OWN, reward, runs_of, write_run

from extensions.tasks import SUITES


@pytest.fixture(scope="module")
def some_runs(tmp_path_factory):
    """One or two runs per table."""
    folder = tmp_path_factory.mktemp("some")
    whole = {task.name: tuple(0.1 * k + 0.01 for k in range(1, len(task.metrics) + 1)) for task in SUITES["glue"]}
    half = {"cb": (0.4, 0.6), "superglue_rte": (0.55,), "copa": (0.5,)}
    write_run(folder / "glue", "sft", whole, splits={"ax": "test"})
    write_run(folder / "superglue", "ppo", half, trained=["cb", "superglue_rte", "copa"])
    write_run(folder / "zero", "eval", {"copa": (0.45,), "stsb": (0.2,)})
    write_run(folder / "own", "ppo", {"tickets": (0.8,)}, tasks=[OWN])
    return runs_of(folder)


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """The five methods on two tasks, from one folder."""
    folder = tmp_path_factory.mktemp("scene") / "runs"
    for task, base in (("sst2", 0.5), ("mrpc", 0.4)):
        curve = [(96 * k, 73.0 * k, base + 0.05 * k) for k in range(1, 7)]
        rewards = [reward(k) for k in range(1, 37)]
        write_run(folder / f"{task}-zero", "eval", {task: (base - 0.4,)})
        write_run(folder / f"{task}-few", "eval", {task: (base,)}, prompt={"shots": 5})
        write_run(folder / f"{task}-sft", "sft", {task: (base + 0.2,)}, validations=curve, rewards=[2.0, 1.0])
        write_run(folder / f"{task}-ppo", "ppo", {task: (base + 0.3,)}, validations=curve, rewards=rewards)
        write_run(folder / f"{task}-both", "ppo", {task: (base + 0.4,)}, model=ADAPTER, rewards=rewards)
    return folder
