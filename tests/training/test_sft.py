"""Supervised fine-tuning: its loss against plain transformers, real runs of tiny models, and PPO from its adapter."""

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support import (
    ARCHITECTURES,
    CPU,
    PlainEngine,
    adapter_of,
    gradients,
    launch,
    make_policy,
    samples,
    timeless,
    write_recipe,
)
from transformers import AutoModelForCausalLM

from extensions.common.errors import UserError
from extensions.common.files import read_json, read_jsonl
from extensions.data import Example
from extensions.model import policy as policies
from extensions.model.loading import load_policy, load_tokenizer
from extensions.prefix.tree import Sample, pack, with_sequence_targets
from extensions.prompts import CLOSE, PromptEncoder, prompt_text
from extensions.recipe import Lora, Model, Sft, load_recipe
from extensions.runs.main import main
from extensions.tasks import TASKS
from extensions.training import sft
from extensions.training.sft import SftTrainer


def plain_loss(policy, rows, answers_only):
    """Mean next-token loss over all samples by transformers' own `labels`, one plain forward per sample."""
    total, count = torch.zeros(()), 0
    for row in rows:
        ids = [*row.prompt, *row.response]
        labels = ids if not answers_only else [-100] * len(row.prompt) + list(row.response)
        tokens = len(row.response) if answers_only else len(ids) - 1
        with policy.role("actor"):
            out = policy.lm(input_ids=torch.tensor([ids]), labels=torch.tensor([labels]), use_cache=False)
        total, count = total + out.loss * tokens, count + tokens
    return total / count


@pytest.mark.parametrize("loss", ["sequence", "answer"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_the_loss_equals_that_of_plain_transformers(tiny_model, architecture, loss, checkpointing):
    """Prefix tokens are packed once and count once per sample; micro-batches change nothing."""
    policy = make_policy(tiny_model(architecture), critic="none", checkpointing=checkpointing)
    rows = samples(shared=30)
    expected = plain_loss(policy, rows, loss == "answer")
    expected.backward()
    wanted = gradients(policy)
    for size in (24, 2):
        engine = PlainEngine(policy)
        trainer = SftTrainer(policy, engine, engine, None, None, Sft(loss=loss, micro_batch_size=size), 0)
        sums = trainer.update(rows, 0)
        assert (sums["loss"] / sums["tokens"]).item() == pytest.approx(expected.item(), rel=1e-5)
        assert (sums["answer_loss"] / sums["answer_tokens"]).item() == pytest.approx(
            plain_loss(policy, rows, True).item(), rel=1e-5
        )
        found = gradients(policy)
        assert found.keys() == wanted.keys()
        for name, gradient in wanted.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_sequence_targets_are_all_tokens_of_all_samples():
    rows = samples()
    packed = pack(rows)
    whole = with_sequence_targets(packed, rows)
    assert int(whole.weights.sum()) == sum(len(r.prompt) + len(r.response) - 1 for r in rows)
    responses = sum(packed.lengths)
    assert torch.equal(whole.targets[:responses], packed.targets) and (whole.weights[:responses] == 1).all()
    assert torch.equal(whole.predicting[:responses], packed.predicting)
    assert whole.weights.max() == 3, "the prefix of the first group is shared by three samples"
    # The tokens that follow each place, read from the pack.
    for place, token in zip(whole.predicting.tolist(), whole.targets.tolist(), strict=True):
        assert any(
            place == at and [*row.prompt, *row.response][k + 1] == token
            for row, places in zip(rows, packed.places, strict=True)
            for k, at in enumerate(places.tolist())
        )


def test_logits_in_chunks_are_the_same(tiny_model, monkeypatch):
    policy = make_policy(tiny_model("llama"))
    rows = samples(shared=30)
    packed = with_sequence_targets(pack(rows), rows)
    results = []
    for numbers in (2**26, 7 * policy.causal_lm.config.vocab_size):
        monkeypatch.setattr(policies, "LOGITS_AT_ONCE", numbers)
        with policy.role("actor"):
            out = policy(packed, entropy="differentiable")
            (out["logprobs"].sum() + out["entropy"].square().sum()).backward()
        grads = {name: p.grad.clone() for name, p in policy.trainable.items() if p.grad is not None}
        policy.zero_grad()
        results.append((out["logprobs"].detach(), out["entropy"].detach(), grads))
    (logprobs, entropy, grads), (chunked, entropy_of_chunks, grads_of_chunks) = results
    assert len(logprobs) > 21
    torch.testing.assert_close(chunked, logprobs)
    torch.testing.assert_close(entropy_of_chunks, entropy)
    for name, gradient in grads.items():
        torch.testing.assert_close(grads_of_chunks[name], gradient)


def test_a_sharded_head_is_used_once(tiny_model, monkeypatch):
    """ZeRO 3 gathers it per use, and ranks with different numbers of targets would gather it at different times."""
    policy, rows = make_policy(tiny_model("llama")), samples()
    monkeypatch.setattr(policies, "LOGITS_AT_ONCE", policy.causal_lm.config.vocab_size)
    head, uses = policy.causal_lm.get_output_embeddings(), []
    head.register_forward_hook(lambda *_: uses.append(1))
    for sharded in (False, True):
        if sharded:
            head.weight.ds_id = 0
        uses.clear()
        with policy.role("actor"):
            policy(pack(rows))
        assert len(uses) == sharded


def test_the_loss_is_at_temperature_1(tiny_model):
    policy = make_policy(tiny_model("llama"), critic="none")
    expected = plain_loss(policy, samples(), False).item()
    policy.temperature = 0.5
    engine = PlainEngine(policy)
    sums = SftTrainer(policy, engine, engine, None, None, Sft(loss="sequence"), 0).update(samples(), 0)
    assert (sums["loss"] / sums["tokens"]).item() == pytest.approx(expected, rel=1e-5)


def test_a_sample_is_prompt_answer_and_closing_tag(tiny_model):
    tokenizer = load_tokenizer(Model(path=str(tiny_model("llama"))))
    trainer = SimpleNamespace(encoder=PromptEncoder(tokenizer, 400, False))
    for name, label, written in (("cola", "1", "Yes"), ("stsb", "3.8", "3.8")):
        task = TASKS[name]
        fields = dict.fromkeys(task.fields, "Anna slept.")
        (sample,) = SftTrainer.encode(trainer, Example(task, 0, fields, label))
        assert tokenizer.decode(sample.prompt) == prompt_text(task, fields)
        assert tokenizer.decode(sample.response) == f" {written} {CLOSE}"
        assert sample.response[-1] != tokenizer.eos_token_id


# ------------------------------------------------------------------------------------------------------------ real runs


def sft_recipe(folder, model, **sections):
    sft_section = {"batch_size": 4, "micro_batch_size": 3} | sections.pop("sft", {})
    return write_recipe(folder, model, output_dir=str(folder / "run"), sft=sft_section, **sections)


@pytest.fixture(scope="module")
def finished(tiny_model, tmp_path_factory):
    """The folder of a finished run in this process, and its recipe."""
    folder = tmp_path_factory.mktemp("finished")
    path = sft_recipe(folder, tiny_model("llama"), max_steps=6, evaluation={"every_steps": 3, "validation_samples": 4})
    assert main([str(path)], "sft") == 0
    return folder / "run", load_recipe(path, method="sft")


def test_a_run_writes_all_its_files(finished):
    folder, recipe = finished
    assert load_recipe(folder / "recipe.yaml") == recipe and recipe.method == "sft"
    metrics = read_jsonl(folder / "metrics.jsonl")
    assert [m["samples"] for m in metrics] == [4, 8, 12, 16, 20, 24], "as many samples as PPO would see"
    assert all(m["loss"] > 0 and m["answer_loss"] > 0 and m["grad_norm"] > 0 for m in metrics)
    assert all(m["elapsed_s"] > 0 and m["cpu_s"] > 0 for m in metrics)
    scores = read_json(folder / "eval.json")
    assert scores["method"] == "sft" and scores["training"].keys() == {
        "tasks",
        "steps",
        "samples",
        "seconds",
        "started_from",
        "changes",
    }
    assert scores["training"]["samples"] == 24 and scores["training"]["tasks"] == ["acceptability"]
    assert {"before", "after"} <= scores.keys()
    validations = read_jsonl(folder / "validation.jsonl")
    assert [(v["step"], v["samples"]) for v in validations] == [(3, 12), (6, 24)]
    assert (folder / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    assert not (folder / "critic").exists() and not (folder / "reward_curve.png").exists()
    assert (folder / "adapter" / "README.md").exists()


def test_training_lowers_the_loss(tiny_model, tmp_path):
    path = sft_recipe(tmp_path, tiny_model("qwen2"), max_steps=12, evaluation={"before": False})
    assert main([str(path), "data.max_train_samples=4"], "sft") == 0
    losses = [m["loss"] for m in read_jsonl(tmp_path / "run" / "metrics.jsonl")]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.05, "the same four rows in each step"


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ["sft.optimizer=adafactor", "lora.dropout=0.1"],
        ["sft.loss=sequence", "model.dtype=bfloat16", "data.mixing=uniform"],
    ],
    ids=["answer", "sequence, bf16"],
)
def test_every_setting_runs(tiny_model, tmp_path, overrides):
    path = sft_recipe(
        tmp_path, tiny_model("mpt"), data={"tasks": ["acceptability", "reviews"], "max_train_samples": 64}
    )
    assert main([str(path), "evaluation.max_samples=2", *overrides], "sft") == 0


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one(tiny_model, tmp_path):
    """Stopped after step 2 of 4 and started again: adapter and metrics are bit-identical."""

    class Killed(BaseException):
        pass

    iterate = sft.SftTrainer.iterate

    def killing(self, step):
        if step == 2:
            raise Killed
        return iterate(self, step)

    recipes = {}
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
        recipes[name] = sft_recipe(
            tmp_path / name,
            tiny_model("llama"),
            max_steps=4,
            checkpoint={"every_steps": 1},
            lora={"dropout": 0.1},
            evaluation={"max_samples": 2, "every_steps": 1, "validation_samples": 2},
        )
    assert main([str(recipes["whole"])], "sft") == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sft.SftTrainer, "iterate", killing)
        with pytest.raises(Killed):
            main([str(recipes["cut"])], "sft")
    assert main([str(recipes["cut"])], "sft") == 0
    whole, cut = tmp_path / "whole" / "run", tmp_path / "cut" / "run"
    ours, theirs = adapter_of(cut), adapter_of(whole)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    for name in ("metrics.jsonl", "validation.jsonl"):
        assert timeless(cut / name) == timeless(whole / name)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_two_ranks_equal_one(tiny_model, tmp_path, stage):
    adapters, losses = [], []
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        path = sft_recipe(
            folder, tiny_model("llama"), max_steps=3, deepspeed={"zero_stage": stage if ranks == 2 else 0}
        )
        if ranks == 1:
            assert main([str(path)], "sft") == 0
        else:
            done = launch(path, ranks=2, method="sft")
            assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        adapters.append(adapter_of(folder / "run"))
        losses.append([(m["loss"], m["answer_loss"]) for m in read_jsonl(folder / "run" / "metrics.jsonl")])
    for one, two in zip(*losses, strict=True):
        assert one == pytest.approx(two, rel=1e-5)
    for name, tensor in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], tensor, atol=2e-4, rtol=2e-3)


@pytest.mark.slow
def test_a_small_task_ends_after_its_epochs(tiny_model, tmp_path):
    path = sft_recipe(tmp_path, tiny_model("llama"), max_steps=50, max_epochs=2, evaluation={"before": False})
    assert main([str(path), "data.max_train_samples=10"], "sft") == 0
    metrics = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert len(metrics) == 5, "two passes over 10 rows by 4"
    assert metrics[-1]["lr"] == pytest.approx(1e-3, rel=1e-3), "the schedule ends there, at a tenth"
    by_epochs = [f"output_dir={tmp_path / 'epochs'}", "schedule.epochs=1", "data.max_train_samples=10"]
    assert main([str(path), *by_epochs], "sft") == 0
    rates = [m["lr"] for m in read_jsonl(tmp_path / "epochs" / "metrics.jsonl")]
    assert rates == pytest.approx([0.01, rates[1], 1e-3, 1e-3, 1e-3]) and 1e-3 < rates[1] < 0.01, "one epoch is 3 steps"
    assert load_recipe(path, ["max_epochs=null"], "sft").training_steps(10) == 50
    assert [load_recipe(path, ["max_steps=7", "sft.batch_size=6"], "sft").training_steps()] == [5], "28 samples, or 30"


# --------------------------------------------------------------------------------------------------- from its adapter


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["start", "base"])
def test_ppo_starts_from_the_adapter_and_stays_near_it_or_near_the_base(
    finished, tiny_model, tmp_path, capsys, reference
):
    adapter = finished[0] / "adapter"
    assert load_recipe(finished[0] / "recipe.yaml").sft.loss == "answer"
    path = write_recipe(
        tmp_path, tiny_model("llama"), output_dir=str(tmp_path / "run"), ppo={"kl": {"reference": reference}}
    )
    assert main([str(path), f"model.adapter={adapter}", "evaluation.before=false"]) == 0
    kept = {"start": "a frozen copy of it", "base": "the base model"}[reference]
    said = " ".join(capsys.readouterr().out.split())
    assert f"policy from {adapter}; KL reference: {kept}; value head: new" in said
    assert read_json(tmp_path / "run" / "eval.json")["training"]["started_from"] == "sft"
    first, second = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert first["sampling_mismatch"] < 1e-4
    if reference == "start":
        assert abs(first["kl"]) < 1e-4 < abs(second["kl"])
    else:
        assert abs(first["kl"]) > 1e-3
    start, end = (adapter_of(folder) for folder in (finished[0], tmp_path / "run"))
    moved = [name for name in start if not torch.equal(start[name], end[name])]
    assert moved and all("reference" not in name for name in end)


def test_the_reference_is_a_frozen_copy(finished, tiny_model):
    model = Model(path=str(tiny_model("llama")), adapter=str(finished[0] / "adapter"))
    policy = load_policy(model, Lora(rank=4, dropout=0.0), "shared", 1.0, CPU, 0, "start")
    assert not any("reference" in name for name in policy.trainable)
    packed = pack(samples(vocabulary=300))
    start = {}
    for role in ("actor", "reference"):
        with policy.role(role):
            start[role] = policy(packed)["logprobs"].detach()
    assert torch.equal(start["actor"], start["reference"])
    for name, parameter in policy.trainable.items():
        if "lora_B" in name:
            parameter.data += 1.0
    with policy.role("reference"):
        assert torch.equal(policy(packed)["logprobs"], start["reference"])
    with policy.role("actor"):
        assert not torch.allclose(policy(packed)["logprobs"], start["actor"])


@pytest.mark.parametrize(
    ("adapter", "overrides", "message"),
    [
        ("no/such/adapter", [], "adapter_config.json"),
        (None, ["lora.rank=8", "lora.alpha=5"], "lora.rank=4 lora.alpha=32"),
        (None, ["lora.target_modules=[o_proj]"], "lora.target_modules=[q_proj, v_proj]"),
    ],
    ids=["none there", "other settings", "other targets"],
)
def test_an_adapter_that_does_not_fit_is_refused(finished, tiny_model, tmp_path, capsys, adapter, overrides, message):
    path = write_recipe(tmp_path, tiny_model("llama"), output_dir=str(tmp_path / "run"))
    adapter = adapter or finished[0] / "adapter"
    assert main([str(path), f"model.adapter={adapter}", *overrides]) == 2
    error = capsys.readouterr().err
    assert "model.adapter" in error and message in error and "Traceback" not in error


def test_an_adapter_that_is_more_than_lora_is_refused(tiny_model, tmp_path):
    """Its other trained weights stay on when the adapter is off, so the reference would not be the base."""
    base = AutoModelForCausalLM.from_pretrained(tiny_model("llama"))
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])
    get_peft_model(base, config).save_pretrained(tmp_path)
    model = Model(path=str(tiny_model("llama")), adapter=str(tmp_path))
    for training in (True, False):
        with pytest.raises(UserError, match=r"modules_to_save: \['lm_head'\].*merge_and_unload"):
            load_policy(model, Lora(rank=4), "none", 1.0, CPU, 0, "base", training)


def test_the_adapter_loads_in_plain_peft(finished, tiny_model):
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(tiny_model("llama"))
    lm = PeftModel.from_pretrained(base, finished[0] / "adapter").eval()
    policy = load_policy(
        Model(path=str(tiny_model("llama")), adapter=str(finished[0] / "adapter")),
        Lora(),
        "none",
        1.0,
        CPU,
        0,
        "base",
        training=False,
    )
    (row,) = [Sample([7, 8, 9], [10, 11])]
    with torch.no_grad(), policy.role("actor"):
        ours = policy(pack([row]))["logprobs"]
        theirs = lm(torch.tensor([[7, 8, 9, 10, 11]])).logits[0, 2:4].log_softmax(-1)[[0, 1], [10, 11]]
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)
