"""Reads values from a section of a config.json, which is not trusted."""

from collections.abc import Mapping
from typing import Any

_LARGEST = 10_000_000  # far above any real dimension; a larger one is an attack


class NotKnown(ValueError):
    """A section lacks a value, or has one that no model has. Nothing is guessed."""


class ConfigReader:
    """A section of a config.json."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config

    def value(self, name: str, default: Any = None) -> Any:
        """Return a value as it stands; an explicit null counts as absent."""
        setting = self._config.get(name)
        return default if setting is None else setting

    def size(self, *names: str, default: int | None = None) -> int:
        """Return the first of several names that is present, as a dimension above 0.

        Raises:
            NotKnown: None is present, or it is no whole number a dimension can be.
        """
        value = next((setting for name in names if (setting := self.value(name)) is not None), default)
        if type(value) is not int or not 0 < value <= _LARGEST:
            raise NotKnown(f"{names[0]} is {value!r}"[:200])
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        """Return a switch.

        Raises:
            NotKnown: It is neither true nor false.
        """
        value = self.value(name, default)
        if not isinstance(value, bool):
            raise NotKnown(f"{name} is {value!r}"[:200])
        return value
