"""A model's shape, read from its config.json on this machine or on the Hub."""

from collections.abc import Iterable
from typing import Any, Protocol

from domain.memory.verdict import Sibling
from domain.models.architectures.registry import read_shape
from domain.models.shape import ModelShape
from services.models.embedded import CONFIG, MODEL_ID


class ConfigSource(Protocol):
    """Finds a model's config.json; the registry does."""

    def config_of(self, model_id: str, revision: str | None) -> dict[str, Any]:
        """Return the parsed config.json."""
        ...

    def blockers_of(self, model_id: str, revision: str | None) -> list[str]:
        """Say what keeps a model from being loaded here."""
        ...

    def local_configs(self) -> Iterable[tuple[str, dict[str, Any]]]:
        """Yield the id and config.json of every model on this machine that a load would take."""
        ...


class ModelFacts:
    """Reads shapes."""

    def __init__(self, configs: ConfigSource) -> None:
        self._configs = configs

    def config(self, model_id: str, revision: str | None) -> dict[str, Any]:
        """Return a model's config.json.

        Raises:
            ModelNotFound, ModelGated, HubUnavailable: As the Hub says.
        """
        if model_id == MODEL_ID and revision is None:
            return dict(CONFIG)
        return self._configs.config_of(model_id, revision)

    def shape(self, model_id: str, revision: str | None) -> ModelShape | None:
        """Return a model's dimensions, or None where its family is not known here."""
        return read_shape(self.config(model_id, revision))

    def blockers(self, model_id: str, revision: str | None) -> list[str]:
        """Say what keeps a model from being loaded here, a sentence each.

        Raises:
            ModelNotFound, HubUnavailable: As the Hub says.
        """
        return [] if model_id == MODEL_ID and revision is None else self._configs.blockers_of(model_id, revision)

    def siblings(self, shape: ModelShape) -> list[Sibling]:
        """Return the models on this machine that are of a shape's family and that a load would take."""
        shapes = [(model_id, read_shape(config)) for model_id, config in self._configs.local_configs()]
        family = shape.model_type
        return [Sibling(model_id, other) for model_id, other in shapes if other and other.model_type == family]
