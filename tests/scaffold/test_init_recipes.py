"""`nlu init`: the recipe of a table loads and is valid, for every format, kind of target and split."""

from pathlib import Path

import pandas
import pytest
import yaml
from init_tables import WORDS, check, make_recipe, tickets, write_csv, write_jsonl, write_parquet


@pytest.mark.parametrize("kind", ["csv", "tsv", "semicolon", "cp1252", "utf-16", "jsonl", "parquet"])
def test_the_same_recipe_from_any_format(here, tiny_model, kind):
    rows = tickets()
    for row in rows:  # the emoji is not in cp1252
        row["ticket body"] = row["ticket body"].replace("😀", "é")
        row["subject"] = row["subject"].replace("😀", "é")
    path = here / {"tsv": "t.tsv", "jsonl": "t.jsonl", "parquet": "t.parquet"}.get(kind, "t.csv")
    if kind in ("jsonl", "parquet"):
        {"jsonl": write_jsonl, "parquet": write_parquet}[kind](path, rows)
    else:
        separator = {"tsv": "\t", "semicolon": ";"}.get(kind, ",")
        write_csv(path, rows, {"cp1252": "cp1252", "utf-16": "utf-16"}.get(kind, "utf-8"), separator)
    drafted, task, data = make_recipe(tiny_model("llama"), path, "team")
    assert task.fields == ("subject", "ticket body")
    assert task.source.label == "team" and task.source.keep == {"id": "id"}
    assert task.labels == {
        "billing": ["billing"],
        "technical_support": ["technical support"],
        "sales": ["sales"],
        "legal": ["legal"],
    }
    assert (task.source.encoding == "cp1252") == (kind == "cp1252")
    assert task.source.quoting == "csv" and task.source.separator is None
    read = sorted(
        (row.kept["id"], row.fields["ticket body"], row.label) for row in [*data.train, *data.validation, *data.table]
    )
    assert read == sorted((row["id"], row["ticket body"].strip(), row["team"]) for row in rows)
    check(task, data)
    assert drafted.recipe.data.class_weights == "balanced" and task.metrics == ["f1_macro"]


GOLDEN = r"""# my tickets.csv: 20 rows; classification of column 'Team'. Written by nlu init.
#
#     bash launch/sft.sh my-tickets.yaml
#     bash launch/ppo.sh my-tickets.yaml model.adapter=runs/my-tickets-sft/adapter

name: my-tickets  # name of the run; its folder is runs/my-tickets-sft (SFT) or runs/my-tickets (PPO)
seed: 0  # random seed
max_steps: 30  # PPO iterations: each samples one batch and trains on it

model:
  path: MODEL  # folder or hub name of a decoder-only LLM, or pip:PACKAGE

lora:
  rank: 16  # r of the LoRA matrices (paper 5.1)
  alpha: 32  # scaling numerator (authors)
  dropout: 0.0  # dropout before the LoRA matrices; none for a small model

data:
  tasks:
    - name: my-tickets  # name in metrics and tables
      # Improve this text: a sentence on what the texts are and what the answer means helps the model.
      description: You are an assistant that reads a ticket body and names its team.  # part 1 of the prompt
      question: "Ticket body: {ticket body}\n  What is the team: \"it support\" or \"sales\"?"  # {...} is a column
      labels:  # label in the data: the word that the model writes for it
        IT_support: it support  # 10 rows, 50.0%
        Sales: sales  # 10 rows, 50.0%
      metrics: [accuracy]  # their mean is the score
      extra_metrics: [f1_macro]  # also reported
      source:
        files:  # relative to the folder of this file, or to data.root
          train: my tickets.csv  # 20 rows
        split: {validation: 0.1, test: 0.1}  # held out of the training file: seeded, stratified, equal texts together
        label: Team  # column of the answers
        keep: {nr: nr}  # name: column that is copied to the predictions and not shown in the prompt

prompt:
  max_tokens: 144  # longest prompt in tokens; all training rows fit

rollout:
  response_budget: [11, 16]  # maximum response tokens, drawn per row; the longest answer with its tag fits

sft:  # launch/sft.sh, run first: trains the answer format, which PPO alone rarely samples
  batch_size: 16  # rows of one optimizer step over all ranks
  micro_batch_size: 16  # rows of one packed forward on a rank; memory against speed
  max_steps: 19  # optimizer steps, 19.0 passes over the training rows
  loss: answer  # next-token loss over the answer alone; the paper's baseline, sequence, also learns the prompt
  lr: 0.001  # peak learning rate of AdamW

ppo:  # launch/ppo.sh, run after SFT and started from its adapter
  batch_size: 16  # samples of one iteration over all ranks (paper 5.1)
  micro_batch_size: 16  # rows of one packed forward on a rank; memory against speed
  whiten_min_std: 0.3  # floor of the standard deviation in whitening; else batches of equal rewards amplify noise
  kl:
    init: 0.05  # coefficient of the KL penalty at the start

optimizer:  # of PPO
  name: adamw  # for LoRA of a small model; the paper's Adafactor is for 7B
  lr: 1.0e-4  # peak learning rate

evaluation:
  max_samples: 200  # rows of the before/after table, evenly spaced; null: all
  decoding: likelihood  # the most probable of the task's answers, as nlu predict does
  every_steps: 0.15  # between validations: a fraction of the run; another one follows its end
  validation_samples: 100  # rows per validation, evenly spaced
  patience: 3  # validations after the warmup without a new best before training stops; the best is kept

checkpoint:
  every_steps: 5  # iterations between checkpoints; the same command resumes from the last one
"""


def test_golden_recipe(here, tiny_model):
    rows = [
        {"nr": str(k), "ticket body": f"text {k} of the {team.lower()} people", "Team": team}
        for k, team in enumerate(["Sales", "IT_support"] * 10, start=100)
    ]
    write_csv(here / "my tickets.csv", rows)
    drafted, _, _ = make_recipe(tiny_model("llama"), "my tickets.csv", "Team")
    assert drafted.entry.path == Path("my-tickets.yaml")
    text = drafted.entry.path.read_text(encoding="utf-8").replace(str(tiny_model("llama")), "MODEL")
    assert text == GOLDEN


def scored(k, row):
    return row | {"mood": ["0.5", "-0.25", "0.75", "-0.9"][k % 4]}


def tagged(k, row):
    return row | {"tags": ["late;rude;", "late", "rude", ""][k % 4]}


def gaps(k, row):
    return row | ({"team": ""} if k == 3 else {"ticket body": " "} if k == 4 else {})


@pytest.mark.parametrize(
    ("change", "label"), [(lambda k, row: row, "team"), (scored, "mood"), (tagged, "tags"), (gaps, "team")]
)
def test_every_line_has_a_comment(here, tiny_model, change, label):
    write_csv(here / "t.csv", [change(k, row) for k, row in enumerate(tickets())])
    drafted, task, data = make_recipe(tiny_model("llama"), "t.csv", label, text=("subject", "ticket body"))
    check(task, data)
    for line in drafted.text.splitlines():
        if line.strip() and not line.lstrip().startswith("#") and not line.rstrip().endswith(":"):
            assert "  # " in line, line


def test_regression(here, tiny_model):
    write_csv(here / "t.csv", [scored(k, row) for k, row in enumerate(tickets())])
    drafted, task, data = make_recipe(tiny_model("llama"), "t.csv", "mood", text=("subject",))
    assert (task.score_range, task.score_decimals) == ((-1.0, 1.0), 2)
    assert task.metrics == ["pearson", "spearman"] and drafted.recipe.data.class_weights == "none"
    assert task.question.endswith("What is the mood, from -1 to 1?")
    recipe = drafted.recipe
    assert (recipe.sft.loss, recipe.sft.lr, recipe.evaluation.decoding) == ("correlation", 3e-4, "likelihood")
    assert recipe.lora.target_modules == "all-linear" and recipe.sft.max_steps <= 60
    check(task, data)


def test_integer_ratings_are_classes_by_default(here, tiny_model):
    write_csv(here / "t.csv", [row | {"stars": str(k % 5 + 1)} for k, row in enumerate(tickets())])
    drafted, task, _ = make_recipe(tiny_model("llama"), "t.csv", "stars", text=("subject",))
    assert list(task.labels) == ["1", "2", "3", "4", "5"]
    assert any("--kind regression" in line for line in drafted.decisions)
    _, task, _ = make_recipe(tiny_model("llama"), "t.csv", "stars", text=("subject",), kind="regression")
    assert (task.score_range, task.score_decimals) == ((1.0, 5.0), 0)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_multi_label(here, tiny_model, kind):
    rows = [tagged(k, row) for k, row in enumerate(tickets())]
    path = here / f"t.{kind}"
    if kind == "csv":
        write_csv(path, rows)
    else:
        lists = [row | {"tags": [tag for tag in row["tags"].split(";") if tag]} for row in rows]
        {"jsonl": write_jsonl, "parquet": write_parquet}[kind](path, lists)
    _, task, data = make_recipe(tiny_model("llama"), path, "tags", text=("subject", "ticket body"))
    assert task.multi_label and task.labels == {"late": ["late"], "rude": ["rude"]} and task.no_label == "none"
    assert task.source.label_separator == (";" if kind == "csv" else ",")
    assert len(data.train) + len(data.validation) + len(data.table) == 100
    answers = {task.answer(row.label) for row in data.train}
    assert answers == {"late, rude", "late", "rude", "none"}
    check(task, data)


def test_numeric_labels_get_words(here, tiny_model):
    write_csv(here / "t.csv", [row | {"team": str(k % 2)} for k, row in enumerate(tickets())])
    drafted, task, _ = make_recipe(tiny_model("llama"), "t.csv", "team")
    assert task.labels == {"0": ["0"], "1": ["1"]} and any("--labels 0=WORD,1=WORD" in w for w in drafted.warnings)
    drafted, task, _ = make_recipe(tiny_model("llama"), "t.csv", "team", labels={"0": "negative", "1": "positive"})
    assert task.labels == {"0": ["negative"], "1": ["positive"]} and not drafted.warnings


def test_booleans_and_class_numbers_of_parquet(here, tiny_model):
    import datasets

    rows = [row | {"team": k % 2 == 0} for k, row in enumerate(tickets())]
    write_parquet(here / "t.parquet", rows)
    _, task, data = make_recipe(tiny_model("llama"), "t.parquet", "team")
    assert set(task.labels) == {"false", "true"}
    check(task, data)
    features = datasets.Features({"text": datasets.Value("string"), "y": datasets.ClassLabel(names=["Bad", "Good"])})
    columns = {"text": [f"text {k} {WORDS[k % 5]}" for k in range(40)], "y": [k % 2 for k in range(40)]}
    datasets.Dataset.from_dict(columns, features).to_parquet(here / "c.parquet")
    _, task, data = make_recipe(tiny_model("llama"), "c.parquet", "y")
    assert task.labels == {"Bad": ["bad"], "Good": ["good"]}
    check(task, data)


def test_labels_of_a_column_with_gaps(here, tiny_model):
    """pandas keeps whole numbers with a gap as floats, in parquet too: the labels are 0 and 1, not 0.0 and 1.0."""
    frame = pandas.DataFrame({"text": [f"a b {k} c" for k in range(40)], "label": [0, 1, None, 1] * 10})
    frame.to_parquet(here / "gaps.parquet")
    drafted, _, _ = make_recipe(tiny_model("llama"), "gaps.parquet", "label")
    assert set(drafted.recipe.data.tasks[0].labels) == {"0", "1"}
    assert {row.label for row in drafted.data.train} == {"0", "1"}


def test_a_folder_of_splits(here, tiny_model):
    rows = tickets()
    write_csv(here / "train.csv", rows[:70])
    write_csv(here / "dev.csv", rows[70:])
    write_csv(here / "test.csv", [{k: v for k, v in row.items() if k != "team"} for row in rows[:20]])
    (here / "data").mkdir()
    for name in ("train", "dev", "test"):
        (here / f"{name}.csv").rename(here / "data" / f"{name}.csv")
    drafted, task, data = make_recipe(tiny_model("llama"), "data", "team")
    assert drafted.entry.path == Path("data.yaml")
    names = {"train": "data/train.csv", "validation": "data/dev.csv", "test": "data/test.csv"}
    assert yaml.safe_load(drafted.text)["data"]["tasks"][0]["source"]["files"] == names
    assert task.source.files == {split: str(here / name) for split, name in names.items()}
    assert task.source.unlabelled == ["test"] and task.source.split is None
    assert (len(data.train), len(data.table)) == (70, 30)
    (here / "recipes").mkdir()
    drafted, again, _ = make_recipe(tiny_model("llama"), "data", "team", out=Path("recipes/data.yaml"))
    assert "train: ../data/train.csv" in drafted.text and again.source.files == task.source.files


def test_files_outside_the_working_directory(here, tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("elsewhere")
    write_csv(folder / "t.csv", tickets())
    _, task, _ = make_recipe(tiny_model("llama"), folder / "t.csv", "team")
    assert task.source.files["train"] == str(folder / "t.csv")


@pytest.mark.parametrize("dev", [False, True])
def test_a_data_set_of_the_hub(here, tiny_model, monkeypatch, dev):
    import huggingface_hub

    (here / "hub" / "data").mkdir(parents=True)
    write_parquet(here / "hub" / "data" / "train-00000-of-00002.parquet", tickets()[:50])
    write_parquet(here / "hub" / "data" / "train-00001-of-00002.parquet", tickets()[50:])
    if dev:
        write_parquet(here / "hub" / "data" / "dev-00000-of-00001.parquet", tickets()[:20])
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, **_: str(here / "hub"))
    drafted, task, data = make_recipe(tiny_model("llama"), f"hub:me/tickets-{dev}", "team")
    assert drafted.entry.path == Path(f"tickets-{dev}.yaml") and not task.source.files
    assert task.source.hub.repo == f"me/tickets-{dev}"
    assert task.source.hub.splits == ({"validation": "dev"} if dev else {})
    assert len(data.validation) == (20 if dev else 10)
    check(task, data)


def test_incomplete_rows(here, tiny_model):
    rows = tickets()
    for k in (3, 30):
        rows[k]["team"] = ""
    rows[4]["ticket body"], rows[5]["ticket body"], rows[5]["subject"] = "", " ", ""
    write_csv(here / "t.csv", rows)
    drafted, task, data = make_recipe(tiny_model("llama"), "t.csv", "team")
    assert (task.source.incomplete, task.source.unknown_labels) == ("keep", "skip")
    # Two without a label, one without any text.
    assert len(data.train) + len(data.validation) + len(data.table) == 97
    assert any("2 of 100 rows have no label" in line for line in drafted.decisions)
    _, task, data = make_recipe(tiny_model("llama"), "t.csv", "team", text=("subject",))
    assert task.source.incomplete == "skip"


@pytest.mark.parametrize("count", [10, 11, 13, 20])
def test_few_rows(here, tiny_model, count):
    rows = [{"text": f"text {k} {WORDS[k % 9]}", "label": "ab"[k % 2]} for k in range(count)]
    write_csv(here / "t.csv", rows)
    _, task, data = make_recipe(tiny_model("llama"), "t.csv", "label")
    check(task, data)
