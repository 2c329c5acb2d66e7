"""Training speed: PPO here, against TRL's PPOTrainer, against plain Hugging Face SFT, and against the machine.

    python tests/bench/train.py --data path/to/folder/with/glue/and/superglue

All systems stay loaded and take turns, one iteration each; figures are medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from jobs import BATCHES, BUDGET, JOBS, RECIPE, make_model, overrides_of, parse, prompts_of
from transformers import AutoConfig, AutoTokenizer
from worker import Worker, ratio, seconds_of, table, take_turns

from extensions.planner.flops import ModelShape, SampleTokens, ppo_flops
from extensions.prefix.tree import common_prefix
from extensions.recipe import Lora

HERE = Path(__file__).parent
ROWS = 16
COLUMNS = ["system", "s/iteration (min - max)", "samples/s", "by phase, s", "peak RSS, GB", "base weights, GB"]
OPTIONS = [
    ("--jobs", {"default": "cola,sst2,boolq,few-shot", "help": "of: " + ",".join(JOBS)}),
    ("--dtypes", {"default": "float32,bfloat16"}),
    ("--systems", {"default": "machine,ours,trl,hf-sft,ours-sft"}),
    ("--rounds", {"type": int, "default": 5, "help": "measured iterations of each"}),
    ("--warm-up", {"type": int, "default": 1, "help": "iterations before"}),
    ("--trl-python", {"help": "interpreter of an environment with trl.txt; default: one is made, except with --tiny"}),
]


def peer_python(args: argparse.Namespace) -> str | None:
    """The interpreter of TRL's environment, which is made if absent; None with --tiny, which installs nothing."""
    if "trl" not in args.systems.split(",") or args.trl_python:
        return args.trl_python
    python = args.folder / "trl" / "bin" / "python"
    if args.tiny and not python.exists():
        print("trl: skipped, its environment is not installed; name one with --trl-python, or run without --tiny\n")
        return None
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(args.folder / "trl")], check=True)
    subprocess.run([str(python), "-m", "pip", "install", "-q", "-r", str(HERE / "trl.txt")], check=True)
    return str(python)


def measure(name: str, dtype: str, args: argparse.Namespace, peer: str | None) -> dict[str, Any]:
    """One job in one precision: all systems, in turns."""
    job, folder = JOBS[name], args.folder / f"{name}-{dtype}"
    folder.mkdir(parents=True, exist_ok=True)
    overrides, model = overrides_of(job, args, dtype, ROWS), make_model(job.model, args.folder)
    prompts = prompts_of(overrides)
    eos = AutoTokenizer.from_pretrained(model).eos_token
    plain = {"model": str(model), "eos": eos, "dtype": dtype, "batches": prompts, "budget": BUDGET}

    def recipe(method: str) -> dict[str, Any]:  # each with its own run folder, which a run locks
        own = [*overrides, f"output_dir={folder / 'runs' / method}"]
        return {"recipe": str(RECIPE), "overrides": own, "method": method}

    systems = {
        "machine": ("matmul.py", plain),
        "ours": ("ours.py", recipe("ppo")),
        "trl": ("trl_ppo.py", plain),
        "hf-sft": ("hf_sft.py", plain),
        "ours-sft": ("ours.py", recipe("sft")),
    }
    chosen = {key: systems[key] for key in args.systems.split(",") if key != "trl" or peer is not None}
    workers = []
    for key, (script, content) in chosen.items():
        python = peer if key == "trl" and peer is not None else sys.executable
        workers.append(Worker(key, [python, str(HERE / script)], content, folder, args.threads))
    return {
        "job": name,
        "title": job.title,
        "dtype": dtype,
        "threads": args.threads,
        "shape": shape_of(prompts),
        "floor_flops": floor_flops(model, prompts),
        "found": take_turns(workers, args.rounds, args.warm_up, BATCHES),
    }


def shape_of(prompts: list[list[list[int]]]) -> dict[str, float]:
    """Mean tokens of a prompt, and of the prefix that a batch shares."""
    return {
        "prompt": statistics.mean(len(row) for batch in prompts for row in batch),
        "prefix": statistics.mean(common_prefix(batch) for batch in prompts),
        "response": BUDGET,
    }


def floor_flops(model: Path, prompts: list[list[list[int]]]) -> float:
    """Unavoidable FLOPs of one PPO iteration (`extensions.planner.flops`), the mean over the batches."""
    shape = ModelShape.of(AutoConfig.from_pretrained(model), Lora())
    found = []
    for batch in prompts:
        prefix = common_prefix(batch)
        rows = [SampleTokens(0, prefix, len(row) - prefix, BUDGET) for row in batch]
        found.append(sum(ppo_flops(shape, rows, 4, len(batch)).values()))
    return statistics.mean(found)


def row_of(who: str, rounds: list[dict[str, Any]]) -> list[str]:
    """The line of a system in the table."""
    seconds = [r["seconds"] for r in rounds]
    phases = {phase: statistics.median(r["phases"][phase] for r in rounds) for phase in rounds[0]["phases"]}
    middle = statistics.median(seconds)
    return [
        who,
        f"{middle:.2f} ({min(seconds):.2f} - {max(seconds):.2f})",
        f"{ROWS / middle:.2f}",
        ", ".join(f"{phase} {s:.2f}" for phase, s in phases.items()),
        f"{max(r['peak_rss_gb'] for r in rounds):.2f}",
        f"{rounds[0]['weights_gb']:.2f}",
    ]


def report(result: dict[str, Any]) -> str:
    """A result as Markdown."""
    shape, found = result["shape"], result["found"]
    lines = [
        f"### {result['title']}, {result['dtype']}",
        "",
        f"Prompts {shape['prompt']:.0f} tokens, {shape['prefix']:.0f} of them shared by the batch of {ROWS}; "
        f"{shape['response']} written; {len(next(iter(found.values())))} rounds, {result['threads']} threads.",
        "",
        table(COLUMNS, [row_of(who, rounds) for who, rounds in found.items() if who != "machine"]),
        "",
    ]
    seconds = {who: seconds_of(found, who) for who in found}
    if "ours" in found:
        middle = statistics.median(seconds["ours"])
        kinds = {kind: statistics.mean(r[kind] for r in found["ours"]) for kind in ("packed", "logical")}
        lines.append(
            f"- tokens per second of an iteration here: {kinds['packed'] / middle:.0f} packed, "
            f"{kinds['logical'] / middle:.0f} logical ({kinds['logical'] / kinds['packed']:.2f} times)"
        )
    if "machine" in found:
        rate = statistics.median(r["flops_per_s"] for r in found["machine"])
        floor = result["floor_flops"] / rate
        shares = [
            f"{who} reaches {100 * floor / statistics.median(seconds[who]):.0f}%"
            for who in ("ours", "trl")
            if who in found
        ]
        lines.append(
            f"- floor of PPO: {result['floor_flops'] / 1e12:.3g} TFLOP at {rate / 1e9:.0f} GFLOP/s = {floor:.3g} s; "
            + ", ".join(shares)
        )
    for one, other, what in (
        ("trl", "ours", "TRL / ours, PPO"),
        ("ours", "hf-sft", "PPO here / Hugging Face SFT, per sample"),
        ("hf-sft", "ours-sft", "Hugging Face SFT / SFT here"),
        ("ours", "ours-sft", "PPO here / SFT here, per sample"),
    ):
        if one in found and other in found:
            lines.append(f"- {what}: {ratio(seconds[one], seconds[other])}")
    return "\n".join([*lines, ""])


def main() -> None:
    args = parse(__doc__, OPTIONS, jobs="tiny", dtypes="float32", rounds=1)
    args.folder.mkdir(parents=True, exist_ok=True)
    peer = peer_python(args)
    for name in args.jobs.split(","):
        for dtype in args.dtypes.split(","):
            result = measure(name, dtype, args, peer)
            (args.folder / f"train-{name}-{dtype}.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
            print(report(result), flush=True)


if __name__ == "__main__":
    main()
