"""Which schemas are taken, and that none of them is expensive."""

import json
import time
from typing import Any

import pytest

from domain.answer_schemas import MOST_SCHEMA_BYTES, SchemaRefused, check_schema


def of(**fields: Any) -> dict[str, Any]:
    return {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = of(a=schema)
    return schema


TAKEN: dict[str, dict[str, Any]] = {
    "every type": of(
        a={"type": "string"}, b={"type": "integer"}, c={"type": "number"}, d={"type": ["null", "boolean"]}
    ),
    "enums and constants": of(a={"enum": ["x", 1, None]}, b={"const": {"k": [1]}}),
    "annotations": of(a={"type": "string", "title": "A", "default": "x", "description": "d", "examples": ["y"]})
    | {"title": "T", "$schema": "https://json-schema.org/draft/2020-12/schema"},
    "a recursive one": of(next={"anyOf": [{"$ref": "#"}, {"type": "null"}]}),
    "definitions": of(a={"$ref": "#/$defs/b"}) | {"$defs": {"b": of(c={"type": "integer", "minimum": 0})}},
    "bounds": of(a={"type": "array", "items": {"type": "string", "maxLength": 9}, "minItems": 1, "maxItems": 3}),
    "patterns and formats": of(a={"type": "string", "pattern": "^[a-z]+$"}, b={"type": "string", "format": "date"}),
    "multiples": of(a={"type": "number", "multipleOf": 0.01}, b={"type": "integer", "multipleOf": 2500}),
    "any object": {"type": "object"},
    "twenty levels": nested(20),
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a keyword": (of(a={"not": {"type": "string"}}), "not"),
    "a condition": ({"type": "object", "if": {"required": ["a"]}, "then": {"required": ["b"]}}, "if"),
    "unique items": (of(a={"type": "array", "uniqueItems": True, "items": {"type": "string"}}), "uniqueItems"),
    "a look-ahead": (of(a={"type": "string", "pattern": "^(?=a).*$"}), "look-around"),
    "a format": (of(a={"type": "string", "format": "iri"}), "iri"),
    "a type": ({"type": "objekt"}, "objekt"),
    "what no value meets": (of(a={"type": "string", "enum": [1]}), "nsatisfiable"),
    "a schema elsewhere": ({"$ref": "https://example.org/schema.json"}, "example.org"),
    "a missing definition": ({"$ref": "#/$defs/none"}, "none"),
    "the library's options": ({"type": "object", "not": {}, "x-guidance": {"lenient": True}}, "x-guidance"),
    "one too deep": (nested(200), "levels deep"),
    "lists in lists": (of(a={"enum": [[[[0]]]]}) | {"x": json.loads("[" * 90 + "]" * 90)}, "levels deep"),
    "too many properties": (of(**{f"p{i}": {"type": "string"} for i in range(1001)}), "1001 properties"),
    "too many bytes": (of(a={"enum": ["x" * MOST_SCHEMA_BYTES]}), "bytes"),
    "a large divisor": (of(a={"type": "integer", "multipleOf": 1_000_003}), "multipleOf"),
    "divisors that multiply": (of(a={"multipleOf": 9973}, b={"multipleOf": 9967}), "multipleOf"),
}
BOMBS: dict[str, dict[str, Any]] = {
    "references that double": {"$ref": "#/$defs/d0"}
    | {"$defs": {f"d{i}": of(a={"$ref": f"#/$defs/d{i + 1}"}, b={"$ref": f"#/$defs/d{i + 1}"}) for i in range(40)}}
    | {"$defs": {"d40": {"type": "string"}}},
    "all of any of": {"allOf": [{"anyOf": [of(**{f"p{i}_{j}": {}}) for j in range(4)]} for i in range(12)]},
    "a billion items": {"type": "array", "minItems": 10**9, "items": {"type": "string"}},
    "a billion letters": of(a={"type": "string", "minLength": 10**9}),
    "repeated repeats": of(a={"type": "string", "pattern": "^(([a-z]{1,100}){1,100}){1,100}x$"}),
    "a thousand that may be left out": {
        "type": "object",
        "properties": {f"p{i}": {"type": "string"} for i in range(1000)},
    },
}


@pytest.mark.parametrize("schema", TAKEN.values(), ids=TAKEN)
def test_what_is_taken(schema: dict[str, Any]) -> None:
    check_schema(schema)


@pytest.mark.parametrize(("schema", "says"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_says_why(schema: dict[str, Any], says: str) -> None:
    with pytest.raises(SchemaRefused, match=says):
        check_schema(schema)


@pytest.mark.parametrize("schema", BOMBS.values(), ids=BOMBS)
def test_no_schema_takes_long(schema: dict[str, Any]) -> None:
    began = time.process_time()
    try:
        check_schema(schema)
    except SchemaRefused as error:
        assert len(str(error)) < 500
    assert time.process_time() - began < 5
