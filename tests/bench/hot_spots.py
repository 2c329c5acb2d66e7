"""Where the time of a PPO iteration goes: seconds and share of its kinds of operations, by torch's profiler.

python tests/bench/hot_spots.py --data path/to/folder/with/glue/and/superglue
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from jobs import BUDGET, JOBS, RECIPE, make_model, overrides_of, parse, prompts_of

ROWS = 16
COLUMNS = ["operations", "s", "share", "calls"]
OPTIONS = [
    ("--job", {"default": "cola", "choices": list(JOBS)}),
    ("--dtypes", {"default": "float32,bfloat16"}),
]
KINDS = {
    "products of layers, adapters and head": ("mm", "addmm"),
    "products of the attention": ("bmm", "baddbmm"),
    "softmax": ("_softmax", "_log_softmax", "_softmax_backward_data"),
    "copies, conversions, lookups": ("copy_", "cat", "index_select", "fill_", "gather", "_index_put_impl_"),
}
KIND_OF = {f"aten::{name}": kind for kind, names in KINDS.items() for name in names}
KIND_OF["mkldnn::_linear_pointwise"] = "products of layers, adapters and head"  # `extensions.prefix.products`


def measure(job: str, dtype: str, args: Any) -> tuple[list[list[str]], str]:
    """The table, and a line about the whole."""
    import torch
    from matmul import load as load_machine
    from ours import load
    from torch.profiler import ProfilerActivity, profile
    from train import floor_flops

    torch.set_num_threads(args.threads)
    overrides = overrides_of(JOBS[job], args, dtype, ROWS)
    own = [*overrides, f"output_dir={args.folder / f'hot-spots-{job}-{dtype}'}"]
    iterate = load({"recipe": str(RECIPE), "overrides": own, "method": "ppo"})
    rate = load_machine({"dtype": dtype})(0)["flops_per_s"]
    iterate(0)
    plain = iterate(1)["seconds"]
    with profile(activities=[ProfilerActivity.CPU]) as found:
        whole = iterate(2)["seconds"]
    seconds, calls = defaultdict[str, float](float), defaultdict[str, int](int)
    for event in found.key_averages():
        if event.key.startswith(("aten::", "mkldnn::")):
            kind = KIND_OF.get(event.key, "other operations: elementwise, sums, views")
            seconds[kind] += event.self_cpu_time_total / 1e6
            calls[kind] += event.count
    seconds["between operations: Python, autograd"] = whole - sum(seconds.values())
    lines = [
        [kind, f"{spent:.2f}", f"{100 * spent / whole:.0f}%", str(calls[kind])]
        for kind, spent in sorted(seconds.items(), key=lambda item: -item[1])
    ]
    floor = floor_flops(make_model(JOBS[job].model, args.folder), prompts_of(overrides)) / rate
    return lines, (
        f"{JOBS[job].title}, {dtype}, {args.threads} threads, {ROWS} rows, {BUDGET} tokens written: {plain:.2f} s, "
        f"{whole:.2f} s under the profiler. The unavoidable products take {floor:.2f} s at the machine's rate, "
        f"{rate / 1e9:.0f} GFLOP/s."
    )


def main() -> None:
    from worker import table

    args = parse(__doc__, OPTIONS, job="tiny", dtypes="float32")
    for dtype in args.dtypes.split(","):
        lines, text = measure(args.job, dtype, args)
        print(f"{text}\n\n{table(COLUMNS, lines)}\n", flush=True)


if __name__ == "__main__":
    main()
