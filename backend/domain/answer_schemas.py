"""Which schemas an answer can be held to, by the library that does it in the engine: llguidance.

A schema is checked before a model is loaded for it. Source of the limits: measured with llguidance 1.9.1 and the
vocabulary of SmolLM2 (49,152 tokens) on one core.
"""

import json
import math
import re
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

from llguidance import LLMatcher, LLParserLimits

from domain.answer_forms import Schema

MOST_SCHEMA_BYTES = 64 * 1024
_MOST_PROPERTIES = 1000  # 5,000 that may each be left out took 3 seconds to compile, 1,000 a tenth
_DEEPEST = 50  # the library ends at 128 nested values
# Divisibility takes as many states as the divisor: 1,000,003 took 13 seconds to compile, 10,000 a twentieth.
_MOST_DIVISOR = 10_000
# The library's own options, which a schema may carry. They would turn its refusals off.
_OPTIONS = "x-guidance"
# One space, or a line break with an indentation. Without a bound a model that is unsure writes spaces for ever.
_WHITESPACE = r"\x20|\n[\x20\t]{0,24}"
# Keywords that hold schemas.
_MAPS = {"properties", "$defs", "definitions"}
_LISTS = {"anyOf", "oneOf", "prefixItems"}
_SINGLE = {"items", "additionalProperties"}
_QUOTED = re.compile(r"\n(?=<|\s*\d+ \|)")  # the lines of the grammar with their numbers, and its marks
_PLACE = re.compile(r"^at \d+\(\d+\): (?:failed to compile JSON schema: )?")
_LONGEST_MESSAGE = 300


class SchemaRefused(Exception):
    """No answer can be held to the schema. The message says why."""


def limits() -> LLParserLimits:
    """Return what a schema may cost to compile and at each token. Messages repeat nothing of it."""
    return LLParserLimits(
        max_grammar_size=50_000, max_lexer_states=20_000, initial_lexer_fuel=500_000, verbose_errors=False
    )


def json_rule(schema: Schema) -> str:
    """Return a schema as a rule of llguidance's grammars.

    Objects have the properties that they declare, unless the schema says what others may be. A model that is unsure
    would write others for ever. Every answer meets the schema as it was sent, too.
    """
    held = schema if any(map(_joins, (node for node, _ in _nodes(schema)))) else _closed(schema)
    return "%json " + json.dumps(held | {_OPTIONS: {"whitespace_pattern": _WHITESPACE}})


def _joins(node: Any) -> bool:
    """Tell whether a value may have properties of several objects at once; none of them can be closed alone."""
    if not isinstance(node, dict):
        return False
    parts = node.keys() & {"properties", "anyOf", "oneOf", "$ref", "patternProperties"}
    return "allOf" in node or len(parts) > 1


def _closed(schema: Any) -> Any:
    """Return a schema whose objects have no other properties than those that they declare."""
    if not isinstance(schema, dict):
        return schema
    closed = dict(schema)
    for name in closed.keys() & _MAPS:
        if isinstance(closed[name], dict):
            closed[name] = {key: _closed(value) for key, value in closed[name].items()}
    for name in closed.keys() & _LISTS:
        if isinstance(closed[name], list):
            closed[name] = [_closed(value) for value in closed[name]]
    for name in closed.keys() & _SINGLE:
        closed[name] = _closed(closed[name])
    named, required = closed.get("properties"), closed.get("required", [])
    if isinstance(named, dict) and isinstance(required, list) and set(map(str, required)) <= named.keys():
        closed.setdefault("additionalProperties", False)
    return closed


def check_schema(schema: Schema) -> None:
    """Refuse a schema that no answer can be held to.

    Raises:
        SchemaRefused: It is too large, is no JSON Schema, cannot be met, or uses what the library does not know.
    """
    _check_size(schema)
    if _OPTIONS in schema:
        raise SchemaRefused(f"{_OPTIONS} is not taken")
    failed, told = LLMatcher.validate_grammar_with_warnings(f"start: {json_rule(schema)}", limits=limits())
    if told:  # a warning tells of a keyword that would have no effect
        raise SchemaRefused(readable(told[0]) if failed else "; ".join(map(readable, told)))


def readable(told: str) -> str:
    """Return a message of the library without the grammar that it quotes."""
    message = _QUOTED.split(told, maxsplit=1)[0]
    return " ".join(_PLACE.sub("", message).split())[:_LONGEST_MESSAGE]


def _check_size(schema: Schema) -> None:
    properties, divisor = 0, 1
    for value, depth in _nodes(schema):
        if depth > _DEEPEST:
            raise SchemaRefused(f"it is nested more than {_DEEPEST} levels deep")
        if isinstance(value, dict):
            named, divides = value.get("properties"), value.get("multipleOf")
            properties += len(named) if isinstance(named, dict) else 0
            divisor = math.lcm(divisor, _digits(divides))
    if properties > _MOST_PROPERTIES:
        raise SchemaRefused(f"it has {properties} properties, and {_MOST_PROPERTIES} are the most")
    if divisor > _MOST_DIVISOR:
        raise SchemaRefused(
            f"the least common multiple of every multipleOf, without the zeros at its ends, is above {_MOST_DIVISOR}"
        )
    size = len(json.dumps(schema))
    if size > MOST_SCHEMA_BYTES:
        raise SchemaRefused(f"it has {size} bytes, and {MOST_SCHEMA_BYTES} are the most")


def _digits(number: Any) -> int:
    """Return a number's digits without the zeros at their ends: 25 of 0.250 and of 2500. What is none counts as 1."""
    if isinstance(number, bool) or not isinstance(number, int | float):
        return 1
    decimal = Decimal(str(number))
    return int("".join(map(str, decimal.normalize().as_tuple().digits))) or 1 if decimal.is_finite() else 1


def _nodes(schema: Schema) -> Iterator[tuple[Any, int]]:
    """Yield every value in a schema, and how deep it is."""
    waiting: list[tuple[Any, int]] = [(schema, 0)]
    while waiting:
        value, depth = waiting.pop()
        yield value, depth
        children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        waiting += [(child, depth + 1) for child in children]
