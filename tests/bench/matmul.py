"""The machine: rate of its matrix products, in the precision of the job. An iteration is one reading."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from worker import serve

SIZE = 2048


def load(job: dict[str, Any]) -> Callable[[int], dict[str, Any]]:
    left, right = torch.randn(2, SIZE, SIZE).to(getattr(torch, job["dtype"]))

    def iterate(step: int) -> dict[str, Any]:
        seconds = []
        for _ in range(12):
            start = time.perf_counter()
            left @ right
            seconds.append(time.perf_counter() - start)
        best = sorted(seconds)[3]
        return {"seconds": best, "phases": {}, "flops_per_s": 2 * SIZE**3 / best}

    return iterate


if __name__ == "__main__":
    serve(load)
