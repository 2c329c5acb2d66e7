"""An engine with a queue gets many rows of an evaluation at once; the policy's own sampler, batches."""

from types import SimpleNamespace

import pytest

from extensions.data import Example
from extensions.evaluation.evaluator import Evaluator
from extensions.rollout.sampler import Sampler
from extensions.rollout.vllm_engine import QUEUED_ROWS
from extensions.rollout.vllm_sampler import VllmSampler
from extensions.tasks import TASKS

TASK = TASKS["cola"]


def batch_sizes(sampler, rows, ranks):
    examples = [Example(TASK, k, {"sentence": "Bob ate."}, "1") for k in range(rows)]
    evaluator = SimpleNamespace(
        strategy=SimpleNamespace(world_size=ranks),
        sampler=sampler,
        recipe=SimpleNamespace(evaluation=SimpleNamespace(batch_size=64)),
    )
    pending = Evaluator._pending(evaluator, examples, {})
    assert sorted(row.index for rank in pending for batch in rank for row in batch) == list(range(rows))
    return [[len(batch) for batch in rank] for rank in pending]


@pytest.mark.parametrize(
    ("sampler", "rows", "ranks", "sizes"),
    [
        (Sampler, 200, 1, [[64, 64, 64, 8]]),
        (VllmSampler, 200, 1, [[200]]),
        (VllmSampler, 200, 4, [[50]] * 4),
        (VllmSampler, 2 * QUEUED_ROWS + 6, 2, [[QUEUED_ROWS, 6], [QUEUED_ROWS]]),
    ],
    ids=["policy", "engine", "four engines", "more than its queue"],
)
def test_rows_given_at_once(sampler, rows, ranks, sizes):
    assert batch_sizes(sampler, rows, ranks) == sizes
