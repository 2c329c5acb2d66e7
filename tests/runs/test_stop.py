"""Stop requests: a run saves, ends with status 0, and resumes bit for bit."""

import os
import signal

import pytest
from resumable import assert_ended_as, three_steps

from extensions.common.files import read_json, read_jsonl
from extensions.distributed import signals
from extensions.runs.checkpoint import checkpoint_folders, verify_checkpoint
from extensions.runs.main import main
from extensions.runs.resume import is_finished
from extensions.runs.status import run_status
from extensions.runs.training_run import TrainingRun

pytestmark = pytest.mark.usefixtures("interruptible")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_saves_and_resumes_bit_for_bit(unfinished, tmp_path, capsys, number, tiny_model):
    """Checkpoints are off, so the one that is written is for the stop."""
    path = three_steps(tmp_path, tiny_model("llama"), checkpoint={"every_steps": 0})
    iterate = TrainingRun._iterate

    def stopping(self):
        iterate(self)
        if self.step == 2:
            os.kill(os.getpid(), number)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingRun, "_iterate", stopping)
        assert main([str(path)]) == 0
    output = capsys.readouterr().out
    assert f"stopped ({number.name}); resume with: bash launch/ppo.sh {path}" in output
    (folder,) = checkpoint_folders(tmp_path / "run")
    assert folder.name == "step-2" and read_json(folder / "run.json")["validated"] == 1, "validation was interrupted"
    status = run_status(tmp_path / "run")
    assert (status.state, status.why, status.step, status.last_step) == ("stopped", number.name, 2, 3)
    assert status.resume == f"bash launch/ppo.sh {path}"
    assert not is_finished(tmp_path / "run")
    assert main([str(path)]) == 0
    assert run_status(tmp_path / "run").state == "finished"
    assert "resuming after step 2" in capsys.readouterr().out
    assert_ended_as(unfinished / "whole", tmp_path / "run")


@pytest.mark.slow
def test_a_stop_in_a_validation_and_then_another_checkpoint_of_its_step(unfinished, tmp_path, tiny_model):
    """The checkpoint of step 2 is written twice: before its validation, cut off, and after it."""
    path = three_steps(tmp_path, tiny_model("llama"), checkpoint={"every_steps": 1, "on_error": "stop"})
    validate = TrainingRun._validate

    def stopping(self):
        if self.step == 2:
            raise signals.Stopped
        validate(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingRun, "_validate", stopping)
        assert main([str(path)]) == 0
    last = checkpoint_folders(tmp_path / "run")[-1]
    assert last.name == "step-2" and read_json(last / "run.json")["validated"] == 1
    with (tmp_path / "run" / "validation.jsonl").open("a") as file:
        file.write('{"step": 2}\n')  # as if it had written its record
    assert main([str(path), "checkpoint.keep=9"]) == 0
    assert read_json(last / "run.json")["validated"] == 2 and verify_checkpoint(last) == []
    assert_ended_as(unfinished / "whole", tmp_path / "run")
    assert not list((tmp_path / "run" / "checkpoints").glob("replaced-*"))


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["before", "after"])
def test_an_interrupted_evaluation_of_a_training_run_resumes(
    unfinished, tmp_path, monkeypatch, capsys, tiny_model, moment
):
    path = three_steps(tmp_path, tiny_model("llama"))
    from extensions.evaluation import evaluator

    answer_batch, stem = evaluator.answer_batch, f"predictions_{moment}"

    def stopping(*args):
        found = answer_batch(*args)
        if list((tmp_path / "run").glob(f"{stem}.part-*")):
            os.kill(os.getpid(), signal.SIGTERM)
        return found

    monkeypatch.setattr(evaluator, "answer_batch", stopping)
    options = ["evaluation.batch_size=1"]
    assert main([str(path), *options]) == 0
    assert len(read_jsonl(tmp_path / "run" / f"{stem}.part-0.jsonl")) == 1
    monkeypatch.setattr(evaluator, "answer_batch", answer_batch)
    capsys.readouterr()
    assert main([str(path), *options]) == 0
    assert "2 rows" in (output := capsys.readouterr().out) and "1 are done already" in output
    assert_ended_as(unfinished / "whole", tmp_path / "run")
    assert not list((tmp_path / "run").glob("*.part-*"))
