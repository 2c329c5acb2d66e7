"""The same recipe by each engine: seconds of a step by phase, seconds until the first step, memory of all processes.

    python tests/bench/engines.py recipes/smollm2.yaml data.root=path/to/glue

Needs the environment of `bash launch/test_ray.sh`. Engines take turns; ratios are to the first, in one run.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

from extensions.common.files import read_jsonl

ROOT = Path(__file__).resolve().parent.parent.parent
ENGINES = {
    "deepspeed, hf": ("ppo", []),
    "deepspeed, vllm": ("ppo", ["rollout.backend=vllm"]),
    "ray, vllm": ("ppo_ray", []),
}
STEPS = 4  # the first is left out


def peak_memory(pid: int, found: list[int]) -> None:
    """Largest sum of the unshared memory of a process and all below it, in bytes."""
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


def measure(script: str, overrides: list[str], arguments: list[str]) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        fixed = [
            f"max_steps={STEPS}",
            "evaluation.before=false",
            "evaluation.max_samples=1",
            "checkpoint.every_steps=0",
        ]
        own = [*arguments, *fixed, "ppo.critic=adapter", *overrides, f"output_dir={folder}/run"]
        programs = Path(sys.executable).parent
        variables = {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "VIRTUAL_ENV": str(programs.parent)}
        start, sizes = time.monotonic(), []
        command = ["bash", str(ROOT / "launch" / f"{script}.sh"), *own]
        process = subprocess.Popen(command, cwd=ROOT, env=os.environ | variables, stdout=subprocess.DEVNULL)
        watcher = threading.Thread(target=peak_memory, args=(process.pid, sizes))
        watcher.start()
        metrics, first = Path(folder, "run", "metrics.jsonl"), 0.0
        while process.poll() is None:
            if not first and metrics.exists() and metrics.stat().st_size:
                first = time.monotonic() - start
            time.sleep(0.2)
        watcher.join()
        assert process.returncode == 0, f"{script} ended with {process.returncode}"
        lines = read_jsonl(metrics)[1:]
        phases = {
            name: statistics.median(line["seconds"].get(name, 0.0) for line in lines) for name in lines[0]["seconds"]
        }
        step = statistics.median(sum(line["seconds"].values()) for line in lines)
        return phases | {"step": step, "until first step": first, "GiB": max(sizes) / 2**30}


def main(arguments: list[str]) -> None:
    rows = {name: measure(script, overrides, arguments) for name, (script, overrides) in ENGINES.items()}
    base = rows[next(iter(rows))]
    columns = ["rollout", "reference", "update", "sync", "step", "until first step", "GiB"]
    print(f"| engine | {' | '.join(columns)} | step, ratio |\n|{'---|' * (len(columns) + 2)}")
    for name, row in rows.items():
        cells = " | ".join(f"{row[column]:.1f}" if column in row else "-" for column in columns)
        print(f"| {name} | {cells} | {row['step'] / base['step']:.2f} |")


if __name__ == "__main__":
    main(sys.argv[1:])
