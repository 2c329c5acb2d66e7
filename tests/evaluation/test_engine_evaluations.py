"""Evaluations by an engine: many rows at once, and none where the policy itself computes the answers."""

from types import SimpleNamespace

import pytest
from support import write_recipe

from extensions.data import Example
from extensions.evaluation.evaluator import Evaluator
from extensions.rollout.sampler import Sampler
from extensions.rollout.vllm_engine import QUEUED_ROWS
from extensions.rollout.vllm_sampler import VllmSampler
from extensions.runs.main import main
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


@pytest.mark.parametrize(("decoding", "sessions"), [("likelihood", 0), ("greedy", 1)])
def test_answers_by_likelihood_wake_no_engine(tiny_model, tmp_path, monkeypatch, decoding, sessions):
    entered, session = [], Sampler.session
    monkeypatch.setattr(Sampler, "session", lambda self: entered.append(1) or session(self))
    recipe = write_recipe(tmp_path, tiny_model("llama"), output_dir=str(tmp_path / "run"))
    assert main([str(recipe), f"evaluation.decoding={decoding}"], "eval") == 0
    assert len(entered) == sessions
