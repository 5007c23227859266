"""/api/hardware: the machine."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import asdict
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Query
from fastapi.responses import StreamingResponse
from fastapi.sse import format_sse_event
from pydantic import Field

from api.peft_schemas import Response
from services.hardware_service import HardwareService, get_hardware_service
from store.records import to_text

router = APIRouter(prefix="/api/hardware", tags=["hardware"])
Hardware = Annotated[HardwareService, Depends(get_hardware_service)]


class Gpu(Response):
    index: int
    uuid: str | None
    name: str | None
    memory_total_bytes: int | None
    memory_used_bytes: int | None = Field(description="By every program, this one included.")
    memory_free_bytes: int | None
    compute_capability: str | None
    supports_bf16: bool | None
    utilization_percent: int | None
    temperature_c: int | None
    power_w: float | None
    error: str | None = Field(description="Why this GPU does not answer; null if it does.")


class Cpu(Response):
    model: str | None
    architecture: str
    physical_cores: int | None
    logical_cores: int = Field(description="Cores that this process may use.")
    max_frequency_mhz: float | None
    utilization_percent: float = Field(description="Since the reading before.")
    features: list[str]


class Memory(Response):
    total_bytes: int = Field(description="The host's, or the container's limit.")
    available_bytes: int
    used_bytes: int
    used_percent: float
    limited_by: Literal["cgroup"] | None


class Disk(Response):
    path: str
    total_bytes: int
    free_bytes: int


class Cuda(Response):
    available: bool
    driver_version: str | None
    cuda_version: str | None = Field(description="The newest CUDA that the driver supports.")
    reason: str | None


class Engine(Response):
    name: Literal["unsloth", "transformers"]
    reason: str


class Usage(Response):
    gpus: list[Gpu]
    cpu: Cpu
    memory: Memory
    disk: Disk


class Profile(Usage):
    cuda: Cuda
    platform: str
    python_version: str
    packages: dict[str, str | None]
    engine: Engine
    measured_at: str
    age_s: float
    expires_at: str


class CheckResult(Response):
    name: str
    status: Literal["pass", "fail", "warn", "skip"]
    detail: str
    fix: str | None


class Validation(Response):
    valid: bool
    checks: list[CheckResult]


@router.get("/profile")
def profile(hardware: Hardware, refresh: Annotated[bool, Query(description="Measure again now.")] = False) -> Profile:
    """The machine, measured at most five minutes ago. In a container, its limit is the memory there is."""
    timed = hardware.profile(refresh=refresh)
    return Profile.model_validate(
        asdict(timed.value)
        | {
            "measured_at": to_text(timed.measured_at),
            "age_s": timed.age_s,
            "expires_at": to_text(timed.expires_at),
        }
    )


@router.get("/cuda/validate")
def validate_cuda(hardware: Hardware) -> Validation:
    """Check for real that a CUDA fine-tune would work: driver, torch, matrix products, bf16, 4-bit, Unsloth.

    Without a GPU one check says so, and `valid` is false.
    """
    return Validation.model_validate(asdict(hardware.validate_cuda()))


@router.get("/usage")
def usage(hardware: Hardware) -> Usage:
    """One live reading."""
    return Usage.model_validate(asdict(hardware.usage()))


@router.get("/stream", response_class=StreamingResponse)
async def stream(hardware: Hardware, interval_s: Annotated[float, Query(ge=0.1, le=60)] = 1.0) -> StreamingResponse:
    """Live readings as server-sent events named `usage`, until the reader goes away."""
    return StreamingResponse(_readings(hardware, interval_s), media_type="text/event-stream")


async def _readings(hardware: HardwareService, interval_s: float) -> AsyncIterator[bytes]:
    while True:
        reading = Usage.model_validate(asdict(await asyncio.to_thread(hardware.usage)))
        yield format_sse_event(data_str=reading.model_dump_json(), event="usage")
        await asyncio.sleep(interval_s)
