"""The keys of a recipe as text: type, allowed values, default, unit and origin (`nlu show --keys`)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any, get_args

from pydantic import BaseModel, TypeAdapter

from extensions.recipe import all_keys
from extensions.tasks import Task

TYPES = {"integer": "integer", "number": "number", "string": "text", "boolean": "true or false", "null": "null"}
BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
LIMITS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}  # of a field whose JSON schema lacks them: a number or null


def key_lines() -> Iterator[str]:
    """Per key its name, type and default in one line, and below it, indented, its description.

    The keys of an entry of `data.tasks` that describes a task follow `data.tasks`.
    """
    for key, field in all_keys().items():
        yield from _lines(key, field)
        if key == "data.tasks":
            yield from _task_lines(Task, "data.tasks[].")


def _task_lines(section: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield from _lines(f"{prefix}{name}", field)
        for below in [part for part in (field.annotation, *get_args(field.annotation)) if isinstance(part, type)]:
            if issubclass(below, BaseModel):
                yield from _task_lines(below, f"{prefix}{name}.")


def _lines(key: str, field: Any) -> Iterator[str]:
    schema = TypeAdapter(Annotated[field.annotation, field]).json_schema()
    default = "required" if field.is_required() else f"default {_value(field.get_default(call_default_factory=True))}"
    kind = _kind(schema, schema.get("$defs", {}))
    limits = [
        f"{sign} {getattr(one, name)}" for one in field.metadata for name, sign in LIMITS.items() if hasattr(one, name)
    ]
    kind = " ".join([kind, *(limit for limit in limits if limit not in kind)])
    yield f"{key}: {kind}; {default}"
    yield f"    {field.description}"


def _kind(schema: dict[str, Any], parts: dict[str, Any]) -> str:
    """A JSON schema in words."""
    if "$ref" in schema:
        part = schema["$ref"].rpartition("/")[2]
        return "the keys below" if "properties" in parts[part] else _kind(parts[part], parts)
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_kind(one, parts) for one in schema["anyOf"]))
    if "enum" in schema or "const" in schema:
        return " | ".join(_value(value) for value in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        items = schema.get("prefixItems") or [schema.get("items") or {}]
        return f"list of {', '.join(_kind(one, parts) for one in items)}"
    if schema.get("type") == "object":
        values = schema.get("additionalProperties")
        return f"mapping to {_kind(values, parts)}" if isinstance(values, dict) and values else "mapping"
    bounds = [f"{sign} {schema[name]}" for name, sign in BOUNDS.items() if name in schema]
    return " ".join([TYPES.get(schema.get("type", ""), "any"), *bounds])


def _value(value: Any) -> str:
    """A value as YAML has it."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json", exclude_defaults=True)
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
