"""Imports a reward file and the modules beside it, and hashes them.

The folder of the file is the last one on sys.path: a neighbour called random.py or datasets.py would otherwise replace
the standard library's or a dependency's module for the rest of the process.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from extensions.common.errors import UserError
from extensions.common.files import sha256

PACKAGE = "reward_folder"  # the folder as a package, for `from . import words`
OURS = ("extensions", "reward_fns")
_last: list[Path] = []  # the reward file imported last, if its folder is on sys.path for it


def import_reward(path: Path) -> ModuleType:
    """Import a reward file; each call reads it and its neighbours again.

    Raises:
        UserError: it raises, or it imports a neighbour by a name that another module has.
    """
    _forget()
    folder = path.resolve().parent
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
        _last.append(path.resolve())
    importlib.invalidate_caches()
    package = ModuleType(PACKAGE)
    package.__path__ = [str(folder)]
    sys.modules[PACKAGE] = package
    name = re.sub(r"\W", "_", path.stem)
    spec = importlib.util.spec_from_file_location(f"{PACKAGE}.{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses in the file look their module up
    failure: BaseException | None = None
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        failure = error
    if hidden := "\n".join(_hidden(path, folder)):
        raise UserError(hidden) from failure
    if failure is not None:
        raise UserError(f"{path}: cannot be imported: {type(failure).__name__}: {failure}") from failure
    return module


def reward_digest(path: Path) -> str:
    """sha256 of a reward file; if it has imported neighbours, of the names and contents of all of them."""
    files = neighbours(path)
    if not files:
        return sha256(path)
    folder = path.resolve().parent
    lines = [f"{file.relative_to(folder)} {sha256(file)}\n" for file in sorted({path.resolve(), *files})]
    return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def neighbours(path: Path) -> list[Path]:
    """Files of the imported modules beside a reward file, and in packages beside it."""
    return sorted({file for file in _neighbour_modules(path).values() if file != path.resolve()})


def _neighbour_modules(path: Path) -> dict[str, Path]:
    """Name -> file. A virtual environment below the folder holds no neighbours, and the project's modules are none."""
    folder = path.resolve().parent
    beside = {entry.name.partition(".")[0] for entry in folder.iterdir()} if folder.is_dir() else set()
    found = {}
    for name, module in list(sys.modules.items()):
        top, file = name.removeprefix(f"{PACKAGE}.").partition(".")[0], getattr(module, "__file__", None)
        if not isinstance(file, str) or top in OURS:
            continue
        if (top in beside or file.startswith(str(folder))) and _is_beside(file, top, folder):
            found[name] = Path(file).resolve()
    return found


def _is_beside(file: str, top: str, folder: Path) -> bool:
    """Whether a file is that of the module `top` in a folder, or is in the package `top` there."""
    found = Path(file).resolve()
    return found.is_relative_to(folder) and found.relative_to(folder).parts[0].partition(".")[0] == top


def _forget() -> None:
    """Undo the last import: another reward's neighbours may have the same names, or may have changed."""
    for path in _last:
        for name in [PACKAGE, *_neighbour_modules(path)]:
            sys.modules.pop(name, None)
        if str(path.parent) in sys.path:
            sys.path.remove(str(path.parent))
    _last.clear()


def _hidden(path: Path, folder: Path) -> Iterator[str]:
    """Imports of the file and its neighbours that found another module than the one beside them."""
    for file in [path, *neighbours(path)]:
        for name in _imported_names(file):
            options = [one for one in (folder / f"{name}.py", folder / name / "__init__.py") if one.is_file()]
            if not options or name in OURS:
                continue
            try:
                spec = importlib.util.find_spec(name)
            except ValueError:  # a module without a specification, such as __main__
                continue
            if spec is not None and spec.origin is not None and not _is_beside(spec.origin, name, folder):
                beside = options[0].relative_to(folder)
                what = "a module of Python" if name in sys.stdlib_module_names else spec.origin
                yield f"{file}: `import {name}` imports {what}, not {beside} beside the reward; rename {beside}"


def _imported_names(file: Path) -> list[str]:
    """Top-level names of the absolute imports of a Python file; empty if it cannot be parsed."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return []
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module)
    return sorted({name.partition(".")[0] for name in names})
