"""The PPO loop as a whole: real runs of tiny models, alone and on several ranks."""

import errno
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from support import adapter_of, free_port, launch, timeless, write_recipe
from transformers import AutoModelForCausalLM

from extensions.common.files import read_json, read_jsonl
from extensions.distributed.strategy import Strategy
from extensions.model.loading import load_tokenizer
from extensions.model.policy import Policy
from extensions.recipe import Model, load_recipe
from extensions.runs.folder import RunFolder
from extensions.runs.main import main
from extensions.training import ppo


@pytest.fixture(scope="module")
def finished(tiny_model, tmp_path_factory):
    """A finished run in this process, and its recipe."""
    folder = tmp_path_factory.mktemp("finished")
    path = write_recipe(folder, tiny_model("llama"), output_dir=str(folder / "run"), max_steps=3)
    assert main([str(path)]) == 0
    return folder / "run", load_recipe(path)


def test_a_run_writes_all_its_files(finished):
    folder, recipe = finished
    names = {p.name for p in folder.iterdir()}
    assert names >= {
        "recipe.yaml", "versions.json", "metrics.jsonl", "rollouts.jsonl", "eval.json", "reward_curve.png", "adapter",
        "critic", "tensorboard",
    }  # fmt: skip
    assert load_recipe(folder / "recipe.yaml") == recipe
    metrics = read_jsonl(folder / "metrics.jsonl")
    assert [m["step"] for m in metrics] == [1, 2, 3] and [m["samples"] for m in metrics] == [4, 8, 12]
    promised = {
        "step", "samples", "reward_mean", "reward_std", "format_error_rate", "accuracy", "kl", "kl_coef", "policy_loss",
        "value_loss", "entropy", "clip_fraction", "lr", "response_tokens", "seconds", "samples_per_s", "cpu_s",
        "predicted_shares",
    }  # fmt: skip
    assert promised <= metrics[0].keys()
    assert metrics[0]["seconds"].keys() == {"rollout", "reward", "reference", "update"}
    # The policy starts as the reference, and its first ratio is 1: known without running anything.
    assert abs(metrics[0]["kl"]) < 1e-4 and metrics[0]["sampling_mismatch"] < 1e-4
    assert metrics[0]["kl_coef"] == 0.2 and metrics[0]["grad_norm"] > 0
    rollout = read_jsonl(folder / "rollouts.jsonl")[0]
    assert {"step", "task", "prompt", "response", "answer", "gold", "reward"} <= rollout.keys()
    scores = read_json(folder / "eval.json")
    assert scores["split"] == "test"
    for moment in ("before", "after"):
        task = scores[moment]["acceptability"]
        assert {"metrics", "format_error_rate", "gold_shares", "predicted_shares"} <= task.keys()
    assert (folder / "reward_curve.png").read_bytes().startswith(b"\x89PNG")
    assert "library_name: peft" in (folder / "adapter" / "README.md").read_text()
    assert list((folder / "tensorboard").iterdir())


def test_the_adapter_reproduces_the_evaluation_with_plain_peft(finished, tiny_model):
    """Plain transformers and peft give the logprobs from which the evaluated answers were sampled."""
    import numpy as np
    from peft import PeftModel

    from extensions.evaluation.answers import uniforms_of

    folder, recipe = finished
    tokenizer = load_tokenizer(Model(path=str(tiny_model("llama"))))
    base = AutoModelForCausalLM.from_pretrained(tiny_model("llama"))
    model = PeftModel.from_pretrained(base, folder / "adapter").eval()
    from extensions.data import load_examples
    from extensions.prompts import prompt_text

    examples = load_examples(recipe.data.tasks[0], "test", None)
    for prediction in read_jsonl(folder / "predictions_after.jsonl"):
        example = examples[prediction["index"]]
        ids = tokenizer(prompt_text(example.task, example.fields))["input_ids"]
        uniforms = uniforms_of(example, recipe.seed, 6)
        written = []
        for uniform in uniforms:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids + written])).logits[0, -1]
            cumulative = np.cumsum(logits.double().softmax(-1).numpy())
            written.append(int(np.searchsorted(cumulative, uniform, side="right")))
            if written[-1] == tokenizer.eos_token_id or "</Judgement>" in tokenizer.decode(written):
                break
        assert tokenizer.decode(written, skip_special_tokens=True) == prediction["response"]


def test_training_moves_the_adapter_and_not_the_base(tiny_model, tmp_path, monkeypatch):
    kept = {}
    wrap = Strategy.wrap

    def spy(self, policy, *args):
        kept["policy"] = policy
        kept["before"] = {n: p.detach().clone() for n, p in policy.named_parameters()}
        return wrap(self, policy, *args)

    monkeypatch.setattr(Strategy, "wrap", spy)
    path = write_recipe(tmp_path, tiny_model("qwen2"), output_dir=str(tmp_path / "run"), ppo={"critic": "adapter"})
    assert main([str(path), "evaluation.before=false"]) == 0
    moved = {n for n, p in kept["policy"].named_parameters() if not torch.equal(p, kept["before"][n])}
    assert moved, "nothing was trained"
    assert all("lora_" in n or n.startswith("value_head.") for n in moved)
    for part in (".default.", ".critic.", "value_head.out"):
        assert any(part in n for n in moved), f"{part} did not move"


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ["ppo.value_target=td", "ppo.whiten=false", "ppo.value_clip=null", "ppo.entropy_coef=0.1"],
        ["ppo.kl.init=0", "ppo.mini_batch_size=2", "optimizer.name=adafactor"],
        ["model.dtype=bfloat16", "model.gradient_checkpointing=true", "schedule.name=constant"],
        ["ppo.old_logprobs=recomputed", "ppo.kl.adaptive=false", "lora.dropout=0.1", "data.balanced=true"],
    ],
    ids=["td", "no-kl", "bf16", "recomputed"],
)
def test_every_setting_runs(tiny_model, tmp_path, overrides):
    path = write_recipe(tmp_path, tiny_model("llama"), output_dir=str(tmp_path / "run"))
    assert main([str(path), "evaluation.max_samples=2", *overrides]) == 0
    for line in read_jsonl(tmp_path / "run" / "metrics.jsonl"):
        assert all(line[k] is not None for k in ("policy_loss", "value_loss", "entropy", "grad_norm"))
        assert (line["kl"] is None) == ("ppo.kl.init=0" in overrides)


@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_the_first_forward_is_reused(tiny_model, tmp_path, monkeypatch, checkpointing):
    """Recomputed old logprobs come from the first update's forward, bit-identical to those of a separate forward."""
    forward, calls, counts = Policy.forward, [], []

    def counted(*args, **kwargs):
        calls.append(args)
        return forward(*args, **kwargs)

    def apart(self, experience):
        return self._forward_all(experience, "actor")

    monkeypatch.setattr(Policy, "forward", counted)
    for name in ("shared", "own"):
        (tmp_path / name).mkdir()
        path = write_recipe(tmp_path / name, tiny_model("llama"), output_dir=str(tmp_path / name / "run"))
        if name == "own":
            monkeypatch.setattr(ppo.PpoTrainer, "_old_policy", apart)
        calls.clear()
        options = ["ppo.old_logprobs=recomputed", "ppo.micro_batch_size=4", "evaluation.before=false"]
        options += ["evaluation.probabilities=false", "evaluation.suspect_samples=0"]  # forwards of PPO alone
        options.append(f"model.gradient_checkpointing={checkpointing}")
        assert main([str(path), *options]) == 0
        counts.append(len(calls))
    own, shared = (tmp_path / name / "run" for name in ("own", "shared"))
    ours, theirs = adapter_of(shared), adapter_of(own)
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    assert timeless(shared / "metrics.jsonl") == timeless(own / "metrics.jsonl")
    proof = 2  # the comparison at load, and whether a gradient reaches the adapter
    steps = [2 * (1 + 2), 2 * (1 + 1 + 2)]  # per step: reference and two epochs; with a separate old policy one more
    assert counts == [proof + count for count in steps]


@pytest.fixture(scope="module")
def one_rank(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one-rank")
    assert main([str(write_recipe(folder, tiny_model("llama"), output_dir=str(folder / "run")))]) == 0
    return folder / "run"


def assert_same_run(found, expected):
    """Same samples, metrics and adapter, up to rounding."""
    ours, theirs = adapter_of(found), adapter_of(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, atol=2e-4, rtol=2e-3, msg=lambda m, n=name: f"{n}: {m}")
    for a, b in zip(read_jsonl(found / "metrics.jsonl"), read_jsonl(expected / "metrics.jsonl"), strict=True):
        assert a["reward_mean"] == b["reward_mean"] and a["response_tokens"] == b["response_tokens"]
        for key in ("kl", "policy_loss", "value_loss", "entropy", "clip_fraction", "grad_norm"):
            assert a[key] == pytest.approx(b[key], rel=2e-3, abs=2e-5), key
    ours, theirs = ([r["prompt"] + r["response"] for r in read_jsonl(f / "rollouts.jsonl")] for f in (found, expected))
    assert ours == theirs


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_equal_one(tiny_model, tmp_path, one_rank, stage):
    """The same global batch on two ranks, at every ZeRO stage, is the run on one."""
    run = tmp_path / "run"
    path = write_recipe(tmp_path, tiny_model("llama"), output_dir=str(run), deepspeed={"zero_stage": stage})
    port = free_port()
    done = launch(path, ranks=2, port=port)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert_same_run(run, one_rank)
    assert done.stdout.count("reward curve:") == 1, "only rank 0 prints"
    assert not list(Path("/dev/shm").glob(f"deepspeed_*_{port}_*")), "shared memory is released"


@pytest.mark.slow
def test_two_nodes_equal_one(tiny_model, tmp_path, one_rank):
    """Two nodes on one machine, with one launcher per node, as on a cluster without ssh."""
    run = tmp_path / "run"
    path = write_recipe(tmp_path, tiny_model("llama"), output_dir=str(run))
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("node0 slots=1\nnode1 slots=1\n")
    cluster = ["--hostfile", str(hostfile), "--no_ssh", "--num_nodes", "2"]
    cluster += ["--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    with ThreadPoolExecutor(2) as pool:
        nodes = [
            pool.submit(
                launch,
                path,
                launcher=[*cluster, "--node_rank", str(node)],
            )
            for node in (0, 1)
        ]
    for node in nodes:
        done = node.result()
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert_same_run(run, one_rank)


@pytest.mark.parametrize(
    ("sections", "overrides", "message"),
    [
        ({}, ["model.path=no/such/folder"], "model.path"),
        ({"data": {"tasks": ["cola"]}}, [], "data.root"),
        ({"data": {"tasks": ["cola"], "root": "no/such/root"}}, [], "no/such/root"),
        ({"reward": "no_such_reward"}, [], "no_such_reward"),
        ({"prompt": {"max_tokens": 20}}, [], "prompt.max_tokens"),
        ({}, ["ppo.batchsize=3"], "batch_size"),
        ({"output_dir": "/proc/nowhere/run"}, [], "output_dir"),
    ],
    ids=["model", "no root", "wrong root", "reward", "prompt too long", "key", "folder"],
)
def test_user_errors_end_with_one_message(tiny_model, tmp_path, capsys, monkeypatch, sections, overrides, message):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path = write_recipe(tmp_path, tiny_model("llama"), **({"output_dir": str(tmp_path / "run")} | sections))
    assert main([str(path), *overrides]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise KeyError('boom')", "boom"),
        ("return float('nan')", "nan"),
        ("return 'high'", "'high'"),
        ("return None", "None"),
    ],
)
def test_a_faulty_reward_stops_the_run_and_is_named(tiny_model, tmp_path, capsys, body, message):
    reward = tmp_path / "my_reward.py"
    reward.write_text(f"def reward(text, label):\n    {body}\n")
    path = write_recipe(tmp_path, tiny_model("llama"), output_dir=str(tmp_path / "run"), reward=str(reward))
    assert main([str(path), "evaluation.before=false"]) == 2
    error = capsys.readouterr().err
    assert "my_reward.py" in error and message in error and "label" in error


def test_a_full_disk_is_reported(tiny_model, tmp_path, capsys, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")

    monkeypatch.setattr(RunFolder, "append", full)
    path = write_recipe(tmp_path, tiny_model("llama"), output_dir=str(tmp_path / "run"))
    assert main([str(path)]) == 3
    error = capsys.readouterr().err
    assert "disk is full (metrics.jsonl)" in error and "same command again" in error and "Traceback" not in error


def test_own_task_and_own_reward(tiny_model, tmp_path):
    """A user's JSONL and reward file; the reward receives the label as it is in the file."""
    rows = [{"text": f"ticket {i} about money", "team": ("billing", "technical")[i % 2]} for i in range(12)]
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    seen = tmp_path / "seen.txt"
    reward = tmp_path / "my_reward.py"
    reward.write_text(
        f"def reward(text, label):\n    open({str(seen)!r}, 'a').write(label + '\\n')\n"
        "    return float(label in text)\n"
    )
    task = {
        "name": "tickets",
        "description": "You are an assistant to route tickets.",
        "question": 'Which team should answer "{text}"?',
        "labels": ["billing", "technical"],
        "source": {
            "files": {"train": str(tmp_path / "train.jsonl"), "validation": str(tmp_path / "validation.jsonl")},
            "label": "team",
        },
    }
    path = write_recipe(
        tmp_path, tiny_model("llama"), output_dir=str(tmp_path / "run"), reward=str(reward), data={"tasks": [task]}
    )
    assert main([str(path)]) == 0
    assert set(seen.read_text().split()) == {"billing", "technical"}
    scores = read_json(tmp_path / "run" / "eval.json")
    assert scores["split"] == "validation" and scores["after"]["tickets"]["samples"] == 4
