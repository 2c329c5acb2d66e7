"""A run with planted wrong labels: its suspects are exactly these, also after a stop during the check."""

import json
from dataclasses import replace

import pandas as pd
import pytest
from support import write_recipe

from extensions.distributed import signals
from extensions.evaluation import evaluator
from extensions.runs.main import main

WRONG = [3, 8, 17]


@pytest.fixture
def recipe(tiny_model, tmp_path):
    """An SFT run of one step on 20 rows; the label is the row's last word, but for the rows `WRONG`."""
    words = ["good", "bad"]
    rows = [{"text": f"row {i} is {words[i % 2]}", "label": words[(i + (i in WRONG)) % 2]} for i in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {split: str(tmp_path / "rows.jsonl") for split in ("train", "validation")}
    own = {"name": "own", "description": "-", "question": "{text}", "labels": words, "source": {"files": files}}
    return write_recipe(
        tmp_path, tiny_model("llama"), output_dir=str(tmp_path / "run"), data={"tasks": [own]},
        sft={"batch_size": 4, "max_steps": 1}, logging={"tensorboard": False},
    )  # fmt: skip


@pytest.fixture
def knowing(monkeypatch):
    """Answers by likelihood are right, with 0.96 to 0.99; a list of what to do in the first batches."""
    plain, before = evaluator.answer_batch, []

    def answer(batch, encoder, sampler, tokens, seed, decoding, *rest):
        predictions = plain(batch, encoder, sampler, tokens, seed, decoding, *rest)
        if decoding != "likelihood":
            return predictions
        if before:
            raise before.pop()
        sure = {p.index: 0.99 - p.index / 1000 for p in predictions}
        right = {row.index: row.fields["text"].split()[-1] for row in batch}
        return [
            replace(
                p,
                answer=right[p.index],
                probabilities={w: sure[p.index] if w == right[p.index] else 1 - sure[p.index] for w in ("good", "bad")},
            )
            for p in predictions
        ]

    monkeypatch.setattr(evaluator, "answer_batch", answer)
    return before


@pytest.mark.slow
def test_the_suspects_are_the_planted_rows(recipe, tmp_path, knowing, capsys):
    knowing.append(signals.Stopped())
    assert main([str(recipe)], "sft") == 0
    assert not (tmp_path / "run" / "label_suspects.csv").exists()
    assert main([str(recipe)], "sft") == 0
    table = pd.read_csv(tmp_path / "run" / "label_suspects.csv")
    assert table["index"].tolist() == WRONG and table["probability"].tolist() == [0.987, 0.982, 0.973]
    assert table["answer"].tolist() == ["bad", "good", "bad"] and table["label"].tolist() == ["good", "bad", "good"]
    assert table["text"].tolist() == [f"row {i} is {['good', 'bad'][i % 2]}" for i in WRONG]
    out = " ".join(capsys.readouterr().out.split())
    assert "3 of 20 training rows have labels that the trained model contradicts" in out and "not errors" in out


@pytest.mark.slow
def test_some_rows_or_none(recipe, tmp_path, knowing):
    assert main([str(recipe), "evaluation.suspect_samples=10"], "sft") == 0
    assert pd.read_csv(tmp_path / "run" / "label_suspects.csv")["index"].tolist() == [8], "every second row"
    other = f"output_dir={tmp_path / 'other'}"
    assert main([str(recipe), other, "evaluation.suspect_samples=0", "evaluation.yardsticks=false"], "sft") == 0
    assert not (tmp_path / "other" / "label_suspects.csv").exists()
    assert "yardsticks" not in json.loads((tmp_path / "other" / "eval.json").read_text())
    found = json.loads((tmp_path / "run" / "eval.json").read_text())["yardsticks"]
    assert [list(found[kind]) for kind in ("majority", "tfidf")] == [["own"], ["own"]]
    assert {found[kind]["own"]["train_rows"] for kind in found} == {4}, "the rows that one step of 4 trains on"
