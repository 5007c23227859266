"""Shared fixtures: the tiny model, the embedded one, and a real server process."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from server import StudioServer
from tiny_model import make_tiny_model

# Examples are counted, not timed: the machine may be busy with something else.
settings.register_profile("studio", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("studio")

_ROOT = Path(__file__).resolve().parents[2]
TINY_ID = "tests/tiny-llama"
# Prepared models are kept between runs: preparing the embedded one takes half a minute.
CACHE = Path(os.environ.get("PEFT_STUDIO_TEST_CACHE") or _ROOT / ".cache")


@pytest.fixture(scope="session")
def model_dirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with one tiny Llama in it, as `tests/tiny-llama`."""
    root = tmp_path_factory.mktemp("models")
    make_tiny_model(root / TINY_ID)
    return root


@pytest.fixture(scope="session")
def tiny_path(model_dirs: Path) -> Path:
    """The tiny Llama's folder."""
    return model_dirs / TINY_ID


def start_server(home: Path, model_dirs: Path, **environment: str) -> StudioServer:
    """Start a server on a free port, with no Hub."""
    return StudioServer(
        home,
        {"PEFT_STUDIO_MODEL_DIRS": str(model_dirs), "PEFT_STUDIO_CACHE_DIR": str(CACHE), "HF_HUB_OFFLINE": "1"}
        | environment,
    )


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory, model_dirs: Path) -> Iterator[StudioServer]:
    """A real server process of the module's own."""
    with start_server(tmp_path_factory.mktemp("home"), model_dirs) as server:
        yield server
