"""Which splits a task has, and where their files are: in a local folder, or on the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from extensions.common.errors import UserError
from extensions.recipe.paths import HUB
from extensions.tasks import SPLITS, Hub, Task


class AbsentSplit(UserError):
    """The hub's data set lacks the split."""


def has_split(task: Task, split: str) -> bool:
    """Whether a task has a split: generated, in a file, drawn from the training file, or on the hub.

    Raises:
        UserError: the rows of a user's own task are on the hub, which cannot be read.
    """
    source = task.source
    if source.generator is not None or split in source.files or source.is_held_out(split):
        return True
    return task.suite == "own" and source.hub is not None and _own_is_on_hub(task.model_dump_json(), split)


def is_labelled(task: Task, split: str) -> bool:
    return has_split(task, split) and split not in task.source.unlabelled


def is_present(task: Task, split: str, root: str | None) -> bool:
    """Whether the files of a split exist.

    Raises:
        UserError: `root` is the hub, which cannot be read.
    """
    if not has_split(task, split) or task.source.generator is not None:
        return has_split(task, split)
    if root == HUB and task.suite != "own":
        return _on_hub(task, split)
    split = "train" if task.source.is_held_out(split) else split
    return split not in task.source.files or find_files(task, split, None if root == HUB else root) is not None


def check_trainable(tasks: Sequence[Task]) -> None:
    """Raise UserError if none of the tasks has a training split."""
    if not any(has_split(task, "train") for task in tasks):
        names = ", ".join(task.name for task in tasks)
        raise UserError(f"data.tasks: {names} can only be evaluated; add a task that has a training split")


def files_of(task: Task, split: str, root: str | None) -> tuple[list[Path], bool]:
    """The files of a split, and whether they are the hub's parquet files.

    Raises:
        UserError: the task has no such split, or its files do not exist.
    """
    own, source = task.suite == "own", task.source
    if split not in source.files:
        if own and source.hub is not None:
            return download(task, split), True
        drawn = f", or hold rows out of the training file: source.split: {{{split}: 0.1}}" if split != "train" else ""
        raise UserError(f"task {task.name} has no {split} split: give its file as source.files.{split}{drawn}")
    name = source.files[split]
    if root == HUB and not own:
        return download(task, split), True
    if root == HUB:
        root = None  # a user's own files, in a run with tasks of the hub
    elif root is None and not own:
        raise UserError(
            f"task {task.name} needs data.root, the folder that holds {name} of the official download, for example "
            f"data.root=path/to/{task.suite}; data.root=hub downloads the rows"
        )
    found = find_files(task, split, root)
    if found is None and root is not None and not Path(root).is_dir():
        raise UserError(f"data.root: {root!r} is not a folder; it should hold {name}")
    if found is None:
        path = Path(root or ".") / name
        raise UserError(f"{path}: no such file (task {task.name}, split {split}); check data.root and source.files")
    return found


def find_files(task: Task, split: str, root: str | None) -> tuple[list[Path], bool] | None:
    """The local files of a split, and whether they are the hub's parquet files; None if there are none.

    They are in `root`, or in its folder named after the suite, so that one folder can hold GLUE and SuperGLUE.

    Raises:
        UserError: a name is too long for the file system, or not a pattern.
    """
    for folder in [Path(root or ".")] + ([Path(root) / task.suite] if root is not None else []):
        path = folder / task.source.files[split]
        try:
            if path.is_file():
                return [path], False
            if task.source.hub is not None and (found := _parquet_files(task.source.hub, split, folder)):
                return found, True
        except (OSError, ValueError, NotImplementedError) as error:
            raise UserError(
                f"{path}: cannot be looked up (task {task.name}, split {split}: {error}); check data.root and the "
                "task's source"
            ) from error
    return None


def looked_for(task: Task, root: str) -> list[str]:
    """Where `find_files` looks for the first split of a task: file names, and the hub's as patterns."""
    split = next(split for split in SPLITS if split in task.source.files)
    names = [task.source.files[split], *(task.source.hub.patterns(split) if task.source.hub is not None else ())]
    folders = [Path(root), Path(root) / task.suite]
    return [str(folder / names[0]) for folder in folders] + [str(folders[0] / name) for name in names[1:2]]


def _parquet_files(hub: Hub, split: str, folder: Path) -> list[Path]:
    return next((found for pattern in hub.patterns(split) if (found := sorted(folder.glob(pattern)))), [])


def download(task: Task, split: str) -> list[Path]:
    """Parquet files of a split, from the hub or its local cache.

    Raises:
        AbsentSplit: the data set lacks the split.
        UserError: the hub cannot be read, or the task is not on it.
    """
    from huggingface_hub import snapshot_download

    hub, own = task.source.hub, task.suite == "own"
    if hub is None:
        raise UserError(f"task {task.name} is not on the hub; set data.root to the folder of its files")
    problem: Exception | None = None
    kind = UserError
    for revision in ("main", "refs/convert/parquet"):  # the second is the hub's own conversion of script data sets
        try:
            patterns = list(hub.patterns(split))
            folder = snapshot_download(hub.repo, repo_type="dataset", revision=revision, allow_patterns=patterns)
        except Exception as error:
            problem = error
            continue
        if found := _parquet_files(hub, split, Path(folder)):
            return found
        kind = AbsentSplit
    reason = " ".join(str(problem or "no parquet files there").split())[:300]
    remedy = "the network, or set data.root to a folder with the official download"
    raise kind(
        f"{'source.hub' if own else 'data.root: hub'}, but {hub.repo} could not be read from the hub (task "
        f"{task.name}, split {split}: {reason}). Check "
        + ("the network, hub.config and hub.splits, or give the files as source.files" if own else remedy)
    ) from problem


def _on_hub(task: Task, split: str) -> bool:
    try:
        return bool(download(task, split))
    except AbsentSplit:
        return False


@cache
def _own_is_on_hub(task: str, split: str) -> bool:
    return _on_hub(Task.model_validate_json(task, strict=False), split)
