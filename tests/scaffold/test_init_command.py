"""`nlu init` on the command line: output and messages."""

import subprocess
import sys

import pytest
from init_tables import WORDS, fails, make_recipe, nlu, tickets, write_csv
from support import ROOT, environment

from extensions.recipe import load_recipe


def test_a_missing_label_option(here):
    write_csv(here / "t.csv", tickets())
    output = fails("t.csv")
    assert "nlu init t.csv --label 'team'" in output
    for line in ("id: id (numbers, another in each row)", "ticket body: text (", "team: category (4 distinct values)"):
        assert line in output
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


def test_numbers_and_lists_of_other_programs(here, tiny_model):
    import pandas as pd

    texts = [f"the film of number {k} was {WORDS[k % 9]}" for k in range(40)]
    scores = [1, 1.5, 2, 2.25, 4, 5.5, 3, 3.5] * 5
    pd.DataFrame({"text": texts, "score": scores}).to_csv("german.csv", sep=";", decimal=",", index=False)
    assert "numbers with a comma, such as '1,0'" in fails("german.csv", "--label", "score")
    pd.read_csv("german.csv", sep=";", decimal=",").to_csv("points.csv", index=False)  # as the message says
    _, task, _ = make_recipe(tiny_model("llama"), "points.csv", "score")
    assert task.is_regression
    assert "a regression has scores, no labels" in fails(
        "points.csv", "--label", "score", "--labels", "1=bad", "--force"
    )
    tags = [["blue", "red"], ["blue"], []] * 13
    pd.DataFrame({"text": texts[:39], "tags": tags}).to_csv("lists.csv", index=False)
    assert "lists written as text" in fails("lists.csv", "--label", "tags")
    pd.DataFrame({"text": texts[:39], "tags": tags}).to_json("lists.jsonl", orient="records", lines=True)
    _, task, _ = make_recipe(tiny_model("llama"), "lists.jsonl", "tags")
    assert list(task.labels) == ["blue", "red"]


@pytest.mark.slow
def test_encodings_on_the_command_line(here, tiny_model):
    rows = [{"text": f"товар номер {k}", "label": ["да", "нет"][k % 2]} for k in range(40)]
    write_csv(here / "t.csv", rows, "cp1251")
    output = fails("t.csv", "--label", "label")
    assert "t.csv: not UTF-8" in output and "--encoding, for example cp1251" in output
    result = nlu("init", "t.csv", "--label", "label", "--encoding", "cp1251", "--model", tiny_model("llama"))
    assert result.exit_code == 0, (result.output, result.exception)
    assert "warning: t.csv" not in result.stdout
    task = load_recipe(here / "t.yaml").data.tasks[0]
    assert task.source.encoding == "cp1251" and set(task.labels) == {"да", "нет"}
    assert "read from parquet" in fails("hub:a/b", "--label", "x", "--encoding", "cp1251")
    write_csv(here / "french.csv", [{"text": f"été {k}", "été": "ab"[k % 2]} for k in range(40)], "cp1252")
    output = fails("french.csv", "--label", "ete")
    assert "no column 'ete'" in output
    assert output.endswith(
        "note: french.csv is not UTF-8: read as cp1252; look at the prompts, --encoding NAME sets another\n"
    )


def test_a_missing_model(here):
    write_csv(here / "t.csv", tickets())
    output = fails("t.csv", "--label", "team", "--model", "./absent")
    assert "model.path" in output and "./absent" in output
    assert not (here / "t.yaml").exists()


def test_a_prompt_that_cannot_fit(here, tiny_model):
    teams = [f"a team of number {k} with a name that is long" for k in range(40)]
    write_csv(here / "t.csv", [{"text": f"{k} {WORDS[k % 9]}", "team": teams[k % 40]} for k in range(400)])
    output = fails("t.csv", "--label", "team", "--model", tiny_model("llama"))
    assert "and without its texts it has " in output and "shorten the labels" in output


@pytest.mark.slow
def test_output(here, tiny_model):
    rows = tickets()
    write_csv(here / "t.csv", [*rows, *rows[:4]])
    result = nlu("init", "t.csv", "--label", "team", "--model", tiny_model("llama"))
    assert result.exit_code == 0, (result.output, result.exception)
    output = result.stdout
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
        assert part in output, (part, output)
    assert output.count("<Judgement>\n") == 3


@pytest.mark.slow
def test_init_and_validate_as_processes(tmp_path):
    """With the packaged model, from another folder than the project's: the recipe is valid without changes."""
    write_csv(tmp_path / "tickets.csv", tickets(), separator=";")
    somewhere = environment() | {"PYTHONPATH": str(ROOT)}
    for arguments in (["init", "tickets.csv", "--label", "team"], ["validate", "tickets.yaml"]):
        command = [sys.executable, "-c", "from extensions.cli.main import main; main()", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=somewhere, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    assert "tickets.yaml: valid" in done.stdout
