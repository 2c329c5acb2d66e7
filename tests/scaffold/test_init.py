"""`nlu init`: a recipe that validates as it stands, from any readable table."""

import csv
import json
import random
import subprocess
import sys
from pathlib import Path

import pandas
import pytest
from support import ROOT, environment
from typer.testing import CliRunner

from extensions.cli.main import app
from extensions.cli.preflight import problems
from extensions.data.splits import RunData
from extensions.prompts import parse_answer
from extensions.recipe import load_recipe
from extensions.scaffold.draft import draft, write
from extensions.scaffold.entry import InitRequest, make_entry

TEAMS = {"billing": 50, "technical_support": 30, "sales": 15, "legal": 5}
WORDS = ["invoice", "app", "licence", "contract", "again", "since Monday", "please", 'a "quoted" word', "x, y; z", "😀"]


def tickets(count=100):
    rng = random.Random(0)
    teams = [team for team, share in TEAMS.items() for _ in range(share * count // 100)]
    rng.shuffle(teams)
    return [
        {
            "id": str(1000 + 7 * k),
            "subject": f"{team[:3]} {rng.choice(WORDS)}",
            "ticket body": f"{k}: {rng.choice(WORDS)}\n{rng.choice(WORDS)}",
            "team": team,
        }
        for k, team in enumerate(teams)
    ]


def write_csv(path, rows, encoding="utf-8", separator=",", quoting=csv.QUOTE_MINIMAL):
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding=encoding) as file:
        writer = csv.DictWriter(file, names, delimiter=separator, quoting=quoting)
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_parquet(path, rows):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def made(model, data, label, **options):
    """The recipe that init writes, loaded as every command loads it, with its rows."""
    request = InitRequest(str(data), label, model=str(model), force=True, **options)
    draft_of = draft(make_entry(request), request, on_gpu=False)
    write(draft_of)
    recipe = load_recipe(draft_of.entry.path)
    warnings = []
    assert problems(recipe, warnings.append) == []  # as `nlu validate` has it
    return draft_of, recipe.data.tasks[0], RunData.load(recipe, warnings.append)


def nlu(*arguments):
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(argument) for argument in arguments])


def check(task, data):
    """What holds for whatever init writes: every row has its text, each label's word is read back as the label."""
    rows = data.train + data.validation + data.table
    assert data.train and data.table and data.validation
    for label in task.labels if not task.multi_label else ():
        assert parse_answer(f"{task.answer(label)}</Judgement>", task) == label
    for row in rows:
        assert row.label is not None
        answer = parse_answer(f"{task.answer(row.label)}</Judgement>", task)
        assert answer == row.label if not task.is_regression else answer is not None


# ------------------------------------------------------------------------------------------------------ the tickets


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
    drafted, task, data = made(tiny_model("llama"), path, "team")
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

name: my-tickets  # of the run, whose folder is runs/my-tickets-sft or runs/my-tickets
seed: 0  # of everything random
max_steps: 30  # PPO iterations: each samples and learns from one batch

model:
  path: MODEL  # folder or hub name of a decoder-only LLM, or pip:PACKAGE

lora:
  rank: 16  # r of the LoRA matrices (paper 5.1)
  alpha: 32  # scaling numerator (authors)
  dropout: 0.0  # before the LoRA matrices; none for a small model

data:
  tasks:
    - name: my-tickets  # in metrics and tables
      # Say it better: a sentence on what the texts are and what the answer means helps the model.
      description: You are an assistant that reads a ticket body and names its team.  # part 1 of the prompt
      question: "Ticket body: {ticket body}\n  What is the team: \"it support\" or \"sales\"?"  # {...} is a column
      labels:  # label in the data: the word that the model writes for it
        IT_support: it support  # 10 rows, 50.0%
        Sales: sales  # 10 rows, 50.0%
      metrics: [accuracy]  # their mean is the score
      extra_metrics: [f1_macro]  # also reported
      source:
        files:  # relative to the folder where commands run, or to data.root
          train: my tickets.csv  # 20 rows
        split: {validation: 0.1, test: 0.1}  # held out of the training file: seeded, stratified, equal texts together
        label: Team  # column of the answers
        keep: {nr: nr}  # name: column that predictions carry, no part of the prompt

prompt:
  max_tokens: 144  # longest prompt; all training rows fit

rollout:
  response_budget: [13, 19]  # most tokens of a response, drawn for each row: the longest answer with its tag fits

sft:  # launch/sft.sh, first: it learns the form of the answers, which PPO alone hardly finds
  batch_size: 16  # rows of one optimizer step over all ranks
  micro_batch_size: 16  # rows of one packed forward on a rank; memory against speed
  max_steps: 19  # optimizer steps, 19.0 passes over the training rows
  loss: answer  # next-token loss over the answer alone, not the prompt
  lr: 0.001  # peak learning rate of AdamW

ppo:  # launch/ppo.sh, after SFT: from its adapter
  batch_size: 16  # samples of one iteration over all ranks (paper 5.1)
  micro_batch_size: 16  # rows of one packed forward on a rank; memory against speed
  whiten_min_std: 0.3  # least deviation that whitening divides by; batches that are all right or all wrong are no noise
  kl:
    init: 0.05  # coefficient of the KL penalty at the start

optimizer:  # of PPO
  name: adamw  # for LoRA of a small model; the paper's Adafactor is for 7B
  lr: 1.0e-4  # peak learning rate

evaluation:
  max_samples: 200  # rows of the table before and after training, spread evenly; null: all
  decoding: likelihood  # the most probable of the task's answers, as nlu predict does
  every_steps: 5  # iterations between validations
  validation_samples: 100  # rows of each, spread evenly
  patience: 3  # validations without a new best before training stops; the best is kept

checkpoint:
  every_steps: 5  # iterations between checkpoints; the same command resumes from the last one
"""


def test_golden_recipe(here, tiny_model):
    rows = [
        {"nr": str(k), "ticket body": f"text {k} of the {team.lower()} people", "Team": team}
        for k, team in enumerate(["Sales", "IT_support"] * 10, start=100)
    ]
    write_csv(here / "my tickets.csv", rows)
    drafted, _, _ = made(tiny_model("llama"), "my tickets.csv", "Team")
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
    drafted, task, data = made(tiny_model("llama"), "t.csv", label, text=("subject", "ticket body"))
    check(task, data)
    for line in drafted.text.splitlines():
        if line.strip() and not line.lstrip().startswith("#") and not line.rstrip().endswith(":"):
            assert "  # " in line, line


# ------------------------------------------------------------------------------------------------------------ kinds


def test_regression(here, tiny_model):
    write_csv(here / "t.csv", [scored(k, row) for k, row in enumerate(tickets())])
    drafted, task, data = made(tiny_model("llama"), "t.csv", "mood", text=("subject",))
    assert (task.score_range, task.score_decimals) == ((-1.0, 1.0), 2)
    assert task.metrics == ["pearson", "spearman"] and drafted.recipe.data.class_weights == "none"
    assert task.question.endswith("What is the mood, from -1 to 1?")
    check(task, data)


def test_integer_ratings_are_classes_unless_told(here, tiny_model):
    write_csv(here / "t.csv", [row | {"stars": str(k % 5 + 1)} for k, row in enumerate(tickets())])
    drafted, task, _ = made(tiny_model("llama"), "t.csv", "stars", text=("subject",))
    assert list(task.labels) == ["1", "2", "3", "4", "5"]
    assert any("--kind regression" in line for line in drafted.decisions)
    _, task, _ = made(tiny_model("llama"), "t.csv", "stars", text=("subject",), kind="regression")
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
    _, task, data = made(tiny_model("llama"), path, "tags", text=("subject", "ticket body"))
    assert task.multi_label and task.labels == {"late": ["late"], "rude": ["rude"]} and task.no_label == "none"
    assert task.source.label_separator == (";" if kind == "csv" else ",")
    assert len(data.train) + len(data.validation) + len(data.table) == 100
    answers = {task.answer(row.label) for row in data.train}
    assert answers == {"late, rude", "late", "rude", "none"}
    check(task, data)


def test_words_for_labels_and_numbers(here, tiny_model):
    write_csv(here / "t.csv", [row | {"team": str(k % 2)} for k, row in enumerate(tickets())])
    drafted, task, _ = made(tiny_model("llama"), "t.csv", "team")
    assert task.labels == {"0": ["0"], "1": ["1"]} and any("--labels 0=WORD,1=WORD" in w for w in drafted.warnings)
    drafted, task, _ = made(tiny_model("llama"), "t.csv", "team", labels={"0": "negative", "1": "positive"})
    assert task.labels == {"0": ["negative"], "1": ["positive"]} and not drafted.warnings


def test_booleans_and_class_numbers_of_parquet(here, tiny_model):
    import datasets

    rows = [row | {"team": k % 2 == 0} for k, row in enumerate(tickets())]
    write_parquet(here / "t.parquet", rows)
    _, task, data = made(tiny_model("llama"), "t.parquet", "team")
    assert set(task.labels) == {"false", "true"}
    check(task, data)
    features = datasets.Features({"text": datasets.Value("string"), "y": datasets.ClassLabel(names=["Bad", "Good"])})
    columns = {"text": [f"text {k} {WORDS[k % 5]}" for k in range(40)], "y": [k % 2 for k in range(40)]}
    datasets.Dataset.from_dict(columns, features).to_parquet(here / "c.parquet")
    _, task, data = made(tiny_model("llama"), "c.parquet", "y")
    assert task.labels == {"Bad": ["bad"], "Good": ["good"]}
    check(task, data)


# ------------------------------------------------------------------------------------------------- files and splits


def test_a_folder_of_splits(here, tiny_model):
    rows = tickets()
    write_csv(here / "train.csv", rows[:70])
    write_csv(here / "dev.csv", rows[70:])
    write_csv(here / "test.csv", [{k: v for k, v in row.items() if k != "team"} for row in rows[:20]])
    (here / "data").mkdir()
    for name in ("train", "dev", "test"):
        (here / f"{name}.csv").rename(here / "data" / f"{name}.csv")
    drafted, task, data = made(tiny_model("llama"), "data", "team")
    assert drafted.entry.path == Path("data.yaml")
    assert task.source.files == {"train": "data/train.csv", "validation": "data/dev.csv", "test": "data/test.csv"}
    assert task.source.unlabelled == ["test"] and task.source.split is None
    assert (len(data.train), len(data.table)) == (70, 30)


def test_files_elsewhere_are_named_in_full(here, tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("elsewhere")
    write_csv(folder / "t.csv", tickets())
    _, task, _ = made(tiny_model("llama"), folder / "t.csv", "team")
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
    drafted, task, data = made(tiny_model("llama"), f"hub:me/tickets-{dev}", "team")
    assert drafted.entry.path == Path(f"tickets-{dev}.yaml") and not task.source.files
    assert task.source.hub.repo == f"me/tickets-{dev}"
    assert task.source.hub.splits == ({"validation": "dev"} if dev else {})
    assert len(data.validation) == (20 if dev else 10)
    check(task, data)


def test_rows_that_lack_something(here, tiny_model):
    rows = tickets()
    for k in (3, 30):
        rows[k]["team"] = ""
    rows[4]["ticket body"], rows[5]["ticket body"], rows[5]["subject"] = "", " ", ""
    write_csv(here / "t.csv", rows)
    drafted, task, data = made(tiny_model("llama"), "t.csv", "team")
    assert (task.source.incomplete, task.source.unknown_labels) == ("keep", "skip")
    # Two without a label, one without any text.
    assert len(data.train) + len(data.validation) + len(data.table) == 97
    assert any("2 of 100 rows have no label" in line for line in drafted.decisions)
    _, task, data = made(tiny_model("llama"), "t.csv", "team", text=("subject",))
    assert task.source.incomplete == "skip"


@pytest.mark.parametrize("count", [10, 11, 13, 20])
def test_few_rows(here, tiny_model, count):
    rows = [{"text": f"text {k} {WORDS[k % 9]}", "label": "ab"[k % 2]} for k in range(count)]
    write_csv(here / "t.csv", rows)
    _, task, data = made(tiny_model("llama"), "t.csv", "label")
    check(task, data)


# --------------------------------------------------------------------------------------------------- hostile tables

NAMES = [
    "text",
    "ticket body",
    " lead",
    'say "so"',
    "it's",
    "a: b",
    "#nr",
    "{braces}",
    "a{b",
    "}}",
    "emoji 😀",
    "名前",
    "yes",
    "null",
    "007",
    "- x",
    "*a",
    "&a",
    "a\tb",
    "x" * 200,
    "%",
    "a|b",
    "a;b",
    "line\nbreak",
    "<tag>",
    "Judgement",
    "idx",
    "label",
]
LABELS = [
    ["yes", "no"],
    ["null", "~"],
    ["007", "7"],
    ["1e5", "x"],
    ["a: b", "c #d"],
    ["'", '"', "x"],
    ["{a}", "{b}", "{{c}}"],
    ["true", "false"],
    ["Yes", "yes", "YES"],
    ["a_b", "a-b", "a b"],
    ["<b>", "b"],
    ["---", "+++"],
    ["not spam", "spam"],
    ["no, thanks", "yes, please"],
    ["😀", "😡"],
    ["正面", "负面"],
    ["إيجابي", "سلبي"],
    ["caf\u00e9", "cafe\u0301s"],
    ["Judgement day", "other"],
    ["a.", "a..", "a"],
    ["\u201cquoted\u201d", "quoted"],
    ["1", "2", "3", "4", "5"],
    ["-1", "0", "1"],
    ["0.5", "1.5"],
    ["x" * 100, "y"],
    ["N/A", "none", "None of these"],
]


def hostile(seed):
    """A table with odd names, labels, texts and gaps: (rows, label column)."""
    rng = random.Random(seed)
    *texts, label = rng.sample(NAMES, rng.randint(2, 5))
    labels = LABELS[seed % len(LABELS)]
    pieces = [*WORDS, "{subject}", "<Judgement>no</Judgement>", "</Judgement>", "\ttab", "\u2028", "a\nb", "'", '"', ""]
    rows = []
    for k in range(rng.randint(12, 80)):
        row = {name: " ".join(rng.choices(pieces, k=rng.randint(1, 8))) for name in texts}
        if rng.random() < 0.1 and k > 5:
            row[rng.choice(texts)] = rng.choice(["", "   "])
        row[label] = labels[k % len(labels)] if k < 2 * len(labels) else rng.choice(labels)
        if rng.random() < 0.05 and k > 4 * len(labels):
            row[label] = ""
        rows.append(row)
    if rng.random() < 0.3:
        rows += rng.choices(rows, k=5)  # doubled
    names = [*texts, label]
    rng.shuffle(names)
    return [{name: row[name] for name in names} for row in rows], label, texts


@pytest.mark.parametrize("seed", range(len(LABELS) * 2))
def test_hostile_tables(here, tiny_model, seed):
    rows, label, texts = hostile(seed)
    kind = ["csv", "jsonl", "tsv", "parquet"][seed % 4]
    path = here / f"rows {seed}.{kind}"
    if kind in ("csv", "tsv"):
        write_csv(path, rows, separator="\t" if kind == "tsv" else ",;|"[seed % 3])
    else:
        {"jsonl": write_jsonl, "parquet": write_parquet}[kind](path, rows)
    drafted, task, data = made(
        tiny_model("llama"), path, label, text=tuple(texts), kind=None if seed % 2 else "classification"
    )
    check(task, data)
    if not task.is_regression and not task.multi_label:
        assert set(task.labels) == {row[label].strip() for row in rows if row[label].strip()}
    assert len(task.fields) == len(texts)
    for row in data.train + data.validation + data.table:
        assert len(drafted.encoder.encode(task, row.fields)[0]) <= drafted.recipe.prompt.max_tokens


# ---------------------------------------------------------------------------------------- columns with the answer in


def test_a_column_that_tells_the_label_is_left_out(here, tiny_model):
    words = {"billing": "Billing team", "technical_support": "Support", "sales": "Sales", "legal": "Legal"}
    rows = [row | {"label_text": words[row["team"]], "nr": str(list(TEAMS).index(row["team"]))} for row in tickets()]
    write_csv(here / "t.csv", rows)
    drafted, task, _ = made(tiny_model("llama"), "t.csv", "team")
    assert task.fields == ("subject", "ticket body") and not any("label_text" in w for w in drafted.warnings)
    left = next(line for line in drafted.decisions if line.startswith("left out"))
    assert "label_text (category: 4 distinct values, one to one with those of 'team': it holds the answer)" in left
    drafted, task, _ = made(tiny_model("llama"), "t.csv", "team", text=("subject", "label_text", "nr"))
    assert task.fields == ("subject", "label_text", "nr")
    for name in ("label_text", "nr"):
        assert f"column {name!r} is part of the prompt and tells the answer" in drafted.warnings
    rows[0]["label_text"] = "Support" if rows[0]["team"] != "technical_support" else "Legal"  # no longer one to one
    write_csv(here / "t.csv", rows)
    drafted, task, _ = made(tiny_model("llama"), "t.csv", "team")
    assert "label_text" in task.fields and any(
        "'label_text' is part of the prompt and by its" in w for w in drafted.warnings
    )


@pytest.mark.parametrize("name", ["predicted", "pred", "Prediction", "answer", "label_old", "gold_label"])
def test_a_column_named_as_an_answer_is_warned_of(here, tiny_model, name):
    write_csv(here / "t.csv", [row | {name: row["subject"]} for row in tickets()])
    drafted, task, _ = made(tiny_model("llama"), "t.csv", "team")
    assert name in task.fields
    assert [f"column {name!r} is part of the prompt" in w for w in drafted.warnings] == [True]


def test_texts_of_few_rows_are_no_answer(here, tiny_model):
    write_csv(here / "t.csv", [{"text": f"text {k} {WORDS[k % 9]}", "score": f"{k}.5"} for k in range(20)])
    _, task, _ = made(tiny_model("llama"), "t.csv", "score")  # one to one, but no value recurs
    assert task.fields == ("text",)


def test_every_decision_and_warning_is_one_line(here, tiny_model):
    rows = [row | {"label\nnew": row["subject"], "n\nr": f"{k}.5"} for k, row in enumerate(tickets())]
    write_csv(here / "t.csv", rows)
    result = nlu("init", "t.csv", "--label", "team", "--model", tiny_model("llama"))
    assert result.exit_code == 0, (result.output, result.exception)
    lines = result.stdout.splitlines()
    assert any(line.startswith("- left out: ") and "n r (number" in line for line in lines)
    assert any(line.startswith("warning: column 'label\\nnew' is part of the prompt and by its name") for line in lines)
    head = lines[: lines.index("labels, and the word that the model writes for each:")]
    assert all(line.startswith("- ") for line in head)


# -------------------------------------------------------------------------------------------------- the command line


def fails(*arguments):
    result = nlu("init", *arguments)
    assert result.exit_code == 2, (result.output, result.exception)
    assert result.stdout == "" and "Traceback" not in result.stderr
    return result.stderr


def test_the_label_is_asked_for(here):
    write_csv(here / "t.csv", tickets())
    said = fails("t.csv")
    assert "nlu init t.csv --label 'team'" in said
    for line in ("id: id (numbers, another in each row)", "ticket body: text (", "team: category (4 distinct values)"):
        assert line in said
    assert "no column 'taem'; did you mean 'team'?" in fails("t.csv", "--label", "taem")
    assert "as an id does" in fails("t.csv", "--label", "id")
    assert "must not see it" in fails("t.csv", "--label", "team", "--text", "team")
    assert "no column 'bdy'" in fails("t.csv", "--label", "team", "--text", "bdy")
    assert "is no LABEL=WORD" in fails("t.csv", "--label", "team", "--labels", "billing")
    assert "'bill' is no label of the column" in fails("t.csv", "--label", "team", "--labels", "bill=x")
    assert not (here / "t.yaml").exists()


def test_files_that_cannot_be_used(here):
    rows = tickets()
    write_csv(here / "t.csv", rows)
    (here / "t.yaml").write_text("mine")
    assert "t.yaml exists; name another with --out RECIPE, or write over it with --force" in fails(
        "t.csv", "--label", "team"
    )
    assert (here / "t.yaml").read_text() == "mine"
    assert "ends in .yaml" in fails("t.csv", "--label", "team", "--out", "t.txt")
    assert "is not a folder" in fails("t.csv", "--label", "team", "--out", "no/t.yaml")
    assert "absent.csv: no such file" in fails("absent.csv", "--label", "team")
    (here / "t.xlsx").touch()
    assert "t.xlsx: the suffix '.xlsx' is not a known format" in fails("t.xlsx", "--label", "team", "--out", "x.yaml")
    write_csv(here / "few.csv", rows[:9])
    assert "9 rows with a label" in fails("few.csv", "--label", "team")
    (here / "torn.csv").write_text("a,b,team\n1,2\n" * 20)
    assert "columns, expected 3" in fails("torn.csv", "--label", "team")
    write_csv(here / "latin.csv", rows[:50])
    (here / "latin.csv").write_bytes((here / "latin.csv").read_text().replace("😀", "é").encode("cp1252"))
    assert "are read differently" in fails("t.csv", "--label", "team", "--test", "latin.csv", "--out", "x.yaml")
    write_csv(here / "numbers.csv", [{"n": f"{k}.5", "team": "ab"[k % 2]} for k in range(20)])
    assert "no column looks like text (n: 20 distinct numbers)" in fails("numbers.csv", "--label", "team")


def test_files_of_other_programs(here, tiny_model):
    import pandas as pd

    texts = [f"the film of number {k} was {WORDS[k % 9]}" for k in range(40)]
    scores = [1, 1.5, 2, 2.25, 4, 5.5, 3, 3.5] * 5
    pd.DataFrame({"text": texts, "score": scores}).to_csv("german.csv", sep=";", decimal=",", index=False)
    assert "numbers with a comma, such as '1,0'" in fails("german.csv", "--label", "score")
    pd.read_csv("german.csv", sep=";", decimal=",").to_csv("points.csv", index=False)  # as the message says
    _, task, _ = made(tiny_model("llama"), "points.csv", "score")
    assert task.is_regression
    assert "a regression has scores, no labels" in fails(
        "points.csv", "--label", "score", "--labels", "1=bad", "--force"
    )
    tags = [["blue", "red"], ["blue"], []] * 13
    pd.DataFrame({"text": texts[:39], "tags": tags}).to_csv("lists.csv", index=False)
    assert "lists written as text" in fails("lists.csv", "--label", "tags")
    pd.DataFrame({"text": texts[:39], "tags": tags}).to_json("lists.jsonl", orient="records", lines=True)
    _, task, _ = made(tiny_model("llama"), "lists.jsonl", "tags")
    assert list(task.labels) == ["blue", "red"]


def test_encodings_on_the_command_line(here, tiny_model):
    rows = [{"text": f"товар номер {k}", "label": ["да", "нет"][k % 2]} for k in range(40)]
    write_csv(here / "t.csv", rows, "cp1251")
    said = fails("t.csv", "--label", "label")
    assert "t.csv: not UTF-8" in said and "--encoding, for example cp1251" in said
    result = nlu("init", "t.csv", "--label", "label", "--encoding", "cp1251", "--model", tiny_model("llama"))
    assert result.exit_code == 0, (result.output, result.exception)
    assert "warning: t.csv" not in result.stdout
    task = load_recipe(here / "t.yaml").data.tasks[0]
    assert task.source.encoding == "cp1251" and set(task.labels) == {"да", "нет"}
    assert "read from parquet" in fails("hub:a/b", "--label", "x", "--encoding", "cp1251")
    write_csv(here / "french.csv", [{"text": f"été {k}", "été": "ab"[k % 2]} for k in range(40)], "cp1252")
    said = fails("french.csv", "--label", "ete")
    assert "no column 'ete'" in said
    assert said.endswith(
        "note: french.csv is not UTF-8: read as cp1252; look at the prompts, --encoding NAME sets another\n"
    )


def test_an_absent_model_is_one_sentence(here):
    write_csv(here / "t.csv", tickets())
    said = fails("t.csv", "--label", "team", "--model", "./absent")
    assert "model.path" in said and "./absent" in said
    assert not (here / "t.yaml").exists()


def test_a_prompt_that_cannot_fit(here, tiny_model):
    teams = [f"a team of number {k} with a name that is long" for k in range(40)]
    write_csv(here / "t.csv", [{"text": f"{k} {WORDS[k % 9]}", "team": teams[k % 40]} for k in range(400)])
    said = fails("t.csv", "--label", "team", "--model", tiny_model("llama"))
    assert "and without its texts it has " in said and "shorten the labels" in said


def test_what_is_printed(here, tiny_model):
    rows = tickets()
    write_csv(here / "t.csv", [*rows, *rows[:4]])
    result = nlu("init", "t.csv", "--label", "team", "--model", tiny_model("llama"))
    assert result.exit_code == 0, (result.output, result.exception)
    said = result.stdout
    for part in (
        "- kind: classification of column 'team'; 4 distinct values",
        "- text: subject (",
        "- left out: id (id: numbers, another in each row); --text COLUMN takes one in",
        "- split: 10% for validation and 10% for test",
        "'technical_support': 'technical support', ",
        "prompt 3 of ",
        "launch/sft.sh t.yaml   # about ",
        "  nlu predict runs/t-sft new.csv --out answers.csv",
        "launch/ppo.sh t.yaml model.adapter=runs/t-sft/adapter   # about ",
        "t.yaml: written; ",
    ):
        assert part in said, (part, said)
    assert said.count("<Judgement>\n") == 3


@pytest.mark.slow
def test_init_and_validate_as_processes(tmp_path):
    """With the packaged model, from another folder than the project's: the recipe is valid as it stands."""
    write_csv(tmp_path / "tickets.csv", tickets(), separator=";")
    somewhere = environment() | {"PYTHONPATH": str(ROOT)}
    for arguments in (["init", "tickets.csv", "--label", "team"], ["validate", "tickets.yaml"]):
        command = [sys.executable, "-c", "from extensions.cli.main import main; main()", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=somewhere, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    assert "tickets.yaml: valid" in done.stdout


def test_labels_of_a_column_with_gaps(here, tiny_model):
    """pandas keeps whole numbers with a gap as floats, in parquet too: the labels are 0 and 1, not 0.0 and 1.0."""
    frame = pandas.DataFrame({"text": [f"a b {k} c" for k in range(40)], "label": [0, 1, None, 1] * 10})
    frame.to_parquet(here / "gaps.parquet")
    drafted, _, _ = made(tiny_model("llama"), "gaps.parquet", "label")
    assert set(drafted.recipe.data.tasks[0].labels) == {"0", "1"}
    assert {row.label for row in drafted.data.train} == {"0", "1"}
