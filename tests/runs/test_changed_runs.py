"""Runs that go on with changes: resumed with other memory keys, extended, forked, with a repaired reward."""

import json
import shutil
from pathlib import Path

import pytest
from resumable import RESUMABLE, again, assert_ended_as, own_task, three_steps, with_reward
from support import write_recipe

from extensions.common.files import read_json, read_jsonl
from extensions.model.loading import model_identity
from extensions.runs.checkpoint import checkpoint_folders
from extensions.runs.main import main

NUMBERS = ("reward_mean", "kl", "policy_loss", "value_loss", "entropy", "grad_norm", "lr")


def numbers(run: Path) -> list[list[float]]:
    """What each iteration computed."""
    return [[record[name] for name in NUMBERS] for record in read_jsonl(run / "metrics.jsonl")]


def history(run: Path) -> list[dict]:
    return read_jsonl(run / "changes.jsonl")


@pytest.mark.slow
@pytest.mark.parametrize(
    "override",
    ["ppo.micro_batch_size=1", "model.gradient_checkpointing=true", "model.attn_implementation=eager"],
)
def test_a_run_resumes_with_other_memory_keys(unfinished, tmp_path, capsys, override):
    path = again(unfinished, tmp_path)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-3")
    (tmp_path / "run" / "changes.jsonl").write_text('{"kind": "resu')  # a kill in the middle of the line
    assert main([str(path), override]) == 0
    key, _, value = override.partition("=")
    out = capsys.readouterr().out
    assert f"{key}: was " in out and "bits may differ" in out
    (change,) = history(tmp_path / "run")
    assert change["kind"] == "resumed" and change["step"] == 2 and list(change["keys"]) == [key]
    assert str(change["keys"][key][1]).lower() == value
    ours, theirs = numbers(tmp_path / "run"), numbers(unfinished / "whole")
    assert ours[:2] == theirs[:2] and ours[2] == pytest.approx(theirs[2], rel=1e-3, abs=1e-5)


@pytest.mark.slow
def test_changed_evaluation_keys_drop_scores_of_other_rows(unfinished, tmp_path, capsys):
    path = again(unfinished, tmp_path)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-3")
    assert main([str(path), "evaluation.max_samples=3", "evaluation.decoding=greedy"]) == 0
    out = capsys.readouterr().out
    assert "the scores before training are of other rows" in out and "the best is sought among later ones" in out
    scores = read_json(tmp_path / "run" / "eval.json")
    assert "before" not in scores and scores["after"]["acceptability"]["samples"] == 3
    assert scores["yardsticks"]["majority"]["acceptability"]["samples"] == 3
    assert len(read_jsonl(tmp_path / "run" / "predictions_after.jsonl")) == 3
    assert (tmp_path / "run" / "predictions_before-other.jsonl").exists()
    assert numbers(tmp_path / "run") == numbers(unfinished / "whole"), "the training is the same"


@pytest.mark.slow
def test_what_is_learned_changes_only_in_a_fork(unfinished, tmp_path, capsys):
    path, run = again(unfinished, tmp_path), tmp_path / "run"
    assert main([str(path), "optimizer.lr=0.5"]) == 2
    error = capsys.readouterr().err
    assert "optimizer.lr: was 0.01, is 0.5" in error and f"fork={run} starts a run of its own" in error
    before = {name: (run / name).read_bytes() for name in ("recipe.yaml", "metrics.jsonl")}
    fork = [str(path), f"fork={run / 'checkpoints' / 'step-1'}", "optimizer.lr=0.5", f"output_dir={tmp_path / 'fork'}"]
    assert main(fork) == 0
    assert f"a fork of {run} after step 1" in capsys.readouterr().out
    assert {name: (run / name).read_bytes() for name in before} == before, "the source is unchanged"
    (change,) = history(tmp_path / "fork")
    assert (change["kind"], change["step"], change["source"]) == ("forked", 1, str(run))
    assert change["keys"] == {"optimizer.lr": [0.01, 0.5]}
    ours, theirs = numbers(tmp_path / "fork"), numbers(unfinished / "whole")
    assert len(ours) == len(theirs) == 3 and ours[0] == theirs[0]
    # The same place of the schedule, with another peak; the second update shows in the third iteration.
    assert [one[-1] for one in ours[1:]] == pytest.approx([50 * one[-1] for one in theirs[1:]])
    assert ours[2][:3] != theirs[2][:3]


@pytest.mark.slow
def test_a_fork_without_changes_is_the_run(unfinished, tmp_path):
    path = again(unfinished, tmp_path)
    assert main([str(path), f"fork={tmp_path / 'run'}", f"output_dir={tmp_path / 'fork'}"]) == 0
    assert_ended_as(unfinished / "whole", tmp_path / "fork")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("fork={run}", "is this run's own folder"),
        ("fork=nowhere", "is no run folder"),
        ("fork={run}/checkpoints/step-77", "has no checkpoint"),
        ("lora.rank=2", "lora.rank: was 4, is 2"),
        ("fork={run}", "none is intact"),
    ],
)
def test_what_cannot_be_forked(unfinished, tmp_path, capsys, override, message):
    path, run = again(unfinished, tmp_path), tmp_path / "run"
    words = [f"fork={run}", override.format(run=run)]
    if "own folder" not in message:
        words.append(f"output_dir={tmp_path / 'fork'}")
    if "intact" in message:
        for folder in checkpoint_folders(run):
            (folder / "run.json").write_text("{}")
    assert main([str(path), *words]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "fork" / "recipe.yaml").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schedule", "said"),
    [
        ({"name": "constant", "warmup_ratio": 0.0}, "the schedule is that of 5 iterations"),
        ({"epochs": 0.25}, "the learning rate goes on as before"),
    ],
    ids=["constant", "by epochs"],
)
def test_a_finished_run_is_extended_as_if_it_had_been_longer(tiny_model, tmp_path, capsys, schedule, said):
    path = three_steps(tmp_path, tiny_model("llama"), schedule=schedule)
    assert main([str(path), f"output_dir={tmp_path / 'whole'}", "max_steps=5"]) == 0
    assert main([str(path)]) == 0
    capsys.readouterr()
    assert main([str(path), "max_steps=5"]) == 0
    out = capsys.readouterr().out
    assert "extending the finished run" in out and said in out
    assert_ended_as(tmp_path / "whole", tmp_path / "run")
    assert "after" in read_json(tmp_path / "run" / "eval-step-3.json")
    (change,) = history(tmp_path / "run")
    assert (change["kind"], change["step"], change["keys"]) == ("extended", 3, {"max_steps": [3, 5]})


@pytest.mark.slow
def test_an_extended_cosine_is_that_of_the_longer_run_from_there_on(unfinished, tmp_path):
    path = again(unfinished, tmp_path)
    shutil.copyfile(unfinished / "whole" / "eval.json", tmp_path / "run" / "eval.json")
    assert main([str(path), "max_steps=5"]) == 0
    assert main([str(path), "max_steps=5", f"output_dir={tmp_path / 'whole'}"]) == 0
    ours, theirs = ([m["lr"] for m in read_jsonl(tmp_path / name / "metrics.jsonl")] for name in ("run", "whole"))
    assert ours[3:] == theirs[3:] and ours[:3] != theirs[:3]


def test_a_finished_run_without_a_checkpoint_cannot_be_extended(unfinished, tmp_path, capsys):
    path = again(unfinished, tmp_path)
    shutil.copyfile(unfinished / "whole" / "eval.json", tmp_path / "run" / "eval.json")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert main([str(path), "max_steps=5"]) == 2
    assert "without a checkpoint, so it cannot be extended to 5" in capsys.readouterr().err
    assert (tmp_path / "run" / "eval.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("longer", "validated"),
    [("evaluation.patience=2", [1, 2, 3]), ("max_steps=30", [1, 2, 3, 4])],  # whose warmup ends at step 3
)
def test_an_early_stop_does_not_end_an_extension(tiny_model, tmp_path, longer, validated):
    """Patience begins again, after the warmup of the longer run."""
    path = three_steps(
        tmp_path, tiny_model("llama"), evaluation={**RESUMABLE["evaluation"], "patience": 1}, optimizer={"lr": 1e-30}
    )
    assert main([str(path)]) == 0
    assert read_json(tmp_path / "run" / "eval.json")["training"]["steps"] == 2
    assert main([str(path), longer]) == 0
    assert read_json(tmp_path / "run" / "eval.json")["training"]["steps"] == validated[-1]
    assert [line["step"] for line in read_jsonl(tmp_path / "run" / "validation.jsonl")] == validated
    assert "after" in read_json(tmp_path / "run" / "eval-step-2.json")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["after its failure", "--accept-changes"])
def test_a_repaired_reward_resumes(tiny_model, tmp_path, capsys, untried, how):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"text {k}", "label": "ab"[k % 2]}) + "\n" for k in range(8)))
    fault = "raise KeyError('lexicon')" if how == "after its failure" else "raise SystemExit"
    reward = Path(with_reward(tmp_path, f"calls += 1\nif calls == 6: {fault}\nreturn 1.0"))
    path = write_recipe(
        tmp_path,
        tiny_model("llama"),
        output_dir=str(tmp_path / "run"),
        data={"tasks": [own_task(rows)]},
        reward=str(reward),
        **RESUMABLE,
    )
    if how == "after its failure":
        assert main([str(path)]) == 2
        assert f"Repair {reward} and run the same command again: it resumes after step 1" in capsys.readouterr().err
    else:
        with pytest.raises(SystemExit):
            main([str(path)])
    reward.write_text(reward.read_text().replace(fault, "pass"))
    words = [str(path)] if how == "after its failure" else [str(path), how]
    if how != "after its failure":
        assert main([str(path)]) == 2
        assert "--accept-changes after the recipe resumes it" in capsys.readouterr().err
    assert main(words) == 0
    (change,) = history(tmp_path / "run")
    was, now = change["inputs"]["reward"]
    assert was != now and change["step"] == 1 and change["keys"] == {}
    assert [m["step"] for m in read_jsonl(tmp_path / "run" / "metrics.jsonl")] == [1, 2]


def test_a_fork_needs_the_same_model(unfinished, tmp_path, capsys):
    path, run = again(unfinished, tmp_path), tmp_path / "run"
    versions = read_json(run / "versions.json")
    versions["inputs"]["model"] = "0" * 64
    (run / "versions.json").write_text(json.dumps(versions))
    assert main([str(path), f"fork={run}", f"output_dir={tmp_path / 'fork'}"]) == 2
    assert "was trained on other files (sha256): model." in capsys.readouterr().err and not (tmp_path / "fork").exists()
    assert main([str(path)]) == 2
    assert "inputs have changed since (sha256): model." in capsys.readouterr().err


def test_a_model_is_the_same_in_another_folder(tiny_model, tmp_path):
    model, copy = tiny_model("llama"), tmp_path / "moved"
    shutil.copytree(model, copy)
    assert model_identity(str(copy)) == model_identity(str(model))
    weights = next(copy.glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert model_identity(str(copy)) != model_identity(str(model))


@pytest.mark.slow
def test_a_moved_reward_is_the_same_reward(tiny_model, tmp_path, untried, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"text {k}", "label": "ab"[k % 2]}) + "\n" for k in range(8)))
    reward = Path(with_reward(tmp_path, "calls += 1\nif calls == 6: raise SystemExit\nreturn 1.0"))
    sections = {"output_dir": str(tmp_path / "run"), "data": {"tasks": [own_task(rows)]}, **RESUMABLE}
    path = write_recipe(tmp_path, tiny_model("llama"), reward=str(reward), **sections)
    with pytest.raises(SystemExit):
        main([str(path)])
    moved = tmp_path / "elsewhere" / "renamed.py"
    moved.parent.mkdir()
    reward.rename(moved)
    content = moved.read_text()
    moved.write_text(content + "# changed\n")
    assert main([str(path), f"reward={moved}"]) == 2
    error = capsys.readouterr().err
    assert f"reward: was '{reward}', is '{moved}'" in error and "inputs have changed since (sha256): reward." in error
    moved.write_text(content)
    assert main([str(path), f"reward={moved}"]) == 0
    assert not (tmp_path / "run" / "changes.jsonl").exists()
