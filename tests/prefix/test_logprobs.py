"""The numbers of PPO against float64 loops written from the formulas, and against OpenRLHF's own code."""

import ast
import importlib.util
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from extensions.distributed.openrlhf import (
    AdaptiveKLController,
    PolicyLoss,
    ValueLoss,
    compute_approx_kl,
    compute_reward,
)
from extensions.prefix.logprobs import (
    FusedLinearLogprob,
    LogitTransform,
    length_mask,
    pad_rows,
    sample_tokens,
    token_entropy,
    token_logprobs,
)
from extensions.training.advantages import gae, td_targets, whiten

LENGTHS = [5, 1, 3, 7]


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    shape = (len(LENGTHS), max(LENGTHS))
    tensors = {name: torch.randn(shape, generator=generator) for name in ("rewards", "values", "old", "new", "base")}
    return tensors | {"mask": length_mask(LENGTHS, shape[1])}


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
def test_gae_is_the_formula_and_openrlhfs(batch, gamma, lam):
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
def test_padding_never_matters(batch, noise):
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


def test_token_rewards_penalise_each_token_and_pay_at_the_last(batch):
    kl = compute_approx_kl(batch["new"], batch["base"]) * batch["mask"]
    rewards = compute_reward(torch.tensor([1.0, 0.0, -1.0, 2.5]), 0.2, kl, batch["mask"])
    for i, (length, score) in enumerate(zip(LENGTHS, [1.0, 0.0, -1.0, 2.5], strict=True)):
        for t in range(length):
            difference = float(batch["new"][i, t]) - float(batch["base"][i, t])
            expected = -0.2 * difference + (score if t == length - 1 else 0.0)
            assert abs(float(rewards[i, t]) - expected) < 1e-6
        assert (rewards[i, length:] == 0).all()


def test_clipped_losses_are_the_formulas_and_split_exactly(batch):
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


def test_adaptive_kl_follows_ziegler():
    """arXiv 1909.08593: e = clip(KL / target - 1, -0.2, 0.2), coefficient *= 1 + e * n / horizon."""
    controller = AdaptiveKLController(0.2, 6.0, 10000.0)
    controller.update(12.0, 16)
    assert controller.value == pytest.approx(0.2 * (1 + 0.2 * 16 / 10000))
    controller.update(6.3, 16)
    assert controller.value == pytest.approx(0.2 * (1 + 0.2 * 16 / 10000) * (1 + 0.05 * 16 / 10000))


def test_logprobs_and_entropy_against_float64():
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0)) * 5
    targets = torch.tensor([0, 3, 49, 7, 7, 20])
    exact = logits.double().log_softmax(-1)
    torch.testing.assert_close(token_logprobs(logits, targets).double(), exact[range(6), targets], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(token_entropy(logits).double(), -(exact.exp() * exact).sum(-1), atol=1e-5, rtol=1e-5)
    assert token_logprobs(logits.bfloat16(), targets).dtype == torch.float32


def test_sampling_inverts_the_distribution_function():
    probabilities = torch.tensor([0.1, 0.2, 0.3, 0.4])
    uniforms = torch.tensor([0.0, 0.05, 0.15, 0.45, 0.65, 0.999999])
    drawn = sample_tokens(probabilities.log().expand(len(uniforms), -1), uniforms)
    assert drawn.tolist() == [0, 0, 1, 2, 3, 3]


@settings(max_examples=100, deadline=None)
@given(st.floats(0, 1, exclude_max=True), st.integers(0, 2**31))
def test_sampling_is_in_range_and_never_draws_the_impossible(uniform, seed):
    logits = torch.randn(1, 97, generator=torch.Generator().manual_seed(seed)) * 20
    logits[0, ::2] = -torch.inf
    token = sample_tokens(logits, torch.tensor([uniform])).item()
    assert token % 2 == 1 and 0 <= token < 97


def test_sampled_shares_follow_the_probabilities():
    probabilities = torch.tensor([0.5, 0.25, 0.15, 0.1])
    uniforms = torch.rand(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = sample_tokens(probabilities.log().expand(len(uniforms), -1), uniforms)
    shares = torch.bincount(drawn, minlength=4) / len(drawn)
    assert (shares - probabilities).abs().max() < 5 * (0.25 / 200_000) ** 0.5  # five standard errors


def test_pad_rows_and_length_mask():
    padded = pad_rows(torch.arange(1.0, 7.0), [3, 1, 2], 4)
    assert padded.tolist() == [[1, 2, 3, 0], [4, 0, 0, 0], [5, 6, 0, 0]]
    assert length_mask([2, 0], 3).tolist() == [[True, True, False], [False, False, False]]


@pytest.mark.parametrize("rows", [1, 3, 100])
@pytest.mark.parametrize("entropy", ["number", "differentiable"])
@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.125, None), (3.0, 0.8)], ids=["linear", "scaled", "capped"])
def test_logprobs_and_entropies_of_chunks_are_those_of_whole_logits(rows, entropy, scale, cap):
    torch.manual_seed(0)
    head = torch.nn.Linear(6, 11).requires_grad_(False)
    states, targets, weights = torch.randn(7, 6, requires_grad=True), torch.randint(11, (7,)), torch.randn(2, 7)
    logprobs, entropies = FusedLinearLogprob.apply(
        states, targets, head.weight, head.bias, 0.7, rows, entropy, LogitTransform(scale, cap)
    )
    logits = scale * head(states)
    logits = (logits if cap is None else cap * torch.tanh(logits / cap)) / 0.7
    torch.testing.assert_close(logprobs, token_logprobs(logits, targets))
    torch.testing.assert_close(entropies, token_entropy(logits))
    assert entropies.requires_grad == (entropy == "differentiable")
    expected = (weights[0] * token_logprobs(logits, targets)).sum()
    found = (weights[0] * logprobs).sum()
    if entropies.requires_grad:
        expected, found = expected + (weights[1] * token_entropy(logits)).sum(), found + (weights[1] * entropies).sum()
    torch.testing.assert_close(*(torch.autograd.grad(loss, states)[0] for loss in (found, expected)))


def test_logprobs_without_gradients_keep_none():
    head = torch.nn.Linear(6, 11, bias=False).requires_grad_(False)
    with torch.no_grad():
        logprobs, _ = FusedLinearLogprob.apply(
            torch.randn(7, 6), torch.zeros(7, dtype=torch.long), head.weight, None, 1.0, 2, "none", LogitTransform()
        )
    assert not logprobs.requires_grad


@pytest.mark.parametrize("vocabulary", [5, 256, 1000])
def test_draws_follow_the_whole_distribution_function(vocabulary):
    """Against the sum over the whole vocabulary, at the ends and around its steps."""
    torch.manual_seed(1)
    logits = torch.randn(40, vocabulary).double().mul(4).float()
    cumulative = logits.double().softmax(-1).cumsum(-1)
    for uniforms in (torch.rand(40).double(), torch.zeros(40).double(), torch.full((40,), 1 - 2**-53).double()):
        drawn = sample_tokens(logits, uniforms)
        chance = torch.nn.functional.pad(cumulative, (1, 0))
        low, high = (chance.gather(-1, (drawn + k).unsqueeze(-1)).squeeze(-1) for k in (0, 1))
        assert ((low - 1e-6 <= uniforms) & (uniforms <= high + 1e-6)).all()
        assert (logits.softmax(-1).gather(-1, drawn.unsqueeze(-1)) > 0).all()
