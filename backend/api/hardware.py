"""/api/hardware: the machine."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query
from fastapi.sse import EventSourceResponse, ServerSentEvent

from api.hardware_schemas import Profile, Usage, Validation
from services.engine_service import get_engines
from services.engines.warm import Engines
from services.hardware_service import HardwareService, get_hardware_service
from store.records import to_text

router = APIRouter(prefix="/api/hardware", tags=["hardware"])
Hardware = Annotated[HardwareService, Depends(get_hardware_service)]
Warm = Annotated[Engines, Depends(get_engines)]
Refresh = Annotated[bool, Query(description="Measure, or test, again now.")]
Interval = Annotated[float, Query(ge=0.1, le=60, description="Seconds from one reading to the next.")]


@router.get("/profile")
def profile(hardware: Hardware, engines: Warm, refresh: Refresh = False) -> Profile:
    """The machine, measured at most five minutes ago. In a container, its memory limit counts as the memory.

    `warm_engines` is as it is now.
    """
    timed = hardware.profile(refresh=refresh)
    times = {
        "measured_at": to_text(timed.measured_at),
        "age_s": timed.age_s,
        "expires_at": to_text(timed.expires_at),
    }
    return Profile.model_validate(asdict(timed.value) | times | _warm(engines))


@router.get("/cuda/validate")
def validate_cuda(hardware: Hardware, refresh: Refresh = False) -> Validation:
    """Test that a CUDA fine-tune would work: driver, torch, matrix products, bf16, 4-bit, Unsloth.

    The test takes up to a minute. What torch found is kept for an hour if nothing failed, or until driver, GPUs or
    packages change. Without a GPU one check says so, and `valid` is false.
    """
    found = hardware.validate_cuda(refresh=refresh)
    return Validation.model_validate(asdict(found) | {"checked_at": to_text(found.checked_at)})


@router.get("/usage")
def usage(hardware: Hardware, engines: Warm) -> Usage:
    """One live reading."""
    return Usage.model_validate(asdict(hardware.usage()) | _warm(engines))


def _warm(engines: Engines) -> dict[str, Any]:
    return {"warm_engines": [asdict(engine) for engine in engines.standing()]}


@router.get("/stream", response_class=EventSourceResponse)
async def stream(hardware: Hardware, engines: Warm, interval_s: Interval = 1.0) -> AsyncIterator[ServerSentEvent]:
    """Live readings as server-sent events named `usage`, until the client disconnects."""
    while True:
        reading = await asyncio.to_thread(usage, hardware, engines)  # a slow driver must not hold up other requests
        yield ServerSentEvent(data=reading, event="usage")
        await asyncio.sleep(interval_s)
