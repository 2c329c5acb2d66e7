"""Real runs of tiny models on own tasks of each kind: trained, scored, answered, reported."""

import json

import pytest
from support import write_recipe

from extensions.common.errors import UserError
from extensions.common.files import read_json, read_jsonl
from extensions.recipe import load_recipe
from extensions.reporting.finished_runs import read_run
from extensions.reporting.report import write_report
from extensions.runs.main import main

SIGNED = {"name": "signed", "description": "Rate it.", "question": "Rate {text}.", "score_range": [-1, 1]}
SIGNED |= {"score_decimals": 1}
SEVERAL = {"name": "several", "description": "Topics.", "question": "Of {text}?", "multi_label": True}
SEVERAL |= {"labels": {"m": ["Money"], "p": ["Pop"], "s": ["Sports"]}}
RARE = {"name": "rare", "description": "Route it.", "question": "Route {text}.", "labels": {"0": ["No"], "1": ["Yes"]}}
GOLDS = {
    "signed": [-1, "-0.5", 1e-05, 0.333333, "1", 0],
    "several": [["m", "s"], "s,p", None, [], "m", "s"],
    "rare": ["0", "0", "0", "0", "1", "0"],
}


def own_recipe(folder, model, tasks, **sections):
    entries = []
    for task in tasks:
        file = folder / f"{task['name']}.jsonl"
        rows = [{"text": f"row {i}", "label": gold} for i, gold in enumerate(GOLDS[task["name"]])]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        files = {split: str(file) for split in ("train", "validation")}
        entries.append(task | {"source": {"format": "jsonl", "files": files}})
    data = {"tasks": entries, "max_train_samples": None} | sections.pop("data", {})
    return write_recipe(
        folder, model, output_dir=str(folder / "run"), sft={"batch_size": 4}, data=data,
        logging={"rollout_samples": 4}, evaluation={"max_samples": None}, **sections,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sft", "ppo"])
def test_signed_scores_and_label_sets(tiny_model, tmp_path, method, capsys):
    path = own_recipe(tmp_path, tiny_model("llama"), [SIGNED, SEVERAL])
    assert main([str(path)], method) == 0, capsys.readouterr().err
    folder = tmp_path / "run"
    scores = read_json(folder / "eval.json")["after"]
    assert list(scores["signed"]["metrics"]) == ["pearson", "spearman", "mae", "rmse", "r2"]
    assert list(scores["several"]["metrics"]) == ["f1_micro", "f1_macro", "subset_accuracy"]
    answers = {(r["task"], r["index"]): r for r in read_jsonl(folder / "predictions_after.jsonl")}
    assert [answers["several", i]["gold"] for i in range(6)] == ["m, s", "p, s", "none", "none", "m", "s"]
    assert [answers["signed", i]["gold"] for i in range(6)] == ["-1", "-0.5", "1e-05", "0.333333", "1", "0"]
    card = (folder / "adapter" / "README.md").read_text()
    assert f"{scores['signed']['metrics']['mae']:.3f} [" in card
    report = write_report([read_run(folder)], tmp_path / "report")[0].read_text()
    assert f"{scores['signed']['metrics']['rmse']:.3f} [" in report


@pytest.mark.slow
def test_weights_and_repeated_rows_change_only_the_training(tiny_model, tmp_path, capsys):
    found = {}
    for method in ("sft", "ppo"):
        for name, data in (
            ("plain", {}),
            ("weights", {"class_weights": "balanced"}),
            ("oversample", {"oversample": True, "balanced": True}),
        ):
            folder = tmp_path / f"{method}-{name}"
            folder.mkdir()
            path = own_recipe(folder, tiny_model("llama"), [RARE], data=data, max_steps=3)
            assert main([str(path), "evaluation.before=false"], method) == 0, capsys.readouterr().err
            found[method, name] = read_jsonl(folder / "run" / "metrics.jsonl")
        assert found[method, "weights"][-1] != found[method, "plain"][-1]
    assert found["sft", "weights"][0]["target_tokens"] == found["sft", "plain"][0]["target_tokens"]
    # The first batch is of the same rows by the same policy: its reward, which is logged as it is, is the same.
    first = [found["ppo", name][0] for name in ("plain", "weights")]
    assert first[0]["reward_mean"] == first[1]["reward_mean"]
    rollouts = read_jsonl(tmp_path / "ppo-oversample" / "run" / "rollouts.jsonl")
    assert sorted(r["gold"] for r in rollouts[:10]).count("1") in (4, 5, 6), "5 of each label in 10 rows"


def test_an_encoder_takes_one_label_per_row(tmp_path):
    path = own_recipe(tmp_path, tmp_path, [SEVERAL])
    with pytest.raises(UserError, match="several has several labels per row"):
        load_recipe(path, method="encoder")
