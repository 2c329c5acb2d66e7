"""ZeRO stages, offload and numbers of ranks: they train alike, and each loads the portable copy of any other."""

import functools
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import ROOT, environment, free_port, make_policy, samples

from extensions.distributed.portable import MOMENTS, load_portable_state, portable_state
from extensions.distributed.strategy import Strategy, trainable, trainable_state
from extensions.prefix.tree import pack
from extensions.recipe import DeepSpeed, Optimizer, Schedule

WAYS = [(0, False), (1, False), (2, True), (3, False), (3, True)]  # stage, offload
PAIRS = list(itertools.product(WAYS, WAYS))


def make_engine(model, way, seed=3):
    strategy = Strategy(0, DeepSpeed(zero_stage=way[0], offload=way[1]), 1.0)
    strategy.setup_distributed()
    policy = make_policy(model, "adapter", seed=seed).train()
    # With the usual eps, rounding decides the sign of an update whose gradient is 0.
    optimizer = Optimizer(name="adamw", lr=1e-2, weight_decay=0.1, eps=1e-3)
    groups = policy.parameter_groups(value_lr=3e-2)
    return strategy, strategy.wrap(policy, groups, optimizer, Schedule(name="cosine", warmup_ratio=0.2), 10)


def train(strategy, engine, updates):
    """Updates of two micro-batches, as with ppo.critic: adapter; no parameter has a gradient in both."""
    batch = pack(samples())
    for _ in range(updates):
        for last, role in enumerate(("actor", "critic")):
            with engine.module.role(role):
                out = engine(batch)
                loss = out["logprobs"].mean() if role == "actor" else out["values"].square().mean()
                strategy.update(engine, strategy.world_size * loss, last=bool(last))


def train_and_copy(model, way):
    """Portable copy after three updates, and the weights after one more."""
    strategy, engine = make_engine(model, way)
    train(strategy, engine, 3)
    tensors, values = portable_state(engine)
    train(strategy, engine, 1)
    return tensors, json.loads(json.dumps(values)), trainable_state(engine.module)


def assert_continues(model, way, tensors, values, after):
    """The copy is loaded exactly, and the next update is that of the engine that wrote it."""
    strategy, engine = make_engine(model, way, seed=4)
    load_portable_state(engine, tensors, values)
    found = trainable_state(engine.module)
    assert found.keys() == after.keys() and all(torch.equal(found[name], tensors[name]) for name in found)
    again, counted = portable_state(engine)
    assert again.keys() == tensors.keys() and all(torch.equal(again[key], tensors[key]) for key in tensors)
    assert json.loads(json.dumps(counted)) == values
    train(strategy, engine, 1)
    assert_close(trainable_state(engine.module), after)


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def copies(tiny_model):
    return functools.cache(functools.partial(train_and_copy, tiny_model("llama")))


@pytest.mark.slow
def test_a_copy_has_weights_and_moments(copies, tiny_model):
    tensors, values, after = copies(WAYS[3])
    assert tensors.keys() == {*after, *(f"{name}/{key}" for name in after for key in MOMENTS)}
    assert values["updates"] == values["schedule"] == 3
    fresh = make_policy(tiny_model("llama"), "adapter").trainable
    assert not any(torch.equal(fresh[name], tensors[name]) or torch.equal(after[name], tensors[name]) for name in after)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS[1:5], ids=str)
def test_all_train_alike(copies, way):
    """Also where a micro-batch does not reach all parameters (`Strategy.update`)."""
    assert_close(copies(way)[0], copies(WAYS[0])[0])
    assert_close(copies(way)[2], copies(WAYS[0])[2])


@pytest.mark.slow
@pytest.mark.parametrize(("here", "there"), PAIRS, ids=str)
def test_any_loads_the_copy_of_any_other(copies, tiny_model, here, there):
    assert_continues(tiny_model("llama"), there, *copies(here))


@pytest.mark.slow
def test_before_the_first_update(tiny_model):
    for here, there in ((WAYS[0], WAYS[3]), (WAYS[3], WAYS[0])):
        tensors, values = portable_state(make_engine(tiny_model("llama"), here)[1])
        assert values["updates"] is None and not any("/" in key for key in tensors)
        strategy, engine = make_engine(tiny_model("llama"), there, seed=4)
        load_portable_state(engine, tensors, values)
        train(strategy, engine, 2)
        assert portable_state(engine)[1]["updates"] == 2
        assert trainable(engine.module).keys() == tensors.keys()


def on_two_ranks(model, folder):
    one = torch.load(folder / "one.pt")
    for _ in range(5):  # DeepSpeed could return a gather on gloo before its end (`Strategy.engine_config`)
        assert_continues(model, WAYS[3], *one)
    two = {way: train_and_copy(model, way) for way in WAYS}
    for way in WAYS:
        assert_close(two[way][0], one[0])
    for here, there in itertools.product(WAYS, WAYS):
        assert_continues(model, there, *two[here])
    torch.save(two, folder / "two.pt")


@pytest.mark.slow
def test_two_ranks(copies, tiny_model, tmp_path):
    """All pairs on two ranks, which do not divide the sizes of all parameters; and from one rank to two and back."""
    model = tiny_model("llama")
    torch.save(copies(WAYS[0]), tmp_path / "one.pt")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    path = f"{ROOT}:{ROOT / 'tests'}"
    done = subprocess.run(
        [*command, __file__, str(model), str(tmp_path)],
        env=environment() | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-9000:]
    two = torch.load(tmp_path / "two.pt")
    assert_continues(model, WAYS[0], *two[WAYS[3]])
    assert_continues(model, WAYS[4], *two[WAYS[2]])


if __name__ == "__main__":
    on_two_ranks(Path(sys.argv[1]), Path(sys.argv[2]))
