"""Engines that are started when they are asked for, as a server has them whose settings keep none ready."""

from pathlib import Path

from core.clock import SystemClock
from services.engines.process import EngineProcess
from services.engines.warm import Engines, HostMemory, StartsEngine


def engines_on_demand(start: StartsEngine = EngineProcess) -> Engines:
    """Return engines of which none is kept ready."""
    return Engines(
        SystemClock(), start, list, lambda: HostMemory(0, 0), log_dir=Path("nowhere"), silence_s=60.0, most_bytes=0
    )
