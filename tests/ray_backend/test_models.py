"""The models behind OpenRLHF's interfaces, against OpenRLHF's own forward on padded rows; and the engine's checks."""

import json
import pickle

import pytest
import torch
from support import make_policy

from extensions.distributed.nonfinite import NonFiniteError, NonFiniteTensor
from extensions.distributed.openrlhf import Actor, openrlhf_importable
from extensions.distributed.strategy import Strategy, trainable_state
from extensions.prefix.tree import Sample
from extensions.ray_backend.models import PackedActor, PackedCritic, placed, samples_of
from extensions.recipe import DeepSpeed, Optimizer, Schedule
from extensions.rollout.vllm import CANARY_STD, Adapter, Adapters, Probe, SyncError, canary_state

ROWS = [([5, 6, 7, 8, 9], [11, 12, 13]), ([5, 6, 7, 8, 9, 10, 14], [12]), ([20, 21], [22, 23, 24, 25])]


def padded(rows):
    """As OpenRLHF's samples generator and `concat_experiences` lay them out: right padding, masks one shorter."""
    width = max(len(p) + len(r) for p, r in rows)
    sequences, attention, action = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(3))
    for i, (prompt, response) in enumerate(rows):
        whole = prompt + response
        sequences[i, : len(whole)] = torch.tensor(whole)
        attention[i, : len(whole)] = 1
        action[i, len(prompt) : len(whole)] = 1
    return sequences, attention, action[:, 1:]


def test_padded_rows_are_read_back():
    sequences, attention, action = padded(ROWS)
    assert samples_of(sequences, attention, action) == [Sample(p, r) for p, r in ROWS]


def test_logprobs_and_gradients_are_those_of_openrlhfs_own_forward(tiny_model):
    sequences, attention, action = padded(ROWS)
    ours = PackedActor(make_policy(tiny_model("llama"), critic="none"), "actor", "number")
    found, output = ours(sequences, action, attention, return_output=True, return_entropy=True)

    reference = make_policy(tiny_model("llama"), critic="none")
    theirs = Actor(reference.lm)
    theirs.packing_samples = theirs.is_vlm = False
    with reference.role("actor"), openrlhf_importable():
        wanted = theirs(sequences, action, attention)
        torch.testing.assert_close(found, wanted, atol=2e-5, rtol=0)
        (wanted * torch.arange(wanted.numel()).view_as(wanted)).sum().backward()
    (found * torch.arange(found.numel()).view_as(found)).sum().backward()
    gradients = {name: p.grad for name, p in reference.trainable.items()}
    for name, parameter in ours.model.trainable.items():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-4, rtol=1e-4)
    assert (output.entropy[action.bool()] > 0).all() and not output.entropy[~action.bool()].any()


def test_a_critics_values_and_that_its_head_is_trained(tiny_model):
    """OpenRLHF's own critic has a frozen, random head under LoRA (0.11.2)."""
    sequences, attention, action = padded(ROWS)
    critic = PackedCritic(make_policy(tiny_model("llama"), critic="adapter"))
    values = critic(sequences, action_mask=action, attention_mask=attention)
    policy = make_policy(tiny_model("llama"), critic="adapter")
    with policy.role("critic"):
        for i, (prompt, response) in enumerate(ROWS):
            states = policy.trunk(input_ids=torch.tensor([prompt + response])).last_hidden_state[0]
            wanted = policy.value_head(states[len(prompt) - 1 : -1])
            torch.testing.assert_close(values[i][action[i].bool()], wanted, atol=1e-5, rtol=0)
    values.sum().backward()
    trained = critic.policy.trainable
    assert {name.split(".")[0] for name in trained} == {"lm", "value_head"}
    assert not any(".default." in name for name in trained)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for name, p in trained.items() if "value_head" in name)


def test_a_critic_is_wrapped_like_a_policy(tiny_model):
    critic = PackedCritic(make_policy(tiny_model("llama"), critic="adapter"))
    strategy = Strategy(0, DeepSpeed(), 1.0)
    strategy.setup_distributed()
    engine = strategy.wrap(critic, critic.policy.parameter_groups(), Optimizer(name="adamw"), Schedule(), 2)
    assert engine.module is critic


def test_a_policy_stays_in_its_role(tiny_model):
    actor = PackedActor(make_policy(tiny_model("llama"), critic="none"), "actor", "none")
    import gc

    gc.collect()
    assert actor.model._role == "actor"


def test_placed_is_differentiable_and_zero_elsewhere():
    flat = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    mask = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 0]])
    result = placed(flat, mask)
    assert result.tolist() == [[0, 1, 2, 0], [3, 0, 0, 0]]
    result.sum().backward()
    assert flat.grad.tolist() == [1, 1, 1]


# -------------------------------------------------------------------------------------------------- the adapter's way


def test_an_adapter_travels_in_pefts_format(tiny_model, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    policy = make_policy(tiny_model("llama"), critic="shared")
    adapter = pickle.loads(pickle.dumps(Adapter.of(policy, trainable_state(policy), 7)))
    folder = adapter.write(tmp_path)
    assert folder.name == "adapter-7"
    assert json.loads((folder / "adapter_config.json").read_text())["use_rslora"] is True
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model("llama")), folder)
    ids = torch.tensor([[5, 6, 7, 8]])
    with policy.role("actor"), torch.no_grad():
        torch.testing.assert_close(policy.lm(input_ids=ids).logits, loaded(ids).logits, atol=1e-5, rtol=0)


def test_adapters_keep_one_version(tmp_path, monkeypatch):
    import sys
    import types

    module = types.ModuleType("vllm.lora.request")
    module.LoRARequest = lambda name, number, path: (name, number, path)
    for name, one in (("vllm", types.ModuleType("vllm")), ("vllm.lora", types.ModuleType("vllm.lora"))):
        monkeypatch.setitem(sys.modules, name, one)
    monkeypatch.setitem(sys.modules, "vllm.lora.request", module)
    adapters = Adapters()
    assert adapters.next(Adapter(1, b"{}", b"a"))[1] is None
    request, old = adapters.next(Adapter(2, b"{}", b"b"))
    assert (request[1], old, adapters.version) == (2, 1, 2)
    assert [path.name for path in adapters.folder.iterdir()] == ["adapter-2"]
    adapters.close()


def test_a_canary_is_random_in_its_b_matrices_alone(tiny_model):
    state = trainable_state(make_policy(tiny_model("llama")))
    canary = canary_state(state, 3)
    for name, tensor in canary.items():
        changed = not torch.equal(tensor, state[name])
        assert changed == (".lora_B." in name)
        assert not changed or abs(tensor.std().item() - CANARY_STD) < CANARY_STD / 2
    assert all(torch.equal(a, b) for a, b in zip(canary.values(), canary_state(state, 3).values(), strict=True))


class TestProbe:
    def test_agreement_is_measured(self):
        found = Probe(torch.float32, None).check("a", [-1.0, -2.0], [[-1.0, -2.0005], [-1.0, -2.0]], "x")
        assert found == {
            "probe_mean": pytest.approx(2.5e-4, rel=1e-3),
            "probe_max": pytest.approx(5e-4, rel=1e-3),
            "probe_tokens": 2,
        }

    @pytest.mark.parametrize("engine", [[-1.0, -2.01], [-1.0, float("nan")]], ids=["differs", "nan"])
    def test_disagreement_stops_the_run(self, engine):
        with pytest.raises(SyncError, match="engine 1 and the trainer differ by"):
            Probe(torch.float32, None).check("a", [-1.0, -2.0], [[-1.0, -2.0], engine], "version 3")

    def test_bfloat16_has_a_wider_tolerance(self):
        Probe(torch.bfloat16, None).check("a", [-1.0], [[-1.05]], "x")
        with pytest.raises(SyncError):
            Probe(torch.bfloat16, 0.01).check("a", [-1.0], [[-1.05]], "x")

    def test_a_sync_that_delivers_nothing_is_found_although_the_numbers_are_near(self):
        probe = Probe(torch.float32, None)
        probe.check("a", [-1.0, -2.0], [[-1.0, -2.0]], "version 1")
        with pytest.raises(SyncError, match="delivered nothing"):
            probe.check("b", [-1.00001, -2.0], [[-1.0, -2.0]], "version 2")

    @pytest.mark.parametrize("mismatch", [0.002, float("nan")])
    def test_samples_of_another_policy_stop_the_run_before_the_update(self, mismatch):
        Probe(torch.float32, None).check_samples(5e-6)
        with pytest.raises(SyncError, match="the samples are not the policy's"):
            Probe(torch.float32, None).check_samples(mismatch)

    def test_the_same_adapter_may_be_sent_again(self):
        probe = Probe(torch.float32, None)
        for _ in range(2):
            probe.check("a", [-1.0], [[-1.0]], "x")


def test_an_error_of_a_worker_keeps_its_problems():
    bad = pickle.loads(pickle.dumps(NonFiniteError([NonFiniteTensor("loss", [1], "NaN")])))
    assert bad.problems == [NonFiniteTensor("loss", [1], "NaN")]
