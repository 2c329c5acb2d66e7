"""The run folder: new, finished, unfinished, damaged."""

import errno
import json
import os

import pytest
import yaml

from extensions.common.console import Reporter
from extensions.common.errors import UserError
from extensions.common.files import read_json, read_jsonl, write_json
from extensions.common.versions import versions
from extensions.recipe import Recipe
from extensions.runs.checkpoint import checkpoint_folders
from extensions.runs.folder import RunFolder


def recipe_of(**keys):
    return Recipe.model_validate({"name": "trial", "model": {"path": "some/model"}, "data": {"tasks": ["cola"]}} | keys)


def unfinished(root, recipe, steps=(2, 4)):
    run = RunFolder(root, recipe, {})
    run.append("metrics.jsonl", [{"step": k, "reward_mean": 0.1 * k} for k in range(1, 7)])
    run.append("rollouts.jsonl", [{"step": k, "text": "line\u2028 “Yes”"} for k in range(1, 7)])
    run.close()
    for step in steps:
        (root / "checkpoints" / f"step-{step}").mkdir(parents=True)
    return root


def test_a_new_folder(tmp_path):
    root = tmp_path / "deep" / "run"
    run = RunFolder(root, recipe_of(), {})
    assert run.set_aside is None
    assert Recipe.model_validate(yaml.safe_load((root / "recipe.yaml").read_text())) == recipe_of()
    assert read_json(root / "versions.json")["packages"]["torch"] == versions()["packages"]["torch"]
    run.metrics({"step": 1, "loss": float("nan"), "nested": {"kl": float("inf"), "rate": 0.5}, "text": "“é”"})
    run.close()
    expected = {"step": 1, "loss": None, "nested": {"kl": None, "rate": 0.5}, "text": "“é”"}
    assert read_jsonl(root / "metrics.jsonl") == [expected]


def test_a_finished_run_is_set_aside(tmp_path):
    root = unfinished(tmp_path / "run", recipe_of())
    write_json(root / "eval.json", {"before": {}, "after": {}})
    for number in (1, 2):
        run = RunFolder(root, recipe_of(seed=number), {})
        assert run.set_aside == tmp_path / f"run.old{number}"
        assert (run.set_aside / "recipe.yaml").exists() and not (root / "eval.json").exists()
        write_json(root / "eval.json", {"after": {}})
    assert (tmp_path / "run.old1" / "metrics.jsonl").exists()


def test_a_run_without_checkpoint_is_set_aside(tmp_path):
    root = unfinished(tmp_path / "run", recipe_of(), steps=())
    assert RunFolder(root, recipe_of(), {}).set_aside == tmp_path / "run.old1"


def test_an_unfinished_run_is_resumed(tmp_path):
    root = unfinished(tmp_path / "run", recipe_of())
    write_json(root / "eval.json", {"before": {}})
    run = RunFolder(root, recipe_of(), {})
    assert run.set_aside is None and checkpoint_folders(root)[-1].name == "step-4"
    run.cut_back(4, 4)
    assert [record["step"] for record in read_jsonl(root / "metrics.jsonl")] == [1, 2, 3, 4]
    assert read_jsonl(root / "rollouts.jsonl")[-1] == {"step": 4, "text": "line\u2028 “Yes”"}
    run.append("metrics.jsonl", [{"step": 5}])
    run.close()
    assert [record["step"] for record in read_jsonl(root / "metrics.jsonl")] == [1, 2, 3, 4, 5]


def test_an_unfinished_run_refuses_another_recipe(tmp_path):
    root = unfinished(tmp_path / "run", recipe_of())
    with pytest.raises(UserError) as caught:
        RunFolder(root, recipe_of(seed=3, ppo={"epochs": 2}), {})
    for part in ("another recipe", "output_dir", "seed: was 0, is 3", "ppo.epochs: was 4, is 2"):
        assert part in str(caught.value)
    assert "lora" not in str(caught.value)
    assert RunFolder(root, recipe_of(output_dir=str(root)), {}).set_aside is None, "another path of the same folder"


def test_an_unfinished_line_is_dropped(tmp_path):
    root = unfinished(tmp_path / "run", recipe_of())
    with (root / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "rew')
    assert [record["step"] for record in read_jsonl(root / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    RunFolder(root, recipe_of(), {}).cut_back(6, 6)
    assert (root / "metrics.jsonl").read_text().endswith("\n")


def test_an_unfinished_recipe_file_is_a_user_error(tmp_path):
    root = unfinished(tmp_path / "run", recipe_of())
    (root / "recipe.yaml").write_text("")
    with pytest.raises(UserError, match=r"recipe\.yaml is damaged.*output_dir"):
        RunFolder(root, recipe_of(), {})


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="output_dir: cannot write to"):
        RunFolder(tmp_path / "file", recipe_of(), {})
    with pytest.raises(UserError, match="output_dir: cannot write to"):
        RunFolder(tmp_path / "file" / "below", recipe_of(), {})


def test_checkpoints_are_ordered_by_number(tmp_path):
    for name in ("step-9", "step-10", "step-100", "step-20", "writing-101", "damaged-step-102", "step-x"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert [path.name for path in checkpoint_folders(tmp_path)] == ["step-9", "step-10", "step-20", "step-100"]
    assert checkpoint_folders(tmp_path / "none") == []


def warned(root):
    return [(record["step"], record["text"]) for record in read_jsonl(root / "warnings.jsonl")]


def test_warnings_are_recorded_once_with_their_step(tmp_path):
    reporter = Reporter(active=False)
    reporter.warn("a label is rare")  # before there is a folder
    folder = RunFolder(tmp_path / "run", recipe_of(), {}, reporter)
    reporter.begin(4, 0)
    for step in (1, 2):
        reporter.step(step, "")
        reporter.warn("kl is far")
        reporter.warn(f"step {step}: “odd”")
    reporter.warn("a label is rare")
    folder.close()
    reporter.warn("after the end")
    expected = [(0, "a label is rare"), (1, "kl is far"), (1, "step 1: “odd”"), (2, "step 2: “odd”")]
    assert warned(tmp_path / "run") == expected


def test_a_resumed_run_records_no_warning_twice_and_repeats_those_after_the_checkpoint(tmp_path):
    root = unfinished(tmp_path / "run", recipe_of())
    lines = [{"step": step, "text": f"of step {step}"} for step in (0, 3, 5)]
    (root / "warnings.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines) + '{"step": 6, "te')
    reporter = Reporter(active=False)
    reporter.warn("of step 0")
    reporter.warn("new at the start")
    folder = RunFolder(root, recipe_of(), {}, reporter)
    assert warned(root) == [(0, "of step 0"), (3, "of step 3"), (5, "of step 5"), (0, "new at the start")]
    folder.cut_back(4, 4)
    reporter.begin(6, 4)
    reporter.step(5, "")
    reporter.warn("of step 3")
    reporter.warn("of step 5")
    folder.close()
    assert warned(root) == [(0, "of step 0"), (3, "of step 3"), (0, "new at the start"), (5, "of step 5")]


@pytest.mark.parametrize("on_error", ["warn", "stop"])
def test_a_full_disk_while_a_warning_is_recorded(tmp_path, monkeypatch, on_error):
    reporter = Reporter(active=False)
    folder = RunFolder(tmp_path / "run", recipe_of(checkpoint={"on_error": on_error}), {}, reporter)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda *args: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
        if on_error == "stop":
            with pytest.raises(OSError, match="No space left"):
                reporter.warn("kl is far")
        else:
            reporter.warn("kl is far")
    folder.append("metrics.jsonl", [{"step": 1}])
    folder.close()
    texts = [text for _, text in warned(tmp_path / "run")]
    assert texts[0] == "kl is far"
    assert (len(texts) == 3) == (on_error == "warn")
    if on_error == "warn":
        assert "warnings.jsonl cannot be written" in texts[1] and "can be written again" in texts[2]


def test_a_page_that_cannot_be_written_is_one_warning(tmp_path, monkeypatch):
    reporter = Reporter(active=False)
    run = RunFolder(tmp_path / "run", recipe_of(), {}, reporter)
    run.write_page(last_step=9)
    assert "step 0 of 9" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    monkeypatch.setattr("extensions.runs.folder.write_page", lambda *_: 1 / 0)
    run.write_page()
    run.write_page()
    run.close()
    assert [text for text in reporter.warnings if "report.html" in text] == [
        "report.html cannot be written (ZeroDivisionError: division by zero); the run is not affected"
    ]
