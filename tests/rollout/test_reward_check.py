"""The check of a reward before training: faults that it finds, and rewards that it accepts."""

import pytest

from extensions.common.errors import UserError
from extensions.data import Example
from extensions.rollout.reward_check import check_reward, reward_faults
from extensions.rollout.rewards import load_reward
from extensions.tasks import TASKS, Task

TEAMS = Task.model_validate(
    {
        "name": "teams",
        "description": "Route.",
        "question": "{text}",
        "labels": {"Billing": ["billing"], "Tech": ["tech"]},
    }
)
SCORES = Task.model_validate(
    {"name": "s", "description": "d", "question": "{text}", "score_range": [0.0, 4.0], "metrics": ["pearson"]}
)


def rows(task, labels):
    return [Example(task, i, {"text": "x"}, label) for i, label in enumerate(labels)]


def reward_of(folder, body):
    path = folder / "own.py"
    path.write_text(f"def reward(text, label):\n    {body}\n")
    return load_reward(str(path))


RIGHT = "answer, closed, _ = text.partition('</'); return 1.0 if closed and answer.strip() == label.lower() else 0.0"


@pytest.mark.parametrize(
    "body, fatal, parts",
    [
        ("return 1 / (label != 'Tech')", True, ["ZeroDivisionError", "'Tech'"]),
        ("return None if label == 'Tech' else 1", True, ["returned None", "'Tech'"]),
        ("return 'good'", True, ["returned 'good'", "'Billing'"]),
        ("return float('nan')", True, ["nan"]),
        ("return 0.5", True, ["0.5 for gold, wrong and garbage answers alike"]),
        # The labels in the data are capitalised, the answer is not: a right answer earns what a wrong one does.
        (
            "answer, closed, _ = text.partition('</Judgement>'); return float(answer == label) if closed else -1.0",
            False,
            [
                "for 2 of 2 labels",
                "label 'Billing': ' tech </Judgement>' earns 0, gold ' billing </Judgement>' 0",
            ],
        ),
        (
            "return float(text.strip().startswith(label.lower()))",
            False,
            ["'billing' earns 1, gold ' billing </Judgement>' 1"],
        ),
        (f"if label == 'Tech': return float(len(text))\n    {RIGHT}", False, ["for 1 of 2 labels", "label 'Tech'"]),
    ],
)
def test_faults_are_found(tmp_path, body, fatal, parts):
    reward, examples = reward_of(tmp_path, body), rows(TEAMS, ["Billing"] * 5 + ["Tech"])
    [(message, found)] = reward_faults(reward, examples)
    assert found == fatal and all(part in message for part in parts), message
    warned = []
    if fatal:
        with pytest.raises(UserError):
            check_reward(reward, examples, warned.append)
    else:
        check_reward(reward, examples, warned.append)
        assert warned == [message]


def test_good_rewards_have_no_faults(tmp_path):
    assert list(reward_faults(reward_of(tmp_path, RIGHT), rows(TEAMS, ["Billing", "Tech"]))) == []
    assert list(reward_faults(load_reward("nlu"), rows(TEAMS, ["Billing", "Tech"]))) == []
    assert list(reward_faults(load_reward("nlu"), rows(SCORES, ["0", "2", "4"]))) == []
    assert list(reward_faults(load_reward("nlu"), [])) == []
    for task in (TASKS["cola"], TASKS["stsb"], TASKS["mnli"]):
        labels = list(task.labels) or ["0", "5"]
        examples = [Example(task, i, dict.fromkeys(task.fields, "x"), label) for i, label in enumerate(labels)]
        assert list(reward_faults(load_reward("nlu"), examples)) == []


def test_a_reward_of_openrlhfs_contract_is_checked(tmp_path):
    path = tmp_path / "batched.py"
    path.write_text("def reward_func(queries, prompts, labels):\n    return {'rewards': [0.0] * len(labels)}\n")
    [(message, fatal)] = reward_faults(load_reward(str(path)), rows(TEAMS, ["Billing"]))
    assert fatal and "alike" in message
