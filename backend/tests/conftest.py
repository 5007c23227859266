"""Shared fixtures: the tiny model, the embedded one, and a real server process."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from engine.guards import hide_broken_torchvision
from services.models.embedded import EmbeddedModel
from services.models.shapes import get_model_shapes
from tests.support.hub_double import HubDouble, quiet_environment
from tests.support.server import CACHE, StudioServer, start_server
from tests.support.shapes import KnownShapes
from tests.support.small_disk import mounted
from tests.support.tiny_model import TINY_ID, copy_tiny_model

# A server, in this process or in one of its own, keeps no engines ready unless a test asks for them.
os.environ["PEFT_STUDIO_WARM_ENGINE_BYTES"] = "0"

# Examples are counted, not timed: the machine may be busy with something else.
settings.register_profile("studio", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("studio")

pytest.register_assert_rewrite("tests.support.setting_checks")  # so that what failed is shown with its values


def pytest_configure(config: pytest.Config) -> None:
    """Look for a broken torchvision, which imports torch, where a test may import transformers."""
    if not config.pluginmanager.has_plugin("tests.support.no_engine"):
        hide_broken_torchvision()


@pytest.fixture(autouse=True)
def _shapes_without_engines(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no engine may run, Llamas are described by hand."""
    if request.node.get_closest_marker("engine") is None:
        monkeypatch.setattr(get_model_shapes, "_made", (KnownShapes(),))


@pytest.fixture(scope="session")
def model_dirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with one tiny Llama in it, as `tests/tiny-llama`."""
    root = tmp_path_factory.mktemp("models")
    copy_tiny_model(root / TINY_ID)
    return root


@pytest.fixture(scope="session")
def tiny_path(model_dirs: Path) -> Path:
    """The tiny Llama's folder."""
    return model_dirs / TINY_ID


@pytest.fixture(scope="session")
def embedded_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model's folder, prepared once and kept."""
    return EmbeddedModel(CACHE, tmp_path_factory.mktemp("logs")).prepare(lambda stage, fraction: None)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubDouble]:
    """The Hub's double, where nothing of the machine's own settings leads anywhere else."""
    quiet_environment(monkeypatch, tmp_path)
    with HubDouble() as double:
        yield double


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB."""
    with mounted(tmp_path / "small", "24m") as folder:
        yield folder


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory, model_dirs: Path) -> Iterator[StudioServer]:
    """A real server process of the module's own."""
    with start_server(tmp_path_factory.mktemp("home"), model_dirs) as server:
        yield server
