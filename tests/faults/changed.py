"""Trials of runs that go on with changes: other memory keys, more steps, forks; all of them killed and stopped."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import STEPS, Bench, Tally, differences, fingerprint, start, tidy

from extensions.common.files import read_json, read_jsonl
from extensions.runs.checkpoint import checkpoint_folders, step_of
from extensions.runs.resume import is_finished

# Without noise that depends on micro-batches or ranks. With the usual eps, rounding decides the sign of an update whose
# gradient is 0.
CALM: dict[str, Any] = {
    "lora": {"dropout": 0.0},
    "optimizer": {"eps": 1e-3},
    "reward": str(Path(__file__).parent / "calm_reward.py"),
    "checkpoint": {"keep": 9},
    "ppo": {"mini_batch_size": None},  # minibatches are shuffled on each rank
}
TOLERANCE = 1e-2  # relative, of the first iteration after the change: several updates of a random model
NUMBERS = ("loss", "reward_mean", "kl", "policy_loss", "value_loss", "entropy", "grad_norm", "lr")
LONGER = {"max_steps": STEPS + 2, "sft": {"max_steps": STEPS + 2}}


def merged(*parts: dict[str, Any]) -> dict[str, Any]:
    """Sections of recipes, key by key."""
    result: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            both = isinstance(value, dict) and isinstance(result.get(key), dict)
            result[key] = {**result[key], **value} if both else value
    return result


def change(bench: Bench, number: int) -> Tally:
    """Unfinished runs, resumed with up to three other keys that may change, sometimes on another number of ranks."""
    tally, job = Tally(), bench.job
    whole = bench.undisturbed("calm", **CALM)
    expected = read_jsonl(whole / "run" / "metrics.jsonl")
    for trial in range(number):
        folder, cut = bench.folder / f"change-{trial}", bench.rng.randrange(STEPS)
        shutil.copytree(whole, folder)
        _unfinish(folder / "run", cut)
        keys = bench.rng.sample(_memory_keys(bench), bench.rng.randint(1, 3))
        ranks = 3 - job.ranks if bench.rng.random() < 0.3 else job.ranks
        own = dataclasses.replace(job, ranks=ranks)
        what = f"after step {cut}, {keys}, {ranks} ranks"
        statuses = start(own.recipe(folder, bench.model, **merged(CALM, *keys)), own).wait()
        tally.counts["resumed with other keys"] += 1
        tally.counts["with another ZeRO stage, offload or number of ranks"] += (
            any("deepspeed" in key for key in keys) or ranks != job.ranks
        )
        log = (folder / "log.txt").read_text()
        if any(statuses) or not is_finished(folder / "run") or "Traceback" in log:
            tally.lost.append(f"{job.name}, {what}: ended with {statuses} ({folder})")
        elif {"resumed"} != {line["kind"] for line in read_jsonl(folder / "run" / "changes.jsonl")}:
            tally.lost.append(f"{job.name}, {what}: changes.jsonl ({folder})")
        else:
            found = read_jsonl(folder / "run" / "metrics.jsonl")
            same = all(key.keys() == {"evaluation"} for key in keys) and ranks == job.ranks
            different = _different(found, expected, len(expected) if same else cut)
            tally.counts["the same numbers"] += not different
            if different:
                tally.lost.append(f"{job.name}, {what}: {different} ({folder})")
        tidy(folder, tally)
    return tally


def _memory_keys(bench: Bench) -> list[dict[str, Any]]:
    job, rng = bench.job, bench.rng
    keys: list[dict[str, Any]] = [
        {job.method: {"micro_batch_size": rng.choice((1, 4))}},
        {"model": {"gradient_checkpointing": True}},
        {"model": {"attn_implementation": "eager"}},
        {"evaluation": {"batch_size": 1}},
        {"evaluation": {"max_samples": 3, "every_steps": 3}},
    ]
    if job.optimizer == "adamw":
        stage = rng.choice([stage for stage in range(4) if stage != job.zero_stage])
        # Twice as likely, for the most that can go wrong.
        keys += 2 * [{"deepspeed": {"zero_stage": stage, "offload": bool(stage) and rng.random() < 0.5}}]
    return keys


def _unfinish(run: Path, step: int) -> None:
    """Cut a run's folder back to the checkpoint of a step, as if it had been killed after it."""
    for folder in checkpoint_folders(run):
        if step_of(folder) > step:
            shutil.rmtree(folder)
    for path in (run / "eval.json", *run.glob("predictions_after*")):
        path.unlink()


def _different(found: list[dict[str, Any]], expected: list[dict[str, Any]], exact: int) -> str:
    """Where metrics differ: the first `exact` steps must be equal, the next one up to rounding."""
    if [line["step"] for line in found] != [line["step"] for line in expected]:
        return f"steps {[line['step'] for line in found]}"
    for k, (ours, theirs) in enumerate(zip(found[: exact + 1], expected, strict=False)):
        for key in NUMBERS:
            a, b = ours.get(key), theirs.get(key)
            if a == b or (k >= exact and math.isclose(a, b, rel_tol=TOLERANCE, abs_tol=1e-4)):
                continue
            return f"step {k + 1}: {key} {a}, expected {b}"
    return ""


def extend(bench: Bench, number: int) -> Tally:
    """Finished runs with more steps."""
    done = bench.folder / "whole" / "run"

    def copy(folder: Path) -> dict[str, Any]:
        shutil.copytree(bench.folder / "whole", folder)
        return LONGER

    def check(folder: Path) -> str:
        kept, scores = folder / "run" / f"eval-step-{STEPS}.json", read_json(done / "eval.json")
        return "" if read_json(kept) == scores else f"{kept.name} is not the eval.json of the shorter run"

    return _interrupted(bench, number, "extended", [copy], check)


def fork(bench: Bench, number: int) -> Tally:
    """Forks of a finished run with another learning rate, reward or data."""
    source = bench.folder / "whole" / "run"
    before = _digest(source)
    middle = checkpoint_folders(source)[0]
    ways: list[dict[str, Any]] = [
        {"fork": str(middle), "optimizer": {"lr": 3e-3}},
        {"fork": str(middle), "data": {"max_train_samples": 32}},
    ]
    if bench.job.method == "ppo":
        ways.append({"fork": str(middle), "reward": CALM["reward"]})
    bench.rng.shuffle(ways)

    def check(folder: Path) -> str:
        return "" if _digest(source) == before else "the source has changed"

    return _interrupted(bench, number, "forked", [lambda folder, way=way: way for way in ways], check)


def _digest(run: Path) -> dict[str, str]:
    files = sorted(path for path in run.rglob("*") if path.is_file() and path.name != "run.lock")
    return {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _ended(run: Path, expected: dict[str, Any]) -> bool:
    """Whether a run is finished with the expected number of steps; one to extend is finished with fewer."""
    steps = expected["scores"]["training"]["steps"]
    return is_finished(run) and read_json(run / "eval.json")["training"]["steps"] == steps


def _interrupted(
    bench: Bench,
    number: int,
    kind: str,
    ways: list[Callable[[Path], dict[str, Any]]],
    check: Callable[[Path], str],
) -> Tally:
    """Runs that go on with changes, killed or stopped once or twice, and compared with the undisturbed ones.

    Args:
        ways: each prepares a folder and returns the recipe's sections.
        check: what is wrong with a folder besides.
    """
    tally, expected, changes = Tally(), {}, {}
    for trial in range(number):
        n = trial % len(ways)
        if n not in expected:
            name = f"{kind}-{n}"
            folder = bench.undisturbed(name, **ways[n](bench.folder / name))
            expected[n], changes[n] = fingerprint(folder / "run"), int((folder / "changes").read_text())
            assert differences(bench.whole, expected[n]), "the change has no effect"
        folder = bench.folder / f"{kind}-trial-{trial}"
        more = ways[n](folder)
        recipe = bench.job.recipe(folder, bench.model, **more)
        (folder / "log.txt").unlink(missing_ok=True)
        tally.counts[kind] += 1
        for _ in range(bench.rng.randint(1, 2)):
            if bench.rng.random() < 0.75:
                if not bench.strike(recipe, tally, changes[n]):
                    break
                continue
            running = start(recipe, bench.job)
            time.sleep(bench.rng.uniform(0.3, bench.seconds))
            running.poll()
            running.send(signal.SIGTERM)
            statuses = running.wait()
            tally.counts["stops"] += 1
            if any(statuses):
                tally.lost.append(f"{bench.job.name}, {kind}: a stop ended with {statuses} ({folder})")
            if _ended(folder / "run", expected[n]):
                break
        what = f"{kind} with {more}"
        if _ended(folder / "run", expected[n]) or bench.resume(recipe, tally, what):
            bench.compare(folder, tally, what, expected[n])
            if wrong := check(folder):
                tally.lost.append(f"{bench.job.name}, {what}: {wrong} ({folder})")
        tidy(folder, tally)
    return tally
