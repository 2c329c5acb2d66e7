"""`nlu init` on hostile tables, and on columns that leak the label."""

import random

import pytest
from init_tables import TEAMS, WORDS, check, make_recipe, nlu, tickets, write_csv, write_jsonl, write_parquet

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
    drafted, task, data = make_recipe(
        tiny_model("llama"), path, label, text=tuple(texts), kind=None if seed % 2 else "classification"
    )
    check(task, data)
    if not task.is_regression and not task.multi_label:
        assert set(task.labels) == {row[label].strip() for row in rows if row[label].strip()}
    assert len(task.fields) == len(texts)
    for row in data.train + data.validation + data.table:
        assert len(drafted.encoder.encode(task, row.fields)[0]) <= drafted.recipe.prompt.max_tokens


def test_a_column_that_determines_the_label_is_left_out(here, tiny_model):
    words = {"billing": "Billing team", "technical_support": "Support", "sales": "Sales", "legal": "Legal"}
    rows = [row | {"label_text": words[row["team"]], "nr": str(list(TEAMS).index(row["team"]))} for row in tickets()]
    write_csv(here / "t.csv", rows)
    drafted, task, _ = make_recipe(tiny_model("llama"), "t.csv", "team")
    assert task.fields == ("subject", "ticket body") and not any("label_text" in w for w in drafted.warnings)
    left = next(line for line in drafted.decisions if line.startswith("left out"))
    assert "label_text (category: 4 distinct values, one to one with those of 'team': it holds the answer)" in left
    drafted, task, _ = make_recipe(tiny_model("llama"), "t.csv", "team", text=("subject", "label_text", "nr"))
    assert task.fields == ("subject", "label_text", "nr")
    for name in ("label_text", "nr"):
        assert f"column {name!r} is part of the prompt and tells the answer" in drafted.warnings
    rows[0]["label_text"] = "Support" if rows[0]["team"] != "technical_support" else "Legal"  # no longer one to one
    write_csv(here / "t.csv", rows)
    drafted, task, _ = make_recipe(tiny_model("llama"), "t.csv", "team")
    assert "label_text" in task.fields and any(
        "'label_text' is part of the prompt and by its" in w for w in drafted.warnings
    )


@pytest.mark.parametrize("name", ["predicted", "pred", "Prediction", "answer", "label_old", "gold_label"])
def test_a_column_named_like_an_answer_warns(here, tiny_model, name):
    write_csv(here / "t.csv", [row | {name: row["subject"]} for row in tickets()])
    drafted, task, _ = make_recipe(tiny_model("llama"), "t.csv", "team")
    assert name in task.fields
    assert [f"column {name!r} is part of the prompt" in w for w in drafted.warnings] == [True]


def test_unique_texts_do_not_determine_the_label(here, tiny_model):
    write_csv(here / "t.csv", [{"text": f"text {k} {WORDS[k % 9]}", "score": f"{k}.5"} for k in range(20)])
    _, task, _ = make_recipe(tiny_model("llama"), "t.csv", "score")  # one to one, but no value recurs
    assert task.fields == ("text",)


@pytest.mark.slow
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
