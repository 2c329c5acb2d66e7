"""The packed row: what stands where, and who sees whom."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from extensions.packing import Sample, common_prefix, pack

token_lists = st.lists(st.integers(0, 3), min_size=1, max_size=8)
samples_strategy = st.lists(
    st.builds(Sample, token_lists, st.lists(st.integers(0, 3), max_size=4), st.sampled_from(["a", "b"])),
    min_size=1,
    max_size=6,
)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([[1, 2, 3], [1, 2, 4]], 2),
        ([[1, 2, 3]], 2),  # a row alone keeps its last token
        ([[1, 2], [1, 2, 3]], 1),  # never a whole row
        ([[5], [6]], 0),
        ([[7, 7], [7, 7]], 1),
    ],
)
def test_common_prefix(rows, expected):
    assert common_prefix(rows) == expected


@settings(max_examples=200, deadline=None)
@given(samples_strategy)
def test_every_sample_is_whole_and_sees_itself_alone(samples):
    packed = pack(samples)
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


def test_the_prefix_stands_once_for_each_group():
    samples = [Sample([1, 2, 3, i], [9], "a") for i in range(4)] + [Sample([5, 6, i], [9, 9], "b") for i in range(2)]
    packed = pack(samples)
    assert packed.prefix_tokens == 5
    assert packed.input_ids.shape[1] == 3 + 4 + 2 + 2 * 2
    assert torch.equal(packed.places[0][:3], packed.places[3][:3])
