"""Rewards of section 4.3 against hand-computed values, users' reward files, and OpenRLHF's contract."""

import math

import pytest
import torch

from extensions.common.errors import UserError
from extensions.data import Example
from extensions.prompts import CLOSE, OPEN, pack_label, prompt_text, unpack_label
from extensions.rollout.rewards import BUILT_IN, load_reward
from extensions.tasks import TASKS, Task
from reward_fns.nlu import reward, reward_func, score

COLA, SST2, RTE, STSB = (TASKS[name] for name in ("cola", "sst2", "rte", "stsb"))
MNLI, COPA, MULTIRC, BOOLQ = (TASKS[name] for name in ("mnli", "copa", "multirc", "boolq"))
OWN = Task.model_validate(
    {
        "name": "topic",
        "description": "Name the topic.",
        "question": "{text}",
        "labels": {"w": ["World", "abroad"], "s": ["Sports"], "no": ["No ‘topic’"]},
    }
)
OWN_SCORE = Task.model_validate(
    {
        "name": "rating",
        "description": "Rate it.",
        "question": "{text}",
        "score_range": [1.0, 9.0],
        "metrics": ["pearson"],
    }
)

# Section 4.3: classification 1, 0, -1; STS-B 2.5 - |answer - gold|, -2.5 for a wrong format.
GOLDEN = [
    (COLA, "1", "Yes", 1.0),
    (COLA, "1", "acceptable", 1.0),
    (COLA, "0", "not acceptable", 1.0),
    (COLA, "1", "No", 0.0),
    (COLA, "0", "Yes", 0.0),
    (COLA, "0", "Maybe", -1.0),
    (COLA, "0", "", -1.0),
    (COLA, "1", "Yes or No", -1.0),
    (SST2, "0", "Negative", 1.0),
    (SST2, "0", "Positive", 0.0),
    (SST2, "1", "Yes", -1.0),
    (RTE, "not_entailment", "No", 1.0),
    (RTE, "entailment", "No", 0.0),
    (RTE, "entailment", "unclear", -1.0),
    (RTE, "not_entailment", "not entailment", 1.0),
    (MNLI, "neutral", "Neutral.", 1.0),
    (MNLI, "neutral", "contradiction", 0.0),
    (MNLI, "contradiction", "not entailment", -1.0),
    (COPA, "1", "the second", 1.0),
    (COPA, "1", "First", 0.0),
    (COPA, "0", "not the second", -1.0),
    (MULTIRC, "1", "True", 1.0),
    (MULTIRC, "1", "False", 0.0),
    (BOOLQ, "false", "No", 1.0),
    (BOOLQ, "false", "false", -1.0),
    (STSB, "3.8", "3.8", 2.5),
    (STSB, "3.8", "5.0", 1.3),
    (STSB, "3.800", "2.3", 1.0),
    (STSB, "0.0", "2.5", 0.0),
    (STSB, "0.0", "5", -2.5),
    (STSB, "5.000", "0.25", -2.25),
    (STSB, "5.0", "5.1", -2.5),
    (STSB, "5.0", "five", -2.5),
    (OWN, "w", "abroad", 1.0),
    (OWN, "s", "World", 0.0),
    (OWN, "s", "Politics", -1.0),
    (OWN_SCORE, "9", "9", 4.0),  # half the width of the range, as 2.5 is for STS-B
    (OWN_SCORE, "9", "2", -3.0),
    (OWN_SCORE, "9", "0", -4.0),
]


@pytest.mark.parametrize("task, gold, answer, expected", GOLDEN, ids=lambda x: x.name if isinstance(x, Task) else None)
def test_golden_rewards(task, gold, answer, expected):
    assert reward(f"{answer}{CLOSE}", pack_label(task, gold)) == pytest.approx(expected, abs=1e-12)


# Written here and not taken from the tasks: (label, answer) pairs.
ANSWERS = {
    **dict.fromkeys(["acceptability", "cola", "qqp", "mrpc", "wnli"], (("1", "Yes"), ("0", "No"))),
    **dict.fromkeys(["boolq", "record", "wic", "wsc"], (("true", "Yes"), ("false", "No"))),
    **dict.fromkeys(["rte", "superglue_rte", "axb", "axg", "qnli"], (("entailment", "Yes"), ("not_entailment", "No"))),
    **dict.fromkeys(["mnli", "mnli_mm", "ax", "cb"], tuple((w, w) for w in ("entailment", "neutral", "contradiction"))),
    **dict.fromkeys(["reviews", "sst2"], (("1", "Positive"), ("0", "Negative"))),
    "copa": (("0", "First"), ("1", "Second")),
    "multirc": (("1", "True"), ("0", "False")),
    "stsb": (("0.000", "0.0"), ("1.250", "1.25"), ("5", "5.0")),
}
GARBAGE = ["", " ", "Maybe", "I do not know", "{answer}", "\0", "9", "-1", "nan", "<b>", "日本", "x" * 10_000]
EVERY_TASK = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)


def worth(task, gold, answer_of):
    """The reward of section 4.3 for a well-formed answer."""
    return 2.5 - abs(float(answer_of) - float(gold)) if task is STSB else float(gold == answer_of)


@EVERY_TASK
def test_rewards_of_every_task(task):
    answers = ANSWERS[task.name]
    assert task.is_regression or {label for label, _ in answers} == set(task.labels)
    lowest = -2.5 if task is STSB else -1.0
    for gold, _ in answers:
        packed = pack_label(task, gold)
        for label, word in answers:
            expected = pytest.approx(worth(task, gold, label), abs=1e-12)
            for written in (word, f" {word}\n", f"{word.upper()}.", f'"{word.lower()}"'):
                assert reward(f"{written}{CLOSE}", packed) == expected
                assert reward(f"{written}{CLOSE} {answers[0][1]}", packed) == expected
                assert reward(written, packed) == reward(f"{OPEN}{written}{CLOSE}", packed) == lowest
            assert score(float(label) if task is STSB else label, gold, task) == expected
        for garbage in GARBAGE:
            assert reward(f"{garbage}{CLOSE}", packed) == reward(garbage, packed) == lowest
        both = f"{answers[0][1]} or {answers[1][1]}"
        assert reward(f"{both}{CLOSE}", packed) == score(None, gold, task) == lowest


@pytest.mark.parametrize("gold", ["0.000", "0.6", "2.5", "3.333", "5.000", "5"])
def test_rewards_of_scores_fall_with_the_distance(gold):
    values = [reward(f"{tenths / 10}{CLOSE}", pack_label(STSB, gold)) for tenths in range(51)]
    assert values == pytest.approx([2.5 - abs(tenths / 10 - float(gold)) for tenths in range(51)], abs=1e-12)
    assert min(values) >= -2.5 and max(values) <= 2.5


@pytest.mark.parametrize("task", [*TASKS.values(), OWN, OWN_SCORE], ids=lambda task: task.name)
def test_packed_labels_round_trip(task):
    for gold in list(task.labels) or ["1.25", "3.000"]:
        packed = pack_label(task, gold)
        assert isinstance(packed, str)
        back, label = unpack_label(packed)
        assert label == gold
        assert (back.name, back.labels, back.score_range) == (task.name, task.labels, task.score_range)
        assert reward(f"{task.answer(gold)}{CLOSE}", packed) == (
            1.0 if task.labels else pytest.approx(score(float(task.answer(gold)), gold, task))
        )


def test_a_users_task_named_like_a_built_in_one_keeps_its_labels():
    task = OWN.model_copy(update={"name": "cola"})
    assert reward(f"Sports{CLOSE}", pack_label(task, "s")) == 1.0
    assert reward(f"Yes{CLOSE}", pack_label(task, "s")) == -1.0


@pytest.mark.parametrize(
    "packed",
    [
        *("", "1", "[]", "null", "{}", '{"task": "nothing", "gold": "1"}', '{"task": "cola"}', "[" * 5000),
        *('{"task": "cola", "gold": 1}', '{"task": "cola", "gold": "Yes"}', '{"task": ["cola"], "gold": "1"}'),
        *('{"task": "stsb", "gold": "nan"}', '{"task": "stsb", "gold": "6"}', '{"task": "stsb", "gold": "1e-4002"}'),
        *('{"task": "stsb", "gold": "~3"}', '{"task": "own", "gold": "1", "score_range": [0, Infinity]}'),
    ],
)
def test_labels_not_made_by_pack_label_are_refused(packed):
    with pytest.raises(ValueError, match="pack_label"):
        reward(f"Yes{CLOSE}", packed)


# ------------------------------------------------------------------------------------------ OpenRLHF's contract

ROWS = [(task, gold, answer, value) for task, gold, answer, value in GOLDEN]


def prompt_of(task):
    return prompt_text(task, dict.fromkeys(task.fields, "Anna {slept}."))


EVERY_ROW = [  # one batch of all tasks: right, wrong, no answer, no tag
    (task, gold, text, value)
    for task in TASKS.values()
    for gold, _ in ANSWERS[task.name]
    for text, value in [
        *((f"{word}{CLOSE}", worth(task, gold, label)) for label, word in ANSWERS[task.name]),
        *((text, -2.5 if task is STSB else -1.0) for text in (f"Maybe{CLOSE}", ANSWERS[task.name][0][1])),
    ]
]


def check_contract(rows):
    prompts = [prompt_of(task) for task, *_ in rows]
    queries = [prompt + text for prompt, (_, _, text, _) in zip(prompts, rows, strict=True)]
    result = reward_func(queries, prompts, [pack_label(task, gold) for task, gold, *_ in rows])
    assert set(result) == {"rewards", "scores", "extra_logs"}
    assert set(result["extra_logs"]) == {"format_error_rate"}
    for tensor in (result["rewards"], result["scores"], result["extra_logs"]["format_error_rate"]):
        assert tensor.shape == (len(rows),) and tensor.dtype == torch.float32
    assert result["rewards"].tolist() == pytest.approx([value for *_, value in rows], abs=1e-6)
    scores = [max(0.0, value / (2.5 if task is STSB else 1.0)) for task, *_, value in rows]
    assert result["scores"].tolist() == pytest.approx(scores, abs=1e-6)
    errors = [float("Maybe" in text or CLOSE not in text) for *_, text, _ in rows]
    assert result["extra_logs"]["format_error_rate"].tolist() == errors


@EVERY_TASK
def test_contract_of_every_task(task):
    rows = [row for row in EVERY_ROW if row[0] is task]
    assert len(rows) >= 8
    check_contract(rows)
    for row in rows:
        check_contract([row])


def test_contract_of_a_batch_of_all_tasks():
    check_contract(EVERY_ROW)
    check_contract(EVERY_ROW[::-1])
    check_contract([])


def test_reward_func_of_a_batch():
    prompts = [prompt_of(task) for task, *_ in ROWS]
    queries = [f"{prompt}{answer}{CLOSE}" for prompt, (*_, answer, _) in zip(prompts, ROWS, strict=True)]
    result = reward_func(queries, prompts, [pack_label(task, gold) for task, gold, *_ in ROWS])
    assert result["rewards"].shape == result["scores"].shape == (len(ROWS),)
    assert result["rewards"].dtype == result["scores"].dtype == torch.float32
    torch.testing.assert_close(result["rewards"], torch.tensor([value for *_, value in ROWS]))
    assert ((result["scores"] >= 0) & (result["scores"] <= 1)).all()
    for logged in result["extra_logs"].values():
        assert logged.shape == (len(ROWS),) and logged.dtype == torch.float32
    wrong_format = {"Maybe", "", "Yes or No", "unclear", "not the second", "false", "5.1", "five", "Politics"}
    of_some = [(SST2, "Yes"), (MNLI, "not entailment"), (OWN_SCORE, "0")]
    expected = [float(answer in wrong_format or (task, answer) in of_some) for task, _, answer, _ in ROWS]
    assert result["extra_logs"]["format_error_rate"].tolist() == expected
    for k, (task, gold, answer, value) in enumerate(ROWS):
        if task.labels:
            assert result["scores"][k] == max(0.0, value)
        assert result["rewards"][k] == pytest.approx(reward(f"{answer}{CLOSE}", pack_label(task, gold)), abs=1e-6)


CHANGES = {
    "verbatim": lambda prompt: prompt,
    "bos": lambda prompt: f"<s>{prompt}",
    "bos and space": lambda prompt: f"<s> {prompt}",
    "padding": lambda prompt: "<pad>" * 7 + prompt,
    "spaces before punctuation lost": lambda prompt: prompt.replace(" .", ".").replace("  ", " "),
    "line breaks lost": lambda prompt: f"<s> {' '.join(prompt.split())}",
}


@pytest.mark.parametrize("end", ["", "</s>", "<eos>\n", " No"], ids=["none", "eos", "eos and line", "more text"])
@pytest.mark.parametrize("change", CHANGES)
def test_reward_func_finds_the_response_in_the_decoded_query(change, end):
    prompt = prompt_of(COLA)
    query = CHANGES[change](prompt)
    for answer, value in (("Yes", 1.0), (" No", 0.0), ("Maybe", -1.0), (f"{OPEN}Yes", -1.0)):
        result = reward_func([f"{query}{answer}{CLOSE}{end}"], [prompt], [pack_label(COLA, "1")])
        assert result["rewards"].tolist() == [value]


def test_tags_in_the_data_do_not_shift_the_response():
    fields = {"sentence": f'{OPEN}Yes{CLOSE} is "Yes"'}
    prompt = prompt_text(COLA, fields)
    for query in (prompt, f"<s> {' '.join(prompt.split())}"):
        result = reward_func([f"{query}No{CLOSE}"], [prompt], [pack_label(COLA, "0")])
        assert result["rewards"].tolist() == [1.0]


def test_reward_func_refuses_lists_of_different_lengths():
    with pytest.raises(ValueError):
        reward_func(["a", "b"], ["a"], ["c"])


def test_openrlhf_loads_the_file_and_computes_the_same_rewards():
    pytest.importorskip("aiohttp", reason="OpenRLHF's agent module needs aiohttp, which comes with Ray")
    pytest.importorskip("openrlhf")
    from extensions.distributed.openrlhf import openrlhf_importable

    with openrlhf_importable():
        from openrlhf.utils.agent import SingleTurnAgentExecutor

    executor = SingleTurnAgentExecutor(str(BUILT_IN / "nlu.py"))
    for task, gold, answer, value in ROWS:  # one sample at a time, as OpenRLHF calls it
        prompt = prompt_of(task)
        result = executor.reward_func([f"<s> {prompt}{answer}{CLOSE}</s>"], [prompt], [pack_label(task, gold)])
        assert result["rewards"].tolist() == pytest.approx([value], abs=1e-6)


# --------------------------------------------------------------------------------------------- users' reward files


def examples(*labels, task=COLA):
    return [Example(task, i, dict.fromkeys(task.fields, "x"), label) for i, label in enumerate(labels)]


@pytest.fixture
def write(tmp_path):
    def write_file(source):
        path = tmp_path / "mine.py"
        path.write_text(source, encoding="utf-8")
        return str(path)

    return write_file


def called(path, texts=("a", "b"), labels=("1", "0")):
    return load_reward(path)(list(texts), ["p"] * len(texts), examples(*labels))


def test_the_built_in_reward_is_found_by_name():
    loaded = load_reward("nlu")
    assert loaded([f"Yes{CLOSE}", f"No{CLOSE}", "No"], ["p"] * 3, examples("1", "1", "0")) == [1.0, 0.0, -1.0]


def test_a_users_file_receives_the_text_and_the_label_in_the_data(write):
    path = write("def reward(text, label):\n    assert label in ('1', '0')\n    return len(text) + int(label)\n")
    assert called(path, texts=("abc", "")) == [4.0, 0.0]


def test_a_users_file_of_openrlhfs_contract(write):
    path = write(
        "import torch\n"
        "def reward_func(queries, prompts, labels):\n"
        "    assert queries == ['pa', 'pb'] and prompts == ['p', 'p'] and labels == ['1', '0']\n"
        "    return {'rewards': torch.tensor([0.5, -2.0])}\n"
    )
    assert called(path) == [0.5, -2.0]


@pytest.mark.parametrize(
    "returned",
    [
        "1",
        "True",
        "0.5",
        "np.float32(1)",
        "np.int64(3)",
        "np.array(2.0)",
        "torch.tensor(1.0)",
        "fractions.Fraction(1, 2)",
    ],
)
def test_numbers_of_every_type_are_accepted(write, returned):
    path = write(
        f"import fractions\nimport numpy as np\nimport torch\ndef reward(text, label):\n    return {returned}\n"
    )
    values = called(path)
    assert all(type(value) is float and math.isfinite(value) for value in values)


@pytest.mark.parametrize(
    "returned",
    [
        *("None", "'1'", "float('nan')", "float('inf')", "-float('inf')", "[1.0]", "{'rewards': 1}", "1j"),
        *("np.array([1.0])", "torch.tensor([1.0])", "torch.tensor(float('nan'))", "text", "(1.0, 2.0)"),
    ],
)
def test_an_error_names_a_value_that_is_not_one_finite_number(write, returned):
    path = write(f"import numpy as np\nimport torch\ndef reward(text, label):\n    return {returned}\n")
    with pytest.raises(UserError, match=r"reward function reward of .*mine\.py returned") as caught:
        called(path, texts=("the response",), labels=("1",))
    assert "'the response'" in str(caught.value) and "label '1'" in str(caught.value)


def test_an_error_names_a_reward_that_raises_and_its_sample(write):
    path = write("def reward(text, label):\n    return {'0': 1.0}[label]\n")
    with pytest.raises(UserError, match=r"reward function reward of .*mine\.py raised KeyError: '1'") as caught:
        called(path, texts=("first", "second"), labels=("0", "1"))
    assert "'second'" in str(caught.value) and "label '1'" in str(caught.value)
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize(
    "body, message",
    [
        ("return {'rewards': [1.0]}", r"returned 1 rewards for 2 samples"),
        ("return {'rewards': [1.0, 2.0, 3.0]}", r"returned 3 rewards for 2 samples"),
        ("return {'rewards': [1.0, float('nan')]}", r"returned nan .*\n.*'b' with label '0'"),
        ("return {'rewards': [1.0, None]}", r"returned None \(NoneType\)"),
        ("return {'rewards': [[1.0], [2.0]]}", r"returned \[1\.0\] \(list\)"),
        ("return {'scores': [1.0, 2.0]}", r"KeyError: 'rewards'"),
        ("return [1.0, 2.0]", r"failed on a batch of 2 samples: TypeError"),
        ("return None", r"failed on a batch of 2 samples: TypeError"),
        ("raise OSError('no network')", r"failed on a batch of 2 samples: OSError: no network"),
    ],
)
def test_errors_of_a_batch_name_the_reward(write, body, message):
    with pytest.raises(UserError, match=message) as caught:
        called(write(f"def reward_func(queries, prompts, labels):\n    {body}\n"))
    assert "reward_func of" in str(caught.value)


@pytest.mark.parametrize(
    "source, message",
    [
        ("def reward(text):\n    return 1.0\n", r"reward cannot be called with 2 arguments"),
        ("def reward(text, label, more):\n    return 1.0\n", r"reward cannot be called with 2 arguments"),
        ("def reward(*, text, label):\n    return 1.0\n", r"reward cannot be called with 2 arguments"),
        ("def reward_func(queries, labels):\n    return {}\n", r"reward_func cannot be called with 3 arguments"),
        ("reward = 3\n", r"neither reward\(text, label\) nor reward_func"),
        ("x = 1\n", r"neither reward\(text, label\) nor reward_func"),
        ("", r"neither reward\(text, label\) nor reward_func"),
        ("import no_such_package_at_all\n", r"cannot be imported: ModuleNotFoundError: .*no_such_package_at_all"),
        ("def reward(:\n", r"cannot be imported: SyntaxError"),
        ("1 / 0\n", r"cannot be imported: ZeroDivisionError"),
    ],
)
def test_faulty_files_are_refused_on_loading(write, source, message):
    with pytest.raises(UserError, match=message):
        load_reward(write(source))


@pytest.mark.parametrize("name", ["nope", "no/such/file.py", "", "tests", "__init__", "nlu.py", "\0.py"])
def test_missing_files_are_refused(name):
    with pytest.raises(UserError, match=r"reward: .*neither a file of reward_fns/ \(.*nlu.*\) nor .*\.py file"):
        load_reward(name)


def test_a_folder_is_refused(tmp_path):
    (tmp_path / "folder.py").mkdir()
    with pytest.raises(UserError, match="neither a file"):
        load_reward(str(tmp_path / "folder.py"))


@pytest.mark.parametrize(
    "source, raises",
    [
        pytest.param(
            "from __future__ import annotations\nfrom dataclasses import dataclass\n"
            "@dataclass\nclass Weights:\n    right: float = 1.0\n"
            "def reward(text, label):\n    return Weights().right\n",
            None,
            id="dataclass",
        ),
        pytest.param(
            "import functools\ndef f(scale, text, label):\n    return 1 / 0\nreward = functools.partial(f, 2)\n",
            "ZeroDivisionError",
            id="partial",
        ),
        pytest.param(
            "class Judge:\n    def __call__(self, text, label):\n        return None\nreward = Judge()\n",
            "returned None",
            id="object",
        ),
        pytest.param(
            "reward = min\n",
            "mine.py",
            id="no signature",
        ),
        pytest.param(
            "import sys\nsys.exit('usage: mine.py')\n",
            "cannot be imported",
            id="exits",
        ),
    ],
)
def test_unusual_files(write, source, raises):
    path = write(source)
    if raises is None:
        assert called(path) == [1.0, 1.0]
    else:
        try:
            called(path)
        except UserError as error:
            assert raises in str(error)
        else:
            pytest.fail("nothing was raised")
