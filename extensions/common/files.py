"""Files that are whole at any instant: text, JSON and JSONL that a crash or a full disk leaves as they were.

What is written by `write_*` is there under its name completely, and on the disk, or not at all.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from extensions.common.errors import UserError


def write_text(path: Path, content: str) -> None:
    """Write whole or not at all."""
    write_bytes(path, content.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write whole or not at all."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_json(path: Path, content: Any) -> None:
    """JSON, whole or not at all; NaN and infinity become null."""
    write_text(path, json.dumps(_finite(content), indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """One record a line, whole or not at all."""
    write_text(path, jsonl(records))


def jsonl(records: Sequence[dict[str, Any]]) -> str:
    """One record a line; NaN and infinity become null."""
    return "".join(json.dumps(_finite(record), ensure_ascii=False) + "\n" for record in records)


def read_json(path: Path) -> Any:
    """The content of a JSON file of a run.

    Raises:
        UserError: it is no JSON.
        OSError: it is not there, or cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged, not valid JSON ({error})") from error


def read_jsonl(path: Path, skip_damaged: bool = False) -> list[dict[str, Any]]:
    """The records of a JSONL file of a run; a last line that a killed run left unfinished is dropped.

    Args:
        skip_damaged: leave out lines that are no objects, as a machine that lost power may have left.

    Raises:
        UserError: a line is no JSON object.
        OSError: the file is not there, or cannot be read.
    """
    records = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            record = json.loads(line) if line else None
            if line and not isinstance(record, dict):
                raise ValueError("expected an object")
        except (ValueError, RecursionError) as error:
            if skip_damaged:
                continue
            raise UserError(f"{path}, line {number}: damaged, not a JSON object ({error})") from error
        if record is not None:
            records.append(record)
    return records


def keep_lines(path: Path, wanted: Callable[[dict[str, Any]], bool]) -> None:
    """Drop the lines of a JSONL file that are not wanted, or no whole JSON objects; the others stay as they are."""
    temporary = path.with_name(f"{path.name}.tmp")
    with path.open("rb") as old, temporary.open("wb") as new:
        for line in old:
            try:
                record = json.loads(line) if line.endswith(b"\n") else None
            except (ValueError, RecursionError):
                continue
            if isinstance(record, dict) and wanted(record):
                new.write(line)
        new.flush()
        os.fsync(new.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def move_into(source: Path, target: Path) -> None:
    """Move the files of a folder into another, each of them whole at any instant, and remove the first."""
    target.mkdir(parents=True, exist_ok=True)
    readable(source)
    for path in sorted(source.rglob("*")):
        goal = target / path.relative_to(source)
        if path.is_dir():
            goal.mkdir(exist_ok=True)
        else:
            sync_file(path)
            path.replace(goal)
    sync_folder(target)
    shutil.rmtree(source)


def readable(path: Path) -> None:
    """Give a file, or the files of a folder, the permissions that the user's umask says, as all other files have.

    The writer of safetensors (0.8) makes its files for their owner alone.
    """
    mask = os.umask(0o077)  # asking sets it
    os.umask(mask)
    for one in [path] if path.is_file() else path.rglob("*"):
        if one.is_file():
            one.chmod(0o666 & ~mask)


class JsonlAppender:
    """A JSONL file that is added to. What a full disk refuses is kept, and written with what comes next.

    The file ends with a whole line at all times but while it is being written to.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        self._size = os.fstat(self._file).st_size
        self._pending = b""

    def append(self, records: Sequence[dict[str, Any]]) -> None:
        """Raises OSError where the disk refuses; the records are kept."""
        self._pending += jsonl(records).encode("utf-8", "backslashreplace")
        self.flush()

    def flush(self) -> None:
        done = 0
        try:
            while done < len(self._pending):
                done += os.write(self._file, self._pending[done:])
        except OSError:
            os.ftruncate(self._file, self._size)  # no half of a line stays
            raise
        self._size, self._pending = self._size + done, b""

    def sync(self) -> None:
        """To the disk itself. Raises OSError where it refuses."""
        self.flush()
        os.fsync(self._file)

    def close(self) -> None:
        try:
            self.flush()
        finally:
            os.close(self._file)


def sync_folder(folder: Path) -> None:
    """Make names in a folder last: without it a rename may be lost with the power, though the files are not."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:  # some network file systems cannot
        pass
    finally:
        os.close(handle)


def sync_file(path: Path) -> None:
    """Bring what was written to the disk itself."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _finite(value: Any) -> Any:
    """JSON has no NaN or infinity: null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, (list, tuple)) else value
