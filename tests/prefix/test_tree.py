"""The packed row: its layout and its attention pattern."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from extensions.prefix.tree import Sample, common_prefix, pack

token_lists = st.lists(st.integers(0, 3), min_size=1, max_size=8)
samples_strategy = st.lists(
    st.builds(Sample, token_lists, st.lists(st.integers(0, 3), max_size=4)),
    min_size=1,
    max_size=6,
)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([[1, 2, 3], [1, 2, 4]], 2),
        ([[1, 2, 3]], 3),
        ([[1, 2], [1, 2, 3]], 2),
        ([[5], [6]], 0),
        ([[7, 7], [7, 7]], 2),
    ],
)
def test_common_prefix(rows, expected):
    assert common_prefix(rows) == expected


@settings(max_examples=200, deadline=None)
@given(samples_strategy, st.sampled_from([1, 3, 10**6]))
def test_each_sample_is_complete_and_attends_only_to_itself(samples, min_saved):
    packed = pack(samples, min_saved=min_saved)
    tokens, positions, mask = packed.input_ids[0], packed.position_ids[0], packed.mask[0, 0]
    for sample, places in zip(samples, packed.places, strict=True):
        sequence = [*sample.prompt, *sample.response[:-1]]
        assert tokens[places].tolist() == sequence
        assert positions[places].tolist() == list(range(len(sequence)))
        for k, place in enumerate(places):
            assert sorted(mask[place].nonzero().flatten().tolist()) == sorted(places[: k + 1].tolist())
    targets = [t for s in samples for t in (s.response or [0])]
    assert packed.targets.tolist() == targets and packed.lengths == [len(s.response) or 1 for s in samples]
    at = 0
    for sample, places, length in zip(samples, packed.places, packed.lengths, strict=True):
        assert packed.predicting[at : at + length].tolist() == places[len(sample.prompt) - 1 :].tolist()
        at += length


def test_the_prefix_of_a_task_is_packed_once():
    samples = [Sample([1, 2, 3, i], [9]) for i in range(4)] + [Sample([5, 6, i], [9, 9]) for i in range(2)]
    packed = pack(samples, min_saved=1)
    assert packed.prefix_tokens == 5
    assert packed.input_ids.shape[1] == 3 + 4 + 2 + 2 * 2
    assert torch.equal(packed.places[0][:3], packed.places[3][:3])


def test_a_prefix_of_some_samples_is_packed_once():
    """A task's prefix, two passages under it, and two answers to one prompt."""
    task, one, other = [1] * 20, [2] * 20, [3] * 20
    samples = [
        Sample([*task, *one, 7], [50]),
        Sample([*task, *other, 8], [51]),
        Sample([*task, *one, 9], [52, 53]),
        Sample([*task, *other, 8], [54, 55]),
    ]
    packed = pack(samples, min_saved=16)
    assert packed.prefix_tokens == 20 + 20 + 21 and packed.input_ids.shape[1] == 61 + 1 + 2 + 0 + 1
    assert pack(samples, min_saved=22).prefix_tokens == 20, "a passage saves 20 tokens, or 21"
    assert pack(samples[1::2], min_saved=16).input_ids.shape[1] == 41 + 1, "a whole prompt can be shared"


def test_each_token_is_in_one_span_and_spans_of_a_group_have_similar_lengths():
    samples = [Sample([*range(100, 130), *range(n)], [5]) for n in (1, 2, 30, 31, 100)]
    packed = pack(samples)
    rows = [row for group in packed.groups for row in group.spans]
    places = sorted(place for row in rows for place in range(row.first, row.first + row.length))
    assert places == list(range(packed.input_ids.shape[1]))
    for group in packed.groups:
        lengths = [row.length for row in group.spans]
        assert lengths == sorted(lengths, reverse=True) and 2 * lengths[-1] >= lengths[0]
