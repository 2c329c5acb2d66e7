"""Scaling: the same PPO job on 1 and on 2 ranks of one thread each, started by the launch script.

    python tests/bench/ranks.py --data path/to/folder/with/glue/and/superglue

The two take turns; seconds are those of the iterations in metrics.jsonl, without the first.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import tempfile
from pathlib import Path

from jobs import JOBS, RECIPE, ROOT, overrides_of, parse
from worker import table

from extensions.common.files import read_jsonl

OPTIONS = [
    ("--job", {"default": "cola", "choices": list(JOBS)}),
    ("--dtype", {"default": "float32"}),
    ("--rows", {"type": int, "default": 32, "help": "samples per batch over all ranks"}),
    ("--steps", {"type": int, "default": 4}),
    ("--rounds", {"type": int, "default": 2}),
    ("--port", {"default": "29500", "help": "of DeepSpeed's rendezvous"}),
]


def iterations(ranks: int, overrides: list[str], steps: int, run: Path, port: str) -> list[float]:
    """Seconds of each iteration but the first, of a new run."""
    command = ["deepspeed", "--num_accelerators", str(ranks), "--master_port", port, str(ROOT / "launch" / "ppo.sh")]
    command += [str(RECIPE), *overrides, f"output_dir={run}", f"max_steps={steps}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    return [sum(metrics["seconds"].values()) for metrics in read_jsonl(run / "metrics.jsonl")[1:]]


def main() -> None:
    args = parse(__doc__, OPTIONS, job="tiny", rows=4, steps=2, rounds=1)
    overrides = overrides_of(JOBS[args.job], args, args.dtype, args.rows)
    overrides += ["evaluation.before=false", "evaluation.max_samples=2", "evaluation.every_steps=0"]
    found: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for k in range(args.rounds):
            for ranks in found:
                run = Path(folder) / f"ranks-{ranks}-{k}"
                found[ranks] += iterations(ranks, overrides, args.steps, run, args.port)
    base = statistics.median(found[1])
    print(f"{JOBS[args.job].title}, {args.dtype}, {args.rows} samples per iteration\n")
    rows = [
        [
            str(ranks),
            f"{statistics.median(seconds):.2f} ({min(seconds):.2f} - {max(seconds):.2f})",
            f"{base / statistics.median(seconds):.2f}",
        ]
        for ranks, seconds in found.items()
    ]
    print(table(["ranks", "s/iteration (min - max)", "speed-up"], rows))


if __name__ == "__main__":
    main()
