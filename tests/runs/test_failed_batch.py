"""Non-finite values: found before the update, explained, written, and computed again by `nlu replay`."""

import json
import shutil

import pytest
import torch
from resumable import RESUMABLE, own_task, with_reward
from safetensors.torch import load_file, save_file
from support import write_recipe
from typer.testing import CliRunner

from extensions.cli.main import app
from extensions.common.files import read_json
from extensions.model.policy import Policy
from extensions.runs.checkpoint import checkpoint_folders
from extensions.runs.main import main


def poisoned(monkeypatch, where: str) -> None:
    """Samples with an odd number of tokens are not finite, where there is a gradient."""
    forward = Policy.forward

    def wrong(self, pack, *args, **kwargs):
        result = dict(forward(self, pack, *args, **kwargs))
        logprobs = result.get("logprobs")
        if logprobs is None or not logprobs.requires_grad:
            return result
        lengths = [sum(span.length for span in chain) + 1 for chain in pack.chains]  # the last token is no input
        odd = [torch.full((n,), all_of_it % 2 == 1) for all_of_it, n in zip(lengths, pack.lengths, strict=True)]
        where_odd = torch.nn.functional.pad(torch.cat(odd), (0, len(logprobs) - sum(pack.lengths)))
        if where == "gradient":
            logprobs.register_hook(lambda gradient: torch.where(where_odd, torch.nan, gradient))
        else:
            result["logprobs"] = torch.where(where_odd, torch.inf, logprobs)
        return result

    monkeypatch.setattr(Policy, "forward", wrong)


@pytest.mark.parametrize("method", ["ppo", "sft"])
@pytest.mark.parametrize("where", ["gradient", "logprobs"])
def test_non_finite_values_stop_before_the_update(tiny_model, tmp_path, capsys, monkeypatch, method, where):
    path = write_recipe(
        tmp_path,
        tiny_model("llama"),
        output_dir=str(tmp_path / "run"),
        sft={"batch_size": 4, "micro_batch_size": 4, "max_steps": 2},
        **RESUMABLE,
    )
    poisoned(monkeypatch, where)
    assert main([str(path), "ppo.micro_batch_size=4", "seed=1"], method) == 4
    error = capsys.readouterr().err
    failed = tmp_path / "run" / "failed" / "step-1"
    samples, problems = read_json(failed / "rank-0.json")["samples"], read_json(failed / "rank-0.json")["problems"]
    odd = [k for k, one in enumerate(samples) if len(one["prompt_ids"] + one["response_ids"]) % 2]
    assert 0 < len(odd) < len(samples) == 4
    kind = "gradient of" if where == "gradient" else "loss" if method == "sft" else "logprobs of the update"
    problem = next(p for p in problems if p["tensor"].startswith(kind))
    assert sorted(problem["slots"]) == odd
    first = problem["slots"][0]
    assert (
        f"{first} ({samples[first]['task']}, row {samples[first]['index']})" in error
        and f"nlu replay {failed}" in error
    )
    assert "Traceback" not in error
    weights = load_file(failed / "weights.safetensors")
    assert all((t == 0).all() for name, t in weights.items() if "lora_B" in name), "not updated"
    assert [folder.name for folder in checkpoint_folders(tmp_path / "run")] == ["step-0"]


def test_replay_names_the_sample_and_the_module(tiny_model, tmp_path, capsys):
    """A base model with a token whose embedding is NaN, and one row with it."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model("llama"), model)
    weights = load_file(model / "model.safetensors")
    from transformers import AutoTokenizer

    (token,) = AutoTokenizer.from_pretrained(model)("~", add_special_tokens=False)["input_ids"]
    weights["model.embed_tokens.weight"][token] = torch.nan
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    rows = tmp_path / "rows.jsonl"
    texts = [f"text {k}{'~' if k == 2 else ''}" for k in range(4)]
    rows.write_text("".join(json.dumps({"text": text, "label": "ab"[k % 2]}) + "\n" for k, text in enumerate(texts)))
    path = write_recipe(
        tmp_path, model, output_dir=str(tmp_path / "run"), data={"tasks": [own_task(rows)]}, **RESUMABLE
    )
    assert main([str(path), "evaluation.before=false", "evaluation.every_steps=0"]) == 4
    error = capsys.readouterr().err
    assert "own, row 2" in error and not any(f"own, row {k}" in error for k in (0, 1, 3))
    done = CliRunner().invoke(app, ["replay", str(tmp_path / "run" / "failed" / "step-1")])
    assert done.exit_code == 0, done.output
    assert "1 of 4 samples are non-finite again" in done.output and "embed_tokens" in done.output


def test_replay_of_another_folder_is_an_error(tmp_path):
    done = CliRunner().invoke(app, ["replay", str(tmp_path)])
    assert done.exit_code == 2 and "failed/step-N" in done.stderr


def test_an_invalid_reward_writes_its_batch(tiny_model, tmp_path, capsys, untried):
    reward = with_reward(tmp_path, "return float('nan')")
    path = write_recipe(tmp_path, tiny_model("llama"), output_dir=str(tmp_path / "run"), reward=reward, **RESUMABLE)
    assert main([str(path), "evaluation.before=false"]) == 2
    assert "nan" in capsys.readouterr().err
    left = read_json(tmp_path / "run" / "failed" / "step-1" / "rank-0.json")
    assert len(left["samples"]) == 4 and "nan" in left["problems"][0]["tensor"]
    done = CliRunner().invoke(app, ["replay", str(tmp_path / "run" / "failed" / "step-1")])
    assert done.exit_code == 0, done.output
    assert "before it had losses" in done.output and "my_reward.py" in done.output.replace("\n", "")
