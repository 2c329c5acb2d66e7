"""The machine: rate of its matrix products, in the precision of the job. An iteration is one reading.

Of torch's own product and the one that this project takes, the faster counts, so that no share of the limit profits
from a slow library.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from worker import serve

from extensions.prefix.products import linear

SIZE = 2048


def _seconds(product: Callable[[], Any]) -> float:
    """The fourth best of twelve."""
    seconds = []
    for _ in range(12):
        start = time.perf_counter()
        product()
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)[3]


def load(job: dict[str, Any]) -> Callable[[int], dict[str, Any]]:
    left, right = torch.randn(2, SIZE, SIZE).to(getattr(torch, job["dtype"]))

    def iterate(step: int) -> dict[str, Any]:
        best = min(_seconds(lambda: left @ right), _seconds(lambda: linear(left, right)))
        return {"seconds": best, "phases": {}, "flops_per_s": 2 * SIZE**3 / best}

    return iterate


if __name__ == "__main__":
    serve(load)
