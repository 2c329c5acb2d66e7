"""Defaults, own tasks, descriptions, the shown recipe, and the recipes of the project."""

import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from support import BASE_RECIPE, OWN_TASK_RECIPE, ROOT, refused

from extensions.recipe import all_keys, dump_recipe, load_recipe
from extensions.tasks import TASKS, Source, Task, fold

SHIPPED = sorted((ROOT / "recipes").glob("*.yaml"))


def test_a_minimal_recipe_has_the_defaults_of_the_paper(load):
    recipe = load(BASE_RECIPE)
    assert (recipe.lora.rank, recipe.ppo.epochs, recipe.optimizer.lr, recipe.optimizer.name) == (
        16,
        4,
        9e-6,
        "adafactor",
    )
    assert (recipe.rollout.response_budget, recipe.rollout.temperature) == ([12, 32], 1.0)
    assert (recipe.schedule.name, recipe.schedule.warmup_ratio, recipe.schedule.min_lr_ratio) == ("cosine", 0.1, 0.1)
    assert (recipe.lora.alpha, recipe.lora.dropout, recipe.lora.rslora) == (32, 0.05, True)
    assert (recipe.ppo.clip, recipe.ppo.gamma, recipe.ppo.lam, recipe.ppo.value_coef) == ([0.2], 1.0, 0.95, 0.1)
    assert (recipe.ppo.kl.init, recipe.ppo.kl.target, recipe.ppo.kl.horizon) == (0.2, 6.0, 10000.0)
    assert recipe.ppo.whiten and recipe.ppo.kl.adaptive
    assert not recipe.model.trust_remote_code
    assert recipe.run_dir == Path("runs/trial")
    assert load(BASE_RECIPE + "output_dir: elsewhere\n").run_dir == Path("elsewhere")


def test_own_tasks(load):
    task = load(OWN_TASK_RECIPE).data.tasks[0]
    assert task.labels == {"good": ["Good", "fine"], "bad": ["Bad"]}
    assert task.answer("good") == "Good"
    short = load(OWN_TASK_RECIPE.replace("{good: [Good, fine], bad: [Bad]}", "[Good, Bad]")).data.tasks[0]
    assert short.labels == {"Good": ["Good"], "Bad": ["Bad"]}


@pytest.mark.parametrize(
    "old, new, parts",
    [
        ("labels: {good: [Good, fine], bad: [Bad]}", "labels: [Good]", ["two entries"]),
        ("labels: {good: [Good, fine], bad: [Bad]}", "labels: [Good, good]", ["distinct", "good"]),
        ("labels: {good: [Good, fine], bad: [Bad]}", "labels: {good: [x], bad: [X]}", ["distinct"]),
        ("labels: {good: [Good, fine], bad: [Bad]}", "labels: [Good, ' ']", ["empty"]),
        ("labels: {good: [Good, fine], bad: [Bad]}", "labels: [Good, '</Judgement>']", ["tags"]),
        (
            "labels: {good: [Good, fine], bad: [Bad]}",
            "label: [Good]",
            ["label", "unknown key", "did you mean 'labels'"],
        ),
        ("labels: {good: [Good, fine], bad: [Bad]}", "score_range: [5, 0]", ["low < high"]),
        ("labels: {good: [Good, fine], bad: [Bad]}", "score_range: [0]", ["score_range"]),
        ("metrics: [accuracy, f1_macro]", "metrics: [f1]", ["f1", "positive"]),
        ("metrics: [accuracy, f1_macro]", "metrics: [pearson]", ["pearson", "classification"]),
        ("metrics: [accuracy, f1_macro]", "metrics: [acc]", ["metrics", "'acc'", "'accuracy'"]),
        ("metrics: [accuracy, f1_macro]", "metrics: []", ["metrics"]),
        ("metrics: [accuracy, f1_macro]", "positive: God", ["positive", "'God'", "good"]),
        ("metrics: [accuracy, f1_macro]", "truncate: txt", ["truncate", "'txt'", "text"]),
        ("""question: 'Judge "{text}".'""", "question: Judge.", ["question", "field"]),
        ("description: Judge the text.", "description: ''", ["description"]),
        ("name: mine", "name: a b", ["name", "'a b'"]),
        ("train: train.jsonl", "training: train.jsonl", ["training", "allowed: train"]),
        ("format: jsonl", "format: xlsx", ["format", "'xlsx'", "'csv'", "'parquet'"]),
    ],
)
def test_own_tasks_are_checked(load, old, new, parts):
    assert old in OWN_TASK_RECIPE
    message = refused(load, OWN_TASK_RECIPE.replace(old, new))
    assert "data.tasks[0]" in message
    for part in parts:
        assert part in message


def test_an_unknown_task_is_named_with_the_nearest(load):
    message = refused(load, BASE_RECIPE.replace("cola", "CoLa2"))
    assert "data.tasks[0]" in message and "'CoLa2'" in message and "did you mean 'cola'" in message
    assert all(name in message for name in TASKS)


@pytest.mark.parametrize(
    "text", [BASE_RECIPE, OWN_TASK_RECIPE, BASE_RECIPE.replace("[cola]", "[cola, sst2, rte, stsb, acceptability]")]
)
def test_the_shown_recipe_loads_back(load, text):
    recipe = load(text, "optimizer.lr=1e-7", "seed=7", 'model.path="ünï/{x} \\u2028"', "ppo.kl.horizon=1e20")
    shown = dump_recipe(recipe)
    assert load(shown) == recipe
    assert dump_recipe(load(shown)) == shown
    keys = {key.split(".")[0] for key in all_keys()}
    assert keys == set(yaml.safe_load(shown)), "every default is filled in"


@settings(max_examples=40)
@given(
    labels=st.dictionaries(
        st.text(st.characters(codec="utf-8", exclude_characters="\0<"), min_size=1, max_size=8).filter(
            lambda t: t.strip()
        ),
        st.just(0),
        min_size=2,
        max_size=4,
    ),
    text=st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=30),
)
def test_own_tasks_survive_the_round_trip(tmp_path_factory, labels, text):
    if len({fold(word) for word in labels}) < len(labels) or any("judgement" in word.lower() for word in labels):
        return
    text = text.replace("{", "{{").replace("}", "}}")
    entry = {"name": "own", "description": text, "question": text + "{x}", "labels": list(labels)}
    path = tmp_path_factory.mktemp("recipe") / "r.yaml"
    raw = {"name": "a", "model": {"path": "b"}, "data": {"tasks": [entry]}}
    path.write_text(yaml.safe_dump(raw, allow_unicode=True), encoding="utf-8")
    recipe = load_recipe(path)
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(path) == recipe


def test_every_key_is_described():
    fields = all_keys() | {f"task.{k}": f for k, f in Task.model_fields.items()}
    fields |= {f"source.{k}": f for k, f in Source.model_fields.items()}
    assert len(fields) > 70
    for key, field in fields.items():
        assert field.description and len(field.description) > 5, key


def test_every_shipped_recipe_loads():
    assert SHIPPED, "no recipes found"
    names = [load_recipe(path).name for path in SHIPPED]
    files = [path for path in (ROOT / "recipes").iterdir() if path.is_file()]
    assert len(names) == len(files), "a file in recipes/ that is not a .yaml recipe"
    assert len(set(names)) == len(names), "two recipes would share a run folder"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_recipe_shows_and_loads_back(path, load):
    recipe = load_recipe(path)
    assert load(dump_recipe(recipe)) == recipe


def test_recipes_of_the_papers_models_pin_its_supervised_loss():
    """Elsewhere SFT learns the answer alone, the default; both kinds say so in a comment."""
    said = {path.stem: re.search(r"^  loss: (\w+)  # .*$", path.read_text(), re.M) for path in SHIPPED}
    said.pop("bert")
    assert {name: found and found[1] for name, found in said.items()} == {
        name: "sequence" if name.endswith("_glue_mt") else "answer" for name in said
    }
    assert all("(paper 4.2)" in found[0] and "(ours)" in found[0] for found in said.values())
    assert all_keys()["sft.loss"].default == "answer"


def test_every_key_of_every_recipe_has_a_comment():
    """Each `key: value` line of a shipped recipe carries a comment (a section alone needs none)."""
    lines = [
        (path.name, line)
        for path in SHIPPED
        for line in path.read_text().splitlines()
        if re.match(r"\s*\w+: +[^ #]", line)
    ]
    assert len(lines) > 10 * len(SHIPPED)
    assert [(name, line) for name, line in lines if "  # " not in line] == []
