"""A run survives: whole checkpoints, exact resume, clean stops, numbers that are none. `tests/faults` has the rest."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from support import ROOT, adapter_of, environment, free_port, launch, timeless, write_recipe
from typer.testing import CliRunner

from extensions.cli.main import app
from extensions.common import files
from extensions.common.errors import UserError
from extensions.common.files import JsonlAppender, filter_jsonl, read_json, read_jsonl, write_json, write_text
from extensions.distributed import signals, watchdog
from extensions.model.policy import Policy
from extensions.recipe import load_recipe
from extensions.runs import build, checkpoint
from extensions.runs.checkpoint import checkpoint_folders, verify_checkpoint
from extensions.runs.folder import RunFolder
from extensions.runs.main import main
from extensions.runs.resume import is_finished
from extensions.runs.training_run import TrainingRun

RESUMABLE = {
    "checkpoint": {"every_steps": 1},
    "evaluation": {"max_samples": 2, "every_steps": 1, "validation_samples": 2},
    "logging": {"tensorboard": False},
}


@pytest.fixture(autouse=True)
def interruptible():
    """A shell that starts a job in the background hands down SIGINT ignored, and what is ignored stays so."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def with_reward(folder: Path, body: str) -> str:
    """A recipe's `reward`: a file whose function has this body."""
    path = folder / "my_reward.py"
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    path.write_text(
        f"import os, random, signal, time\ncalls = 0\n\n\ndef reward(text, label):\n    global calls\n{lines}\n"
    )
    return str(path)


def own_task(rows: Path) -> dict:
    """A task of two labels, with the same rows in training and validation."""
    return {
        "name": "own",
        "description": "Say a or b.",
        "question": "{text}",
        "labels": ["a", "b"],
        "source": {"files": {"train": str(rows), "validation": str(rows)}},
    }


def three_steps(folder: Path, model: Path, **more) -> Path:
    """The recipe of the fixture `unfinished`, for a run of its own."""
    return write_recipe(folder, model, output_dir=str(folder / "run"), max_steps=3, seed=3, **RESUMABLE | more)


# ---------------------------------------------------------------------------------------------------------- files


def test_lines_survive_a_full_disk(tmp_path, monkeypatch):
    path = tmp_path / "x.jsonl"
    lines, write = JsonlAppender(path), os.write
    lines.append([{"a": 1}])

    def half(handle, data):
        if len(data) < 4:
            no_space()
        return write(handle, data[: len(data) // 2])

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "write", half)
        with pytest.raises(OSError, match="No space"):
            lines.append([{"b": 2}])
        assert path.read_text() == '{"a": 1}\n', "no half of a line stays"
    lines.append([{"c": "ü"}])
    lines.close()
    assert read_jsonl(path) == [{"a": 1}, {"b": 2}, {"c": "ü"}], "nothing is lost"


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_json(path, {"old": 1})
    monkeypatch.setattr(files.os, "fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        write_json(path, {"new": 2})
    assert read_json(path) == {"old": 1} and list(tmp_path.iterdir()) == [path]


def test_damaged_lines_are_named_or_dropped(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"step": 1}\n\0\0\0\n{"step": 2}\n[3]\n{"step": 4}\n{"step": 5')
    with pytest.raises(UserError, match="line 2: damaged"):
        read_jsonl(path)
    assert [r["step"] for r in read_jsonl(path, skip_damaged=True)] == [1, 2, 4]
    filter_jsonl(path, lambda record: record["step"] < 4)
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'
    (tmp_path / "y.json").write_text('{"a": ')
    with pytest.raises(UserError, match=r"y\.json: damaged"):
        read_json(tmp_path / "y.json")


# ----------------------------------------------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def unfinished(tiny_model, tmp_path_factory):
    """A PPO run with three checkpoints that was killed before its last evaluation; and what it is when it ends."""
    folder = tmp_path_factory.mktemp("unfinished")
    path = three_steps(folder, tiny_model("llama"))
    assert main([str(path), "checkpoint.keep=5"]) == 0
    shutil.copytree(folder / "run", folder / "whole")
    (folder / "run" / "eval.json").unlink()
    return folder


def again(unfinished, folder) -> Path:
    """A copy of the unfinished run, and its recipe."""
    shutil.copytree(unfinished / "run", folder / "run")
    recipe = yaml.safe_load((unfinished / "recipe.yaml").read_text()) | {"output_dir": str(folder / "run")}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


def assert_ended_as(whole: Path, run: Path) -> None:
    ours, theirs = adapter_of(run), adapter_of(whole)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in theirs)
    for name in ("metrics.jsonl", "validation.jsonl"):
        assert timeless(run / name) == timeless(whole / name)
    for name in ("rollouts.jsonl", "predictions_before.jsonl", "predictions_after.jsonl"):
        assert read_jsonl(run / name) == read_jsonl(whole / name)
    found, expected = read_json(run / "eval.json"), read_json(whole / "eval.json")
    assert found["after"] == expected["after"] and found["before"] == expected["before"]


def test_checkpoints_are_there_from_the_start_and_the_best_stays(unfinished, tiny_model, tmp_path):
    assert [path.name for path in checkpoint_folders(unfinished / "run")] == ["step-0", "step-1", "step-2", "step-3"]
    best = read_json(checkpoint_folders(unfinished / "run")[-1] / "run.json")["best"]["step"]
    path = three_steps(tmp_path, tiny_model("llama"))
    assert main([str(path), "checkpoint.keep=1"]) == 0
    assert {path.name for path in checkpoint_folders(tmp_path / "run")} == {f"step-{best}", "step-3"}


def test_a_whole_checkpoint_is_found_whole(unfinished):
    assert [verify_checkpoint(folder) for folder in checkpoint_folders(unfinished / "run")] == [[]] * 4


def test_a_checkpoint_holds_what_is_trained_and_no_more(tiny_model, tmp_path):
    """Also where the head is the embedding, which has two names then."""
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


@pytest.mark.parametrize("damaged", [1, 4], ids=["the newest", "all"])
def test_a_damaged_checkpoint_is_told_and_the_one_before_is_used(unfinished, tmp_path, capsys, damaged):
    path = again(unfinished, tmp_path)
    for folder in checkpoint_folders(tmp_path / "run")[-damaged:]:
        with (folder / "run.json").open("a") as file:
            file.write(" ")  # by hand
    assert main([str(path), "checkpoint.keep=5"]) == 0
    said = capsys.readouterr().out
    assert said.count("is damaged and is not used") == damaged and "run.json has" in said
    assert ("resuming after step 2" in said) == (damaged == 1)
    assert_ended_as(unfinished / "whole", tmp_path / "run")
    assert len(list((tmp_path / "run" / "checkpoints").glob("damaged-step-*"))) == damaged, "kept, to be looked at"


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


def test_records_are_cut_back_to_the_checkpoint(unfinished, tmp_path, capsys):
    path = again(unfinished, tmp_path)
    shutil.rmtree(checkpoint_folders(tmp_path / "run")[-1])
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes() + b'{"step": 4, "torn')
    assert main([str(path)]) == 0
    assert_ended_as(unfinished / "whole", tmp_path / "run")
    assert "was changed" not in capsys.readouterr().out


def test_records_that_are_missing_are_told(unfinished, tmp_path, capsys):
    path = again(unfinished, tmp_path)
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_bytes(b"".join(metrics.read_bytes().splitlines(keepends=True)[1:]))
    assert main([str(path)]) == 0
    assert "metrics.jsonl was changed: it has 2 of 3 steps" in capsys.readouterr().out


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
    told = capsys.readouterr()
    said = " ".join((told.out + told.err).split())
    assert "the checkpoint of step 2 could not be written" in said and "that of step 1 is unchanged" in said
    names = [folder.name for folder in checkpoint_folders(tmp_path / "run")]
    assert all(verify_checkpoint(folder) == [] for folder in checkpoint_folders(tmp_path / "run"))
    if on_error == "warn":
        assert status == 0 and names == ["step-0", "step-1", "step-3"]
        assert_ended_as(unfinished / "whole", tmp_path / "run")
    else:
        assert status == 3 and names == ["step-0", "step-1"] and calls


def test_random_generators_come_back():
    state = checkpoint.random_state()
    drawn = [random.random(), np.random.rand(), float(torch.rand(()))]
    checkpoint.restore_random_state(state)
    assert [random.random(), np.random.rand(), float(torch.rand(()))] == drawn


# ------------------------------------------------------------------------------------------------------ the recipe


def test_what_may_change_and_what_may_not(unfinished, tmp_path, capsys):
    path = again(unfinished, tmp_path)
    assert main([str(path), "optimizer.lr=0.5", "deepspeed.timeout=60"]) == 2
    error = capsys.readouterr().err
    assert "optimizer.lr: was 0.01, is 0.5" in error and "timeout" not in error.partition("These may change")[0]
    assert "checkpoint" in error.partition("These may change: ")[2]
    assert main([str(path), "deepspeed.timeout=60", "checkpoint.keep=7"]) == 0
    assert_ended_as(unfinished / "whole", tmp_path / "run")


@pytest.fixture
def untried(monkeypatch):
    """A reward that the trial before a run would refuse."""
    monkeypatch.setattr(build, "check_reward", lambda reward, examples, warn: None)


@pytest.mark.parametrize("changed", ["data", "reward"])
def test_what_a_run_reads_must_be_the_same(tiny_model, tmp_path, capsys, untried, changed):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": f"text {k}", "label": "ab"[k % 2]}) + "\n" for k in range(8)))
    reward = with_reward(tmp_path, "calls += 1\nif calls == 6: raise SystemExit\nreturn 1.0")
    path = write_recipe(
        tmp_path,
        tiny_model("llama"),
        output_dir=str(tmp_path / "run"),
        data={"tasks": [own_task(rows)]},
        reward=reward,
        **RESUMABLE,
    )
    with pytest.raises(SystemExit):
        main([str(path)])
    if changed == "data":
        rows.write_text(rows.read_text().replace("text 3", "text 33"))
    else:
        Path(reward).write_text(Path(reward).read_text() + "# changed\n")
    assert main([str(path)]) == 2
    assert f"have changed since (sha256): {changed}." in capsys.readouterr().err


def test_two_runs_do_not_write_into_one_folder(unfinished, tmp_path, capsys):
    path = again(unfinished, tmp_path)
    code = "import fcntl, sys, time; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print(1, flush=True); "
    holder = subprocess.Popen(
        [sys.executable, "-c", code + "time.sleep(60)", str(tmp_path / "run" / "run.lock")], stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout.readline() == b"1\n"
        assert main([str(path)]) == 2
        assert "another run is writing there" in capsys.readouterr().err
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    assert main([str(path)]) == 0


def test_other_versions_are_told(unfinished, tmp_path, capsys):
    path = again(unfinished, tmp_path)
    versions = read_json(tmp_path / "run" / "versions.json")
    versions["packages"]["torch"] = "1.0"
    write_json(tmp_path / "run" / "versions.json", versions)
    assert main([str(path)]) == 0
    assert "torch was 1.0, is" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["recipe.yaml", "versions.json"])
def test_a_damaged_run_folder_is_told(unfinished, tmp_path, capsys, name):
    path = again(unfinished, tmp_path)
    (tmp_path / "run" / name).write_text("{{{")
    assert main([str(path)]) == 2
    error = capsys.readouterr().err
    assert name in error and "damaged" in error and "Traceback" not in error


def test_a_tracker_that_fails_does_not_stop_the_run(tmp_path, tiny_model):
    told = []
    recipe = load_recipe(write_recipe(tmp_path, tiny_model("llama"), output_dir=str(tmp_path / "run")))
    folder = RunFolder(tmp_path / "run", recipe, {}, told.append)

    class Broken:
        def log(self, *args, **kwargs):
            raise ConnectionError("no network")

    folder.trackers.active["broken"] = Broken()
    for step in (1, 2):
        folder.metrics({"step": step, "loss": 0.5})
    folder.close()
    assert [r["step"] for r in read_jsonl(tmp_path / "run" / "metrics.jsonl")] == [1, 2]
    assert len(told) == 1 and "broken failed" in told[0] and "no network" in told[0]


def test_is_finished(tmp_path):
    assert not is_finished(tmp_path)
    for text, expected in (("{", False), ("[]", False), ('{"before": {}}', False), ('{"after": {}}', True)):
        write_text(tmp_path / "eval.json", text)
        assert is_finished(tmp_path) == expected


# ---------------------------------------------------------------------------------------------------------- stops


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_told_to_stop_saves_and_goes_on_to_the_same_bits(
    unfinished, tmp_path, capsys, number, tiny_model
):
    """Checkpoints are off, so the one that is written is for the stop."""
    path = three_steps(tmp_path, tiny_model("llama"), checkpoint={"every_steps": 0})
    iterate = TrainingRun._iterate

    def stopping(self):
        iterate(self)
        if self.step == 2:
            os.kill(os.getpid(), number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingRun, "_iterate", stopping)
        assert main([str(path)]) == 0
    said = capsys.readouterr().out
    assert f"stopped ({number.name}); resume with: bash launch/ppo.sh {path}" in said
    (folder,) = checkpoint_folders(tmp_path / "run")
    assert folder.name == "step-2" and read_json(folder / "run.json")["validated"] == 1, "the validation is cut off too"
    assert not is_finished(tmp_path / "run")
    assert main([str(path)]) == 0
    assert "resuming after step 2" in capsys.readouterr().out
    assert_ended_as(unfinished / "whole", tmp_path / "run")


def test_a_stop_in_a_validation_and_then_another_checkpoint_of_its_step(unfinished, tmp_path, tiny_model):
    """The checkpoint of step 2 is written twice: before its validation, cut off, and after it."""
    path = three_steps(tmp_path, tiny_model("llama"), checkpoint={"every_steps": 1, "on_error": "stop"})
    validate = TrainingRun._validate

    def stopping(self):
        if self.step == 2:
            raise signals.Stopped
        validate(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingRun, "_validate", stopping)
        assert main([str(path)]) == 0
    last = checkpoint_folders(tmp_path / "run")[-1]
    assert last.name == "step-2" and read_json(last / "run.json")["validated"] == 1
    with (tmp_path / "run" / "validation.jsonl").open("a") as file:
        file.write('{"step": 2}\n')  # as if it had come to its record
    assert main([str(path), "checkpoint.keep=9"]) == 0
    assert read_json(last / "run.json")["validated"] == 2 and verify_checkpoint(last) == []
    assert_ended_as(unfinished / "whole", tmp_path / "run")
    assert not list((tmp_path / "run" / "checkpoints").glob("replaced-*"))


def test_a_kill_between_two_renames_of_a_checkpoint(tmp_path):
    root = tmp_path / "checkpoints"
    for name in ("replaced-4", "replaced-2", "step-2"):
        (root / name).mkdir(parents=True)
    (root / "replaced-4" / "old").touch()
    checkpoint.recover_replaced(tmp_path)
    assert sorted(path.name for path in root.iterdir()) == ["step-2", "step-4"] and (root / "step-4" / "old").exists()


@pytest.mark.parametrize("moment", ["before", "after"])
def test_an_evaluation_of_a_training_is_cut_off_and_goes_on(
    unfinished, tmp_path, monkeypatch, capsys, tiny_model, moment
):
    path = three_steps(tmp_path, tiny_model("llama"))
    from extensions.evaluation import evaluator

    answer_batch, stem = evaluator.answer_batch, f"predictions_{moment}"

    def stopping(*args):
        found = answer_batch(*args)
        if list((tmp_path / "run").glob(f"{stem}.part-*")):
            os.kill(os.getpid(), signal.SIGTERM)
        return found

    monkeypatch.setattr(evaluator, "answer_batch", stopping)
    options = ["evaluation.batch_size=1"]
    assert main([str(path), *options]) == 0
    assert len(read_jsonl(tmp_path / "run" / f"{stem}.part-0.jsonl")) == 1
    monkeypatch.setattr(evaluator, "answer_batch", answer_batch)
    capsys.readouterr()
    assert main([str(path), *options]) == 0
    assert "2 rows" in (said := capsys.readouterr().out) and "1 are done already" in said
    assert_ended_as(unfinished / "whole", tmp_path / "run")
    assert not list((tmp_path / "run").glob("*.part-*"))


def test_a_second_ctrl_c_ends_it_and_ignored_signals_stay_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.caught():
            assert signals.requested() is None
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.requested() is None
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            assert signals.requested() == "SIGTERM"
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(1)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGHUP, before)


# ------------------------------------------------------------------------------------------ numbers that are none


def poisoned(monkeypatch, where: str) -> None:
    """Samples with an odd number of tokens give no numbers, where there is a gradient."""
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
def test_numbers_that_are_none_stop_before_the_weights(tiny_model, tmp_path, capsys, monkeypatch, method, where):
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
    samples, said = read_json(failed / "rank-0.json")["samples"], read_json(failed / "rank-0.json")["problems"]
    odd = [k for k, one in enumerate(samples) if len(one["prompt_ids"] + one["response_ids"]) % 2]
    assert 0 < len(odd) < len(samples) == 4
    kind = "gradient of" if where == "gradient" else "loss" if method == "sft" else "logprobs of the update"
    problem = next(p for p in said if p["tensor"].startswith(kind))
    assert sorted(problem["slots"]) == odd
    first = problem["slots"][0]
    assert (
        f"{first} ({samples[first]['task']}, row {samples[first]['index']})" in error
        and f"nlu replay {failed}" in error
    )
    assert "Traceback" not in error
    weights = load_file(failed / "weights.safetensors")
    assert all((t == 0).all() for name, t in weights.items() if "lora_B" in name), "as they were: fresh"
    assert [folder.name for folder in checkpoint_folders(tmp_path / "run")] == ["step-0"]


def test_replay_names_the_sample_and_the_module(tiny_model, tmp_path, capsys):
    """A base model with a token whose embedding is no number, and one row with it."""
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


def test_replay_of_something_else_is_told(tmp_path):
    done = CliRunner().invoke(app, ["replay", str(tmp_path)])
    assert done.exit_code == 2 and "failed/step-N" in done.stderr


def test_a_reward_that_is_no_number_leaves_its_batch(tiny_model, tmp_path, capsys, untried):
    reward = with_reward(tmp_path, "return float('nan')")
    path = write_recipe(tmp_path, tiny_model("llama"), output_dir=str(tmp_path / "run"), reward=reward, **RESUMABLE)
    assert main([str(path), "evaluation.before=false"]) == 2
    assert "nan" in capsys.readouterr().err
    left = read_json(tmp_path / "run" / "failed" / "step-1" / "rank-0.json")
    assert len(left["samples"]) == 4 and "nan" in left["problems"][0]["tensor"]
    done = CliRunner().invoke(app, ["replay", str(tmp_path / "run" / "failed" / "step-1")])
    assert done.exit_code == 0, done.output
    assert "before it had losses" in done.output and "my_reward.py" in done.output.replace("\n", "")


# ----------------------------------------------------------------------------------------------- ranks, for real


@pytest.fixture
def launched():
    """`launched(recipe, ranks, log)`; what is left of it is killed in the end."""
    started = []

    def start(path: Path, *args) -> subprocess.Popen:
        started.append(path)
        return _launched(path, *args)

    yield start
    for path in started:
        for process in _processes_of(path):
            process.kill()


def _processes_of(path: Path) -> list:
    return [p for p in psutil.process_iter(["cmdline"]) if str(path) in (p.info["cmdline"] or [])]


def _launched(path: Path, ranks: int, log: Path, program: tuple[str, ...] = ()) -> subprocess.Popen:
    """A run by the real launcher, in a session of its own."""
    port = str(free_port())
    own = environment() | {"NPROC": str(ranks), "MASTER_PORT": port}
    deepspeed = ("deepspeed", "--num_accelerators", str(ranks), "--master_port", port)
    command = [*(program or deepspeed), "launch/ppo.sh", str(path)]
    with log.open("w") as file:
        return subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=own, cwd=ROOT, start_new_session=True
        )


def ranks_of(path: Path) -> dict[int, int]:
    """Rank -> process of the runs of a recipe."""
    found = {}
    for process in _processes_of(path):
        rank = next((part for part in process.info["cmdline"] if part.startswith("--local_rank=")), None)
        if rank:
            found[int(rank.partition("=")[2])] = process.pid
    return found


def wait_for(condition, seconds: float = 90):
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.05)
    return value


def steps_of(path: Path) -> int:
    metrics = path.parent / "run" / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def endless(tmp_path, tiny_model, **more):
    return write_recipe(
        tmp_path,
        tiny_model("llama"),
        output_dir=str(tmp_path / "run"),
        max_steps=100000,
        evaluation={"before": False, "max_samples": 2},
        checkpoint={"every_steps": 5},
        logging={"tensorboard": False},
        **more,
    )


@pytest.mark.slow
def test_a_start_that_was_killed_does_not_block_later_ones(tmp_path, tiny_model):
    """torch's lock of a C++ op, as a process that is killed while it loads one leaves it."""
    path = write_recipe(tmp_path, tiny_model("llama"), output_dir=str(tmp_path / "run"), max_steps=1)
    lock = Path(os.environ["TORCH_EXTENSIONS_DIR"]) / "deepspeed_shm_comm" / "lock"
    assert lock.parent.is_dir()
    lock.touch()
    try:
        assert launch(path).returncode == 0
        assert not lock.exists()
    finally:
        lock.unlink(missing_ok=True)


@pytest.mark.slow
def test_a_rank_that_is_killed_takes_the_run_down(launched, tmp_path, tiny_model):
    path, log = endless(tmp_path, tiny_model), tmp_path / "log"
    run = launched(path, 2, log)
    wait_for(lambda: steps_of(path) > 6)
    os.kill(ranks_of(path)[1], signal.SIGKILL)
    assert run.wait(timeout=60) != 0
    said = log.read_text()
    # Rank 0 may be where no Python runs, in DeepSpeed's own exchange by shared memory; then the launcher speaks.
    assert "rank 0: stopped, since another rank is gone" in said or "return code = -9" in said
    assert "Traceback" not in said
    assert not ranks_of(path), "nobody is left"
    assert all(verify_checkpoint(folder) == [] for folder in checkpoint_folders(tmp_path / "run"))


@pytest.mark.slow
def test_a_rank_that_hangs_is_named_with_the_line_where_it_hangs(launched, tmp_path, tiny_model):
    reward = with_reward(
        tmp_path, "calls += 1\nif calls > 50 and os.environ['RANK'] == '1': time.sleep(10000)\nreturn len(text)"
    )
    path, log = endless(tmp_path, tiny_model, reward=reward, deepspeed={"timeout": 4}), tmp_path / "log"
    run = launched(path, 2, log)
    assert run.wait(timeout=120) != 0
    said = log.read_text()
    assert "rank 1: no progress for" in said and "my_reward.py" in said
    assert said.index("rank 1: no progress") < said.index("rank 0: ")
    assert not ranks_of(path)


@pytest.mark.slow
def test_the_shell_script_stops_cleanly(launched, tmp_path, tiny_model):
    path, log = endless(tmp_path, tiny_model), tmp_path / "log"
    run = launched(path, 2, log, ("bash",))
    wait_for(lambda: steps_of(path) > 1)
    run.send_signal(signal.SIGTERM)
    assert run.wait(timeout=60) == 0, log.read_text()
    said = log.read_text()
    assert "ppo.sh: stopping after this step" in said and said.count("resume with: deepspeed") == 1
    last = checkpoint_folders(tmp_path / "run")[-1]
    assert last.name == f"step-{steps_of(path)}" and verify_checkpoint(last) == []
    assert not ranks_of(path)


@pytest.mark.slow
def test_ranks_whose_launcher_is_gone_stop(launched, tmp_path, tiny_model):
    """`kill` of the deepspeed command ends that process alone."""
    path, log = endless(tmp_path, tiny_model), tmp_path / "log"
    run = launched(path, 1, log)
    wait_for(lambda: steps_of(path) > 1)
    run.kill()
    run.wait()
    wait_for(lambda: not ranks_of(path), 30)
    assert "stopped (the launcher has gone); resume with: " in log.read_text()
    assert checkpoint_folders(tmp_path / "run")[-1].name == f"step-{steps_of(path)}"


@pytest.mark.slow
def test_numbers_that_are_none_on_one_rank_stop_all(tmp_path, tiny_model):
    reward = with_reward(tmp_path, "return (3e38 if os.environ['RANK'] == '1' else 1.0) * (1 - len(text) % 2 / 9)")
    path = write_recipe(tmp_path, tiny_model("llama"), output_dir=str(tmp_path / "run"), reward=reward, **RESUMABLE)
    done = launch(path, "ppo.whiten=false", "ppo.kl.init=0", ranks=2)
    assert done.returncode == 4, done.stdout + done.stderr
    assert "rank 1: infinity in" in done.stderr and "rank 0: infinity" not in done.stderr
    failed = tmp_path / "run" / "failed" / "step-1"
    assert {p.name for p in failed.iterdir()} >= {"rank-0.json", "rank-1.json", "weights.safetensors"}


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2])
def test_another_number_of_ranks(launched, tmp_path, tiny_model, stage):
    path = endless(tmp_path, tiny_model, deepspeed={"zero_stage": stage})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(signals, "requested", lambda: "SIGTERM" if steps_of(path) == 2 else None)
        assert main([str(path)]) == 0
    log = tmp_path / "log"
    run = launched(path, 2, log, ("bash",))
    if stage:
        assert run.wait(timeout=120) == 2
        assert "was written by 1 ranks, this run has 2" in log.read_text()
        return
    wait_for(lambda: steps_of(path) > 2)
    run.send_signal(signal.SIGTERM)
    assert run.wait(timeout=60) == 0
    assert "it resumes, but not bit-for-bit" in log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("job", [7, 10], ids=["PPO, two ranks, Adafactor, own critic", "SFT, Adafactor"])
def test_killed_stopped_filled_and_damaged_runs_end_with_the_same_bits(job, tmp_path):
    """Some of each; `python tests/faults/faults.py` does many, with every kind of run."""
    command = [sys.executable, "tests/faults/faults.py", "--jobs", str(job), "--number", "2", "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    counts = dict(line.strip().split(": ", 1) for line in done.stdout.partition("in all")[2].strip().splitlines())
    assert {"kill", "stop", "corrupt"} <= counts.keys()  # fill needs a file system of its own, which not all may mount
    assert '"kills": 2' in counts["kill"] and '"told": 2' in counts["corrupt"]


def test_the_watchdog_leaves_a_run_that_goes_on_alone():
    with watchdog.watching(0, 30.0):
        for _ in range(3):
            watchdog.heartbeat()
            with watchdog.waiting("a sum"):
                pass
    assert watchdog._seconds is None
