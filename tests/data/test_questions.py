"""Rows of one question: groups, subsamples that keep questions whole, and candidate pairs for training."""

import random

import pytest

from extensions.data import Example, by_question, subsample_evenly
from extensions.data.sampling import sample_candidate_pair
from extensions.tasks import TASKS

COLA, SST2, MULTIRC, RECORD, AXG = (TASKS[name] for name in ("cola", "sst2", "multirc", "record", "axg"))


def questions(task, sizes, first=0):
    """Examples of questions with `sizes` rows, one question after the other."""
    rows = [group for group, size in enumerate(sizes) for _ in range(size)]
    return [
        Example(
            task,
            first + i,
            {},
            None,
            None,
            {**dict.fromkeys(task.source.keep, i), **dict.fromkeys(task.group_by, group)},
        )
        for i, group in enumerate(rows)
    ]


def indices(found):
    return [[example.index for example in group] for group in found]


def test_groups_of_rows():
    rows = questions(COLA, [1] * 3)
    assert by_question(rows) == [[row] for row in rows]
    assert indices(by_question(questions(MULTIRC, [2, 1, 3]))) == [[0, 1], [2], [3, 4, 5]]
    # Question numbers restart in each paragraph; a question's rows need not be adjacent; numbers may be text.
    places = [(1, 0), (0, 0), (1, 0), (0, 1), ("0", "0"), (1, 1)]
    rows = [Example(MULTIRC, i, {}, "1", None, {"paragraph": p, "question": q}) for i, (p, q) in enumerate(places)]
    assert indices(by_question(rows)) == [[0, 2], [1, 4], [3], [5]]
    # Equal numbers in different tasks are different questions.
    mixed = [*questions(COLA, [1]), *questions(SST2, [1]), *questions(AXG, [2]), *questions(RECORD, [2])]
    assert [len(group) for group in by_question(mixed)] == [1, 1, 2, 2]


def test_subsamples_are_even():
    rows = questions(COLA, [1] * 10)
    assert subsample_evenly(rows, None) == subsample_evenly(rows, 10) == subsample_evenly(rows, 99) == rows
    assert [row.index for row in subsample_evenly(rows, 5)] == [0, 2, 4, 6, 8]
    assert [row.index for row in subsample_evenly(rows, 3)] == [0, 3, 6]
    many = questions(COLA, [1] * 1043)
    assert len({row.index for row in subsample_evenly(many, 200)}) == 200


def test_subsamples_keep_questions_whole():
    rows = questions(AXG, [2] * 10)
    assert [row.index for row in subsample_evenly(rows, 10)] == [0, 1, 4, 5, 8, 9, 12, 13, 16, 17]
    assert [row.index for row in subsample_evenly(rows, 7)] == [0, 1, 6, 7, 12, 13], "three pairs fit in seven rows"
    assert [row.index for row in subsample_evenly(rows, 1)] == [0, 1], "at least one"
    # Rows of a question that are not adjacent become adjacent.
    rows = [Example(AXG, i, {}, None, None, {"pair": i % 3}) for i in range(6)]
    assert [row.index for row in subsample_evenly(rows, 4)] == [0, 3, 1, 4]


@pytest.mark.parametrize("task", [MULTIRC, RECORD], ids=lambda task: task.name)
@pytest.mark.parametrize("limit", [1, 60, 200, 500, 1500])
def test_subsamples_have_about_the_requested_size(task, limit):
    rng = random.Random(limit)
    rows = questions(task, [rng.randint(2, 8) for _ in range(400)])
    found = subsample_evenly(rows, limit)
    whole = {group[0].index: group for group in by_question(rows)}
    assert [row for group in by_question(found) for row in group] == found
    assert all(group == whole[group[0].index] for group in by_question(found))
    assert [row.index for row in found] == sorted({row.index for row in found})
    taken = len(by_question(found))
    assert taken == max(1, limit * 400 // len(rows))
    # Questions have 5 rows on average, with a standard deviation of 2; one question may not fit.
    assert abs(len(found) - limit) <= 8 + 3 * 2 * taken**0.5
    firsts = [row.kept[task.group_by[0]] for row in found]
    assert firsts[0] == 0 and firsts[-1] == (taken - 1) * 400 // taken, "from the whole file"


def queries(count=20):
    """Five candidates per query, of which one or two are right, in any position."""
    rng = random.Random(0)
    rows = []
    for query in range(count):
        right = rng.sample(range(5), rng.randint(1, 2))
        for k in range(5):
            kept = {"passage": query // 2, "query": query, "entity": f"E{k}", "answers": ["E"]}
            label = "true" if k in right else "false"
            rows.append(Example(RECORD, len(rows), {"statement": f"{query} {k}"}, label, None, kept))
    return rows


def test_a_training_query_keeps_one_right_and_one_wrong_candidate():
    rows = queries()
    found = sample_candidate_pair(rows, seed=0)
    assert sample_candidate_pair(queries(), seed=0) == found
    assert [example.index for example in found] == list(range(40))
    by_statement = {row.fields["statement"]: row for row in rows}
    for k in range(20):
        pair = found[2 * k : 2 * k + 2]
        assert {example.label for example in pair} == {"true", "false"}
        assert {example.kept["query"] for example in pair} == {k}
        for example in pair:
            was = by_statement[example.fields["statement"]]
            assert (example.task, example.label, example.kept) == (was.task, was.label, was.kept)
    pairs = [example.pair for example in found]
    assert None not in pairs and pairs[::2] == pairs[1::2] and len(set(pairs)) == 20
    assert sample_candidate_pair(rows[:50], seed=0) == found[:20], "a query is drawn independently of the others"


def test_another_seed_keeps_other_candidates():
    chosen = [{example.fields["statement"] for example in sample_candidate_pair(queries(), seed)} for seed in range(30)]
    assert len(set(map(frozenset, chosen))) == 30
    assert set().union(*chosen) == {row.fields["statement"] for row in queries()}, "every candidate can be drawn"


def test_a_query_without_a_wrong_candidate_keeps_a_right_one():
    rows = [row for row in queries(3) if row.kept["query"] != 1 or row.label == "true"]
    found = sample_candidate_pair(rows, seed=0)
    assert [example.kept["query"] for example in found] == [0, 0, 1, 2, 2]
    assert [example.index for example in found] == [0, 1, 2, 3, 4]
