"""Encoder runs of a tiny random BERT: learning, predictions, run folder, stop and resume."""

import json
import os
import signal
import zipfile

import pytest
import torch
from official import ALL
from safetensors.torch import load_file
from support import BAD, GOOD, THINGS, launch, run_command, toy
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from extensions.common.files import read_json, read_jsonl
from extensions.encoder import run as encoder
from extensions.recipe import load_recipe
from extensions.runs.main import main
from extensions.runs.status import run_status
from extensions.tasks import SUITES, TASKS


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_a_separable_task_is_learned_and_the_run_folder_is_complete(write, tmp_path):
    assert main([str(write())], "encoder", encoder.run_encoder) == 0
    run = tmp_path / "run"
    scores = read_json(run / "eval.json")
    assert scores["after"]["mood"]["metrics"]["accuracy"] == 1.0 and scores["after"]["mood"]["samples"] == 16
    assert scores["after"]["mood"]["intervals"]["accuracy"] == [1.0, 1.0]
    assert sum(one["count"] for one in scores["after"]["mood"]["calibration"]["bins"]) == 16
    assert {k: scores[k] for k in ("method", "decoding", "split", "splits")} == {
        "method": "encoder",
        "decoding": "likelihood",
        "split": "validation",
        "splits": {"mood": "validation"},
    }
    assert "before" not in scores
    training = scores["training"]
    assert training["tasks"] == ["mood"] and training["steps"] == 8 * 48 // 8 and training["samples"] == 8 * 48
    validations, metrics = read_jsonl(run / "validation.jsonl"), read_jsonl(run / "metrics.jsonl")
    for lines in (validations, metrics):
        assert [(r["step"], r["samples"]) for r in lines] == [(6 * n, 48 * n) for n in range(1, 9)]
    assert [v["seconds"] for v in validations] == sorted(v["seconds"] for v in validations)
    assert validations[-1]["seconds"] == training["seconds"] > 0
    assert all(v["mean"] == v["likelihood_mean"] == v["tasks"]["mood"]["score"] for v in validations)
    shown = [[(a["index"], a["fields"], a["gold"]) for a in v["answers"]] for v in validations]
    assert shown == [shown[0]] * 8 and len(shown[0]) == 4, "the same rows"
    assert metrics[0]["loss"] > metrics[-1]["loss"] > 0
    assert sum(m["seconds"]["train"] for m in metrics) == pytest.approx(metrics[-1]["elapsed_s"])
    assert all(m["samples_per_s"] == pytest.approx(48 / m["seconds"]["train"]) for m in metrics)
    assert all(m["cpu_s"] > 0 for m in metrics)
    assert not (run / "checkpoints").exists() and not (run / "predictions_test.jsonl").exists()
    assert load_recipe(run / "recipe.yaml").method == "encoder"

    # The saved model gives the recorded answers.
    model = AutoModelForSequenceClassification.from_pretrained(run / "models" / "mood").eval()
    tokenizer = AutoTokenizer.from_pretrained(run / "models" / "mood")
    answers = read_jsonl(run / "predictions_after.jsonl")
    assert [a["index"] for a in answers] == list(range(16))
    assert all(a["fields"]["text"].startswith("the ") for a in answers)
    texts = [f"the {thing} was {adjective}" for thing in THINGS[6:] for adjective in (*GOOD, *BAD)]
    with torch.no_grad():
        classes = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits.argmax(dim=-1).tolist()
    assert [model.config.id2label[c] for c in classes] == [a["answer"] for a in answers] == [a["gold"] for a in answers]


@pytest.mark.slow
def test_the_best_epoch_by_the_score_of_the_task_is_kept(write, tmp_path, monkeypatch):
    scores, after_epoch = iter([0.1, 0.9, 0.2]), []
    score, on_evaluate = encoder.score, encoder.Progress.on_evaluate

    def watched(self, args, state, control, **kwargs):
        after_epoch.append({name: tensor.clone() for name, tensor in kwargs["model"].state_dict().items()})
        on_evaluate(self, args, state, control, **kwargs)

    monkeypatch.setattr(
        encoder, "score", lambda *arguments, **keys: score(*arguments, **keys) | {"score": next(scores)}
    )
    monkeypatch.setattr(encoder.Progress, "on_evaluate", watched)
    assert main([str(write(encoder={"epochs": 3}))], "encoder", encoder.run_encoder) == 0
    kept = load_file(tmp_path / "run" / "models" / "mood" / "model.safetensors")
    same = [all(torch.equal(tensors[name], kept[name]) for name in kept) for tensors in after_epoch]
    assert same == [False, True, False]
    assert [v["mean"] for v in read_jsonl(tmp_path / "run" / "validation.jsonl")] == [0.1, 0.9, 0.2]


class Killed(BaseException):
    pass


def results(run):
    """All results of a run except times; interruptions must not change them."""

    def without_times(value):
        if isinstance(value, dict):
            return {
                k: without_times(v)
                for k, v in value.items()
                if k not in ("seconds", "elapsed_s", "cpu_s", "samples_per_s")
            }
        return [without_times(v) for v in value] if isinstance(value, list) else value

    lines = [read_jsonl(run / f"{name}.jsonl") for name in ("predictions_after", "validation", "metrics")]
    weights = {path.parent.name: load_file(path) for path in run.glob("models/*/model.safetensors")}
    return without_times([read_json(run / "eval.json"), *lines]), weights


@pytest.mark.slow
def test_a_resumed_run_is_bit_identical(write, tmp_path, monkeypatch, capsys):
    """Stopped in the third epoch of the second of three tasks."""
    tasks = [toy("one"), toy("two"), toy("three", ["bad", "good"])]
    assert main([str(write(tasks, "whole", encoder={"epochs": 4, "lr": 3e-3}))], "encoder", encoder.run_encoder) == 0

    begin, trained, fatal = encoder.Progress.on_epoch_begin, [], {("two", 2)}

    def watched(self, args, state, control, **kwargs):
        trained.append((self.title, round(state.epoch)))
        if trained[-1] in fatal:
            raise Killed
        begin(self, args, state, control, **kwargs)

    monkeypatch.setattr(encoder.Progress, "on_epoch_begin", watched)
    cut = str(write(tasks, "cut", encoder={"epochs": 4, "lr": 3e-3}))
    with pytest.raises(Killed):
        main([cut], "encoder", encoder.run_encoder)
    assert not (tmp_path / "cut" / "eval.json").exists() and (tmp_path / "cut" / "tasks" / "one.json").exists()
    fatal.clear()
    trained.clear()
    capsys.readouterr()
    assert main([cut], "encoder", encoder.run_encoder) == 0
    assert "one: finished before" in capsys.readouterr().out
    assert trained == [("two", 2), ("two", 3), *(("three", epoch) for epoch in range(4))]

    (found, weights), (expected, whole) = results(tmp_path / "cut"), results(tmp_path / "whole")
    assert found == expected
    assert weights.keys() == whole.keys() == {"one", "two", "three"}
    for name, tensors in whole.items():
        assert all(torch.equal(weights[name][key], tensor) for key, tensor in tensors.items())


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["training", "answering"])
def test_a_run_that_stops_on_request_resumes_bit_identical(write, tmp_path, monkeypatch, capsys, moment):
    """SIGTERM in the middle of an epoch, or while the table is answered."""
    assert main([str(write(name="whole", encoder={"epochs": 3}))], "encoder", encoder.run_encoder) == 0
    path = write(name="cut", encoder={"epochs": 3})
    name = {"training": "on_step_end", "answering": "on_prediction_step"}[moment]
    method = getattr(encoder.Progress, name)

    def stopping(self, args, state, control, **kwargs):
        if (moment == "training" and state.global_step == 8) or (moment == "answering" and not self._training):
            os.kill(os.getpid(), signal.SIGTERM)
        return method(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(encoder.Progress, name, stopping)
        assert main([str(path)], "encoder", encoder.run_encoder) == 0
    assert "resume with: bash launch/encoder.sh" in capsys.readouterr().out
    assert not (tmp_path / "cut" / "eval.json").exists()
    assert main([str(path)], "encoder", encoder.run_encoder) == 0
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    ours, theirs = (load_file(f / "models" / "mood" / "model.safetensors") for f in (cut, whole))
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    assert read_json(cut / "eval.json")["after"] == read_json(whole / "eval.json")["after"]
    assert [r["loss"] for r in read_jsonl(cut / "metrics.jsonl")] == [
        r["loss"] for r in read_jsonl(whole / "metrics.jsonl")
    ]


@pytest.mark.slow
def test_the_intermediate_model_is_the_start_of_its_tasks(write, tmp_path, monkeypatch):
    """The weights of each task are compared before its training."""
    settings = {"intermediate": toy("first"), "intermediate_for": ["second"], "epochs": 1}
    recipe = write([toy("second"), toy("other")], encoder=settings)
    seen = {}
    build = encoder.load_encoder

    def watched(model, task, *arguments):
        built = build(model, task, *arguments)
        seen[task.name] = state(built)
        return built

    monkeypatch.setattr(encoder, "load_encoder", watched)
    assert main([str(recipe)], "encoder", encoder.run_encoder) == 0
    tuned = load_file(tmp_path / "run" / "models" / "first" / "model.safetensors")
    body = [name for name in tuned if name.startswith("bert.")]
    assert all(torch.equal(seen["second"][name], tuned[name]) for name in body)
    assert all(torch.equal(seen["other"][name], seen["first"][name]) for name in body)
    assert any(not torch.equal(seen["other"][name], tuned[name]) for name in body)
    assert torch.equal(seen["second"]["classifier.weight"], seen["other"]["classifier.weight"])
    scores = read_json(tmp_path / "run" / "eval.json")
    assert scores["after"].keys() == {"second", "other"} and scores["training"]["tasks"] == ["first", "second", "other"]


def test_a_batch_is_shared_evenly_by_the_ranks(write, monkeypatch, capsys):
    join = encoder.Strategy.setup_distributed

    def joined_by_another(self):
        join(self)
        self.world_size = 2

    monkeypatch.setattr(encoder.Strategy, "setup_distributed", joined_by_another)
    assert main([str(write(encoder={"batch_size": 3}))], "encoder", encoder.run_encoder) == 2
    assert "encoder.batch_size: 3 samples cannot be shared evenly by 2 ranks" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, part",
    [
        ([], "usage: deepspeed launch/encoder.sh RECIPE"),
        (["{recipe}", "encoder.epochs=0"], "encoder.epochs"),
        (["{recipe}", "encoder.warmup_ratio=1"], "encoder.warmup_ratio"),
        (["{recipe}", "method=ppo"], "launch/ppo.sh"),
    ],
    ids=["nothing", "no epochs", "only warmup", "another method"],
)
def test_user_errors_are_one_line(write, arguments, part, capsys):
    recipe = str(write())
    assert main([argument.replace("{recipe}", recipe) for argument in arguments], "encoder", encoder.run_encoder) == 2
    assert part in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------ launched runs


@pytest.fixture(scope="module")
def run_of_all(tiny_bert, benchmarks, tmp_path_factory):
    """A run of all 21 tasks, with MNLI as the intermediate task of BERT-large++."""
    folder = tmp_path_factory.mktemp("all")
    recipe = {
        "name": "all",
        "model": {"path": str(tiny_bert)},
        "data": {"tasks": ["glue", "superglue"], "root": str(benchmarks)},
        "encoder": {"epochs": 1, "batch_size": 4, "lr": 1e-3, "intermediate": "mnli"},
        "evaluation": {"predict_test": True},
        "output_dir": str(folder / "run"),
    }
    (folder / "all.yaml").write_text(json.dumps(recipe))
    done = launch(folder / "all.yaml", method="encoder")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder / "run", done.stdout


@pytest.mark.slow
def test_every_task_is_trained_or_uses_another_model_and_is_answered(run_of_all):
    run, printed = run_of_all
    scores = read_json(run / "eval.json")
    assert scores["after"].keys() == scores["splits"].keys() == set(ALL)
    assert all(set(TASKS[name].metrics) <= scores["after"][name]["metrics"].keys() for name in ALL)
    assert run_status(run).state == "finished"
    trained = set(ALL) - {"mnli_mm", "ax", "axb", "axg"}
    assert set(scores["training"]["tasks"]) == trained == {path.name for path in (run / "models").iterdir()}
    for kind in ("after", "test"):
        assert {p["task"] for p in read_jsonl(run / f"predictions_{kind}.jsonl")} == set(ALL)
    positive_probabilities = [
        p["positive_probability"] for p in read_jsonl(run / "predictions_test.jsonl") if p["task"] == "record"
    ]
    assert positive_probabilities and all(
        0 < positive_probability < 1 for positive_probability in positive_probabilities
    )
    assert "left out: it has" not in printed and "Traceback" not in printed
    for task in ("CB", "RTE", "BoolQ"):
        assert f"{task}: " in printed and "epochs from the model of mnli" in printed


@pytest.mark.slow
@pytest.mark.parametrize("suite", SUITES)
def test_a_run_gives_a_valid_archive(run_of_all, benchmarks, suite, tmp_path):
    archive = tmp_path / "archive.zip"
    command = ["nlu", "submit", str(run_of_all[0]), "--suite", suite, "--out", str(archive)]
    done = run_command([*command, "--data-root", str(benchmarks)])
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(archive) as files:
        assert sorted(files.namelist()) == sorted(task.submission.file for task in SUITES[suite])


@pytest.mark.slow
def test_two_ranks_train_like_one(write, tmp_path):
    """Without dropout and with the same batches, the weights agree to rounding."""
    assert main([str(write(name="single", encoder={"epochs": 2}))], "encoder", encoder.run_encoder) == 0
    done = launch(write(name="double", encoder={"epochs": 2}), ranks=2, method="encoder")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.stdout.count("epoch 2 of 2") == 1, "only rank 0 may print"
    model = "models/mood/model.safetensors"
    single, double = load_file(tmp_path / "single" / model), load_file(tmp_path / "double" / model)
    assert single.keys() == double.keys()
    for name, tensor in single.items():
        # A key bias shifts all scores of a query equally, so its gradient is rounding noise, which Adam scales up.
        if not name.endswith("key.bias"):
            torch.testing.assert_close(double[name], tensor, rtol=0, atol=1e-5)
    answers = [read_jsonl(tmp_path / name / "predictions_after.jsonl") for name in ("single", "double")]
    for one, other in zip(*answers, strict=True):
        assert other.pop("probabilities") == pytest.approx(one.pop("probabilities"), abs=1e-5)
    assert answers[0] == answers[1] and len(answers[0]) == 16
