"""The service itself: alive, and which version."""

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

from fastapi import APIRouter

from api.peft_schemas import Response
from core.version import VERSION

router = APIRouter(tags=["service"])
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
