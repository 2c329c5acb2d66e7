"""Prompting baselines: demonstrations, decodings, evaluation of base, adapter and merged model, killed and resumed."""

import json
import math
import re
import shutil
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import forms_of, launch, make_policy, predict, write_recipe
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from extensions.cli.main import app
from extensions.common.files import read_json, read_jsonl
from extensions.data import Example, load_examples
from extensions.data.sampling import demonstrations
from extensions.model.loading import load_tokenizer
from extensions.prompts import CLOSE, OPEN, PromptEncoder, prompt_text
from extensions.recipe import Model, load_recipe
from extensions.reporting.finished_runs import find_runs
from extensions.reporting.rows import make_rows
from extensions.rollout.sampler import Sampler
from extensions.runs.evaluation_run import Run
from extensions.runs.main import main
from extensions.runs.status import run_status
from extensions.tasks import TASKS

COLA, SST2, STSB = TASKS["cola"], TASKS["sst2"], TASKS["stsb"]


def cola_rows(count, label=lambda i: "01"[i % 2]):
    return [Example(COLA, i, {"sentence": f"Anna slept {i} times."}, label(i)) for i in range(count)]


# ------------------------------------------------------------------------------------------------------ demonstrations


def test_answered_demonstrations_precede_the_query():
    shown = [({"sentence": "She slept."}, "Yes"), ({"sentence": "Slept she the."}, "No")]
    plain = prompt_text(COLA, {"sentence": "Bob ate."})
    head, query = plain.split("Prompt:\n")
    expected = (
        f"{head}"
        'Prompt:\n  Now judge if the sentence "She slept." is linguistically acceptable.\n'
        "Assistant:\n<Judgement> Yes </Judgement>\n"
        'Prompt:\n  Now judge if the sentence "Slept she the." is linguistically acceptable.\n'
        "Assistant:\n<Judgement> No </Judgement>\n"
        f"Prompt:\n{query}"
    )
    assert prompt_text(COLA, {"sentence": "Bob ate."}, shown) == expected


def test_demonstrations_in_a_chat_are_turns(tiny_model):
    tokenizer = load_tokenizer(Model(path=str(tiny_model("llama"))))
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}[assistant]"
    encoder = PromptEncoder(tokenizer, 1000, True, 1, {"cola": [({"sentence": "She slept."}, "Yes")]})
    lines = encoder.encode(COLA, {"sentence": "Bob ate."})[1].split("\n[")
    assert [line.partition("]")[0].strip("[") for line in lines] == ["system", "user", "assistant", "user", "assistant"]
    assert lines[2] == f"assistant]{OPEN} Yes {CLOSE}" and lines[4] == f"assistant]{OPEN}"
    assert "She slept." in lines[1] and "Bob ate." in lines[3]


@pytest.mark.parametrize("count", [1, 5, 6])
def test_balanced_demonstrations_take_the_labels_in_turn(count):
    rows = cola_rows(400, lambda i: "1" if i % 10 else "0")
    found = demonstrations(COLA, rows, count, "balanced", seed=1)
    labels = [row.label for row in found]
    assert len(labels) == count and all(a != b for a, b in pairwise(labels))
    assert demonstrations(COLA, rows, count, "balanced", seed=1) == found
    assert demonstrations(COLA, rows, count, "balanced", seed=2) != found
    scores = [Example(STSB, i, {"sentence1": "a", "sentence2": f"b {i}"}, f"{i / 80:.1f}") for i in range(400)]
    halves = [float(row.label) > 2.5 for row in demonstrations(STSB, scores, 6, "balanced", seed=1)]
    assert halves.count(True) == halves.count(False) == 3


def test_random_demonstrations_follow_the_data_and_are_all_different():
    rows = cola_rows(400, lambda i: "1" if i % 10 else "0")
    drawn = [row.label for seed in range(40) for row in demonstrations(COLA, rows, 5, "random", seed)]
    assert 10 <= drawn.count("0") <= 35, "a tenth of 200"
    same = [*cola_rows(3), *cola_rows(3), *cola_rows(3)]
    assert len(demonstrations(COLA, same, 5, "random", 0)) == 3
    assert demonstrations(COLA, [], 5, "balanced", 0) == []


class Words:
    """A tokenizer with one id per word, so that lengths are known."""

    chat_template, eos_token_id = None, None

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": text.split()}


def test_a_row_is_never_its_own_demonstration():
    rows = cola_rows(6)
    pool = [(row.fields, COLA.answer(row.label)) for row in rows]
    encoder = PromptEncoder(Words(), 10**4, False, 5, {"cola": pool})
    for row in rows:  # the sixth takes the place of the row itself
        text = encoder.encode(COLA, row.fields)[1]
        assert [text.count(other.fields["sentence"]) for other in rows] == [1] * 6
        assert text.endswith(f'"{row.fields["sentence"]}" is linguistically acceptable.\nAssistant:\n{OPEN}')
    text = encoder.encode(COLA, {"sentence": "Another."})[1]
    assert [text.count(other.fields["sentence"]) for other in rows] == [1] * 5 + [0]
    assert not encoder.dropped


def test_demonstrations_are_dropped_before_the_text_is_cut():
    pool = [({"sentence": f"{i} " + "word " * 40}, "Yes") for i in range(6)]
    fields = {"sentence": " ".join(["long"] * 30)}
    bare = len(PromptEncoder(Words(), 10**4, False).encode(COLA, fields)[0])
    one = len(PromptEncoder(Words(), 10**4, False, 1, {"cola": pool}).encode(COLA, fields)[0]) - bare
    for room, kept, words in ((5 * one, 5, 30), (3 * one + 7, 3, 30), (one - 1, 0, 30), (-4, 0, 26)):
        encoder = PromptEncoder(Words(), bare + room, False, 5, {"cola": pool})
        ids, text = encoder.encode(COLA, fields)
        assert len(ids) <= bare + room
        assert text.count("Assistant:") == kept + 1 and text.count("long") == words
        assert [i for i in range(6) if f'"{i} word' in text] == list(range(kept)), "the first are kept: they are shared"
        assert encoder.dropped["cola"] == (kept < 5)


# ----------------------------------------------------------------------------------------------------------- decodings


@pytest.fixture(scope="module")
def scene(tiny_model):
    """A tiny policy's sampler and encoder, and rows of two tasks."""
    tokenizer = load_tokenizer(Model(path=str(tiny_model("llama"))))
    sampler = Sampler(make_policy(tiny_model("llama"), critic="none"), tokenizer, CLOSE, 8)
    return sampler, PromptEncoder(tokenizer, 400, False)


def plain_logits(sampler, ids):
    with torch.no_grad(), sampler.policy.role("actor"):
        return sampler.policy.lm(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def test_greedy_takes_the_most_probable_tokens(scene):
    sampler, encoder = scene
    rows = cola_rows(5)
    found = predict(rows, encoder, sampler, 3, 6, 0, "greedy")
    for row, prediction in zip(rows, found, strict=True):
        ids = encoder.encode(COLA, row.fields)[0]
        written = []
        for _ in range(6):
            written.append(int(plain_logits(sampler, ids + written)[-1].argmax()))
            if written[-1] == sampler.tokenizer.eos_token_id or CLOSE in sampler.decode(written):
                break
        assert prediction.response == sampler.decode(written)
    assert predict(rows, encoder, sampler, 5, 6, 99, "greedy") == found, "random numbers have no effect"


@pytest.mark.parametrize("task", [COLA, SST2, STSB], ids=lambda task: task.name)
@pytest.mark.parametrize("decoding", ["likelihood", "sample", "greedy"])
def test_likelihood_ranks_the_answers(scene, task, decoding):
    """Alone, and beside sampled answers, which stay as they are."""
    sampler, encoder = scene
    rows = [Example(task, i, dict.fromkeys(task.fields, f"Anna slept {i}."), None) for i in range(4)]
    found = predict(rows, encoder, sampler, 3, 6, 0, decoding, probabilities=True)
    if decoding != "likelihood":
        alone = predict(rows, encoder, sampler, 3, 6, 0, decoding)
        nothing = dict.fromkeys(("positive_probability", "positive_log_odds", "probabilities", "likelihood"))
        assert [replace(prediction, **nothing) for prediction in found] == alone
    answers = dict(task.labels) or {k / 2: [f"{k / 2:.1f}"] for k in range(11)}
    for row, prediction in zip(rows, found, strict=True):
        ids, text = encoder.encode(task, row.fields)
        probabilities = {label: [] for label in answers}  # of each form of each label
        for label, words in answers.items():
            for form in forms_of(words):
                whole = sampler.tokenizer(f"{text}{form}")["input_ids"]
                logprobs = plain_logits(sampler, whole).double().log_softmax(-1)
                logprob = sum(logprobs[k - 1, whole[k]].item() for k in range(len(ids), len(whole)))
                probabilities[label].append(math.exp(logprob))
        totals = {label: sum(each) for label, each in probabilities.items()}
        expected = {str(label): value / sum(totals.values()) for label, value in totals.items()}
        best = max(totals, key=totals.get)
        written = best if task.is_regression else answers[best][0]
        if task.is_regression:
            best = pytest.approx(sum(float(score) * p for score, p in expected.items()), abs=6e-4)
            written = f"{prediction.likelihood:.3f}"
        assert prediction.likelihood == best
        if decoding == "likelihood":
            assert prediction.answer == best and prediction.response == f" {written} {CLOSE}"
        assert prediction.probabilities == pytest.approx(expected, rel=1e-4)
        if task.positive:
            assert prediction.positive_probability == pytest.approx(expected[task.positive], rel=1e-4)
            odds = expected[task.positive] / (1 - expected[task.positive])
            assert prediction.positive_log_odds == pytest.approx(math.log(odds), abs=1e-4)


# ------------------------------------------------------------------------------------------------------------ real runs


def eval_recipe(folder, model, **sections):
    folder.mkdir(exist_ok=True)
    evaluation = {"max_samples": 12, "batch_size": 4} | sections.pop("evaluation", {})
    return write_recipe(folder, model, output_dir=str(folder / "run"), evaluation=evaluation, **sections)


def answers(folder, name="predictions_after.jsonl"):
    return read_jsonl(folder / "run" / name)


def assert_equal_but_for_rounding(found, expected):
    """Equal answers, and probabilities that agree to float32's rounding."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        for key, value in other.items():
            computed = key in ("probabilities", "positive_probability", "positive_log_odds")
            assert one[key] == (pytest.approx(value, rel=1e-4) if computed else value), key


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "mpt"])
def test_an_evaluation_writes_scores_and_answers(tiny_model, tmp_path, capsys, architecture):
    path = eval_recipe(tmp_path, tiny_model(architecture), data={"tasks": ["acceptability", "reviews"]})
    assert main([str(path), "prompt.shots=2"], "eval") == 0
    scores = read_json(tmp_path / "run" / "eval.json")
    assert scores.keys() == {"method", "decoding", "split", "splits", "after"}
    assert (scores["method"], scores["decoding"]) == ("eval", "sample")
    assert scores["splits"] == {"acceptability": "test", "reviews": "test"}
    found = answers(tmp_path)
    assert Counter(p["task"] for p in found) == {"acceptability": 12, "reviews": 12}
    assert all(p.keys() >= {"task", "index", "response", "answer", "gold"} for p in found)
    for prediction in found:
        probabilities = prediction["probabilities"]
        assert sum(probabilities.values()) == pytest.approx(1)
        assert prediction["likelihood"] == max(probabilities, key=probabilities.get)
    rows = load_examples(TASKS["acceptability"], "test", None)
    texts = {row.index: row.fields for row in rows}
    assert all(p["fields"] == texts[p["index"]] for p in found if p["task"] == "acceptability")
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        "recipe.yaml", "versions.json", "model.json", "warnings.jsonl", "eval.json", "predictions_after.jsonl",
        "report.html", "status.json",
    }  # fmt: skip
    assert run_status(tmp_path / "run").state == "finished"
    assert "wrong format" in capsys.readouterr().out


@pytest.mark.slow
def test_run_folders_of_one_recipe_do_not_collide(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write_recipe(tmp_path, tiny_model("llama"), evaluation={"max_samples": 2})
    for overrides in ([], ["prompt.shots=3"], ["evaluation.decoding=greedy"]):
        assert main([str(path), *overrides], "eval") == 0
    assert {p.name for p in (tmp_path / "runs").iterdir()} == {"tiny-zero-shot", "tiny-3-shot", "tiny-zero-shot-greedy"}


@pytest.fixture(scope="module")
def trained(tiny_model, tmp_path_factory):
    """A short PPO run whose table and random numbers are those of `eval_recipe`."""
    folder = tmp_path_factory.mktemp("trained")
    path = eval_recipe(folder, tiny_model("llama"))
    assert main([str(path)]) == 0
    return folder


@pytest.mark.slow
def test_an_adapter_evaluates_as_in_its_run_and_as_a_merged_model(trained, tiny_model, tmp_path):
    path = eval_recipe(tmp_path / "adapter", tiny_model("llama"))
    adapter = f"model.adapter={trained / 'run' / 'adapter'}"
    assert main([str(path), adapter], "eval") == 0
    assert answers(tmp_path / "adapter") == answers(trained)
    assert answers(trained) != answers(trained, "predictions_before.jsonl")
    merged = tmp_path / "merged model"
    assert CliRunner().invoke(app, ["merge", str(path), str(merged), adapter]).exit_code == 0
    lm = AutoModelForCausalLM.from_pretrained(merged)
    assert not any("lora" in name for name, _ in lm.named_parameters())
    path = eval_recipe(tmp_path / "merged", merged)
    assert main([str(path)], "eval") == 0
    assert read_json(tmp_path / "merged" / "run" / "eval.json")["merged"] is True
    (row,) = make_rows(find_runs([tmp_path / "merged" / "run"], print))
    assert row.label.startswith("Fine-tuned (merged)")
    assert load_recipe(path, ["method=eval", "output_dir=null"]).run_dir.name == "tiny-merged"
    assert_equal_but_for_rounding(answers(tmp_path / "merged"), answers(trained))


def test_merging_without_an_adapter_is_an_error(tiny_model, tmp_path):
    path = eval_recipe(tmp_path, tiny_model("llama"))
    done = CliRunner().invoke(app, ["merge", str(path), str(tmp_path / "merged")])
    assert done.exit_code == 2 and "model.adapter" in done.stderr and not (tmp_path / "merged").exists()


class Killed(BaseException):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_killed_evaluation_resumes_where_it_stopped(tiny_model, tmp_path, monkeypatch, capsys, dtype):
    """The batches are the same, so that rounding is the same in bfloat16, too."""
    dtype = f"model.dtype={dtype}"
    whole, cut = (eval_recipe(tmp_path / name, tiny_model("llama")) for name in ("whole", "cut"))
    assert main([str(whole), dtype], "eval") == 0
    sample, batches = Sampler.sample, []

    def killing(self, requests, greedy=False):
        if len(batches) == 2:
            raise Killed
        batches.append(len(requests))
        return sample(self, requests, greedy)

    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "sample", killing)
        with pytest.raises(Killed):
            main([str(cut), dtype], "eval")
    part = tmp_path / "cut" / "run" / "predictions_after.part-0.jsonl"
    assert len(read_jsonl(part)) == 8
    with part.open("a") as file:
        file.write('{"task": "acceptability", "ind')  # torn by the kill
    seen = []
    monkeypatch.setattr(Sampler, "sample", lambda self, r, greedy=False: seen.append(len(r)) or sample(self, r, greedy))
    assert main([str(cut), dtype], "eval") == 0
    assert sum(seen) == 4 and "8 are done already" in capsys.readouterr().out
    assert answers(tmp_path / "cut") == answers(tmp_path / "whole")
    assert read_json(tmp_path / "cut" / "run" / "eval.json") == read_json(tmp_path / "whole" / "run" / "eval.json")
    assert not list((tmp_path / "cut" / "run").glob("*.part-*"))


def test_a_killed_evaluation_of_another_recipe_is_refused(tiny_model, tmp_path, monkeypatch, capsys):
    path = eval_recipe(tmp_path, tiny_model("llama"))
    (tmp_path / "run").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(Run, "write_scores", lambda self: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            main([str(path)], "eval")
    assert main([str(path), "prompt.shots=1"], "eval") == 2
    assert "prompt.shots: was 0, is 1" in capsys.readouterr().err


def test_a_partial_file_without_a_complete_line_is_ignored(tiny_model, tmp_path):
    whole = eval_recipe(tmp_path / "whole", tiny_model("llama"))
    assert main([str(whole)], "eval") == 0
    cut = eval_recipe(tmp_path / "cut", tiny_model("llama"))
    assert main([str(cut)], "eval") == 0
    (tmp_path / "cut" / "run" / "eval.json").unlink()
    (tmp_path / "cut" / "run" / "predictions_after.part-0.jsonl").write_text('{"task": "acc')
    assert main([str(cut)], "eval") == 0
    assert answers(tmp_path / "cut") == answers(tmp_path / "whole")


def test_an_adapter_that_changed_since_is_refused(trained, tiny_model, tmp_path, monkeypatch, capsys):
    """Otherwise one file would hold the answers of two models."""
    adapter = tmp_path / "adapter"
    shutil.copytree(trained / "run" / "adapter", adapter)
    path = eval_recipe(tmp_path, tiny_model("llama"))
    with monkeypatch.context() as patch:
        patch.setattr(Run, "write_scores", lambda self: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            main([str(path), f"model.adapter={adapter}"], "eval")
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, adapter / "adapter_model.safetensors")
    assert main([str(path), f"model.adapter={adapter}"], "eval") == 2
    assert "have changed since (sha256): model.adapter" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "decoding"), [(0, "sample"), (3, "sample"), (3, "likelihood")])
def test_two_ranks_resume_a_run_of_one(tiny_model, tmp_path, stage, decoding):
    """Killed on one rank, resumed on two: the answers of an uninterrupted run; dropped demonstrations are reported."""
    sections = {
        "prompt": {"shots": 4, "max_tokens": 300},
        "evaluation": {"decoding": decoding, "max_samples": 13},
        "data": {"tasks": ["acceptability", "reviews"]},
    }
    whole = eval_recipe(tmp_path / "whole", tiny_model("llama"), **sections)
    assert main([str(whole)], "eval") == 0
    cut = eval_recipe(tmp_path / "cut", tiny_model("llama"), deepspeed={"zero_stage": stage}, **sections)
    assert main([str(cut)], "eval") == 0
    folder = tmp_path / "cut" / "run"
    (folder / "eval.json").unlink()
    found = [{key: value for key, value in p.items() if key != "fields"} for p in answers(tmp_path / "cut")]
    lines = [json.dumps(prediction) for prediction in found]
    (folder / "predictions_after.part-7.jsonl").write_text("\n".join(lines[3:8]) + "\n" + lines[9][:20])
    done = launch(cut, ranks=2, method="eval")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "are done already" in done.stdout
    assert len(re.findall(r"acceptability: \d+ prompts show fewer", " ".join(done.stdout.split()))) == 1
    assert "show fewer than 4 demonstrations" in done.stdout
    assert answers(tmp_path / "cut") == answers(tmp_path / "whole")


def test_tasks_that_are_only_evaluated_show_rows_of_their_train_task(tiny_model, tmp_path):
    from official import write_benchmarks

    root = write_benchmarks(tmp_path / "benchmarks")
    path = eval_recipe(tmp_path, tiny_model("llama"), data={"tasks": ["mnli_mm", "axb", "axg"], "root": str(root)})
    assert main([str(path), "prompt.shots=1", "prompt.max_tokens=480"], "eval") == 0
    assert read_json(tmp_path / "run" / "eval.json")["after"].keys() == {"mnli_mm", "axb", "axg"}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ppo", "sft"])
def test_training_with_demonstrations(tiny_model, tmp_path, method):
    path = eval_recipe(tmp_path, tiny_model("qwen2"), max_steps=2, evaluation={"max_samples": 2})
    assert main([str(path), "prompt.shots=2", "sft.batch_size=4"], method) == 0
    if method == "ppo":
        rollout = read_jsonl(tmp_path / "run" / "rollouts.jsonl")[0]
        assert rollout["prompt"].count(CLOSE) == 3 and "</Judgement>\nPrompt:" in rollout["prompt"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["prompt.shots=-1"], "prompt.shots"),
        (["evaluation.decoding=beam"], "'sample', 'greedy' or 'likelihood'"),
        (["method=sft"], "launch/sft.sh"),
        (["model.adapter=nowhere"], "adapter_config.json"),
    ],
)
def test_user_errors_end_with_one_message(tiny_model, tmp_path, capsys, overrides, message):
    path = eval_recipe(tmp_path, tiny_model("llama"))
    assert main([str(path), *overrides], "eval") == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_demonstrations_reveal_no_answer(tmp_path):
    """In MultiRC and ReCoRD no text is shown twice, and never that of the row itself."""
    multirc = TASKS["multirc"]
    rows = [
        Example(multirc, i, {"passage": f"text {i // 4}", "question": "q", "answer": str(i)}, str(i % 2), None, {})
        for i in range(40)
    ]
    found = demonstrations(multirc, rows, 6, "balanced", 0)
    assert len({row.fields["passage"] for row in found}) == 6
    encoder = PromptEncoder(Words(), 10**4, False, 5, {"multirc": [(row.fields, "True") for row in found]})
    text = encoder.encode(multirc, found[0].fields | {"answer": "another"})[1]
    assert text.count(f'"{found[0].fields["passage"]}"') == 1 and text.count("Assistant:") == 6


def test_a_train_task_of_another_form_is_refused(tiny_model, tmp_path, capsys):
    (tmp_path / "test.jsonl").write_text(json.dumps({"text": "a", "label": "1"}) + "\n")
    task = {
        "name": "own",
        "description": "Judge.",
        "question": 'Judge "{text}".',
        "labels": {"1": ["Yes"], "0": ["No"]},
        "train_task": "cola",
        "source": {"files": {"test": str(tmp_path / "test.jsonl")}},
    }
    path = eval_recipe(tmp_path, tiny_model("llama"), data={"tasks": [task]})
    assert main([str(path), "prompt.shots=1"], "eval") == 2
    assert "train_task: cola has other fields" in capsys.readouterr().err


def test_demonstrations_need_training_rows(tiny_model, tmp_path, capsys):
    (tmp_path / "test.jsonl").write_text(json.dumps({"text": "a", "label": "good"}) + "\n")
    task = {
        "name": "own",
        "description": "Judge.",
        "question": 'Judge "{text}".',
        "labels": ["good", "bad"],
        "source": {"files": {"test": str(tmp_path / "test.jsonl")}},
    }
    path = eval_recipe(tmp_path, tiny_model("llama"), data={"tasks": [task]})
    assert main([str(path)], "eval") == 0
    assert main([str(path), "prompt.shots=1"], "eval") == 2
    assert "source.files.train" in capsys.readouterr().err
