"""OpenRLHF's own PPO trainer on Ray and vLLM (0.11.2): its options, its checks, its main function, our parts in it.

`openrlhf.cli.train_ppo_ray` has its parser and its checks in its `__main__` block. They are run as they stand there,
found in its source, so they need neither ray nor vllm; then its `train` is called, with parts of ours (`replaced`) in
the place of its own. `tests/ray_backend/test_arguments.py` fails when what is replaced or relied on changes underneath.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import importlib.util
import io
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import extensions.distributed.openrlhf  # noqa: F401 # lets openrlhf be imported without flash-attn
from extensions.common.errors import UserError

VERSION = "0.11.2"  # what the parts below were written against
MODULE = "openrlhf.cli.train_ppo_ray"


def source() -> str:
    """Text of the module, found without importing it: its imports need ray."""
    package = importlib.util.find_spec("openrlhf")
    assert package is not None and package.submodule_search_locations is not None
    return Path(package.submodule_search_locations[0], "cli", "train_ppo_ray.py").read_text(encoding="utf-8")


def _main_block() -> ast.Module:
    block = ast.parse(source()).body[-1]
    assert isinstance(block, ast.If) and "__main__" in ast.unparse(block.test), f"{MODULE} ends otherwise than in 0.11"
    return ast.Module(block.body, type_ignores=[])


def _run_main(arguments: Sequence[str], train: Callable[[Any], None], parser: type[argparse.ArgumentParser]) -> None:
    """Its `__main__` block: parse, check, and call `train`."""
    before, sys.argv = sys.argv, [MODULE, *arguments]
    own = SimpleNamespace(ArgumentParser=parser)  # in the place of the module
    names = {"argparse": own, "datetime": datetime, "train": train, "__name__": "__main__"}
    try:
        exec(compile(_main_block(), MODULE, "exec"), names)  # nosec B102 # a part of an installed package
    except AssertionError as error:
        raise UserError(f"backend: ray: OpenRLHF refuses these settings: {error}") from error
    finally:
        sys.argv = before


def parse(arguments: Sequence[str]) -> Any:
    """The namespace that OpenRLHF's `train` would get.

    Raises:
        UserError: its parser or one of its checks refuses the arguments.
    """
    found: list[Any] = []
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            _run_main(arguments, found.append, argparse.ArgumentParser)
    except SystemExit:
        raise UserError(f"backend: ray: OpenRLHF's parser refuses the arguments: {said.getvalue().strip()}") from None
    return found[0]


def options() -> dict[str, Any]:
    """Every option of its parser and its default."""
    seen: dict[str, Any] = {}

    class Recording(argparse.ArgumentParser):
        def add_argument(self, *names: str, **settings: Any) -> Any:
            action = super().add_argument(*names, **settings)
            if names[0] != "-h":
                seen[names[0]] = action.default
            return action

        def parse_args(self, *args: Any, **kwargs: Any) -> Any:
            raise _Enough

    with contextlib.suppress(_Enough):
        _run_main([], lambda args: None, Recording)
    return seen


class _Enough(Exception):
    """The parser has been seen."""


def train(arguments: Sequence[str], parts: Mapping[str, Any]) -> None:
    """OpenRLHF's `train`, with some of what it uses replaced.

    Args:
        parts: "module:name" -> what stands there meanwhile.
    """
    args = parse(arguments)
    module = importlib.import_module(MODULE)
    with replaced(parts):
        module.train(args)


@contextmanager
def replaced(parts: Mapping[str, Any]) -> Iterator[None]:
    """Put each of `parts` in its place in this process."""
    before: list[tuple[ModuleType, str, Any]] = []
    try:
        for place, value in parts.items():
            module_name, _, name = place.partition(":")
            module = importlib.import_module(module_name)
            before.append((module, name, getattr(module, name)))
            setattr(module, name, value)
        yield
    finally:
        for module, name, value in reversed(before):
            setattr(module, name, value)
