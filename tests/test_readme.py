"""The pages describe what runs: every command in them is executed, every example is used, every link is valid."""

import json
import re
import shlex

import pytest
import yaml
from official import write_benchmarks
from readme import PAGES, README, blocks, commands_of, own_data_commands
from support import ROOT, free_port, run_command
from typer.testing import CliRunner

from extensions.cli.main import app
from extensions.common.files import read_json
from extensions.data import load_examples
from extensions.distributed.nonfinite import NonFiniteTensor
from extensions.encoder import run as encoder
from extensions.evaluation.submission import make_archive
from extensions.runs.failed_batch import write_part
from extensions.runs.main import main
from extensions.tasks import SUITES, TASKS, Task
from extensions.tasks.shared import THREE_WAY_ENTAILMENT

# Overrides that make a command small enough for a test; the rest of the command is that of the README.
SMALL = [
    "max_steps=1",
    "evaluation.max_samples=2",
    "ppo.epochs=1",
    "rollout.response_budget=[2, 3]",
    "sft.max_steps=1",
    "encoder.epochs=1",
]


OWN_TASKS, TASKS_PAGE = PAGES["extensions/tasks/OWN_TASKS.md"], PAGES["extensions/tasks/TASKS.md"]


def commands():
    """The commands of all pages, each once, without those on the tickets, which tests/test_tickets.py runs."""
    found = dict.fromkeys(command for text in PAGES.values() for command in commands_of(text))
    return [command for command in found if "tickets" not in command]


def test_no_command_escapes_the_tests():
    """A new kind of command in a page needs a case in `shortened`."""
    known = ("deepspeed ", "bash launch/", "nlu ")
    assert len(commands()) >= 35 and all(command.startswith(known) for command in commands())
    tickets = {command for text in PAGES.values() for command in commands_of(text) if "tickets" in command}
    assert tickets == {*own_data_commands(), "nlu validate tickets.yaml"}


def test_the_readmes_are_short():
    assert README.count("\n") <= 130
    rooms = [path for path in (ROOT / "extensions").iterdir() if (path / "__init__.py").exists()]
    assert len(rooms) >= 18
    for room in rooms:
        text = PAGES[f"extensions/{room.name}/README.md"]
        assert text.count("\n") <= 50, f"{room.name}: more than a screen"
        assert f"extensions/{room.name}/README.md" in README, f"{room.name} is missing from the map of rooms"


@pytest.mark.parametrize("page", PAGES)
def test_links_and_paths_exist(page):
    folder = (ROOT / page).parent
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", PAGES[page]):
        assert target.startswith("https://") or (folder / target).exists(), target
    for path in re.findall(r"`((?:extensions|reward_fns|recipes|launch|tests)/[\w./]*)`", PAGES[page]):
        assert (ROOT / path).exists(), path


def test_every_page_is_linked():
    linked = {
        ((ROOT / page).parent / target).resolve()
        for page, text in PAGES.items()
        for target in re.findall(r"\]\(([^)#]+)", text)
        if not target.startswith("https://")
    }
    assert [page for page in PAGES if page != "README.md" and (ROOT / page) not in linked] == []


@pytest.fixture(scope="module")
def scene(tiny_model, tmp_path_factory):
    """The files that the README's commands read: benchmark files, runs with answers to the test sets, an archive."""
    folder = tmp_path_factory.mktemp("scene")
    benchmarks = write_benchmarks(folder / "path" / "to")
    for run, tasks in (
        ("llama2-glue-mt", SUITES["glue"]),
        ("smollm2-copa", [TASKS["copa"]]),
        ("smollm2-wic", [TASKS["wic"]]),
    ):
        (folder / "runs" / run).mkdir(parents=True)
        lines = [
            json.dumps({"task": task.name, "index": row.index, "answer": None, "kept": row.kept})
            for task in tasks
            for row in load_examples(task, "test", str(benchmarks))
        ]
        (folder / "runs" / run / "predictions_test.jsonl").write_text("\n".join(lines))
    make_archive([folder / "runs" / "llama2-glue-mt"], "glue", folder / "glue.zip", str(benchmarks))
    model = [f"model.path={tiny_model('llama')}", "model.dtype=float32", "name=smollm2", f"data.root={benchmarks}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for method, *overrides in (("ppo",), ("sft",), ("eval",), ("eval", "prompt.shots=5")):
            assert main([str(ROOT / "recipes/smollm2.yaml"), *model, *SMALL, *overrides], method) == 0
    sample = {"task": "sst2", "index": 3, "prompt": "a", "response": "b", "prompt_ids": [1, 2], "response_ids": [3]}
    problem = NonFiniteTensor("logprobs of the rollout", [0], "NaN")
    write_part(folder / "runs" / "smollm2" / "failed" / "step-12", 0, [problem], [sample], {}, None)
    return folder


def shortened(command, tiny_model, tiny_bert, scene, folder):
    for path in ("path/to/", "runs/", "glue.zip", "superglue.zip", "prompts", "results", "merged"):
        command = re.sub(rf"(?<=[ =]){path}", f"{scene / path}{'/' if path.endswith('/') else ''}", command)
    words = shlex.split(command)
    tiny = [f"model.path={tiny_model('llama')}", "model.dtype=float32"]
    if words[:2] == ["nlu", "sweep"]:
        return [*words, *SMALL, *tiny, "--out", str(folder / "sweep")]
    if words[:2] in (["nlu", "merge"], ["nlu", "check"]):
        return [*words, *tiny]
    if words[0] == "nlu":
        return words
    if words[1] == "launch/test.sh":
        return [*words, "--collect-only", "-n", "0", "tests/prefix/test_tree.py"]
    if words[1] == "launch/test_ray.sh":
        if not (ROOT / ".venv-ray" / "setup.stamp").exists():
            pytest.skip("no .venv-ray: bash launch/test_ray.sh would install 4.5 GB")
        return [*words, "--collect-only"]
    words += [*SMALL, f"output_dir={folder / 'run'}"]
    if words[1] == "launch/ppo_ray.sh":
        # Without --print refused: so many ranks cannot share the batch.
        return [*words, *tiny, *([] if "--print" in words else ["ray.gpus_per_node=3"])]
    if words[1] == "launch/encoder.sh":
        words += [f"model.path={tiny_bert}", "data.tasks=[mrpc, ax]", "encoder.max_tokens=128"]
    elif words[1] != "launch/quickstart.sh":
        words += [*tiny, "ppo.micro_batch_size=4"]
    if words[0] == "deepspeed":
        words[1:1] = ["--master_port", str(free_port())]
    return words


@pytest.mark.slow
@pytest.mark.parametrize("command", commands())
def test_commands_run(command, tiny_model, tiny_bert, scene, tmp_path):
    done = run_command(shortened(command, tiny_model, tiny_bert, scene, tmp_path))
    if command.startswith("bash launch/ppo_ray.sh recipes"):  # tests/ray_backend has the runs themselves
        assert done.returncode == 2, done.stdout[-2000:] + done.stderr[-2000:]
        assert "not installed in this environment" in done.stderr or "ray.gpus_per_node" in done.stderr
        return
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    if "launch/eval.sh" in command or "launch/encoder.sh" in command:
        assert "after" in read_json(tmp_path / "run" / "eval.json")
    if "launch/ppo.sh" in command or "launch/quickstart.sh" in command:
        last = [line for line in done.stdout.strip().splitlines() if "[launch.py:" not in line]  # DeepSpeed's own
        shown = ["reward curve:", "adapter:", "new rows:"]
        assert [line[: len(start)] for line, start in zip(last[-3:], shown, strict=True)] == shown, last[-5:]
        assert "Before and after" in done.stdout
        assert {"before", "after"} <= read_json(tmp_path / "run" / "eval.json").keys()


def rows_of_the_table():
    """The commands of the table of rows, which go without data.root there."""
    table = README[README.index("| row | command |") :].partition("\n\n")[0]
    return re.findall(r"`((?:deepspeed|nlu) [^`]*)`", table)


def test_the_table_has_a_command_for_each_row():
    assert len(rows_of_the_table()) == 8


@pytest.mark.slow
@pytest.mark.parametrize("command", rows_of_the_table())
def test_rows_of_the_table_run(command, tiny_model, tiny_bert, scene, tmp_path, capsys):
    words, root = shlex.split(command), f"data.root={scene / 'path' / 'to'}"
    if words[0] == "nlu":
        result = CliRunner().invoke(app, [*words[1:], root, "--print", "--out", str(tmp_path)])
        assert result.exit_code == 0 and "data.tasks=[mnli, mnli_mm, ax]" in result.stdout
        return
    script, recipe, *overrides = words[1:]
    settings = [*overrides, *SMALL, root, f"output_dir={tmp_path / 'run'}", "model.dtype=float32"]
    method = script.removeprefix("launch/").removesuffix(".sh")
    if method == "encoder":
        settings += [f"model.path={tiny_bert}", "encoder.max_tokens=128"]
        assert main([recipe, *settings], "encoder", encoder.run_encoder) == 0
    else:
        settings += [f"model.path={tiny_model('llama')}", "prompt.max_tokens=400", "ppo.micro_batch_size=4"]
        assert main([recipe, *settings], method) == 0
    assert read_json(tmp_path / "run" / "eval.json")["after"].keys() == {task.name for task in SUITES["glue"]}


@pytest.mark.slow
def test_own_task_and_reward_work_as_shown(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (recipe,), (reward, _) = blocks("yaml", OWN_TASKS), blocks("python", OWN_TASKS)
    assert recipe.count("\n") + reward.count("\n") < 25, "own data and reward in under 25 lines"
    rows = [f'"my {x}, {y}","{t}"' for x in "abcdefgh" for y in "pqr" for t in ("Billing", "IT_support")]
    (tmp_path / "tickets.csv").write_text("\n".join(["ticket body,team", *rows]) + "\n")
    (tmp_path / "my_reward.py").write_text(reward)
    settings = yaml.safe_load(recipe) | {"model": {"path": str(tiny_model("llama"))}}
    (tmp_path / "tickets.yaml").write_text(yaml.safe_dump(settings))
    assert main(["tickets.yaml", *SMALL]) == 0
    assert (tmp_path / "runs" / "tickets" / "adapter" / "adapter_model.safetensors").exists()
    from extensions.cli.preflight import problems
    from extensions.recipe import load_recipe
    from extensions.rollout.rewards import load_reward

    assert problems(load_recipe("tickets.yaml"), lambda message: None) == [], "nlu validate finds no problem"
    function = load_reward("my_reward.py").function
    texts = (" Billing</Judgement>", "technical support</Judgement>", "billing")
    assert [function(text, "Billing") for text in texts] == [1, 0, -1]


def test_a_task_of_the_project_works_as_shown(tmp_path):
    *_, entry = blocks("python", OWN_TASKS)
    assert entry.count("\n") < 20
    task = Task.model_validate(eval(entry, {"THREE_WAY_ENTAILMENT": THREE_WAY_ENTAILMENT}))
    (tmp_path / "SNLI").mkdir()
    header, row = "index\tsentence1\tsentence2\tgold_label\n", "0\tAnna sleeps.\tAnna is awake.\tcontradiction\n"
    (tmp_path / "SNLI" / "train.tsv").write_text(header + row)
    warnings = []
    (example,) = load_examples(task, "train", str(tmp_path), warn=warnings.append)
    assert example.fields == {"sentence1": "Anna sleeps.", "sentence2": "Anna is awake."}
    assert example.label == "contradiction" and "has 549367" in warnings[0]


def test_the_table_of_tasks_matches_the_code():
    rows = {
        cells[1]: cells[2:6] for cells in (re.split(r" *\| *", line) for line in TASKS_PAGE.splitlines()) if cells[1:]
    }
    for task in (task for suite in SUITES.values() for task in suite):
        answers = "0 to 5" if task.is_regression else " / ".join(words[0] for words in task.labels.values())
        sizes = " / ".join(str(task.source.sizes.get(split, "-")) for split in ("train", "validation", "test"))
        assert rows[f"`{task.name}`"] == [task.title, answers, ", ".join(task.metrics), sizes]
