"""Importance weights for the difference between an engine that samples and the trainer."""

import math

import pytest
import torch
from support import samples, write_recipe

from extensions.common.errors import UserError
from extensions.recipe import Ppo, Vllm, load_recipe
from extensions.rollout.lora_sync import SyncError, SyncProbe
from extensions.training.experience import Experience, TokenIndex
from extensions.training.losses import PpoLosses, Scale

LENGTHS = [3, 1, 2, 6, 4]


def actor_loss(settings, difference, ppo=None):
    """The loss of a batch whose tokens the engine gave logprobs lower by `difference`, and its parts."""
    rows = samples()
    rows = [type(row)(row.prompt, [7] * length) for row, length in zip(rows, LENGTHS, strict=True)]
    index, none = TokenIndex(LENGTHS), [None] * len(rows)
    count = len(index.sample)
    logprobs = -torch.rand(count, generator=torch.Generator().manual_seed(1))
    zero = torch.zeros(count)
    experience = Experience(none, none, rows, none, none, index, logprobs, zero, zero, torch.ones(len(rows)))
    experience.advantages = torch.linspace(-1, 1, count)
    experience.kept = torch.ones(count)
    experience.kept[3] = 0
    experience.sampled = experience.logprobs - difference(torch.arange(count))
    part = experience.micro_batch(range(len(rows)))
    logprobs = (experience.logprobs[part.tokens] + 0.05).requires_grad_()
    scale = Scale(experience.kept.sum(), 1)
    losses = PpoLosses(ppo or Ppo(), settings)
    found = losses.actor(experience, {"logprobs": logprobs, "entropy": logprobs * 0}, part, scale, 0.0)
    found.loss.backward()
    return found, logprobs.grad, experience, part


def ratios(tokens):
    """Importance weights from e^-1.5 to e^2.4."""
    return -1.5 + 0.26 * tokens.float()


@pytest.mark.parametrize("kind", ["off", "clip", "mask"])
def test_the_loss_is_a_float64_loop_over_tokens(kind):
    settings = Vllm(is_correction=kind, is_threshold=[0.5, 2.0])
    found, _, experience, part = actor_loss(settings, ratios)
    total, outside = 0.0, 0
    for flat in part.tokens.tolist():
        if not experience.kept[flat]:
            continue
        weight = math.exp(float(experience.logprobs[flat] - experience.sampled[flat]))
        outside += not 0.5 <= weight <= 2.0
        used = {"off": 1.0, "clip": min(max(weight, 0.5), 2.0), "mask": weight if 0.5 <= weight <= 2.0 else 0.0}[kind]
        ratio, advantage = math.exp(0.05), float(experience.advantages[flat])
        total -= used * min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage)
    kept = int(experience.kept.sum())
    assert found.loss.item() == pytest.approx(total / kept, rel=1e-5)
    assert found.is_fraction.item() == pytest.approx(0 if kind == "off" else outside / kept)
    assert outside > 3


def test_no_weight_reaches_the_gradient_of_the_engines_side():
    """The weight is a constant: it is detached, and a masked token has no gradient."""
    _, grad, experience, part = actor_loss(Vllm(is_correction="mask", is_threshold=[0.5, 2.0]), ratios)
    weights = (experience.logprobs - experience.sampled)[part.tokens].exp()
    is_out = (weights < 0.5) | (weights > 2.0)
    assert (grad[is_out] == 0).all() and (grad[~is_out & (experience.kept[part.tokens] == 1)] != 0).all()


def test_equal_logprobs_change_nothing():
    plain, grad, *_ = actor_loss(None, lambda tokens: 0.0 * tokens)
    for kind in ("clip", "mask", "off"):
        found, own, *_ = actor_loss(Vllm(is_correction=kind), lambda tokens: 0.0 * tokens)
        assert torch.equal(found.loss, plain.loss) and torch.equal(own, grad) and found.is_fraction == 0


def test_a_difference_warns_once_where_it_is_corrected_and_stops_where_not():
    said = []
    probe = SyncProbe(torch.bfloat16, None, said.append)
    for mismatch in (0.05, 0.2, 0.3):
        probe.check_samples(mismatch)
    (message,) = said
    assert "0.2 nats per token" in message and "vllm.is_correction" in message
    with pytest.raises(SyncError):
        probe.check_samples(math.nan)
    with pytest.raises(SyncError, match=r"0\.2 nats.*vllm\.is_correction=clip"):
        SyncProbe(torch.bfloat16, None).check_samples(0.2)


def test_the_threshold_is_checked(tiny_model, tmp_path):
    path = write_recipe(tmp_path, tiny_model("llama"))
    with pytest.raises(UserError, match=r"vllm\.is_threshold: \[2\.0, 0\.5\]: expected \[lowest, highest\]"):
        load_recipe(path, ["vllm.is_threshold=[2.0, 0.5]"])
