"""Validations: both decodings, the criterion of the best one, the answers to fixed rows, and what trackers get."""

import pytest
from support import write_recipe
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from extensions.common.files import read_json, read_jsonl
from extensions.data import Example
from extensions.evaluation.evaluator import fixed_answers
from extensions.evaluation.metrics import Prediction
from extensions.runs import training_run
from extensions.runs.main import main
from extensions.tasks import TASKS

SAMPLED, LIKELY = (0.1, 0.9, 0.2), (0.8, 0.3, 0.5)  # scores of three validations: the best of each is another


def sft_recipe(folder, model, warmup_ratio=0.1, **evaluation):
    sections = {
        "schedule": {"warmup_ratio": warmup_ratio},
        "sft": {"batch_size": 4},
        "evaluation": {"every_steps": 1, "validation_samples": 6} | evaluation,
    }
    return write_recipe(folder, model, output_dir=str(folder / "run"), max_steps=3, **sections)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "best", "steps", "messages"),
    [
        (
            {},
            2,
            [1, 2, 3],
            [
                "validation 10.0 (by likelihood 80.0; best so far, by sampled answers)",
                "validation 20.0 (by likelihood 50.0; best 90.0 at step 2, by sampled answers)",
                "kept the best validation, by sampled answers, at step 2: 90.0",
            ],
        ),
        (
            {"best_by": "likelihood", "patience": 1},
            1,
            [1, 2],
            [
                "early stopping: 1 without a new best, at step 2 at the earliest",
                "validation 90.0 (by likelihood 30.0; best 80.0 at step 1, by likelihood; 1 of 1 without a new best)",
                "kept the best validation, by likelihood, at step 1: 80.0",
            ],
        ),
        (
            {"best_by": "likelihood", "patience": 1, "warmup_ratio": 0.5},
            1,
            [1, 2, 3],
            ["step 1, by likelihood; not counted by evaluation.patience, since the warmup ends at step 2)"],
        ),
        (
            {"every_steps": 2, "patience": 1},
            3,
            [2, 3],
            ["evaluation.patience: 1 cannot stop this run of 3 iterations before its end"],
        ),
        (
            {"decoding": "likelihood", "before": False},
            2,
            [1, 2, 3],
            [
                "validation 10.0 (best so far, by likelihood)",
                "kept the best validation, by likelihood, at step 2: 90.0",
            ],
        ),
        (
            {"decoding": "greedy", "probabilities": False},
            2,
            [1, 2, 3],
            ["validation 10.0 (best so far, by greedy answers)"],
        ),
    ],
)
def test_the_best_validation_is_by_the_chosen_answers(
    tiny_model, tmp_path, monkeypatch, capsys, settings, best, steps, messages
):
    score_all, weights, calls = training_run.score_all, [], []

    def scripted(tasks, predictions, intervals=True):
        scores = score_all(tasks, predictions, intervals)
        if not intervals:
            result = scores["acceptability"]
            result["score"] = SAMPLED[len(calls)]
            if "likelihood" in result:
                both = LIKELY if settings.get("decoding") != "likelihood" else SAMPLED
                result["likelihood"] = result["likelihood"] | {"score": both[len(calls)]}
            calls.append(predictions)
        return scores

    save = training_run.TrainingRun.save_adapter
    monkeypatch.setattr(training_run, "score_all", scripted)
    monkeypatch.setattr(
        training_run.TrainingRun, "save_adapter", lambda self: weights.append(self.best["step"]) or save(self)
    )
    assert main([str(sft_recipe(tmp_path, tiny_model("llama"), **settings))], "sft") == 0
    assert weights == [best]
    lines = read_jsonl(tmp_path / "run" / "validation.jsonl")
    assert [line["step"] for line in lines] == steps
    assert [line["mean"] for line in lines] == list(SAMPLED[: len(steps)])
    expected = LIKELY if settings.get("decoding") != "likelihood" else SAMPLED
    assert [line["likelihood_mean"] for line in lines] == (
        [None] * len(steps) if settings.get("probabilities") is False else list(expected[: len(steps)])
    )
    out = " ".join(capsys.readouterr().out.split())
    for message in messages:
        assert message in out


@pytest.mark.slow
def test_a_validation_records_both_scores_and_the_answers_to_the_same_rows(tiny_model, tmp_path):
    assert main([str(sft_recipe(tmp_path, tiny_model("llama"))), "logging.rollout_samples=2"], "sft") == 0
    run = tmp_path / "run"
    lines = read_jsonl(run / "validation.jsonl")
    for line in lines:
        result = line["tasks"]["acceptability"]
        assert (line["mean"], line["likelihood_mean"]) == (result["score"], result["likelihood"]["score"])
        for shown in line["answers"]:
            assert shown.keys() == {"task", "index", "fields", "response", "answer", "gold", "probabilities"}
            assert sum(shown["probabilities"].values()) == pytest.approx(1) and shown["fields"]["sentence"]
    rows = [[shown["index"] for shown in line["answers"]] for line in lines]
    assert rows == [rows[0]] * 3 and len(rows[0]) == 2
    assert read_json(run / "versions.json")["world_size"] == 1
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    for name in ("mean", "likelihood_mean"):
        logged = [(event.step, event.value) for event in events.Scalars(f"validation/{name}")]
        assert logged == [(line["step"], pytest.approx(line[name])) for line in lines]


def test_fixed_answers_are_evenly_spaced_per_task():
    rows = [Example(TASKS[name], i, {"sentence": f"{name} {i}"}, "1") for name in ("cola", "sst2") for i in range(8)]
    answered = [Prediction(row.task.name, row.index, "Yes", "1", "1") for row in rows]
    found = fixed_answers(answered, rows, 4)
    assert [(one["task"], one["index"]) for one in found] == [(n, i) for n in ("cola", "sst2") for i in (0, 2, 4, 6)]
    assert found[5]["fields"] == {"sentence": "sst2 2"} and "kept" not in found[5]
    assert fixed_answers(answered, rows, 0) == []
