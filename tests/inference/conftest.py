"""A short supervised run, and its predictor."""

import json

import pytest
from predict_cli import LABELS, tickets
from support import write_recipe

from extensions import Predictor
from extensions.runs.main import main


@pytest.fixture(scope="session")
def workspace(tiny_model, tmp_path_factory):
    """Folder of a short supervised run (`run-sft`), whose own evaluation decodes by likelihood."""
    folder = tmp_path_factory.mktemp("predict")
    for name, rows in (("train", tickets(24)), ("validation", tickets(9)), ("test", tickets(15))):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "name": "tickets",
        "description": "Which team is it for?",
        "question": 'Subject "{subject}", text "{body}".',
        "labels": LABELS,
        "source": {
            "files": {split: f"{split}.jsonl" for split in ("train", "validation", "test")},
            "columns": {"body": "ticket body"},
            "label": "team",
        },
    }
    recipe = write_recipe(
        folder,
        tiny_model("llama"),
        data={"tasks": [task], "root": str(folder)},
        sft={"batch_size": 12, "max_steps": 40, "lr": 2e-2, "loss": "answer"},
        schedule={"name": "constant"},
        output_dir=str(folder / "run-sft"),
        evaluation={"max_samples": None, "decoding": "likelihood", "batch_size": 4},
        prompt={"shots": 1},
    )
    assert main([str(recipe)], "sft") == 0
    return folder


@pytest.fixture(scope="session")
def predictor(workspace):
    return Predictor.load(workspace / "run-sft")
