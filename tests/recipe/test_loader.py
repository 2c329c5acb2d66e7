"""Invalid recipes: the message says where the error is, what is wrong and what to do."""

import re

import pytest
import yaml
from support import BASE_RECIPE, ROOT, refused

from extensions.recipe import dump_recipe

SHIPPED = sorted((ROOT / "recipes").glob("*.yaml"))

# (id, text appended to BASE_RECIPE, parts of the message)
WRONG = [
    ("unknown key", "lorra: {rank: 8}\n", ["line 6", "lorra", "unknown key", "did you mean 'lora'"]),
    ("unknown sub-key", "ppo:\n  epoch: 4\n", ["line 7", "ppo.epoch", "unknown key", "did you mean 'epochs'"]),
    ("key of another section", "learning_rate: 1e-5\n", ["line 6", "learning_rate", "unknown key"]),
    ("key in the wrong section", "ppo: {lr: 1e-5}\n", ["line 6", "ppo.lr", "did you mean 'optimizer.lr'"]),
    ("key at the top", "rank: 8\n", ["line 6", "rank", "did you mean 'lora.rank'"]),
    ("hopeless key", "zzzzqqq: 1\n", ["line 6", "zzzzqqq", "unknown key", "Allowed here", "optimizer"]),
    ("text for a number", "max_steps: many\n", ["line 6", "max_steps", "'many'"]),
    ("float for an integer", "max_steps: 1.5\n", ["line 6", "max_steps", "1.5"]),
    ("boolean for an integer", "seed: yes\n", ["line 6", "seed", "True"]),
    ("boolean for a number", "optimizer: {lr: true}\n", ["line 6", "optimizer.lr", "True"]),
    ("number for text", "reward: 5\n", ["line 6", "reward", "5", "string"]),
    ("text for a boolean", "ppo: {whiten: 'true'}\n", ["line 6", "ppo.whiten", "'true'", "boolean"]),
    ("list for a section", "ppo: [1]\n", ["line 6", "ppo", "[1]"]),
    ("value for a section", "ppo: 4\n", ["line 6", "ppo", "4"]),
    ("null for a section", "ppo:\n", ["line 6", "ppo", "None"]),
    ("null for a number", "seed:\n", ["line 6", "seed", "None"]),
    ("date for text", "reward: 2020-01-02\n", ["line 6", "reward"]),
    ("too low", "lora: {rank: 0}\n", ["line 6", "lora.rank", "0", "greater than or equal to 1"]),
    ("too high", "lora:\n  dropout: 1\n", ["line 7", "lora.dropout", "1", "less than 1"]),
    ("negative", "seed: -1\n", ["line 6", "seed", "-1"]),
    ("not a number", "optimizer: {lr: .nan}\n", ["line 6", "optimizer.lr", "nan"]),
    ("infinite", "optimizer: {lr: 1e999}\n", ["line 6", "optimizer.lr", "finite"]),
    ("not a choice", "schedule: {name: cosin}\n", ["line 6", "schedule.name", "'cosin'", "'cosine'", "'linear'"]),
    ("not a stage", "deepspeed: {zero_stage: 4}\n", ["line 6", "deepspeed.zero_stage", "4"]),
    ("short list", "optimizer: {betas: [0.9]}\n", ["line 6", "optimizer.betas", "0.9"]),
    ("bad name", "output_dir: 5\n", ["line 6", "output_dir", "5"]),
]


@pytest.mark.parametrize("text, parts", [row[1:] for row in WRONG], ids=[row[0] for row in WRONG])
def test_a_wrong_key_is_named_with_line_and_value(load, text, parts):
    message = refused(load, BASE_RECIPE + text)
    for part in parts:
        assert part in message
    assert "1 error in the recipe" in message


CONTRADICTIONS = [
    ("adafactor", "deepspeed: {zero_stage: 2}\n", ["deepspeed.zero_stage: 2", "optimizer.name: adafactor", "adamw"]),
    ("offload", "deepspeed: {offload: true}\n", ["deepspeed.offload", "deepspeed.zero_stage"]),
    ("budget", "rollout: {response_budget: [40, 32]}\n", ["rollout.response_budget: [40, 32]", "low <= high"]),
    ("mini-batch", "ppo: {mini_batch_size: 5}\n", ["ppo.mini_batch_size: 5", "ppo.batch_size: 16"]),
    ("patience", "evaluation: {patience: 3}\n", ["evaluation.patience", "evaluation.every_steps"]),
    (
        "best by likelihood",
        "evaluation: {best_by: likelihood, probabilities: false}\n",
        ["evaluation.best_by", "evaluation.probabilities", "evaluation.decoding"],
    ),
]


@pytest.mark.parametrize("text, parts", [row[1:] for row in CONTRADICTIONS], ids=[row[0] for row in CONTRADICTIONS])
def test_a_contradiction_names_both_keys(load, text, parts):
    message = refused(load, BASE_RECIPE + text)
    for part in parts:
        assert part in message


def test_a_task_named_twice(load):
    message = refused(load, BASE_RECIPE.replace("[cola]", "[cola, rte, cola]"))
    assert "data.tasks" in message and "'cola' is named twice" in message


@pytest.mark.parametrize("key", ["name", "model", "model.path", "data", "data.tasks"])
def test_a_missing_key_is_named(load, key):
    raw = yaml.safe_load(BASE_RECIPE)
    *parents, last = key.split(".")
    place = raw
    for parent in parents:
        place = place[parent]
    place.pop(last)
    message = refused(load, yaml.safe_dump(raw))
    assert f"{key}: missing" in message


def test_all_errors_at_once(load):
    text = (
        BASE_RECIPE
        + "lorra: 1\nseed: -1\nppo: {epochs: 0, clip: x}\nschedule: {name: sin}\nevaluation: {patience: 3}\n"
    )
    message = refused(load, text)
    assert "6 errors in the recipe" in message
    lines = message.split("\n")[1:]
    assert len(lines) == 6
    for part in ("lorra", "seed", "ppo.epochs", "ppo.clip", "schedule.name", "evaluation.patience"):
        assert sum(re.match(rf"\s*(line \d+: )?{re.escape(part)}\b", line) is not None for line in lines) == 1, part


def test_both_contradictions_at_once(load):
    message = refused(load, BASE_RECIPE + "deepspeed: {zero_stage: 3}\nppo: {mini_batch_size: 5}\nseed: no\n")
    assert "3 errors" in message
    for part in ("deepspeed.zero_stage", "ppo.mini_batch_size", "line 8: seed"):
        assert part in message


# ---- overrides


def test_overrides(load):
    recipe = load(
        BASE_RECIPE, "ppo.batch_size=8", "optimizer.lr=1e-4", "name=other", "output_dir=null", "ppo.kl.init=0"
    )
    assert (recipe.ppo.batch_size, recipe.optimizer.lr, recipe.name, recipe.ppo.kl.init) == (8, 1e-4, "other", 0.0)
    assert recipe.output_dir is None
    assert [task.name for task in load(BASE_RECIPE, "data.tasks=cola,sst2").data.tasks] == ["cola", "sst2"]
    assert [task.name for task in load(BASE_RECIPE, "data.tasks=[rte, stsb]").data.tasks] == ["rte", "stsb"]
    assert [task.name for task in load(BASE_RECIPE, "data.tasks=rte").data.tasks] == ["rte"]
    assert load(BASE_RECIPE, "seed=1", "seed=2").seed == 2
    assert load(BASE_RECIPE, "model.path=/a=b").model.path == "/a=b"
    assert load(BASE_RECIPE, "lora.target_modules=[q_proj]").lora.target_modules == ["q_proj"]


@pytest.mark.parametrize(
    "override, parts",
    [
        ("ppo.batch_size", ["'ppo.batch_size'", "key.sub=value"]),
        ("=8", ["'=8'", "key.sub=value"]),
        ("", ["key.sub=value"]),
        ("ppo.batchsize=8", ["ppo.batchsize", "did you mean 'batch_size'"]),
        ("ppo.batch_size=x", ["ppo.batch_size", "'x'"]),
        ("ppo.batch_size=", ["ppo.batch_size", "None"]),
        ("batch_size=8", ["batch_size", "unknown key", "ppo.batch_size"]),
        ("seed=[1", ["'seed=[1'", "not valid YAML"]),
        ("name.x=1", ["'name.x=1'", "name holds a value"]),
        ("data.tasks.0=cola", ["data.tasks.0=cola", "data.tasks holds a value"]),
        ("ppo..x=1", ["ppo"]),
        ("data.tasks=colla", ["data.tasks[0]", "'colla'", "did you mean 'cola'"]),
        ("ppo=3", ["ppo", "3"]),
        pytest.param("name.x.y=1", ["name"]),
        pytest.param(
            "seed=2020-13-45",
            ["seed"],
        ),
        pytest.param(
            "seed=" + "[" * 20000,
            ["seed"],
        ),
    ],
)
def test_bad_overrides(load, override, parts):
    message = refused(load, BASE_RECIPE, override)
    for part in parts:
        assert part in message
    assert override.startswith("seed=") is False or "override" in message


def test_template_options(load):
    assert load(BASE_RECIPE).prompt.template_options == {}
    recipe = load(
        BASE_RECIPE, "prompt.chat_template=true", "prompt.template_options={reasoning_effort: low, budget: 3}"
    )
    assert recipe.prompt.template_options == {"reasoning_effort": "low", "budget": 3}
    recipe = load(BASE_RECIPE, "prompt.chat_template=true", "prompt.template_options.enable_thinking=true")
    assert recipe.prompt.template_options == {"enable_thinking": True}
    assert load(dump_recipe(recipe)) == recipe


@pytest.mark.parametrize(
    "value, parts",
    [
        ("low", ["'low'", "dictionary"]),
        ("{a b: 1}", ["'a b'", "not a valid name"]),
        ("{1: 1}", ["1 is not a valid name"]),
        ("{messages: x}", ["'messages'", "set by the prompt encoder"]),
        ("{tokenize: true}", ["'tokenize'"]),
        ("{add_generation_prompt: false}", ["'add_generation_prompt'"]),
        ("{return_tensors: pt}", ["'return_tensors'"]),
        ("{a: [1]}", ["'a'", "[1]", "allowed"]),
        ("{a: .inf}", ["'a'", "inf", "allowed"]),
        ("{a: 2020-01-01}", ["'a'", "allowed"]),
    ],
)
def test_bad_template_options(load, value, parts):
    message = refused(load, BASE_RECIPE, "prompt.chat_template=true", f"prompt.template_options={value}")
    for part in ("prompt.template_options", *parts):
        assert part in message
    assert "1 error" in message


def test_template_options_need_a_template(load):
    message = refused(load, BASE_RECIPE, "prompt.template_options={enable_thinking: true}")
    assert "prompt.template_options needs prompt.chat_template: true" in message
