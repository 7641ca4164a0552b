"""JSON Schema (2020-12) of the config file, made from the same shapes that the file is checked against."""

from typing import Any

from poller.config import CONFIG
from poller.shapes import Choice, Field, Flag, Instant, ListOf, MapOf, Number, Object, Shape, Tagged, Text, Whole

_FILLED = {"$ref": "#/$defs/filled"}


def config_schema() -> dict[str, Any]:
    """The schema, for editors. It refuses what `load` refuses, but for rules between keys and features to come.

    It is stricter in one thing: a key with a plain value must not be left empty.
    """
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "esm-poller config file",
        "$defs": {
            "filled": {
                "description": "Filled in when the file is read: ${NAME}, ${NAME:-default} or ${file:PATH}.",
                "type": "string",
                "pattern": r"\$\{",
            }
        },
        **_schema(CONFIG),
    }


def _schema(shape: Shape) -> dict[str, Any]:
    match shape:
        case Text():
            return _or_filled(_text(shape))
        case Whole(least, most):
            return _or_filled({"type": "integer", "minimum": least} | ({} if most is None else {"maximum": most}))
        case Number(least, most):
            return _or_filled({"type": "number", "minimum": least, "maximum": most})
        case Flag():
            return _or_filled({"type": "boolean"})
        case Choice(values):
            return _or_filled({"enum": list(values)})
        case Instant():
            return {"type": ["number", "string"], "minimum": 0}
        case ListOf(item, most, single):
            several = _or_null({"type": "array", "items": _schema(item)} | ({} if most is None else {"maxItems": most}))
            return {"anyOf": [_schema(item), several]} if single else several
        case MapOf(key, value, most):
            keys = {"enum": list(key.values)} if isinstance(key, Choice) else _text(key)
            entries = {"type": "object", "propertyNames": keys, "additionalProperties": _schema(value)}
            return _or_null(entries | ({} if most is None else {"maxProperties": most}))
        case Object():
            return _or_null(_object(shape.fields, {}))
        case Tagged(options):
            return {"oneOf": [_object(option.fields, {"type": {"const": tag}}) for tag, option in options]}


def _text(shape: Text) -> dict[str, Any]:
    text: dict[str, Any] = {"type": "string"}
    if shape.least:
        text["minLength"] = shape.least
    if shape.most is not None:
        text["maxLength"] = shape.most
    if shape.pattern is not None:
        text["pattern"] = f"^(?:{shape.pattern})$"
    return text


def _object(fields: tuple[Field, ...], tag: dict[str, Any]) -> dict[str, Any]:
    properties = {field.name: {"description": field.about, **_schema(field.shape)} for field in fields}
    required = [*tag, *(field.name for field in fields if field.required)]
    closed = {"type": "object", "properties": {**tag, **properties}, "additionalProperties": False}
    return closed | ({"required": required} if required else {})


def _or_filled(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema, or text that `${...}` fills; plain text without a form of its own takes that anyway."""
    return schema if schema == {"type": "string"} else {"anyOf": [schema, _FILLED]}


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    """A section that is there but empty, as when all of it is commented out."""
    return {**schema, "type": [schema["type"], "null"]}
