"""Which allocator engines are started with."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from core import allocator

HERE = allocator.preload()
OTHER = next((path for path in Path("/lib").glob("*-linux-gnu/libmvec.so.1")), None)  # no Python needs it


@pytest.fixture(autouse=True)
def asked_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    for found in (allocator.preload, allocator.engines_have_tcmalloc):
        found.cache_clear()
    yield
    for found in (allocator.preload, allocator.engines_have_tcmalloc):
        found.cache_clear()


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put files named as tcmalloc, its full library and the like into a system's second folder."""
    monkeypatch.setattr(allocator, "_FOLDERS", (str(tmp_path / "lib"), str(tmp_path / "lib64")))
    (tmp_path / "lib64").mkdir()
    for name in ("libtcmalloc_minimal.so.4", "libtcmalloc_minimal_debug.so.4", "libtcmalloc.so.4"):
        (tmp_path / "lib64" / name).touch()
    return tmp_path / "lib64"


@pytest.fixture
def installed(folders: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let the file be a library that works."""
    library = folders / "libtcmalloc_minimal.so.4"
    monkeypatch.setattr(allocator, "has_symbol", lambda libraries, symbol: libraries == str(library))
    return library


def test_it_is_tcmalloc_where_the_system_has_it(installed: Path) -> None:
    assert allocator.preload() == installed
    assert allocator.engines_have_tcmalloc()


def test_it_stays_the_systems_own_where_it_has_not(installed: Path) -> None:
    installed.unlink()
    assert allocator.preload() is None
    assert not allocator.engines_have_tcmalloc()


@pytest.mark.usefixtures("folders")
def test_a_file_that_is_no_library_is_not_tcmalloc() -> None:
    assert allocator.preload() is None
    assert not allocator.engines_have_tcmalloc()


@pytest.mark.parametrize("chosen", ["", "/usr/lib/libother.so"])
@pytest.mark.usefixtures("installed")
def test_whoever_sets_ld_preload_has_chosen(monkeypatch: pytest.MonkeyPatch, chosen: str) -> None:
    monkeypatch.setenv("LD_PRELOAD", chosen)
    assert allocator.preload() is None
    assert not allocator.engines_have_tcmalloc()


def test_who_chose_tcmalloc_has_it(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_PRELOAD", str(installed))
    assert allocator.preload() is None
    assert allocator.engines_have_tcmalloc()


@pytest.mark.skipif(OTHER is None, reason="a library that comes with glibc on x86")
def test_a_symbol_is_there_once_its_library_is() -> None:
    assert allocator.has_symbol(str(OTHER), "_ZGVbN2v_cos")
    assert not allocator.has_symbol(str(OTHER), "_ZGVbN2v_no_such_function")
    assert not allocator.has_symbol("", "_ZGVbN2v_cos")


@pytest.mark.skipif(HERE is None, reason="tcmalloc is not installed here")
def test_the_one_installed_here_is_recognised(monkeypatch: pytest.MonkeyPatch) -> None:
    assert allocator.preload() == HERE
    monkeypatch.setenv("LD_PRELOAD", f"/usr/lib/no-such.so {HERE}")
    allocator.preload.cache_clear()
    allocator.engines_have_tcmalloc.cache_clear()
    assert allocator.engines_have_tcmalloc()
