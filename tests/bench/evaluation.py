"""Evaluation speed: this project's sampler against `model.generate` of transformers.

    python tests/bench/evaluation.py --data path/to/folder/with/glue/and/superglue

Both answer the same rows of the development set in batches of the same size, sampled at temperature 1, up to 32 tokens,
ended by the closing tag. An untrained model mostly writes all 32; `--steps` first trains an adapter by SFT, whose
answers end after a few tokens.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jobs import JOBS, RECIPE, make_models, overrides_of
from worker import Worker, serve

HERE = Path(__file__).parent


def load_ours(job: dict[str, Any]) -> Callable[[int], dict[str, Any]]:
    from extensions.common.environment import prepare_environment
    from extensions.evaluation.answers import answer_batch, in_batches
    from extensions.recipe import load_recipe
    from extensions.runs.build import prepare

    prepare_environment()
    recipe = load_recipe(RECIPE, job["overrides"], "eval")
    evaluation = prepare(recipe)
    encoder, sampler, settings = evaluation.evaluator.encoder, evaluation.evaluator.sampler, recipe.evaluation

    def iterate(step: int) -> dict[str, Any]:
        start = time.perf_counter()
        answers = [
            answer
            for batch in in_batches(evaluation.data.table, settings.batch_size)
            for answer in answer_batch(batch, encoder, sampler, recipe.rollout.max_new_tokens, step, "sample")
        ]
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "rows": len(answers), "right_format": sum(a.answer is not None for a in answers)}

    return iterate


def load_generate(job: dict[str, Any]) -> Callable[[int], dict[str, Any]]:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from extensions.data.splits import RunData
    from extensions.model.loading import load_tokenizer, prompt_limit
    from extensions.prompts import CLOSE, PromptEncoder, parse_answer
    from extensions.recipe import load_recipe

    recipe = load_recipe(RECIPE, job["overrides"], "eval")
    data, tokenizer = RunData.load(recipe, print), load_tokenizer(recipe.model)
    tokenizer.padding_side, tokenizer.pad_token = "left", tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(recipe.model.path, dtype=getattr(torch, job["dtype"])).eval()
    limit = prompt_limit(recipe, model.config)
    if recipe.model.adapter:
        model = PeftModel.from_pretrained(model, recipe.model.adapter).eval()
    encoder = PromptEncoder(tokenizer, limit, False, recipe.prompt.shots, data.demonstrations)
    size, task = recipe.evaluation.batch_size, recipe.data.tasks[0]

    @torch.no_grad()
    def iterate(step: int) -> dict[str, Any]:
        torch.manual_seed(step)
        start, right = time.perf_counter(), 0
        for first in range(0, len(data.table), size):
            rows = data.table[first : first + size]
            ids = [encoder.encode(task, row.fields)[0] for row in rows]
            batch = tokenizer.pad({"input_ids": ids}, return_tensors="pt")
            written = model.generate(
                **batch,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=recipe.rollout.max_new_tokens,
                stop_strings=[CLOSE],
                tokenizer=tokenizer,
            )[:, batch["input_ids"].shape[1] :]
            texts = tokenizer.batch_decode(written, skip_special_tokens=True)
            right += sum(parse_answer(text, task) is not None for text in texts)
        return {"seconds": time.perf_counter() - start, "rows": len(data.table), "right_format": right}

    return iterate


def train_adapter(overrides: list[str], steps: int, threads: int, folder: Path) -> str:
    """An adapter by a short SFT, so that answers have the right form."""
    job = {"recipe": str(RECIPE), "overrides": [*overrides, "data.max_train_samples=2000"], "method": "sft"}
    worker = Worker("sft", [sys.executable, str(HERE / "ours.py")], job | {"save": str(folder)}, folder, threads)
    for step in range(steps):
        worker.iterate(step)
    worker.close()
    return str(folder / "adapter")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with glue/ and superglue/")
    parser.add_argument("--jobs", default="cola,few-shot,boolq", help="of: " + ",".join(JOBS))
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--samples", type=int, default=256, help="rows to answer")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12, help="SFT steps before; 0: the model as it is")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--folder", type=Path, default=Path("runs/bench"))
    args = parser.parse_args()
    make_models(args.folder / "models")
    print("| job | dtype | rows/s here | rows/s generate | ratio (min - max) | right format here, generate |")
    print("|---|---|---|---|---|---|")
    for name in args.jobs.split(","):
        for dtype in args.dtypes.split(","):
            folder = args.folder / f"eval-{name}-{dtype}"
            folder.mkdir(parents=True, exist_ok=True)
            overrides = overrides_of(JOBS[name], args.folder / "models", args.data, dtype, folder / "runs", 16)
            overrides += [
                f"evaluation.max_samples={args.samples}",
                f"evaluation.batch_size={args.batch_size}",
                "rollout.response_budget=[12, 32]",
            ]
            if args.steps:
                adapter = train_adapter([*overrides, "optimizer.lr=1e-3"], args.steps, args.threads, folder)
                overrides.append(f"model.adapter={adapter}")
            job = {"overrides": overrides, "dtype": dtype}
            workers = [
                Worker(who, [sys.executable, __file__, who], job, folder, args.threads) for who in ("ours", "generate")
            ]
            seconds: dict[str, list[float]] = {worker.name: [] for worker in workers}
            last: dict[str, dict[str, Any]] = {}
            for step in range(args.rounds + 1):
                for worker in workers:
                    last[worker.name] = worker.iterate(step)
                    if step:
                        seconds[worker.name].append(last[worker.name]["seconds"])
            for worker in workers:
                worker.close()
            ratios = sorted(b / a for a, b in zip(seconds["ours"], seconds["generate"], strict=True))
            rates = [last[who]["rows"] / statistics.median(seconds[who]) for who in ("ours", "generate")]
            formats = [last[who]["right_format"] for who in ("ours", "generate")]
            print(
                f"| {name} | {dtype} | {rates[0]:.2f} | {rates[1]:.2f} | {statistics.median(ratios):.2f} "
                f"({ratios[0]:.2f} - {ratios[-1]:.2f}) | {formats[0]}, {formats[1]} of {last['ours']['rows']} |",
                flush=True,
            )


if __name__ == "__main__":
    loaders = {"ours": load_ours, "generate": load_generate}
    if len(sys.argv) == 3 and sys.argv[1] in loaders:
        serve(loaders[sys.argv.pop(1)])
    else:
        main()
