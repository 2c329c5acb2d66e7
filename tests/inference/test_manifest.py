"""The manifest `nlu.json`: content, damage, the base model, permissions."""

import json
import shutil
import stat
import sys

import pytest
import torch
from predict_cli import LABELS, fails, tickets, write_csv
from support import run_command, write_recipe

from extensions import Predictor
from extensions.common.errors import UserError
from extensions.common.files import read_json
from extensions.inference.manifest import FILE_NAME, Manifest


def test_a_different_base_is_refused(workspace, tiny_model, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tiny_model("llama"), other)
    same = Predictor.load(workspace / "run-sft", model=str(other))  # a copy of the base is accepted
    assert same.predict(tickets(1))[0].answer is not None
    weights = other / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-2] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match=r"is not the model that it was trained on: sha256 .*--model"):
        Predictor.load(workspace / "run-sft", model=str(other))


def test_content(workspace, tiny_model):
    found = Manifest.load(workspace / "run-sft" / "adapter")
    assert [task.name for task in found.tasks] == ["tickets"] and found.tasks[0].labels == LABELS
    assert found.prompt.shots == 1 and len(found.prompt.demonstrations["tickets"]) == 2
    assert found.base.path == str(tiny_model("llama")) and found.base.dtype == "float32"
    assert found.calibration == {"tickets": None} and found.decoding == "likelihood"
    assert found.packages["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda content: None, ["cannot be read", "train again"]),
        (lambda content: "{", ["damaged", "JSON"]),
        (lambda content: [], ["damaged", "format"]),
        (lambda content: content | {"format": 99, "project": "7.0"}, ["format 99", "version 7.0", "update"]),
        (lambda content: {k: v for k, v in content.items() if k != "tasks"}, ["tasks: field required", "damaged"]),
        (lambda content: content | {"tasks": [{"name": "x"}]}, ["tasks.0.description", "Copy the folder again"]),
        (lambda content: content | {"extra": 1}, ["extra: extra inputs"]),
        (lambda content: content | {"prompt": 3}, ["prompt: input should be"]),
    ],
    ids=["missing", "torn", "list", "newer", "no tasks", "half a task", "unknown key", "mistyped"],
)
def test_a_damaged_manifest(workspace, tmp_path, change, parts):
    folder = tmp_path / "adapter"
    shutil.copytree(workspace / "run-sft" / "adapter", folder)
    changed = change(read_json(folder / FILE_NAME))
    (folder / FILE_NAME).unlink()
    if changed is not None:
        text = changed if isinstance(changed, str) else json.dumps(changed)
        (folder / FILE_NAME).write_text(text)
    write_csv(tmp_path / "new.csv", tickets(1))
    message = fails(folder, tmp_path / "new.csv")
    assert str(folder / FILE_NAME) in message and all(part in message for part in parts), message


def modes(folder):
    return {p.name: stat.S_IMODE(p.stat().st_mode) for p in folder.rglob("*") if p.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_all_files_have_the_permissions_of_the_umask(tiny_model, tmp_path, mask, mode):
    recipe = write_recipe(tmp_path, tiny_model("llama"), output_dir=str(tmp_path / "run"), ppo={"critic": "adapter"})
    start = "import os, sys; os.umask(int(sys.argv[1])); "
    code = start + "from extensions.runs.main import main; sys.exit(main(sys.argv[2:], 'ppo'))"
    command = [sys.executable, "-c", code, str(mask), str(recipe), "evaluation.every_steps=1"]
    done = run_command(command)
    assert done.returncode == 0, done.stderr
    merged = [sys.executable, "-c", "import os, sys; os.umask(int(sys.argv[1])); from extensions.cli.main import app; "
              "app(sys.argv[2:])", str(mask), "merge", str(recipe), str(tmp_path / "merged"),
              f"model.adapter={tmp_path / 'run' / 'adapter'}"]  # fmt: skip
    done = run_command(merged)
    assert done.returncode == 0, done.stderr
    found = modes(tmp_path / "run") | modes(tmp_path / "merged")
    assert {"adapter_model.safetensors", "value_head.safetensors", "best.safetensors", "model.safetensors"} <= set(
        found
    )
    assert {name: value for name, value in found.items() if value != mode} == {}
