"""The numbers of PPO against float64 loops written from the formulas, and against OpenRLHF's own code."""

import ast
import importlib.util
from pathlib import Path

import pytest
import torch

from extensions.distributed.openrlhf import (
    AdaptiveKLController,
    PolicyLoss,
    ValueLoss,
    compute_approx_kl,
    compute_reward,
)
from extensions.training.advantages import gae, td_targets, whiten
from extensions.training.experience import TokenIndex

LENGTHS = [5, 1, 3, 7]


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    shape = (len(LENGTHS), max(LENGTHS))
    tensors = {name: torch.randn(shape, generator=generator) for name in ("rewards", "values", "old", "new", "base")}
    return tensors | {"mask": TokenIndex(LENGTHS).mask}


def loop_gae(rewards, values, lengths, gamma, lam):
    """Section 3 of the paper, term by term: A_t = sum_l (gamma lam)^l delta_{t+l}."""
    advantages = torch.zeros(rewards.shape, dtype=torch.float64)
    for i, length in enumerate(lengths):
        deltas = []
        for t in range(length):
            following = float(values[i, t + 1]) if t + 1 < length else 0.0
            deltas.append(float(rewards[i, t]) + gamma * following - float(values[i, t]))
        for t in range(length):
            advantages[i, t] = sum((gamma * lam) ** k * d for k, d in enumerate(deltas[t:]))
    return advantages


def openrlhf_gae():
    """OpenRLHF's method, taken from its file: the module itself cannot be imported without Ray."""
    origin = importlib.util.find_spec("openrlhf").submodule_search_locations[0]
    tree = ast.parse((Path(origin) / "trainer/ppo_utils/experience_maker.py").read_text())
    method = next(
        n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == "get_advantages_and_returns"
    )
    method.decorator_list, method.returns = [], None
    namespace = {"torch": torch}
    exec(compile(ast.Module([method], []), "openrlhf", "exec"), namespace)
    return namespace["get_advantages_and_returns"]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.0, 0.0)])
def test_gae_equals_the_formula_and_openrlhf(batch, gamma, lam):
    advantages, returns = gae(batch["rewards"], batch["values"], batch["mask"], gamma, lam)
    expected = loop_gae(batch["rewards"], batch["values"], LENGTHS, gamma, lam)
    torch.testing.assert_close(advantages.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(returns, (advantages + batch["values"]) * batch["mask"])
    theirs, their_returns = openrlhf_gae()(None, batch["values"], batch["rewards"], batch["mask"], gamma, lam)
    torch.testing.assert_close(advantages, theirs * batch["mask"])
    torch.testing.assert_close(returns, their_returns * batch["mask"])


def test_gae_with_lambda_one_is_the_return_less_the_value(batch):
    _advantages, returns = gae(batch["rewards"], batch["values"], batch["mask"], 1.0, 1.0)
    for i, length in enumerate(LENGTHS):
        for t in range(length):
            torch.testing.assert_close(returns[i, t], batch["rewards"][i, t:length].sum())


def test_td_targets_are_equation_one(batch):
    targets = td_targets(batch["rewards"], batch["values"], batch["mask"], 0.9)
    for i, length in enumerate(LENGTHS):
        for t in range(length):
            following = batch["values"][i, t + 1] if t + 1 < length else 0.0
            torch.testing.assert_close(targets[i, t], batch["rewards"][i, t] + 0.9 * following)


@pytest.mark.parametrize("noise", [1e9, float("nan"), float("inf")])
def test_padding_never_changes_a_result(batch, noise):
    mask = batch["mask"]
    dirty = {k: torch.where(mask, v, noise) for k, v in batch.items() if k != "mask"}
    for clean, other in zip(
        (
            *gae(batch["rewards"], batch["values"], mask, 1.0, 0.95),
            td_targets(batch["rewards"], batch["values"], mask, 1.0),
        ),
        (
            *gae(dirty["rewards"], dirty["values"], mask, 1.0, 0.95),
            td_targets(dirty["rewards"], dirty["values"], mask, 1.0),
        ),
        strict=True,
    ):
        assert torch.equal(clean, other)
    assert torch.equal(whiten(batch["values"], mask), whiten(dirty["values"], mask))


def test_whiten_moments_and_ranks(batch):
    values, mask = batch["values"], batch["mask"]
    white = whiten(values, mask)
    kept = white[mask].double()
    assert abs(kept.mean()) < 1e-6 and abs(kept.var(correction=0) - 1) < 1e-5
    assert (white[~mask] == 0).all()
    plain = values[mask].double()
    torch.testing.assert_close(kept, (plain - plain.mean()) / plain.std(correction=0), atol=1e-6, rtol=1e-5)
    # Two ranks that add up their sums whiten as one does.
    parts = [(values[:2], mask[:2]), (values[2:], mask[2:])]
    sums = [torch.stack([m.sum().double(), torch.where(m, v, 0).double().sum()]) for v, m in parts]
    mean = (sums[0] + sums[1])[1] / (sums[0] + sums[1])[0]
    squares = sum((((v.double() - mean) * m) ** 2).sum() for v, m in parts)
    answers = iter([sums[0] + sums[1], squares.unsqueeze(0)])
    torch.testing.assert_close(whiten(*parts[0], lambda _: next(answers)), white[:2])


@pytest.mark.parametrize(("scale", "min_std"), [(1.0, 0.3), (0.01, 0.3), (0.01, 0.0)])
def test_whiten_divides_by_no_less_than_the_floor(batch, scale, min_std):
    values, mask = batch["values"] * scale, batch["mask"]
    kept = values[mask].double()
    expected = (kept - kept.mean()) / max(float(kept.std(correction=0)), min_std)
    torch.testing.assert_close(whiten(values, mask, min_std=min_std)[mask].double(), expected, atol=1e-5, rtol=1e-4)


def test_token_rewards_have_a_penalty_per_token_and_the_score_at_the_last(batch):
    kl = compute_approx_kl(batch["new"], batch["base"]) * batch["mask"]
    rewards = compute_reward(torch.tensor([1.0, 0.0, -1.0, 2.5]), 0.2, kl, batch["mask"])
    for i, (length, score) in enumerate(zip(LENGTHS, [1.0, 0.0, -1.0, 2.5], strict=True)):
        for t in range(length):
            difference = float(batch["new"][i, t]) - float(batch["base"][i, t])
            expected = -0.2 * difference + (score if t == length - 1 else 0.0)
            assert abs(float(rewards[i, t]) - expected) < 1e-6
        assert (rewards[i, length:] == 0).all()


def test_clipped_losses_equal_the_formulas_and_sum_over_micro_batches(batch):
    mask, advantages = batch["mask"], batch["rewards"]
    policy, value = PolicyLoss(0.2, 0.2), ValueLoss(0.2)
    tokens = mask.sum()
    expected_policy = expected_value = 0.0
    for i, length in enumerate(LENGTHS):
        for t in range(length):
            ratio = (batch["new"][i, t].double() - batch["old"][i, t].double()).exp()
            a = advantages[i, t].double()
            expected_policy -= min(ratio * a, ratio.clamp(0.8, 1.2) * a) / tokens
            v, old, target = batch["new"][i, t].double(), batch["values"][i, t].double(), batch["base"][i, t].double()
            clipped = old + (v - old).clamp(-0.2, 0.2)
            expected_value += 0.5 * max((v - target) ** 2, (clipped - target) ** 2) / tokens
    scale = {"dp_size": 1, "batch_num_tokens": tokens}
    whole = policy(batch["new"], batch["old"], advantages, mask, **scale)[0]
    torch.testing.assert_close(whole.double(), expected_policy, atol=1e-5, rtol=1e-5)
    whole_value = value(batch["new"], batch["values"], batch["base"], mask, **scale)
    torch.testing.assert_close(whole_value.double(), expected_value, atol=1e-5, rtol=1e-5)
    # Micro-batches with the same normaliser add up to the whole batch.
    rows = ([0, 2], [1, 3])
    parts = sum(policy(batch["new"][r], batch["old"][r], advantages[r], mask[r], **scale)[0] for r in rows)
    torch.testing.assert_close(parts, whole)
    # So does one row of all response tokens, the form of training.ppo.
    row = {name: tensor[mask][None] for name, tensor in batch.items()}
    ones = torch.ones_like(row["new"])
    torch.testing.assert_close(policy(row["new"], row["old"], row["rewards"], ones, **scale)[0], whole)
    torch.testing.assert_close(value(row["new"], row["values"], row["base"], ones, **scale), whole_value)


def test_adaptive_kl_follows_ziegler():
    """arXiv 1909.08593: e = clip(KL / target - 1, -0.2, 0.2), coefficient *= 1 + e * n / horizon."""
    controller = AdaptiveKLController(0.2, 6.0, 10000.0)
    controller.update(12.0, 16)
    assert controller.value == pytest.approx(0.2 * (1 + 0.2 * 16 / 10000))
    controller.update(6.3, 16)
    assert controller.value == pytest.approx(0.2 * (1 + 0.2 * 16 / 10000) * (1 + 0.05 * 16 / 10000))


def test_token_index_pads_flattens_and_sums():
    index = TokenIndex([3, 1, 2])
    flat = torch.arange(1.0, 7.0)
    padded = index.pad(flat)
    assert padded.tolist() == [[1, 2, 3], [4, 0, 0], [5, 6, 0]]
    assert index.mask.tolist() == [[True, True, True], [True, False, False], [True, True, False]]
    assert torch.equal(index.flatten(padded), flat)
    assert index.sums(flat).tolist() == [6, 4, 11]
    assert flat[index.tokens_of([2, 0])].tolist() == [5, 6, 1, 2, 3]
