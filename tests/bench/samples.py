"""Several responses per prompt: the cost of a PPO step against the tokens of its packs.

    python tests/bench/samples.py --data path/to/folder/with/glue/and/superglue

Steps with 1, 4 and 8 responses per prompt take turns, with the same prompts and responses of one length. A step should
cost what its packed tokens cost in the model's layers, and its response tokens, which are not shared, in the head: a
fifth of SmolLM2-135M's multiplications per token, 2% of a 7B model's. The last column is the ratio of the costs over
the ratio of these multiplications.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

from jobs import BUDGET, JOBS, RECIPE, overrides_of, parse
from worker import Worker, ratio, seconds_of, table, take_turns

HERE = Path(__file__).parent
COLUMNS = [
    "responses per prompt", "tokens per response", "s/step", "times k = 1 (min - max)", "packed tokens, times k = 1",
    "multiplications, times k = 1", "packed tokens/s", "logical tokens/s", "cost per multiplication / k = 1",
]  # fmt: skip
OPTIONS = [
    ("--job", {"default": "cola", "choices": list(JOBS)}),
    ("--dtype", {"default": "float32"}),
    ("--rows", {"type": int, "default": 16, "help": "prompts per batch"}),
    ("--samples", {"default": "1,4,8", "help": "responses per prompt; the first is the base of the ratios"}),
    ("--budgets", {"default": f"{BUDGET},6", "help": "tokens per response"}),
    ("--estimator", {"default": "reinforce", "help": "advantage estimator of all; reinforce and gae take any number"}),
    ("--rounds", {"type": int, "default": 3}),
    ("--cpu-time", {"action": "store_true", "help": "measure processor time, for a machine that is not idle"}),
]


def main() -> None:
    args = parse(__doc__, OPTIONS, job="tiny", rows=4, samples="1,2", budgets="4", rounds=1)
    lines = []
    for budget in args.budgets.split(","):
        folder = args.folder / f"samples-{args.job}-{budget}"
        folder.mkdir(parents=True, exist_ok=True)
        overrides = overrides_of(JOBS[args.job], args, args.dtype, args.rows)
        overrides += [f"rollout.response_budget=[{budget}, {budget}]", f"ppo.advantage_estimator={args.estimator}"]
        counts = args.samples.split(",")
        workers = []
        for k in counts:
            own = [*overrides, f"ppo.samples_per_prompt={k}", f"output_dir={folder / f'k{k}'}"]
            job = {"recipe": str(RECIPE), "overrides": own, "method": "ppo", "cpu_time": args.cpu_time}
            workers.append(Worker(f"k{k}", [sys.executable, str(HERE / "ours.py")], job, folder, args.threads))
        found = take_turns(workers, args.rounds)
        seconds = {k: seconds_of(found, f"k{k}") for k in counts}
        tokens = {
            k: [statistics.mean(r[kind] for r in found[f"k{k}"]) for kind in ("packed", "logical")] for k in counts
        }
        one = found[f"k{counts[0]}"][0]
        work = {k: tokens[k][0] * one["trunk"] + args.rows * int(k) * int(budget) * one["head"] for k in counts}
        for k in counts:
            median, (packed, logical) = statistics.median(seconds[k]), tokens[k]
            more = work[k] / work[counts[0]]
            costs = statistics.median(a / b for a, b in zip(seconds[k], seconds[counts[0]], strict=True))
            rates = [f"{packed / median:.0f}", f"{logical / median:.0f}"]
            compared = [ratio(seconds[k], seconds[counts[0]]), f"{packed / tokens[counts[0]][0]:.2f}", f"{more:.2f}"]
            lines.append([k, budget, f"{median:.2f}", *compared, *rates, f"{costs / more:.2f}"])
    print(f"{JOBS[args.job].title}, {args.dtype}, {args.rows} prompts per step, {args.threads} threads\n")
    print(table(COLUMNS, lines))


if __name__ == "__main__":
    main()
