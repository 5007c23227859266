"""Reads single values of the Hub's JSON. A value of the wrong type is read as None, or as empty."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any


def text(value: Any) -> str | None:
    """Return a string that is not blank, or None."""
    return value if isinstance(value, str) and value else None


def texts(value: Any) -> tuple[str, ...]:
    """Return the strings of a list. A single string counts as a list of one: cards use both forms."""
    values = value if isinstance(value, list) else [value]
    return tuple(item for item in values if isinstance(item, str) and item)


def count(value: Any) -> int | None:
    """Return a number of things, or None."""
    return value if type(value) is int and value >= 0 else None


def mapping(value: Any) -> Mapping[str, Any]:
    """Return a JSON object; an empty one if the value is no object."""
    return value if isinstance(value, dict) else {}


def moment(value: Any) -> datetime | None:
    """Return an RFC 3339 time, or None."""
    try:
        parsed = datetime.fromisoformat(value) if isinstance(value, str) else None
    except ValueError:
        return None
    return parsed if parsed is not None and parsed.tzinfo is not None else None
