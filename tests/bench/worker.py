"""Processes that take turns. Runs in the environment of every system under test: the standard library only.

A worker loads its job, reports ready, and does one iteration per line of standard input. The benchmark keeps all
workers loaded and runs one at a time, so that systems alternate within seconds and a change of the machine's speed
affects all.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


def serve(load: Callable[[dict[str, Any]], Callable[[int], dict[str, Any]]]) -> None:
    """Run as a worker: `load` makes the iteration from the job, the JSON file named by the first argument."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output of libraries goes to the log
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    iterate = load(job)
    print(json.dumps({"ready": True}), file=out, flush=True)
    for line in sys.stdin:
        result = iterate(int(line))
        result["peak_rss_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps(result), file=out, flush=True)


class Worker:
    """A worker process.

    Args:
        command: starts it; the job file is appended.
        folder: for its job file and its log.
    """

    def __init__(self, name: str, command: list[str], job: dict[str, Any], folder: Path, threads: int) -> None:
        self.name = name
        path, self.log = folder / f"{name}.json", folder / f"{name}.log"
        path.write_text(json.dumps(job), encoding="utf-8")
        self.process = subprocess.Popen(
            [*command, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("w"),
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"},
        )
        self._loading = True

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            tail = "\n".join(self.log.read_text(encoding="utf-8").splitlines()[-15:])
            raise SystemExit(f"{self.name} ended; the end of {self.log}:\n{tail}")
        found: dict[str, Any] = json.loads(line)
        return found

    def wait(self) -> None:
        """Wait until the job is loaded."""
        if self._loading:
            self._read()
            self._loading = False

    def iterate(self, step: int) -> dict[str, Any]:
        """Run iteration `step` and return its measurements."""
        self.wait()
        assert self.process.stdin is not None
        print(step, file=self.process.stdin, flush=True)
        return self._read()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def take_turns(
    workers: Sequence[Worker], rounds: int, warm_up: int = 1, batches: int | None = None
) -> dict[str, list[dict[str, Any]]]:
    """Name -> measurements of each round after the first `warm_up` ones. Closes the workers.

    Args:
        batches: number of different iterations, which the rounds cycle through; None: as many as rounds.
    """
    found: dict[str, list[dict[str, Any]]] = {worker.name: [] for worker in workers}
    for worker in workers:
        worker.wait()  # nothing loads while another one is measured
    for step in range(warm_up + rounds):
        for worker in workers:
            result = worker.iterate(step % (batches or rounds + warm_up))
            if step >= warm_up:
                found[worker.name].append(result)
            print(f"  round {step}: {worker.name} {result['seconds']:.3f} s", file=sys.stderr)
    for worker in workers:
        worker.close()
    return found


def ratio(one: Sequence[float], other: Sequence[float]) -> str:
    """Median over the rounds of one's seconds over the other's in the same round, with the range."""
    ratios = sorted(a / b for a, b in zip(one, other, strict=True))
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} - {ratios[-1]:.2f})"


def seconds_of(found: Mapping[str, Sequence[Mapping[str, Any]]], name: str) -> list[float]:
    return [result["seconds"] for result in found[name]]


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *rows))
