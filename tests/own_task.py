"""A user's own task, and its files."""

import json

import pandas
import pytest

from extensions.common.errors import UserError
from extensions.data import (
    load_examples,
)
from extensions.tasks import Task


def own(**keys):
    source = {"files": {"train": "rows.csv"}, "label": "team"} | keys.pop("source", {})
    entry = {
        "name": "tickets",
        "description": "Name the team.",
        "question": 'The ticket "{subject}" says "{ticket body}".',
        "labels": ["billing", "sales"],
    }
    return Task.model_validate(entry | keys | {"source": source})


def put(folder, rows, name="rows.csv"):
    path = folder / name
    frame = pandas.DataFrame(rows)
    if name.endswith("parquet"):
        frame.to_parquet(path)
    elif name.endswith("jsonl"):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        frame.to_csv(path, sep="\t" if name.endswith("tsv") else ",", index=False)
    return path


def refused(task, folder, split="train"):
    with pytest.raises(UserError) as caught:
        load_examples(task, split, str(folder))
    return str(caught.value)
