"""Several responses per prompt: estimators against float64 loops and OpenRLHF, equal groups, the KL as a loss."""

import ast
import importlib.util
import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support import PlainEngine, adapter_of, gradients, launch, make_policy, timeless, write_recipe

from extensions.common.files import read_jsonl
from extensions.distributed.openrlhf import compute_reward
from extensions.prefix.tree import Sample, pack
from extensions.recipe import Ppo
from extensions.recipe.methods import GROUPED
from extensions.rollout.sampler import Sampler, training_request
from extensions.runs.main import main
from extensions.training.advantages import compared_scores
from extensions.training.experience import Experience, TokenIndex
from extensions.training.losses import PpoLosses, Scale
from extensions.training.ppo import PpoTrainer

K, LENGTHS = 3, [4, 1, 3, 2, 2, 6]  # responses of two prompts
SCORES = torch.tensor([1.0, 0.0, -1.0, 0.0, 1.0, 1.0])
ESTIMATORS = (*GROUPED, "reinforce", "gae")


def experience_of(samples=None, scores=SCORES, lengths=LENGTHS, seed=1):
    generator = torch.Generator().manual_seed(seed)
    index = TokenIndex(lengths)
    kl, values, logprobs = (torch.randn(len(index.sample), generator=generator) for _ in range(3))
    none = [None] * len(lengths)
    weights = torch.tensor([0.5] * K + [1.5] * K)
    return Experience(none, none, samples or none, none, none, index, logprobs, values, kl, weights, K, scores=scores)


def loop_estimate(experience, estimator, kl_coef):
    """Advantages term by term in float64, before whitening."""
    scores, flat, first = experience.scores.double().tolist(), [], 0
    for slot, length in enumerate(experience.index.lengths):
        group = scores[slot // K * K : slot // K * K + K]
        mean = sum(group) / K
        score = {
            "reinforce": scores[slot],
            "rloo": scores[slot] - sum(s for j, s in enumerate(group) if j != slot % K) / (K - 1),
            "reinforce_baseline": scores[slot] - mean,
            "dr_grpo": scores[slot] - mean,
            "group_norm": (scores[slot] - mean) / ((sum((s - mean) ** 2 for s in group) / (K - 1)) ** 0.5 + 1e-9),
        }[estimator] * float(experience.weights[slot])
        penalties = [-kl_coef * float(x) for x in experience.kl[first : first + length]]
        flat += [sum(penalties[t:]) + score for t in range(length)]
        first += length
    return torch.tensor(flat)


def openrlhf_method(name):
    """A method of OpenRLHF's experience maker, taken from its file: the module cannot be imported without Ray."""
    origin = importlib.util.find_spec("openrlhf").submodule_search_locations[0]
    tree = ast.parse((Path(origin) / "trainer/ppo_utils/experience_maker.py").read_text())
    method = next(n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == name)
    method.decorator_list, method.returns = [], None
    for argument in method.args.args:
        argument.annotation = None
    names = {"torch": torch, "itertools": itertools, "compute_reward": compute_reward}
    names |= {"apply_length_penalties": lambda *_: None}
    exec(compile(ast.Module([method], []), "openrlhf", "exec"), names)
    return names[name]


def openrlhf_advantages(experience, estimator, kl_coef):
    """(N,) from OpenRLHF's `compute_advantages_and_returns`, whitening included, on one experience of the batch."""
    index = experience.index
    theirs = SimpleNamespace(
        rewards=experience.scores,
        index=list(range(len(index.lengths))),
        info={},
        kl=index.pad(experience.kl),
        values=index.pad(experience.values),
        action_mask=index.mask,
    )
    advantage = SimpleNamespace(estimator=estimator, gamma=1.0, lambd=0.95, no_std_norm=False)
    args = SimpleNamespace(
        algo=SimpleNamespace(advantage=advantage),
        rollout=SimpleNamespace(n_samples_per_prompt=K),
        reward=SimpleNamespace(clip_range=None),
    )
    maker = SimpleNamespace(
        strategy=SimpleNamespace(args=args),
        kl_ctl=SimpleNamespace(value=kl_coef),
        advantage_estimator=estimator,
        get_cumulative_returns=lambda *a: openrlhf_method("get_cumulative_returns")(None, *a),
        get_advantages_and_returns=lambda *a: openrlhf_method("get_advantages_and_returns")(None, *a),
    )
    openrlhf_method("compute_advantages_and_returns")(maker, [theirs])
    return index.flatten(theirs.advantages)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_estimators_equal_openrlhfs(estimator):
    experience = experience_of()
    experience.weights = torch.ones(len(LENGTHS))  # which OpenRLHF does not have
    experience.estimate_advantages(Ppo(samples_per_prompt=K, advantage_estimator=estimator), 0.3)
    torch.testing.assert_close(experience.advantages, openrlhf_advantages(experience, estimator, 0.3))


@pytest.mark.parametrize("estimator", ESTIMATORS[:-1])
def test_estimators_equal_loops_in_float64(estimator):
    experience = experience_of()
    experience.estimate_advantages(Ppo(samples_per_prompt=K, advantage_estimator=estimator, whiten=False), 0.3)
    expected = loop_estimate(experience, estimator, 0.3)
    torch.testing.assert_close(experience.advantages.double(), expected.double(), atol=1e-6, rtol=1e-6)


def test_reinforce_discounts():
    experience = experience_of()
    experience.estimate_advantages(
        Ppo(samples_per_prompt=K, advantage_estimator="reinforce", gamma=0.5, whiten=False), 0
    )
    last = experience.advantages[3], experience.advantages[0]  # of the first response, 4 tokens
    assert last == (0.5, 0.0625)  # its weight times the score, and that discounted three times


@pytest.mark.parametrize("estimator", GROUPED)
def test_equal_rewards_have_no_advantage(estimator):
    assert (compared_scores(torch.tensor([1.0] * 3 + [-1.0] * 3), 3, estimator) == 0).all()


def test_the_kl_as_a_loss_leaves_the_rewards_alone():
    with_penalty, without = experience_of(), experience_of()
    settings = {"samples_per_prompt": K, "advantage_estimator": "rloo"}
    with_penalty.estimate_advantages(Ppo(**settings), 0.0)
    without.estimate_advantages(Ppo(**settings, kl={"use_loss": True}), 0.3)
    assert torch.equal(with_penalty.advantages, without.advantages)


# ------------------------------------------------------------------------------------------------- the policy


def group_rows(vocabulary=200):
    """Two prompts with a common beginning, each with K responses of the lengths above."""
    generator = torch.Generator().manual_seed(2)

    def ids(n):
        return torch.randint(5, vocabulary, (n,), generator=generator).tolist()

    task = ids(40)
    prompts = [task + ids(25), task + ids(31)]
    return [Sample(prompts[slot // K], ids(length)) for slot, length in enumerate(LENGTHS)]


@pytest.mark.parametrize("family", ["llama", "qwen2", "mpt"])
def test_leaves_of_one_node_equal_separate_rows(tiny_model, family):
    """Logprobs, values and gradients of K responses that share their prompt are those of separate rows."""
    policy, rows = make_policy(tiny_model(family)), group_rows()
    together = pack(rows)
    assert together.input_ids.shape[1] == 40 + 25 + 31 + sum(LENGTHS) - len(LENGTHS), "each prompt once"

    def compute(packs):
        with policy.role("actor"):
            found = [policy(one, entropy="differentiable") for one in packs]
        flat = {name: torch.cat([out[name] for out in found]) for name in found[0]}
        sum((tensor * torch.linspace(-1, 1, len(tensor))).sum() for tensor in flat.values()).backward()
        return flat, gradients(policy)

    ours, our_gradients = compute([together])
    theirs, their_gradients = compute([pack([row]) for row in rows])
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, atol=1e-4, rtol=1e-4)
    for name, gradient in their_gradients.items():
        torch.testing.assert_close(our_gradients[name], gradient, atol=2e-4, rtol=2e-3)


@pytest.mark.parametrize("family", ["llama", "mpt"])
def test_responses_to_one_prompt_are_those_of_separate_requests(tiny_model, family):
    from extensions.model.loading import load_tokenizer
    from extensions.recipe import Model

    folder = tiny_model(family)
    policy = make_policy(folder)
    sampler = Sampler(policy, load_tokenizer(Model(path=str(folder))), "</Judgement>", 16)
    prompts = list(dict.fromkeys(tuple(row.prompt) for row in group_rows()))
    requests = [
        training_request(prompt, 0, 0, 4 * n + j, [6, 12]) for n, prompt in enumerate(prompts) for j in range(4)
    ]
    together, alone = sampler.sample(requests), [sampler.sample([request])[0] for request in requests]
    assert [one.tokens for one in together] == [one.tokens for one in alone]
    assert len({tuple(one.tokens) for one in together}) > 4, "responses to a prompt differ"
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one.logprobs, other.logprobs, atol=1e-4, rtol=1e-4)


# ----------------------------------------------------------------------------------------------- groups, losses


def trainer_of(policy, **ppo):
    engine, trainer = PlainEngine(policy), PpoTrainer.__new__(PpoTrainer)
    from extensions.prefix.limits import MemoryLimits

    settings = Ppo(samples_per_prompt=K, advantage_estimator="rloo", epochs=1, **ppo)
    trainer.policy, trainer.engine, trainer.strategy, trainer.ppo = policy, engine, engine, settings
    trainer.losses, trainer.limits, trainer.entropy, trainer.seed = PpoLosses(settings), MemoryLimits(), "number", 0
    trainer._first_forward, trainer.recompute = None, True
    trainer.kl_controller = SimpleNamespace(value=0.3)
    return trainer


def updated(policy, experience, **ppo):
    trainer = trainer_of(policy, **ppo)
    experience.estimate_advantages(trainer.ppo, 0.3)
    return trainer.update(experience, 0), gradients(policy)


def test_a_dropped_group_is_out_of_the_update(tiny_model):
    """The update is that of a batch without the group."""
    policy, rows = make_policy(tiny_model("llama"), critic="none"), group_rows()
    scores = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 1.0])
    whole = experience_of(rows, scores)
    whole.kl = torch.zeros_like(whole.kl)
    sums, found = updated(policy, whole, drop_equal_groups=True)
    assert int(sums["tokens"]) == sum(LENGTHS[:K]) and whole.equal_groups.tolist() == [False, True]
    kept = experience_of(rows[:K], scores[:K], LENGTHS[:K])
    kept.logprobs, kept.weights = whole.logprobs[: sum(LENGTHS[:K])], whole.weights[:K]
    kept.kl = torch.zeros_like(kept.kl)
    _, wanted = updated(policy, kept)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4)
    _, all_groups = updated(policy, experience_of(rows, scores))
    assert any(not torch.allclose(all_groups[name], found[name], rtol=1e-2) for name in found), "the key has an effect"


def test_a_batch_of_equal_groups_is_kept(tiny_model):
    policy, scores = make_policy(tiny_model("llama"), critic="none"), torch.ones(2 * K)
    sums, _ = updated(policy, experience_of(group_rows(), scores), drop_equal_groups=True)
    assert int(sums["tokens"]) == sum(LENGTHS)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_losses_equal_their_formulas(estimator):
    """Values by Schulman's formulas; the gradient of k1 and k2 is w k1 grad log pi, with w = 1 for k2."""
    experience = experience_of()
    experience.reference = experience.logprobs + 0.3 * torch.randn(
        len(experience.logprobs), generator=torch.Generator()
    )
    settings = Ppo(kl={"use_loss": True, "estimator": estimator})
    experience.advantages = torch.zeros_like(experience.logprobs)
    experience.kept = torch.ones_like(experience.logprobs)
    new = (experience.logprobs + 0.1).requires_grad_()
    part = SimpleNamespace(tokens=torch.arange(len(new)))
    scale = Scale(torch.tensor(float(len(new))), 1)
    loss = PpoLosses(settings).actor(experience, {"logprobs": new, "entropy": new * 0}, part, scale, 0.7)
    ratio = (new.detach() - experience.reference).double()
    value = {"k1": ratio, "k2": ratio**2 / 2, "k3": (-ratio).exp() - 1 + ratio}[estimator]
    assert float(loss.kl_loss.detach()) == pytest.approx(float(value.mean()), rel=1e-4)
    assert float(loss.loss.detach()) == pytest.approx(0.7 * float(value.mean()), rel=1e-4)
    loss.loss.backward()
    weight = {"k1": 2.718281828459045**0.1 * ratio, "k2": ratio, "k3": 1 - (-ratio).exp()}[estimator]
    torch.testing.assert_close(new.grad.double(), 0.7 * weight / len(new), atol=1e-6, rtol=1e-4)


def test_clip_higher_clips_each_side_by_its_own():
    experience = experience_of()
    experience.kept = torch.ones_like(experience.logprobs)
    n = len(experience.logprobs)
    experience.advantages = torch.tensor([1.0, 1.0, -1.0, -1.0] + [0.0] * (n - 4))
    ratios = torch.tensor([1.25, 1.5, 0.9, 0.5] + [1.0] * (n - 4))
    out = {"logprobs": experience.logprobs + ratios.log(), "entropy": torch.zeros(n)}
    part, scale = SimpleNamespace(tokens=torch.arange(n)), Scale(torch.tensor(float(n)), 1)
    loss = PpoLosses(Ppo(clip=[0.2, 0.28])).actor(experience, out, part, scale, 0.0)
    assert float(loss.policy_loss) == pytest.approx(-(1.25 + 1.28 - 0.9 - 0.8) / n, rel=1e-4)
    assert float(loss.clip_fraction) == pytest.approx(2 / n)


# ----------------------------------------------------------------------------------------------------- whole runs

GROUPS = ["ppo.samples_per_prompt=3", "ppo.advantage_estimator=group_norm", "evaluation.yardsticks=false"]


def run(tiny_model, folder, *overrides, **sections):
    folder.mkdir(exist_ok=True)
    path = write_recipe(folder, tiny_model("llama"), output_dir=str(folder / "run"), **sections)
    assert main([str(path), *GROUPS, *overrides]) == 0
    return folder / "run"


@pytest.mark.slow
def test_a_run_with_groups_has_no_critic_and_counts_prompts(tiny_model, tmp_path):
    found = run(tiny_model, tmp_path, "evaluation.before=false", "logging.rollout_samples=100")
    metrics, records = read_jsonl(found / "metrics.jsonl"), read_jsonl(found / "rollouts.jsonl")
    assert not (found / "critic").exists()
    assert [line["samples"] for line in metrics] == [4, 8]
    for line in metrics:
        own = [r for r in records if r["step"] == line["step"]]
        assert len(own) == 12 and "value_loss" not in line
        groups = [own[3 * n : 3 * n + 3] for n in range(4)]
        assert all(len({r["prompt"] for r in group}) == 1 for group in groups)
        assert line["equal_groups"] == sum(len({r["reward"] for r in group}) == 1 for group in groups) / 4
        assert line["packed_tokens"] < line["logical_tokens"]


def test_resampling_replaces_groups_of_equal_rewards_only(tiny_model, tmp_path):
    options = ["evaluation.before=false", "logging.rollout_samples=100", "max_steps=1"]
    once = read_jsonl(run(tiny_model, tmp_path / "once", *options) / "rollouts.jsonl")
    again = read_jsonl(run(tiny_model, tmp_path / "again", *options, "ppo.resample_equal_groups=2") / "rollouts.jsonl")
    replaced = 0
    for n in range(4):
        first, second = once[3 * n : 3 * n + 3], again[3 * n : 3 * n + 3]
        equal = len({r["reward"] for r in first}) == 1
        assert [r["index"] for r in first] == [r["index"] for r in second]
        assert equal == ([r["response"] for r in first] != [r["response"] for r in second])
        replaced += equal
    assert replaced, "some group of the first batch has equal rewards"


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["ppo.drop_equal_groups=true", "ppo.kl.use_loss=true"]], ids=["keep", "drop"])
def test_two_ranks_equal_one_with_groups(tiny_model, tmp_path, options):
    one = run(tiny_model, tmp_path / "one", *options)
    path = write_recipe(tmp_path, tiny_model("llama"), output_dir=str(tmp_path / "two"))
    done = launch(path, *GROUPS, *options, ranks=2)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    ours, theirs = adapter_of(tmp_path / "two"), adapter_of(one)
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, atol=2e-4, rtol=2e-3)
    responses = [
        [r["prompt"] + r["response"] for r in read_jsonl(f / "rollouts.jsonl")] for f in (one, tmp_path / "two")
    ]
    assert responses[0] == responses[1]


@pytest.mark.slow
def test_a_resumed_run_with_groups_equals_an_uninterrupted_one(tiny_model, tmp_path):
    options = ["schedule.name=constant", "schedule.warmup_ratio=0", "evaluation.before=false"]
    whole = run(tiny_model, tmp_path / "whole", *options, "max_steps=3")
    run(tiny_model, tmp_path / "parts", *options, "max_steps=1")
    parts = run(tiny_model, tmp_path / "parts", *options, "max_steps=3")
    ours, theirs = adapter_of(parts), adapter_of(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert timeless(parts / "metrics.jsonl") == timeless(whole / "metrics.jsonl")
