"""Logprobs, entropies and sampling against float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from extensions.prefix.logprobs import (
    FusedLinearLogprob,
    LogitTransform,
    sample_tokens,
    token_entropy,
    token_logprobs,
)


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
def test_sampling_is_in_range_and_never_draws_zero_probability(uniform, seed):
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


@pytest.mark.parametrize("rows", [1, 3, 100])
@pytest.mark.parametrize("entropy", ["number", "differentiable"])
@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.125, None), (3.0, 0.8)], ids=["linear", "scaled", "capped"])
def test_chunked_logprobs_and_entropies_equal_those_of_whole_logits(rows, entropy, scale, cap):
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


def test_logprobs_without_gradients_require_none():
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
