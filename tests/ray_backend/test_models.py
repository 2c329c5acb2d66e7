"""The models behind OpenRLHF's interfaces, against OpenRLHF's own forward on padded rows."""

import pickle

import torch
from support import make_policy

from extensions.distributed.nonfinite import NonFiniteError, NonFiniteTensor
from extensions.distributed.openrlhf import Actor, openrlhf_importable
from extensions.distributed.strategy import Strategy
from extensions.prefix.tree import Sample
from extensions.ray_backend.models import PackedActor, PackedCritic, samples_of, scatter
from extensions.recipe import DeepSpeed, Optimizer, Schedule

ROWS = [([5, 6, 7, 8, 9], [11, 12, 13]), ([5, 6, 7, 8, 9, 10, 14], [12]), ([20, 21], [22, 23, 24, 25])]


def padded(rows):
    """Rows in the layout of OpenRLHF's samples generator and `concat_experiences`: right padding, masks one shorter."""
    width = max(len(p) + len(r) for p, r in rows)
    sequences, attention, action = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(3))
    for i, (prompt, response) in enumerate(rows):
        whole = prompt + response
        sequences[i, : len(whole)] = torch.tensor(whole)
        attention[i, : len(whole)] = 1
        action[i, len(prompt) : len(whole)] = 1
    return sequences, attention, action[:, 1:]


def test_padded_rows_are_read_back():
    sequences, attention, action = padded(ROWS)
    assert samples_of(sequences, attention, action) == [Sample(p, r) for p, r in ROWS]


def test_logprobs_and_gradients_are_those_of_openrlhfs_own_forward(tiny_model):
    sequences, attention, action = padded(ROWS)
    ours = PackedActor(make_policy(tiny_model("llama"), critic="none"), "actor", "number")
    found, output = ours(sequences, action, attention, return_output=True, return_entropy=True)

    reference = make_policy(tiny_model("llama"), critic="none")
    theirs = Actor(reference.lm)
    theirs.packing_samples = theirs.is_vlm = False
    with reference.role("actor"), openrlhf_importable():
        wanted = theirs(sequences, action, attention)
        torch.testing.assert_close(found, wanted, atol=2e-5, rtol=0)
        (wanted * torch.arange(wanted.numel()).view_as(wanted)).sum().backward()
    (found * torch.arange(found.numel()).view_as(found)).sum().backward()
    gradients = {name: p.grad for name, p in reference.trainable.items()}
    for name, parameter in ours.model.trainable.items():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-4, rtol=1e-4)
    assert (output.entropy[action.bool()] > 0).all() and not output.entropy[~action.bool()].any()


def test_values_of_a_critic_and_gradients_of_its_head(tiny_model):
    """OpenRLHF's own critic has a frozen, random head under LoRA (0.11.2)."""
    sequences, attention, action = padded(ROWS)
    critic = PackedCritic(make_policy(tiny_model("llama"), critic="adapter"))
    values = critic(sequences, action_mask=action, attention_mask=attention)
    policy = make_policy(tiny_model("llama"), critic="adapter")
    with policy.role("critic"):
        for i, (prompt, response) in enumerate(ROWS):
            states = policy.trunk(input_ids=torch.tensor([prompt + response])).last_hidden_state[0]
            wanted = policy.value_head(states[len(prompt) - 1 : -1])
            torch.testing.assert_close(values[i][action[i].bool()], wanted, atol=1e-5, rtol=0)
    values.sum().backward()
    trained = critic.policy.trainable
    assert {name.split(".")[0] for name in trained} == {"lm", "value_head"}
    assert not any(".default." in name for name in trained)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for name, p in trained.items() if "value_head" in name)


def test_a_critic_is_wrapped_like_a_policy(tiny_model):
    critic = PackedCritic(make_policy(tiny_model("llama"), critic="adapter"))
    strategy = Strategy(0, DeepSpeed(), 1.0)
    strategy.setup_distributed()
    engine = strategy.wrap(critic, critic.policy.parameter_groups(), Optimizer(name="adamw"), Schedule(), 2)
    assert engine.module is critic


def test_a_policy_stays_in_its_role(tiny_model):
    actor = PackedActor(make_policy(tiny_model("llama"), critic="none"), "actor", "none")
    import gc

    gc.collect()
    assert actor.model._role == "actor"


def test_scatter_is_differentiable_and_zero_elsewhere():
    flat = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    mask = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 0]])
    result = scatter(flat, mask)
    assert result.tolist() == [[0, 1, 2, 0], [3, 0, 0, 0]]
    result.sum().backward()
    assert flat.grad.tolist() == [1, 1, 1]


def test_an_error_of_a_worker_keeps_its_problems():
    bad = pickle.loads(pickle.dumps(NonFiniteError([NonFiniteTensor("loss", [1], "NaN")])))
    assert bad.problems == [NonFiniteTensor("loss", [1], "NaN")]
