"""Memory of `nlu plan` against real optimizers and the tensors that autograd saves."""

import pytest
import torch
from support import ARCHITECTURES, make_policy, write_recipe
from transformers import AutoConfig

from extensions.distributed.optim import make_optimizer
from extensions.planner import Planner, PlanOptions
from extensions.planner.activations import kept_bytes, trace_model
from extensions.planner.memory import optimizer_bytes
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
    inputs = {
        "input_ids": torch.zeros(1, tokens, dtype=torch.long),
        "position_ids": torch.arange(tokens)[None],
        "attention_mask": torch.zeros(1, 1, tokens, tokens),
    }
    with policy.role("actor"):
        real = kept_bytes(policy.causal_lm.base_model, inputs)
    assert 2 * trace.layer_bytes(tokens) + trace.other_bytes(tokens) == pytest.approx(real, rel=1e-3)
    assert 15 < trace.layer_kernels < 100
