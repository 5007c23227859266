"""A PEFT service whose engines take no time, on a machine with room for one load and a half."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from services.peft_service import PeftService
from tests.support.engine_double import EngineDoubles
from tests.support.hub_double import ManualClock
from tests.support.little_memory import peft_with_little_memory


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def engines() -> EngineDoubles:
    return EngineDoubles()


@pytest.fixture
def precision() -> str:
    """Return the precision whose load the machine has room for: what is configured where memory is this short."""
    return "bf16"


@pytest.fixture
def peft(clock: ManualClock, engines: EngineDoubles, precision: str, tmp_path: Path) -> Iterator[PeftService]:
    service = peft_with_little_memory(clock, engines, precision, tmp_path)
    yield service
    service.close()
