"""The critic that a PPO run left in critic/: a later run starts from it, or says why not."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import CPU, make_policy, write_recipe

from extensions.common.errors import UserError
from extensions.distributed.strategy import trainable_state
from extensions.model.critic import ADAPTER, HEAD, critic_hash, critic_source
from extensions.model.loading import load_policy
from extensions.recipe import Lora, Model, load_recipe

FAULTS = {
    "no head": (lambda folder: (folder / HEAD).unlink(), rf"has no {HEAD}"),
    "cut": (lambda folder: (folder / HEAD).write_bytes(b"{"), rf"{HEAD}: cannot start the critic from it: it cannot"),
    "cut adapter": (lambda folder: (folder / ADAPTER).write_bytes(b""), rf"{ADAPTER}: cannot start the critic"),
    "no adapter": (lambda folder: (folder / ADAPTER).unlink(), rf"{ADAPTER}: cannot start the critic"),
}


def change(name, edit):
    def changed(folder):
        tensors = load_file(folder / name)
        edit(tensors)
        save_file(tensors, folder / name)

    return changed


def key_of(tensors):
    return sorted(tensors)[0]


MISMATCHES = {
    "another width": (
        change(HEAD, lambda t: t.update({"out.weight": torch.zeros(1, 9)})),
        r"out.weight is \[1, 9\], expected \[1, 32\]: it is of another model",
    ),
    "NaN": (change(HEAD, lambda t: t["out.bias"].fill_(float("nan"))), "out.bias has non-finite values"),
    "a weight less": (change(HEAD, lambda t: t.pop("out.bias")), r"not those of this run's critic \(out.bias\)"),
    "a layer less": (change(ADAPTER, lambda t: t.pop(key_of(t))), "not those of this run's critic"),
    "another alpha": (
        lambda folder: (folder / "critic/adapter_config.json").write_text('{"lora_alpha": 3, "use_rslora": true}'),
        "lora.alpha=3 lora.rslora=True are not those of this run",
    ),
}


@pytest.fixture
def run(tiny_model, tmp_path):
    """`run(kind)`: the folder of a PPO run with adapter and critic, and all its trained weights."""

    def make(kind):
        policy = make_policy(tiny_model("llama"), kind)
        policy.save_adapter(tmp_path / "run" / "adapter", trainable_state(policy))
        policy.save_critic(tmp_path / "run" / "critic", trainable_state(policy))
        return SimpleNamespace(root=tmp_path / "run", state=trainable_state(policy))

    return make


def recipe_of(tmp_path, kind, *overrides, method="ppo"):
    adapter = f"model.adapter={tmp_path / 'run' / 'adapter'}"
    path = write_recipe(tmp_path, tmp_path / "model", lora={"rank": 4, "alpha": 8})
    return load_recipe(path, [adapter, f"ppo.critic={kind}", *overrides], method)


def load(model, recipe):
    source = critic_source(recipe)
    adapter = Model(path=str(model), adapter=recipe.model.adapter)
    settings = Lora(rank=4, alpha=8, dropout=0.0)
    return load_policy(adapter, settings, recipe.ppo.critic, 1.0, CPU, 5, "base", critic_from=source)


@pytest.mark.parametrize("kind", ["shared", "adapter"])
def test_the_policy_starts_as_the_run_ended(run, tiny_model, tmp_path, kind):
    made = run(kind)
    recipe = recipe_of(tmp_path, kind)
    found = trainable_state(load(tiny_model("llama"), recipe))
    assert found.keys() == made.state.keys() and all(torch.equal(found[name], made.state[name]) for name in found)
    copied = shutil.copytree(made.root / "critic", tmp_path / "kept")
    shutil.rmtree(made.root / "critic")
    elsewhere = recipe_of(tmp_path, kind, f"ppo.critic_from={copied}")
    found = trainable_state(load(tiny_model("llama"), elsewhere))
    assert all(torch.equal(found[name], made.state[name]) for name in found)


def test_a_new_value_head_where_there_is_none_to_start_from(run, tiny_model, tmp_path):
    made, warnings = run("shared"), []
    for recipe in (
        recipe_of(tmp_path, "shared", "ppo.critic_from=none"),
        recipe_of(tmp_path, "shared", "model.adapter=null"),
        recipe_of(tmp_path, "shared", method="sft"),
    ):
        assert critic_source(recipe, warnings.append) is None and critic_hash(recipe) is None and not warnings
    policy = load(tiny_model("llama"), recipe_of(tmp_path, "shared", "ppo.critic_from=none"))
    assert not policy.value_head.out.weight.any()
    assert critic_source(recipe_of(tmp_path, "adapter"), warnings.append) is None
    assert warnings == [
        f"the value head starts at zero: {made.root / 'critic'} is of ppo.critic: shared, this run has adapter"
    ]
    with pytest.raises(UserError, match=r"is of ppo\.critic: shared, this run has adapter; set ppo.critic=shared"):
        critic_source(recipe_of(tmp_path, "adapter", f"ppo.critic_from={made.root / 'critic'}"))
    shutil.rmtree(made.root / "critic")
    assert critic_source(recipe_of(tmp_path, "shared"), warnings.append) is None and len(warnings) == 1


@pytest.mark.parametrize("fault", FAULTS)
def test_damaged_files_are_found_before_the_model_is_loaded(run, tmp_path, fault):
    made, (damage, message) = run("adapter"), FAULTS[fault]
    damage(made.root / "critic")
    with pytest.raises(UserError, match=message):
        critic_source(recipe_of(tmp_path, "adapter"))


@pytest.mark.parametrize("fault", MISMATCHES)
def test_a_critic_of_another_model_is_refused(run, tiny_model, tmp_path, fault):
    made, (damage, message) = run("adapter"), MISMATCHES[fault]
    before = critic_hash(recipe_of(tmp_path, "adapter"))
    damage(made.root / "critic")
    assert critic_hash(recipe_of(tmp_path, "adapter")) != before
    with pytest.raises(UserError, match=message):
        load(tiny_model("llama"), recipe_of(tmp_path, "adapter"))
