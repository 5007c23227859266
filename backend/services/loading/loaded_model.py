"""What is asked for when a model is to be loaded, and the loaded model that answers it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from domain.models.load_states import LoadState
from domain.models.shape import ModelShape
from domain.peft.algorithms import Algorithm
from domain.peft.config import PeftConfig
from domain.peft.use_cases import UseCaseId
from services.hardware.devices import Device
from services.loading.loaded_base import LoadedBase


@dataclass(frozen=True)
class LoadRequest:
    """What a client wants loaded. The service configures it by the rules of today."""

    model_id: str
    revision: str | None
    algorithm: Algorithm
    use_case: UseCaseId | None
    overrides: dict[str, Any]
    engine: str
    device: str | int
    force: bool
    allow_pickle: bool = False


@dataclass(frozen=True)
class ConfiguredLoad:
    """What a job or an export needs loaded. Its configuration is finished and is taken as it is."""

    model_id: str
    revision: str | None
    algorithm: Algorithm
    config: PeftConfig
    engine: str = "auto"
    device: str | int = "auto"
    force: bool = False
    allow_pickle: bool = False


@dataclass(frozen=True)
class LoadedModel:
    """A base model with the configuration it was asked for. Several may share one base.

    Attributes:
        asked: The settings that the client chose. They hold for jobs on the model.
    """

    id: str
    model_id: str
    revision: str | None
    algorithm: Algorithm
    config: PeftConfig
    base: LoadedBase
    estimated_bytes: int | None
    trainable_parameters: int | None
    asked: Mapping[str, Any]

    @property
    def state(self) -> LoadState:
        """Where its base is."""
        return self.base.state

    def answers(self, request: LoadRequest | ConfiguredLoad, base: LoadedBase, config: PeftConfig) -> bool:
        """Whether it satisfies a request for this base and this configuration, so that no second one is needed."""
        same = self.base is base and self.algorithm == request.algorithm
        asked_alike = isinstance(request, ConfiguredLoad) or self.asked == request.overrides
        return same and asked_alike and self.config == config


@dataclass(frozen=True)
class ModelOnDevice:
    """A model and the device that it is to run on, looked up once.

    Attributes:
        shape: The model's dimensions; None where its family is not known.
        device: With the memory that the system reports as free.
        loaded: The loaded model that is to be used; None where the service picks or loads a base.
    """

    model_id: str
    revision: str | None
    shape: ModelShape | None
    device: Device
    loaded: LoadedModel | None = None
