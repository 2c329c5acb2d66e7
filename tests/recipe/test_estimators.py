"""Keys of the advantage estimators that contradict each other."""

import pytest
from support import BASE_RECIPE, refused

GROUP = "ppo: {samples_per_prompt: 4, advantage_estimator: rloo"
WRONG = [
    (
        "ppo: {advantage_estimator: group_norm}",
        "ppo.advantage_estimator: group_norm compares the responses",
        "2 or more",
    ),
    ("ppo: {drop_equal_groups: true}", "ppo.drop_equal_groups: true compares the responses"),
    ("ppo: {resample_equal_groups: 2}", "ppo.resample_equal_groups: 2 compares the responses"),
    (f"{GROUP}, lam: 0.9}}", "ppo.lam: 0.9 applies to ppo.advantage_estimator: gae only"),
    (f"{GROUP}, critic: adapter}}", "ppo.critic: adapter applies to"),
    (f"{GROUP}, gamma: 0.9}}", "ppo.gamma: 0.9"),
    (f"{GROUP}, whiten_min_std: 0.3}}", "ppo.whiten_min_std: 0.3 has no effect"),
    (f"{GROUP}, drop_equal_groups: true}}\ndeepspeed: {{zero_stage: 3}}\noptimizer: {{name: adamw}}", "at stage 3"),
    ("ppo: {kl: {estimator: k3}}", "ppo.kl.estimator: k3 applies to ppo.kl.use_loss: true"),
    ("ppo: {kl: {use_loss: true, init: 0}}", "ppo.kl.use_loss: true has no effect"),
    ("ppo: {clip: [0.2, 0.3, 0.4]}", "ppo.clip", "at most 2"),
    ("ppo: {clip: [0.2, -0.3]}", "ppo.clip"),
    ("ppo: {samples_per_prompt: 0}", "ppo.samples_per_prompt"),
]


@pytest.mark.parametrize(("text", "parts"), [(row[0], row[1:]) for row in WRONG], ids=[row[0][:60] for row in WRONG])
def test_a_contradiction_is_named(load, text, parts):
    message = refused(load, BASE_RECIPE + text + "\n")
    for part in parts:
        assert part in message


@pytest.mark.parametrize("estimator", ["rloo", "reinforce_baseline", "group_norm", "dr_grpo", "reinforce", "gae"])
def test_every_estimator_loads(load, estimator):
    recipe = load(
        BASE_RECIPE, "ppo.samples_per_prompt=2", f"ppo.advantage_estimator={estimator}", "ppo.clip=[0.2, 0.28]"
    )
    assert recipe.ppo.clip_range == (0.2, 0.28)
    assert (recipe.ppo.value_model == "none") == (estimator != "gae")
