"""Access tokens must not appear in a recipe, which is copied into run folders, logs and model cards: they are refused.

A token is recognised by its form, or as the value of an environment variable that is named like one.
"""

from __future__ import annotations

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
_VARIABLES = ("TOKEN", "API_KEY", "ACCESS_KEY", "SECRET", "PASSWORD")  # endings of their names
_MIN_LENGTH = 8  # a shorter value of such a variable is more likely a common word than a secret
_ADVICE = (
    "a recipe is copied into run folders and model cards. Remove it and set the environment variable HF_TOKEN (or "
    "run `hf auth login`) or WANDB_API_KEY instead"
)


def _secrets(text: str) -> Iterator[tuple[str, str]]:
    """(kind, characters) of each secret in a text."""
    for name, value in os.environ.items():
        if name.upper().endswith(_VARIABLES) and len(value) >= _MIN_LENGTH and value in text:
            yield f"the value of the environment variable {name}", value
    for kind, form in _FORMS.items():
        for match in form.finditer(text):
            yield kind, match[0]


def hidden(text: str) -> str:
    """The text with its secrets replaced, safe to print."""
    for _, secret in sorted(_secrets(text), key=lambda found: -len(found[1])):
        text = text.replace(secret, HIDDEN)
    return text


def without_secrets(raw: dict[str, Any]) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """A copy of a recipe in which every text with a secret is hidden, and (dotted key, message) for each.

    Keys are checked too: those of a task's labels are the user's own.
    """
    errors: list[tuple[str, str]] = []

    def clean(value: Any, key: str) -> Any:
        if isinstance(value, dict):
            below = f"{key}." if key else ""
            return {clean(name, key): clean(inner, f"{below}{name}") for name, inner in value.items()}
        if isinstance(value, list):
            return [clean(item, f"{key}[{i}]") for i, item in enumerate(value)]
        kind = next((kind for kind, _ in _secrets(value)), None) if isinstance(value, str) else None
        if kind is None:
            return value
        errors.append((key, f"{key or 'a key'}: holds {kind}, not shown here: {_ADVICE}"))
        return HIDDEN

    return clean(raw, ""), errors
