"""Access tokens do not belong into a recipe, which is copied into run folders, logs and model cards: they are refused.

What they look like is known, or they stand in an environment variable whose name says what it holds.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterator
from typing import Any

HIDDEN = "(hidden)"

_FORMS = {
    "a Hugging Face token": re.compile(r"(?<![A-Za-z0-9])hf_[A-Za-z0-9]{20,}"),
    "an API key": re.compile(r"(?<![A-Za-z0-9])sk-[A-Za-z0-9_-]{20,}"),
    "a GitHub token": re.compile(r"(?<![A-Za-z0-9])(?:gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,})"),
    "an AWS access key": re.compile(r"(?<![A-Za-z0-9])AKIA[0-9A-Z]{16}"),
    "a URL with a password": re.compile(r"(?<=://)[^/\s:@]*:[^/\s@]+(?=@)"),
}
_NAMES = ("TOKEN", "API_KEY", "ACCESS_KEY", "SECRET", "PASSWORD")
_SHORTEST = 8  # a shorter value of a variable is more likely a common word than a secret
_ADVICE = (
    "a recipe is copied into run folders and model cards. Take it out and set the environment variable HF_TOKEN (or "
    "run `hf auth login`) or WANDB_API_KEY instead"
)


def _secrets(text: str) -> Iterator[tuple[str, str]]:
    """What in a text is secret: what it is, and its characters."""
    for name, value in os.environ.items():
        if name.upper().endswith(_NAMES) and len(value) >= _SHORTEST and value in text:
            yield f"the value of the environment variable {name}", value
    for what, form in _FORMS.items():
        for match in form.finditer(text):
            yield what, match[0]


def hidden(text: str) -> str:
    """The text to be shown: without the secrets in it."""
    for _, secret in sorted(_secrets(text), key=lambda found: -len(found[1])):
        text = text.replace(secret, HIDDEN)
    return text


def without_secrets(raw: dict[str, Any]) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """A copy of a recipe as read in which each text with a secret is hidden, and (key, message) for each.

    Keys count too: those of a task's labels are the user's own.
    """
    raw = copy.deepcopy(raw)
    errors: list[tuple[str, str]] = []

    def text_of(value: Any, key: str) -> Any:
        kind = next((what for what, _ in _secrets(value)), None) if isinstance(value, str) else None
        if kind is None:
            return value
        errors.append((key, f"{key or 'a key'}: holds {kind}, not shown here: {_ADVICE}"))
        return HIDDEN

    def visit(node: Any, key: str) -> None:
        if isinstance(node, dict):
            items = [(text_of(name, key), value) for name, value in node.items()]
            node.clear()
            node.update((name, text_of(value, f"{key}.{name}" if key else str(name))) for name, value in items)
            for name, value in items:
                visit(value, f"{key}.{name}" if key else str(name))
        elif isinstance(node, list):
            for i, value in enumerate(node):
                node[i] = text_of(value, f"{key}[{i}]")
                visit(value, f"{key}[{i}]")

    visit(raw, "")
    return raw, errors
