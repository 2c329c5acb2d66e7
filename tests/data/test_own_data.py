"""The user's own files: placeholders, malformed rows, warnings, the hub. Expected rows are stated here."""

import json

import pandas
import pyarrow
import pyarrow.parquet
import pytest
from own_task import own, put, refused
from pydantic import ValidationError

from extensions.common.errors import UserError
from extensions.data import (
    Example,
    has_split,
    is_present,
    load_examples,
)
from extensions.data.checks import check_lengths, check_rows
from extensions.data.splits import RunData
from extensions.prompts import PromptEncoder, prompt_text
from extensions.recipe import load_recipe

SPLITS = ("train", "validation", "test")

NASTY = [
    {"id": "007", "subject": "Invoice, again", "ticket body": 'He said "pay",\nthen left.', "team": "billing"},
    {"id": "008", "subject": "NA", "ticket body": "null \U0001f600", "team": "sales"},
    {
        "id": "009",
        "subject": '"quoted"',
        "ticket body": "\u05e9\u05dc\u05d5\u05dd\ttab; {braces} {{x}}",
        "team": "sales",
    },
]


@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv", "rows.jsonl", "rows.ndjson", "rows.parquet"])
def test_every_format_gives_the_same_rows(tmp_path, name):
    if name == "rows.ndjson":
        put(tmp_path, NASTY, "rows.jsonl").rename(tmp_path / name)
    else:
        put(tmp_path, NASTY, name)
    examples = load_examples(own(source={"files": {"train": name}, "keep": {"id": "id"}}), "train", str(tmp_path))
    assert [example.fields for example in examples] == [
        {"subject": row["subject"], "ticket body": row["ticket body"]} for row in NASTY
    ]
    assert [example.label for example in examples] == ["billing", "sales", "sales"]
    assert [example.kept for example in examples] == [{"id": "007"}, {"id": "008"}, {"id": "009"}]


# --------------------------------------------------------------------------------------------------- placeholders


@pytest.mark.parametrize(
    "name", ["ticket body", "ticket-body", "\u00fcberschrift", "\u6b63\u6587", "a.b", "0", "x:y!z"]
)
def test_any_column_can_be_a_placeholder(tmp_path, name):
    put(tmp_path, [{name: "the {text} itself", "team": "sales"}])
    task = own(question=f"{{{{braces}}}} say {{{name}}}")
    (example,) = load_examples(task, "train", str(tmp_path))
    assert task.fields == (name,)
    assert "  {braces} say the {text} itself\n" in prompt_text(task, example.fields)


@pytest.mark.parametrize(
    "keys, parts",
    [
        ({"question": "{text} {}"}, ["question", "{ticket body}", "{{ and }}"]),
        ({"question": "{text} { ticket body }"}, ["question", "write {ticket body}"]),
        ({"question": "{text} {open"}, ["question", "brace", "{open"]),
        ({"question": "{text} close}"}, ["question", "brace", "close}"]),
        ({"question": "{text} {a\nb}"}, ["question", "write {a b}"]),
        ({"question": "{{text}}"}, ["question uses no {field}", "single braces"]),
        ({"description": "The ticket {text}."}, ["description", "{text} is a placeholder", "{{text}}"]),
        ({"answer_format": "Insert {team} here"}, ["answer_format", "{team} is a placeholder"]),
        ({"description": "An open { brace."}, ["description", "brace"]),
    ],
)
def test_a_brace_outside_a_placeholder_is_an_error(keys, parts):
    with pytest.raises(ValidationError) as caught:
        own(**keys)
    for part in parts:
        assert part in str(caught.value)


def test_literal_braces_in_the_other_texts():
    task = own(description="Write {{x}}.", answer_format="Insert {{team}} here")
    text = prompt_text(task, {"subject": "a", "ticket body": "b"})
    assert "Write {x}." in text and "{Insert {team} here}" in text


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl", "rows.parquet"])
def test_a_missing_column_names_the_nearest(tmp_path, name):
    put(tmp_path, NASTY, name)
    message = refused(own(question="{subject} {ticket_body}", source={"files": {"train": name}}), tmp_path)
    assert "no field 'ticket_body'" in message and "id, subject, ticket body, team" in message
    assert "Did you mean 'ticket body'?" in message
    assert "Did you mean 'team'?" in refused(own(source={"files": {"train": name}, "label": "teams"}), tmp_path)
    for choice in ("skip", "keep"):
        task = own(question="{subject} {ticket_body}", source={"files": {"train": name}, "incomplete": choice})
        assert "no field 'ticket_body'" in refused(task, tmp_path), "not an incomplete row"


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_numbers_and_booleans_are_texts(tmp_path, name):
    rows = [{"subject": 5, "ticket body": True, "team": "sales"}, {"subject": 7, "ticket body": False, "team": "sales"}]
    put(tmp_path, rows, name)
    examples = load_examples(own(source={"files": {"train": name}}), "train", str(tmp_path))
    assert [e.fields for e in examples] == [
        {"subject": "5", "ticket body": "true"},
        {"subject": "7", "ticket body": "false"},
    ]


# ----------------------------------------------------------------------------------------------------- invalid rows

INVALID = [
    {"subject": "a", "ticket body": "b", "team": "billing"},
    {"subject": "", "ticket body": "b", "team": "billing"},
    {"subject": "a", "ticket body": " ", "team": "sales"},
    {"subject": "a", "ticket body": "b", "team": "Billing"},
    {"subject": "a", "ticket body": "b", "team": "Billing"},
    {"subject": "a", "ticket body": "b", "team": "legal"},
    {"subject": "a", "ticket body": "b", "team": ""},
    {"subject": "", "ticket body": "", "team": "sales"},
    {"subject": "c", "ticket body": "d", "team": "sales"},
]


def test_all_invalid_rows_are_reported_with_the_keys_that_accept_them(tmp_path):
    path = put(tmp_path, INVALID)
    path.write_text(path.read_text() + "one,two,three,four\n")
    message = refused(own(), tmp_path)
    assert f"{path}: 8 rows cannot be used" in message
    for part in (
        "rows without a text, field 'subject': 2. source.incomplete: skip",
        "rows without a text, field 'ticket body': 1. source.incomplete: skip",
        "rows with an unknown label: 3 ('Billing' (2), 'legal' (1)). Add it to labels. source.unknown_labels: skip",
        "rows without a label: 1. source.unknown_labels: skip",
        "rows with too many or too few cells: 1. Put a text that holds the separator (here: comma) in quotes",
        "line 3, field 'subject'",
        "line 11: 4 columns, expected 3",
    ):
        assert part in message


@pytest.mark.parametrize(
    "choice, fields, expected",
    [
        ("skip", [("a", "b"), ("c", "d")], ["left out 3 rows that lack a text or a column"]),
        ("keep", [("a", "b"), ("", "b"), ("a", ""), ("c", "d")], ["left out 1 rows that have no text at all"]),
    ],
)
def test_keys_that_accept_invalid_rows(tmp_path, choice, fields, expected):
    path = put(tmp_path, INVALID)
    warnings = []
    task = own(source={"incomplete": choice, "unknown_labels": "skip"})
    examples = load_examples(task, "train", str(tmp_path), warn=warnings.append)
    assert [tuple(example.fields.values()) for example in examples] == fields
    expected = [*expected, "left out 4 rows that have no label of the task: 'Billing' (2), 'legal' (1), '' (1)"]
    assert sorted(warnings) == sorted(f"{path}: {one}" for one in expected)
    assert [example.index for example in examples] == list(range(len(fields)))
    rows = [(INVALID[e.kept["row"]]["subject"], INVALID[e.kept["row"]]["ticket body"].strip()) for e in examples]
    assert rows == fields, "`row` is the row number in the file"


@pytest.mark.parametrize("quoting", ["csv", "none"])
def test_ragged_rows_of_own_files_are_never_skipped(tmp_path, quoting):
    """`incomplete: skip` must not drop rows that are split at quoted line breaks."""
    (tmp_path / "rows.tsv").write_text('subject\tticket body\tteam\na\t"two\nlines"\tsales\nb\tc\tsales\nd\te\n')
    task = own(source={"files": {"train": "rows.tsv"}, "incomplete": "skip", "quoting": quoting})
    message = refused(task, tmp_path)
    assert ("line 5: 2 columns, expected 3" if quoting == "csv" else "3 rows cannot be used") in message


def test_scores_out_of_range_are_counted(tmp_path):
    put(tmp_path, [{"subject": "a", "ticket body": "b", "team": score} for score in ("1", "7", "7", "x", "")])
    task = own(labels={}, score_range=[0, 5], metrics=["pearson"])
    message = refused(task, tmp_path)
    assert (
        "rows whose score is not a number from 0 to 5: 3 ('7' (2), 'x' (1)). Set score_range to the range of the data"
        in message
    )
    assert "rows without a label: 1" in message


# --------------------------------------------------------------------------------------------------------- warnings


def warnings_of(task, train, **others):
    warnings = []
    make = lambda rows: [  # noqa: E731
        Example(task, i, {"subject": "s", "ticket body": text}, label) for i, (text, label) in enumerate(rows)
    ]
    check_rows(task, make(train), {split: make(rows) for split, rows in others.items()}, warnings.append)
    return warnings


def test_warnings_are_counted():
    both = [("a", "billing"), ("b", "sales")]
    assert warnings_of(own(), both, validation=[("c", "billing"), ("d", "sales")]) == []
    leak = warnings_of(own(), [*both, ("C  c", "sales")], validation=[("c C", "billing"), ("x", "sales")], test=both)
    assert [line.split("(")[0].strip() for line in leak] == [
        "tickets: 1 of 3 training rows are also in validation",
        "tickets: 2 of 3 training rows are also in test",
    ]
    doubled = warnings_of(own(), [*both, ("A", "billing"), ("a ", "billing"), ("B", "billing")])
    assert doubled == [
        "tickets: 2 of 5 training rows repeat another one, with its label",
        "tickets: 2 of 5 training rows have the texts of another one and another label",
    ]
    three = own(labels=["billing", "sales", "legal"])
    assert warnings_of(three, both, validation=[("c", "sales"), ("d", "sales")]) == [
        "tickets: no row of train has the label 'legal'",
        "tickets: all 2 rows of validation have the label 'sales'",
    ]


def test_a_run_warns_of_its_own_files(tmp_path):
    put(tmp_path, [{"subject": "s", "ticket body": "t", "team": "sales"}] * 3)
    put(tmp_path, [{"subject": "S", "ticket body": "t ", "team": "billing"}], "dev.csv")
    raw = own(source={"files": {"train": "rows.csv", "validation": "dev.csv"}})
    recipe = {"name": "a", "method": "sft", "model": {"path": "b"}, "data": {"root": str(tmp_path)}}
    recipe["data"]["tasks"] = [raw.model_dump(exclude_defaults=True, mode="json")]
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    warnings = []
    RunData.load(load_recipe(tmp_path / "r.yaml"), warnings.append)
    assert [line for line in warnings if line.startswith("tickets: 3 of 3 training rows are also in validation")]
    assert "tickets: 2 of 3 training rows repeat another one, with its label" in warnings
    assert "tickets: all 3 rows of train have the label 'sales'" in warnings


def test_truncated_rows_are_counted(tiny_model):
    from transformers import AutoTokenizer

    task = own()
    short = [Example(task, i, {"subject": "s", "ticket body": "short"}, "sales") for i in range(7)]
    long = [Example(task, i, {"subject": "s", "ticket body": "long " * 300}, "sales") for i in range(7, 10)]
    tokenizer = AutoTokenizer.from_pretrained(tiny_model("llama"))
    limit = len(tokenizer(prompt_text(task, short[0].fields))["input_ids"]) + 20
    encoder = PromptEncoder(tokenizer, limit, False)
    warnings = []
    check_lengths(encoder, short, "training rows", warnings.append)
    assert not warnings
    check_lengths(encoder, [*short, *long], "training rows", warnings.append)
    (line,) = warnings
    assert line.startswith(f"tickets: 3 of 10 training rows are cut to {limit} tokens")
    assert "the longest text (subject, ticket body)" in line
    tokens = len(tokenizer(prompt_text(task, long[0].fields))["input_ids"])
    assert line.endswith("of row " + ", ".join(f"{k} ({tokens} tokens)" for k in (7, 8, 9)))
    for example in (*short, *long):
        encoder.encode(task, example.fields)
    assert encoder.truncated == {"tickets": 3}, "the encoder counts the same"


# -------------------------------------------------------------------------------------------------------------- hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A data set on the hub with class names in its schema; `snapshot_download` returns its folder."""
    import huggingface_hub

    folder = tmp_path / "snapshot"
    features = {"team": {"names": ["sales", "billing"], "_type": "ClassLabel"}}
    metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    asked = []

    def write(split, layout="data/{}-00000-of-00001.parquet", named=True):
        rows = {"subject": ["a", "b"], "ticket body": [f"{split} 1", f"{split} 2"], "team": [1, 0]}
        table = pyarrow.table(rows)
        path = folder / layout.format(split)
        path.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(table.replace_schema_metadata(metadata) if named else table, path)

    def download(repo, repo_type, revision, allow_patterns):
        asked.append((repo, repo_type, revision, tuple(allow_patterns)))
        if revision != "main":
            raise OSError("no such revision")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    write.asked = asked
    return write


@pytest.mark.parametrize(
    "config, layout",
    [
        ("", "data/{}-00000-of-00001.parquet"),
        ("", "{}.parquet"),
        ("", "default/{}/0000.parquet"),
        ("en", "en/{}-00000-of-00001.parquet"),
        ("en", "en/{}/0000.parquet"),
    ],
)
def test_own_task_from_the_hub(hub, config, layout):
    hub("train", layout)
    hub("dev", layout)
    repo = {
        "repo": f"me/{layout.replace('/', '-').strip('{}.')}{config}",
        "config": config,
        "splits": {"validation": "dev"},
    }
    task = own(source={"files": {}, "hub": repo})
    assert [has_split(task, split) for split in SPLITS] == [True, True, False]
    for split, name in (("train", "train"), ("validation", "dev")):
        examples = load_examples(task, split, None)
        assert [(e.fields["ticket body"], e.label) for e in examples] == [
            (f"{name} 1", "billing"),
            (f"{name} 2", "sales"),
        ]
        assert is_present(task, split, None) and is_present(task, split, "hub")
    assert hub.asked[0][:3] == (repo["repo"], "dataset", "main")


def test_class_names_may_be_given(hub):
    hub("train", named=False)
    task = own(source={"files": {}, "hub": {"repo": "me/a", "labels": ["sales", "billing"]}})
    assert [e.label for e in load_examples(task, "train", None)] == ["billing", "sales"]
    task = own(source={"files": {}, "hub": {"repo": "me/a"}})
    with pytest.raises(UserError, match=r"label '1' is not one of|an unknown label: 2 \('1' \(1\), '0' \(1\)\)"):
        load_examples(task, "train", None)
    task = own(labels={"0": ["sales"], "1": ["billing"]}, source={"files": {}, "hub": {"repo": "me/a"}})
    assert [e.label for e in load_examples(task, "train", None)] == ["1", "0"]


def test_a_split_drawn_from_the_hub(hub):
    hub("train")
    task = own(source={"files": {}, "hub": {"repo": "me/b"}, "split": {"validation": 0.5}})
    assert [has_split(task, split) for split in SPLITS] == [True, True, False]
    assert len(load_examples(task, "train", None)) == 2
    with pytest.raises(UserError, match="leaves no rows for validation of 2 rows"):
        load_examples(task, "validation", None)


def test_an_unreachable_hub_is_a_user_error(monkeypatch):
    import huggingface_hub

    def fails(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    with pytest.raises(UserError, match=r"source\.hub.*me/none.*no network.*source\.files"):
        load_examples(own(source={"files": {}, "hub": {"repo": "me/none"}}), "train", None)


# ------------------------------------------------------------------------------------------- labels as files have them


@pytest.mark.parametrize("names", [["1", "0"], ["-1", "0", "1"], ["1", "2", "3"], ["bad", "good"]])
def test_class_numbers_are_indices_of_the_class_names(tmp_path, names):
    """Also if the names are numbers themselves."""
    features = {"team": {"names": names, "_type": "ClassLabel"}}
    metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    numbers = [k % len(names) for k in range(12)]
    columns = {"subject": ["s"] * 12, "ticket body": [f"t {k}" for k in range(12)], "team": numbers}
    table = pyarrow.table(columns).replace_schema_metadata(metadata)
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    task = own(labels=names, source={"files": {"train": "rows.parquet"}})
    assert [row.label for row in load_examples(task, "train", str(tmp_path))] == [names[k] for k in numbers]


def test_scores_keep_all_their_digits(tmp_path):
    """Scores in float64, in float32 (3.8 is 3.799999952316284 in float64), and decimals."""
    from decimal import Decimal

    texts = {"subject": ["s"] * 3, "ticket body": ["a", "b", "c"]}
    for kind, values, expected in (
        (pyarrow.float64(), [1000000.25, 1234567.0, 2e6], ["1000000.25", "1234567", "2000000"]),
        (pyarrow.float32(), [3.8, 0.1, 2.0], ["3.8", "0.1", "2"]),
        (pyarrow.decimal128(9, 2), [Decimal("3.80"), Decimal("0.14"), Decimal("2.00")], ["3.80", "0.14", "2.00"]),
    ):
        table = pyarrow.table(texts | {"team": pyarrow.array(values, kind)})
        pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
        task = own(labels={}, score_range=[0, 2e6], source={"files": {"train": "rows.parquet"}})
        assert [row.label for row in load_examples(task, "train", str(tmp_path))] == expected


def test_integer_labels_that_pandas_stores_as_floats(tmp_path):
    """Pandas does so for a column with a missing value."""
    rows = {"subject": ["s"] * 4, "ticket body": ["a", "b", "c", "d"], "team": [0, 1, None, 1]}
    pandas.DataFrame(rows).to_parquet(tmp_path / "rows.parquet")
    source = {"files": {"train": "rows.parquet"}, "unknown_labels": "skip"}
    examples = load_examples(own(labels={"0": "no", "1": "yes"}, source=source), "train", str(tmp_path))
    assert [row.label for row in examples] == ["0", "1", "1"]


def test_the_separator_line_of_excel(tmp_path):
    (tmp_path / "rows.csv").write_text("sep=;\nsubject;ticket body;team\na,b;c;billing\n")
    [row] = load_examples(own(), "train", str(tmp_path))
    assert row.fields == {"subject": "a,b", "ticket body": "c"} and row.label == "billing"


def test_a_column_named_idx_is_kept_unchanged(tmp_path):
    put(tmp_path, [row | {"idx": "003"} for row in NASTY])
    [first, *_] = load_examples(own(source={"keep": {"idx": "idx"}}), "train", str(tmp_path))
    assert first.kept["idx"] == "003"
