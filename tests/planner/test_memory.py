"""Memory of `nlu plan` against real optimizers and the tensors that autograd saves."""

from functools import partial

import pytest
import torch
from support import ARCHITECTURES, make_policy, write_recipe
from transformers import AutoConfig

from extensions.distributed.optim import make_optimizer
from extensions.model.policy import ForwardPath
from extensions.planner import Planner, PlanOptions
from extensions.planner.activations import kept_bytes, trace_model
from extensions.planner.flops import ModelShape, SampleTokens, pack_work
from extensions.planner.memory import optimizer_bytes, pack_memory, pairs_of
from extensions.prefix.attention import NAME as PACKED
from extensions.prefix.tree import Sample, pack, pack_cost
from extensions.recipe import Lora, load_recipe

LORA = Lora(rank=4, alpha=8, dropout=0.0)  # as in support.make_policy


@pytest.mark.parametrize("method", ["ppo", "sft"])
@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_optimizer_state_equals_real_optimizers(tiny_model, tmp_path, name, method):
    folder = tiny_model("llama")
    path = write_recipe(tmp_path, folder, optimizer={"name": name}, sft={"optimizer": name}, method=method)
    recipe = load_recipe(path)
    policy = make_policy(folder)
    if method == "sft":
        policy.value_head = None
    optimizer = make_optimizer(policy.parameter_groups(), recipe.trained_with, offload=False)
    for parameter in policy.trainable.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values()]
    real = sum(value.nbytes for value in states if isinstance(value, torch.Tensor) and value.dim() > 0)
    job = Planner(recipe, PlanOptions()).job
    assert optimizer_bytes(job) == real
    assert job.trained == sum(p.numel() for p in policy.trainable.values())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_activations_equal_the_tensors_that_autograd_saves(tiny_model, architecture):
    """A trace of one and two layers, against a real forward of the whole model at another length."""
    folder, tokens = tiny_model(architecture), 90
    attention = "eager" if architecture == "mpt" else "sdpa"
    trace = trace_model(AutoConfig.from_pretrained(folder), LORA, attention, torch.float32, False)
    policy = make_policy(folder).train()
    policy.causal_lm.set_attn_implementation(attention)
    inputs = {
        "input_ids": torch.zeros(1, tokens, dtype=torch.long),
        "position_ids": torch.arange(tokens)[None],
        "attention_mask": torch.zeros(1, 1, tokens, tokens),
    }
    with policy.role("actor"):
        real = kept_bytes(policy, partial(policy.causal_lm.base_model, **inputs, use_cache=False))
    assert 2 * trace.layer_bytes(tokens) + trace.other_bytes(tokens) == pytest.approx(real, rel=1e-3)
    assert 15 < trace.layer_kernels < 100


@pytest.mark.parametrize("responses", [1, 4])
def test_the_pairs_of_a_planned_pack_are_those_of_a_real_one(responses):
    prompts = [[*range(60), 70 + k, *range(40 + k)] for k in range(5)]
    rows = [Sample(prompt, [90 + j, 2, 3, 4]) for prompt in prompts for j in range(responses)]
    planned = [SampleTokens(0, 60, len(prompt) - 60, 4, responses) for prompt in prompts]
    for form in ("flash", "masked"):
        real = pack_cost(rows, form)
        assert pack_work(planned).tokens == real.tokens and pairs_of(planned, form) == real.pairs
    # Rows of one group are padded to the longest of them.
    assert 0.7 * pack_cost(rows, "packed").pairs < pairs_of(planned, "packed") <= pack_cost(rows, "packed").pairs


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_flash_path_keeps_no_more_than_planned_and_no_gathered_keys(tiny_model, monkeypatch, architecture):
    """The kernel's stand-in on a CPU: what a layer keeps does not depend on it, since backward repeats its forward."""
    # A run with ZeRO 3 in this process leaves DeepSpeed's own, which keeps the inputs of frozen layers too.
    monkeypatch.setattr(torch.nn.functional, "linear", torch._C._nn.linear)
    folder = tiny_model(architecture)
    trace = trace_model(AutoConfig.from_pretrained(folder), LORA, PACKED, torch.float32, False)
    policy = make_policy(folder).train()
    packed = pack([Sample([*range(3, 90), k], [1, 2, 3]) for k in range(40)])
    assert len(packed.segments.source) > 15 * packed.input_ids.shape[1]
    kept = {}
    for flash in (True, False):
        policy.use(ForwardPath("packed", PACKED, flash=flash))
        with policy.role("actor"):
            kept[flash] = kept_bytes(policy, partial(policy.packed_states, packed))
    tokens, shape = packed.input_ids.shape[1], ModelShape.of(AutoConfig.from_pretrained(folder), LORA)
    one, two = (pack_memory(shape, trace, 4, 4, "flash", False, layers) for layers in (1, 2))
    constant, outside = [*trace.other_bytes.convert().coef, 0.0, 0.0][:2]  # zeros at the end are left out
    assert kept[True] == pytest.approx((2 * (two.token - one.token) + outside) * tokens + constant, rel=1e-3)
    assert kept[True] < kept[False] and two.token < pack_memory(shape, trace, 4, 4, "packed", False, 2).token
