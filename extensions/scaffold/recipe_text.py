"""The text of a recipe: every line with its comment."""

from __future__ import annotations

from functools import lru_cache
from importlib.resources import files
from typing import Any

import jinja2
import yaml


def scalar(value: Any) -> str:
    """A value as one line of YAML that reads back as the same value, whatever its text looks like."""
    if isinstance(value, (list, dict)):
        return _dumped(value, default_flow_style=True)
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return f"{value:.1f}"
    if isinstance(value, float) and 1e-5 <= abs(value) < 1:
        return f"{value:.6f}".rstrip("0") if abs(value) >= 1e-3 else f"{value:.1e}".replace("e-0", "e-")
    text = _dumped(value)
    if isinstance(value, str) and (len(text.splitlines()) > 1 or value != value.strip()):
        return _dumped(value, default_style='"')
    return text


def _dumped(value: Any, **style: Any) -> str:
    text: str = yaml.safe_dump(value, allow_unicode=True, width=10**9, sort_keys=False, **style)
    return text.removesuffix("\n").removesuffix("\n...")


def comment(value: Any) -> str:
    """A text in one line, for a comment or a message."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())


@lru_cache(maxsize=1)
def _template() -> jinja2.Template:
    environment = jinja2.Environment(  # nosec B701 # YAML, escaped by the filter; no HTML
        trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )
    environment.filters |= {"yaml": scalar, "comment": comment, "quoted": lambda value: repr(str(value))}
    return environment.from_string(files(__package__).joinpath("recipe.yaml.j2").read_text(encoding="utf-8"))


def recipe_text(**values: Any) -> str:
    """The recipe; recipe.yaml.j2 shows the values that it needs."""
    return _template().render(values)
