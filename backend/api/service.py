"""The service itself: alive, and which version."""

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Literal

from fastapi import APIRouter, Depends
from fastapi.responses import PlainTextResponse

from api.peft_schemas import Response
from core import telemetry
from core.version import VERSION
from services.engine_service import get_engines
from services.engines.warm import Engines
from services.peft_service import PeftService, get_peft_service
from services.training_service import TrainingService, get_training_service

router = APIRouter(tags=["service"])
Training = Annotated[TrainingService, Depends(get_training_service)]
Peft = Annotated[PeftService, Depends(get_peft_service)]
Warm = Annotated[Engines, Depends(get_engines)]
_PACKAGES = ("fastapi", "torch", "transformers", "peft", "bitsandbytes", "unsloth")


class Health(Response):
    status: Literal["ok"]


class Version(Response):
    version: str
    python_version: str
    packages: dict[str, str | None]


@router.get("/health")
async def health() -> Health:
    """Whether the server answers. Open even when an API key is set."""
    return Health(status="ok")


@router.get("/metrics", response_class=PlainTextResponse)
def metrics(training: Training, peft: Peft, engines: Warm) -> PlainTextResponse:
    """Counters, gauges and histograms in Prometheus' text format."""
    text = telemetry.exposition(training.ledger.count_by_state(), peft.memory_bytes(), engines.memory_bytes())
    return PlainTextResponse(text, media_type=telemetry.CONTENT_TYPE)


@router.get("/api/version")
def show_version() -> Version:
    """The server's version and its packages'."""
    return Version(
        version=VERSION,
        python_version=platform.python_version(),
        packages={name: _installed(name) for name in _PACKAGES},
    )


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
