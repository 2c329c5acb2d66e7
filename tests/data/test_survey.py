"""The contents of a folder of benchmark files, and the lengths of its prompts."""

import json
from statistics import mean, quantiles

import pytest

from extensions.common.errors import UserError
from extensions.data import load_examples
from extensions.data.survey import SAMPLE, lengths, survey
from extensions.prompts import PromptEncoder, prompt_text
from extensions.tasks import TASKS


class Letters:
    """A tokenizer whose tokens are characters, or runs of `width` of them."""

    eos_token_id, chat_template = -1, None

    def __init__(self, width=1):
        self.width = width

    def __call__(self, text, add_special_tokens):
        pieces = [text[i : i + self.width] for i in range(0, len(text), self.width)]
        return {"input_ids": [int.from_bytes(piece.encode(), "big") for piece in pieces]}


def encoder(width=1):
    return PromptEncoder(Letters(width), 10**6, False)


def put(root, path, text):
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text, encoding="utf-8")


def cola(root, train=("1", "0", "1"), validation=("0",), test=2):
    for path, labels in (("train", train), ("dev", validation)):
        put(root, f"CoLA/{path}.tsv", "".join(f"gj04\t{label}\t\tRow {i}.\n" for i, label in enumerate(labels)))
    put(root, "CoLA/test.tsv", "index\tsentence\n" + "".join(f"{i}\tRow {i}.\n" for i in range(test)))


def seen(task, root):
    return [(part.split, part.rows, part.labels) for part in survey(TASKS[task], str(root))]


def test_rows_and_labels_of_every_split(tmp_path):
    cola(tmp_path)
    assert seen("cola", tmp_path) == [
        ("train", 3, {"Yes": 2, "No": 1}),
        ("validation", 1, {"Yes": 0, "No": 1}),
        ("test", 2, {}),
    ]
    found = survey(TASKS["cola"], str(tmp_path))
    assert all(part.task is TASKS["cola"] for part in found)
    for part, size in zip(found, (8551, 1043, 1063), strict=True):
        [problem] = part.problems
        assert f"{part.rows} rows" in problem and f"has {size}" in problem and "CoLA" in problem


def test_labels_are_counted_by_answer_in_the_order_of_the_task(tmp_path):
    labels = ["contradiction", "entailment", "contradiction"]
    lines = [json.dumps({"premise": "a", "hypothesis": "b", "label": label, "idx": 0}) for label in labels]
    put(tmp_path, "superglue/CB/train.jsonl", "\n".join(lines))
    [(split, rows, counts)] = seen("cb", tmp_path)
    assert (split, rows, list(counts.items())) == (
        "train",
        3,
        [("entailment", 1), ("neutral", 0), ("contradiction", 2)],
    )


def test_scores_are_not_counted(tmp_path):
    put(tmp_path, "STS-B/dev.tsv", "sentence1\tsentence2\tscore\na\tb\t2.5\nc\td\t5.000\n")
    assert seen("stsb", tmp_path) == [("validation", 2, {})]


def test_only_existing_splits_are_shown(tmp_path):
    assert survey(TASKS["cola"], str(tmp_path)) == []
    cola(tmp_path)
    (tmp_path / "CoLA/train.tsv").unlink()
    assert [split for split, _, _ in seen("cola", tmp_path)] == ["validation", "test"]
    assert seen("sst2", tmp_path) == []


@pytest.mark.parametrize(
    "broken, parts",
    [
        ("gj04\t1\t\tRow.\ngj04\t7\t\tRow.\n", ["line 2", "'7'", "cola"]),
        ("gj04\t1\tRow.\n", ["line 1", "3 columns"]),
        ("", ["no rows"]),
    ],
)
def test_an_invalid_file_is_a_problem_and_the_others_are_shown(tmp_path, broken, parts):
    cola(tmp_path)
    put(tmp_path, "CoLA/dev.tsv", broken)
    train, validation, test = survey(TASKS["cola"], str(tmp_path))
    assert (train.rows, train.labels) == (3, {"Yes": 2, "No": 1}) and (test.rows, test.labels) == (2, {})
    assert (validation.split, validation.rows, validation.labels) == ("validation", None, {})
    [problem] = validation.problems
    for part in (str(tmp_path / "CoLA/dev.tsv"), *parts):
        assert part in problem


def test_rows_left_out_are_a_problem(tmp_path):
    header = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
    put(tmp_path, "QQP/train.tsv", f"{header}0\t1\t2\tWhy?\tHow?\t1\n1\t3\t4\t\tHow?\t0\n2\t5\t6\tWho?\n")
    [part] = survey(TASKS["qqp"], str(tmp_path))
    assert (part.rows, part.labels) == (1, {"Yes": 1, "No": 0})
    assert [problem.split(": ")[1][:15] for problem in part.problems] == ["left out 2 rows", "3 rows; the off"]


def test_generated_rows_are_surveyed_too():
    found = survey(TASKS["reviews"], None)
    assert [part.split for part in found] == ["train", "validation", "test"]
    for part in found:
        assert part.rows == sum(part.labels.values()) > 0 and part.problems == []
        assert part.rows == len(load_examples(TASKS["reviews"], part.split, None))


# ---------------------------------------------------------------------------------------------------------- lengths


def verys(i):
    return i % 37


def sst2(root, count, repeat=verys):
    rows = "".join(f"{text}\t1\n" for text in texts(count, repeat))
    put(root, "SST-2/train.tsv", f"sentence\tlabel\n{rows}")


def texts(count, repeat=verys):
    return [f"{'very ' * repeat(i)}good film number {i}" for i in range(count)]


def prompts_of(task, rows):
    return [prompt_text(TASKS[task], {"sentence": row}) for row in rows]


def test_lengths_are_those_of_the_prompts(tmp_path):
    sst2(tmp_path, 60)
    [found] = lengths(TASKS["sst2"], str(tmp_path), [encoder()])
    prompts = prompts_of("sst2", texts(60))
    counts = [len(prompt) for prompt in prompts]
    assert found.mean == pytest.approx(mean(counts))
    assert found.p95 == pytest.approx(quantiles(counts, n=20, method="inclusive")[-1])
    assert found.prefix_share == pytest.approx(prompts[0].index("good film number 0") / mean(counts))
    assert 0.5 < found.prefix_share < 1 and found.mean < found.p95 <= max(counts)


def test_lengths_by_several_encoders(tmp_path):
    sst2(tmp_path, 8)
    found = lengths(TASKS["sst2"], str(tmp_path), [encoder(), encoder(5), encoder(10**6)])
    prompts = prompts_of("sst2", texts(8))
    assert [one.mean for one in found] == [
        pytest.approx(mean(len(prompt) for prompt in prompts)),
        pytest.approx(mean(-(-len(prompt) // 5) for prompt in prompts)),
        1,
    ]
    # prompts of one token share nothing
    assert found[2].prefix_share == 0 and found[2].p95 == 1
    shared = prompts[0].index("good film number 0") // 5
    assert found[1].prefix_share == pytest.approx(shared / found[1].mean)
    assert lengths(TASKS["sst2"], str(tmp_path), []) == []


def test_lengths_are_over_evenly_spaced_rows(tmp_path):
    """Every third of 1500 rows is sampled, and only those are long."""
    assert SAMPLE == 500

    def repeat(i):
        return 40 if i % 3 == 0 else i % 2

    sst2(tmp_path, 1500, repeat)
    [found] = lengths(TASKS["sst2"], str(tmp_path), [encoder()])
    counts = [len(prompt) for prompt in prompts_of("sst2", texts(1500, repeat)[::3])]
    assert len(counts) == 500
    assert found.mean == pytest.approx(mean(counts))
    assert found.p95 == pytest.approx(quantiles(counts, n=20, method="inclusive")[-1])


def test_one_row_has_no_shared_prefix(tmp_path):
    sst2(tmp_path, 1)
    [found] = lengths(TASKS["sst2"], str(tmp_path), [encoder()])
    [prompt] = prompts_of("sst2", texts(1))
    assert (found.mean, found.p95, found.prefix_share) == (len(prompt), len(prompt), 0)


def test_lengths_are_of_the_training_split_or_the_first_that_exists(tmp_path):
    assert lengths(TASKS["sst2"], str(tmp_path), [encoder()]) is None
    for length, name, text in (
        (1, "test", "index\tsentence\n0\tx\n"),
        (2, "dev", "sentence\tlabel\nxx\t1\n"),
        (3, "train", "sentence\tlabel\nxxx\t0\n"),
    ):
        put(tmp_path, f"SST-2/{name}.tsv", text)
        [found] = lengths(TASKS["sst2"], str(tmp_path), [encoder()])
        assert found.mean == len(prompts_of("sst2", ["x" * length])[0])


def test_lengths_of_an_invalid_file(tmp_path):
    put(tmp_path, "SST-2/train.tsv", "sentence\tlabel\ngood\t5\n")
    with pytest.raises(UserError, match=r"train\.tsv, line 2"):
        lengths(TASKS["sst2"], str(tmp_path), [encoder()])


# ----------------------------------------------------------------------------------------------------- the real files


@pytest.mark.parametrize(
    "task, rows",
    [
        ("wnli", [("train", 635), ("validation", 71), ("test", 146)]),
        ("cb", [("train", 250), ("validation", 56), ("test", 250)]),
        ("axb", [("test", 1104)]),
        ("ax", [("test", 1104)]),
        ("mrpc", []),
    ],
)
def test_survey_of_real_files(data_root, task, rows):
    found = survey(TASKS[task], str(data_root))
    assert [(part.split, part.rows) for part in found] == rows
    assert all(part.problems == [] for part in found)
    for part in found:
        labelled = part.split != "test" or task == "axb"
        assert sum(part.labels.values()) == (part.rows if labelled else 0)


def test_lengths_of_real_files(data_root):
    [found] = lengths(TASKS["cb"], str(data_root), [encoder()])
    examples = load_examples(TASKS["cb"], "train", str(data_root))
    counts = [len(prompt_text(TASKS["cb"], example.fields)) for example in examples]
    assert found.mean == pytest.approx(mean(counts))
    assert found.p95 == pytest.approx(quantiles(counts, n=20, method="inclusive")[-1])
