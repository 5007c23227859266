"""A plugin of pytest for the fast tests, `-p tests.support.no_engine`.

No test, and no server that a test starts, starts an engine or imports torch.
"""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.support.no_engine import no_engine_hook
from tests.support.no_engine.no_engine_hook import RECORD

FOLDER = Path(__file__).parent
ENGINE_TESTS = FOLDER.parents[1] / "engine"  # what runs in an engine, called by the tests themselves
_MARKED = re.compile(r"^pytestmark = .*\bmark\.engine\b", re.MULTILINE)


def guarded(environment: Mapping[str, str], record: Path) -> dict[str, str]:
    """Return an environment in which every Python is guarded, and writes down in `record` what it refused."""
    path = os.pathsep.join(filter(None, [str(FOLDER), environment.get("PYTHONPATH")]))
    return {**environment, "PYTHONPATH": path, RECORD: str(record)}


def unguarded(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment without the guard, for what is made once and kept."""
    return {name: value for name, value in environment.items() if name != RECORD}


def pytest_configure() -> None:
    """Guard this process and its children. Each worker of a parallel run has a record of its own."""
    os.environ.update(guarded(os.environ, Path(tempfile.mkdtemp(prefix="no-engine-")) / "refused"))
    no_engine_hook.install()


def pytest_unconfigure() -> None:
    """Remove the record."""
    shutil.rmtree(Path(os.environ[RECORD]).parent)


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave out what imports torch when it is collected: the engine's own tests, and files that are marked `engine`."""
    if collection_path == ENGINE_TESTS:
        return True
    if collection_path.suffix == ".py" and _MARKED.search(collection_path.read_text(encoding="utf-8")):
        return True
    return None  # others decide


def pytest_collection_finish() -> None:
    """Refuse the whole run where importing a test's file needs torch: the blame would fall on another file's test."""
    if refused := _taken():
        raise pytest.UsageError(f"The import of a test's file is no fast test. It needs:\n{refused}")


@pytest.fixture(autouse=True)
def _nothing_was_refused() -> Iterator[None]:
    """Fail a test that started an engine or imported torch, even where what it called handled the refusal."""
    yield
    if refused := _taken():
        pytest.fail(f"This is no fast test, so it has to be marked `engine`. It needs:\n{refused}")


def _taken() -> str:
    """Take what the record says, and empty it."""
    record = Path(os.environ[RECORD])
    if not record.exists():
        return ""
    refused = record.read_text(encoding="utf-8")
    record.unlink()
    return refused
