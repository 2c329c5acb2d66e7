"""Scaling: the same PPO job on 1 and on 2 ranks of one thread each, started by the launch script.

    python tests/bench/ranks.py --data path/to/folder/with/glue/and/superglue

The two take turns; seconds are those of the iterations in metrics.jsonl, without the first.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
from pathlib import Path

from jobs import JOBS, RECIPE, ROOT, make_models, overrides_of


def seconds_of(ranks: int, overrides: list[str], steps: int, name: str, runs: Path) -> list[float]:
    """Seconds of each iteration but the first, of a run of its own."""
    command = ["deepspeed", "--num_gpus", str(ranks), str(ROOT / "launch" / "ppo.sh")]
    command += [str(RECIPE), *overrides, f"output_dir={runs / name}", f"max_steps={steps}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    lines = (runs / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [sum(json.loads(line)["seconds"].values()) for line in lines[1:]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with glue/ and superglue/")
    parser.add_argument("--job", default="cola", choices=list(JOBS))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rows", type=int, default=32, help="samples of a batch over all ranks")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("runs/bench"))
    args = parser.parse_args()
    make_models(args.folder / "models")
    runs = args.folder / "ranks"
    overrides = overrides_of(JOBS[args.job], args.folder / "models", args.data, args.dtype, runs, args.rows)
    overrides += ["evaluation.before=false", "evaluation.max_samples=2", "evaluation.every_steps=0"]
    found: dict[int, list[float]] = {1: [], 2: []}
    for k in range(args.rounds):
        for ranks in found:
            found[ranks] += seconds_of(ranks, overrides, args.steps, f"ranks-{ranks}-{k}", runs)
    one, two = (statistics.median(found[ranks]) for ranks in found)
    spread = " ".join(f"{ranks}: {min(s):.1f} - {max(s):.1f}" for ranks, s in found.items())
    print(
        f"{JOBS[args.job].title}, {args.dtype}, {args.rows} samples: {one:.2f} s on 1 rank, {two:.2f} s on 2 "
        f"({spread}), {one / two:.2f} times as fast"
    )


if __name__ == "__main__":
    main()
