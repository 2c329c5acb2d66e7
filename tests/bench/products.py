"""Products with frozen weights: torch's own against those of `extensions.prefix.products`, in turns.

    python tests/bench/products.py

Rows of 16 are a decoding step, of 819 an update of CoLA. The weights of a shape are many, so that a cache does not hold
them: a model reads each once per pass.
"""

from __future__ import annotations

import statistics
import time

from jobs import parse

COLUMNS = ["dtype", "rows", "in x out", "GFLOP/s, torch", "GFLOP/s, here", "here / torch (min - max)"]
OPTIONS = [
    ("--shapes", {"default": "576x1536,1536x576,576x49152", "help": "in x out of layers and head"}),
    ("--rows", {"default": "16,64,819"}),
    ("--dtypes", {"default": "float32,bfloat16"}),
    ("--rounds", {"type": int, "default": 5}),
]
WEIGHTS_AT_ONCE = 2**25  # of one shape


def main() -> None:
    args = parse(__doc__, OPTIONS, shapes="512x256", rows="16", dtypes="float32", rounds=2)
    import torch
    from worker import table

    from extensions.prefix.products import linear, onednn_is_faster

    torch.set_num_threads(args.threads)
    own, lines = torch.nn.functional.linear, []
    for dtype in args.dtypes.split(","):
        for shape in args.shapes.split(","):
            width, out = map(int, shape.split("x"))
            weights = [
                torch.randn(out, width).to(getattr(torch, dtype)) for _ in range(WEIGHTS_AT_ONCE // (width * out) + 1)
            ]
            for rows in map(int, args.rows.split(",")):
                x = torch.randn(rows, width).to(getattr(torch, dtype))
                seconds: dict[str, list[float]] = {"torch": [], "here": []}
                for step in range(args.rounds + 1):
                    for name, product in (("torch", own), ("here", linear)):
                        start = time.perf_counter()
                        for weight in weights:
                            product(x, weight)
                        if step:  # the first one allocates, and compiles oneDNN's kernel
                            seconds[name].append((time.perf_counter() - start) / len(weights))
                rates = [2 * rows * width * out / statistics.median(seconds[name]) / 1e9 for name in seconds]
                ratios = sorted(a / b for a, b in zip(seconds["torch"], seconds["here"], strict=True))
                middle = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} - {ratios[-1]:.2f})"
                lines.append([dtype, str(rows), shape, *(f"{rate:.0f}" for rate in rates), middle])
    print(f"{args.threads} threads; oneDNN is taken in float32: {'yes' if onednn_is_faster() else 'no'}\n")
    print(table(COLUMNS, lines))


if __name__ == "__main__":
    main()
