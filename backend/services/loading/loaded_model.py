"""What is asked for when a model is to be loaded, and what whoever asked then has."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from domain.configure import Configuration
from domain.models.load_states import LoadState
from domain.peft.algorithms import Algorithm
from domain.peft.use_cases import UseCaseId
from services.loading.loaded_base import LoadedBase


@dataclass(frozen=True)
class LoadRequest:
    """What a client wants loaded, or with `for_job` what a job needs.

    Attributes:
        for_job: Whether a job or an export wants it: `overrides` then says nothing about other jobs, and no client
            asked for the model to stay.
    """

    model_id: str
    revision: str | None
    algorithm: Algorithm
    use_case: UseCaseId | None
    overrides: dict[str, Any]
    engine: str
    device: str | int
    force: bool
    allow_pickle: bool = False
    for_job: bool = False


@dataclass(frozen=True)
class LoadedModel:
    """A base model with the configuration it was asked for. Several may share one base.

    Attributes:
        asked: What the client set itself; it holds for jobs on the model.
    """

    id: str
    model_id: str
    revision: str | None
    algorithm: Algorithm
    configuration: Configuration
    base: LoadedBase
    estimated_bytes: int | None
    trainable_parameters: int | None
    asked: Mapping[str, Any]

    @property
    def state(self) -> LoadState:
        return self.base.state

    def answers(self, request: LoadRequest, base: LoadedBase, configuration: Configuration) -> bool:
        """Whether it is what a request for this base and this configuration asks for: no second one is needed."""
        same = self.base is base and self.algorithm == request.algorithm
        asked_alike = request.for_job or self.asked == request.overrides
        return same and asked_alike and self.configuration.config == configuration.config
