"""The run folder: new, finished, unfinished, damaged."""

import pytest
import yaml

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
