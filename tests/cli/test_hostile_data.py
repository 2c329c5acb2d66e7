"""Commands that print data show them as they are, whatever the console's encoding."""

import json

import pytest
import yaml
from run_folders import write_run
from typer.testing import CliRunner

from extensions.cli import app as cli
from extensions.cli.main import app
from extensions.common.console import visible
from extensions.inference.command import _print_answer
from extensions.inference.predictor import Answer

LABELS = ["[bold]x[/bold]", "[/]", ":smile:", "1:100:3", "é 漢字 🙂"]
TEXTS = [*LABELS, "\x1b[31mred", "a\rb"]
ENCODINGS = ["utf-8", "ascii", "latin-1"]


@pytest.fixture(scope="module")
def recipe(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "[red] é 1:100:3"
    folder.mkdir()
    rows = [{"text": f"{text} {k}", "label": LABELS[k % 5]} for k, text in enumerate(TEXTS)]
    for name in ("train [red].jsonl", "dev.jsonl"):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    task = {"name": "own", "title": "1:100:3 [red] é", "description": "-", "question": "{text}", "labels": LABELS}
    task["source"] = {"files": {"train": "train [red].jsonl", "validation": "dev.jsonl"}}
    raw = {"name": "own", "model": {"path": str(tiny_model("llama"))}, "data": {"tasks": [task]}}
    path = folder / ":smile: [x].yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return path


def run(encoding, *arguments):
    """Status, and output in this encoding."""
    runner = CliRunner(charset=encoding, env={"COLUMNS": "300"})
    found = runner.invoke(app, [str(argument) for argument in arguments])
    assert found.exception is None or isinstance(found.exception, SystemExit), found.exception
    return found.exit_code, found.output


def shown(text, encoding):
    return visible(text).encode(encoding, "backslashreplace").decode(encoding)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize(
    ("command", "status", "parts"),
    [
        (["validate"], 0, [":smile: [x].yaml", "[red] é 1:100:3", "1:100:3 [red] é"]),
        (["validate", "data.root='[/]'"], 2, ["[/]", "train [red].jsonl"]),
        (["show"], 0, ["1:100:3 [red] é", ":smile:"]),
        (["show", "--keys"], 0, ["data.tasks[]"]),
        (["preview", "-n", "7"], 0, [*TEXTS, "1:100:3 [red] é"]),
        (["plan"], 0, []),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_commands_on_a_recipe(recipe, monkeypatch, encoding, command, status, parts):
    monkeypatch.setattr(cli.console, "_width", 300)
    name, *rest = command
    found, output = run(encoding, name, recipe, *rest)
    assert found == status, output
    for part in parts:
        assert shown(part, encoding) in output, part
    assert "\x1b" not in output and "\r" not in output


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_commands_on_folders(tmp_path, monkeypatch, encoding):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "[red] é 1:100:3"
    write_run(tmp_path / "run", "ppo", {"cola": [0.5]})
    (tmp_path / "run").rename(folder)
    for command in (["report", folder, "--out", f"{folder}-out"], ["status", folder], ["report", f"{folder}/:smile:"]):
        status, output = run(encoding, *command)
        assert shown("[red] é 1:100:3", encoding) in output
        assert status == (2 if ":smile:" in str(command[1]) else 0), output
    assert run(encoding, "tasks")[0] == run(encoding, "--help")[0] == 0
    assert run(encoding, ":smile:")[0] == run(encoding, "[/]")[0] == 2


def test_an_answer_on_the_console(capsys):
    for label in TEXTS:
        _print_answer(Answer(label, 0.5, {label: 0.5}, raw=label))
        output = capsys.readouterr().out
        assert output.count(visible(label)) >= 2 and "\x1b" not in output
