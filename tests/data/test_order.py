"""The order of the batches: epochs, balance, mixing of tasks."""

from collections import Counter

import pytest

from extensions.data import (
    BatchOrder,
    Example,
    rows_of_epoch,
)
from extensions.tasks import TASKS

COLA, SST2, STSB = (TASKS[name] for name in ("cola", "sst2", "stsb"))


def make(task, labels, first=0, pairs=False):
    return [
        Example(task, i, dict.fromkeys(task.fields, f"{task.name} {i}"), label, f"pair {i // 2}" if pairs else None)
        for i, label in enumerate(labels, start=first)
    ]


def names(batch):
    return [(example.task.name, example.index) for example in batch]


SETS = {
    "one task": make(COLA, ["1"] * 23 + ["0"] * 9),
    "two tasks": make(COLA, ["1", "0"] * 20) + make(SST2, ["1"] * 7 + ["0"] * 3),
    "with regression": make(COLA, ["1", "0"] * 8) + make(STSB, ["1.0", "2.5", "5.0"] * 5),
    "pairs": make(COLA, ["1", "0"] * 16, pairs=True),
    "one row": make(COLA, ["1"]),
}


@pytest.mark.parametrize("balanced", [False, True], ids=["plain", "balanced"])
@pytest.mark.parametrize("batch_size", [1, 4, 7, 16])
@pytest.mark.parametrize("examples", SETS.values(), ids=SETS)
def test_each_epoch_is_a_permutation(examples, batch_size, balanced):
    order, size = BatchOrder(examples, batch_size, 3, balanced), len(examples)
    epochs = 3
    drawn = [e for step in range(-(-epochs * size // batch_size)) for e in order.batch(step)]
    whole = [names(drawn[k * size : (k + 1) * size]) for k in range(epochs)]
    for epoch in whole:
        assert sorted(epoch) == sorted(names(examples))
    if size > 10:
        assert whole[0] != whole[1] != whole[2], "each epoch has a different order"
    assert all(len(order.batch(step)) == batch_size for step in (0, 1, 1000))


@pytest.mark.parametrize("balanced", [False, True], ids=["plain", "balanced"])
@pytest.mark.parametrize("examples", SETS.values(), ids=SETS)
def test_a_batch_is_a_pure_function_of_seed_and_step(examples, balanced):
    forward = BatchOrder(examples, 4, 5, balanced)
    batches = [names(forward.batch(step)) for step in range(30)]
    for step in (29, 3, 17, 3):
        assert names(forward.batch(step)) == batches[step]
        assert names(BatchOrder(examples, 4, 5, balanced).batch(step)) == batches[step]
    if len(examples) > 1:
        other = BatchOrder(examples, 4, 6, balanced)
        assert [names(other.batch(step)) for step in range(30)] != batches


@pytest.mark.parametrize("balanced", [False, True], ids=["plain", "balanced"])
@pytest.mark.parametrize("batch_size", [2, 4, 8])
def test_pairs_come_in_one_batch(batch_size, balanced):
    order = BatchOrder(SETS["pairs"], batch_size, 1, balanced)
    for step in range(40):
        pairs = Counter(example.pair for example in order.batch(step))
        assert all(count % 2 == 0 for count in pairs.values())


@pytest.mark.parametrize("balanced", [False, True], ids=["plain", "balanced"])
def test_pairs_stay_adjacent_among_single_rows(balanced):
    examples = SETS["pairs"] + make(SST2, ["1", "0", "1"] * 5)
    order = BatchOrder(examples, len(examples), 1, balanced)
    for epoch in range(5):
        places = [example.pair for example in order.batch(epoch)]
        for k, pair in enumerate(places):
            if pair is not None:
                assert pair in (places[k - 1] if k else None, places[k + 1] if k + 1 < len(places) else None)


@pytest.mark.parametrize("batch_size", [4, 8, 12, 16])
@pytest.mark.parametrize("seed", range(3))
def test_balanced_batches_are_balanced(batch_size, seed):
    # Two classes of equal size, each spread evenly: the k-th of n lies in [k/n, (k+1)/n), so in any window the
    # counts of the classes differ by less than 4. They are integers with an even sum, so they differ by at most 2.
    size = 240
    order = BatchOrder(make(COLA, ["1"] * (size // 2) + ["0"] * (size // 2)), batch_size, seed, True)
    for step in range(size // batch_size):
        counts = Counter(example.label for example in order.batch(step))
        assert abs(counts["0"] - counts["1"]) <= 2


def test_without_balance_batches_vary_more():
    examples = make(COLA, ["1"] * 120 + ["0"] * 120)
    counts = [Counter(e.label for e in BatchOrder(examples, 12, 0, False).batch(step))["1"] for step in range(20)]
    assert max(counts) - min(counts) > 2


@pytest.mark.parametrize("seed", range(3))
def test_tasks_are_mixed_in_proportion(seed):
    examples = make(COLA, ["1", "0"] * 120) + make(SST2, ["1", "0"] * 40) + make(STSB, ["2.5"] * 80)
    order = BatchOrder(examples, 20, seed, True)
    for step in range(len(examples) // 20):
        counts = Counter(example.task.name for example in order.batch(step))
        # 12, 4 and 4 on average; each class deviates by less than 2, and a task by at most the sum over its classes
        for name, mean in (("cola", 12), ("sst2", 4), ("stsb", 4)):
            assert abs(counts[name] - mean) <= 6
    plain = BatchOrder(examples, 100, seed, False)
    drawn = Counter(example.task.name for step in range(4) for example in plain.batch(step))
    assert drawn == {"cola": 240, "sst2": 80, "stsb": 80}


# ----------------------------------------------------------------------------------------------------------- mixing


@pytest.mark.parametrize(
    ("mixing", "expected"),
    [
        ("proportional", {"a": 900, "b": 90, "c": 10}),
        ("capped", {"a": 100, "b": 90, "c": 10}),
        ("temperature", {"a": 705, "b": 223, "c": 74}),  # 1000 * sqrt(n) / (30 + 9.4868 + 3.1623), by hand
        ("uniform", {"a": 333, "b": 333, "c": 333}),
    ],
)
def test_rows_of_an_epoch(mixing, expected):
    found = rows_of_epoch({"a": 900, "b": 90, "c": 10}, mixing, cap=100, temperature=2.0)
    assert found == pytest.approx(expected, abs=2)
    assert rows_of_epoch({"a": 900, "b": 90, "c": 10}, "temperature", 1, 1.0) == {"a": 900, "b": 90, "c": 10}


@pytest.mark.parametrize("balanced", [False, True], ids=["plain", "balanced"])
def test_tasks_keep_their_shares_and_no_row_repeats_within_a_pass(balanced):
    """Tasks of 40 and 8 rows contribute 15 and 20 rows per epoch: 3 and 20 passes after 8 epochs."""
    examples = make(COLA, ["1", "0"] * 20) + make(SST2, ["1", "0"] * 4)
    order = BatchOrder(examples, 5, 2, balanced, {"cola": 15, "sst2": 20})
    drawn = [example for step in range(7 * 8) for example in order.batch(step)]
    for epoch in range(8):
        part = Counter(example.task.name for example in drawn[35 * epoch : 35 * (epoch + 1)])
        assert part == {"cola": 15, "sst2": 20}
    seen = Counter(names(drawn))
    assert {seen["cola", i] for i in range(40)} == {3} and {seen["sst2", i] for i in range(8)} == {20}
    again = BatchOrder(examples, 5, 2, balanced, {"cola": 15, "sst2": 20})
    assert names(again.batch(33)) == names(order.batch(33)), "a function of seed and step only"
    passes = [names(e for e in drawn if e.task is SST2)[8 * k : 8 * (k + 1)] for k in range(20)]
    if not balanced:
        assert len({tuple(p) for p in passes}) > 10, "each pass has a different order"


def test_mixing_keeps_pairs_together():
    examples = make(COLA, ["1", "0"] * 16, pairs=True) + make(SST2, ["1", "0"] * 3)
    order = BatchOrder(examples, 2, 1, False, {"cola": 10, "sst2": 6})
    for epoch in range(6):
        drawn = [e for step in range(8 * epoch, 8 * epoch + 8) for e in order.batch(step) if e.task is COLA]
        assert len(drawn) == 10 and set(Counter(e.pair for e in drawn).values()) == {2}


def test_mixing_with_all_rows_does_not_change_the_order():
    examples = SETS["two tasks"]
    sizes = Counter(example.task.name for example in examples)
    plain, mixed = BatchOrder(examples, 4, 3, False), BatchOrder(examples, 4, 3, False, sizes)
    assert [names(plain.batch(step)) for step in range(40)] == [names(mixed.batch(step)) for step in range(40)]


@pytest.mark.parametrize("steps", [0, 1, 3, 8, 50])
@pytest.mark.parametrize("rows", [None, {"cola": 5, "sst2": 20}], ids=["all", "mixed"])
def test_rows_until_are_those_of_the_batches(steps, rows):
    """Through several epochs, with a task that contributes a part of its rows and one that repeats."""
    made = make(COLA, ["1", "0"] * 6) + make(SST2, ["1"] * 4 + ["0"] * 3)
    order = BatchOrder(made, 4, 1, True, rows)
    seen = {name for step in range(steps) for name in names(order.batch(step))}
    assert names(order.rows_until(steps)) == [name for name in names(made) if name in seen]
