"""Evaluation speed: this project's sampler against `model.generate` of transformers.

    python tests/bench/evaluation.py --data path/to/folder/with/glue/and/superglue

Both answer the same rows of the development set in batches of the same size, sampled at temperature 1, up to 32 tokens,
ended by the closing tag. An untrained model mostly writes all 32; `--steps` first trains an adapter by SFT, whose
answers end after a few tokens.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jobs import JOBS, RECIPE, overrides_of, parse
from worker import Worker, ratio, seconds_of, serve, table, take_turns

HERE = Path(__file__).parent
COLUMNS = ["job", "dtype", "rows/s here", "rows/s generate", "generate / here, s (min - max)", "right format"]
OPTIONS = [
    ("--jobs", {"default": "cola,few-shot,boolq", "help": "of: " + ",".join(JOBS)}),
    ("--dtypes", {"default": "float32,bfloat16"}),
    ("--samples", {"type": int, "default": 256, "help": "rows to answer"}),
    ("--batch-size", {"type": int, "default": 64}),
    ("--rounds", {"type": int, "default": 3}),
    ("--steps", {"type": int, "default": 12, "help": "SFT steps before; 0: the model without an adapter"}),
]


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
    """An adapter by a short SFT, so that answers have the right format."""
    job = {"recipe": str(RECIPE), "overrides": overrides, "method": "sft", "save": str(folder)}
    worker = Worker("sft", [sys.executable, str(HERE / "ours.py")], job, folder, threads)
    for step in range(steps):
        worker.iterate(step)
    worker.close()
    return str(folder / "adapter")


def main() -> None:
    args = parse(__doc__, OPTIONS, jobs="tiny", dtypes="float32", samples=8, batch_size=4, rounds=1, steps=1)
    lines = []
    for name in args.jobs.split(","):
        for dtype in args.dtypes.split(","):
            folder = args.folder / f"eval-{name}-{dtype}"
            folder.mkdir(parents=True, exist_ok=True)
            overrides = overrides_of(JOBS[name], args, dtype, 16)
            overrides += [f"evaluation.max_samples={args.samples}", f"evaluation.batch_size={args.batch_size}"]
            overrides += ["rollout.response_budget=[12, 32]", f"output_dir={folder / 'runs'}"]
            if args.steps:
                adapter = train_adapter([*overrides, "optimizer.lr=1e-3"], args.steps, args.threads, folder)
                overrides.append(f"model.adapter={adapter}")
            job = {"overrides": overrides, "dtype": dtype}
            systems = ("ours", "generate")
            workers = [Worker(who, [sys.executable, __file__, who], job, folder, args.threads) for who in systems]
            found = take_turns(workers, args.rounds)
            seconds = {who: seconds_of(found, who) for who in systems}
            rows = found["ours"][-1]["rows"]
            formats = ", ".join(str(found[who][-1]["right_format"]) for who in systems)
            rates = [f"{rows / statistics.median(seconds[who]):.2f}" for who in systems]
            compared = ratio(seconds["generate"], seconds["ours"])
            lines.append([name, dtype, *rates, compared, f"{formats} of {rows}"])
    print(table(COLUMNS, lines))


if __name__ == "__main__":
    loaders = {"ours": load_ours, "generate": load_generate}
    if len(sys.argv) == 3 and sys.argv[1] in loaders:
        serve(loaders[sys.argv.pop(1)])
    else:
        main()
