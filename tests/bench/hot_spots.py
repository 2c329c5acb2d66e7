"""Where the time of a PPO iteration goes: seconds, share and rate of its kinds of operations, by torch's profiler.

    python tests/bench/hot_spots.py --data path/to/folder/with/glue/and/superglue

The profiler adds a few percent; the iteration before it is timed without.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from jobs import BUDGET, JOBS, RECIPE, overrides_of, parse

ROWS = 16
COLUMNS = ["operations", "s", "share", "calls", "GFLOP/s", "share of the machine's rate"]
OPTIONS = [
    ("--job", {"default": "cola", "choices": list(JOBS)}),
    ("--dtypes", {"default": "float32,bfloat16"}),
]
PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"}
COPIES = {"copy_", "cat", "index_select", "fill_", "gather", "scatter_add_", "_index_put_impl_", "masked_fill_"}


def kind_of(name: str, shapes: list[Any], rank: int, vocabulary: int) -> str:
    """The line of an operation with inputs of these shapes."""
    if name in PRODUCTS:
        sides = [shape for shape in shapes if len(shape) > 1]
        sizes = {size for shape in sides for size in shape}
        if len(sides[0]) == 3:
            return "products of the attention"
        if vocabulary in sizes:
            return "products of the head"
        if rank in {min(shape) for shape in sides} and rank != ROWS:
            return "products of the adapters"
        return "products of the layers, decoding" if sides[0][0] == ROWS else "products of the layers"
    word = name.removeprefix("aten::")
    if "softmax" in word:
        return "softmax"
    return "copies, conversions, lookups" if word in COPIES else "other operations"


def measure(job: str, dtype: str, args: Any) -> tuple[list[list[str]], str]:
    """The table, and a line about the whole."""
    import torch
    from matmul import load as load_machine
    from ours import load
    from torch.profiler import ProfilerActivity, profile

    torch.set_num_threads(args.threads)
    rank = 12  # not the number of rows, so that shapes tell adapters from decoding
    own = [f"lora.rank={rank}", f"output_dir={args.folder / f'hot-spots-{job}-{dtype}'}"]
    overrides = [*overrides_of(JOBS[job], args, dtype, ROWS), *own]
    iterate = load({"recipe": str(RECIPE), "overrides": overrides, "method": "ppo"})
    rate = load_machine({"dtype": dtype})(0)["flops_per_s"]
    iterate(0)
    plain = iterate(1)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, with_flops=True) as found:
        whole = iterate(2)["seconds"]
    vocabulary = plain["vocabulary"]
    seconds: dict[str, float] = defaultdict(float)
    flops: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    for event in found.key_averages(group_by_input_shape=True):
        if not event.key.startswith("aten::"):
            continue
        kind = kind_of(event.key, event.input_shapes, rank, vocabulary)
        seconds[kind] += event.self_cpu_time_total / 1e6
        calls[kind] += event.count
        flops[kind] += event.flops
    seconds["between operations: Python, autograd"] = whole - sum(seconds.values())
    lines = []
    for kind, spent in sorted(seconds.items(), key=lambda item: -item[1]):
        reached = flops[kind] / spent if kind.startswith("products") else None
        rates = ["-", "-"] if reached is None else [f"{reached / 1e9:.0f}", f"{100 * reached / rate:.0f}%"]
        lines.append([kind, f"{spent:.2f}", f"{100 * spent / whole:.0f}%", str(calls[kind]), *rates])
    floor = sum(flops.values()) / rate
    return lines, (
        f"{JOBS[job].title}, {dtype}, {args.threads} threads, {ROWS} rows, {BUDGET} tokens written: "
        f"{plain['seconds']:.2f} s, {whole:.2f} s under the profiler. Its products alone take {floor:.2f} s at the "
        f"machine's rate, {rate / 1e9:.0f} GFLOP/s."
    )


def main() -> None:
    from worker import table

    args = parse(__doc__, OPTIONS, job="tiny", dtypes="float32")
    for dtype in args.dtypes.split(","):
        lines, text = measure(args.job, dtype, args)
        print(f"{text}\n\n{table(COLUMNS, lines)}\n", flush=True)


if __name__ == "__main__":
    main()
