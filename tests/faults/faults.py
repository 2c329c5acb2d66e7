"""Kills, tears, fills and starves small real runs, and counts what survives.

    python tests/faults/faults.py                # everything, some minutes
    python tests/faults/faults.py kill --number 200 --seed 7
    python tests/faults/faults.py corrupt fill

kill      SIGKILL inside any write, rename or removal of the run folder, or at a random moment; then started again,
          until it ends: everything that a run leaves must be that of a run that was never killed, bit for bit
corrupt   checkpoints cut short, with a bit turned, emptied, deleted, edited: reported, and the one before is used
fill      a file system that is full: the run continues, or stops if its recipe says so, and no file is torn
stop      SIGTERM at random moments: exit status 0, and the same bits in the end
change    resumed with other memory and evaluation keys: ends, and computes the same up to rounding
extend    a finished run with more steps, killed or stopped in between: the bits of the undisturbed extension
fork      a fork with another reward, learning rate or data, killed or stopped: the bits of the undisturbed fork
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from changed import change, extend, fork
from harness import Bench, Job, Tally, make_model, start, tidy  # it sets sys.path

from extensions.runs.checkpoint import checkpoint_folders, verify_checkpoint
from extensions.runs.resume import is_finished


def kill(bench: Bench, number: int) -> Tally:
    """`number` kills over several runs: inside a change of the run folder, or at a random moment."""
    tally, trial = Tally(), 0
    while tally.counts["kills"] < number and not tally.lost:
        folder = bench.folder / f"kill-{trial}"
        recipe = bench.job.recipe(folder, bench.model)
        trial += 1
        for _ in range(min(bench.rng.randint(2, 6), number - tally.counts["kills"])):
            if not bench.strike(recipe, tally):
                break
        if bench.resume(recipe, tally, "killed") if not is_finished(folder / "run") else True:
            bench.compare(folder, tally, "killed")
        tidy(folder, tally)
    return tally


def stop(bench: Bench, number: int) -> Tally:
    """SIGTERM or SIGINT at random moments, to all ranks or to one."""
    tally = Tally()
    for trial in range(number):
        folder = bench.folder / f"stop-{trial}"
        recipe = bench.job.recipe(folder, bench.model)
        for _ in range(bench.rng.randint(1, 3)):
            running = start(recipe, bench.job)
            time.sleep(bench.rng.uniform(0.5, bench.seconds))
            running.poll()
            if bench.job.ranks > 1 and bench.rng.random() < 0.5:
                with suppress(ProcessLookupError):
                    os.kill(bench.rng.choice(running.pids), signal.SIGTERM)
            else:
                running.send(bench.rng.choice((signal.SIGTERM, signal.SIGINT)))
            statuses = running.wait()
            tally.counts["stops"] += 1
            if any(statuses):
                tally.lost.append(f"{bench.job.name}: a stop ended with {statuses} ({folder})")
        if bench.resume(recipe, tally, "stopped") if not is_finished(folder / "run") else True:
            bench.compare(folder, tally, "stopped")
        tidy(folder, tally)
    return tally


# ------------------------------------------------------------------------------------------------------ corruption


def _flip(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def _edit(path: Path, rng: random.Random) -> None:
    """By hand, with a number changed, as a user may."""
    text = path.read_text(encoding="utf-8", errors="surrogateescape")
    digits = [k for k, character in enumerate(text) if character.isdigit()]
    at = rng.choice(digits)
    new = str((int(text[at]) + 1) % 10) if text[at].isascii() else "0"
    path.write_text(text[:at] + new + text[at + 1 :], encoding="utf-8", errors="surrogateescape")


CORRUPTIONS: dict[str, Callable[[Path, random.Random], None]] = {
    "cut short": lambda path, rng: os.truncate(path, rng.randrange(path.stat().st_size)),
    "emptied": lambda path, rng: os.truncate(path, 0),
    "a bit turned": _flip,
    "deleted": lambda path, rng: path.unlink(),
    "made longer": lambda path, rng: path.write_bytes(path.read_bytes() + b"\0"),
    "a block of zeros": lambda path, rng: path.write_bytes(b"\0" * path.stat().st_size),
    "edited": _edit,
}


def corrupt(bench: Bench, number: int) -> Tally:
    """Damage the newest checkpoint of an unfinished run, or all of them, in every way and every file in turn."""
    tally = Tally()
    stopped = bench.folder / "unfinished"
    shutil.copytree(bench.folder / "whole", stopped)
    for path in (stopped / "run" / "eval.json", *(stopped / "run").glob("predictions_after*")):
        path.unlink()
    files = sorted(path.name for path in checkpoint_folders(stopped / "run")[-1].iterdir())
    cases = [(kind, name) for kind in CORRUPTIONS for name in files if kind != "edited" or name.endswith(".json")]
    bench.rng.shuffle(cases)
    for trial, (kind, name) in enumerate(cases[:number]):
        folder = bench.folder / f"corrupt-{trial}"
        shutil.copytree(stopped, folder)
        recipe = bench.job.recipe(folder, bench.model)
        all_of_them = bench.rng.random() < 0.15
        for checkpoint in checkpoint_folders(folder / "run")[slice(None) if all_of_them else slice(-1, None)]:
            if (checkpoint / name).exists():
                CORRUPTIONS[kind](checkpoint / name, bench.rng)
        (folder / "log.txt").unlink(missing_ok=True)
        what = f"{name} {kind}"
        tally.counts["checkpoints damaged"] += 1
        if bench.resume(recipe, tally, what):
            bench.compare(folder, tally, what)
            reported = "is damaged and is not used" in (folder / "log.txt").read_text()
            tally.counts["reported"] += reported
            if not reported:
                tally.lost.append(f"{bench.job.name}, {what}: not reported ({folder})")
        tidy(folder, tally)
    return tally


# ------------------------------------------------------------------------------------------------------ a full disk


@contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[Path]:
    """A file system of its own in memory. Raises OSError where this user may not make one."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)], capture_output=True, text=True
        )
    except FileNotFoundError as error:
        raise OSError("there is no mount command") from error
    if done.returncode:
        raise OSError(done.stderr.strip())
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(bench: Bench, number: int) -> Tally:
    """Run on disks that are too small by more or less; then go on where there is room."""
    tally = Tally()
    needed = sum(path.stat().st_size for path in (bench.folder / "whole" / "run").rglob("*") if path.is_file()) // 1024
    for trial in range(number):
        folder, stops = bench.folder / f"fill-{trial}", trial % 2 == 1
        with small_disk(folder / "disk", int(needed * bench.rng.uniform(0.1, 1.3)) + 16) as disk:
            more = {"output_dir": str(disk / "run"), "checkpoint": {"on_error": "stop" if stops else "warn"}}
            recipe = bench.job.recipe(folder, bench.model, **more)
            statuses = start(recipe, bench.job).wait()
            log = (folder / "log.txt").read_text()
            refused = "could not be written" in log or "the disk is full" in log or "cannot be written" in log
            tally.counts["small disks"] += 1
            tally.counts["that were full"] += refused
            ended = (0, 2, 3, -signal.SIGKILL) if any(statuses) and bench.job.ranks > 1 else (0, 2, 3)
            if any(status not in ended for status in statuses) or "Traceback" in log:
                tally.lost.append(f"{bench.job.name}, a full disk: ended with {statuses} ({folder})")
            if stops and "the checkpoint of step" in log and "could not be written" in log and statuses[0] != 3:
                tally.lost.append(f"{bench.job.name}, a full disk: went on, and should have stopped ({folder})")
            damaged = [text for path in checkpoint_folders(disk / "run") for text in verify_checkpoint(path)]
            if damaged:
                tally.lost.append(f"{bench.job.name}, a full disk: {damaged} ({folder})")
            tally.counts["ended well all the same"] += not any(statuses)
            if (disk / "run").exists():
                shutil.copytree(disk / "run", folder / "run")
        (folder / "log.txt").rename(folder / "full.txt")
        recipe = bench.job.recipe(folder, bench.model)
        if is_finished(folder / "run") or bench.resume(recipe, tally, "a full disk"):
            bench.compare(folder, tally, "a full disk")
        tidy(folder, tally)
    return tally


# --------------------------------------------------------------------------------------------------------- command

JOBS = [
    Job(method, optimizer, critic, ranks)
    for method, critics in (("ppo", ("shared", "adapter")), ("sft", ("shared",)))
    for optimizer in ("adamw", "adafactor")
    for critic in critics
    for ranks in (1, 2)
]
JOBS += [Job(ranks=2, zero_stage=1), Job(ranks=2, zero_stage=2, critic="adapter"), Job(ranks=2, zero_stage=3)]
TRIALS: dict[str, tuple[Callable[[Bench, int], Tally], int]] = {
    "kill": (kill, 8),
    "stop": (stop, 2),
    "corrupt": (corrupt, 5),
    "fill": (fill, 4),
    "change": (change, 2),
    "extend": (extend, 1),
    "fork": (fork, 1),
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trials", nargs="*", metavar="TRIAL", help=f"{', '.join(TRIALS)}; default: all")
    parser.add_argument("--number", type=int, help="of each trial for each job; default: a few")
    parser.add_argument("--jobs", type=int, nargs="*", help=f"numbers from 0 to {len(JOBS) - 1}; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="to work in; runs that lost something stay there")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.trials if name not in TRIALS]
    if unknown:
        parser.error(f"no trial {unknown[0]!r}; choose from {', '.join(TRIALS)}")
    base = (options.folder or Path(tempfile.mkdtemp(prefix="faults-"))).resolve()
    base.mkdir(parents=True, exist_ok=True)
    model = make_model(base / "model")
    total: dict[str, Tally] = {}
    for number, job in enumerate(JOBS):
        if options.jobs is not None and number not in options.jobs:
            continue
        bench = Bench(job, base / f"job-{number}", model, random.Random(f"{options.seed} {number}"))
        print(f"[{number}] {job.name}: {bench.changes} changes of the run folder, {bench.seconds:.1f} s", flush=True)
        for name in options.trials or TRIALS:
            trial, default = TRIALS[name]
            try:
                tally = trial(bench, options.number or default)
            except OSError as error:
                print(f"    {name}: left out, {error}", flush=True)
                continue
            total.setdefault(name, Tally()).add(tally)
            counts = ", ".join(f"{count} {what}" for what, count in tally.counts.items())
            print(f"    {name}: {counts}", flush=True)
            for text in tally.lost:
                print(f"    LOST: {text}", flush=True)
    print("\nin all")
    for name, tally in total.items():
        print(f"  {name}: {json.dumps(dict(tally.counts))}, lost: {len(tally.lost)}")
    lost = sum(len(tally.lost) for tally in total.values())
    if not lost and options.folder is None:
        shutil.rmtree(base)
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
