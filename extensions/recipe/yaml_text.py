"""Strict YAML: safe_load that refuses what PyYAML accepts silently, and the line of each key."""

from __future__ import annotations

import re
from typing import Any

import yaml

from extensions.recipe.secrets import hidden

MAX_VALUES = 100_000  # with aliases expanded: a few lines of them can stand for billions
NOT_TEXT = re.compile("[\0\ud800-\udfff]")  # YAML can escape these, but no file name and no UTF-8 can hold them


class _StrictLoader(yaml.SafeLoader):
    """Refuses duplicate keys, cyclic and exploding aliases, values that do not fit their tag, and invalid text."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.lines: dict[str, int] = {}  # dotted key -> line, from 1
        self.counts: dict[int, int] = {}  # id of a node -> values in and below it; 0 while they are counted

    def get_single_node(self) -> yaml.Node | None:
        node: yaml.Node | None = super().get_single_node()
        if node is not None:
            self._count(node, "")
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

    def _count(self, node: yaml.Node, prefix: str) -> int:
        """Check a node and those below it, and return the number of values with aliases expanded."""
        if id(node) in self.counts:
            if not self.counts[id(node)]:
                raise _invalid(node, "an alias refers to a value that contains it")
            return self.counts[id(node)]
        self.counts[id(node)], count = 0, 1
        if isinstance(node, yaml.MappingNode):
            keys: set[str] = set()
            for key, value in node.value:
                if isinstance(key, yaml.ScalarNode) and key.value in keys:
                    raise _invalid(key, f"key {key.value!r} is given twice")
                keys.update([key.value] if isinstance(key, yaml.ScalarNode) else [])
                self.lines[f"{prefix}{key.value}"] = key.start_mark.line + 1
                count += self._count(key, "") + self._count(value, f"{prefix}{key.value}.")
        elif isinstance(node, yaml.SequenceNode):
            count += sum(self._count(item, f"{prefix[:-1]}[{i}].") for i, item in enumerate(node.value))
        elif NOT_TEXT.search(node.value):
            raise _invalid(node, f"{node.value[:40]!r} holds NUL or half of a surrogate pair, which is not text")
        if count > MAX_VALUES:
            raise _invalid(node, f"more than {MAX_VALUES} values with aliases expanded")
        self.counts[id(node)] = count
        return count


def _invalid(node: yaml.Node, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


def parse_yaml(text: str, name: str) -> tuple[Any, dict[str, int]]:
    """The value of a YAML document, and the line of each dotted key.

    Args:
        name: of the source, for errors.

    Raises:
        ValueError: one line that says what is wrong and where. If the text holds an access token, only where: an
            excerpt might show a part of it.
    """
    try:
        loader = _StrictLoader(text)
        loader.name = name
        return loader.get_single_data(), loader.lines
    except (yaml.YAMLError, RecursionError) as error:
        if hidden(text) == text:
            raise ValueError(" ".join(str(error).split())) from error
        mark = getattr(error, "problem_mark", None)
        place = "" if mark is None else f" in line {mark.line + 1}"
        raise ValueError(f"the error{place} is not shown: the text holds an access token; remove it first") from None
