"""Products with frozen weights by oneDNN. The operator runs on any CPU, so its choice is set by hand."""

import pytest
import torch
from support import make_policy, samples
from torch import nn

from extensions.prefix import products
from extensions.prefix.logprobs import FusedLinearLogprob, LogitTransform, token_logprobs
from extensions.prefix.products import linear, onednn_is_faster, times, use_fast_products
from extensions.prefix.tree import pack

has_operator = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
needs_operator = pytest.mark.skipif(not has_operator, reason="this torch has no oneDNN operator")


@pytest.fixture
def onednn(monkeypatch):
    """oneDNN for weights of any size; counts its calls."""
    calls = []
    own = products._onednn
    monkeypatch.setattr(products, "LEAST", 1)
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(products, "_onednn", lambda *args: calls.append(args[0].shape) or own(*args))
    return calls


def tensors(*shapes):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator) for shape in shapes]


@needs_operator
@pytest.mark.parametrize("shape", [(1, 40), (33, 40), (2, 5, 40), (0, 40), (40,)])
def test_values_and_gradients_are_those_of_float64(onednn, shape):
    whole, weight, bias = tensors(shape, (24, 40), (24,))
    for given in (whole, whole.expand(3, *shape), torch.stack([whole, whole], -1)[..., 0]):
        for b in (bias, None):
            x, exact = given.detach().requires_grad_(), given.double().requires_grad_()
            out = linear(x, weight, b)
            expected = nn.functional.linear(exact, weight.double(), None if b is None else b.double())
            torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
            grad = torch.ones_like(out) + out.detach()
            (found,) = torch.autograd.grad(out, x, grad)
            (wanted,) = torch.autograd.grad(expected, exact, grad.double())
            torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)
            assert found.shape == x.shape
    assert len(onednn) == 12
    rows, weight = tensors((7, 24), (24, 40))
    torch.testing.assert_close(times(rows, weight), rows @ weight, rtol=1e-5, atol=1e-5)
    assert linear(torch.full((2, 40), torch.nan), weight).isnan().all(), "nothing is hidden"


@needs_operator
def test_a_policy_computes_the_same_by_either_library(onednn, tiny_model):
    packed, found = pack(samples()), []
    for fast in (True, False):
        policy = make_policy(tiny_model("llama"))
        if not fast:
            for module in policy.causal_lm.modules():
                vars(module).pop("forward", None)
            calls = len(onednn)
        with policy.role("actor"):
            out = policy(packed, entropy="number")
            (out["logprobs"].sum() + out["values"].sum()).backward()
        found.append([*out.values(), *(p.grad for p in policy.trainable.values())])
    # Seven frozen layers in each of two blocks, forward and backward; the first block's inputs need no gradient.
    assert calls >= 2 * (2 * 7 - 3)
    for fast, own in zip(*found, strict=True):
        torch.testing.assert_close(fast, own, rtol=1e-4, atol=1e-5)


@needs_operator
def test_logprobs_and_their_gradients_by_onednn(onednn):
    states, weight = tensors((9, 16), (50, 16))
    targets = torch.arange(9)
    for entropy in ("number", "differentiable"):
        x = states.clone().requires_grad_()
        arguments = (x, targets, weight, None, 0.7, 4, entropy, LogitTransform())
        logprobs, entropies = FusedLinearLogprob.apply(*arguments)
        loss = logprobs.sum() + (entropies.sum() if entropy == "differentiable" else 0)
        (grad,) = torch.autograd.grad(loss, x)
        y = states.clone().requires_grad_()
        logits = y @ weight.t() / 0.7
        p = logits.log_softmax(-1)
        expected = token_logprobs(logits, targets).sum()
        expected = expected - ((p.exp() * p).sum() if entropy == "differentiable" else 0)
        torch.testing.assert_close(grad, torch.autograd.grad(expected, y)[0], rtol=1e-4, atol=1e-5)
    assert len(onednn) == 3 + 3 + 3 + 6


def test_torchs_own_product_is_taken_everywhere_else(onednn, monkeypatch, tmp_path):
    x, weight = tensors((3, 40), (24, 40))
    linear(x.bfloat16(), weight.bfloat16())
    linear(x, weight.requires_grad_())
    monkeypatch.setattr(products, "LEAST", 24 * 40 + 1)
    linear(x, weight.detach())
    trained = nn.Linear(40, 24)
    use_fast_products(trained)
    assert not onednn and "forward" not in vars(trained)
    cpuinfo = tmp_path / "cpuinfo"
    for vendor in ("GenuineIntel", None):
        monkeypatch.setattr(products, "CPUINFO", cpuinfo)
        if vendor:
            cpuinfo.write_text(f"vendor_id\t: {vendor}\n")
        else:
            cpuinfo.unlink()
        onednn_is_faster.cache_clear()
        assert not onednn_is_faster()
    onednn_is_faster.cache_clear()
