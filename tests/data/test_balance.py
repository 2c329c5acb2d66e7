"""Class imbalance: oversampling, and class weights in SFT's loss and PPO's reward."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from sklearn.utils.class_weight import compute_sample_weight
from support import PlainEngine, gradients, make_policy, samples

from extensions.common.errors import UserError
from extensions.data import BatchOrder, Example, class_weights, epoch_sizes, rows_of_epoch
from extensions.data.splits import RunData
from extensions.distributed.openrlhf import compute_reward
from extensions.prefix.tree import Sample, pack, with_sequence_targets
from extensions.recipe import Ppo, Sft, load_recipe
from extensions.runs.build import make_order
from extensions.tasks import TASKS, Task
from extensions.training.experience import Experience, TokenIndex
from extensions.training.sft import SftTrainer

TICKETS = Task.model_validate(
    {"name": "tickets", "description": "Route it.", "question": "{text}", "labels": ["it", "hr", "legal"]}
)
OTHER = TICKETS.model_copy(update={"name": "other"})

GOLDEN = {False: [3, 2, 5, 4, 0, 1, 1, 4, 3, 0, 2, 5], True: [2, 0, 4, 1, 5, 3, 3, 5, 0, 4, 2, 1]}


def rows(counts, task=TICKETS):
    labels = [label for label, count in counts.items() for _ in range(count)]
    return [Example(task, i, {"text": f"{label} {i}"}, label) for i, label in enumerate(labels)]


def epochs(order, size, count=1):
    """The rows of the first epochs."""
    assert size % order.batch_size == 0
    steps = size // order.batch_size
    return [[e for step in range(k * steps, (k + 1) * steps) for e in order.batch(step)] for k in range(count)]


# ------------------------------------------------------------------------------------------------------- oversampling


@pytest.mark.parametrize("balanced", [False, True])
def test_every_label_has_as_many_rows_as_the_most_frequent(balanced):
    examples = rows({"it": 10, "hr": 4, "legal": 1})
    order = BatchOrder(examples, 5, 3, balanced, None, oversample=True)
    found = epochs(order, 30, 40)
    rest: Counter = Counter()
    for epoch in found:
        assert Counter(e.label for e in epoch) == {"it": 10, "hr": 10, "legal": 10}
        copies = Counter(e.index for e in epoch)
        assert set(copies) == set(range(15))
        assert all(copies[e.index] == 1 for e in examples if e.label == "it")
        assert sorted(copies[e.index] for e in examples if e.label == "hr") == [2, 2, 3, 3]
        rest.update(e.index for e in examples if e.label == "hr" and copies[e.index] == 3)
    assert len(rest) == 4 and min(rest.values()) > 8, "each epoch draws the remainder again"
    assert found[0] != found[1]


def test_a_resumed_run_gets_the_same_batches_and_another_seed_different_ones():
    examples = rows({"it": 10, "hr": 4, "legal": 1}) + rows({"it": 3, "hr": 6}, OTHER)
    whole = [BatchOrder(examples, 7, 1, True, None, True).batch(step) for step in range(30)]
    for step in (0, 3, 11, 29):
        assert BatchOrder(examples, 7, 1, True, None, True).batch(step) == whole[step]
    assert [BatchOrder(examples, 7, 2, True, None, True).batch(step) for step in range(30)] != whole


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_copies_of_a_row_are_spread(balanced, seed):
    """The k-th of 20 copies is in the k-th twentieth of its label's positions."""
    order = BatchOrder(rows({"it": 60, "hr": 3}), 20, seed, balanced, None, True)
    (epoch,) = epochs(order, 120)
    for index in (60, 61, 62):
        places = [place for place, e in enumerate(e for e in epoch if e.label == "hr") if e.index == index]
        assert len(places) == 20 and all(abs(place - 3 * k - 1) <= 3 for k, place in enumerate(places))
    if balanced:
        for k in range(6):
            assert 9 <= sum(e.label == "hr" for e in epoch[20 * k : 20 * k + 20]) <= 11


def test_without_oversampling_the_order_does_not_change():
    """Golden values of the version before oversampling was added."""
    examples = rows({"it": 4, "hr": 2})
    found = {b: [e.index for s in range(3) for e in BatchOrder(examples, 4, 0, b).batch(s)] for b in (False, True)}
    assert found == GOLDEN


def test_oversampling_with_mixing():
    examples = rows({"it": 10, "hr": 4, "legal": 1}) + rows({"it": 2, "hr": 3}, OTHER)
    sizes = epoch_sizes(examples, True)
    assert sizes == {"tickets": 30, "other": 6} and epoch_sizes(examples, False) == {"tickets": 15, "other": 5}
    shares = rows_of_epoch(sizes, "capped", 12, 1.0)
    order = BatchOrder(examples, 6, 0, False, shares, True)
    for epoch in epochs(order, 18, 4):
        assert Counter(e.task.name for e in epoch) == {"tickets": 12, "other": 6}
        assert Counter(e.label for e in epoch if e.task is OTHER) == {"it": 3, "hr": 3}
    order = BatchOrder(examples, 6, 0, False, shares, True)
    first = [e for e in (e for epoch in epochs(order, 18, 5) for e in epoch) if e.task is TICKETS]
    assert Counter(e.label for e in first) == {"it": 20, "hr": 20, "legal": 20}, "two passes in five epochs"


def test_pairs_stay_together():
    task = TASKS["reviews"]
    pairs = [Example(task, i, {"sentence": str(i)}, str(i % 2), str(i // 2)) for i in range(8)]
    single = [Example(task, 8, {"sentence": "8"}, "1")]
    order = BatchOrder(pairs + single, 9, 0, False, None, True)
    assert Counter(e.index for e in order.batch(0)) == dict.fromkeys(range(9), 1), "every row of label 0 has its pair"


# ------------------------------------------------------------------------------------------------------------ weights


def test_weights_equal_those_of_scikit_learn():
    examples = rows({"it": 10, "hr": 4, "legal": 1}) + rows({"it": 3, "legal": 9}, OTHER)
    weights = class_weights(examples)
    for task in (TICKETS, OTHER):
        own = [e for e in examples if e.task is task]
        found = [weights[e.task.name, e.label] for e in own]
        assert found == pytest.approx(compute_sample_weight("balanced", [e.label for e in own]).tolist())
        assert sum(found) / len(found) == pytest.approx(1)
    order = BatchOrder(examples, 4, 0, False, None, False, weights)
    assert (
        order.weight(examples[-1]) == pytest.approx(12 / (2 * 9))
        and BatchOrder(examples, 4, 0, False).weight(examples[0]) == 1
    )


WEIGHTS = [0.5, 2.0, 1.0, 3.0, 0.25, 1.5, 0.75, 4.0, 1.25, 0.1]


def weighted_rows():
    return [Sample(r.prompt, r.response, w) for r, w in zip(samples(shared=30), WEIGHTS, strict=False)]


def plain_weighted_loss(policy, rows, answers_only):
    """Sum over tokens of weight x cross entropy over the sum of the weights, in plain torch, one forward per sample."""
    total, norm = torch.zeros(()), 0.0
    for row in rows:
        ids = torch.tensor([[*row.prompt, *row.response]])
        with policy.role("actor"):
            logits = policy.lm(input_ids=ids, use_cache=False).logits[0, :-1]
        start = len(row.prompt) - 1 if answers_only else 0
        losses = torch.nn.functional.cross_entropy(logits[start:], ids[0, 1 + start :], reduction="none")
        total, norm = total + row.weight * losses.sum(), norm + row.weight * len(losses)
    return total / norm


@pytest.mark.parametrize("loss", ["sequence", "answer"])
def test_the_weighted_loss_equals_plain_torch(tiny_model, loss):
    policy, rows = make_policy(tiny_model("llama"), critic="none"), weighted_rows()
    expected = plain_weighted_loss(policy, rows, loss == "answer")
    expected.backward()
    wanted = gradients(policy)
    for size in (24, 2):
        engine = PlainEngine(policy)
        trainer = SftTrainer(policy, engine, engine, None, None, Sft(loss=loss, micro_batch_size=size), 0)
        sums = trainer.update(rows, 0)
        assert (sums["loss"] / sums["tokens"]).item() == pytest.approx(expected.item(), rel=1e-5)
        assert sums["target_tokens"] == sum(len(r.response) + (len(r.prompt) - 1) * (loss == "sequence") for r in rows)
        assert (sums["answer_loss"] / sums["answer_tokens"]).item() == pytest.approx(
            plain_weighted_loss(policy, samples(shared=30), True).item(), rel=1e-5
        )
        for name, gradient in gradients(policy).items():
            torch.testing.assert_close(gradient, wanted[name], rtol=1e-3, atol=2e-6)


class Rank(PlainEngine):
    """One of two ranks: `sum` is over both, and gradients are averaged as in DeepSpeed."""

    world_size = 2

    def __init__(self, policy, others):
        super().__init__(policy)
        self.others = others

    def sum(self, values):
        return values + self.others

    def update(self, engine, loss, last):
        (loss / 2).backward()


def test_ranks_do_not_change_the_weighted_loss(tiny_model):
    policy, rows = make_policy(tiny_model("llama"), critic="none"), weighted_rows()
    plain_weighted_loss(policy, rows, True).backward()
    wanted = gradients(policy)
    shares = [rows[0::2], rows[1::2]]
    norms = [sum(r.weight * len(r.response) for r in share) for share in shares]
    for share, others in zip(shares, norms[::-1], strict=True):
        engine = Rank(policy, others)
        SftTrainer(policy, engine, engine, None, None, Sft(loss="answer", micro_batch_size=2), 0).update(share, 0)
    for name, gradient in gradients(policy).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-3, atol=2e-6)


def test_targets_have_the_weights_of_their_samples():
    rows = [Sample([1, 2, 3], [7, 8], 0.5), Sample([1, 2, 4], [9], 2.0)]
    packed = with_sequence_targets(pack(rows, min_saved=1), rows)
    found = dict(
        zip(zip(packed.predicting.tolist(), packed.targets.tolist(), strict=True), packed.weights.tolist(), strict=True)
    )
    assert sorted(found.values()) == [0.5, 0.5, 0.5, 2.0, 2.0, 2.5]
    assert packed.weights[:3].tolist() == [0.5, 0.5, 2.0]


def test_batches_carry_the_weights_of_their_rows():
    """From the recipe key to the samples that SFT packs."""
    recipe = SimpleNamespace(
        data=SimpleNamespace(
            class_weights="balanced",
            oversample=False,
            balanced=False,
            mixing="proportional",
            mixing_cap=1,
            mixing_temperature=1,
        ),
        training_batch=5,
        seed=0,
    )
    order = make_order(recipe, RunData(train=rows({"it": 8, "hr": 2})))
    seen = []
    trainer = SimpleNamespace(
        policy=SimpleNamespace(device=torch.device("cpu")),
        strategy=SimpleNamespace(rank=0, world_size=1),
        order=order,
        encode=lambda example: [Sample([1], [2])],
        update=lambda samples, step: seen.extend(samples),
        summarise=lambda *a: {},
    )
    for step in range(2):
        SftTrainer.iterate(trainer, step)
    assert Counter(sample.weight for sample in seen) == {0.625: 8, 2.5: 2}


def test_the_reward_of_ppo_is_weighted_before_the_kl():
    index, mask = TokenIndex([3, 3]), torch.ones(2, 3, dtype=torch.bool)
    scores, weights, kl = torch.tensor([1.0, -1.0]), torch.tensor([0.5, 2.0]), torch.full((2, 3), 0.1)
    found = {}
    for name, w in (("weighted", weights), ("plain", torch.ones(2))):
        flat = kl.flatten()
        experience = Experience([], [], [], [], [], index, flat, torch.zeros(6), flat, w, scores=scores)
        experience.estimate_advantages(Ppo(whiten=False, gamma=1.0, lam=1.0), kl_coef=0.2)
        assert torch.equal(experience.scores, scores), "the unweighted reward is logged"
        found[name] = experience.advantages.view(2, 3)
    torch.testing.assert_close(found["weighted"][:, 2], torch.tensor([0.5 - 0.02, -2.0 - 0.02]))
    torch.testing.assert_close(found["weighted"][:, 0], torch.tensor([0.5 - 0.06, -2.0 - 0.06]))
    rewards = compute_reward(scores, 0.2, kl, mask)
    torch.testing.assert_close(found["plain"], rewards.flip(1).cumsum(1).flip(1))


# ------------------------------------------------------------------------------------------------- what does not fit

RECIPE = """\
name: tickets
method: {method}
model: {{path: some/model}}
data:
  {keys}
  tasks:
    - cola
    - name: own
      description: Judge.
      question: "{{text}}"
      {kind}
      source: {{files: {{train: train.jsonl, validation: train.jsonl}}}}
"""
LABELS = "labels: [a, b]"


@pytest.mark.parametrize(
    "method, keys, kind, parts",
    [
        ("sft", "oversample: true", "score_range: [-1, 1]", ["data.oversample", "own is a regression"]),
        ("ppo", "class_weights: balanced", "score_range: [-1, 1]", ["data.class_weights", "own is a regression"]),
        ("sft", "class_weights: balanced", f"{LABELS}\n      multi_label: true", ["own is a multi-label"]),
        ("sft", "{oversample: true, class_weights: balanced}", LABELS, ["balance the labels twice"]),
        ("encoder", "oversample: true", LABELS, ["data.oversample", "encoder"]),
        (
            "encoder",
            "balanced: false",
            f"{LABELS}\n      multi_label: true",
            ["own has several labels per row", "encoder"],
        ),
    ],
)
def test_contradictory_keys_are_refused(tmp_path, method, keys, kind, parts):
    keys = "\n  ".join(keys.strip("{}").split(", "))
    (tmp_path / "r.yaml").write_text(RECIPE.format(method=method, keys=keys, kind=kind))
    with pytest.raises(UserError) as caught:
        load_recipe(tmp_path / "r.yaml")
    assert all(part in str(caught.value) for part in parts), caught.value


@pytest.mark.parametrize("key", ["oversample: true", "class_weights: balanced"])
def test_rows_of_one_label_cannot_be_balanced(tmp_path, key):
    text = (
        RECIPE.format(method="sft", keys=key, kind=LABELS)
        .replace("    - cola\n", "")
        .replace("train.jsonl", str(tmp_path / "t.jsonl"))
    )
    (tmp_path / "r.yaml").write_text(text)
    (tmp_path / "t.jsonl").write_text('{"text": "x", "label": "b"}\n' * 3)
    with pytest.raises(UserError, match="all 3 training rows of task own have the label 'b'"):
        RunData.load(load_recipe(tmp_path / "r.yaml"), lambda message: None)
    (tmp_path / "t.jsonl").write_text('{"text": "x", "label": "b"}\n{"text": "y", "label": "a"}\n')
    assert len(RunData.load(load_recipe(tmp_path / "r.yaml"), lambda message: None).train) == 2
