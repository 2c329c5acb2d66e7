"""Training speed: PPO here, against TRL's PPOTrainer, against plain Hugging Face SFT, and against the machine.

    python tests/bench/train.py --data path/to/folder/with/glue/and/superglue

All contestants stay loaded and take turns, one iteration each; figures are medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from jobs import BATCHES, BUDGET, JOBS, RECIPE, job_of, make_models, overrides_of, prompts_of
from transformers import AutoConfig
from worker import Worker

from extensions.planner.flops import ModelShape, SampleTokens, ppo_flops
from extensions.prefix.tree import common_prefix
from extensions.recipe import Lora

HERE = Path(__file__).parent
ROWS = 16


def peer_python(folder: Path, given: str | None) -> str:
    """The interpreter of TRL's environment, which is made where there is none."""
    if given:
        return given
    python = folder / "trl" / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder / "trl")], check=True)
    subprocess.run([str(python), "-m", "pip", "install", "-q", "-r", str(HERE / "trl.txt")], check=True)
    return str(python)


def measure(name: str, dtype: str, args: argparse.Namespace, peer: str) -> dict[str, Any]:
    """One job in one precision: all contestants, in turns."""
    job, folder = JOBS[name], args.folder / f"{name}-{dtype}"
    folder.mkdir(parents=True, exist_ok=True)
    overrides = overrides_of(job, args.folder / "models", args.data, dtype, folder / "runs", ROWS)
    prompts = prompts_of(overrides)
    plain = job_of(prompts, args.folder / "models" / job.model, dtype)
    recipe = {"recipe": str(RECIPE), "overrides": overrides}
    own = sys.executable
    contestants = {
        "machine": ([own, str(HERE / "matmul.py")], plain),
        "ours": ([own, str(HERE / "ours.py")], recipe | {"method": "ppo"}),
        "trl": ([peer, str(HERE / "trl_ppo.py")], plain),
        "hf-sft": ([own, str(HERE / "hf_sft.py")], plain),
        "ours-sft": ([own, str(HERE / "ours.py")], recipe | {"method": "sft"}),
    }
    chosen = {key: value for key, value in contestants.items() if key in args.contestants}
    workers = [Worker(key, command, data, folder, args.threads) for key, (command, data) in chosen.items()]
    found: dict[str, list[dict[str, Any]]] = {worker.name: [] for worker in workers}
    for step in range(args.warm_up + args.rounds):
        for worker in workers:
            result = worker.iterate(step % BATCHES)
            if step >= args.warm_up:
                found[worker.name].append(result)
            print(f"  {name} {dtype} iteration {step}: {worker.name} {result['seconds']:.3f} s", file=sys.stderr)
    for worker in workers:
        worker.close()
    return {
        "job": name,
        "title": job.title,
        "dtype": dtype,
        "threads": args.threads,
        "shape": shape_of(prompts),
        "floor_flops": floor_flops(args.folder / "models" / job.model, prompts),
        "found": found,
    }


def shape_of(prompts: list[list[list[int]]]) -> dict[str, float]:
    """Mean tokens of a prompt, and of the prefix that a batch shares."""
    return {
        "prompt": statistics.mean(len(row) for batch in prompts for row in batch),
        "prefix": statistics.mean(common_prefix(batch) for batch in prompts),
        "response": BUDGET,
    }


def floor_flops(model: Path, prompts: list[list[list[int]]]) -> float:
    """FLOPs of one PPO iteration that the job cannot avoid (`extensions.planner.flops`), the mean over the batches."""
    shape = ModelShape.of(AutoConfig.from_pretrained(model), Lora())
    found = []
    for batch in prompts:
        prefix = common_prefix(batch)
        rows = [SampleTokens(0, prefix, len(row) - prefix, BUDGET) for row in batch]
        found.append(sum(ppo_flops(shape, rows, 4, len(batch)).values()))
    return statistics.mean(found)


def summary(result: dict[str, Any], who: str) -> dict[str, Any]:
    rounds = result["found"][who]
    seconds = [r["seconds"] for r in rounds]
    return {
        "seconds": statistics.median(seconds),
        "subsample_evenly": (min(seconds), max(seconds)),
        "phases": {phase: statistics.median(r["phases"][phase] for r in rounds) for phase in rounds[0]["phases"]},
        "rss": max(r["peak_rss_gb"] for r in rounds),
        "weights": rounds[0].get("weights_gb", 0.0),
    }


def ratio(result: dict[str, Any], one: str, other: str) -> str:
    """Median over the rounds of one's time over the other's in the same round, with its range."""
    pairs = zip(result["found"][one], result["found"][other], strict=True)
    ratios = sorted(a["seconds"] / b["seconds"] for a, b in pairs)
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} - {ratios[-1]:.2f})"


def report(result: dict[str, Any]) -> str:
    """A result as Markdown."""
    shape, found = result["shape"], result["found"]
    lines = [
        f"### {result['title']}, {result['dtype']}",
        "",
        f"Prompts {shape['prompt']:.0f} tokens, {shape['prefix']:.0f} of them shared by the batch of {ROWS}; "
        f"{shape['response']} written; {len(next(iter(found.values())))} rounds, {result['threads']} threads.",
        "",
        "| | s/iteration (min - max) | samples/s | by phase, s | peak RSS, GB | base weights, GB |",
        "|---|---|---|---|---|---|",
    ]
    for who in found:
        if who == "machine":
            continue
        m = summary(result, who)
        phases = ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in m["phases"].items() if seconds >= 0.005)
        lines.append(
            f"| {who} | {m['seconds']:.2f} ({m['spread'][0]:.2f} - {m['spread'][1]:.2f}) | {ROWS / m['seconds']:.2f} | "
            f"{phases} | {m['rss']:.2f} | {m['weights']:.2f} |"
        )
    lines.append("")
    if "machine" in found:
        rate = statistics.median(r["flops_per_s"] for r in found["machine"])
        seconds = result["floor_flops"] / rate
        lines.append(
            f"- floor of PPO: {result['floor_flops'] / 1e12:.2f} TFLOP at {rate / 1e9:.0f} GFLOP/s = {seconds:.2f} s; "
            + ", ".join(
                f"{who} is at {100 * seconds / summary(result, who)['seconds']:.0f}% of it"
                for who in ("ours", "trl")
                if who in found
            )
        )
    for one, other, what in (
        ("trl", "ours", "TRL / ours, PPO"),
        ("ours", "hf-sft", "PPO here / Hugging Face SFT, a sample"),
        ("hf-sft", "ours-sft", "Hugging Face SFT / SFT here"),
        ("ours", "ours-sft", "PPO here / SFT here, a sample"),
    ):
        if one in found and other in found:
            lines.append(f"- {what}: {ratio(result, one, other)}")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with glue/ and superglue/")
    parser.add_argument("--jobs", default=",".join(JOBS), help="of: %(default)s")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--contestants", default="machine,ours,trl,hf-sft,ours-sft")
    parser.add_argument("--rounds", type=int, default=5, help="measured iterations of each")
    parser.add_argument("--warm-up", type=int, default=1, help="iterations before")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--folder", type=Path, default=Path("runs/bench"), help="models, environments, results")
    parser.add_argument("--trl-python", help="interpreter of an environment with trl.txt; else one is made")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    make_models(args.folder / "models")
    peer = peer_python(args.folder, args.trl_python) if "trl" in args.contestants else ""
    for name in args.jobs.split(","):
        for dtype in args.dtypes.split(","):
            result = measure(name, dtype, args, peer)
            (args.folder / f"train-{name}-{dtype}.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
            print(report(result), flush=True)


if __name__ == "__main__":
    main()
