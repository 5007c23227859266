"""The PEFT service on a CPU with room for one load and a half of the embedded model, with engines that take no time."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from core.clock import Clock
from core.errors import HubUnavailable
from domain.configure import MachineFacts, configure
from domain.memory.estimate import loading_bytes
from domain.peft.algorithms import Algorithm
from services.engines.warm import Engines
from services.hardware.devices import Device, EngineChoice
from services.hardware.machine import Machine
from services.models.embedded import CONFIG
from services.models.facts import ModelFacts
from services.models.files import ModelFiles
from services.models.progress import OnProgress
from services.peft_service import ConfiguredLoad, LoadedModel, LoadRequest, PeftService
from tests.support.engine_double import EngineDoubles
from tests.support.no_warm_engines import engines_on_demand
from tests.support.shapes import KnownShapes, shape_of

CPU = MachineFacts(has_gpu=False, supports_bf16=False)
FAR_ID = "a/far"  # the one model that is not here
GRACE_S, IDLE_S = 60.0, 1800.0


class LittleMemory(Machine):
    """A CPU whose free memory is what the living engines leave of it."""

    def __init__(self, engines: EngineDoubles) -> None:
        self._engines = engines

    def device(self, wanted: str | int) -> Device:
        total = int(1.5 * self._engines.held_bytes)
        return Device("cpu", CPU, total - sum(engine.held_bytes for engine in self._engines.alive))

    def engine(self, wanted: str, device: Device, obstacle: str | None) -> EngineChoice:
        return EngineChoice("transformers", "the only one")


class EveryModelsFiles(ModelFiles):
    """Every model is here, but for FAR_ID, which the Hub would have to give."""

    def __init__(self) -> None:
        pass

    def check(self, model_id: str, revision: str | None, *, allow_pickle: bool = False) -> None:
        pass

    def ensure(
        self,
        model_id: str,
        revision: str | None,
        on_progress: OnProgress,
        cancelled: Callable[[], bool] = lambda: False,
        *,
        allow_pickle: bool = False,
    ) -> Path:
        if model_id == FAR_ID:
            raise HubUnavailable("The Hub is away.")
        return Path("model")


class OneConfig:
    """Every model has the embedded one's config, and no smaller brother is here."""

    def config_of(self, model_id: str, revision: str | None) -> dict[str, Any]:
        return dict(CONFIG)

    def blockers_of(self, model_id: str, revision: str | None) -> list[str]:
        return []

    def local_configs(self) -> list[tuple[str, dict[str, Any]]]:
        return []


def peft_with_little_memory(
    clock: Clock,
    engines: EngineDoubles,
    precision: str,
    log_dir: Path,
    kept: Engines | None = None,
    machine: Machine | None = None,
) -> PeftService:
    """Return the service. Its engines hold what the embedded model is estimated to need in the precision.

    Args:
        kept: What gives the engines, where some are kept ready.
        machine: Another machine than the CPU.
    """
    shape = shape_of(CONFIG)
    config = configure(Algorithm.LORA, use_case=None, overrides={"precision": precision}, machine=CPU).config
    engines.held_bytes = loading_bytes(shape, config, on_gpu=False)
    return PeftService(
        clock, machine or LittleMemory(engines), EveryModelsFiles(), ModelFacts(OneConfig(), KnownShapes()),
        kept or engines_on_demand(engines),
        log_dir=log_dir, idle_unload_s=IDLE_S, make_room_after_s=GRACE_S, engine_silence_s=60.0,
    )  # fmt: skip


def load(peft: PeftService, request: LoadRequest | ConfiguredLoad) -> LoadedModel:
    """Load a model, and wait until that has ended well or badly."""
    model = peft.load(request)
    assert model.base.loading is not None
    model.base.loading.result(600)
    return model
