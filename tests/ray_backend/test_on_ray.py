"""The Ray backend on CPUs, with real Ray and vLLM processes. `bash launch/test_ray.sh` runs it.

Most tests start the command as a user does (about 45 seconds each, of which Ray and vLLM take 40 to start).
"""

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from support import ROOT, adapter_of, environment, free_port, merged, timeless, write_recipe
from transformers import LlamaConfig

sys.path.insert(0, str(Path(__file__).parent.parent))
from conftest import save_tiny_model

from extensions.common.files import read_json, read_jsonl

missing = [name for name in ("ray", "vllm") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing), reason=f"{' and '.join(missing)} not installed; run bash launch/test_ray.sh"),
]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A random Llama with heads as wide as vLLM's attention on CPUs requires."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 512}
    ids = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": None, "tie_word_embeddings": False}
    folder = tmp_path_factory.mktemp("llama")
    save_tiny_model(folder, lambda vocabulary: LlamaConfig(**sizes, **heads, **ids, vocab_size=vocabulary))
    return folder


# max_grad_norm 0: joint clipping of actor and critic is the one part of the update that OpenRLHF's groups cannot do.
OWN = {
    "max_steps": 4,
    "ppo": {"batch_size": 4, "micro_batch_size": 2, "epochs": 2, "critic": "adapter", "max_grad_norm": 0},
    "evaluation": {"max_samples": 6, "decoding": "greedy"},
    "logging": {"tensorboard": False},
}


def write(folder: Path, model: Path | str, **changes) -> Path:
    return write_recipe(folder, model, **merged(OWN | {"output_dir": str(folder / "run")}, changes))


def start(recipe: Path, *overrides: str, script: str = "ppo_ray", **variables: str) -> subprocess.Popen:
    command = ["bash", f"launch/{script}.sh", str(recipe), *overrides]
    env = environment() | {"MASTER_PORT": str(free_port())} | variables
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=pipe, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen, status: int = 0, seconds: float = 400) -> str:
    output = process.communicate(timeout=seconds)[0]
    assert process.returncode == status, output[-4000:]
    return output


def wait_for(condition, process: subprocess.Popen, seconds: float = 200) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end, process.communicate()[0][-3000:]
        time.sleep(0.05)


def steps_of(run: Path) -> int:
    return len(read_jsonl(run / "metrics.jsonl", skip_damaged=True)) if (run / "metrics.jsonl").exists() else 0


@pytest.fixture(scope="session")
def ray_run(tiny, tmp_path_factory) -> tuple[Path, str]:
    """A run of four steps, and what it printed."""
    folder = tmp_path_factory.mktemp("ray")
    return folder / "run", finish(start(write(folder, tiny)))


# ----------------------------------------------------------------------------------------------------- the whole run


def test_a_run_writes_the_files_of_every_run(ray_run):
    run, output = ray_run
    for name in ("eval.json", "predictions_after.jsonl", "reward_curve.png", "recipe.yaml", "adapter/README.md"):
        assert (run / name).exists(), name
    assert read_json(run / "eval.json")["training"]["steps"] == 4
    assert "sampling draws other random numbers" in output
    assert not list(run.glob("*.part-*")) and not (run / "run.lock").exists()


def test_vllm_and_trainer_agree_after_every_sync_and_no_sample_is_stale(ray_run):
    metrics = read_jsonl(ray_run[0] / "metrics.jsonl")
    assert [m["step"] for m in metrics] == [1, 2, 3, 4]
    for m in metrics:
        assert 0 < m["probe_max"] < 1e-4 and m["probe_tokens"] > 200
        assert 0 < m["sampling_mismatch"] < 1e-5
        assert m["stale_samples"] == 0


def test_the_critics_head_is_trained(ray_run):
    """It starts at zero; OpenRLHF's own is frozen under LoRA (0.11.2)."""
    head = {name: t for name, t in adapter_of(ray_run[0]).items() if name.startswith("out.")}
    assert head and all(t.abs().sum() > 0 for t in head.values())
    critic = ray_run[0] / "critic" / "critic" / "adapter_model.safetensors"
    from safetensors.torch import load_file

    assert any(t.abs().sum() > 0 for name, t in load_file(critic).items() if "lora_B" in name)


def assert_same_numbers(run: Path, other: Path) -> None:
    """Same samples, so the same rewards, losses and adapter, up to rounding."""
    rollouts = [read_jsonl(folder / "rollouts.jsonl") for folder in (run, other)]
    assert [r["response"] for r in rollouts[0]] == [r["response"] for r in rollouts[1]]
    for a, b in zip(timeless(run / "metrics.jsonl"), timeless(other / "metrics.jsonl"), strict=True):
        for name in ("reward_mean", "clip_fraction", "response_tokens", "lr", "kl_coef", "equal_groups"):
            assert a[name] == pytest.approx(b[name], abs=1e-6), (a["step"], name)
        for name in ("kl", "policy_loss", "value_loss", "entropy"):
            assert a.get(name) == pytest.approx(b.get(name), abs=2e-5), (a["step"], name)
    for (name, a), b in zip(adapter_of(run).items(), adapter_of(other).values(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("kl", [{}, {"use_loss": True, "estimator": "k2"}], ids=["penalty", "loss"])
def test_groups_without_a_critic_are_those_of_the_deepspeed_backend(tiny, tmp_path, kl):
    groups = {"samples_per_prompt": 3, "advantage_estimator": "group_norm", "clip": [0.2, 0.28], "kl": kl}
    ppo = {key: value for key, value in OWN["ppo"].items() if key != "critic"} | groups
    reward = tmp_path / "by_length.py"  # rewards of a group differ, so that each step has a gradient above rounding
    reward.write_text("def reward(text, label):\n    return float(len(text) % 3)\n")
    for name, script, changes in (("ray", "ppo_ray", {}), ("vllm", "ppo", {"rollout": {"backend": "vllm"}})):
        (tmp_path / name).mkdir()
        sections = OWN | {"output_dir": str(tmp_path / name / "run"), "ppo": ppo, "max_steps": 2, "reward": str(reward)}
        finish(start(write_recipe(tmp_path / name, tiny, **merged(sections, changes)), script=script))
    assert_same_numbers(tmp_path / "vllm" / "run", tmp_path / "ray" / "run")
    assert not (tmp_path / "ray" / "run" / "critic").exists()


def test_numbers_are_those_of_the_deepspeed_backend(ray_run, tiny, tmp_path):
    """With rollout.backend: vllm: the same samples, so the same rewards, losses and adapter, up to rounding."""
    run = tmp_path / "run"
    finish(start(write(tmp_path, tiny, rollout={"backend": "vllm"}), script="ppo"))
    assert_same_numbers(run, ray_run[0])
    # Greedy answers before training, by vLLM in both; and by the policy itself.
    plain = tmp_path / "plain"
    finish(start(tmp_path / "recipe.yaml", "rollout.backend=hf", "max_steps=1", f"output_dir={plain}", script="ppo"))
    answers = [
        [record["response"] for record in read_jsonl(folder / "predictions_before.jsonl")]
        for folder in (run, ray_run[0], plain)
    ]
    assert answers[0] == answers[1] == answers[2]


# ----------------------------------------------------------------------------------------------------------- faults


def killed(tiny: Path, folder: Path, find) -> tuple[Path, str]:
    """A long run, one process of which was killed after some steps: its folder and its output."""
    recipe = write(folder, tiny, max_steps=2000, checkpoint={"every_steps": 2})
    process = start(recipe)
    wait_for(lambda: steps_of(folder / "run") >= 5, process)
    victim = find(psutil.Process(process.pid))
    victim.send_signal(signal.SIGKILL)
    return folder / "run", finish(process, 1)


def below(driver: psutil.Process, *words: str) -> psutil.Process:
    """A process of the run by words of its title."""
    for process in driver.children(recursive=True):
        try:
            title = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if any(word in title for word in words):
            return process
    raise AssertionError(f"no process {words} below {driver.pid}")


@pytest.mark.parametrize(
    "words", [("VLLM::EngineCore",), ("ray::PolicyActor", "ray::Policy")], ids=["engine", "worker"]
)
def test_a_killed_process_ends_the_run_with_one_message_and_it_resumes(tiny, tmp_path, words):
    run, output = killed(tiny, tmp_path, lambda driver: below(driver, *words))
    assert "error: " in output and "is gone" in output and "run the same command again" in output.lower(), output[
        -3000:
    ]
    assert "Traceback" not in output
    last = max(int(path.name.rpartition("-")[2]) for path in (run / "checkpoints").glob("step-*"))
    assert last >= 4
    # max_steps must not change on resume and is far off, so the run is stopped by a signal.
    process = start(tmp_path / "recipe.yaml")
    wait_for(lambda: steps_of(run) >= last + 4, process)
    psutil.Process(process.pid).send_signal(signal.SIGTERM)
    output = finish(process)
    assert f"resuming after step {last}" in output and "resume with: bash launch/ppo_ray.sh" in output
    assert [m["step"] for m in read_jsonl(run / "metrics.jsonl")] == list(range(1, steps_of(run) + 1))


def test_a_resumed_run_equals_an_uninterrupted_one(ray_run, tiny, tmp_path):
    recipe = write(tmp_path, tiny, checkpoint={"every_steps": 1})
    process = start(recipe)
    wait_for(lambda: steps_of(tmp_path / "run") >= 2, process)
    psutil.Process(process.pid).send_signal(signal.SIGTERM)
    finish(process)
    finish(start(recipe, "backend=ray", script="ppo"))  # resumed by the other script
    assert timeless(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == 4
    for (name, a), b in zip(adapter_of(tmp_path / "run").items(), adapter_of(ray_run[0]).values(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4, msg=name)


def test_a_reward_that_raises_stops_the_run_and_is_named(tiny, tmp_path):
    reward = tmp_path / "broken.py"
    reward.write_text("def reward(text, label):\n    raise ValueError('no such thing')\n")
    output = finish(start(write(tmp_path, tiny, reward=str(reward), evaluation={"before": False})), 2)
    assert "broken.py raised ValueError: no such thing" in output


def test_a_family_that_vllm_does_not_support_is_refused_before_anything_starts(tiny, tmp_path):
    from transformers import MptConfig

    model = tmp_path / "mpt"
    shutil.copytree(tiny, model)
    MptConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=400, architectures=["MptForCausalLM"]).save_pretrained(
        model
    )
    output = finish(start(write(tmp_path, model)), 2)
    assert "has no MptForCausalLM" in output or "has no LoRA for" in output
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------------- two nodes


@pytest.fixture
def two_nodes():
    """Address of a Ray cluster of two nodes on this machine, with one slot for a rank each."""
    ray, port = Path(sys.executable).with_name("ray"), free_port()
    env = environment() | {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT)}
    common = [str(ray), "start", "--num-gpus=1", "--num-cpus=2", "--disable-usage-stats"]

    def node(*options: str) -> None:
        subprocess.run([*common, *options], env=env, check=True, capture_output=True, timeout=120)

    node("--head", f"--port={port}", "--include-dashboard=false")
    node(f"--address=127.0.0.1:{port}")
    yield f"127.0.0.1:{port}"
    subprocess.run([str(ray), "stop", "--force"], env=env, capture_output=True, timeout=120)


@pytest.mark.parametrize("stage", [0, 3])
def test_two_nodes_give_the_numbers_of_one(ray_run, tiny, tmp_path, two_nodes, stage):
    recipe = write(tmp_path, tiny, ray={"num_nodes": 2, "gpus_per_node": 1}, deepspeed={"zero_stage": stage})
    output = finish(start(recipe, RAY_ADDRESS=two_nodes))
    metrics = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert all(m["probe_max"] < 1e-4 and m["stale_samples"] == 0 for m in metrics), output[-2000:]
    one, two = timeless(ray_run[0] / "metrics.jsonl")[0], metrics[0]
    for name in ("reward_mean", "policy_loss", "value_loss", "entropy", "kl"):
        assert one[name] == pytest.approx(two[name], abs=2e-5), name
    for (name, a), b in zip(adapter_of(ray_run[0]).items(), adapter_of(tmp_path / "run").values(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3, msg=name)
    shares = [read_jsonl(folder / "predictions_before.jsonl") for folder in (ray_run[0], tmp_path / "run")]
    for one, two in zip(*shares, strict=True):
        assert one["index"] == two["index"] and one["probabilities"] == pytest.approx(two["probabilities"], abs=1e-5)
    ranks = read_json(next((tmp_path / "run" / "checkpoints").glob("step-4")) / "manifest.json")["ranks"]
    assert ranks == 2


# ----------------------------------------------------------------------------------------------------- vLLM engines


def test_engines_that_share_a_gpu_are_awake_only_during_rollouts():
    from types import SimpleNamespace

    from extensions.ray_backend.groups import Groups

    strategy = SimpleNamespace(args=SimpleNamespace(vllm=SimpleNamespace(enable_sleep=True)))
    groups, calls = Groups(strategy, None, None, None, []), []
    groups.call_engines = calls.append
    with groups.awake():
        with groups.awake():  # a sync inside
            calls.append("inside")
        calls.append("rollout")
    assert calls == ["wake_up", "inside", "rollout", "sleep"]
    groups.sleeps = False
    with groups.awake():
        assert len(calls) == 4


def test_the_probe_finds_a_wrong_adapter(tiny):
    """The probe fails if the adapters of vLLM engine and trainer differ."""
    from extensions.data import load_examples
    from extensions.distributed.strategy import load_trainable_state, trainable_state
    from extensions.model.loading import load_config, load_policy, load_tokenizer, prompt_limit
    from extensions.prompts import CLOSE, PromptEncoder
    from extensions.recipe import Recipe
    from extensions.rollout.lora_sync import (
        LoraPayload,
        SyncError,
        SyncProbe,
        probe_samples,
        random_lora_state,
        response_logprobs,
    )
    from extensions.rollout.vllm_engine import VllmEngine, sampled_tokens, sampling_params, vllm_arguments

    recipe = Recipe.model_validate(
        {"name": "x", "model": {"path": str(tiny)}, "lora": {"rank": 4}, "data": {"tasks": ["acceptability"]}}
    )
    cpu = torch.device("cpu")
    policy = load_policy(recipe.model, recipe.lora, "none", 1.0, cpu, 0, "base")
    limit = prompt_limit(recipe, load_config(recipe.model))
    encoder = PromptEncoder(load_tokenizer(recipe.model), limit, False, 0, {})
    samples = probe_samples(load_examples(recipe.data.tasks[0], "train", None, 0)[:4], encoder, 2)
    engine, probe = (
        VllmEngine(vllm_arguments(recipe, True, 4), True, torch.device("cpu")),
        SyncProbe(torch.float32, None),
    )
    state = trainable_state(policy)

    def logprobs():
        with policy.role("actor"):
            return response_logprobs(policy.eval(), samples, 8)

    load_trainable_state(policy, random_lora_state(state, 1))
    engine.load(right := LoraPayload.of(policy, trainable_state(policy), 1))
    assert probe.check(right.digest, logprobs(), [engine.probe(samples)], "it")["probe_mean"] < 1e-4
    load_trainable_state(policy, random_lora_state(state, 2))
    with pytest.raises(SyncError, match="does not sample from the policy in training"):
        probe.check("other", logprobs(), [engine.probe(samples)], "another one")
    # More prompt tokens than one step takes: no prompt is chunked, and each request samples by its own seed.
    prompts = [[7 + row % 300] * 100 + [5, 6] for row in range(60)]
    params = [sampling_params(4, row, 1.0, False, CLOSE, [0]) for row in range(60)]
    together = [sampled_tokens(output)[0] for output in engine.generate(prompts, params)]
    assert together[50:] == [sampled_tokens(output)[0] for output in engine.generate(prompts[50:], params[50:])]
    engine.load(LoraPayload.of(policy, trainable_state(policy), 2))
    probe.check("other", logprobs(), [engine.probe(samples)], "another one")


@pytest.mark.timeout(3600)
@pytest.mark.skipif(os.environ.get("NLU_TEST_LONG") != "1", reason="20 minutes long; set NLU_TEST_LONG=1")
def test_smollm2_learns(tmp_path):
    """Reward rises on a real model."""
    recipe = ROOT / "recipes" / "quickstart.yaml"
    run = tmp_path / "run"
    finish(start(recipe, "max_steps=30", "evaluation.max_samples=40", f"output_dir={run}"), seconds=3500)
    rewards = [m["reward_mean"] for m in read_jsonl(run / "metrics.jsonl")]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.3
