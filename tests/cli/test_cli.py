"""The command `nlu`: its output and exit codes (0, or 2 for user errors, without a traceback)."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from support import ROOT, run_command, write_recipe
from typer.testing import CliRunner

from extensions.cli.main import app
from extensions.model.loading import load_tokenizer
from extensions.prompts import prompt_text
from extensions.recipe import Model, load_recipe
from extensions.tasks import TASKS, Task

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def nlu(*arguments):
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(argument) for argument in arguments])


def succeeds(*arguments):
    result = nlu(*arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def fails(*arguments):
    result = nlu(*arguments)
    assert result.exit_code == 2, (result.output, result.exception)
    assert "Traceback" not in result.output and not isinstance(result.exception, ValueError)
    assert result.stdout == ""
    return result.stderr


@pytest.fixture
def recipe(tmp_path, tiny_model):
    raw = {
        "name": "trial",
        "model": {"path": str(tiny_model("llama"))},
        "data": {"tasks": ["acceptability"]},
        "max_steps": 3,
    }
    path = tmp_path / "trial.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def own_task(folder, rows):
    for name, lines in rows.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in lines))
    files = {Path(name).stem: name for name in rows}
    return {
        "name": "own",
        "description": "Judge.",
        "question": 'Judge "{text}".',
        "labels": {"a": ["Good"], "b": ["Bad"]},
        "source": {"files": files},
    }


def own_recipe(folder, model, rows, **keys):
    raw = {"name": "own", "model": {"path": model}, "data": {"tasks": [own_task(folder, rows)], "root": str(folder)}}
    path = folder / "own.yaml"
    path.write_text(yaml.safe_dump(raw | keys))
    return path


def test_help_names_the_commands():
    text = succeeds("--help")
    for command in ("validate", "show", "preview", "tasks", "submit", "export", "sweep", "report", "merge", "env"):
        assert command in text


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_validates(path):
    assert "valid" in succeeds("validate", path)


def test_the_shipped_recipes_were_found():
    assert len(RECIPES) == sum(path.is_file() for path in (ROOT / "recipes").iterdir()) > 0


def test_validate(recipe):
    text = succeeds("validate", recipe, "ppo.batch_size=8")
    assert "valid" in text and "Acceptability" in text and "3 iterations of 8" in text and "validations" not in text
    assert "validations: every 2 of 3 iterations" in succeeds("validate", recipe, "evaluation.every_steps=0.5")


def test_validate_reports_every_error(recipe):
    error = fails("validate", recipe, "ppo.epochs=0", "sede=3", "optimizer.lr=fast")
    assert error.startswith("error: ")
    for part in ("3 errors", "ppo.epochs", "sede", "did you mean 'seed'", "optimizer.lr", "'fast'"):
        assert part in error


@pytest.mark.parametrize(
    "arguments, part",
    [
        (["nowhere.yaml"], "nowhere.yaml: no such recipe"),
        (["recipes"], "cannot be read"),
    ],
)
def test_validate_without_a_recipe(arguments, part, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert part in fails("validate", *arguments)


def test_validate_reads_the_reward_and_the_data(tmp_path):
    rows = {"train.jsonl": [{"text": "x", "label": "a"}], "validation.jsonl": [{"text": "x", "label": "c"}]}
    path = own_recipe(tmp_path, "some/model", rows, reward="nope.py")
    error = fails("validate", path)
    assert "2 error" in error
    for part in (f"'{tmp_path / 'nope.py'}'", "validation.jsonl, line 1", "'label'", "'c'"):
        assert part in error
    assert "valid" in succeeds("validate", path, "reward=nlu", "data.tasks=acceptability")
    assert "not a folder" in fails("validate", path, "reward=nlu", f"data.root={tmp_path}/nowhere")


@pytest.mark.slow
def test_validate_reports_unchecked_data(recipe, data_root):
    assert "data files not checked" in succeeds("validate", recipe, "data.tasks=cola")
    text = succeeds("validate", recipe, "data.tasks=cola,rte", f"data.root={data_root}/glue")
    assert "not checked" not in text
    assert "no such file" in fails("validate", recipe, "data.tasks=cola", f"data.root={data_root}/superglue")


def test_show_prints_the_resolved_recipe(recipe, tmp_path):
    text = succeeds("show", recipe, "seed=9")
    shown = yaml.safe_load(text)
    assert shown["seed"] == 9 and shown["ppo"]["epochs"] == 4 and shown["data"]["tasks"] == ["acceptability"]
    again = tmp_path / "again.yaml"
    again.write_text(text)
    assert load_recipe(again) == load_recipe(recipe, ["seed=9"])
    assert "sede" in fails("show", recipe, "sede=9")


def test_show_keys_lists_every_key(recipe):
    from extensions.recipe import all_keys

    text = succeeds("show", "--keys", recipe)
    lines = text.splitlines()
    keys = [line.split(": ")[0] for line in lines if not line.startswith(" ")]
    assert [key for key in keys if not key.startswith("data.tasks[]")] == list(all_keys())
    assert len(keys) == len(set(keys)) and all(line.startswith("    ") for line in lines[1::2])
    below = {key.removeprefix("data.tasks[].") for key in keys if key.startswith("data.tasks[]")}
    assert below >= {*Task.model_fields, "source.files", "source.split.test", "source.hub.repo", "submission.file"}
    for known in (
        "optimizer.lr: number > 0; default 9e-06\n    peak learning rate (paper 5.1)",
        "method: ppo | sft | eval | encoder; default ppo",
        "max_epochs: number or null > 0; default null",
        "lora.dropout: number >= 0 < 1; default 0.05",
        "model.path: text; required",
        "rollout.response_budget: list of integer >= 1; default [12, 32]",
        "data.tasks[].source.unknown_labels: error | skip; default error",
    ):
        assert known in text, known


def test_preview(recipe):
    text = succeeds("preview", recipe, "-n", "3")
    assert text.count("System_prompt:") == 3 and text.count("Assistant:") == 3
    assert "<Judgement> Yes </Judgement>" in text or "<Judgement> No </Judgement>" in text
    for kind, value in (("gold", "+1.00"), ("wrong", "+0.00"), ("empty", "-1.00"), ("garbage, unclosed", "-1.00")):
        rows = [line for line in text.splitlines() if f" {kind} " in line and value in line]
        assert len(rows) == 3, kind
    assert "tokens" in text and "policy and value loss; PPO draws its budget from " in text


def test_preview_shows_demonstrations(recipe):
    text = succeeds("preview", recipe, "prompt.shots=2", "-n", "1")
    assert text.count("Assistant:") == 3 and text.count("</Judgement>\nPrompt:") == 3, (
        "the format, and two demonstrations"
    )
    assert "SFT: loss over the response" in text
    assert "SFT: loss over both" in succeeds("preview", recipe, "prompt.shots=2", "-n", "1", "sft.loss=sequence")


def test_preview_prints_brackets_in_the_data_unchanged(tmp_path, tiny_model):
    rows = {"train.jsonl": [{"text": "[bold]x[/bold] [/] {text} [red]", "label": "a"}]}
    text = succeeds("preview", own_recipe(tmp_path, str(tiny_model("llama")), rows))
    assert 'Judge "[bold]x[/bold] [/] {text} [red]".' in text


def test_preview_of_a_users_reward(tmp_path, tiny_model):
    (tmp_path / "mine.py").write_text("def reward(text, label):\n    return {'a': 0.25, 'b': -0.5}[label]\n")
    rows = {"train.jsonl": [{"text": "x", "label": "a"}, {"text": "y", "label": "b"}]}
    path = own_recipe(tmp_path, str(tiny_model("llama")), rows, reward=str(tmp_path / "mine.py"))
    text = succeeds("preview", path)
    assert "+0.25" in text and "-0.50" in text
    (tmp_path / "mine.py").write_text("def reward(text, label):\n    raise RuntimeError('my fault')\n")
    result = nlu("preview", path)
    assert result.exit_code == 2 and "RuntimeError: my fault" in result.stderr and "mine.py" in result.stderr


def test_preview_of_a_missing_model(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = nlu("preview", recipe, f"model.path={tmp_path}/nowhere")
    assert result.exit_code == 2 and "nowhere" in result.stderr and "Traceback" not in result.output


def test_tasks_lists_all():
    text = succeeds("tasks")
    for task in TASKS.values():
        assert task.name in text and task.suite in text
    assert "0 to 5" in text and "8551 / 1043 / 1063" in text


def test_env_is_json():
    report = json.loads(succeeds("env"))
    assert report["packages"]["torch"] and report["python"] and report["devices"]


def test_a_wrong_option_is_exit_code_2(recipe):
    assert nlu("preview", recipe, "-n", "0").exit_code == 2
    assert nlu("nothing").exit_code == 2
    assert nlu("validate").exit_code == 2


def test_the_real_process_prints_errors_on_stderr(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", "from extensions.cli.main import main; main()", "validate", "nowhere.yaml"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: nowhere.yaml: no such recipe") and "Traceback" not in done.stderr


def test_brackets_in_a_path_are_printed(recipe):
    other = recipe.parent / "[red]" / "trial.yaml"
    other.parent.mkdir()
    other.write_text(recipe.read_text())
    assert "[red]" in succeeds("validate", other)


# ------------------------------------------------------------------------------------- nlu tasks --data-root

# The required columns of the official layout; every file has two rows.
PAIR = "index\tsentence1\tsentence2"
TESTS = {
    "CoLA/test.tsv": ("index\tsentence", 1),
    "SST-2/test.tsv": ("index\tsentence", 1),
    "MRPC/test.tsv": ("index\t#1 String\t#2 String", 2),
    "QQP/test.tsv": ("id\tquestion1\tquestion2", 2),
    "STS-B/test.tsv": (PAIR, 2),
    "MNLI/test_matched.tsv": (PAIR, 2),
    "MNLI/test_mismatched.tsv": (PAIR, 2),
    "QNLI/test.tsv": ("index\tquestion\tsentence", 2),
    "RTE/test.tsv": (PAIR, 2),
    "WNLI/test.tsv": (PAIR, 2),
    "diagnostic/diagnostic.tsv": (PAIR, 2),
}


@pytest.fixture
def official(tmp_path):
    root = tmp_path / "glue [small]"
    for name, (header, texts) in TESTS.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(header + "".join(f"\n{i}" + "\tAnna slept." * texts for i in range(2)) + "\n")
    return root


def rows_of(text, task):
    """The rows of a task in all tables; in the split table only the first row of a task has its name."""
    found, here = [], False
    for line in text.splitlines():
        if "│" not in line:
            here = False
            continue
        first, *rest = [cell.strip() for cell in line.split("│")[1:-1]]
        here = first == task or (here and not first)
        if here:
            found.append(rest)
    return found


def test_tasks_of_a_folder(official, tiny_model):
    (official / "CoLA" / "train.tsv").write_text("a\t1\t\tAnna slept.\na\t0\t\tAnna slept slept.\na\t1\t\tShe left.\n")
    (official / "CoLA" / "dev.tsv").write_text("a\t2\t\tAnna slept.\n")
    (official / "SST-2" / "dev.tsv").write_text("sentence\tlabel\ndull\t0\n[bold]fine[/bold]\t1\n")
    text = succeeds("tasks", "--data-root", official, "--tokenizer", tiny_model("llama"))
    assert rows_of(text, "cola") == [
        ["train", "3", "Yes 2, No 1"],
        ["validation", "-", ""],
        ["test", "2", ""],
    ], "no prompt lengths, since a split cannot be read"
    splits, lengths = rows_of(text, "sst2")[:2], rows_of(text, "sst2")[2:]
    assert splits == [["validation", "2", "Positive 1, Negative 1"], ["test", "2", ""]]
    (measured,) = lengths[0]
    mean, p95, share = re.fullmatch(r"(\d+), (\d+); (\d+)%", measured).groups()
    # Two prompts that differ only in the review.
    tokenizer = load_tokenizer(Model(path=str(tiny_model("llama"))))
    prompts = [prompt_text(TASKS["sst2"], {"sentence": review}) for review in ("dull", "[bold]fine[/bold]")]
    counts = sorted(len(tokenizer(prompt)["input_ids"]) for prompt in prompts)
    assert int(mean) == round(sum(counts) / 2) and counts[0] < int(p95) <= counts[1] and 50 < int(share) < 100
    absent = re.findall(r"^  (\w+): no (.+?) or ", text, re.MULTILINE)
    assert " ".join(dict(absent)) == "boolq cb copa multirc record superglue_rte wic wsc axb axg"
    assert absent[0][1] == f"{official}/BoolQ/train.jsonl"
    problems = [line for line in text.splitlines() if line.startswith("- ")]
    assert f"- {official}/CoLA/train.tsv: 3 rows; the official train set of CoLA has 8551" in problems
    (broken,) = [line for line in problems if "dev.tsv, line 1" in line]
    assert "label '2'" in broken and str(official) in broken


def test_tasks_with_two_tokenizers(official, tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a relative name is short enough not to wrap
    other = "[red]"
    shutil.copytree(tiny_model("llama"), other)
    text = succeeds("tasks", "--data-root", official, "--tokenizer", tiny_model("llama"), "--tokenizer", other)
    assert [len(row) for row in rows_of(text, "rte")] == [3, 2]
    (_, (first, second)) = rows_of(text, "rte")
    assert first == second != ""
    unwrapped = "".join(character for character in text if character not in " │┃\n")
    assert f"{other}:mean,p95".replace(" ", "") in unwrapped


def test_tasks_with_invalid_options(tmp_path):
    assert "'nowhere' is not a folder" in fails("tasks", "--data-root", "nowhere")
    assert "--tokenizer needs --data-root" in fails("tasks", "--tokenizer", "some/model")
    (tmp_path / "model").mkdir()
    error = fails("tasks", "--data-root", tmp_path, "--tokenizer", tmp_path / "model")
    assert f"cannot load '{tmp_path}/model'" in error


# ---------------------------------------------------------------------------------------- nlu submit, nlu export


def answers(path, **of_tasks):
    rows = [
        {
            "task": task,
            "index": i,
            "text": "",
            "answer": answer,
            "gold": None,
            "kept": {"idx": i},
            "positive_probability": None,
            "positive_log_odds": None,
        }
        for task, given in of_tasks.items()
        for i, answer in enumerate(given)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_submit(official, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    answers(tmp_path / "run" / "predictions_test.jsonl", cola=["0", None], stsb=[None, None])
    answers(tmp_path / "more.jsonl", rte=["not_entailment", "entailment"])
    options = ["--suite", "glue", "--data-root", official, "--fill", "majority"]
    text = succeeds("submit", "run", "more.jsonl", *options)
    assert text.splitlines()[-1] == "submission_glue.zip"
    assert rows_of(text, "CoLA.tsv") == [["2", "1 (50.0%), '1'", "predictions"]]
    assert rows_of(text, "STS-B.tsv") == [["2", "2 (100.0%), '2.5'", "predictions"]]
    assert rows_of(text, "RTE.tsv") == [["2", "0 (0.0%), 'entailment'", "predictions"]]
    assert rows_of(text, "AX.tsv") == [["2", "-", "majority baseline"]]
    with zipfile.ZipFile("submission_glue.zip") as archive:
        assert len(archive.namelist()) == len(TESTS)
        assert archive.read("CoLA.tsv") == b"index\tprediction\n0\t0\n1\t1\n"
        assert archive.read("STS-B.tsv") == b"index\tprediction\n0\t2.500\n1\t2.500\n"
    text = succeeds("submit", "run", "more.jsonl", *options, "--out", tmp_path / "[bold]mine.zip")
    assert text.splitlines()[-1] == f"{tmp_path}/[bold]mine.zip"
    assert (tmp_path / "[bold]mine.zip").read_bytes() == (tmp_path / "submission_glue.zip").read_bytes()


def test_submit_error_messages(official, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = answers(tmp_path / "a.jsonl", cola=["0", "1"])
    out = ["--out", tmp_path / "a.zip"]
    error = fails("submit", source, "--suite", "glue", "--data-root", official, *out)
    assert error.startswith("error: no predictions for mnli, mnli_mm, qqp, ") and "--fill majority" in error
    answers(source, cola=["0", "Yes"])
    error = fails("submit", source, "--suite", "glue", "--data-root", official, "--fill", "majority", *out)
    assert f"{source}, line 2: answer 'Yes'; allowed for cola: 1, 0" in error
    answers(source, cola=["0"])
    error = fails("submit", source, "--suite", "glue", "--data-root", official, "--fill", "majority", *out)
    assert "CoLA.tsv: row 1 missing" in error
    assert "no such file" in fails("submit", "nowhere", "--suite", "glue", *out)
    assert "not a folder" in fails("submit", source, "--suite", "glue", "--data-root", "nowhere", *out)
    answers(source, copa=["0"])
    error = fails("submit", source, "--suite", "superglue", "--fill", "majority", *out)
    assert "--data-root with MultiRC/test.jsonl" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", official.name]
    for options in ([], ["--suite", "other"], ["--suite", "glue", "--fill", "random"]):
        assert nlu("submit", source, *options).exit_code == 2


def test_submit_check(official, tmp_path):
    source = answers(tmp_path / "a.jsonl", cola=["0", "1"])
    options = ["--suite", "glue", "--data-root", official]
    good, bad = tmp_path / "[i]good.zip", tmp_path / "bad.zip"
    succeeds("submit", source, *options, "--fill", "majority", "--out", good)
    before = sorted(tmp_path.iterdir())
    assert succeeds("submit", good, *options, "--check") == f"{good}: a valid glue submission\n"
    with zipfile.ZipFile(good) as archive, zipfile.ZipFile(bad, "w") as changed:
        for name in archive.namelist():
            changed.writestr(name, archive.read(name).replace(b"1\t1", b"1\tYes") if name == "CoLA.tsv" else b"")
    error = fails("submit", bad, *options, "--check")
    assert error.startswith(f"error: {bad}: 11 problem(s)\n")
    assert "  CoLA.tsv: row 1: label 'Yes', expected one of '1', '0'\n" in error
    assert "  AX.tsv, line 1: expected the header" in error
    result = nlu("submit", good, bad, *options, "--check")
    assert result.exit_code == 2 and result.stdout == f"{good}: a valid glue submission\n"
    assert "CoLA.tsv: 2 rows, expected 1063" in fails("submit", good, "--suite", "glue", "--check")
    assert "cannot be read as a zip archive" in fails("submit", source, *options, "--check")
    assert sorted(tmp_path.iterdir()) == sorted([*before, bad]), "nothing else was written"


def test_export(recipe, tmp_path, tiny_model):
    text = succeeds("export", recipe, tmp_path / "[b]out", "data.max_train_samples=8")
    folder = tmp_path / "[b]out" / "acceptability"
    assert text.splitlines()[0] == f"{folder}/train.jsonl: 8 prompts"
    for line in text.splitlines():
        path, _, count = line.removesuffix(" prompts").rpartition(": ")
        found = [json.loads(row) for row in Path(path).read_text().splitlines()]
        assert len(found) == int(count) and {row["datasource"] for row in found} == {"acceptability"}
        assert all(row["input"].endswith("Assistant:\n<Judgement>") for row in found)
    assert {path.name for path in folder.iterdir()} == {"train.jsonl", "validation.jsonl", "test.jsonl"}


def test_export_cuts_prompts_to_the_context(tmp_path, tiny_model):
    """The context has 512 tokens, of which 32 are reserved for the response."""
    path = own_recipe(tmp_path, str(tiny_model("llama")), {"train.jsonl": [{"text": "so " * 2000, "label": "a"}]})
    succeeds("export", path, tmp_path / "out")
    line = json.loads((tmp_path / "out" / "own" / "train.jsonl").read_text())
    tokenizer = load_tokenizer(Model(path=str(tiny_model("llama"))))
    assert 470 < len(tokenizer(line["input"])["input_ids"]) <= 480


def test_export_error_messages(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "file").write_text("mine")
    assert "file/acceptability/train.jsonl: cannot be written" in fails("export", recipe, tmp_path / "file")
    assert "needs data.root" in fails("export", recipe, tmp_path / "out", "data.tasks=cola")
    assert "nowhere" in fails("export", recipe, tmp_path / "out", f"model.path={tmp_path}/nowhere")
    assert "sede" in fails("export", recipe, tmp_path / "out", "sede=1")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_check_reports_how_a_model_is_computed(tiny_model, tmp_path):
    recipe = write_recipe(tmp_path, tiny_model("llama"))
    done = run_command(["nlu", "check", str(recipe)])
    assert done.returncode == 0, done.stderr
    lines = {line[:20].strip(): line[20:].strip() for line in done.stdout.splitlines() if line[:20].strip()}
    assert lines["path"].startswith("packed") and "LlamaForCausalLM (llama)" in lines["model"]
    assert re.fullmatch(r"(\d+) of \1 tokens are those of model.generate", lines["greedy answers"])
    assert lines["LoRA"].startswith("2 x q_proj, 2 x v_proj") and lines["BOS, EOS"].startswith("none; ends at '<eos>'")


@pytest.mark.slow
def test_check_rejects_an_encoder_with_one_error(tiny_bert, tmp_path):
    done = run_command(["nlu", "check", str(write_recipe(tmp_path, tiny_bert))])
    assert done.returncode == 2 and done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr
