"""The evidence of recipes/evidence: its cells, its runner, its numbers, and its page."""

import json
import random
import re
import sys
import time
from dataclasses import asdict

import pytest
import yaml
from run_folders import write_run
from support import ROOT

from extensions.common.files import read_jsonl, write_json, write_jsonl
from extensions.evaluation.metrics import Prediction, arrays_of, score
from extensions.tasks import find_task

sys.path.insert(0, str(ROOT / "recipes" / "evidence"))
from cells import DATA, HERE, Evidence, measured, read_lines
from collect import collect, mean_interval
from results import PAGE, Results, main
from run import Runner, check, chosen
from run import main as run_main

CONTENT = yaml.safe_load((HERE / "cells.yaml").read_text(encoding="utf-8"))
SST2 = find_task("sst2")


@pytest.fixture
def evidence(tmp_path):
    return Evidence.load(tmp_path / "data", tmp_path / "runs")


@pytest.mark.slow
def test_every_cell_is_a_valid_recipe_on_as_many_rows_as_the_others(evidence):
    check(evidence, evidence.cells)
    names = [cell.name for cell in evidence.cells]
    assert len(names) == len(set(names)) >= 60
    for position, cell in enumerate(evidence.cells):
        assert {one.name for one in evidence.needs(cell)} <= set(names[:position]), f"{cell.name} comes too early"
        assert cell.table in CONTENT["tables"]
        if not cell.seconds_of:
            recipe = evidence.recipe(cell)
            assert recipe.data.max_train_samples == cell.rows and recipe.evaluation.max_samples == 200
            if recipe.method in ("ppo", "sft"):
                assert recipe.training_steps() * recipe.training_batch == cell.rows, f"{cell.name}: not one pass"
                assert recipe.trained_with.lr == evidence.method(cell).get("keys", {}).get("sft.lr", 3e-4)


def test_cells_at_equal_seconds_get_the_steps_that_these_buy(evidence):
    cell = next(cell for cell in evidence.cells if cell.seconds_of)
    for method, steps, cpu in (("ppo", 36, 20.0), (cell.method, 24, 4.0)):
        folder = evidence.folder(cell.like(method))
        folder.mkdir(parents=True)
        write_jsonl(folder / "metrics.jsonl", [{"step": k, "cpu_s": cpu} for k in range(steps)])
    assert evidence.recipe(cell).training_steps() == 36 * 20 // 4


# -------------------------------------------------------------------------------------------------------- the runner


STUB = """
import json, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
with (folder / "starts").open("a") as file:
    file.write("x")
if "sequence" in folder.name:
    sys.exit("no room")
if "5-shot" in folder.name:
    time.sleep(600)
sum(range(10**7))
(folder / "eval.json").write_text(json.dumps({"after": {}}))
"""


@pytest.mark.slow
def test_cells_run_once_and_a_failed_one_does_not_stop_the_others(evidence, monkeypatch, capsys):
    monkeypatch.setattr(Evidence, "command", lambda self, cell: [sys.executable, "-c", STUB, str(self.folder(cell))])
    cells = chosen(evidence, "^sst2/(zero-shot|sft-(answer|sequence|answer-ppo)|ppo)-576-seed0$")
    cells[1:1] = [cell for cell in evidence.cells if cell.name == "sst2/sft-answer-576-seed0-equal-seconds"]
    assert Runner(evidence, cells).run() == 1
    assert Runner(evidence, cells).run() == 1
    starts = {cell.name: evidence.folder(cell) / "starts" for cell in cells}
    counts = {name.partition("/")[2]: len(file.read_text()) for name, file in starts.items() if file.exists()}
    assert counts == {
        "zero-shot-576-seed0": 1, "sft-answer-576-seed0": 1, "sft-sequence-576-seed0": 2, "ppo-576-seed0": 1,
        "sft-answer-ppo-576-seed0": 1, "sft-answer-576-seed0-equal-seconds": 1,
    }  # fmt: skip
    shown = capsys.readouterr().out
    assert "no room" in shown and "equal-seconds: needs sst2/ppo-576-seed0, sst2/sft-answer-576-seed0" in shown
    usage = read_jsonl(evidence.out / "usage.jsonl")
    assert all(line["user_s"] > 0 for line in usage if line["status"] == 0) and len(usage) == 7


def test_at_the_deadline_the_running_cell_is_stopped_and_a_claimed_one_is_left(evidence, monkeypatch, capsys):
    monkeypatch.setattr(Evidence, "command", lambda self, cell: [sys.executable, "-c", STUB, str(self.folder(cell))])
    cells = [cell for cell in evidence.cells if cell.name in ("sst2/zero-shot-576-seed0", "sst2/5-shot-576-seed0")]
    runner = Runner(evidence, cells[::-1], time.monotonic() + 1)
    with runner._claim(cells[0]):
        assert Runner(evidence, cells[:1]).run() == 0
    assert "another process runs it" in capsys.readouterr().out
    start = time.monotonic()
    runner.run()
    assert time.monotonic() - start < 300 and not evidence.is_finished(cells[0]), "nothing starts after the deadline"


def test_wrong_arguments_are_refused_before_a_run(tmp_path, capsys):
    assert run_main([str(tmp_path), "--only", "nothing-like-it"]) == 2
    assert run_main([str(tmp_path), "optimizer.rl=1", "--only", "^sst2/ppo-576"]) == 2
    errors = capsys.readouterr().err
    assert "no cell of" in errors and "sst2/ppo-576-seed0" in errors and "optimizer.rl" in errors
    assert main([str(tmp_path / "absent")]) == 2


# ------------------------------------------------------------------------------------------------------ the numbers


def predictions(right, seed=0, count=60):
    """Answers to the same rows, of which a share is right."""
    rng = random.Random(seed)
    rows = [(k, str(k % 2), rng.random() < right) for k in range(count)]
    return [Prediction("sst2", k, "", gold if ok else str(1 - int(gold)), gold) for k, gold, ok in rows]


def test_means_over_seeds_and_paired_differences():
    runs = [predictions(0.9, 1), predictions(0.7, 2)]
    scores = [score(SST2, run) for run in runs]
    arrays = [arrays_of(SST2, run) for run in runs]
    value, low, high = mean_interval(SST2, arrays)
    assert value == pytest.approx(sum(s["metrics"]["accuracy"] for s in scores) / 2) and low < value < high
    alone = mean_interval(SST2, arrays[:1])
    assert alone[1:] == pytest.approx(scores[0]["intervals"]["accuracy"], abs=0.02)
    assert mean_interval(SST2, arrays, arrays) == (0, 0, 0), "the same rows in both: a paired difference"
    change, low, high = mean_interval(SST2, arrays[:1], arrays[1:])
    assert change == pytest.approx(scores[0]["score"] - scores[1]["score"])
    rng, right = random.Random(0), [[p.answer == p.gold for p in run] for run in runs]
    drawn = []
    for _ in range(2000):
        rows = rng.choices(range(60), k=60)
        drawn.append(sum(right[0][k] - right[1][k] for k in rows) / 60)
    assert (low, high) == pytest.approx((sorted(drawn)[50], sorted(drawn)[1949]), abs=0.03)


def fill(evidence, name, right, **more):
    """A finished cell, written by hand."""
    cell = next(cell for cell in evidence.cells if cell.name == name)
    rows = predictions(right)
    rows = [Prediction(**asdict(p) | {"likelihood": p.gold, "probabilities": {"0": 0.5, "1": 0.5}}) for p in rows]
    result, script = score(SST2, rows), CONTENT["methods"][cell.method]["script"]
    folder = write_run(evidence.folder(cell), script, {"sst2": result}, **more)
    write_jsonl(folder / "predictions_after.jsonl", [asdict(p) | {"fields": {"sentence": "a"}} for p in rows])
    write_json(folder / "versions.json", {"git": "abc", "python": "3", "processors": 2, "packages": {"torch": "2"}})
    write_jsonl(folder / "metrics.jsonl", [{"step": 1, "samples": 576, "elapsed_s": 9.0, "cpu_s": 7.0}])
    program = "bash /another/checkout/launch/ppo.sh /another/checkout/recipes/smollm2.yaml"
    usage = {"cell": name, "command": f"{program} data.root=/mnt/d output_dir={folder}", "started": "now"}
    usage |= {"wall_s": 90.0, "user_s": 40.0, "system_s": 2.0, "threads": "1", "processor": "Abacus"}
    with (evidence.out / "usage.jsonl").open("a") as file:
        file.write(json.dumps(usage) + "\n")


def test_finished_cells_become_numbers_and_a_page_that_names_the_missing_ones(evidence, tmp_path):
    fill(evidence, "sst2/sft-answer-576-seed0", 0.6)
    fill(evidence, "sst2/ppo-576-seed0", 0.95)
    assert collect(evidence, tmp_path / "results") == 2
    runs = {line["cell"]: line for line in read_lines(tmp_path / "results" / "runs.csv")}
    ppo = runs["sst2/ppo-576-seed0"]
    accuracy = score(SST2, predictions(0.95))["score"]
    assert float(ppo["sampled"]) == pytest.approx(accuracy, abs=1e-6) and float(ppo["likelihood"]) == 1
    assert (ppo["training_cpu_s"], ppo["run_cpu_s"], ppo["run_s"]) == ("7.0", "42.0", "90.0")
    keys = "data.root=path/to/data output_dir=runs/evidence/sst2/ppo-576-seed0"
    assert ppo["command"] == f"bash launch/ppo.sh recipes/smollm2.yaml {keys}"
    page = Results(CONTENT, evidence.cells, tmp_path / "results").page()
    line = next(line for line in page.splitlines() if line.startswith("| PPO (paper) | 576 |"))
    assert f"| {100 * accuracy:.1f} [" in line and "| 100.0 [100, 100] | **+" in line and line.endswith("| 7 |")
    assert "| 5-shot | - | - | - |" in page, "a cell that has not run"
    assert f"2 of {len(evidence.cells)} cells have run" in page and "`5-shot-576-seed0`" in page
    assert "above: PPO (paper) by sampled answers (+" in page and "## By seed" not in page
    # A later session without these folders keeps their lines, and compares its own with their answers.
    before = read_lines(tmp_path / "results" / "means.csv")
    other = Evidence.load(tmp_path / "data", tmp_path / "others")
    for name, right in (("zero-shot-576-seed0", 0.5), ("ppo-576-seed1", 0.8)):
        fill(other, f"sst2/{name}", right)
    assert collect(other, tmp_path / "results") == 2
    added = {"sst2/zero-shot-576-seed0", "sst2/ppo-576-seed1"}
    assert measured(tmp_path / "results") == {*runs, *added}
    assert {cell.name for cell in chosen(other, "^sst2/.*-576-seed0$", {*runs, *added})}.isdisjoint(added)
    means = {(line["method"], line["decoding"]): line for line in read_lines(tmp_path / "results" / "means.csv")}
    both = [arrays_of(SST2, predictions(right)) for right in (0.95, 0.8)]
    scores = ", ".join(f"{100 * score(SST2, predictions(right))['score']:.1f}" for right in (0.95, 0.8))
    page = Results(CONTENT, other.cells, tmp_path / "results").page()
    assert f"| SST-2: PPO (paper) | 576 | 0, 1 | {scores} | 100.0, 100.0 |" in page
    ppo = means["ppo", "sampled"]
    assert float(ppo["value"]) == pytest.approx(mean_interval(SST2, both)[0], abs=1e-6) and ppo["seeds"] == "0 1"
    zero_shot = means["zero-shot", "sampled"]
    pair = [arrays_of(SST2, predictions(right)) for right in (0.5, 0.6)]
    assert float(zero_shot["difference"]) == pytest.approx(mean_interval(SST2, pair[:1], pair[1:])[0], abs=1e-6)
    assert means["sft-answer", "sampled"] in before


def test_the_page_in_the_repository_is_written_from_its_data():
    evidence = Evidence.load(HERE, HERE)
    results = Results(evidence.content, evidence.cells, DATA)
    assert results.page() == PAGE.read_text(encoding="utf-8"), "run python recipes/evidence/results.py"
    known = {cell.name for cell in evidence.cells}
    assert results.runs.keys() <= known, "numbers of cells that cells.yaml no longer has"
    for path in (PAGE, *DATA.glob("*.csv")):
        found = re.findall(r"(?:^|[\s=,\"'])/\w+/\S*", path.read_text(encoding="utf-8"))
        assert not found, f"{path.name} names folders of the machine that made it: {found[:3]}"
