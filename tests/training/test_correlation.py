"""The correlation loss: against numpy and plain forwards, real runs of tiny models, ranks and resume."""

import itertools
import json

import numpy as np
import pytest
import torch
from support import ARCHITECTURES, PlainEngine, adapter_of, gradients, launch, make_policy, timeless, write_recipe
from torch.nn.functional import log_softmax

from extensions.common.files import read_json, read_jsonl
from extensions.data import Example
from extensions.model.loading import load_tokenizer
from extensions.prompts import PromptEncoder
from extensions.recipe import Model, Sft
from extensions.runs.main import main
from extensions.tasks import GRID_POINTS, TASKS, Task
from extensions.training.correlation import LEVEL, CorrelationTrainer, correlation_loss, grid_scores, unit_grid

STARS = {"name": "stars", "description": "Rate it.", "question": "Rate {text}.", "score_range": [1, 5]}
WHOLE_STARS = Task.model_validate(STARS | {"score_decimals": 0})
WORDS = ["good", "bad", "fine", "poor", "great", "awful", "nice", "ugly"]


def pearson(scores, gold):
    return np.corrcoef(np.asarray(scores, float), np.asarray(gold, float))[0, 1]


# ------------------------------------------------------------------------------------------------------------ the loss


def test_the_loss_of_one_task_is_that_of_numpy():
    rng = np.random.default_rng(0)
    scores, gold = rng.random(12), rng.random(12)
    loss, correlation = correlation_loss(torch.tensor(scores), torch.tensor(gold), ["stsb"] * 12)
    assert correlation.item() == pytest.approx(pearson(scores, gold))
    assert loss.item() == pytest.approx(1 - pearson(scores, gold) + LEVEL * np.mean((scores - gold) ** 2))


def test_tasks_correlate_each_for_itself():
    scores, gold = torch.tensor([0.1, 0.9, 0.2, 0.4, 0.1]), torch.tensor([0.5, 0.7, 0.3, 0.9, 0.6])
    _, correlation = correlation_loss(scores, gold, ["a", "b", "a", "b", "b"])
    wanted = (2 * pearson(scores[[0, 2]], gold[[0, 2]]) + 3 * pearson(scores[[1, 3, 4]], gold[[1, 3, 4]])) / 5
    assert correlation.item() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("scores", [[0.5, 0.5, 0.5], [0.1, 0.5, 0.9]], ids=["equal scores", "different scores"])
@pytest.mark.parametrize("gold", [[0.3, 0.3, 0.3], [0.2, 0.4, 0.9]], ids=["equal gold", "different gold"])
def test_constant_scores_or_gold_have_finite_gradients(scores, gold):
    values = torch.tensor(scores, requires_grad=True)
    loss, correlation = correlation_loss(values, torch.tensor(gold), ["a"] * 3)
    loss.backward()
    assert values.grad.isfinite().all()
    if len(set(scores)) == 1 or len(set(gold)) == 1:
        assert correlation.item() == 0
    if len(set(scores)) == 1 < len(set(gold)):
        assert values.grad[0] > values.grad[1] > values.grad[2], "it still spreads them in the right order"


def test_a_single_row_of_a_task_gets_only_the_level():
    values = torch.tensor([0.2, 0.8, 0.4], requires_grad=True)
    loss, correlation = correlation_loss(values, torch.tensor([0.1, 0.5, 0.6]), ["a", "b", "b"])
    loss.backward()
    assert correlation.item() == pytest.approx(-2 / 3)
    assert values.grad[0].item() == pytest.approx(LEVEL * 2 * (0.2 - 0.1) / 3)


def test_answers_that_the_decimals_make_equal_count_once():
    """Eleven points over 1 to 5 are five answers without decimals."""
    grid = unit_grid(WHOLE_STARS)
    texts = [text for text, value in zip(WHOLE_STARS.score_grid, grid, strict=True) if value == value]
    assert texts == ["1", "2", "3", "4", "5"] and len(grid) == GRID_POINTS
    assert [value for value in grid if value == value] == [0, 0.25, 0.5, 0.75, 1]
    answers = torch.log(torch.tensor([[{"1": 0.5, "5": 0.3}.get(text, 0.0) for text in WHOLE_STARS.score_grid]]))
    log_mass, score = grid_scores(answers, torch.tensor([grid]))
    assert log_mass.exp().item() == pytest.approx(0.8) and score.item() == pytest.approx(0.3 / 0.8)


def plain_batch_loss(policy, batch, encoder):
    """The whole loss by one plain forward per answer."""
    masses, scores = [], []
    for example in batch:
        ids, text = encoder.encode(example.task, example.fields)
        found = {}
        for score in example.task.score_grid:
            answer = encoder.answer_ids(ids, text, score)
            with policy.role("actor"):
                logits = policy.lm(input_ids=torch.tensor([ids + answer]), use_cache=False).logits[0, len(ids) - 1 : -1]
            found[float(score)] = log_softmax(logits.float(), -1).gather(1, torch.tensor(answer)[:, None]).sum()
        low, high = example.task.score_range
        answers = torch.stack(list(found.values()))
        masses.append(answers.logsumexp(0))
        scores.append((answers.softmax(0) * (torch.tensor(list(found)) - low) / (high - low)).sum())
    scores, masses = torch.stack(scores), torch.stack(masses)
    gold = torch.tensor([(float(e.label) - e.task.score_range[0]) / (e.task.score_range[1] - e.task.score_range[0])
                         for e in batch])  # fmt: skip
    correlation = torch.corrcoef(torch.stack([scores, gold]))[0, 1]
    return -masses.mean() + 1 - correlation + LEVEL * (scores - gold).square().mean(), correlation


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("task", [TASKS["stsb"], WHOLE_STARS], ids=["stsb", "equal answers"])
def test_gradients_equal_plain_forwards_for_any_micro_batch(tiny_model, architecture, task):
    path = tiny_model(architecture)
    policy, tokenizer = make_policy(path, critic="none"), load_tokenizer(Model(path=str(path)))
    encoder = PromptEncoder(tokenizer, 400, False)
    batch = [
        Example(task, k, dict.fromkeys(task.fields, f"Anna {word} slept."), label)
        for k, (word, label) in enumerate(zip(WORDS, ["1", "4", "2", "5", "3"], strict=False))
    ]
    expected, correlation = plain_batch_loss(policy, batch, encoder)
    expected.backward()
    wanted = gradients(policy)
    for size in (24, 2, 1):
        engine = PlainEngine(policy)
        trainer = CorrelationTrainer(
            policy, engine, engine, encoder, None, Sft(loss="correlation", micro_batch_size=size), 0
        )
        samples = [sample for example in batch for sample in trainer.encode(example)]
        trainer._batch = batch, samples
        terms = trainer.update(samples, 0)
        assert terms["loss"].item() == pytest.approx(expected.item(), rel=1e-4)
        assert terms["correlation"].item() == pytest.approx(correlation.item(), abs=2e-3)
        found = gradients(policy)
        assert found.keys() == wanted.keys()
        for name, gradient in wanted.items():
            scale = float(gradient.abs().max())
            torch.testing.assert_close(
                found[name], gradient, rtol=1e-2, atol=2e-3 * scale, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_a_failed_batch_is_computed_again_row_by_row(tiny_model):
    """From what a checkpoint of the failure holds: token ids of every answer, no examples."""
    path = tiny_model("llama")
    policy, tokenizer = make_policy(path, critic="none"), load_tokenizer(Model(path=str(path)))
    engine, encoder = PlainEngine(policy), PromptEncoder(tokenizer, 400, False)

    def trainer(encoder):
        return CorrelationTrainer(policy, engine, engine, encoder, None, Sft(loss="correlation"), 0)

    failed, task = trainer(encoder), TASKS["stsb"]
    batch = [Example(task, k, dict.fromkeys(task.fields, f"Anna {WORDS[k]} slept."), "3.8") for k in range(3)]
    failed._batch = batch, [sample for example in batch for sample in failed.encode(example)]
    records, tensors = failed.debug_snapshot()
    assert tensors == {} and [len(record["grid_ids"]) for record in records] == [GRID_POINTS] * 3
    again = trainer(None)
    again.restore_snapshot(json.loads(json.dumps(records)), {})
    assert again._batch[1] == failed._batch[1]
    with policy.role("actor"):
        losses = [again.per_sample_losses(slot)["actor"]() for slot in range(3)]
    assert all(loss.requires_grad and loss.isfinite() for loss in losses)
    assert len({loss.item() for loss in losses}) == 3


# ----------------------------------------------------------------------------------------------------------- real runs


def stars_recipe(folder, model, **sections):
    """A task whose score is how many good words a text has."""
    folder.mkdir(exist_ok=True)
    rows = [(" ".join(words), 1 + sum(w in ("good", "fine", "great", "nice") for w in words))
            for words in itertools.product(WORDS, repeat=4)][::61]  # fmt: skip
    (folder / "rows.csv").write_text("text,stars\n" + "".join(f"{text},{stars}\n" for text, stars in rows))
    source = {"files": {"train": "rows.csv", "validation": "rows.csv"}, "label": "stars"}
    defaults = {
        "output_dir": str(folder / "run"),
        "data": {"tasks": [STARS | {"source": source}], "max_train_samples": 64},
        "sft": {"loss": "correlation", "batch_size": 8, "micro_batch_size": 3},
        "evaluation": {"decoding": "likelihood", "max_samples": 6, "yardsticks": False},
        "max_steps": 6,
    }
    for key, value in sections.items():
        defaults[key] = defaults[key] | value if isinstance(value, dict) and key in defaults else value
    return write_recipe(folder, model, **defaults)


@pytest.mark.slow
def test_a_run_writes_scores_and_its_curve(tiny_model, tmp_path, capsys):
    assert main([str(stars_recipe(tmp_path / "a", tiny_model("llama")))], "sft") == 0
    folder = tmp_path / "a" / "run"
    metrics = read_jsonl(folder / "metrics.jsonl")
    assert [m["samples"] for m in metrics] == [8, 16, 24]
    assert all(-1 <= m["correlation"] <= 1 and m["format_loss"] > 0 and m["grad_norm"] > 0 for m in metrics)
    assert metrics[-1]["format_loss"] < metrics[0]["format_loss"]
    assert (folder / "loss_curve.png").read_bytes().startswith(b"\x89PNG")
    assert "correlation" in (folder / "report.html").read_text() and "correlation" in capsys.readouterr().out
    assert read_json(folder / "eval.json")["after"]["stars"]["format_error_rate"] == 0


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one(tiny_model, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    iterate = CorrelationTrainer.iterate

    def killing(self, step):
        if step == 1:
            raise Killed
        return iterate(self, step)

    own = {"checkpoint": {"every_steps": 1}, "lora": {"dropout": 0.1}, "evaluation": {"before": False}}
    whole, cut = (stars_recipe(tmp_path / name, tiny_model("llama"), **own) for name in ("whole", "cut"))
    assert main([str(whole)], "sft") == 0
    with monkeypatch.context() as patch:
        patch.setattr(CorrelationTrainer, "iterate", killing)
        with pytest.raises(Killed):
            main([str(cut)], "sft")
    assert main([str(cut)], "sft") == 0
    whole, cut = whole.parent / "run", cut.parent / "run"
    ours, theirs = adapter_of(cut), adapter_of(whole)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    assert timeless(cut / "metrics.jsonl") == timeless(whole / "metrics.jsonl")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 3])
def test_two_ranks_equal_one(tiny_model, tmp_path, stage):
    one = stars_recipe(tmp_path / "one", tiny_model("llama"), evaluation={"before": False})
    assert main([str(one)], "sft") == 0
    two = stars_recipe(
        tmp_path / "two", tiny_model("llama"), evaluation={"before": False}, deepspeed={"zero_stage": stage}
    )
    done = launch(two, ranks=2, method="sft")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    names = ("loss", "correlation", "format_loss")
    first, second = (
        [[m[n] for n in names] for m in read_jsonl(p.parent / "run" / "metrics.jsonl")] for p in (one, two)
    )
    assert np.array(first) == pytest.approx(np.array(second), rel=1e-4, abs=1e-4)
    adapters = [adapter_of(path.parent / "run") for path in (one, two)]
    for name, tensor in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], tensor, atol=2e-4, rtol=2e-3)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evaluation.decoding=sample", "sft.loss: correlation needs evaluation.decoding: likelihood, not sample"),
        ("data.tasks=reviews", "sft.loss: correlation is a loss of regressions; reviews is a classification task"),
        ("sft.batch_size=2", "sft.loss: correlation needs sft.batch_size: 4 or more, not 2"),
    ],
)
def test_contradictions_are_errors(tiny_model, tmp_path, capsys, override, message):
    assert main([str(stars_recipe(tmp_path / "a", tiny_model("llama"))), override], "sft") == 2
    assert message in " ".join(capsys.readouterr().err.split())
