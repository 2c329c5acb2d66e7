"""The same recipe on each backend: seconds per step by phase, seconds until the first step, memory of all processes.

    python tests/bench/engines.py recipes/smollm2.yaml data.root=path/to/glue

All backends need the environment of `bash launch/test_ray.sh`; without vLLM or Ray theirs are skipped. They take turns;
ratios are to the first, in one run.
"""

from __future__ import annotations

import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
from jobs import JOBS, RECIPE, ROOT, overrides_of, parse
from worker import table

from extensions.common.files import read_jsonl

BACKENDS: dict[str, tuple[str, list[str], list[str]]] = {  # name -> script, overrides, packages
    "deepspeed, hf": ("ppo", [], []),
    "deepspeed, vllm": ("ppo", ["rollout.backend=vllm"], ["vllm"]),
    "ray, vllm": ("ppo_ray", [], ["vllm", "ray"]),
}
COLUMNS = ["rollout", "reference", "update", "sync", "step", "until first step", "GiB"]
OPTIONS = [
    ("--steps", {"type": int, "default": 4, "help": "the first is left out"}),
    ("arguments", {"nargs": "*", "metavar": "RECIPE KEY=VALUE", "help": "as of a launch script"}),
]


def peak_memory(pid: int, found: list[int]) -> None:
    """Append the unshared memory of a process and its descendants, in bytes, once a second until it ends."""
    while psutil.pid_exists(pid):
        total = 0
        try:
            family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        except psutil.Error:
            return
        for process in family:
            try:
                total += process.memory_full_info().uss
            except psutil.Error:
                continue
        found.append(total)
        time.sleep(1)


def measure(script: str, overrides: list[str], arguments: list[str], steps: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        fixed = [f"max_steps={steps}", "evaluation.before=false", "evaluation.max_samples=1"]
        fixed += ["checkpoint.every_steps=0", "ppo.critic=adapter"]
        programs = Path(sys.executable).parent
        variables = {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "VIRTUAL_ENV": str(programs.parent)}
        start, sizes = time.monotonic(), list[int]()
        command = ["bash", str(ROOT / "launch" / f"{script}.sh"), *arguments, *fixed, *overrides]
        process = subprocess.Popen(
            [*command, f"output_dir={folder}/run"], cwd=ROOT, env=os.environ | variables, stdout=subprocess.DEVNULL
        )
        watcher = threading.Thread(target=peak_memory, args=(process.pid, sizes))
        watcher.start()
        metrics, first = Path(folder, "run", "metrics.jsonl"), 0.0
        while process.poll() is None:
            if not first and metrics.exists() and metrics.stat().st_size:
                first = time.monotonic() - start
            time.sleep(0.2)
        watcher.join()
        if process.returncode:
            raise SystemExit(f"{script} ended with status {process.returncode}")
        lines = read_jsonl(metrics)[1:]
        phases = {
            name: statistics.median(line["seconds"].get(name, 0.0) for line in lines) for name in lines[0]["seconds"]
        }
        step = statistics.median(sum(line["seconds"].values()) for line in lines)
        return phases | {"step": step, "until first step": first, "GiB": max(sizes) / 2**30}


def main() -> None:
    args = parse(__doc__, OPTIONS, steps=2)
    arguments = args.arguments
    if args.tiny:
        arguments = [str(RECIPE), *overrides_of(JOBS["tiny"], args, "float32", 4)]
    if not arguments:
        raise SystemExit("RECIPE is missing; for example recipes/smollm2.yaml data.root=path/to/glue, or --tiny")
    rows: dict[str, dict[str, float]] = {}
    for name, (script, overrides, packages) in BACKENDS.items():
        absent = [package for package in packages if importlib.util.find_spec(package) is None]
        if absent:
            print(f"{name}: skipped, {' and '.join(absent)} not installed (launch/test_ray.sh installs them)")
        else:
            rows[name] = measure(script, overrides, arguments, args.steps)
    base = rows[next(iter(rows))]["step"]
    lines = [
        [
            name,
            *(f"{row[column]:.1f}" if column in row else "-" for column in COLUMNS),
            f"{row['step'] / base:.2f}",
        ]
        for name, row in rows.items()
    ]
    print("\n" + table(["backend", *COLUMNS, "step, ratio"], lines))


if __name__ == "__main__":
    main()
