"""Row metrics against values by hand, and all tasks' metrics against plain formulas and other libraries."""

import json
import math
import random
import string
from collections import Counter

import pytest
from own_answers import TOPICS
from scipy import stats
from sklearn import metrics as sklearn_metrics
from support import THREE

from extensions.evaluation.metrics import (
    WRONG_FORMAT,
    Prediction,
    score,
)
from extensions.tasks import TASKS, Task

COLA, SST2, STSB, CB = (TASKS[name] for name in ("cola", "sst2", "stsb", "cb"))
every_task = pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)


def predictions(task, pairs):
    return [Prediction(task.name, i, "", answer, gold) for i, (gold, answer) in enumerate(pairs)]


# ----------------------------------------------------------------------------------------------- metrics of rows


def test_classification_by_hand():
    # gold 1: three right, one wrong; gold 0: two right, two wrong -> tp 3, fn 1, tn 2, fp 2
    pairs = [("1", "1")] * 3 + [("1", "0")] + [("0", "0")] * 2 + [("0", "1")] * 2
    result = score(COLA, predictions(COLA, pairs))
    matthews = (3 * 2 - 2 * 1) / math.sqrt(5 * 4 * 4 * 3)
    assert result["metrics"] == {
        "matthews": pytest.approx(matthews),
        "accuracy": pytest.approx(5 / 8),
        "f1_macro": pytest.approx((2 / 3 + 4 / 7) / 2),  # 2 tp / (2 tp + fp + fn): 6 / 9 and 4 / 7
        "balanced_accuracy": pytest.approx((3 / 4 + 2 / 4) / 2),
    }
    assert result["score"] == pytest.approx(matthews) and result["samples"] == 8
    assert result["majority"] == 0.5
    assert result["format_error_rate"] == 0
    assert result["gold_shares"] == {"Yes": 0.5, "No": 0.5}
    assert result["predicted_shares"] == {"Yes": 5 / 8, "No": 3 / 8}


def test_wrong_formats_count_as_wrong():
    pairs = [("1", "1")] * 2 + [("1", None)] + [("0", "0")] * 2 + [("0", None)] * 3
    result = score(SST2, predictions(SST2, pairs))
    assert result["metrics"]["accuracy"] == pytest.approx(4 / 8)
    assert result["format_error_rate"] == pytest.approx(4 / 8)
    assert result["majority"] == pytest.approx(5 / 8)
    assert result["predicted_shares"] == {"Positive": 0.25, "Negative": 0.25, WRONG_FORMAT: 0.5}
    nothing = score(COLA, predictions(COLA, [("1", None), ("0", None)]))
    assert set(nothing["metrics"].values()) == {0.0}
    assert nothing["format_error_rate"] == 1.0


def test_a_wrong_format_is_a_separate_class():
    """Not the other label: Matthews has three classes, and a miss is not a false positive of another label."""
    pairs = [("1", "1")] * 3 + [("1", None)] + [("0", "0")] * 2 + [("0", "1")] + [("0", None)]
    # classes 1, 0, wrong; golds 4, 4, 0; answers 4, 2, 2; 5 of 8 right
    matthews = (5 * 8 - (4 * 4 + 4 * 2)) / math.sqrt((64 - (16 + 16)) * (64 - (16 + 4 + 4)))
    assert score(COLA, predictions(COLA, pairs))["metrics"]["matthews"] == pytest.approx(matthews)
    as_other = [(gold, answer or {"1": "0", "0": "1"}[gold]) for gold, answer in pairs]
    assert score(COLA, predictions(COLA, as_other))["metrics"]["matthews"] != pytest.approx(matthews)
    f1 = score(TASKS["mrpc"], predictions(TASKS["mrpc"], pairs))["metrics"]["f1"]
    # tp 3, fp 1, fn 1: the wrong format of a 0 is not a false positive.
    assert f1 == pytest.approx(2 * 3 / (2 * 3 + 1 + 1))


def test_f1_by_hand():
    # a: tp 2, fp 1, fn 2 -> 4/7.  b: tp 1, fp 1, fn 1 -> 1/2.  c: tp 1, fp 0, fn 0 -> 1. One wrong format.
    pairs = [("a", "a"), ("a", "a"), ("a", "b"), ("a", None), ("b", "b"), ("b", "a"), ("c", "c")]
    result = score(THREE, predictions(THREE, pairs))["metrics"]
    assert list(result) == ["f1_macro", "f1", "accuracy", "matthews", "balanced_accuracy"]
    assert result["f1"] == pytest.approx(4 / 7)
    assert result["f1_macro"] == pytest.approx((4 / 7 + 1 / 2 + 1) / 3)
    assert result["accuracy"] == pytest.approx(4 / 7)


def test_regression_by_hand():
    # golds 1 2 3 4, answers 2 1 4 3: both correlations 0.6
    pairs = list(zip(("1", "2.0", "3", "4.000"), (2.0, 1.0, 4.0, 3.0), strict=True))
    result = score(STSB, predictions(STSB, pairs))
    assert result["metrics"] == {
        "spearman": pytest.approx(0.6),
        "pearson": pytest.approx(0.6),
        "mae": 1.0,
        "rmse": 1.0,
        "r2": pytest.approx(1 - 4 / 5),
    }
    assert "majority" not in result and "predicted_shares" not in result and "gold_shares" not in result


def test_a_wrong_format_in_a_regression_counts_as_the_middle():
    pairs = [("0", 0.5), ("1", None), ("4", 3.0), ("5", None)]
    result = score(STSB, predictions(STSB, pairs))
    filled = [0.5, 2.5, 3.0, 2.5]
    assert result["metrics"]["pearson"] == pytest.approx(stats.pearsonr([0, 1, 4, 5], filled).statistic)
    assert result["metrics"]["spearman"] == pytest.approx(stats.spearmanr([0, 1, 4, 5], filled).statistic)
    assert result["format_error_rate"] == 0.5


@pytest.mark.parametrize("pairs", [[("1", 2.0)], [("1", 3.0), ("2", 3.0)], [("2", 1.0), ("2", 4.0)], [("1", None)] * 3])
def test_an_undefined_correlation_is_zero(pairs):
    result = score(STSB, predictions(STSB, pairs))
    for name in ("spearman", "pearson"):
        assert result["metrics"][name] == 0.0 and result["intervals"][name] == [0.0, 0.0]


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


def test_classes_and_confusion_by_hand():
    # The pairs of test_f1_by_hand: the wrong format of an a lowers a's recall, and no precision.
    pairs = [("a", "a"), ("a", "a"), ("a", "b"), ("a", None), ("b", "b"), ("b", "a"), ("c", "c")]
    result = score(THREE, predictions(THREE, pairs))
    words = [THREE.answer(label) for label in "abc"]
    assert result["classes"] == {
        words[0]: {"precision": pytest.approx(2 / 3), "recall": 0.5, "f1": pytest.approx(4 / 7), "support": 4},
        words[1]: {"precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 2},
        words[2]: {"precision": 1.0, "recall": 1.0, "f1": 1.0, "support": 1},
    }
    assert result["confusion"] == {"labels": words, "counts": [[2, 1, 0, 1], [1, 1, 0, 0], [0, 0, 1, 0]]}


@pytest.mark.parametrize("pairs", [[("a", "a")], [("a", None)] * 2, [("a", "b")] * 3, [("b", "b"), ("a", "b")]])
def test_labels_that_do_not_occur_have_finite_numbers(pairs):
    result = score(THREE, predictions(THREE, pairs))
    json.dumps(result, allow_nan=False)
    assert result["classes"][THREE.answer("c")] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0}
    assert sum(map(sum, result["confusion"]["counts"])) == len(pairs)


def test_classes_of_label_sets():
    """Each label is judged on its own; a wrong format is the empty set."""
    pairs = [("s, m", "s"), ("none", "m"), ("s", None), ("p", "p, m"), ("s, p", "s, p")]
    result = score(TOPICS, predictions(TOPICS, pairs))
    assert "confusion" not in result and "calibration" not in result
    assert result["classes"] == {
        "Sports": {"precision": 1.0, "recall": pytest.approx(2 / 3), "f1": pytest.approx(4 / 5), "support": 3},
        "Politics": {"precision": 1.0, "recall": 1.0, "f1": 1.0, "support": 2},
        "Money": {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 1},
    }


@pytest.mark.parametrize("seed", range(3))
def test_classes_against_scikit_learn(seed):
    rng = random.Random(seed)
    golds = rng.choices("abc", (5, 3, 2), k=80)
    answers = [gold if rng.random() < 0.6 else rng.choice(["a", "b", "c", None]) for gold in golds]
    found = score(THREE, predictions(THREE, zip(golds, answers, strict=True)))
    shown = [answer or "-" for answer in answers]
    expected = sklearn_metrics.classification_report(golds, shown, labels=["a", "b", "c"], output_dict=True)
    for label in "abc":
        row = expected[label]
        of_label = found["classes"][THREE.answer(label)]
        assert of_label == pytest.approx({**of_label, **{"f1": row["f1-score"], "recall": row["recall"]}})
        assert (of_label["precision"], of_label["support"]) == pytest.approx((row["precision"], row["support"]))
    counts = Counter(zip(golds, answers, strict=True))
    assert found["confusion"]["counts"] == [[counts[gold, answer] for answer in [*"abc", None]] for gold in "abc"]


def test_the_score_is_the_mean_of_the_benchmarks_metrics():
    # entailment: tp 1, fn 1 -> 2/3; neutral: tp 1, fp 1 -> 2/3; contradiction: tp 1 -> 1
    pairs = [("entailment", "entailment"), ("entailment", "neutral"), ("neutral", "neutral")]
    result = score(CB, predictions(CB, [*pairs, ("contradiction", "contradiction")]))
    assert result["score"] == pytest.approx(((2 / 3 + 2 / 3 + 1) / 3 + 3 / 4) / 2)
    # Pearson is reported but not part of the score: golds 1 2 3 4, answers 1 1 1 5 -> ranks 2 2 2 4
    result = score(STSB, predictions(STSB, [("1", 1.0), ("2", 1.0), ("3", 1.0), ("4", 5.0)]))
    spearman = stats.pearsonr([1, 2, 3, 4], [2, 2, 2, 4]).statistic
    assert result["score"] == pytest.approx(spearman)
    own = Task.model_validate(THREE.model_dump() | {"metrics": ["f1"], "extra_metrics": ["matthews"]})
    result = score(own, predictions(own, [("a", "a"), ("a", "b"), ("b", "b"), ("c", "c")]))
    always = ["accuracy", "f1_macro", "balanced_accuracy"]
    assert list(result["metrics"]) == ["f1", "matthews", *always], "always computed, not part of the score"
    assert result["score"] == pytest.approx(2 / 3)


# ------------------------------------------------------------------------------------------------ every task

# Gold labels of MultiRC's answers: (paragraph, question) -> golds. Question numbers restart in each paragraph.
QUESTIONS = {(0, 0): "10", (0, 1): "11", (1, 0): "000", (1, 1): "1011"}
# ReCoRD by query: candidates in order, answers. The first candidate of the queries is right, shares one of two
# tokens with the answer, and is wrong.
QUERIES = {
    4: (["Anna", "Bob"], ["Anna"]),
    5: (["Bob Smith", "Mr Smith", "Rome"], ["Mr. Smith"]),
    9: (["Rome", "Oslo", "Bob"], ["Oslo", "the OSLO"]),
}
ALWAYS_THE_FIRST = {"squad_f1": (1 + 0.5 + 0) / 3, "squad_em": (1 + 0 + 0) / 3}


def gold_rows(task):
    """(gold, kept columns) of a few rows, with every label, and the columns that `source.keep` names."""
    if task.name == "multirc":
        return [
            (gold, {"paragraph": paragraph, "question": question, "answer": answer})
            for (paragraph, question), golds in QUESTIONS.items()
            for answer, gold in enumerate(golds)
        ]
    if task.name == "record":
        return [
            (
                str(normal(entity) in map(normal, answers)).lower(),
                {"passage": query // 5, "query": query, "entity": entity, "answers": answers},
            )
            for query, (entities, answers) in QUERIES.items()
            for entity in entities
        ]
    if task.name == "axg":
        return [
            (gold, {"idx": i, "pair": i // 2}) for i, gold in enumerate(["entailment"] * 6 + ["not_entailment"] * 4)
        ]
    if task.is_regression:
        golds = ["0.0", "1.25", "5.0", "2.5", "3.75", "3.0"]
    else:
        golds = [label for i, label in enumerate(task.labels) for _ in range(3 + 2 * i)]
    return [(gold, dict.fromkeys(task.source.keep, i)) for i, gold in enumerate(golds)]


def answered(task, rows, answers, positive_probabilities=None):
    return [
        Prediction(task.name, i, "", answer, gold, kept, positive_probabilities[i] if positive_probabilities else None)
        for i, ((gold, kept), answer) in enumerate(zip(rows, answers, strict=True))
    ]


@every_task
def test_these_rows_have_the_columns_of_their_task(task):
    rows = gold_rows(task)
    assert all(set(kept) == set(task.source.keep) for _, kept in rows)
    if not task.is_regression:
        assert {gold for gold, _ in rows} == set(task.labels)


@every_task
def test_all_right_scores_one(task):
    rows = gold_rows(task)
    answers = [float(gold) if task.is_regression else gold for gold, _ in rows]
    result = score(task, answered(task, rows, answers))
    assert result["score"] == pytest.approx(1.0)
    assert set(result["metrics"]) >= {*task.metrics, *task.extra_metrics}
    perfect = {name: 0.0 if name in ("mae", "rmse") else 1.0 for name in result["metrics"]}
    assert result["metrics"] == pytest.approx(perfect)
    assert result["format_error_rate"] == (None if task.is_ranked else 0) and result["samples"] == len(rows)
    if not task.is_regression:
        assert result["predicted_shares"] == result["gold_shares"]


@every_task
def test_all_wrong_formats_score_zero(task):
    rows = gold_rows(task)
    result = score(task, answered(task, rows, [None] * len(rows)))
    expected = dict.fromkeys(result["metrics"], 0.0)
    if task.is_ranked:  # a query always has an answer: ties go to the first candidate
        expected |= {name: pytest.approx(value) for name, value in ALWAYS_THE_FIRST.items()}
    if task.is_regression:  # errors from the middle of the range
        expected |= {name: plain_metric(name, task, answered(task, rows, [2.5] * len(rows))) for name in OF_ERRORS}
    assert result["metrics"] == pytest.approx(expected)
    assert result["score"] == pytest.approx(0.5 * (0.5 + 1 / 3) if task.is_ranked else 0)
    assert result["format_error_rate"] == (None if task.is_ranked else 1.0)
    if not task.is_regression:
        assert result["predicted_shares"] == {task.answer(label): 0.0 for label in task.labels} | {WRONG_FORMAT: 1.0}


CONSTANTS = [
    (task, answer)
    for task in TASKS.values()
    for answer in ((0.0, 2.5, 5.0) if task.is_regression else tuple(task.labels))
]


@pytest.mark.parametrize("task, answer", CONSTANTS, ids=lambda value: value.name if isinstance(value, Task) else value)
def test_a_constant_answer(task, answer):
    rows = gold_rows(task)
    p = sum(gold == answer for gold, _ in rows) / len(rows)
    f1 = 2 * p / (1 + p)  # precision p, recall 1
    expected = {
        "accuracy": p,
        "matthews": 0.0,
        "f1": f1 if answer == task.positive else 0.0,
        "f1a": f1 if answer == task.positive else 0.0,
        "f1_macro": f1 / max(1, len(task.labels)),  # the other labels: 0
        "balanced_accuracy": 1 / max(1, len(task.labels)),
        "spearman": 0.0,
        "pearson": 0.0,
        "exact_match": 1 / 4,  # of QUESTIONS, only "11" is all 1, and only "000" all 0
        "gender_parity": 1.0,
        **ALWAYS_THE_FIRST,
    }
    made = answered(task, rows, [answer] * len(rows))
    result = score(task, made)
    expected |= {name: plain_metric(name, task, made) for name in OF_ERRORS if task.is_regression}
    assert result["metrics"] == {name: pytest.approx(expected[name]) for name in result["metrics"]}
    assert result["score"] == pytest.approx(sum(expected[name] for name in task.metrics) / len(task.metrics))
    assert result["format_error_rate"] == (None if task.is_ranked else 0)
    if not task.is_regression:
        assert result["predicted_shares"] == {task.answer(label): float(label == answer) for label in task.labels}
        assert result["gold_shares"][task.answer(answer)] == pytest.approx(p)
        assert result["majority"] == pytest.approx(max(Counter(g for g, _ in rows).values()) / len(rows))


# The same formulas without numpy, scipy, sklearn or transformers.


def plain_f1(pairs, label):
    tp = sum(gold == answer == label for gold, answer in pairs)
    wrong = sum((gold == label) != (answer == label) for gold, answer in pairs)  # fp + fn
    return 2 * tp / (2 * tp + wrong) if tp else 0.0


def plain_matthews(pairs):
    """Gorodkin's R_K, with the wrong format (None) as a class."""
    n, right = len(pairs), sum(gold == answer for gold, answer in pairs)
    golds, answers = (Counter(values) for values in zip(*pairs, strict=True))
    spread = (n * n - sum(v * v for v in golds.values())) * (n * n - sum(v * v for v in answers.values()))
    return (n * right - sum(golds[k] * answers[k] for k in golds)) / math.sqrt(spread) if spread else 0.0


def plain_pearson(xs, ys):
    x, y = (sum(values) / len(values) for values in (xs, ys))
    both = sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True))
    return both / math.sqrt(sum((a - x) ** 2 for a in xs) * sum((b - y) ** 2 for b in ys))


def ranks(values):
    """Ranks from 1; equal values get the mean of their ranks."""
    return [sum(v < value for v in values) + (sum(v == value for v in values) + 1) / 2 for value in values]


def normal(text):
    """SQuAD's normalisation: case, punctuation, articles and spaces are ignored."""
    words = "".join(c for c in text.lower() if c not in string.punctuation).split()
    return [word for word in words if word not in ("a", "an", "the")]


def plain_token_f1(one, other):
    one, other = normal(one), normal(other)
    common = sum(min(one.count(word), other.count(word)) for word in set(one))
    return 2 * common / (len(one) + len(other))


OF_ERRORS = ("mae", "rmse", "r2")


def plain_metric(name, task, made):
    pairs = [(p.gold, p.answer) for p in made]
    if name in OF_ERRORS:
        golds = [float(gold) for gold, _ in pairs]
        errors = [(2.5 if answer is None else answer) - gold for gold, (_, answer) in zip(golds, pairs, strict=True)]
        if name == "mae":
            return sum(map(abs, errors)) / len(errors)
        squares = sum(error**2 for error in errors)
        mean = sum(golds) / len(golds)
        return math.sqrt(squares / len(errors)) if name == "rmse" else 1 - squares / sum((g - mean) ** 2 for g in golds)
    if name == "balanced_accuracy":
        recalls = [[gold == answer for gold, answer in pairs if gold == label] for label in task.labels]
        return sum(sum(right) / len(right) for right in recalls) / len(recalls)
    if name == "accuracy":
        return sum(gold == answer for gold, answer in pairs) / len(pairs)
    if name == "matthews":
        return plain_matthews(pairs)
    if name in ("f1", "f1a"):
        return plain_f1(pairs, task.positive)
    if name == "f1_macro":
        return sum(plain_f1(pairs, label) for label in task.labels) / len(task.labels)
    if name in ("spearman", "pearson"):
        golds = [float(gold) for gold, _ in pairs]
        answers = [2.5 if answer is None else answer for _, answer in pairs]
        return plain_pearson(golds, answers) if name == "pearson" else plain_pearson(ranks(golds), ranks(answers))
    groups = {}
    for p in made:
        groups.setdefault(tuple(p.kept[column] for column in task.group_by), []).append(p)
    values = []
    for group in groups.values():
        if name == "exact_match":
            values.append(all(p.gold == p.answer for p in group))
        elif name == "gender_parity":
            values.append(group[0].answer == group[1].answer is not None)
        else:
            best = sorted(group, key=lambda p: p.positive_probability)[-1]
            compare = plain_token_f1 if name == "squad_f1" else lambda one, other: normal(one) == normal(other)
            values.append(max(compare(best.kept["entity"], answer) for answer in best.kept["answers"]))
    return sum(values) / len(values)


@pytest.mark.parametrize("seed", range(2))
@every_task
def test_any_answers_against_the_plain_formulas(task, seed):
    rng = random.Random(seed)
    rows = gold_rows(task)
    options = [0.5 * k for k in range(11)] if task.is_regression else list(task.labels)
    answers = [rng.choice([float(gold) if task.is_regression else gold, rng.choice(options), None]) for gold, _ in rows]
    made = answered(
        task, rows, answers, positive_probabilities=[rng.random() for _ in rows] if task.is_ranked else None
    )
    rng.shuffle(made)  # neither row order nor adjacency of a question's rows matters
    result = score(task, made)
    expected = {name: plain_metric(name, task, made) for name in result["metrics"]}
    assert result["metrics"] == {name: pytest.approx(value, abs=1e-12) for name, value in expected.items()}
    assert result["score"] == pytest.approx(sum(expected[name] for name in task.metrics) / len(task.metrics))
    wrong = None if task.is_ranked else pytest.approx(answers.count(None) / len(answers))
    assert result["format_error_rate"] == wrong
