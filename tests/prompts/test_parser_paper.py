"""`parser: paper`: the first keyword or number decides in rewards, recipes and records."""

import json
from types import SimpleNamespace

import pytest
from run_folders import cells_of, result, runs_of, write_run
from support import write_recipe

from extensions.common.errors import UserError
from extensions.data import Example
from extensions.evaluation.metrics import Prediction, score
from extensions.inference.manifest import Manifest
from extensions.prompts import CLOSE, pack_label, parse_answer, unpack_label
from extensions.recipe import dump_recipe, load_recipe
from extensions.reporting.rows import make_rows
from extensions.reporting.supporting_tables import parser_table
from extensions.rollout.rewards import load_reward
from extensions.runs import build
from extensions.tasks import TASKS, Task

COLA, STSB = TASKS["cola"].with_parser("paper"), TASKS["stsb"].with_parser("paper")
OWN = Task.model_validate({"name": "own", "description": "-", "question": "{text}", "labels": ["good", "bad"]})
ANSWERS = [  # task, response, answer by the paper's rule, by the strict one
    (COLA, f"No. The sentence is not linguistically acceptable{CLOSE}", "0", None),
    (COLA, f" Yes </{CLOSE}", "1", None),
    (COLA, f"It is unacceptable{CLOSE}", "0", "0"),
    (COLA, f"not acceptable{CLOSE}", "0", "0"),
    (COLA, f"This isn't acceptable{CLOSE}", "1", None),
    (COLA, f"Nothing{CLOSE}", None, None),
    (COLA, f"Yes or No{CLOSE}", "1", None),
    (COLA, "Yes", None, None),
    (COLA, f"{CLOSE} Yes{CLOSE}", None, None),
    (STSB, f"4.2 out of 5{CLOSE}", 4.2, None),
    (STSB, f"The score is 3.5 (0 to 5){CLOSE}", 3.5, None),
    (STSB, f"-1{CLOSE}", None, None),
    (STSB, f"6 of 5{CLOSE}", None, None),
    (STSB, f"{'9' * 400}{CLOSE}", None, None),
    (STSB, f"about three{CLOSE}", None, None),
    (OWN.with_parser("paper"), f"I think it is good, not bad{CLOSE}", "good", None),
]


@pytest.mark.parametrize(("task", "text", "paper", "strict"), ANSWERS)
def test_the_two_rules(task, text, paper, strict):
    assert parse_answer(text, task) == paper
    assert parse_answer(text, task.with_parser("strict")) == strict


@pytest.mark.parametrize(("task", "gold"), [(COLA, "0"), (STSB, "4.2"), (OWN.with_parser("paper"), "good")])
def test_the_reward_follows_the_parser(task, gold):
    text = {"cola": ANSWERS[0][1], "stsb": ANSWERS[9][1], "own": ANSWERS[-1][1]}[task.name]
    for one, right in ((task, True), (task.with_parser("strict"), False)):
        packed = pack_label(one, gold)
        assert ("parser" in json.loads(packed)) == right
        assert unpack_label(packed)[0].parser == one.parser
        (reward,) = load_reward("nlu")([text], [""], [Example(one, 0, {}, gold)])
        assert (reward > 0) == right
    with pytest.raises(ValueError, match="pack_label"):
        unpack_label(json.dumps({"task": "cola", "gold": "0", "parser": "loose"}))


def test_the_recipe_sets_the_parser_of_all_tasks(tmp_path):
    path = write_recipe(
        tmp_path, "model", parser="paper", data={"tasks": ["cola", OWN.model_dump(exclude_defaults=True)]}
    )
    recipe = load_recipe(path)
    assert [task.parser for task in recipe.data.tasks] == ["paper", "paper"]
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_recipe(recipe))
    assert "cola\n" in copy.read_text() and load_recipe(copy) == recipe
    assert load_recipe(copy, ["parser=strict"]).data.tasks[0] == TASKS["cola"]
    copy.write_text(
        dump_recipe(recipe)
        .replace("parser: paper\n", "")
        .replace(
            "  - cola",
            "  - name: mine\n    description: d\n    question: '{text}'\n    labels: [a, b]\n    parser: paper",
        )
    )
    with pytest.raises(UserError, match="mine: parser is a key of the recipe"):
        load_recipe(copy)


def test_a_manifest_keeps_the_parser():
    assert Manifest.model_fields["tasks"].annotation == list[Task]
    assert Task.model_validate(COLA.model_dump(mode="json")).parser == "paper"


def test_scores_and_report_count_the_answers_judged_differently(tmp_path):
    found = [Prediction("cola", i, text, None, "0") for i, (_, text, *_) in enumerate(ANSWERS[:9])]
    assert score(TASKS["cola"], found)["parsers_differ"] == score(COLA, found)["parsers_differ"] == 4
    counted = result(TASKS["sst2"], 0.6) | {"parsers_differ": 7}
    rows = make_rows(runs_of(write_run(tmp_path / "x", "ppo", {"sst2": counted, "stsb": (0.5,)})))
    (line,) = parser_table(rows).splitlines()[2:]
    assert cells_of(line)[1:] == ["SST-2", "7", "200"]


def test_an_evaluation_by_another_parser_than_the_trainings_warns(tmp_path, monkeypatch):
    (tmp_path / "nlu.json").touch()
    monkeypatch.setattr(build.Manifest, "load", lambda folder: SimpleNamespace(tasks=[COLA]))
    for parser, expected in (("strict", ["was trained with parser: paper"]), ("paper", [])):
        recipe = load_recipe(
            write_recipe(tmp_path, "base", method="eval", parser=parser), [f"model.adapter={tmp_path}"]
        )
        warnings = []
        build.warn_of_another_parser(recipe, warnings.append)
        assert len(warnings) == len(expected) and all(map(str.__contains__, warnings, expected))
