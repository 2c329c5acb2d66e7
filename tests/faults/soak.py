"""Trains a tiny model for a long time, and looks whether memory or open files grow.

    python tests/faults/soak.py --minutes 60

Validations and checkpoints come often, so that an hour has thousands of them. Ends with status 1 if the resident memory
of the last tenth of the time is more than 2% and 8 MB above that of the second tenth, or more files are open.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from harness import Job, make_model, start

from extensions.common.files import read_jsonl

ALLOWED_SHARE, ALLOWED_BYTES = 0.02, 8 * 2**20


def sample(pid: int) -> tuple[int, int]:
    """Resident bytes and open files of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir(f"/proc/{pid}/fd"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--method", choices=("ppo", "sft"), default="ppo")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        folder, job = Path(name), Job(options.method)
        recipe = job.recipe(
            folder / "job",
            make_model(folder / "model"),
            max_steps=10**7,
            sft={"max_steps": 10**7},
            checkpoint={"every_steps": 10},
            evaluation={"every_steps": 20, "patience": 0},
            logging={"tensorboard": True},
        )
        running = start(recipe, job)
        (pid,) = running.pids
        end, found = time.monotonic() + 60 * options.minutes, []
        while time.monotonic() < end and running.poll():
            time.sleep(min(5.0, 60 * options.minutes / 100))
            if running.poll():
                found.append(sample(pid))
        running.send(signal.SIGTERM)
        status = running.wait()
        if status != [0]:
            print(f"the run ended with {status}; its log:\n{running.log.read_text()[-3000:]}")
            return 1
        steps = read_jsonl(folder / "job" / "run" / "metrics.jsonl")[-1]["step"]
        tenth = len(found) // 10
        early, late = found[tenth : 2 * tenth], found[-tenth:]
        memory = [statistics.median(m for m, _ in part) for part in (early, late)]
        files = [max(f for _, f in part) for part in (early, late)]
        allowed = max(memory[0] * ALLOWED_SHARE, ALLOWED_BYTES)
        flat = memory[1] - memory[0] <= allowed and files[1] <= files[0]
        print(
            json.dumps(
                {
                    "minutes": options.minutes,
                    "steps": steps,
                    "validations": steps // 20,
                    "checkpoints": steps // 10,
                    "memory_mb": [round(m / 2**20, 1) for m in memory],
                    "open_files": files,
                    "flat": flat,
                }
            )
        )
        return 0 if flat else 1


if __name__ == "__main__":
    sys.exit(main())
