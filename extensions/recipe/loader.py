"""From a YAML file and overrides to a checked recipe; every error at once."""

from __future__ import annotations

import copy
import difflib
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from extensions.common.errors import UserError
from extensions.recipe.checks import cross_field_errors
from extensions.recipe.schema import Recipe, all_keys
from extensions.recipe.secrets import hidden, without_secrets
from extensions.tasks import Task

DEEPEST = 20  # parts of a key; no recipe has as many
MOST_VALUES = 100_000  # of a recipe, aliases written out: some lines of them can stand for billions
NOT_TEXT = re.compile("[\0\ud800-\udfff]")  # YAML can spell it, no file name and no UTF-8 can hold it


class _Loader(yaml.SafeLoader):
    """safe_load that refuses a key given twice, of which PyYAML keeps the last one silently, and what is no value."""

    def get_single_node(self) -> yaml.Node | None:
        node: yaml.Node | None = super().get_single_node()
        if node is not None:
            _count_values(node, {})
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
            kind = node.tag.rpartition(":")[2]
            raise _invalid(node, f"{str(node.value)[:40]!r} is not of the type {kind} ({error})") from error
        if isinstance(value, int) and abs(value) >= 2**63:
            raise _invalid(node, "a whole number of more than 64 bits")
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise _invalid(key, f"key {key.value!r} is given twice")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _invalid(node: yaml.Node, what: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=what, problem_mark=node.start_mark)


def _count_values(node: yaml.Node, counts: dict[int, int | None]) -> int:
    """Values in and below a node, aliases written out.

    Args:
        counts: of the nodes seen before, by id; None while one is being counted.
    """
    if id(node) in counts:
        known = counts[id(node)]
        if known is None:
            raise _invalid(node, "an alias leads back to where it stands")
        return known
    counts[id(node)] = None
    inner = node.value if isinstance(node, yaml.SequenceNode) else []
    if isinstance(node, yaml.MappingNode):
        inner = itertools.chain.from_iterable(node.value)
    elif isinstance(node, yaml.ScalarNode) and NOT_TEXT.search(node.value):
        raise _invalid(node, f"{node.value[:40]!r} holds NUL or half of a surrogate pair, which is not text")
    count = 1 + sum(_count_values(one, counts) for one in inner)
    if count > MOST_VALUES:
        raise _invalid(node, f"more than {MOST_VALUES} values, aliases written out")
    counts[id(node)] = count
    return count


def load_recipe(path: str | Path, overrides: Sequence[str] = (), method: str | None = None) -> Recipe:
    """Read, override and check a recipe.

    Args:
        path: the YAML file.
        overrides: `key.sub=value` strings; values are YAML.
        method: what a launch script does; None leaves it to the recipe.

    Raises:
        UserError: with every error in it, one a line; or the recipe names another method. What looks like an access
            token is an error, and is never shown.
    """
    try:
        return _load(path, overrides, method)
    except UserError as error:
        message = hidden(str(error))
    raise UserError(message)  # out of the handler: the errors behind it show what is hidden


def _load(path: str | Path, overrides: Sequence[str], method: str | None) -> Recipe:
    raw, lines = _read_yaml(Path(path))
    for override in overrides:
        _apply(raw, override)
    if method is not None and raw.setdefault("method", method) != method:
        raise UserError(
            f"{path}: method: {raw['method']!r} in the recipe, but launch/{method}.sh was started; run "
            f"launch/{raw['method']}.sh, or leave method out: the script sets it"
        )
    errors, recipe = _check(raw)
    if recipe is None:
        shown = [f"  {lines.get(key.split('[')[0], '') or ''}{message}" for key, message in errors]
        count = f"{len(errors)} error{'s' if len(errors) > 1 else ''}"
        raise UserError(f"{path}: {count} in the recipe\n" + "\n".join(shown))
    return recipe


def _read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The mapping in a file, and "line N: " of each dotted key."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such recipe; recipes of the project are in recipes/") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error})") from error
    try:
        loader = _Loader(text)
        loader.name = str(path)
        node = loader.get_single_node()
        raw = loader.construct_document(node) if node is not None else None
        lines = dict(_key_lines(node, "", set()))
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path}: not valid YAML: {_problem(error, text)}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected keys and values (name:, model:, data:), got {type(raw).__name__}")
    return raw, lines


def _problem(error: Exception, text: str) -> str:
    """What is wrong in a YAML text, in one line. Where it holds a token, which YAML might show in part: only where."""
    if hidden(text) == text:
        return " ".join(str(error).split())
    mark = getattr(error, "problem_mark", None)
    place = "" if mark is None else f" in line {mark.line + 1}"
    return f"what is wrong{place} is not shown, since the text holds an access token; take that out first"


def _key_lines(node: yaml.Node | None, prefix: str, seen: set[int]) -> list[tuple[str, str]]:
    found = []
    if isinstance(node, yaml.MappingNode) and id(node) not in seen:  # an alias leads to a node seen before
        seen.add(id(node))
        for key, value in node.value:
            name = f"{prefix}{key.value}"
            found.append((name, f"line {key.start_mark.line + 1}: "))
            found += _key_lines(value, f"{name}.", seen)
    return found


def _apply(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise UserError(f"override {hidden(override)!r}: expected key.sub=value, for example ppo.batch_size=8")
    try:
        value = yaml.load(text, _Loader) if text else None  # nosec B506 # a SafeLoader
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(
            f"override {hidden(override)!r}: the value is not valid YAML ({_problem(error, override)})"
        ) from error
    *parents, last = key.strip().split(".")
    if len(parents) > DEEPEST:
        raise UserError(f"override {hidden(override)[:80]!r}: no key has so many parts")
    place = raw
    for parent in parents:
        if isinstance(place, dict) and place.get(parent) is None:
            place[parent] = {}
        place = place[parent] if isinstance(place, dict) else None
    if not isinstance(place, dict):
        raise UserError(f"override {hidden(override)!r}: {'.'.join(parents)} holds a value, not keys")
    place[last] = value


def _check(raw: dict[str, Any]) -> tuple[list[tuple[str, str]], Recipe | None]:
    """Every error of a recipe at once: (key, message).

    Cross-key rules can only be checked on a recipe whose single keys are right, so wrong keys are dropped and the
    rest is checked again.
    """
    raw, errors = without_secrets(raw)
    secret = {key for key, _ in errors}  # reported once
    try:
        recipe = repaired = Recipe.model_validate(raw)
    except ValidationError as error:
        found = [(tuple(item["loc"]), item) for item in error.errors()]
        errors += [(_dotted(place), _message(item, raw)) for place, item in found if _dotted(place) not in secret]
        recipe = None
        try:
            repaired = Recipe.model_validate(_without(raw, [place for place, _ in found]))
        except ValidationError:
            return errors, None
    errors += [("", message) for message in cross_field_errors(repaired)]
    return errors, None if errors else recipe


def _without(raw: Any, places: list[tuple[int | str, ...]]) -> Any:
    """`raw` less the values at `places` (a wrong list item takes its list along), required keys filled in."""
    repaired = copy.deepcopy(raw)
    for place in places:
        keys = list(itertools.takewhile(lambda step: isinstance(step, str), place))
        if not keys:
            continue
        at = repaired
        for step in keys[:-1]:
            at = at.get(step) if isinstance(at, dict) else None
        if isinstance(at, dict):
            at.pop(keys[-1], None)
    repaired = {key: value for key, value in repaired.items() if isinstance(key, str)}
    for key, filler in (("name", "x"), ("model", {"path": "x"}), ("data", {"tasks": ["cola"]})):
        repaired.setdefault(key, filler)
        if isinstance(filler, dict) and isinstance(repaired[key], dict):
            for sub, value in filler.items():
                repaired[key].setdefault(sub, value)
    return repaired


def _dotted(place: tuple[int | str, ...]) -> str:
    text = ""
    for step in place:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
    return text


def _message(item: Any, raw: dict[str, Any]) -> str:
    key = _dotted(item["loc"])
    kind = item["type"]
    if kind == "extra_forbidden":
        allowed = _keys_at(item["loc"][:-1])
        name = str(item["loc"][-1])
        near = _elsewhere(name) or difflib.get_close_matches(name, allowed, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        return f"{key}: unknown key{hint} Allowed here: {', '.join(allowed)}"
    if kind == "missing":
        return f"{key}: missing; it has no default"
    text = str(item["msg"]).removeprefix("Value error, ")
    if isinstance(item["input"], (dict, list)) and kind == "value_error":
        return f"{key}: {text}"
    value = repr(item["input"])
    return f"{key}: got {value if len(value) < 80 else value[:77] + '...'}; {text[0].lower() + text[1:]}"


def _keys_at(place: tuple[int | str, ...]) -> list[str]:
    """Valid keys of the section at `place`."""
    section: Any = Recipe
    for step in place:
        if isinstance(step, int):
            section = Task
            continue
        field = section.model_fields.get(step) if isinstance(section, type) and issubclass(section, BaseModel) else None
        if field is None:
            return []
        candidates = [field.annotation, *get_args(field.annotation)]
        section = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), section)
    return list(section.model_fields)


def _elsewhere(name: str) -> list[str]:
    """Full names of keys elsewhere in the recipe that end as the unknown one does; `name` itself is no help."""
    return [key for key in all_keys() if key.rpartition(".")[2] == name and name not in ("name", "path")]
