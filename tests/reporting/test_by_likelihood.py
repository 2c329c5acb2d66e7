"""The answers by likelihood stand beside the sampled ones in every table of a report, where runs have them."""

import csv
import io

import pytest
from run_folders import cells_of, result, runs_of, table_of, write_run

from extensions.reporting.comparison_page import _intervals, comparison_page
from extensions.reporting.rows import make_rows
from extensions.reporting.run_view import read_view
from extensions.reporting.supporting_tables import bias_table, interval_table, yardstick_table
from extensions.reporting.tables import csv_text, latex, markdown
from extensions.tasks import TASKS

SST2 = TASKS["sst2"]


def scored(sampled, likely):
    """A result whose answers by likelihood have another score."""
    own = result(SST2, sampled, wrong=0.1, predicted={"Positive": 0.7, "Negative": 0.2, "wrong format": 0.1})
    other = result(SST2, likely, predicted={"Positive": 0.6, "Negative": 0.4})
    return own | {"likelihood": {key: other[key] for key in ("score", "metrics", "intervals", "predicted_shares")}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "ppo", "ppo", {"sst2": scored(0.5, 0.75)})
    write_run(folder / "zero", "eval", {"sst2": (0.25,)})
    # These score the most probable answers themselves.
    write_run(folder / "likely", "eval", {"sst2": scored(0.4, 0.4)}, evaluation={"decoding": "likelihood"})
    write_run(folder / "bert", "encoder", {"sst2": scored(0.3, 0.3)}, path="google-bert/bert-base-cased")
    return runs_of(folder)


def test_the_paper_tables_have_a_line_below_the_sampled_one(runs):
    table = table_of("glue", runs)
    lines = markdown(table).splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("| *PPO-ST* |") and "50.0" in line)
    assert cells_of(lines[at + 1])[0] == "*PPO-ST, by likelihood*" and "**75.0**" in lines[at + 1]
    assert "<u>50.0</u>" in lines[at], "marks compare all lines"
    assert sum("by likelihood" in line for line in lines) == 1, "only where a run has it beside another decoding"
    assert r"\quad \textit{PPO-ST, by likelihood} & " in latex(table) and "by likelihood" in table.notes[0]
    rows = list(csv.DictReader(io.StringIO(csv_text(table))))
    ours = {(row["row"].partition(" ")[2], row["decoding"]): row for row in rows if row["block"] == "ours"}
    likely = ours["PPO-ST, by likelihood", "likelihood"]
    assert [float(likely[key]) for key in ("value", "low", "high", "samples")] == [75, 70, 80, 200]
    assert float(ours["PPO-ST", "sample"]["value"]) == 50
    assert ("Zero-shot prompting, likelihood", "likelihood") in ours


def test_runs_without_it_have_the_tables_of_before(runs):
    others = [run for run in runs if run.folder.name != "ppo"]
    assert "by likelihood" not in markdown(table_of("glue", others)) + " ".join(table_of("glue", others).notes)
    assert "likelihood [95%]" not in interval_table(make_rows(others))
    assert cells_of(bias_table(make_rows(others)).splitlines()[0])[3] == "Wrong format"


def test_the_supporting_tables_have_a_column(runs):
    rows = make_rows(runs)
    intervals = {cells_of(line)[0].partition(" ")[2]: cells_of(line) for line in interval_table(rows).splitlines()[2:]}
    assert intervals["PPO-ST"][4:] == ["50.0 [45.0, 55.0]", "75.0 [70.0, 80.0]", "200"]
    assert intervals["Zero-shot prompting"][4:] == ["25.0 [20.0, 30.0]", "-", "200"]
    (bias,) = [cells_of(line) for line in bias_table(rows).splitlines() if "PPO-ST" in line]
    assert bias[2:] == [
        "Positive 70.0 (50.0), Negative 20.0 (50.0)", "Positive 60.0, Negative 40.0", "10.0", "-30.0 (Negative)"
    ]  # fmt: skip


def test_yardsticks_stand_beside_both(runs):
    (run,) = [run for run in runs if run.folder.name == "ppo"]
    bar = result(SST2, 0.6) | {"train_rows": 576, "seconds": 0.4}
    scores = run.scores.model_validate(run.scores.model_dump() | {"yardsticks": {"tfidf": {"sst2": bar}}})
    rows = make_rows([type(run)(run.folder, run.recipe, scores, [], [])])
    (line,) = yardstick_table(rows).splitlines()[2:]
    assert cells_of(line)[3:] == ["60.0", "50.0", "75.0", "576", "0.4"]


def test_the_page_of_several_runs(runs, tmp_path):
    views = [read_view(run.folder) for run in runs]
    found = {one["path"]: one["cells"] for one in _intervals(list("abcd"), views)}
    name = "abcd"[[run.folder.name for run in runs].index("ppo")]
    assert found["/likelihood"] == {name: (0.75, [0.7, 0.8])} and len(found[""]) == 4
    page = comparison_page(runs, views, tmp_path)
    assert "PPO-ST, by likelihood" in page and ", by likelihood</td>" in page
    assert "/after/sst2/likelihood/metrics/accuracy" in page
