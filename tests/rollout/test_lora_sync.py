"""LoRA sync: the payload in PEFT's format, the random adapter, and the results of the probe."""

import json
import pickle
import sys
import types
from pathlib import Path

import pytest
import torch
from support import make_policy

from extensions.distributed.strategy import trainable_state
from extensions.rollout.lora_sync import RANDOM_B_STD, LoraPayload, SyncError, SyncProbe, random_lora_state
from extensions.rollout.vllm_engine import LoraSlot


def test_a_payload_is_in_pefts_format(tiny_model, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    policy = make_policy(tiny_model("llama"), critic="shared")
    payload = pickle.loads(pickle.dumps(LoraPayload.of(policy, trainable_state(policy), 7)))
    payload.write(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["use_rslora"] is True
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model("llama")), tmp_path)
    ids = torch.tensor([[5, 6, 7, 8]])
    with policy.role("actor"), torch.no_grad():
        torch.testing.assert_close(policy.lm(input_ids=ids).logits, loaded(ids).logits, atol=1e-5, rtol=0)


def test_a_slot_keeps_one_version(monkeypatch):
    module = types.ModuleType("vllm.lora.request")
    module.LoRARequest = lambda name, number, path: (name, number, path)
    for name, one in (("vllm", types.ModuleType("vllm")), ("vllm.lora", types.ModuleType("vllm.lora"))):
        monkeypatch.setitem(sys.modules, name, one)
    monkeypatch.setitem(sys.modules, "vllm.lora.request", module)
    slot = LoraSlot()
    first, old = slot.replace(LoraPayload(1, b"{}", b"a"))
    assert old is None and Path(first[2], "adapter_model.safetensors").read_bytes() == b"a"
    request, old = slot.replace(LoraPayload(2, b"{}", b"b"))
    assert (request[1], old, slot.version) == (2, 1, 2)
    assert not Path(first[2]).exists() and Path(request[2], "adapter_model.safetensors").read_bytes() == b"b"
    slot.folder.cleanup()


def test_a_random_adapter_is_random_only_in_its_b_matrices(tiny_model):
    state = trainable_state(make_policy(tiny_model("llama")))
    changed_state = random_lora_state(state, 3)
    for name, tensor in changed_state.items():
        changed = not torch.equal(tensor, state[name])
        assert changed == (".lora_B." in name)
        assert not changed or abs(tensor.std().item() - RANDOM_B_STD) < RANDOM_B_STD / 2
    assert all(
        torch.equal(a, b) for a, b in zip(changed_state.values(), random_lora_state(state, 3).values(), strict=True)
    )


class TestSyncProbe:
    def test_agreement_is_measured(self):
        found = SyncProbe(torch.float32, None).check("a", [-1.0, -2.0], [[-1.0, -2.0005], [-1.0, -2.0]], "x")
        assert found == {
            "probe_mean": pytest.approx(2.5e-4, rel=1e-3),
            "probe_max": pytest.approx(5e-4, rel=1e-3),
            "probe_tokens": 2,
        }

    @pytest.mark.parametrize("engine", [[-1.0, -2.01], [-1.0, float("nan")]], ids=["differs", "nan"])
    def test_disagreement_stops_the_run(self, engine):
        with pytest.raises(SyncError, match="engine 1 and the trainer differ by"):
            SyncProbe(torch.float32, None).check("a", [-1.0, -2.0], [[-1.0, -2.0], engine], "version 3")

    def test_bfloat16_has_a_wider_tolerance(self):
        SyncProbe(torch.bfloat16, None).check("a", [-1.0], [[-1.05]], "x")
        with pytest.raises(SyncError):
            SyncProbe(torch.bfloat16, 0.01).check("a", [-1.0], [[-1.05]], "x")

    def test_a_sync_without_effect_is_found_even_if_the_logprobs_are_close(self):
        probe = SyncProbe(torch.float32, None)
        probe.check("a", [-1.0, -2.0], [[-1.0, -2.0]], "version 1")
        with pytest.raises(SyncError, match="delivered nothing"):
            probe.check("b", [-1.00001, -2.0], [[-1.0, -2.0]], "version 2")

    @pytest.mark.parametrize("mismatch", [0.002, float("nan")])
    def test_samples_of_another_policy_stop_the_run_before_the_update(self, mismatch):
        SyncProbe(torch.float32, None).check_samples(5e-6)
        with pytest.raises(SyncError, match="the samples are not from the policy"):
            SyncProbe(torch.float32, None).check_samples(mismatch)

    def test_the_same_adapter_may_be_sent_again(self):
        probe = SyncProbe(torch.float32, None)
        for _ in range(2):
            probe.check("a", [-1.0], [[-1.0]], "x")
