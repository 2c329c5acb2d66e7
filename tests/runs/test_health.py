"""Training health: the warnings of each kind, their thresholds, and the same warnings after a resume."""

import json
import re
from math import inf, nan

import pytest
import torch
from health_series import COLA, answers, iterations, metrics_of, record, warnings_of
from hypothesis import given
from hypothesis import strategies as st

from extensions.recipe import all_keys
from extensions.runs.health import GradientWatch, HealthMonitor, KlWatch, RewardWatch

# ---------------------------------------------------------------------------------------------------------------- KL


def test_kl_far_above_its_target_three_times_in_a_row():
    found = warnings_of(KlWatch(6.0), metrics_of(kl=[29.0, 31.0, 32.5, 33.0, 40.0], kl_coef=[0.2] * 5))
    assert [k for k, _ in found] == [4]
    assert found[0][1] == (
        "step 4: kl is above 30 (5 x ppo.kl.target: 6) in 3 iterations in a row (31, 32.5, 33), with kl_coef 0.2: the "
        "policy is leaving its reference. Try a lower optimizer.lr, a higher ppo.kl.init, ppo.max_grad_norm: 1 or "
        "less, or a smaller ppo.clip; check rollouts.jsonl for text outside the prompt's language"
    )


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        ([30.0] * 20, []),  # at the limit
        ([31.0, 31.0, 29.0] * 8, []),  # twice in a row
        ([31.0] * 12, [3]),
        ([31.0] * 13, [3, 13]),  # 10 iterations later
        ([31.0, 31.0, 1.0, 31.0, 31.0, 31.0], [6]),
        ([-1.0, 0.0, 6.0], []),
    ],
)
def test_thresholds_of_a_far_kl(kl, expected):
    assert iterations(KlWatch(6.0), metrics_of(kl=kl, kl_coef=[0.2] * len(kl))) == expected


@pytest.mark.parametrize("bad", [nan, inf, -inf, None], ids=str)
def test_kl_that_is_not_finite(bad):
    found = warnings_of(KlWatch(6.0), metrics_of(kl=[1.0, bad, 31.0, 31.0, bad, 31.0], kl_coef=[0.2] * 6))
    assert [k for k, _ in found] == [2]
    assert found[0][1].startswith(f"step 2: kl is {'null' if bad is None else bad} and kl_coef is 0.2: ")
    assert "optimizer.lr" in found[0][1]
    found = warnings_of(KlWatch(6.0), metrics_of(kl=[bad] * 21, kl_coef=[0.2] * 21))
    assert [k for k, _ in found] == [1, 11, 21]


@pytest.mark.parametrize(
    ("coef", "expected", "part"),
    [
        ([999.0, 1000.0, 1001.0, 1002.0], [3], "kl_coef has grown to 1e+03 (from 999), with kl 5 and ppo.kl.target: 6"),
        ([999.0, 1000.0, 1000.0], [], None),
        ([0.2, 1e-6, 9e-7, 8e-7], [3], "kl_coef has fallen to 9e-07 (from 0.2), with kl 5 and ppo.kl.target: 6"),
        ([0.2, 1e-6], [], None),
        ([1e-7, 1e-7, 2e-7], [], None),  # as the recipe has it
        ([1e-7, 0.99e-7], [2], "kl_coef has fallen to 9.9e-08"),
        ([2e3, 2e3, 1.9e3], [], None),
        ([2e3, 2.1e3], [2], "kl_coef has grown to 2.1e+03 (from 2e+03)"),
        ([0.2, inf], [2], "kl is 5 and kl_coef is inf"),
        ([0.2, nan], [2], "kl is 5 and kl_coef is nan"),
        ([None, 0.2], [], None),
    ],
)
def test_coefficient_of_the_penalty(coef, expected, part):
    found = warnings_of(KlWatch(6.0), metrics_of(kl=[5.0] * len(coef), kl_coef=coef))
    assert [k for k, _ in found] == expected
    if part is not None:
        assert part in found[0][1]


def test_each_kind_of_kl_warning_has_its_own_quiet_period():
    series = metrics_of(kl=[31.0, 31.0, 31.0, nan, 31.0], kl_coef=[0.2, 0.2, 2e3, 2e3, 2e3])
    texts = warnings_of(KlWatch(6.0), series)
    assert [(k, text.split()[2]) for k, text in texts] == [(3, "kl"), (3, "kl_coef"), (4, "kl")]


def test_no_warnings_about_kl_without_a_kl():
    assert iterations(HealthMonitor([COLA], None), metrics_of(kl=[None] * 30, kl_coef=[0.0] * 30)) == []
    assert iterations(HealthMonitor([COLA], 6.0), metrics_of(kl=[None] * 5, kl_coef=[0.2] * 5)) == [1]


# ---------------------------------------------------------------------------------------------------------- gradient


def test_no_gradient_in_ppo():
    ppo = {"reward_mean": [0.5] * 10, "reward_std": [0.1] * 10, "grad_norm": [9.9e-8] * 9 + [0.0]}
    found = warnings_of(GradientWatch(), metrics_of(**ppo))
    assert found == [
        (
            10,
            "step 10: grad_norm is under 1e-07 in 10 iterations in a row (now 0, with reward_std 0.1): the policy no "
            "longer changes. Try ppo.whiten: true, a small ppo.entropy_coef such as 0.01, or model.dtype: float32, and "
            "check lora.target_modules",
        )
    ]


def test_no_gradient_in_sft():
    ((_, text),) = warnings_of(HealthMonitor([COLA], None), metrics_of(grad_norm=[0.0] * 10, loss=[0.25] * 10))
    assert text.startswith("step 10: grad_norm is under 1e-07 in 10 iterations in a row (now 0, with loss 0.25): ")
    assert "ppo." not in text and "evaluation.patience" in text


@pytest.mark.parametrize(
    ("norms", "expected"),
    [
        ([1e-7] * 30, []),
        ([*[0.0] * 9, 1.0] * 3, []),
        ([0.0] * 20, [10, 20]),
        ([*[0.0] * 9, nan, *[0.0] * 10], [20]),
        ([*[0.0] * 9, None, *[0.0] * 9], []),
        ([inf] * 20, []),
    ],
)
def test_thresholds_of_no_gradient(norms, expected):
    assert iterations(GradientWatch(), metrics_of(grad_norm=norms)) == expected


# ------------------------------------------------------------------------------------------------------------ reward


def rewards(deviations, accuracies, mean=-1.0):
    n = len(deviations)
    return metrics_of(reward_std=deviations, reward_mean=[mean] * n, accuracy=accuracies, format_error_rate=[0.25] * n)


def test_rewards_that_are_all_equal():
    assert warnings_of(RewardWatch(), rewards([0.0] * 20, [0.0] * 20)) == [
        (
            20,
            "step 20: within each of the last 20 batches all rewards are equal (now -1, with accuracy 0 and "
            "format_error_rate 0.25): no answer is better than another, so the advantages are noise or zero. Try a "
            "larger ppo.batch_size, data.balanced: true, or a small ppo.entropy_coef such as 0.01; check in "
            "rollouts.jsonl whether the task is solved, and if so stop early by evaluation.patience",
        )
    ]


def test_a_solved_task_has_a_mild_warning():
    assert warnings_of(RewardWatch(), rewards([0.0] * 20, [1.0] * 20, mean=1.0)) == [
        (
            20,
            "step 20: every answer of the last 20 batches is right (accuracy 1): the training samples are solved, and "
            "there is little left to learn. evaluation.patience, with evaluation.every_steps, stops early",
        )
    ]
    ((_, text),) = warnings_of(RewardWatch(), rewards([0.0] * 20, [0.0] + [1.0] * 19, mean=1.0))
    assert "all rewards are equal (now 1, with accuracy 1 and" in text
    ((_, text),) = warnings_of(RewardWatch(), rewards([0.0] * 20, [None] * 20))  # a regression has no accuracy
    assert "with accuracy null" in text


@pytest.mark.parametrize(
    ("deviations", "expected"),
    [
        ([0.0] * 40, [20, 40]),
        ([*[0.0] * 19, 0.01] * 2, []),
        ([1e-5] * 20, []),
        ([nan] * 20, []),
        ([None] * 20, []),
    ],
)
def test_thresholds_of_equal_rewards(deviations, expected):
    assert iterations(RewardWatch(), rewards(deviations, [0.5] * len(deviations))) == expected


def test_equal_rewards_of_which_the_mean_is_rounded():
    equal = torch.full((12,), 0.1)
    deviation = float(equal.std(correction=0))
    assert 0 < deviation < 1e-7
    assert iterations(RewardWatch(), rewards([deviation] * 20, [0.5] * 20, mean=float(equal.mean()))) == [20]


def test_a_batch_of_one_sample_has_no_spread():
    series = [(metrics, [record("1")]) for metrics, _ in rewards([0.0] * 40, [0.5] * 40)]
    assert iterations(RewardWatch(), series) == []
    series = [(metrics, [record("1"), record("0")]) for metrics, _ in rewards([0.0] * 20, [0.5] * 20)]
    assert iterations(RewardWatch(), series) == [20]


# ------------------------------------------------------------------------------------------------------------- whole


def troubled():
    """A PPO run of 75 iterations that goes wrong in each way."""
    series = []
    for k in range(75):
        wrong = 16 if k >= 45 else 4
        records = [record(None if slot < wrong else "1", str(slot % 2)) for slot in range(16)]
        kl = nan if k == 60 else 40.0 if 30 <= k < 50 else 5.0
        metrics = {
            "kl": kl,
            "kl_coef": 2e3 if k >= 65 else 0.2,
            "grad_norm": 0.0 if k >= 20 else 1.0,
            "reward_mean": 1.0,
            "reward_std": 0.0 if k >= 15 else 0.5,
            "accuracy": 1.0 if 15 <= k < 35 else 0.0,
            "format_error_rate": wrong / 16,
        }
        series.append((metrics, records))
    return series


def test_every_warning_of_a_troubled_run():
    found = warnings_of(HealthMonitor([COLA], 6.0), troubled())
    kinds = {
        "collapse": "collapsed to one class",
        "unpredicted": "no answer names",
        "far": "5 x ppo.kl.target",
        "not finite": "kl is nan",
        "coefficient": "kl_coef has grown",
        "format": "has lost the format",
        "gradient": "grad_norm is under",
        "solved": "(accuracy 1)",
        "equal": "all rewards are equal",
    }
    assert {kind: [k for k, text in found if part in text] for kind, part in kinds.items()} == {
        "collapse": [14, 28, 42],  # 12 answers per iteration
        "unpredicted": [4],
        "far": [33, 43],
        "not finite": [61],
        "coefficient": [66],
        "format": [54, 64, 74],
        "gradient": [30, 40, 50, 60, 70],
        "solved": [35],
        "equal": [55, 75],
    }
    assert len(found) == 19


def through_json(watch, tasks=(COLA,), kl_target=6.0):
    resumed = HealthMonitor(tasks, kl_target)
    resumed.load_state(json.loads(json.dumps(watch.state(), allow_nan=False)))
    return resumed


@pytest.mark.parametrize("kl_target", [6.0, None])
def test_a_resumed_run_warns_like_an_uninterrupted_one(kl_target):
    watch = HealthMonitor([COLA], kl_target)
    for k, (metrics, records) in enumerate(troubled(), 1):
        resumed = through_json(watch, kl_target=kl_target)
        metrics = {"step": k} | metrics
        assert resumed.step(metrics, records) == watch.step(metrics, records)
        assert resumed.state() == watch.state()  # so what follows is the same too


NUMBERS = st.sampled_from([0.0, 1e-8, 0.2, 1.0, 40.0, 2e3, nan, inf, -inf, None])
ITERATION = st.tuples(
    st.fixed_dictionaries(
        {},
        optional={
            name: NUMBERS for name in ("kl", "kl_coef", "grad_norm", "reward_std", "reward_mean", "accuracy", "loss")
        },
    ),
    st.integers(0, 12).flatmap(lambda n: st.lists(st.sampled_from(["1", "0", None]), min_size=n, max_size=n)),
)


@given(st.lists(st.tuples(ITERATION, st.integers(1, 40)), max_size=8), st.integers(0, 100))
def test_any_metrics_are_accepted_and_any_state_is_json(parts, cut):
    series = [
        ({"step": 0} | metrics, [record(answer, "0") for answer in given_answers])
        for (metrics, given_answers), times in parts
        for _ in range(times)
    ]
    series = [({"reward_std": None} | metrics, records) for metrics, records in series]  # PPO gives it with the mean
    straight, resumed, expected, found = HealthMonitor([COLA], 6.0), HealthMonitor([COLA], 6.0), [], []
    for k, (metrics, records) in enumerate(series):
        if k == cut:
            resumed = through_json(resumed)
        expected += straight.step(metrics, records)
        found += resumed.step(metrics, records)
    assert found == expected
    through_json(straight)


def test_warnings_name_keys_of_the_recipe():
    known, sections = all_keys(), {key.split(".")[0] for key in all_keys() if "." in key}
    series = [*troubled(), *metrics_of(grad_norm=[0.0] * 10, loss=[0.0] * 10)]
    texts = [text for _, text in warnings_of(HealthMonitor([COLA], 6.0), series)]
    texts += [text for _, text in warnings_of(HealthMonitor([COLA], 6.0), answers((640, 640)))]
    texts += [
        text for _, text in warnings_of(HealthMonitor([COLA], 6.0), metrics_of(kl=[1.0] * 2, kl_coef=[0.2, 1e-7]))
    ]
    for text in texts:
        text = re.sub(r"launch/\w+\.sh", "", text)
        named = [key for key in re.findall(r"\b[a-z_]+(?:\.[a-z_0-9]+)+", text) if key.split(".")[0] in sections]
        assert named, text
        assert set(named) <= set(known), text
