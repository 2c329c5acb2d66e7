"""What a benchmark's processes say to each other. Runs in every contestant's environment: the standard library only.

A worker loads its job, says "ready", and then does one iteration for each line that it is sent. The conductor keeps
all workers loaded and lets one work at a time, so that contestants alternate within seconds of each other.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def serve(load: Callable[[dict[str, Any]], Callable[[int], dict[str, Any]]]) -> None:
    """Be a worker: `load` makes the iteration from the job, which is the JSON file of the first argument."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes with the errors
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    iterate = load(job)
    print(json.dumps({"ready": True}), file=out, flush=True)
    for line in sys.stdin:
        result = iterate(int(line))
        result["peak_rss_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps(result), file=out, flush=True)


class Worker:
    """A worker process, seen from the conductor.

    Args:
        command: what starts it, less the job's file.
        log: file for all that it prints.
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
        self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            tail = "\n".join(self.log.read_text(encoding="utf-8").splitlines()[-15:])
            raise SystemExit(f"{self.name} ended; the end of {self.log}:\n{tail}")
        found: dict[str, Any] = json.loads(line)
        return found

    def iterate(self, step: int) -> dict[str, Any]:
        """Let it do iteration `step`, and return what it measured."""
        assert self.process.stdin is not None
        print(step, file=self.process.stdin, flush=True)
        return self._read()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
