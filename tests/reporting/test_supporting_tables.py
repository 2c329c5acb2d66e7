"""Intervals, label bias, training costs, and PPO's time against SFT's."""

from run_folders import cells_of, result, runs_of, write_run

from extensions.reporting.rows import make_rows
from extensions.reporting.supporting_tables import bias_table, cost_table, interval_table, time_ratio_table
from extensions.tasks import TASKS


def test_intervals(some_runs):
    lines = interval_table(make_rows(some_runs)).splitlines()
    assert "| SmolLM2-135M-Instruct PPO-MT | CB | f1_macro | validation | 40.0 [35.0, 45.0] | 200 |" in lines
    assert "| SmolLM2-135M-Instruct PPO-MT | CB | accuracy | validation | 60.0 [55.0, 65.0] | 200 |" in lines
    assert "| SmolLM2-135M-Instruct SFT-MT | STS-B | pearson | validation | 11.0 [6.0, 16.0] | 200 |" in lines


def test_bias(tmp_path):
    shares = {"Positive": 0.7, "Negative": 0.2, "wrong format": 0.1}
    scores = {"sst2": result(TASKS["sst2"], 0.6, wrong=0.1, predicted=shares), "stsb": (0.5,)}
    rows = make_rows(runs_of(write_run(tmp_path / "x", "ppo", scores)))
    (line,) = bias_table(rows).splitlines()[2:]
    assert cells_of(line)[1:] == ["SST-2", "Positive 70.0 (50.0), Negative 20.0 (50.0)", "10.0", "-30.0 (Negative)"]
    assert bias_table(make_rows(runs_of(write_run(tmp_path / "y", "ppo", {"stsb": (0.5,)})))) is None
    odd = result(TASKS["sst2"], 0.6) | {"gold_shares": {"wrong format": 1.0}}
    assert bias_table(make_rows(runs_of(write_run(tmp_path / "z", "ppo", {"sst2": odd})))) is None


def test_costs_and_time_ratios(tmp_path):
    ppo = write_run(
        tmp_path / "ppo", "ppo", {"sst2": (0.8,)}, seconds=438.0, samples=576,
        validations=[(192, 146.0, 0.5), (384, 292.0, 0.7), (576, 438.0, 0.7)],
    )  # fmt: skip
    sft = write_run(
        tmp_path / "sft", "sft", {"sst2": (0.7,)}, seconds=200.0, samples=480, validations=[(480, 200.0, 0.6)]
    )
    other = write_run(tmp_path / "other", "sft", {"cola": (0.7,)}, seconds=0.0, samples=0)
    rows = make_rows(runs_of(ppo, sft, other))
    lines = [cells_of(line)[1:] for line in cost_table(rows).splitlines()[2:]]
    assert lines == [
        ["SST-2", "36", "576", "438", "0.760", "292"],  # the first of the best validations
        ["SST-2", "36", "480", "200", "0.417", "200"],
        ["CoLA", "36", "0", "0", "-", "-"],
    ]
    pair, paper = [cells_of(line) for line in time_ratio_table(rows).splitlines()[2:]]
    # 438 / 576 = 0.7604, 200 / 480 = 0.4167: 1.825; 438 / 200 = 2.19; 292 / 200 = 1.46
    assert pair == ["SmolLM2-135M-Instruct PPO-ST", "SFT-ST", "SST-2", "1.82", "2.19", "1.46"]
    assert "1.32" in paper
    assert time_ratio_table(make_rows(runs_of(ppo, other))) is None, "not the same tasks"
    llama = write_run(tmp_path / "llama", "sft", {"sst2": (0.7,)}, path="meta-llama/Llama-2-7b-hf")
    assert time_ratio_table(make_rows(runs_of(ppo, llama))) is None, "not the same model"
    assert cost_table(make_rows(runs_of(write_run(tmp_path / "zero", "eval", {"sst2": (0.1,)})))) is None
