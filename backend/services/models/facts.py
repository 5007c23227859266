"""What a model is, from its config.json on this machine or on the Hub."""

from collections.abc import Iterable
from typing import Any, Protocol

from core.errors import ModelRejected
from domain.memory.verdict import Sibling
from domain.models.shape import ModelShape
from domain.results import Described
from services.models.embedded import CONFIG, MODEL_ID
from services.models.shapes import Shapes, shape_config


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
    """Finds a model's config.json and has it described."""

    def __init__(self, configs: ConfigSource, shapes: Shapes) -> None:
        self._configs, self._shapes = configs, shapes

    def config(self, model_id: str, revision: str | None) -> dict[str, Any]:
        """Return a model's config.json.

        Raises:
            ModelNotFound, ModelGated, HubUnavailable: As the Hub says.
        """
        if model_id == MODEL_ID and revision is None:
            return dict(CONFIG)
        return self._configs.config_of(model_id, revision)

    def shape(self, model_id: str, revision: str | None) -> ModelShape | None:
        """Return what a model is made of, or None where that cannot be told.

        Raises:
            ModelNotFound, ModelGated, HubUnavailable: As the Hub says.
        """
        return self.described(model_id, revision).shape

    def described(self, model_id: str, revision: str | None) -> Described:
        """Return what a model is made of, or why that cannot be told.

        Raises:
            ModelNotFound, ModelGated, HubUnavailable: As the Hub says.
        """
        return self._shapes.describe(self.config(model_id, revision))

    def loadable_shape(self, model_id: str, revision: str | None) -> ModelShape | None:
        """Return what a model is made of, or None where that cannot be told; refuse one that no engine could load.

        Raises:
            ModelRejected: transformers has no class for it that predicts the next token.
            ModelNotFound, ModelGated, HubUnavailable: As the Hub says.
        """
        said = self.described(model_id, revision)
        if not said.loadable:
            raise ModelRejected(f"{model_id} cannot be loaded: {said.problem}.")
        return said.shape

    def blockers(self, model_id: str, revision: str | None) -> list[str]:
        """Say what keeps a model from being loaded here, a sentence each.

        Raises:
            ModelNotFound, HubUnavailable: As the Hub says.
        """
        if model_id == MODEL_ID and revision is None:
            return []
        return self._configs.blockers_of(model_id, revision)

    def siblings(self, shape: ModelShape) -> list[Sibling]:
        """Return the models on this machine that are of a shape's family and that a load would take."""
        configs = ((model_id, shape_config(model_id, config)) for model_id, config in self._configs.local_configs())
        shapes = [(model_id, self._shapes.known(config)) for model_id, config in configs]
        family = shape.family
        return [Sibling(model_id, other) for model_id, other in shapes if other and other.family == family]
