"""Bounds of micro-batches by tokens, and the second attempt where memory runs out."""

import pytest
import torch
from support import nested_prompts, samples

from extensions.prefix.limits import Cost, MemoryLimits, OutOfMemory, PackLimit
from extensions.prefix.tree import Sample, micro_batches, pack, pack_cost

ROWS = samples(shared=40) + [Sample(prompt, [1, 2]) for prompt in nested_prompts()]


def test_the_cost_of_a_pack_equals_the_real_one():
    packed = pack(ROWS)
    size = packed.input_ids.shape[1]
    assert pack_cost(ROWS).tokens == size
    # Every computed pair: the dense layout of each group, padding included.
    pairs = sum(packed.layout.mask(k).numel() * len(group.spans) for k, group in enumerate(packed.groups))
    assert pack_cost(ROWS).pairs == pairs >= int(packed.mask.sum())
    assert pack_cost(ROWS, "masked") == Cost(size, size**2)
    assert pack_cost(ROWS, "flash") == Cost(size, len(packed.segments.source))
    longest = max(len(row.prompt) + len(row.response) - 1 for row in ROWS)
    assert pack_cost(ROWS, "plain") == Cost(len(ROWS) * longest, len(ROWS) * longest**2)


@pytest.mark.parametrize("tokens, pair_cost", [(30, 0.0), (90, 0.0), (150, 0.0), (200, 0.01)])
def test_packs_stay_within_the_tokens_and_hold_as_many_rows_as_fit(tokens, pair_cost):
    limit = PackLimit(8, tokens, pair_cost)
    chunks = micro_batches(ROWS, range(len(ROWS)), limit)
    assert [k for chunk in chunks for k in chunk] == [k for chunk in micro_batches(ROWS, range(12), 12) for k in chunk]
    flat = [k for chunk in chunks for k in chunk]
    for chunk, first in zip(chunks, [sum(map(len, chunks[:k])) for k in range(len(chunks))], strict=True):
        assert len(chunk) == 1 or limit.admits(pack_cost([ROWS[k] for k in chunk]))
        more = flat[first : first + len(chunk) + 1]
        assert len(more) == len(chunk) or len(more) > limit.rows or not limit.admits(pack_cost([ROWS[k] for k in more]))
    assert max(map(len, chunks)) > 1 or tokens == 30
    assert limit.admits(Cost(limit.longest, limit.longest**2))
    assert not limit.admits(Cost(limit.longest + 2, (limit.longest + 2) ** 2))
    for form in ("packed", "flash", "masked", "plain"):
        limit = PackLimit(8, tokens, pair_cost, form)
        alone, longer = ([Sample([*range(n)], [1])] for n in (limit.longest, limit.longest + 2))
        assert limit.admits(pack_cost(alone, form)) and not limit.admits(pack_cost(longer, form))
        assert pack_cost(alone, form) == Cost.of_rows(1, limit.longest, form)
        apart = [Sample([k + 1] * 30, [1, 2]) for k in range(4)]
        assert pack_cost(apart, form) == Cost.of_rows(4, 31, form)


def test_a_bound_that_no_row_reaches_changes_nothing():
    for size in (1, 3, 5, 24):
        plain = micro_batches(ROWS, range(len(ROWS)), size)
        assert micro_batches(ROWS, range(len(ROWS)), PackLimit(size, 10_000, 0.01)) == plain


def failing(times, error=None):
    """A computation that lacks memory the first `times` times, in a micro-batch of 8 rows and 100 tokens."""
    error = error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    calls = []

    def compute():
        limits.running(8, 100)
        calls.append(limits.of(16))
        if len(calls) <= times:
            raise error
        return "result"

    warnings = []
    limits = MemoryLimits(warn=warnings.append, key="ppo.micro_batch_size")
    return limits, compute, calls, warnings


@pytest.mark.slow
@pytest.mark.parametrize("error", [None, RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")])
def test_the_micro_batch_is_halved_once(error):
    limits, compute, calls, warnings = failing(1, error)
    assert limits.attempt(compute) == "result"
    assert calls == [PackLimit(16), PackLimit(4, 50)] and limits.of(16) == PackLimit(4, 50), "also for later ones"
    (line,) = warnings
    assert "8 rows and 100 tokens" in line and "at most 4 rows and 50 tokens" in line
    assert "set ppo.micro_batch_size=4 and model.micro_batch_tokens=50" in line
    with pytest.raises(OutOfMemory, match=r"again, after the micro-batch was halved.*resume with the same command"):
        limits.attempt(failing_always(limits))


def failing_always(limits):
    def compute():
        limits.running(4, 50)
        raise torch.OutOfMemoryError("CUDA out of memory")

    return compute


def test_what_cannot_be_repeated_ends():
    limits, compute, *_ = failing(2)
    with pytest.raises(OutOfMemory, match="again"):
        limits.attempt(compute)
    limits, compute, calls, _ = failing(1)
    with pytest.raises(OutOfMemory, match="cannot be repeated"):
        limits.attempt(compute, undo=lambda: False)
    assert len(calls) == 1 and not limits.lowered
    limits, compute, calls, _ = failing(1, ValueError("another fault"))
    with pytest.raises(ValueError, match="another fault"):
        limits.attempt(compute)

    def alone():
        single.running(1, 6000)
        raise torch.OutOfMemoryError("CUDA out of memory")

    single = MemoryLimits()
    with pytest.raises(OutOfMemory, match="1 row and 6000 tokens, and a single row cannot be split"):
        single.attempt(alone)
