"""Reads dimensions from a config.json, which is not trusted."""

from collections.abc import Mapping
from typing import Any

_LARGEST = 10_000_000  # far above any real dimension; a larger one is an attack
_MOST_LAYERS = 10_000


class NotKnown(ValueError):
    """The config lacks a value, or has one that no model of the family has. Nothing is guessed."""


class ConfigReader:
    """A config.json, with its class's defaults for values that the file lacks.

    Args:
        config: The parsed file, or the part of it that describes the text model.
        defaults: What the family's configuration class assumes.
    """

    def __init__(self, config: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> None:
        self._config, self._defaults = config, defaults or {}

    def value(self, name: str, default: Any = None) -> Any:
        """Return a value as it stands; an explicit null counts as absent."""
        setting = self._config.get(name)
        if setting is None:
            setting = self._defaults.get(name)
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

    def count(self, name: str, default: int | None = None) -> int:
        """Return a number of things, which may be 0.

        Raises:
            NotKnown: As in `size`.
        """
        return 0 if self.value(name, default) == 0 else self.size(name, default=default)

    def layers(self, *names: str) -> int:
        """Return the number of layers.

        Raises:
            NotKnown: As in `size`, or there are more than any model has.
        """
        layers = self.size(*(names or ("num_hidden_layers", "n_layer")))
        if layers > _MOST_LAYERS:
            raise NotKnown(f"{layers} layers")
        return layers

    def flag(self, name: str, default: bool = False) -> bool:
        """Return a switch.

        Raises:
            NotKnown: It is neither true nor false.
        """
        value = self.value(name, default)
        if not isinstance(value, bool):
            raise NotKnown(f"{name} is {value!r}"[:200])
        return value

    def indexes(self, name: str, layers: int) -> frozenset[int]:
        """Return a list of layer numbers, empty where the config has none.

        Raises:
            NotKnown: It is not one.
        """
        value = self.value(name, [])
        if not isinstance(value, list) or len(value) > layers or not all(type(item) is int for item in value):
            raise NotKnown(f"{name} is no list of layers")
        return frozenset(value)

    def kinds(self, name: str, layers: int) -> list[str] | None:
        """Return one word a layer, or None where the config has no such list.

        Raises:
            NotKnown: It is not one word a layer.
        """
        value = self.value(name)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != layers or not all(isinstance(item, str) for item in value):
            raise NotKnown(f"{name} is no list of {layers} words")
        return value

    def part(self, name: str) -> Mapping[str, Any]:
        """Return a nested config.

        Raises:
            NotKnown: There is none.
        """
        value = self._config.get(name)
        if not isinstance(value, dict):
            raise NotKnown(f"{name} is no object")
        return value
