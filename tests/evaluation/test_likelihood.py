"""Answers by likelihood, and temperature scaling: golden values by hand or from plain loops."""

import math
import random
from collections import Counter

import pytest
import torch
from support import forms_of, make_policy

from extensions.data import Example
from extensions.evaluation.likelihood import (
    answer_probabilities,
    candidates,
    confidence_of,
    decide,
    label_index,
    label_sets_of,
    log_likelihoods,
    log_odds,
)
from extensions.inference.calibration import fit
from extensions.model.loading import load_tokenizer
from extensions.prefix.tree import Sample, pack
from extensions.prompts import CLOSE, PromptEncoder
from extensions.recipe import Model
from extensions.rollout import sampler as rollout
from extensions.rollout.sampler import Sampler
from extensions.tasks import TASKS, Task

OWN = {"name": "own", "description": "-", "question": "{text}"}
TEAMS = Task.model_validate(OWN | {"labels": {"a": ["Alpha", "First"], "b": ["Beta"], "c": ["Gamma", "Third", "Last"]}})


def several(count):
    labels = {f"l{k}": [f"Word {k}"] for k in range(count)}
    return Task.model_validate(OWN | {"labels": labels, "multi_label": True})


def scores(low, high, decimals=None, suite="own"):
    task = Task.model_validate(OWN | {"score_range": [low, high], "suite": suite})
    # Without validation, which rejects decimals that would round the ends of the range.
    return task.model_copy(update={"score_decimals": decimals})


# ----------------------------------------------------------------------------------------------------------- candidates


@pytest.mark.parametrize(
    ("task", "numbers"),
    [
        (TASKS["stsb"], "0.0 0.5 1.0 1.5 2.0 2.5 3.0 3.5 4.0 4.5 5.0"),
        (scores(-1.0, 1.0), "-1.0 -0.8 -0.6 -0.4 -0.2 0.0 0.2 0.4 0.6 0.8 1.0"),
        (scores(-1.0, 1.0, 2), "-1.00 -0.80 -0.60 -0.40 -0.20 0.00 0.20 0.40 0.60 0.80 1.00"),
        (scores(1.0, 5.0, 0), "1 2 3 4 5"),
        (scores(0.0, 0.5), "0.00 0.05 0.10 0.15 0.20 0.25 0.30 0.35 0.40 0.45 0.50"),
        (scores(0.0, 100.0, 0), "0 10 20 30 40 50 60 70 80 90 100"),
        (scores(-0.4, 0.4, 0), "0"),
    ],
    ids=lambda value: value.replace(" ", ",") if isinstance(value, str) else None,
)
def test_the_candidates_of_a_regression(task, numbers):
    assert candidates(task).keys == numbers.split()


def labelled(task, *labels):
    return [Example(task, i, {}, label) for i, label in enumerate(labels)]


def test_label_sets():
    assert candidates(several(2)).keys == ["none", "l0", "l1", "l0, l1"]
    assert len(candidates(several(6), ["l0"]).keys) == 64
    singles = [f"l{k}" for k in range(7)]
    sets = candidates(several(7), ["l0, l2", "l1", "none", "l3, l5, l6"]).keys
    assert sets == ["none", *singles, "l0, l2", "l3, l5, l6"]
    compared = candidates(several(2))
    written = {"none": "none", "l0": "Word 0", "l1": "Word 1", "l0, l1": "Word 0, Word 1"}
    assert compared.forms == {key: [text] for key, text in written.items()}
    rows = labelled(several(3), "l0, l2", "none", None, "l0, l2", "l1") + labelled(TEAMS, "a")
    assert label_sets_of(rows) == {"own": ["l0, l2", "none", "l1"]}
    assert label_index(compared, "l0, l1") == 3 and label_index(compared, "none") == 0


def test_indices_of_gold_labels():
    assert [label_index(candidates(TEAMS), label) for label in ("a", "c", "x")] == [0, 2, None]
    assert [label_index(candidates(TASKS["stsb"]), label) for label in ("0", "3.8", "5")] == [0, 8, 10]


# ------------------------------------------------------------------------------------------------------------ decisions


def test_the_most_probable_label():
    (one,) = decide(candidates(TEAMS), torch.tensor([[0.2, 0.5, 0.3]], dtype=torch.float64))
    assert (one.text, one.answer, one.confidence) == (f" Beta {CLOSE}", "b", 0.5)
    assert one.probabilities == {"a": 0.2, "b": 0.5, "c": 0.3}


def test_a_score_is_the_probability_weighted_mean():
    probabilities = torch.zeros(1, 11, dtype=torch.float64)
    probabilities[0, 0], probabilities[0, 8], probabilities[0, 10] = 0.1, 0.6, 0.3
    # -1, 0.6 and 1: -0.1 + 0.36 + 0.3 = 0.56
    (mean,) = decide(candidates(scores(-1.0, 1.0)), probabilities)
    assert mean.answer == 0.56 and mean.text == f" 0.56 {CLOSE}", "one decimal more than the candidates"
    assert mean.confidence == pytest.approx(0.6), "the candidates 0.4 and 0.6, within 0.36 to 0.76"
    (rounded,) = decide(candidates(scores(-1.0, 1.0, 1)), probabilities)
    assert rounded.answer == 0.6 and rounded.text == f" 0.6 {CLOSE}"
    # STS-B keeps three decimals, whatever its written scores have.
    (best,) = decide(candidates(TASKS["stsb"]), probabilities)
    assert best.answer == 3.9 and best.text == f" 3.900 {CLOSE}" and best.confidence == pytest.approx(0.6)
    assert sum(best.probabilities.values()) == pytest.approx(1)
    middle = torch.full((1, 11), 1 / 11, dtype=torch.float64)
    (zero,) = decide(candidates(scores(-1.0, 1.0)), middle)
    assert zero.text == f" 0.00 {CLOSE}" and math.copysign(1, zero.answer) == 1, "no minus zero"


def test_a_label_set_and_the_marginals():
    compared = candidates(several(2))
    probabilities = torch.tensor([[0.4, 0.3, 0.05, 0.25]], dtype=torch.float64)  # none, 0, 1, both
    (one,) = decide(compared, probabilities)
    assert (one.text, one.answer, one.confidence) == (f" none {CLOSE}", "none", 0.4)
    assert one.probabilities == pytest.approx({"l0": 0.55, "l1": 0.3})
    (both,) = decide(compared, probabilities.flip(0)[:, [3, 1, 2, 0]])
    assert (both.text, both.answer) == (f" Word 0, Word 1 {CLOSE}", "l0, l1")
    assert confidence_of(compared, probabilities[0], "l1") == 0.05
    assert confidence_of(compared, probabilities[0], "l9") == 0


def test_calibration_changes_no_answer():
    compared = candidates(scores(-1.0, 1.0))
    logprobs = torch.linspace(-9, 0, 11)[None]
    plain, flat = answer_probabilities(logprobs), answer_probabilities(logprobs, 5.0)
    (one,), (other,) = decide(compared, plain), decide(compared, plain, flat)
    assert one.answer == other.answer and one.confidence > other.confidence
    assert list(other.probabilities.values()) == pytest.approx(flat[0].tolist())


def test_a_temperature_divides_the_logprobs():
    logprobs = torch.tensor([[-1.0, -3.0, -2.0]])
    expected = [math.exp(x / 2) for x in (-1, -3, -2)]
    found = answer_probabilities(logprobs, 2.0)[0].tolist()
    assert found == pytest.approx([x / sum(expected) for x in expected])


# ------------------------------------------------------------------------------------------------------ log-likelihoods


@pytest.fixture(scope="module")
def scene(tiny_model):
    tokenizer = load_tokenizer(Model(path=str(tiny_model("llama"))))
    return Sampler(make_policy(tiny_model("llama"), critic="none"), tokenizer, CLOSE, 8), PromptEncoder(
        tokenizer, 400, False
    )


def test_the_probabilities_of_a_labels_forms_are_summed(scene):
    sampler, encoder = scene
    prompts = [encoder.encode(TEAMS, {"text": f"Anna slept {k}. " * k}) for k in range(1, 4)]
    summed = log_likelihoods(candidates(TEAMS), prompts, encoder, sampler)
    for row, (ids, text) in enumerate(prompts):
        for place, words in enumerate(TEAMS.labels.values()):
            each = []
            for form in forms_of(words):
                whole = sampler.tokenizer(f"{text}{form}")["input_ids"]
                with torch.no_grad(), sampler.policy.role("actor"):
                    logits = sampler.policy.lm(input_ids=torch.tensor([whole]), use_cache=False).logits[0]
                logprobs = logits.double().log_softmax(-1)
                each.append(sum(logprobs[k - 1, whole[k]].item() for k in range(len(ids), len(whole))))
            assert summed[row, place].item() == pytest.approx(math.log(sum(map(math.exp, each))), abs=1e-4)


class MergedForms:
    """Two surface forms have the same tokens in some rows, three in all."""

    def __init__(self, duplicates):
        self.duplicates = duplicates

    def surface_ids(self, ids, text, answer):
        first, second = [len(answer), 3], [len(answer), 5]
        forms = {"all": [first], "some": [first, second]}[text]
        return [*forms, *forms[:1] * 3][:4] if self.duplicates else forms

    def answer_ids(self, ids, text, answer):
        return [len(answer), 9]


def test_equal_token_sequences_count_once(scene):
    sampler, _ = scene
    prompts = [([7, 8, 9], "all"), ([7, 8, 9, 10], "some"), ([11, 8], "all")]
    found = log_likelihoods(candidates(TEAMS), prompts, MergedForms(True), sampler)
    for k, prompt in enumerate(prompts):
        assert found[k].tolist() == pytest.approx(
            log_likelihoods(candidates(TEAMS), [prompt], MergedForms(False), sampler)[0].tolist(), abs=1e-4
        )


def test_log_odds_tell_certain_answers_apart():
    logprobs = torch.tensor([[-0.1, -18.1, -30.0], [-0.1, -20.1, -30.0], [-3.0, -1.0, -2.0]])
    assert (logprobs[:2].softmax(1)[:, 0] == 1).all(), "in float32 the probability is 1"
    expected = [a - math.log(math.exp(b) + math.exp(c)) for a, b, c in logprobs.tolist()]
    assert log_odds(logprobs, 0).tolist() == pytest.approx(expected, rel=1e-6)
    assert log_odds(logprobs, 2)[2].item() == pytest.approx(-2 - math.log(math.exp(-3) + math.exp(-1)), rel=1e-6)


@pytest.mark.parametrize("micro_batch_size", [1, 6, 13, 64])
def test_the_answers_to_a_prompt_are_in_one_pack(scene, monkeypatch, micro_batch_size):
    sampler, _ = scene
    rng = random.Random(0)
    prompts = [[rng.randrange(5, 200) for _ in range(rng.randint(30, 60))] for _ in range(7)]
    prompts[3] = prompts[1]
    samples = [Sample(prompt, [6 + k, 9, 11 + k]) for prompt in prompts for k in range(6)]
    expected = sampler.logprobs(samples)
    packs = []
    monkeypatch.setattr(sampler, "micro_batch_size", micro_batch_size)
    monkeypatch.setattr(rollout, "pack", lambda members, device: packs.append(members) or pack(members, device))
    found = sampler.logprobs(samples, together=6)
    assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-4)
    assert [len(members) for members in packs] == [
        6 * size for size in {1: [1] * 7, 6: [1] * 7, 13: [2, 2, 2, 1], 64: [7]}[micro_batch_size]
    ]
    for members in packs:
        counts = Counter(tuple(sample.prompt) for sample in members)
        assert all(count % 6 == 0 for count in counts.values())
    # Each prompt occurs once in its pack.
    first = {tuple(sample.prompt) for sample in packs[0]}
    assert pack(packs[0]).input_ids.shape[1] == sum(map(len, first)) + 2 * len(packs[0])


# ---------------------------------------------------------------------------------------------------------- calibration


def test_a_known_temperature_is_recovered():
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(20000, 4, generator=generator, dtype=torch.float64) * 2
    golds = torch.multinomial(truth.softmax(-1), 1, generator=generator).flatten().tolist()
    for temperature in (0.3, 1.0, 4.0):
        found = fit(truth * temperature + 5, golds)  # adding a constant has no effect
        assert found.temperature == pytest.approx(temperature, rel=0.05)
        assert found.nll[1] <= found.nll[0] + 1e-9 and found.ece[1] < 0.02
    assert found.ece[0] > 0.05
    best = min((fit_at(truth * 4, golds, t), t) for t in (3.0, 3.5, 4.0, 4.5, 5.0))
    assert best[1] == 4.0


def test_correct_rows_do_not_give_certain_answers():
    """With one wrong row of n and the same logit gap in all rows, the optimal confidence is (n - 1) / n."""
    right = fit(torch.tensor([[5.0, 0.0]] * 60), [0] * 60)
    assert right.temperature == 1 and "nothing to fit" in str(right)
    for n, gap in ((60, 5.0), (9, 0.5), (1000, 20.0)):
        found = fit(torch.tensor([[gap, 0.0]] * n), [0] * (n - 1) + [1])
        assert found.temperature == pytest.approx(gap / math.log(n - 1), rel=1e-3)


def fit_at(logits, golds, temperature):
    rows = (logits / temperature).log_softmax(-1)
    return -sum(rows[k, gold].item() for k, gold in enumerate(golds)) / len(golds)
