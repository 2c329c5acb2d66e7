"""The DeepSpeed strategy: optimizers against plain torch and transformers, the schedule, and a user's own JSON."""

import copy
import json
import math
import os
from types import SimpleNamespace

import pytest
import torch
from support import make_policy, samples
from transformers.optimization import Adafactor

from extensions.common.errors import UserError
from extensions.distributed import openrlhf
from extensions.distributed.optim import make_optimizer, make_scheduler
from extensions.distributed.strategy import Strategy, load_trainable_state, trainable_state
from extensions.prefix.tree import pack
from extensions.recipe import DeepSpeed, Optimizer, Schedule


def make_strategy(max_grad_norm=0.0, **settings):
    strategy = Strategy(0, DeepSpeed(**settings), max_grad_norm)
    strategy.setup_distributed()
    return strategy


def loss_of(forward, batch):
    out = forward(batch)
    return out["logprobs"].mean() + out["values"].square().mean()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["adafactor", "adamw"])
def test_engine_steps_equal_plain_steps_bit_for_bit(tiny_model, name, dtype):
    """Five updates of the same policy, through DeepSpeed at stage 0 and with torch and transformers alone."""
    policy = make_policy(tiny_model("llama"), dtype=dtype).train()
    plain = copy.deepcopy(policy)
    batch = pack(samples())
    strategy = make_strategy()
    engine = strategy.wrap(
        policy, policy.parameter_groups(), Optimizer(name=name, lr=1e-2), Schedule(name="constant", warmup_ratio=0), 5
    )
    parameters = list(plain.trainable.values())
    if name == "adafactor":
        options = {"scale_parameter": False, "relative_step": False, "warmup_init": False}
        optimizer = Adafactor(parameters, lr=1e-2, **options)
    else:
        optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    for _ in range(5):
        with policy.role("actor"):
            strategy.update(engine, loss_of(engine, batch), last=True)
        with plain.role("actor"):
            loss_of(plain, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    ours, theirs = policy.trainable, plain.trainable
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    fresh = make_policy(tiny_model("llama"), dtype=dtype).trainable
    assert all(not torch.equal(ours[key], fresh[key]) for key in ours if "lora_" in key)
    state = optimizer.state_dict()["state"]
    engine_state = engine.optimizer.state_dict()["state"]
    assert state.keys() == engine_state.keys()
    for key in state:
        for part, value in state[key].items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(engine_state[key][part])), part
    if name == "adafactor":
        assert any("exp_avg_sq_row" in s for s in state.values()), "Adafactor lost its factored state"


def test_micro_batches_add_up_to_the_batch(tiny_model):
    """Two backward passes and one step equal one pass over both, without any scaling by DeepSpeed."""
    whole, split = make_policy(tiny_model("llama")), make_policy(tiny_model("llama"))
    rows = samples()
    strategy = make_strategy()
    optimizer = Optimizer(name="adamw", lr=1e-2)
    engines = [strategy.wrap(p, p.parameter_groups(), optimizer, Schedule(), 1) for p in (whole, split)]
    with whole.role("actor"):
        strategy.update(engines[0], engines[0](pack(rows))["logprobs"].sum(), last=True)
    norm = strategy.get_grad_norm(engines[0])
    for part, last in ((rows[:2], False), (rows[2:], True)):
        with split.role("actor"):
            strategy.update(engines[1], engines[1](pack(part))["logprobs"].sum(), last=last)
    assert strategy.get_grad_norm(engines[1]) == pytest.approx(norm, rel=1e-4)
    for key, value in whole.trainable.items():
        torch.testing.assert_close(split.trainable[key], value, atol=1e-4, rtol=1e-3)


def test_gradient_norm_is_the_unclipped_norm(tiny_model):
    policy = make_policy(tiny_model("llama"))
    plain = copy.deepcopy(policy)
    strategy = make_strategy(max_grad_norm=0.01)
    engine = strategy.wrap(policy, policy.parameter_groups(), Optimizer(name="adamw"), Schedule(), 1)
    with policy.role("actor"):
        strategy.update(engine, loss_of(engine, pack(samples())), last=True)
    with plain.role("actor"):
        loss_of(plain, pack(samples())).backward()
    squares = sum(float(p.grad.double().square().sum()) for p in plain.trainable.values() if p.grad is not None)
    assert strategy.get_grad_norm(engine) == pytest.approx(math.sqrt(squares), rel=1e-5)


def test_cosine_warms_up_for_a_tenth_and_ends_at_a_tenth(tiny_model):
    policy = make_policy(tiny_model("llama"))
    settings = Optimizer(lr=9e-6, value_lr=9e-5)
    optimizer = make_optimizer(policy.parameter_groups(settings.value_lr), settings, offload=False)
    scheduler = make_scheduler(optimizer, Schedule(), 100)
    rates = []
    for _ in range(100):
        rates.append(scheduler.get_last_lr())
        optimizer.step()
        scheduler.step()
    adapter, head = zip(*rates, strict=True)
    assert (
        adapter[0] == 0 and adapter[5] == pytest.approx(4.5e-6) and max(adapter) == adapter[10] == pytest.approx(9e-6)
    )
    assert scheduler.get_last_lr()[0] == pytest.approx(9e-7)
    for _ in range(50):  # a run that is longer than its schedule (schedule.epochs)
        optimizer.step()
        scheduler.step()
        assert scheduler.get_last_lr() == [pytest.approx(9e-7), pytest.approx(9e-6)]
    half = 9e-6 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (55 - 10) / 90)))
    assert adapter[55] == pytest.approx(half)
    assert all(h == pytest.approx(10 * a) for a, h in rates) and len(head) == 100


def test_own_deepspeed_json_is_merged_over(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"reduce_bucket_size": 1000}, "wall_clock_breakdown": True}))
    config = make_strategy(zero_stage=2, config=str(path)).engine_config()
    assert config["zero_optimization"]["reduce_bucket_size"] == 1000 and config["zero_optimization"]["stage"] == 2
    assert config["wall_clock_breakdown"] is True


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[1]", "expected a JSON object"),
        ('{"optimizer": {}}', "optimizer come from the recipe"),
        ('{"train_batch_size": 3}', "train_batch_size"),
        ('{"zero_optimization": {"stage": 3}}', "set deepspeed.zero_stage: 3 in the recipe"),
    ],
)
def test_own_deepspeed_json_may_not_contradict_the_recipe(tmp_path, content, message):
    path = tmp_path / "ds.json"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        make_strategy(config=str(path)).engine_config()
    with pytest.raises(UserError, match="no_such"):
        make_strategy(config=str(tmp_path / "no_such.json")).engine_config()


def test_trainable_state_is_a_copy(tiny_model):
    policy = make_policy(tiny_model("llama"))
    state = trainable_state(policy)
    assert state.keys() == policy.trainable.keys()
    for parameter in policy.trainable.values():
        parameter.data.zero_()
    assert any(bool(tensor.any()) for tensor in state.values())
    load_trainable_state(policy, state)
    assert all(torch.equal(parameter, state[name]) for name, parameter in policy.trainable.items())


@pytest.mark.parametrize(("given", "seen"), [("9.0a", "9.0"), ("8.0;9.0a+PTX", "8.0;9.0+PTX"), (None, None)])
def test_deepspeed_ops_are_built_for_architectures_that_it_can_read(monkeypatch, tmp_path, given, seen):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    if given is not None:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", given)
    found = []
    builder = SimpleNamespace(
        name="op",
        is_compatible=lambda verbose: True,
        load=lambda verbose: found.append(os.environ.get("TORCH_CUDA_ARCH_LIST")),
    )
    accelerator = SimpleNamespace(create_op_builder=lambda name: builder)
    monkeypatch.setattr(openrlhf.deepspeed.accelerator, "get_accelerator", lambda: accelerator)
    monkeypatch.setattr(torch.utils.cpp_extension, "_get_build_directory", lambda name, verbose: str(tmp_path / name))
    openrlhf.load_op("AnyBuilder")
    assert found == [seen] and os.environ.get("TORCH_CUDA_ARCH_LIST") == given
