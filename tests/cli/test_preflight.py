"""What `nlu validate` and a run's start find before a model is loaded: useless rewards, models that are not there."""

import json
import socket
import time

import pytest
import yaml

from extensions.cli.preflight import problems
from extensions.common.errors import UserError
from extensions.data import Example
from extensions.model.hub import HubUnreachable, check_source
from extensions.recipe import load_recipe
from extensions.rollout.rewards import check_reward, load_reward, reward_faults
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


RIGHT = "answer, closed, _ = text.partition('</'); return 1.0 if closed and answer == label.lower() else 0.0"


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
                "label 'Billing': 'tech</Judgement>' earns 0, gold 'billing</Judgement>' 0",
            ],
        ),
        ("return float(text.startswith(label.lower()))", False, ["'billing' earns 1, gold 'billing</Judgement>' 1"]),
        (f"if label == 'Tech': return float(len(text))\n    {RIGHT}", False, ["for 1 of 2 labels", "label 'Tech'"]),
    ],
)
def test_a_reward_that_cannot_be_meant_is_found(tmp_path, body, fatal, parts):
    reward, examples = reward_of(tmp_path, body), rows(TEAMS, ["Billing"] * 5 + ["Tech"])
    [(sentence, found)] = reward_faults(reward, examples)
    assert found == fatal and all(part in sentence for part in parts), sentence
    warned = []
    if fatal:
        with pytest.raises(UserError):
            check_reward(reward, examples, warned.append)
    else:
        check_reward(reward, examples, warned.append)
        assert warned == [sentence]


def test_good_rewards_are_left_alone(tmp_path):
    assert list(reward_faults(reward_of(tmp_path, RIGHT), rows(TEAMS, ["Billing", "Tech"]))) == []
    assert list(reward_faults(load_reward("nlu"), rows(TEAMS, ["Billing", "Tech"]))) == []
    assert list(reward_faults(load_reward("nlu"), rows(SCORES, ["0", "2", "4"]))) == []
    assert list(reward_faults(load_reward("nlu"), [])) == []
    for task in (TASKS["cola"], TASKS["stsb"], TASKS["mnli"]):
        labels = list(task.labels) or ["0", "5"]
        examples = [Example(task, i, dict.fromkeys(task.fields, "x"), label) for i, label in enumerate(labels)]
        assert list(reward_faults(load_reward("nlu"), examples)) == []


def test_a_reward_of_openrlhfs_contract_is_tried_too(tmp_path):
    path = tmp_path / "batched.py"
    path.write_text("def reward_func(queries, prompts, labels):\n    return {'rewards': [0.0] * len(labels)}\n")
    [(sentence, fatal)] = reward_faults(load_reward(str(path)), rows(TEAMS, ["Billing"]))
    assert fatal and "alike" in sentence


# ------------------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("path", ["/nowhere/model", "./model", "../model", "a/b/c", "models/my model", "~/model"])
def test_a_path_that_is_no_folder_is_an_error_at_once(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no such folder") as caught:
        check_source(path)
    assert not isinstance(caught.value, HubUnreachable)


def test_a_hub_that_is_not_there_is_found_in_a_second(monkeypatch):
    def nowhere(*arguments, **options):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", nowhere)
    start = time.monotonic()
    with pytest.raises(HubUnreachable, match="cannot be reached"):
        check_source("some-people/some-model")
    assert time.monotonic() - start < 10  # transformers alone retries for half a minute


def test_offline_the_hub_is_not_asked(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubUnreachable, match="HF_HUB_OFFLINE"):
        check_source("some-people/some-model")


def test_a_folder_is_taken_as_it_is(tmp_path):
    check_source(str(tmp_path))


def own_recipe(folder, model, **task):
    for split, count in (("train", 4), ("validation", 2)):
        lines = [{"text": f"{split} {i}", "label": ["Billing", "Tech"][i % 2]} for i in range(count)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = {"files": {split: str(folder / f"{split}.jsonl") for split in ("train", "validation")}}
    entry = TEAMS.model_dump(exclude_defaults=True) | {"source": source} | task
    path = folder / "own.yaml"
    path.write_text(yaml.safe_dump({"name": "own", "model": {"path": str(model)}, "data": {"tasks": [entry]}}))
    return path


def test_problems_of_reward_model_and_prompts_are_all_found(tmp_path, tiny_model):
    (tmp_path / "one.py").write_text("def reward(text, label):\n    return 1.0\n")
    path, warned = own_recipe(tmp_path, tiny_model("llama")), []
    assert problems(load_recipe(path), warned.append) == []
    found = problems(load_recipe(path, [f"reward={tmp_path / 'one.py'}", "model.path=/nowhere"]), warned.append)
    assert len(found) == 2 and "alike" in found[0] and "'/nowhere'" in found[1]
    [fault] = problems(load_recipe(path, ["prompt.max_tokens=16"]), warned.append)
    assert "needs more than the 16 tokens" in fault
    unknown = load_recipe(path, ["model.path=some-people/some-model"])
    assert problems(unknown, warned.append) == [] and "the model was not checked" in warned[-1]
