"""The effect of each recipe key on a run that goes on."""

import re
from pathlib import Path

import pytest
import yaml
from support import ROOT, write_recipe

from extensions.recipe import all_keys, changes, dump_recipe, load_recipe
from extensions.recipe.changes import EFFECTS, effect_of


def test_every_key_has_an_effect_and_every_entry_a_key():
    keys = all_keys()
    for key in keys:
        effect_of(key)
    unused = [entry for entry in EFFECTS if not any(key == entry or key.startswith(f"{entry}.") for key in keys)]
    assert unused == []


@pytest.mark.parametrize(
    ("key", "effect"),
    [
        ("evaluation.batch_size", "numerics"),
        ("evaluation.decoding", "evaluation"),
        ("deepspeed.timeout", "none"),
        ("deepspeed.zero_stage", "numerics"),
        ("model.dtype", "learning"),
        ("model.path", "none"),
        ("sft.max_steps", "length"),
        ("ppo.kl.init", "learning"),
        ("lora.dropout", "learning"),
        ("lora.rank", "structure"),
    ],
)
def test_the_longest_entry_decides(key, effect):
    assert effect_of(key) == effect


def test_changes_names_keys_with_both_values_but_not_the_files_of_tasks(tmp_path):
    own = {"name": "own", "description": "Say a or b.", "question": "{text}", "labels": ["a", "b"]}

    def recipe(file, *overrides):
        task = own | {"source": {"files": {"train": file, "validation": file}}}
        return load_recipe(write_recipe(tmp_path, Path("model"), data={"tasks": [task]}), overrides)

    before = yaml.safe_load(dump_recipe(recipe("a.csv")))
    assert changes(before, recipe("a.csv")) == []
    assert changes(before, recipe("moved/b.csv")) == []
    changed = changes(before, recipe("a.csv", "ppo.kl.init=0.5", "max_steps=9"))
    assert [(c.key, c.was, c.now, c.effect) for c in changed] == [
        ("max_steps", 2, 9, "length"),
        ("ppo.kl.init", 0.2, 0.5, "learning"),
    ]
    own["description"] = "Say b or a."
    assert [c.key for c in changes(before, recipe("a.csv"))] == ["data.tasks"]


def test_the_page_lists_every_entry_under_its_effect():
    page = (ROOT / "extensions/runs/FAULTS.md").read_text()
    rows = dict(re.findall(rf"^\| ({'|'.join(set(EFFECTS.values()))}) \| ([^|]*) \|", page, re.MULTILINE))
    assert {effect: set(re.findall(r"`([\w.]+)`", keys)) for effect, keys in rows.items()} == {
        effect: {entry for entry, own in EFFECTS.items() if own == effect} for effect in set(EFFECTS.values())
    }
