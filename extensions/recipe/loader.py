"""From a YAML file and overrides to a validated recipe; every error at once."""

from __future__ import annotations

import copy
import difflib
import itertools
from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from extensions.common.errors import UserError
from extensions.recipe.checks import cross_field_errors
from extensions.recipe.paths import RUN_FILE, TASKS, PathResolver
from extensions.recipe.schema import Recipe, all_keys
from extensions.recipe.secrets import hidden, without_secrets
from extensions.recipe.yaml_text import parse_yaml
from extensions.tasks import Task

MAX_DEPTH = 20  # parts of an overridden key; real keys have at most 5
_REQUIRED: dict[str, Any] = {"name": "x", "model": {"path": "x"}, "data": {"tasks": ["cola"]}}  # keys without a default

Place = tuple[int | str, ...]  # keys and list indices from the top


def load_recipe(
    path: str | Path, overrides: Sequence[str] = (), method: str | None = None, folder: Path | None = None
) -> Recipe:
    """Read, override and validate a recipe.

    Args:
        path: the YAML file.
        overrides: `key.sub=value` strings; values are YAML.
        method: of the launch script; None: the recipe's own.
        folder: that the file's relative paths are relative to (`extensions.recipe.paths`); None: the file's folder.

    Raises:
        UserError: lists every error, one per line, or says that the recipe is for another method. What looks like an
            access token is an error, and is never shown.
    """
    try:
        return _load(Path(path), overrides, method, folder)
    except UserError as error:
        message = hidden(str(error))
    raise UserError(message)  # outside the handler: the chained errors hold what is hidden here


def _load(path: Path, overrides: Sequence[str], method: str | None, folder: Path | None) -> Recipe:
    raw, lines = _read(path)
    here = PathResolver(Path.cwd())
    # A run folder's recipe has absolute paths; those of older runs are relative to the working directory.
    in_run = (path.parent / RUN_FILE).is_file()
    of_file = here if in_run else PathResolver((folder or path.parent).resolve())
    of_file.resolve(raw)
    given = [_apply(raw, override, here) for override in overrides]
    of_file.faults = [
        (key, text) for key, text in of_file.faults if not any(f"{key}.".startswith(f"{g}.") for g in given)
    ]
    for key in TASKS:
        resolver = here if any(f"{key}.".startswith(f"{one}.") for one in given) else of_file
        resolver.resolve_files(raw, key)
    if method is not None and raw.setdefault("method", method) != method:
        raise UserError(
            f"{path}: method: {raw['method']!r} in the recipe, but launch/{method}.sh was started; run "
            f"launch/{raw['method']}.sh, or remove the key: the script sets it"
        )
    recipe, errors = _validate(raw)
    errors += [*of_file.faults, *(here.faults if of_file is not here else ())]
    if recipe is None or errors:
        count = f"{len(errors)} error{'s' if len(errors) > 1 else ''}"
        listed = []
        for key, message in errors:
            line = lines.get(key) or lines.get(key.split("[")[0])
            listed.append(f"\n  line {line}: {message}" if line else f"\n  {message}")
        raise UserError(f"{path}: {count} in the recipe{''.join(listed)}")
    return recipe


def _read(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The content of a recipe file, and the line of each dotted key."""
    try:
        raw, lines = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except FileNotFoundError:
        raise UserError(f"{path}: no such recipe; the project's recipes are in recipes/") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error})") from error
    except ValueError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected keys and values (name:, model:, data:), got {type(raw).__name__}")
    return raw, lines


def _apply(raw: dict[str, Any], override: str, here: PathResolver) -> str:
    """Set the key of a `key.sub=value` string, its paths relative to the working directory. Returns the key."""
    where = f"override {hidden(override)[:200]!r}"
    key, equals, text = override.partition("=")
    *parents, last = key.strip().split(".")
    if not equals or not key.strip():
        raise UserError(f"{where}: expected key.sub=value, for example ppo.batch_size=8")
    if len(parents) > MAX_DEPTH:
        raise UserError(f"{where}: no key has that many parts")
    try:
        value = parse_yaml(text, "value")[0] if text else None
    except ValueError as error:
        raise UserError(f"{where}: the value is not valid YAML ({error})") from error
    part: dict[str, Any] = {last: value}
    here.resolve(reduce(lambda below, parent: {parent: below}, reversed(parents), part))
    section: Any = raw
    for parent in parents:
        if section.get(parent) is None:
            section[parent] = {}
        section = section[parent]
        if not isinstance(section, dict):
            raise UserError(f"{where}: {'.'.join(parents)} holds a value, not keys")
    section[last] = part[last]
    return ".".join([*parents, last])


def _validate(raw: dict[str, Any]) -> tuple[Recipe | None, list[tuple[str, str]]]:
    """The recipe, or None and every error as (dotted key, message).

    Cross-field rules need a recipe whose single fields are valid, so invalid keys are removed and the rest is
    validated again.
    """
    raw, errors = without_secrets(raw)
    secret = {key for key, _ in errors}  # already reported
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        items = error.errors()
        errors += [(_dotted(item["loc"]), _message(item)) for item in items if _dotted(item["loc"]) not in secret]
        try:
            recipe = Recipe.model_validate(_without(raw, [item["loc"] for item in items]))
        except ValidationError:
            return None, errors
    errors += [("", message) for message in cross_field_errors(recipe)]
    return None if errors else recipe, errors


def _without(raw: dict[str, Any], places: Sequence[Place]) -> dict[str, Any]:
    """A copy of `raw` without the values at `places` (an invalid list item takes its list along), required keys set."""
    repaired = copy.deepcopy({key: value for key, value in raw.items() if isinstance(key, str)})
    for place in places:
        keys = list(itertools.takewhile(lambda step: isinstance(step, str), place))
        section: Any = repaired
        for key in keys[:-1]:
            section = section.get(key) if isinstance(section, dict) else None
        if keys and isinstance(section, dict):
            section.pop(keys[-1], None)
    for key, value in _REQUIRED.items():
        given = repaired.setdefault(key, value)
        if isinstance(value, dict) and isinstance(given, dict):
            repaired[key] = value | given
    return repaired


def _dotted(place: Place) -> str:
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in place).removeprefix(".")


def _message(item: Any) -> str:
    """One of pydantic's errors in the terms of a recipe."""
    key, kind, value = _dotted(item["loc"]), item["type"], item["input"]
    if kind == "extra_forbidden":
        name, allowed = str(item["loc"][-1]), _keys_at(item["loc"][:-1])
        elsewhere = [key for key in all_keys() if key.rpartition(".")[2] == name and name not in ("name", "path")]
        near = elsewhere or difflib.get_close_matches(name, allowed, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        return f"{key}: unknown key{hint} Allowed here: {', '.join(allowed)}"
    if kind == "missing":
        return f"{key}: missing; it has no default"
    text = str(item["msg"]).removeprefix("Value error, ")
    if isinstance(value, (dict, list)) and kind == "value_error":
        return f"{key}: {text}"
    shown = repr(value)
    return f"{key}: got {shown if len(shown) < 80 else shown[:77] + '...'}; {text[0].lower() + text[1:]}"


def _keys_at(place: Place) -> list[str]:
    """Valid keys of the section at `place`."""
    section: type[BaseModel] = Recipe
    for step in place:
        field = None if isinstance(step, int) else section.model_fields.get(step)
        kinds = [Task] if isinstance(step, int) else [field.annotation, *get_args(field.annotation)] if field else []
        section = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), section)
    return list(section.model_fields)
