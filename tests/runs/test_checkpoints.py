"""Checkpoints: intact or reported and skipped, without code, written whole or not at all."""

import json
import os
import random
import shutil

import numpy as np
import pytest
import torch
from resumable import RESUMABLE, again, assert_ended_as, no_space, three_steps
from safetensors.torch import load_file, save_file
from support import write_recipe

from extensions.common.files import read_json, read_jsonl, write_json
from extensions.distributed import signals
from extensions.runs import checkpoint
from extensions.runs.checkpoint import PORTABLE, checkpoint_folders, verify_checkpoint
from extensions.runs.main import main


@pytest.mark.slow
def test_checkpoints_exist_from_the_start_and_the_best_is_kept(unfinished, tiny_model, tmp_path):
    assert [path.name for path in checkpoint_folders(unfinished / "run")] == ["step-0", "step-1", "step-2", "step-3"]
    best = read_json(checkpoint_folders(unfinished / "run")[-1] / "run.json")["best"]["step"]
    path = three_steps(tmp_path, tiny_model("llama"))
    assert main([str(path), "checkpoint.keep=1"]) == 0
    assert {path.name for path in checkpoint_folders(tmp_path / "run")} == {f"step-{best}", "step-3"}


def test_an_intact_checkpoint_has_no_problems(unfinished):
    assert [verify_checkpoint(folder) for folder in checkpoint_folders(unfinished / "run")] == [[]] * 4


def test_a_checkpoint_holds_only_what_is_trained(tiny_model, tmp_path):
    """Also with a head tied to the embedding, whose weight has two names."""
    model = tmp_path / "tied"
    shutil.copytree(tiny_model("llama"), model)
    config = read_json(model / "config.json") | {"tie_word_embeddings": True}
    (model / "config.json").write_text(json.dumps(config))
    path = write_recipe(tmp_path, model, output_dir=str(tmp_path / "run"), max_steps=1, **RESUMABLE)
    assert main([str(path), "evaluation.every_steps=0"]) == 0
    content = torch.load(checkpoint_folders(tmp_path / "run")[-1] / "mp_rank_00_model_states.pt", weights_only=True)
    assert content["module"] and all("lora_" in name or "value_head" in name for name in content["module"])


@pytest.mark.parametrize("name", ["manifest.json", "run.json", "mp_rank_00_model_states.pt", "random-0.pt"])
@pytest.mark.parametrize("damage", ["cut", "bit", "empty", "gone"])
def test_damage_is_found(unfinished, tmp_path, name, damage):
    folder = tmp_path / "step-3"
    shutil.copytree(checkpoint_folders(unfinished / "run")[-1], folder)
    path = folder / name
    data = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    elif damage == "bit":
        place = data.index(b'"sha256": "') + 12 if name == "manifest.json" else len(data) // 2
        data[place] ^= 4
        path.write_bytes(data)
    else:
        path.write_bytes(data[: len(data) // 2 if damage == "cut" else 0])
    (problem,) = verify_checkpoint(folder)
    assert name in problem or damage == "bit"


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "offload"), [(2, True), (3, True), (3, False)])
def test_another_zero_stage(unfinished, tmp_path, capsys, stage, offload):
    """The steps after the checkpoint are those of the unchanged run, up to rounding."""
    path = again(unfinished, tmp_path)
    for folder in checkpoint_folders(tmp_path / "run")[2:]:
        shutil.rmtree(folder)
    own = [str(path), f"deepspeed.zero_stage={stage}", f"deepspeed.offload={str(offload).lower()}"]
    assert main(own) == 0
    out = " ".join(capsys.readouterr().out.split())
    there = f"ZeRO stage {stage}{' with offload' if offload else ''} on 1 rank"
    assert f"was written with ZeRO stage 0 on 1 rank, this run has {there}: it resumes, but not bit-for-bit" in out
    ours, theirs = (read_jsonl(run / "metrics.jsonl") for run in (tmp_path / "run", unfinished / "whole"))
    for key in ("reward_mean", "policy_loss", "value_loss", "grad_norm", "lr"):
        assert [line[key] for line in ours] == pytest.approx([line[key] for line in theirs], rel=1e-3, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("damaged", [1, 4], ids=["the newest", "all"])
def test_a_damaged_checkpoint_is_reported_and_skipped(unfinished, tmp_path, capsys, damaged):
    path = again(unfinished, tmp_path)
    for folder in checkpoint_folders(tmp_path / "run")[-damaged:]:
        with (folder / "run.json").open("a") as file:
            file.write(" ")  # by hand
    assert main([str(path), "checkpoint.keep=5"]) == 0
    output = capsys.readouterr().out
    assert output.count("is damaged and is not used") == damaged and "run.json has" in output
    assert ("resuming after step 2" in output) == (damaged == 1)
    assert_ended_as(unfinished / "whole", tmp_path / "run")
    assert len(list((tmp_path / "run" / "checkpoints").glob("damaged-step-*"))) == damaged, "kept for inspection"


def test_no_code_in_a_checkpoint_runs(unfinished, tmp_path, capsys):
    """A pickle in the place of a state, with a manifest that agrees."""
    path, mark = again(unfinished, tmp_path), tmp_path / "mark"

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(mark),)

    folder = checkpoint_folders(tmp_path / "run")[-1]
    torch.save({"torch": Evil()}, folder / "random-0.pt")
    manifest = read_json(folder / "manifest.json")
    manifest["files"]["random-0.pt"] = checkpoint.file_entry(folder / "random-0.pt")
    write_json(folder / "manifest.json", manifest)
    assert main([str(path)]) == 1
    assert "Weights only load failed" in capsys.readouterr().err and not mark.exists()


@pytest.mark.slow
def test_records_are_cut_back_to_the_checkpoint(unfinished, tmp_path, capsys):
    path = again(unfinished, tmp_path)
    shutil.rmtree(checkpoint_folders(tmp_path / "run")[-1])
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes() + b'{"step": 4, "torn')
    assert main([str(path)]) == 0
    assert_ended_as(unfinished / "whole", tmp_path / "run")
    assert "was changed" not in capsys.readouterr().out


@pytest.mark.slow
def test_missing_records_are_reported(unfinished, tmp_path, capsys):
    path = again(unfinished, tmp_path)
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_bytes(b"".join(metrics.read_bytes().splitlines(keepends=True)[1:]))
    assert main([str(path)]) == 0
    assert "metrics.jsonl was changed: it has 2 of 3 steps" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("on_error", ["warn", "stop"])
def test_a_full_disk_at_a_checkpoint(unfinished, tmp_path, capsys, monkeypatch, on_error):
    path = again(unfinished, tmp_path)
    for folder in checkpoint_folders(tmp_path / "run")[-2:]:
        shutil.rmtree(folder)
    save, calls = checkpoint._save, []

    def full(content, path):
        calls.append(path)
        no_space() if path.parent.name == "writing-2" else save(content, path)

    monkeypatch.setattr(checkpoint, "_save", full)
    status = main([str(path), f"checkpoint.on_error={on_error}", "checkpoint.keep=5"])
    captured = capsys.readouterr()
    output = " ".join((captured.out + captured.err).split())
    assert "the checkpoint of step 2 could not be written" in output and "that of step 1 is unchanged" in output
    names = [folder.name for folder in checkpoint_folders(tmp_path / "run")]
    assert all(verify_checkpoint(folder) == [] for folder in checkpoint_folders(tmp_path / "run"))
    if on_error == "warn":
        assert status == 0 and names == ["step-0", "step-1", "step-3"]
        assert_ended_as(unfinished / "whole", tmp_path / "run")
    else:
        assert status == 3 and names == ["step-0", "step-1"] and calls


def test_random_generators_are_restored():
    state = checkpoint.random_state()
    drawn = [random.random(), np.random.rand(), float(torch.rand(()))]
    checkpoint.restore_random_state(state)
    assert [random.random(), np.random.rand(), float(torch.rand(()))] == drawn


def test_a_kill_between_the_two_renames_of_a_replacement(tmp_path):
    root = tmp_path / "checkpoints"
    for name in ("replaced-4", "replaced-2", "step-2"):
        (root / name).mkdir(parents=True)
    (root / "replaced-4" / "old").touch()
    checkpoint.recover_replaced(tmp_path)
    assert sorted(path.name for path in root.iterdir()) == ["step-2", "step-4"] and (root / "step-4" / "old").exists()


@pytest.mark.slow
def test_a_run_starts_from_the_critic_of_another(unfinished, tiny_model, tmp_path, capsys):
    path, first = three_steps(tmp_path, tiny_model("llama")), tmp_path / "first"
    shutil.copytree(unfinished / "whole", first)
    words = [str(path), f"model.adapter={first / 'adapter'}", "max_steps=1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(signals, "requested", lambda: "SIGTERM")
        assert main(words) == 0
    assert f"value head: {first / 'critic'}" in " ".join(capsys.readouterr().out.split())
    saved = load_file(tmp_path / "run" / "checkpoints" / "step-0" / PORTABLE)
    head = load_file(first / "critic" / "value_head.safetensors")
    assert head and all(torch.equal(saved[f"value_head.{name}"], tensor) for name, tensor in head.items())
    head["out.bias"] += 1
    save_file(head, first / "critic" / "value_head.safetensors")
    assert main(words) == 2
    assert "its inputs have changed since (sha256): ppo.critic_from" in " ".join(capsys.readouterr().err.split())
