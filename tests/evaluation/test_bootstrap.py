"""Weighted metrics of resamples: equal to scikit-learn and scipy on the repeated rows."""

import random

import numpy as np
import pytest
from own_answers import TOPICS, own
from support import THREE

from extensions.evaluation import bootstrap
from extensions.evaluation.bootstrap import Resampler, weighted_metrics
from extensions.evaluation.metrics import (
    GROUP_METRICS,
    Prediction,
    arrays_of,
    groups_of,
    metrics_of,
    row_metric,
    score,
)
from extensions.tasks import TASKS

SCORES = own(score_range=[-1, 3], extra_metrics=["mae", "rmse", "r2"])
MATTHEWS = TASKS["cola"].model_copy(update={"positive": "1", "extra_metrics": ["f1", "f1a", "f1_macro"]})


def drawn_pairs(task, rng, count, constant=None, wrong=0.2):
    """(gold, answer) of rows. constant: "gold", "answer" or "both": the same in every row."""

    def one():
        if task.is_regression:
            return str(rng.choice([-1, 0.1, 0.3, 1.7, 3]))
        return (
            task.join_labels(rng.sample(list(task.labels), rng.randint(0, 3)))
            if task.multi_label
            else rng.choice(list(task.labels))
        )

    pairs, gold, answer = [], one(), one()
    for _ in range(count):
        gold = gold if constant in ("gold", "both") else one()
        answer = answer if constant in ("answer", "both") else None if rng.random() < wrong else one()
        pairs.append((gold, answer if answer is None or not task.is_regression else float(answer)))
    return pairs


def made_of(task, pairs):
    return [Prediction(task.name, i, "", answer, gold) for i, (gold, answer) in enumerate(pairs)]


KINDS = pytest.mark.parametrize(
    "task", [MATTHEWS, THREE, TOPICS, SCORES], ids=["two", "three", "multi-label", "scores"]
)


@KINDS
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "count, constant, wrong",
    [
        (1, None, 0), (1, None, 1), (2, None, 0.2), (3, None, 0.2), (30, None, 0.2), (30, None, 1),
        (30, "gold", 0.2), (30, "answer", 0), (30, "both", 0), (2, "gold", 0.2),
    ],
)  # fmt: skip
def test_weighted_metrics_are_those_of_the_repeated_rows(task, seed, count, constant, wrong):
    rng = random.Random(f"{seed} {count} {constant} {wrong}")
    golds, answers = arrays_of(task, made_of(task, drawn_pairs(task, rng, count, constant, wrong)))
    weights = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), 20)
    if count > 1:  # one row only, and a row that is drawn often
        weights = np.concatenate([weights, [[count] + [0] * (count - 1), [1] * (count - 1) + [100 * count]]])
    positive = None if task.positive is None else list(task.labels).index(task.positive)
    found = weighted_metrics(weights.astype(float), golds, answers, len(task.labels), positive)
    assert found.keys() >= {*metrics_of(task)}
    for name, values in found.items():
        expected = [row_metric(name, task, golds.repeat(row, axis=0), answers.repeat(row, axis=0)) for row in weights]
        assert values == pytest.approx(expected, abs=1e-9), name


def test_ranks_of_many_different_scores():
    """Continuous values and many ties: scipy's ranks of the repeated rows."""
    rng = np.random.default_rng(0)
    for values in (rng.normal(size=300), rng.integers(0, 4, 300), np.full(300, 0.1)):
        golds, answers = values.astype(float), values + rng.normal(size=300)
        weights = rng.multinomial(300, np.full(300, 1 / 300), 5)
        found = weighted_metrics(weights.astype(float), golds, answers, 0)
        for name in ("spearman", "pearson", "r2"):
            expected = [row_metric(name, SCORES, golds.repeat(row), answers.repeat(row)) for row in weights]
            assert found[name] == pytest.approx(expected, abs=1e-9)


MULTIRC, RECORD, AXG = TASKS["multirc"], TASKS["record"], TASKS["axg"]


def questions(task, rng, count):
    """Predictions of `count` questions of 1 to 5 rows (pairs in AX-g), rows shuffled."""
    made = []
    for q in range(count):
        answers = rng.choice([["Rome"], ["Oslo", "Old Rome"]])
        for _ in range(2 if task is AXG else rng.randint(1, 5)):
            kept = {"paragraph": q, "question": 0, "passage": 0, "query": q, "pair": q, "answers": answers}
            kept["entity"] = rng.choice(["Rome", "Oslo", "Bob"])
            gold, answer = rng.choice(list(task.labels)), rng.choice([*task.labels, None])
            made.append(Prediction(task.name, len(made), "", answer, gold, kept, rng.random()))
    rng.shuffle(made)
    return made


@pytest.mark.parametrize("task", [MULTIRC, RECORD, AXG], ids=lambda task: task.name)
def test_resampled_questions_are_whole(task):
    """A draw is scored as its questions, written out, are."""
    made = questions(task, random.Random(0), 40)
    golds, answers = arrays_of(task, made)
    index = {id(p): i for i, p in enumerate(made)}
    groups = [[index[id(p)] for p in group] for group in groups_of(task, made)]
    values = {
        name: np.array([GROUP_METRICS[name](task, [made[i] for i in rows]) for rows in groups])
        for name in metrics_of(task)
        if name in GROUP_METRICS
    }
    resampler = Resampler.of(golds, answers, groups, values)
    assert resampler.counts.sum() == 40 and len(resampler.counts) < 40, "some questions are interchangeable"
    # The questions of each distinct kind, found again by their content.
    rows = [tuple(zip(golds[r].tolist(), answers[r].tolist(), strict=True)) for r in groups]
    content = [(sorted(r), *(values[name][q] for name in values)) for q, r in enumerate(rows)]
    pairs = list(zip(resampler.golds.tolist(), resampler.answers.tolist(), strict=True))
    kinds = []
    for u, row in enumerate(resampler.rows.toarray().astype(int)):
        own_rows = sorted(pair for pair, times in zip(pairs, row, strict=True) for _ in range(times))
        kinds.append((own_rows, *(resampler.values[name][u] for name in values)))
    assert [content.count(kind) for kind in kinds] == resampler.counts.tolist()
    drawn = next(resampler.draws())[:10]
    weights = (resampler.rows.T @ drawn.T).T
    positive = None if task.positive is None else list(task.labels).index(task.positive)
    found = weighted_metrics(weights, resampler.golds, resampler.answers, len(task.labels), positive)
    for k, draw in enumerate(drawn.astype(int)):
        copies = [
            Prediction(p.task, p.index, "", p.answer, p.gold, p.kept | dict.fromkeys(task.group_by, f"{kind} {copy}"),
                       p.positive_probability)
            for kind, times in enumerate(draw)
            for copy in range(times)
            for p in groups_of(task, made)[content.index(kinds[kind])]
        ]  # fmt: skip
        expected = score(task, copies, intervals=False)["metrics"]
        for name, value in expected.items():
            of_draw = draw @ resampler.values[name] / 40 if name in values else found[name][k]
            assert of_draw == pytest.approx(value), name


def test_the_draws_are_multinomial_and_independent_of_the_chunks(monkeypatch):
    golds = np.array([0, 0, 0, 1])
    resampler = Resampler.of(golds, golds, [[0], [1], [2], [3]], {})
    assert resampler.counts.tolist() == [3, 1]
    whole = np.concatenate(list(resampler.draws()))
    assert whole.shape == (1000, 2) and (whole.sum(1) == 4).all()
    assert whole[:, 0].mean() == pytest.approx(3, abs=0.1) and whole[:, 0].var() == pytest.approx(0.75, abs=0.1)
    monkeypatch.setattr(bootstrap, "CHUNK", 7 * 2)
    chunks = list(resampler.draws())
    assert len(chunks) == 143 and np.concatenate(chunks).tolist() == whole.tolist()


@KINDS
def test_intervals_against_resampled_rows(task):
    """Percentiles of 400 resamples of the rows themselves, by scikit-learn and scipy."""
    golds, answers = arrays_of(task, made_of(task, drawn_pairs(task, random.Random(3), 200)))
    found = Resampler.of(golds, answers, [[i] for i in range(200)], {}).intervals(
        metrics_of(task), len(task.labels), 0 if task.positive else None
    )
    rng = np.random.default_rng(1)
    name = task.metrics[0]
    picks = [rng.integers(200, size=200) for _ in range(400)]
    expected = np.percentile([row_metric(name, task, golds[p], answers[p]) for p in picks], [2.5, 97.5])
    assert found[name] == pytest.approx(expected, abs=0.03)
