"""Metrics of questions: MultiRC, AX-g, ReCoRD."""

from dataclasses import replace

import pytest

from extensions.evaluation.metrics import (
    Prediction,
    best_candidate,
    groups_of,
    score,
)
from extensions.tasks import TASKS

COLA, MULTIRC, RECORD, AXG = (TASKS[name] for name in ("cola", "multirc", "record", "axg"))


def predictions(task, pairs):
    return [Prediction(task.name, i, "", answer, gold) for i, (gold, answer) in enumerate(pairs)]


def test_multirc_by_hand():
    # (paragraph, question), gold, answer; the rows of the first question are not adjacent
    rows = [
        ((0, 0), "1", "1"),
        ((0, 1), "1", "1"),
        ((0, 0), "0", "0"),  # question (0, 0): all right
        ((0, 1), "1", "0"),  # (0, 1): a false negative
        ((1, 0), "0", "0"),  # (1, 0): all right, and a different question from (0, 0)
        ((1, 1), "0", "1"),  # (1, 1): a false positive
        ((1, 1), "1", "1"),
        ((2, 2), "0", None),  # (2, 2): a wrong format is wrong
        ((3, 3), "1", None),  # (3, 3): and no positive answer
    ]
    made = [
        Prediction("multirc", i, "", answer, gold, {"paragraph": group[0], "question": group[1], "answer": i})
        for i, (group, gold, answer) in enumerate(rows)
    ]
    result = score(MULTIRC, made)
    # over all answers of all questions: tp 3, fp 1, fn 2
    assert result["metrics"]["f1a"] == pytest.approx(6 / 9)
    assert result["metrics"]["exact_match"] == pytest.approx(2 / 6)
    assert result["metrics"]["accuracy"] == pytest.approx(5 / 9)
    assert result["score"] == pytest.approx((6 / 9 + 2 / 6) / 2)
    assert [[p.index for p in group] for group in groups_of(MULTIRC, made)] == [[0, 2], [1, 3], [4], [5, 6], [7], [8]]


@pytest.mark.parametrize(
    "pairs, parity",
    [
        ([("Y", "Y")], 1),
        ([("N", "N")], 1),  # regardless of the gold label
        ([("Y", "N")], 0),
        ([(None, None)], 0),  # two wrong formats do not count as equal answers
        ([("Y", None)], 0),
        ([(None, "N")], 0),
        ([("Y", "Y"), ("Y", "N"), ("N", "N"), (None, "N")], 2 / 4),
    ],
)
def test_gender_parity(pairs, parity):
    label = {"Y": "entailment", "N": "not_entailment", None: None}
    made = [
        Prediction("axg", 2 * k + i, "", label[answer], "entailment", {"idx": 2 * k + i, "pair": k})
        for k, pair in enumerate(pairs)
        for i, answer in enumerate(pair)
    ]
    accuracy = sum(answer == "Y" for pair in pairs for answer in pair) / len(made)
    result = score(AXG, made)
    assert result["metrics"]["gender_parity"] == pytest.approx(parity)
    assert result["metrics"]["accuracy"] == pytest.approx(accuracy)
    assert result["score"] == pytest.approx((parity + accuracy) / 2)


def candidates(query, answers, entities, sampled=None, positive_probabilities=None, first=0):
    """Candidates of one ReCoRD query, in the order of the text."""
    return [
        Prediction(
            "record",
            first + i,
            "",
            sampled[i] if sampled else "false",
            "false",
            {"passage": 0, "query": query, "entity": entity, "answers": answers},
            positive_probabilities[i] if positive_probabilities else None,
        )
        for i, entity in enumerate(entities)
    ]


@pytest.mark.parametrize(
    "entity, answers, f1, em",
    [
        ("Anna", ["Anna"], 1, 1),
        ("Anna", ["Bob"], 0, 0),
        ("OBAMA", ["Obama"], 1, 1),
        ("the White House", ["White House"], 1, 1),
        ("White House", ["A  White \n House"], 1, 1),
        ("Theodore", ["odore"], 0, 0),  # an article is removed only as a whole word
        ("U.S.", ["US"], 1, 1),
        ("Jean-Luc", ["JeanLuc"], 1, 1),  # punctuation is removed, not replaced by a space
        ("Jean-Luc", ["Jean Luc"], 0, 0),
        ("Barack Obama", ["Obama"], 2 / 3, 0),  # precision 1/2, recall 1
        ("New York City", ["York, New"], 4 / 5, 0),  # precision 2/3, recall 1
        ("York New", ["New York"], 1, 0),  # token order matters for EM only
        ("Smith Smith", ["Smith"], 2 / 3, 0),  # repeated tokens count
        ("New York", ["Boston", "New York City", "york"], 4 / 5, 0),  # 0, 4/5, 2/3: the best
        ("New York", ["Boston", "the new york", "york"], 1, 1),
    ],
)
def test_record_is_compared_as_in_squad(entity, answers, f1, em):
    made = candidates(0, answers, ["Nobody", entity], positive_probabilities=[0.1, 0.2])
    result = score(RECORD, made)
    assert result["metrics"]["squad_f1"] == pytest.approx(f1)
    assert result["metrics"]["squad_em"] == em
    assert result["score"] == pytest.approx((f1 + em) / 2)


def test_record_is_a_mean_over_queries():
    """A query with many candidates counts as one with two; one query may share its entities with another."""
    made = [
        *candidates(3, ["Anna"], ["Bob", "Anna"], positive_probabilities=[0.4, 0.6]),  # 1, 1
        *candidates(
            8, ["Bob Lee"], ["Anna", "Bob", "Rome", "Oslo"], positive_probabilities=[0.1, 0.9, 0.2, 0.3], first=2
        ),  # 2/3, 0
        *candidates(5, ["Anna"], ["Anna", "Bob", "Rome"], positive_probabilities=[0.8, 0.81, 0.1], first=6),  # 0, 0
    ]
    result = score(RECORD, made)
    assert result["metrics"]["squad_f1"] == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert result["metrics"]["squad_em"] == pytest.approx(1 / 3)
    assert result["metrics"]["accuracy"] == 1, "over single candidates, as sampled"


YES, NO = "true", "false"


@pytest.mark.parametrize(
    "sampled, positive_probabilities, best",
    [
        ([YES, NO, NO], [0.2, 0.1, 0.9], 2),  # positive_probability decides, regardless of the sampled answers
        ([YES, None, NO], [0.0, 1e-30, 0.0], 1),
        ([NO, NO, NO], [0.01, 0.03, 0.02], 1),  # there is an answer even without a Yes
        ([NO, YES, YES], [0.5, 0.7, 0.7], 1),  # ties go to the first
        ([NO, NO, NO], [0.0, 0.0, 0.0], 0),
        ([NO, None, YES], None, 2),  # without positive_probability: Yes before a wrong format before No
        ([NO, None, None], None, 1),
        ([NO, NO, NO], None, 0),
        ([NO, YES, YES], None, 1),
        ([NO, None, YES], [0.9, 0.8, None], 2),  # some missing: all are ignored
        ([NO, YES, NO], [None, 0.1, 0.9], 1),
    ],
)
def test_the_best_candidate(sampled, positive_probabilities, best):
    made = candidates(0, ["-"], "ABC", sampled, positive_probabilities)
    assert best_candidate(RECORD, made) == made[best]
    assert best_candidate(RECORD, made[::-1]) == made[best], "first in the text, not in the list"


def test_candidates_are_ranked_by_log_odds():
    """From 17 nats on a float32 probability is 1, from 37 on a float64 one, and the first entity would be chosen."""
    made = candidates(0, ["-"], "ABC", [NO, YES, YES], [1.0, 1.0, 1.0])
    ranked = [replace(p, positive_log_odds=odds) for p, odds in zip(made, [38.0, 41.5, 40.0], strict=True)]
    assert best_candidate(RECORD, ranked) == ranked[1]
    older = [ranked[0], replace(ranked[1], positive_log_odds=None), replace(ranked[2], positive_probability=0.9)]
    assert best_candidate(RECORD, older) == older[0], "a record without log-odds: by probability"


def test_groups_of_predictions():
    singles = predictions(COLA, [("1", "1"), ("0", "0"), ("1", "0")])
    assert groups_of(COLA, singles) == [[p] for p in singles]
    made = [Prediction("axg", i, "", None, None, {"pair": pair}) for i, pair in enumerate([7, 3, "7", 1, 3])]
    found = [[p.index for p in group] for group in groups_of(AXG, made)]
    assert found == [[0, 2], [1, 4], [3]], "in order of first appearance; numbers and their text are the same"
