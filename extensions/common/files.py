"""Atomic, durable writes of text, JSON and JSONL.

After a crash or on a full disk, a file written by `write_*` has either its old content or all of its new content.
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
    """Replace a file atomically; UTF-8."""
    write_bytes(path, content.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file atomically and durably. Raises OSError if the write fails; the old file is then unchanged."""
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
    """Replace a JSON file atomically; NaN and Inf become null."""
    write_text(path, json.dumps(_finite(content), indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Replace a JSONL file atomically, one record per line."""
    write_text(path, jsonl(records))


def jsonl(records: Sequence[dict[str, Any]]) -> str:
    """Records as JSONL, one per line; NaN and Inf become null."""
    return "".join(json.dumps(_finite(record), ensure_ascii=False) + "\n" for record in records)


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        UserError: the file is not valid JSON.
        OSError: the file is missing or unreadable.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: damaged, not valid JSON ({error})") from error


def read_jsonl(path: Path, skip_damaged: bool = False) -> list[dict[str, Any]]:
    """The records of a JSONL file. A last line without a line feed, left by a crash, is dropped.

    Args:
        skip_damaged: skip lines that are not JSON objects, which a power loss may leave.

    Raises:
        UserError: a line is not a JSON object.
        OSError: the file is missing or unreadable.
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


def filter_jsonl(path: Path, wanted: Callable[[dict[str, Any]], bool]) -> None:
    """Drop unwanted records and incomplete lines of a JSONL file; the other lines are kept byte for byte."""
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
    """Move the files of `source` into `target`, each atomically, and remove `source`."""
    target.mkdir(parents=True, exist_ok=True)
    apply_umask(source)
    for path in sorted(source.rglob("*")):
        goal = target / path.relative_to(source)
        if path.is_dir():
            goal.mkdir(exist_ok=True)
        else:
            sync_file(path)
            path.replace(goal)
    sync_folder(target)
    shutil.rmtree(source)


def apply_umask(path: Path) -> None:
    """Give a file, or all files of a folder, the permissions of the user's umask.

    safetensors 0.8 writes files that only their owner can read.
    """
    mask = os.umask(0o077)  # reading the umask sets it
    os.umask(mask)
    for one in [path] if path.is_file() else path.rglob("*"):
        if one.is_file():
            one.chmod(0o666 & ~mask)


class JsonlAppender:
    """Appends records to a JSONL file. Records that a full disk rejects are buffered and written with the next ones.

    Except during a write, the file always ends with a complete line.
    """

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        self._size = os.fstat(self._file).st_size
        self._pending = b""

    def append(self, records: Sequence[dict[str, Any]]) -> None:
        """Add records. Raises OSError if the write fails; the records stay pending."""
        self._pending += jsonl(records).encode("utf-8", "backslashreplace")
        self.flush()

    def flush(self) -> None:
        done = 0
        try:
            while done < len(self._pending):
                done += os.write(self._file, self._pending[done:])
        except OSError:
            os.ftruncate(self._file, self._size)  # drops the incomplete line
            raise
        self._size, self._pending = self._size + done, b""

    def sync(self) -> None:
        """Flush to the disk. Raises OSError if that fails."""
        self.flush()
        os.fsync(self._file)

    def close(self) -> None:
        try:
            self.flush()
        finally:
            os.close(self._file)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk; without it, a power loss may undo a rename."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:  # not supported by some network file systems
        pass
    finally:
        os.close(handle)


def sync_file(path: Path) -> None:
    """Flush the content of a file to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def unused_path(path: Path, mark: str) -> Path:
    """`path` if it is free, else the first free one of `path` + mark + 1, 2, ..."""
    number, free = 0, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}{mark}{number}")
    return free


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _finite(value: Any) -> Any:
    """A value with NaN and Inf, which JSON lacks, replaced by null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, (list, tuple)) else value
