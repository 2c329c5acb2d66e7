"""Paths in a recipe. `~` is the home folder. A relative path means the same from any working directory.

In a recipe file it is relative to the folder of that file; on the command line to the working directory, as in a shell.
`output_dir` is relative to the working directory in both, since runs/ is there. The recipe in a run folder holds
absolute paths.
"""

from __future__ import annotations

import filecmp
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HUB = "hub"  # value of data.root: download from the hub
RUN_FILE = "versions.json"  # beside a run folder's recipe.yaml
_HUB_NAME = re.compile(r"[\w.-]+(?:/[\w.-]+)?")


def is_hub_name(path: str) -> bool:
    """Whether a path has the form NAME or OWNER/NAME."""
    return _HUB_NAME.fullmatch(path) is not None and not path.startswith(".")


# Key -> whether a value of it is a path, not a name.
KEYS: dict[str, Callable[[str], bool]] = {
    "fork": lambda value: True,
    "model.path": lambda value: not value.startswith("pip:"),
    "model.adapter": lambda value: True,
    "ppo.critic_from": lambda value: value not in ("auto", "none"),
    "data.root": lambda value: value != HUB,
    "reward": lambda value: value.endswith(".py"),
    "deepspeed.config": lambda value: True,
}
TASKS = (
    "data.tasks",
    "encoder.intermediate",
)  # hold files of own tasks, which are relative to data.root if that is set

Fault = tuple[str, str]  # key and message


class PathResolver:
    """Makes the paths of raw recipes absolute, in place.

    Args:
        folder: that relative paths are relative to.

    Attributes:
        faults: paths that may mean a file in the working directory.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.cwd = str(folder), os.getcwd()
        self.faults: list[Fault] = []

    def resolve(self, raw: dict[str, Any]) -> None:
        """The values of `KEYS`; of `output_dir` only `~`."""
        if isinstance(raw.get("output_dir"), str):
            raw["output_dir"] = os.path.expanduser(raw["output_dir"])
        for key, is_path in KEYS.items():
            section, name = _at(raw, key)
            value = section.get(name) if section is not None else None
            if section is not None and isinstance(value, str) and value and is_path(value):
                section[name] = self._resolved(key, value)

    def resolve_files(self, raw: dict[str, Any], key: str) -> None:
        """The files of the own tasks at one of `TASKS`, unless data.root is a folder."""
        data = raw.get("data")
        if isinstance(data, dict) and data.get("root") not in (None, HUB):
            return
        for place, files in _files(raw, key):
            for split, value in files.items():
                if isinstance(value, str) and value:
                    files[split] = self._resolved(f"{place}.{split}", value)

    def _resolved(self, key: str, value: str) -> str:
        if "://" in value:  # no path: its form must stay, by which a password in it is found
            return value
        expanded = os.path.expanduser(value)
        if expanded.startswith("~"):
            self.faults.append((key, f"{key}: {value!r}: there is no such user; write ./{value} for a name with ~"))
        found = os.path.normpath(os.path.join(self.folder, expanded))
        exists = os.path.exists(found)
        if self.folder != self.cwd and not os.path.isabs(expanded) and expanded.split("/")[0] not in (".", ".."):
            self._compare(key, value, found, exists)
        return value if key == "model.path" and is_hub_name(value) and not exists else found

    def _compare(self, key: str, value: str, found: str, exists: bool) -> None:
        """A fault for a relative path that names another file in the working directory."""
        other = os.path.normpath(os.path.join(self.cwd, value))
        if not os.path.exists(other) or (exists and _is_same(found, other)):
            return
        relative = os.path.relpath(other, self.folder)
        if exists:
            text = (
                f"is relative to the recipe's folder ({found}), and {other} exists too, with other content; write "
                f"./{value} for the first, or {relative} for the second"
            )
        else:
            text = f"is relative to the recipe's folder, and {found} does not exist; for {other} write {relative}"
        given = f", or give {key}={value} on the command line" if key in KEYS and not exists else ""
        self.faults.append((key, f"{key}: {value!r} {text}{given}"))


def _at(raw: dict[str, Any], key: str) -> tuple[dict[str, Any] | None, str]:
    """The section that holds a dotted key, or None, and the key's last part."""
    *parents, name = key.split(".")
    section: Any = raw
    for parent in parents:
        section = section.get(parent) if isinstance(section, dict) else None
    return (section if isinstance(section, dict) else None), name


def _files(raw: dict[str, Any], key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The place and content of `source.files` of each own task at `key`."""
    section, name = _at(raw, key)
    value = section.get(name) if section is not None else None
    entries = enumerate(value) if isinstance(value, list) else [(None, value)]
    for index, task in entries:
        source = task.get("source") if isinstance(task, dict) and task.get("suite", "own") == "own" else None
        files = source.get("files") if isinstance(source, dict) else None
        if isinstance(files, dict):
            yield f"{key}{'' if index is None else f'[{index}]'}.source.files", files


def _is_same(one: str, other: str) -> bool:
    """Whether two paths are the same folder, or files with the same content."""
    try:
        return os.path.samefile(one, other) or (
            os.path.isfile(one) and os.path.isfile(other) and filecmp.cmp(one, other, shallow=False)
        )
    except OSError:
        return False
