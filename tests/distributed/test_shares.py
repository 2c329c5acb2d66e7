"""Rows over ranks with equally many each."""

import pytest

from extensions.distributed.shares import joined, share


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [1, 2, 3, 7, 12])
def test_shares_are_equally_long_and_joined_in_order(count, ranks):
    rows = [f"row {k}" for k in range(count)]
    shares = [share(rows, rank, ranks) for rank in range(ranks)]
    assert len({len(one) for one in shares}) == 1 and len(shares[0]) * ranks < count + ranks
    assert joined(shares, count) == rows
