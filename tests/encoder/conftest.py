"""Fixtures of the encoder tests: a toy task, recipes, small benchmark files."""

import json

import pytest
from official import write_benchmarks
from support import BAD, GOOD, THINGS, toy

from extensions.encoder.model import load_collator
from extensions.recipe import Model


@pytest.fixture(scope="session")
def toys(tmp_path_factory):
    """Folder of two JSONL files; the label depends only on the adjective."""
    folder = tmp_path_factory.mktemp("toys")
    rows = [
        {"text": f"the {thing} was {adjective}", "label": label}
        for thing in THINGS
        for words, label in ((GOOD, "good"), (BAD, "bad"))
        for adjective in words
    ]
    for split, kept in (("train", rows[:48]), ("validation", rows[48:])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    return folder


@pytest.fixture
def write(tiny_bert, toys, tmp_path):
    """`write(tasks, name, **sections)`: a recipe file; its run folder is `name` beside it."""

    def make(tasks=None, name="run", root=toys, **sections):
        recipe = {
            "name": name,
            "model": {"path": str(tiny_bert)},
            "data": {"tasks": tasks or [toy("mood")], "root": str(root)},
            "encoder": {"epochs": 8, "batch_size": 8, "lr": 2e-3},
            "logging": {"tensorboard": False},
            "output_dir": str(tmp_path / name),
        }
        for key, value in sections.items():
            recipe[key] = recipe.get(key, {}) | value
        path = tmp_path / f"{name}.yaml"
        path.write_text(json.dumps(recipe))  # JSON is also YAML
        return path

    return make


@pytest.fixture
def loaded(tiny_bert):
    return load_collator(Model(path=str(tiny_bert)), None)


@pytest.fixture(scope="session")
def benchmarks(tmp_path_factory):
    return write_benchmarks(tmp_path_factory.mktemp("benchmarks"))
