"""Checkpoints of a run: atomic, durable, and verified before they are used.

checkpoints/step-N/
    run.json            progress: step, best validation, state of trainer and health monitor, scores
    mp_rank_*.pt, ...   DeepSpeed's: weights, optimizer, schedule, for the ZeRO stage and ranks that wrote them
    portable.safetensors the same for any ZeRO stage, offload and number of ranks (`extensions.distributed.portable`)
    random-K.pt         states of the random generators of rank K
    best.safetensors    trained parameters at the best validation, if there is one
    manifest.json       size and sha256 of every other file; written last

The folder is called `writing-N` until all of it is on the disk. One that does not match its manifest is renamed to
`damaged-step-N`, and the checkpoint before it is used.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from extensions.common.errors import UserError
from extensions.common.files import apply_umask, read_json, sha256, sync_file, sync_folder, unused_path, write_json
from extensions.distributed.openrlhf import CHECKPOINT_GLOBALS, TorchCheckpointEngine, deepspeed
from extensions.distributed.optim import recipe_hyperparameters, set_schedule
from extensions.distributed.portable import load_portable_state, portable_state
from extensions.distributed.strategy import Strategy

MANIFEST, PORTABLE = "manifest.json", "portable.safetensors"


@dataclass
class SavedCheckpoint:
    """A complete checkpoint that matches its manifest."""

    folder: Path
    state: dict[str, Any]  # run.json
    best: dict[str, Tensor] | None


class CheckpointFiles(TorchCheckpointEngine):
    """DeepSpeed's checkpoint engine with durable writes, and without code in the files it loads.

    Records the files that this rank wrote, and the first error instead of raising it: a rank that left DeepSpeed's
    `save_checkpoint` early would leave the others waiting in its barriers.

    Args:
        trained: names of the trained parameters; others are not saved. DeepSpeed (0.19.6) skips frozen parameters, but
            only one of the two names of a tied head and embedding, whose matrix would be most of a checkpoint.
    """

    def __init__(self, trained: Container[str]) -> None:
        super().__init__()
        self.trained = trained
        self.begin()

    def begin(self) -> None:
        self.written: list[Path] = []
        self.error: OSError | None = None

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        self.attempt(lambda: Path(path).mkdir(parents=True, exist_ok=exist_ok))

    def save(self, state_dict: Any, path: str) -> None:
        content = dict(state_dict)
        if isinstance(content.get("module"), Mapping):
            content["module"] = {k: v for k, v in content["module"].items() if k in self.trained}
        self.write(Path(path), lambda target: _save(content, target))

    def write(self, path: Path, do: Callable[[Path], object]) -> None:
        """Attempt to write a file by `do`, and flush it to the disk."""

        def attempt() -> None:
            do(path)
            apply_umask(path)
            sync_file(path)
            self.written.append(path)

        self.attempt(attempt)

    def load(self, path: str, map_location: Any = None) -> Any:
        with torch.serialization.safe_globals(CHECKPOINT_GLOBALS):
            return torch.load(path, map_location=map_location, weights_only=True)

    def attempt(self, do: Callable[[], None]) -> None:
        """Call `do`, unless an earlier attempt for this checkpoint failed."""
        if self.error is None:
            try:
                do()
            except OSError as error:
                self.error = error
            except (
                RuntimeError,
                SafetensorError,
            ) as error:  # how their writers report a disk error
                self.error = OSError(str(error))


def files_of(engine: deepspeed.DeepSpeedEngine) -> CheckpointFiles:
    """The checkpoint engine of a DeepSpeed engine, replaced by `CheckpointFiles` on the first call."""
    if not isinstance(engine.checkpoint_engine, CheckpointFiles):
        engine.checkpoint_engine = CheckpointFiles(
            {name for name, p in engine.module.named_parameters() if p.requires_grad}
        )
        # DeepSpeed (0.19.6) would copy a recovery script there, and a full disk would raise in it.
        engine._copy_recovery_script = lambda save_path: None
    return engine.checkpoint_engine


def write_rank(engine: deepspeed.DeepSpeedEngine, folder: Path, rank: int) -> None:
    """Write a rank's part: engine and random generators. `files_of(engine)` has the files and the first error."""
    # Every rank passes DeepSpeed's barriers, also after a failed write.
    engine.save_checkpoint(str(folder.parent), tag=folder.name, save_latest=False, exclude_frozen_parameters=True)
    files_of(engine).save(random_state(), str(folder / f"random-{rank}.pt"))
    write_portable(engine, folder, rank)


def write_portable(engine: deepspeed.DeepSpeedEngine, folder: Path, rank: int) -> None:
    """Write the portable copy of the engine; call it on every rank."""
    tensors, values = portable_state(engine)
    if rank == 0:
        content = {"engine": json.dumps(values)}
        files_of(engine).write(folder / PORTABLE, lambda path: save_file(tensors, path, content))


def read_rank(engine: deepspeed.DeepSpeedEngine, folder: Path, rank: int, portable: bool) -> None:
    """Restore what `write_rank` wrote, but for the hyperparameters, which are the recipe's.

    Args:
        portable: from the portable copy, since DeepSpeed's files are of another ZeRO stage, offload or number of ranks.
    """
    if portable:
        with safe_open(folder / PORTABLE, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 # no mapping
            load_portable_state(engine, tensors, json.loads(file.metadata()["engine"]))
    else:
        with recipe_hyperparameters(engine.optimizer, engine.lr_scheduler):
            engine.load_checkpoint(str(folder.parent), tag=folder.name, load_module_strict=False)
    own = folder / f"random-{rank}.pt"
    if own.exists():
        restore_random_state(files_of(engine).load(str(own)))


def _save(content: Any, path: Path) -> None:
    with path.open("wb") as file:
        torch.save(content, file)


class Checkpoints:
    """The checkpoints of a run. Call all methods on every rank.

    Args:
        root: the run folder.
        keep: number of newest checkpoints that are kept.
    """

    def __init__(self, root: Path, strategy: Strategy, engine: deepspeed.DeepSpeedEngine, keep: int) -> None:
        self.root, self.strategy, self.engine, self.keep = root / "checkpoints", strategy, engine, keep
        self.ranks = strategy.world_size
        self.files = files_of(engine)

    # ------------------------------------------------------------------------------------------------- writing

    def save(
        self, step: int, state: Mapping[str, Any], best: dict[str, Tensor] | None, best_step: int | None
    ) -> str | None:
        """Write a checkpoint, then remove old ones except that of the best validation.

        Returns the error of a rank's disk, or None. After an error the earlier checkpoints are unchanged.
        """
        main, folder = self.strategy.is_rank_0(), self.root / f"writing-{step}"
        self.files.begin()
        if main:
            self.files.attempt(lambda: self._make(folder))
        if (error := self._agree()) is not None:
            return error
        entries = self._write_parts(folder)
        if main:
            self.files.write(folder / "run.json", lambda path: write_json(path, state))
            if best is not None:
                self.files.write(folder / "best.safetensors", lambda path: save_file(best, path))
        self.files.attempt(lambda: entries.update({path.name: file_entry(path) for path in self.files.written}))
        by_rank = self.strategy.gather(entries)
        if main:
            complete = {name: entry for part in by_rank for name, entry in part.items()}
            self.files.attempt(lambda: self._finish(folder, step, complete))
        error = self._agree()
        if main:
            if error is None:
                self._prune(best_step)
            else:
                shutil.rmtree(folder, ignore_errors=True)
        self.strategy.barrier()
        return error

    def _write_parts(self, folder: Path) -> dict[str, Any]:
        """Write the parts of all ranks. Returns manifest entries of files that `self.files` has not written."""
        write_rank(self.engine, folder, self.strategy.rank)
        return {}

    def _read_parts(self, folder: Path, portable: bool) -> None:
        """Restore what `_write_parts` wrote."""
        read_rank(self.engine, folder, self.strategy.rank, portable)

    def _make(self, folder: Path) -> None:
        for left in self.root.glob("writing-*"):  # left by a kill during a write
            shutil.rmtree(left)
        folder.mkdir(parents=True)

    def _finish(self, folder: Path, step: int, entries: dict[str, Any]) -> None:
        write_json(folder / MANIFEST, {"step": step, **self._layout(), "files": entries})
        final, old = self.root / f"step-{step}", self.root / f"replaced-{step}"
        if final.exists():  # from a session that stopped before the validation of this step
            final.rename(old)
        folder.rename(final)
        sync_folder(self.root)
        shutil.rmtree(old, ignore_errors=True)

    def _agree(self) -> str | None:
        """The first error of any rank; the same on every rank."""
        errors = self.strategy.gather(str(self.files.error) if self.files.error is not None else None)
        return next((error for error in errors if error is not None), None)

    def _prune(self, best_step: int | None) -> None:
        for path in checkpoint_folders(self.root.parent)[: -self.keep]:
            if step_of(path) != best_step:
                shutil.rmtree(path, ignore_errors=True)

    # ------------------------------------------------------------------------------------------------- reading

    def newest(self, warn: Callable[[str], None]) -> SavedCheckpoint | None:
        """The newest intact checkpoint, or None. Damaged ones are reported, renamed and skipped."""
        found: str | None = None
        if self.strategy.is_rank_0():
            for folder in reversed(checkpoint_folders(self.root.parent)):
                problems = verify_checkpoint(folder)
                if not problems:
                    found = str(folder)
                    break
                aside = unused_path(folder.with_name(f"damaged-{folder.name}"), ".")
                folder.rename(aside)
                warn(f"{folder} is damaged and is not used (now {aside.name}): {'; '.join(problems)}")
        found = self.strategy.gather(found)[0]
        if found is None:
            return None
        folder = Path(found)
        best = folder / "best.safetensors"
        return SavedCheckpoint(folder, read_json(folder / "run.json"), load_file(best) if best.exists() else None)

    def load(self, checkpoint: SavedCheckpoint, warn: Callable[[str], None]) -> None:
        """Restore weights, optimizer, schedule and random generators.

        Also with another ZeRO stage, offload or number of ranks than those that wrote it; then `warn` gets a line.
        """
        manifest, now = read_json(checkpoint.folder / MANIFEST), self._layout()
        written = {key: manifest.get(key, now[key]) for key in now}
        portable = written["zero"] != now["zero"] or (written["ranks"] != now["ranks"] and self.strategy.stage > 0)
        if written != now:
            if portable and not any(Path(name).name == PORTABLE for name in manifest["files"]):
                raise UserError(
                    f"{checkpoint.folder} was written with {_described(written)} by an older version of this project, "
                    f"without a copy for {_described(now)}; use the old settings, or choose another output_dir"
                )
            other = " and another deepspeed.config" if written["zero"]["config"] != now["zero"]["config"] else ""
            warn(
                f"{checkpoint.folder} was written with {_described(written)}, this run has {_described(now)}{other}: "
                "it resumes, but not bit-for-bit"
            )
        self._read_parts(checkpoint.folder, portable)

    def set_schedule(self, update: int) -> None:
        """Set the schedule to where it is after `update` optimizer steps of this recipe."""
        set_schedule(self.engine.optimizer, self.engine.lr_scheduler, update)

    def _layout(self) -> dict[str, Any]:
        """What DeepSpeed's files depend on, as JSON."""
        return {"ranks": self.ranks, "zero": self.strategy.zero_layout()}


def _described(layout: Mapping[str, Any]) -> str:
    zero, ranks = layout["zero"], layout["ranks"]
    offload = " with offload" if zero["offload"] else ""
    return f"ZeRO stage {zero['stage']}{offload} on {ranks} rank{'' if ranks == 1 else 's'}"


def checkpoint_folders(run: Path) -> list[Path]:
    """Folders of a run's checkpoints, oldest first, intact or not."""
    found = [path for path in (run / "checkpoints").glob("step-*") if path.name.removeprefix("step-").isdecimal()]
    return sorted(found, key=step_of)


def recover_replaced(run: Path) -> None:
    """Restore a checkpoint that a kill between the two renames of its replacement left under another name."""
    for old in (run / "checkpoints").glob("replaced-*"):
        final = old.with_name(f"step-{step_of(old)}")
        if final.exists():
            shutil.rmtree(old)
        else:
            old.rename(final)


def verify_checkpoint(folder: Path) -> list[str]:
    """The problems of a checkpoint by its manifest; none if it is intact."""
    try:
        manifest = read_json(folder / MANIFEST)
        files, step = dict(manifest["files"]), manifest["step"]
        if not isinstance(manifest["ranks"], int) or f"step-{step}" != folder.name or "run.json" not in files:
            raise UserError(f"{MANIFEST}: not the manifest of {folder.name}")
        return [problem for name, entry in files.items() if (problem := _difference(folder / name, entry)) is not None]
    except (OSError, UserError, LookupError, TypeError, ValueError, AttributeError) as error:
        return [f"{MANIFEST} cannot be used ({error})"]


def file_entry(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def _difference(path: Path, entry: Mapping[str, Any]) -> str | None:
    size, digest = entry["bytes"], entry["sha256"]
    try:
        found = path.stat().st_size
        if found != size:
            return f"{path.name} has {found} bytes, not {size}"
        return None if sha256(path) == digest else f"{path.name} has been changed (sha256)"
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror})"


def step_of(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


# -------------------------------------------------------------------------------------------------- random states


def random_state() -> dict[str, Any]:
    """States of all generators that code in this process may use, a user's reward included."""
    _, keys, *rest = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": (torch.from_numpy(np.asarray(keys).copy()), *rest),
        "torch": torch.get_rng_state(),
    }
    if torch.accelerator.is_available():
        state["accelerator"] = torch.get_device_module().get_rng_state()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    keys, *rest = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy(), *rest))
    torch.set_rng_state(state["torch"])
    if "accelerator" in state and torch.accelerator.is_available():
        torch.get_device_module().set_rng_state(state["accelerator"])
