"""Resume points of a run: written whole or not at all, checked before they are trusted.

A checkpoint is a folder of the run folder:

checkpoints/step-N/
    run.json            where the run stood: step, best validation, what the trainer keeps
    mp_rank_*.pt, ...   DeepSpeed's: weights, optimizer, schedule
    random-K.pt         states of the random generators of rank K
    best.safetensors    trained parameters at the best validation, if there is one
    manifest.json       size and sha256 of every other file; written last

It has another name (`writing-N`) until all of it is on the disk. One that does not agree with its manifest is renamed
to `damaged-step-N`, and the one before it is used.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from extensions.common.errors import UserError
from extensions.common.files import apply_umask, read_json, sha256, sync_file, sync_folder, write_json
from extensions.distributed.openrlhf import CHECKPOINT_GLOBALS, TorchCheckpointEngine, deepspeed
from extensions.distributed.strategy import Strategy

MANIFEST = "manifest.json"


@dataclass
class SavedCheckpoint:
    """A complete checkpoint that agrees with its manifest."""

    folder: Path
    state: dict[str, Any]  # run.json
    best: dict[str, Tensor] | None


class CheckpointFiles(TorchCheckpointEngine):
    """What DeepSpeed writes and reads checkpoints by: as its own, but on the disk when it says so, and no code in it.

    Notes which files this rank wrote, and the first error instead of raising it: a rank that left DeepSpeed's
    `save_checkpoint` early would leave the others waiting in its barriers.

    Args:
        trained: names of the trained parameters; others are left out. DeepSpeed leaves out what is frozen, but under
            one name only where a model's head is its embedding (0.19.6): most of a checkpoint would be that matrix.
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
        """Attempt to have `do` write a file, and bring it to the disk."""

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
        """`do`, unless an earlier attempt of this checkpoint failed."""
        if self.error is None:
            try:
                do()
            except OSError as error:
                self.error = error
            except (RuntimeError, SafetensorError) as error:  # what the disk says, in the words of torch's writer
                self.error = OSError(str(error))


def files_of(engine: deepspeed.DeepSpeedEngine) -> CheckpointFiles:
    """What an engine writes and reads checkpoints by; put there the first time."""
    if not isinstance(engine.checkpoint_engine, CheckpointFiles):
        engine.checkpoint_engine = CheckpointFiles(
            {name for name, p in engine.module.named_parameters() if p.requires_grad}
        )
        # DeepSpeed would copy a script for users there, unguarded against a full disk (0.19.6).
        engine._copy_recovery_script = lambda save_path: None
    return engine.checkpoint_engine


def write_rank(engine: deepspeed.DeepSpeedEngine, folder: Path, rank: int) -> None:
    """Write a rank's part: the engine's, and its random generators. `files_of` knows the files and the first error."""
    # DeepSpeed's barriers are passed on every rank, whatever happened to a file.
    engine.save_checkpoint(str(folder.parent), tag=folder.name, save_latest=False, exclude_frozen_parameters=True)
    files_of(engine).save(random_state(), str(folder / f"random-{rank}.pt"))


def read_rank(engine: deepspeed.DeepSpeedEngine, folder: Path, rank: int) -> None:
    """Put back what `write_rank` wrote."""
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
        keep: how many of the newest stay.
    """

    def __init__(self, root: Path, strategy: Strategy, engine: deepspeed.DeepSpeedEngine, keep: int) -> None:
        self.root, self.strategy, self.engine, self.keep = root / "checkpoints", strategy, engine, keep
        self.ranks = strategy.world_size
        self.files = files_of(engine)

    # ------------------------------------------------------------------------------------------------- writing

    def save(
        self, step: int, state: Mapping[str, Any], best: dict[str, Tensor] | None, best_step: int | None
    ) -> str | None:
        """Write a checkpoint, then forget old ones but that of the best validation, if there was one.

        Returns what a rank's disk refused; then nothing has changed, and the checkpoints before it are as they were.
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
        """What each rank has to write. Returns entries of files that `self.files` has not written."""
        write_rank(self.engine, folder, self.strategy.rank)
        return {}

    def _read_parts(self, folder: Path) -> None:
        """Put back what `_write_parts` wrote."""
        read_rank(self.engine, folder, self.strategy.rank)

    def _make(self, folder: Path) -> None:
        for left in self.root.glob("writing-*"):  # of a run that was killed there
            shutil.rmtree(left)
        folder.mkdir(parents=True)

    def _finish(self, folder: Path, step: int, entries: dict[str, Any]) -> None:
        write_json(folder / MANIFEST, {"step": step, "ranks": self.ranks, "files": entries})
        final, old = self.root / f"step-{step}", self.root / f"replaced-{step}"
        if final.exists():  # of a session that stopped before the validation of this step
            final.rename(old)
        folder.rename(final)
        sync_folder(self.root)
        shutil.rmtree(old, ignore_errors=True)

    def _agree(self) -> str | None:
        """The first error of any rank, on every rank."""
        errors = self.strategy.gather(str(self.files.error) if self.files.error is not None else None)
        return next((error for error in errors if error is not None), None)

    def _prune(self, best_step: int | None) -> None:
        for path in folders(self.root.parent)[: -self.keep]:
            if _step(path) != best_step:
                shutil.rmtree(path, ignore_errors=True)

    # ------------------------------------------------------------------------------------------------- reading

    def newest(self, warn: Callable[[str], None]) -> SavedCheckpoint | None:
        """The newest checkpoint that is whole; those that are not are told and renamed. None where there is none."""
        found: str | None = None
        if self.strategy.is_rank_0():
            for folder in reversed(folders(self.root.parent)):
                problems = check(folder)
                if not problems:
                    found = str(folder)
                    break
                aside = folder.with_name(_free(folder.parent, f"damaged-{folder.name}"))
                folder.rename(aside)
                warn(f"{folder} is damaged and is not used (now {aside.name}): {'; '.join(problems)}")
        found = self.strategy.gather(found)[0]
        if found is None:
            return None
        folder = Path(found)
        best = folder / "best.safetensors"
        return SavedCheckpoint(folder, read_json(folder / "run.json"), load_file(best) if best.exists() else None)

    def load(self, checkpoint: SavedCheckpoint, warn: Callable[[str], None]) -> None:
        """Put weights, optimizer, schedule and random generators back.

        Raises:
            UserError: it was written by another number of ranks, and its parts are those of each rank.
        """
        ranks, now = read_json(checkpoint.folder / MANIFEST)["ranks"], self.ranks
        if ranks != now and self.strategy.stage > 0:
            raise UserError(
                f"{checkpoint.folder} was written by {ranks} ranks, this run has {now}, and each rank's file holds its "
                f"share of the optimizer's state (deepspeed.zero_stage: {self.strategy.stage}); start {ranks} ranks, "
                "or choose another output_dir"
            )
        if ranks != now:
            warn(f"{checkpoint.folder} was written by {ranks} ranks, this run has {now}: it goes on, to other bits")
        self._read_parts(checkpoint.folder)


def folders(run: Path) -> list[Path]:
    """Folders of a run's checkpoints, oldest first; whether they are whole is not looked at."""
    found = [path for path in (run / "checkpoints").glob("step-*") if path.name.removeprefix("step-").isdecimal()]
    return sorted(found, key=_step)


def recover(run: Path) -> None:
    """Put back what a kill between the two renames of a replaced checkpoint left under its other name."""
    for old in (run / "checkpoints").glob("replaced-*"):
        final = old.with_name(f"step-{_step(old)}")
        if final.exists():
            shutil.rmtree(old)
        else:
            old.rename(final)


def check(folder: Path) -> list[str]:
    """What is wrong with a checkpoint, by its manifest; nothing where it is whole."""
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


def _step(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def _free(folder: Path, name: str) -> str:
    number, free = 1, name
    while (folder / free).exists():
        number, free = number + 1, f"{name}.{number}"
    return free


# -------------------------------------------------------------------------------------------------- random states


def random_state() -> dict[str, Any]:
    """Of all generators that code in this process may draw from, a user's reward included."""
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
