"""`Predictor`: its answers equal those of the run's own evaluation; arguments, threads, calibration."""

import os
import re
import shutil
import sys
import threading
from pathlib import Path

import pytest
from predict_cli import LABELS, fails, nlu, tickets, write_csv
from support import run_command
from typer.testing import CliRunner

from extensions import Predictor
from extensions.cli.main import app
from extensions.common.errors import UserError
from extensions.common.files import read_json, read_jsonl, write_json
from extensions.inference.manifest import Manifest
from extensions.runs.main import main


def test_predictions_equal_those_of_the_evaluation(workspace, predictor):
    evaluated = read_jsonl(workspace / "run-sft" / "predictions_after.jsonl")
    chances = [p["probabilities"]["3"] for p in evaluated]
    assert max(chances) > 1.01 * min(chances), "the rows differ"
    for batch_size in (1, 4, 64):
        answers = predictor.predict(tickets(15), probabilities=True, batch_size=batch_size)
        assert [one.answer for one in answers] == [p["answer"] for p in evaluated]
        for one, p in zip(answers, evaluated, strict=True):
            assert one.probabilities == pytest.approx(p["probabilities"], rel=1e-4)
            assert sum(one.probabilities.values()) == pytest.approx(1, abs=1e-9)
            assert one.confidence == max(one.probabilities.values()) == one.probabilities[one.answer]
            assert one.error is one.raw is None


def test_sampled_answers_equal_those_of_an_evaluation(workspace, predictor, tiny_model, tmp_path):
    """The same seed and rows give the same random numbers."""
    adapter = f"model.adapter={workspace / 'run-sft' / 'adapter'}"
    for decoding in ("sample", "greedy"):
        overrides = [f"output_dir={tmp_path / decoding}", adapter, f"evaluation.decoding={decoding}"]
        assert main([str(workspace / "recipe.yaml"), *overrides], "eval") == 0
        evaluated = read_jsonl(tmp_path / decoding / "predictions_after.jsonl")
        answers = predictor.predict(tickets(15), decoding=decoding)
        assert [(one.raw, one.answer) for one in answers] == [(p["response"], p["answer"]) for p in evaluated]
        assert all((one.answer is None) == (one.error is not None) == (one.confidence is None) for one in answers)


def test_an_adapter_folder_is_sufficient(workspace, predictor, tmp_path):
    """The folder is copied away from its run."""
    folder = tmp_path / "elsewhere"
    shutil.copytree(workspace / "run-sft" / "adapter", folder)
    assert Predictor.load(folder).predict(tickets(5), True) == predictor.predict(tickets(5), True)


def test_a_merged_model_answers_like_base_and_adapter(workspace, predictor, tmp_path):
    merged = tmp_path / "merged"
    adapter = f"model.adapter={workspace / 'run-sft' / 'adapter'}"
    done = CliRunner().invoke(app, ["merge", str(workspace / "recipe.yaml"), str(merged), adapter])
    assert done.exit_code == 0, done.output
    moved = merged.rename(tmp_path / "moved")
    for one, other in zip(
        Predictor.load(moved).predict(tickets(15), True), predictor.predict(tickets(15), True), strict=True
    ):
        assert one.answer == other.answer
        assert one.probabilities == pytest.approx(other.probabilities, rel=1e-4)
    with pytest.raises(UserError, match=r"merged model, which needs no base"):
        Predictor.load(moved, model=str(workspace))
    weights = next(moved.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    with pytest.raises(UserError, match="has changed since it was merged"):
        Predictor.load(moved)


def test_the_tokenizer_is_that_of_the_adapter(workspace, predictor, tmp_path, tiny_model):
    """The base's may lack the tokens that end an answer."""
    other = tmp_path / "base"
    shutil.copytree(tiny_model("llama"), other)
    config = read_json(other / "tokenizer_config.json")
    write_json(other / "tokenizer_config.json", config | {"eos_token": "a"})
    found = Predictor.load(workspace / "run-sft", model=str(other))
    assert found.sampler.tokenizer.eos_token == "<eos>"


def test_a_prompt_that_cannot_fit_is_an_error_of_its_row(predictor, monkeypatch):
    long = {"subject": "word " * 900, "ticket body": "word"}
    warnings = []
    assert predictor.predict([long], warn=warnings.append)[0].answer in LABELS, "texts that are too long are truncated"
    assert len(warnings) == 1 and "1 of 1 rows are cut to" in warnings[0] and "of row 0 (" in warnings[0]
    bare = len(predictor.encoder.encode(predictor.manifest.task(None), {"subject": "", "body": ""})[0])
    monkeypatch.setattr(predictor.encoder, "max_tokens", bare // 4)
    (one,) = predictor.predict([long])
    assert one.answer is None and f"the {bare // 4} tokens" in one.error


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ({"batch_size": -1}, "batch_size: got -1"),
        ({"temperature": 0.0}, "temperature: got 0.0"),
        ({"temperature": float("nan")}, "temperature: got nan"),
        ({"decoding": "greddy"}, "'greddy'; allowed: sample, greedy, likelihood"),
        ({"rows": {"subject": "a"}}, 'df.to_dict("records")'),
        ({"rows": [{"text": "a"}]}, "rows: no column 'subject', 'ticket body'"),
    ],
)
def test_argument_errors(predictor, arguments, part):
    rows = arguments.pop("rows", tickets(2))
    with pytest.raises(UserError, match=re.escape(part)):
        predictor.predict(rows, **arguments)


def test_rows_of_a_data_frame(predictor):
    """With the non-text values of pandas and numpy; an invalid row gets its own error."""
    import numpy
    import pandas

    missing = [{"subject": gap, "ticket body": "x"} for gap in (pandas.NA, float("nan"), None, pandas.NaT)]
    good = {"subject": numpy.int64(3), "ticket body": True}
    found = predictor.predict([good, *missing, "a", {"subject": "3", "ticket body": "true"}, {"subject": " "}])
    assert found[0] == found[6] and found[0].error is None
    assert all("subject" in one.error for one in found[1:5])
    assert "expected a dictionary" in found[5].error and found[7].answer is None
    assert predictor.predict([]) == []


def test_predict_is_thread_safe(predictor):
    expected, found = predictor.predict(tickets(6)), {}
    threads = [threading.Thread(target=lambda k=k: found.update({k: predictor.predict(tickets(6))})) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found.get(k) for k in range(4)] == [expected] * 4


def test_importing_the_package_loads_no_torch():
    code = "import sys, extensions; assert extensions.__version__; assert 'torch' not in sys.modules"
    done = run_command([sys.executable, "-c", code])
    assert done.returncode == 0, done.stderr
    with pytest.raises(ImportError):
        from extensions import Nothing  # noqa: F401


def test_answers_are_frozen_and_in_order(predictor):
    rows = [tickets(4)[k] for k in (3, 0, 2, 1)]
    answers = predictor.predict(rows)
    assert [one.probabilities for one in answers] == [None] * 4
    assert answers == [predictor.predict([row])[0] for row in rows] or all(
        one.confidence == pytest.approx(predictor.predict([row])[0].confidence, rel=1e-5)
        for one, row in zip(answers, rows, strict=True)
    )
    with pytest.raises(AttributeError):
        answers[0].answer = "x"
    assert predictor.predict([]) == []
    lacking, _ = predictor.predict([{"subject": "a"}, rows[0]])
    assert lacking.answer is None and "'ticket body'" in lacking.error


def test_relative_paths(workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    assert Predictor.load("run").location.folder == Path("run-sft/adapter")
    assert os.path.exists(Predictor.load("run-sft").location.recipe)


def test_a_temperature_is_fitted_stored_and_used(workspace, predictor, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(workspace / "run-sft", run)
    result = nlu(run, "--temperature", "auto")
    assert result.exit_code == 0 and "fitted on 9 validation rows: NLL" in result.stderr, result.output
    fitted = Manifest.load(run / "adapter").calibration["tickets"]
    assert fitted is not None and fitted != 1
    plain, again = predictor.predict(tickets(4), True), Predictor.load(run).predict(tickets(4), True)
    for one, other in zip(plain, again, strict=True):
        powers = {label: chance ** (1 / fitted) for label, chance in one.probabilities.items()}
        expected = {label: power / sum(powers.values()) for label, power in powers.items()}
        assert other.probabilities == pytest.approx(expected, rel=1e-6) and other.answer == one.answer
    assert Predictor.load(run).predict(tickets(4), True, temperature=1.0) == plain
    result = nlu(run, write_csv(tmp_path / "new.csv", tickets(1)))
    assert f"probabilities at temperature {fitted:.3f}" in result.stderr
    # Without the run there are no validation rows.
    alone = tmp_path / "alone"
    shutil.copytree(run / "adapter", alone)
    message = fails(alone, "--temperature", "auto")
    assert "no recipe.yaml" in message and "runs/NAME" in message
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(recipe.replace("validation.jsonl", "gone.jsonl"))
    assert "these cannot be read" in fails(run, "--temperature", "auto")
