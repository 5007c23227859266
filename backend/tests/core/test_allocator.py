"""Which allocator engines are started with."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from core import allocator


@pytest.fixture(autouse=True)
def asked_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    allocator.preload.cache_clear()
    yield
    allocator.preload.cache_clear()


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put tcmalloc, its full library and the like into a system's second folder."""
    monkeypatch.setattr(allocator, "_FOLDERS", (str(tmp_path / "lib"), str(tmp_path / "lib64")))
    (tmp_path / "lib64").mkdir()
    for name in ("libtcmalloc_minimal.so.4", "libtcmalloc_minimal_debug.so.4", "libtcmalloc.so.4"):
        (tmp_path / "lib64" / name).touch()
    return tmp_path / "lib64"


def test_it_is_tcmalloc_where_the_system_has_it(installed: Path) -> None:
    assert allocator.preload() == installed / "libtcmalloc_minimal.so.4"


def test_it_stays_the_systems_own_where_it_has_not(installed: Path) -> None:
    (installed / "libtcmalloc_minimal.so.4").unlink()
    assert allocator.preload() is None


@pytest.mark.parametrize("chosen", ["", "/usr/lib/libother.so"])
def test_whoever_sets_ld_preload_has_chosen(installed: Path, monkeypatch: pytest.MonkeyPatch, chosen: str) -> None:
    monkeypatch.setenv("LD_PRELOAD", chosen)
    assert allocator.preload() is None
