"""Run folders with all that a page shows: answers with probabilities, validations, yardsticks, rollouts, warnings."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
from run_folders import write_run

from extensions.common.files import write_json, write_jsonl
from extensions.evaluation.metrics import Prediction, score_all
from extensions.recipe import load_recipe

HOSTILE = [
    "</script><script>document.title='taken'</script>",
    "<img src=x onerror=\"document.title='taken'\">",
    "quotes \" ' ` and ${markup} &amp; &lt;b&gt;",
    "right to left: \u202eמחיר הכרטיס שגוי\u202c עכשיו",
    "NUL \0 and half a pair \ud83d",
    "line\u2028separator, {{ 7 * 7 }}, {% raw %}, <!-- comment",
]
DETAILS = {
    "own": {
        "name": "tickets",
        "description": "You route tickets.",
        "question": "Subject: {subject}\n  Ticket: {ticket}",
        "labels": ["billing and payments", "technical support", "account access", "legal"],
        "source": {"files": {"train": "train.jsonl", "validation": "validation.jsonl"}},
    },
    "many": {
        "name": "intents",
        "description": "You name the intent.",
        "question": "Request: {text}",
        "labels": [f"intent {i}: a rather long name of a banking request" for i in range(40)],
        "source": {"files": {"train": "train.jsonl", "validation": "validation.jsonl"}},
    },
    "multi": {
        "name": "topics",
        "description": "You list the topics.",
        "question": "Text: {text}",
        "labels": ["price", "quality", "delivery"],
        "multi_label": True,
        "source": {"files": {"train": "train.jsonl", "validation": "validation.jsonl"}},
    },
}
WORDS = ["invoice", "order", "login", "page", "please", "call", "back", "never", "arrived", "since", "monday", "wrong"]


def answers(task, rows, skill, rng, wrong=0.02, texts=(), probabilities=True, never=()):
    """Made-up predictions: right with the chance `skill`, in the right format with the chance 1 - `wrong`."""
    found = []
    for index in range(rows):
        fields = {name: " ".join(rng.choice(WORDS, 14)) for name in task.fields}
        if index < len(texts):
            fields[task.fields[0]] = texts[index]
        if task.is_regression:
            low, high = task.score_range
            gold = round(float(rng.uniform(low, high)), 1)
            answer = float(np.clip(round(gold + rng.normal(0, (1 - skill) * (high - low)), 1), low, high))
            given, likelihood, gold = {f"{low:g}": 0.25, f"{high:g}": 0.75}, answer, str(gold)
        elif task.multi_label:
            gold = task.join_labels([label for label in task.labels if rng.random() < 0.4])
            given = {x: float(np.clip(rng.normal(0.8 if x in gold else 0.2, 1 - skill), 0, 1)) for x in task.labels}
            answer = likelihood = task.join_labels([label for label, p in given.items() if p > 0.5])
        else:
            labels = list(task.labels)
            true = min(int(rng.exponential(len(labels) / 3)), len(labels) - 1)
            logits = rng.normal(0, 1.0, len(labels))
            logits[true] += 4 * skill
            logits[[labels.index(label) for label in never]] = -9
            p = np.exp(logits) / np.exp(logits).sum()
            given, gold = dict(zip(labels, p.tolist(), strict=True)), labels[true]
            likelihood = labels[int(p.argmax())]
            answer = labels[int(rng.choice(len(labels), p=p))]
        answer = None if rng.random() < wrong else answer
        response = "I think so" if answer is None else f" {task.answer(str(answer))} </Judgement>"
        if not probabilities:
            given = likelihood = None
        found.append((Prediction(task.name, index, response, answer, gold, {}, None, given, likelihood), fields))
    return found


def lines_of(found):
    return [asdict(prediction) | {"fields": fields} for prediction, fields in found]


def page_run(
    folder,
    tasks,
    method="ppo",
    rows=200,
    before=0.1,
    after=0.7,
    steps=30,
    seed=0,
    finished=True,
    texts=(),
    never=(),
    probabilities=True,
    yardsticks=True,
    **sections,
):
    """A run folder with every record. tasks: names, or entries of a recipe. before=None: no evaluation before."""
    names = [task if isinstance(task, str) else task["name"] for task in tasks]
    write_run(folder, method, {}, tasks=tasks, **sections)
    known = load_recipe(folder / "recipe.yaml").data.tasks
    rng = np.random.default_rng(seed)
    trained = method != "eval"

    def made(skill, wrong=0.02, count=rows, intervals=True, **keys):
        keys = {"probabilities": probabilities, "never": never} | keys
        found = [one for t in known for one in answers(t, count, skill, rng, wrong, **({"texts": texts} | keys))]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("extensions.evaluation.bootstrap.RESAMPLES", 20)  # cheap intervals
            return found, score_all(known, [prediction for prediction, _ in found], intervals)

    scores = {"method": method, "decoding": "sample", "split": "validation", "splits": dict.fromkeys(names, "test")}
    if before is not None and trained:
        found, scores["before"] = made(before, 0.3)
        write_jsonl_raw(folder / "predictions_before.jsonl", lines_of(found))
    ks = range(1, steps + 1) if trained else ()
    growth = [after + ((before or 0) - after) * float(np.exp(-k / 6)) for k in range(steps + 1)]
    metrics, validations, rollouts = [], [], []
    followed = made(0.5, count=4)[0]
    for k in ks:
        place = {"step": k, "samples": 16 * k, "elapsed_s": 11.0 * k, "samples_per_s": 1.5}
        place |= {"seconds": {"rollout": 3.0, "reward": 0.001, "reference": 1.0, "update": 7.0}}
        noise = float(rng.normal(0, 0.08))
        if method == "ppo":
            shares = {}
            for t in [t for t in known if not t.is_regression]:
                prefix = f"{t.name}: " if len(known) > 1 else ""
                weights = rng.dirichlet([8.0] * len(t.labels))
                shares |= {f"{prefix}{t.answer(x)}": float(w) for x, w in zip(t.labels, weights, strict=True)}
            place |= {
                "reward_mean": 2 * growth[k] - 1 + noise,
                "reward_by_task": {name: 2 * growth[k] - 1 + float(rng.normal(0, 0.1)) for name in names},
                "accuracy": min(1.0, growth[k] + noise / 2 + 0.1),
                "format_error_rate": max(0.0, 0.5 * float(np.exp(-k / 4)) + noise / 9),
                "predicted_shares": shares,
                "kl": 0.2 * k + noise,
                "entropy": 2 - 1.8 * k / steps + noise / 3,
                "policy_loss": noise / 10,
                "value_loss": 0.5 * float(np.exp(-k / 9)),
                "lr": 3e-4 * (1 - k / steps),
                "grad_norm": 1 + noise,
            }
        else:
            loss = 2 * float(np.exp(-k / 8)) + abs(noise)
            place |= {"loss": loss, "answer_loss": loss / 2, "lr": 1e-4, "grad_norm": 1 + noise}
        metrics.append(place)
        if method == "ppo":
            one, fields = followed[k % len(followed)]
            record = {
                "step": k,
                "task": one.task,
                "index": one.index,
                "prompt": f"<|im_start|>system\nYou judge.  \n{fields}",
            }
            rollouts.append(record | {"response": one.response, "answer": one.answer, "gold": one.gold, "reward": 0.5})
        if k % 5 == 0:
            result = made(growth[k], count=60, intervals=False)[1]
            mean = sum(r["score"] for r in result.values()) / len(result)
            record = {"step": k, "samples": 16 * k, "seconds": 11.0 * k, "mean": mean, "tasks": result}
            record["likelihood_mean"] = min(1.0, mean + 0.08) if probabilities else None
            record["answers"] = [
                {key: asdict(p)[key] for key in ("task", "index", "response", "answer", "gold", "probabilities")}
                | {"fields": fields}
                for p, fields in (
                    (replace(p, answer=p.gold, response=f" {k // 10} </Judgement>") if k > 10 + i else p, f)
                    for i, (p, f) in enumerate(followed)
                )
            ]
            validations.append(record)
    if finished:
        found, scores["after"] = made(after)
        write_jsonl_raw(folder / "predictions_after.jsonl", lines_of(found))
        if trained:
            training = {"tasks": names, "steps": steps, "samples": 16 * steps, "seconds": 11.0 * steps}
            scores["training"] = training | {"started_from": None}
        if yardsticks:
            scores["yardsticks"] = {
                kind: {
                    n: r | {"train_rows": 600, "seconds": 0.4}
                    for n, r in made(skill, 0, probabilities=False)[1].items()
                }
                for kind, skill in (("majority", 0.0), ("tfidf", 0.65))
            }
    for name, lines in (("metrics", metrics), ("validation", validations), ("rollouts", rollouts)):
        if lines:
            write_jsonl_raw(folder / f"{name}.jsonl", lines)
    write_json(folder / "eval.json", scores) if "after" in scores or "before" in scores else (
        folder / "eval.json"
    ).unlink()
    versions = {"git": "0123456789abcdef", "git_dirty": False, "python": "3.11.7", "packages": {"torch": "2.13.0"}}
    write_json(folder / "versions.json", versions | {"platform": "Linux", "processors": 2, "world_size": 1})
    warning = {"step": 0, "text": "12 of 600 training rows were cut to prompt.max_tokens=512 tokens, the longest by 80"}
    write_jsonl(folder / "warnings.jsonl", [warning, {"step": 12, "text": "legal was never answered for 5 steps"}])
    return folder


def write_jsonl_raw(path, records):
    """JSONL with lone surrogates escaped, which UTF-8 cannot hold."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
