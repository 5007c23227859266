"""/api/hardware over HTTP: the fields of the contract, refusals, and a stream that ends with its reader."""

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from api.hardware import router
from core.ttl_cache import Timed
from services.engine_service import get_engines
from services.hardware.cuda_checks import CudaCheck
from services.hardware.devices import EngineChoice
from services.hardware.host_probe import CpuReading, DiskReading, MemoryReading
from services.hardware.nvml_probe import GpuReading
from services.hardware_service import (
    CudaFacts,
    CudaValidation,
    HardwareProfile,
    UsageReading,
    get_hardware_service,
)
from tests.support.no_warm_engines import engines_on_demand

GPU = GpuReading(0, "GPU-0", "NVIDIA H100", 80, 30, 50, "9.0", True, 37, 51, 312.5, None)
CPU = CpuReading("EPYC", "x86_64", 8, 16, 3500.0, 12.5, ("avx2",))
MEMORY = MemoryReading(9, 6, 3, 33.3, None)
USAGE = UsageReading((GPU, GpuReading(1, error="GPU is lost")), CPU, MEMORY, DiskReading("/d", 8, 4))
PROFILE = HardwareProfile(
    gpus=USAGE.gpus,
    cpu=CPU,
    memory=MEMORY,
    disk=USAGE.disk,
    cuda=CudaFacts(True, "570.86.10", "12.8", None),
    platform="Linux",
    python_version="3.11.9",
    packages={"torch": "2.13.0", "unsloth": None},
    engine=EngineChoice("transformers", "the package unsloth is not installed"),
)
MEASURED_AT = datetime(2026, 1, 1, 12, 0, 0, tzinfo=UTC)


class FakeHardware:
    """A HardwareService that answers from memory and writes down what it was asked."""

    def __init__(self) -> None:
        self.refreshes: list[bool] = []
        self.on_usage: Callable[[], None] = lambda: None
        self.readings = 0

    def profile(self, *, refresh: bool = False) -> Timed[HardwareProfile]:
        self.refreshes.append(refresh)
        return Timed(PROFILE, MEASURED_AT, MEASURED_AT.replace(minute=5), 1.5)

    def usage(self) -> UsageReading:
        self.on_usage()
        self.readings += 1
        return replace(USAGE, memory=replace(MEMORY, used_bytes=self.readings))

    def validate_cuda(self, *, refresh: bool = False) -> CudaValidation:
        self.refreshes.append(refresh)
        check = CudaCheck("driver", "fail", "No driver.", "Install it.")
        return CudaValidation(False, (check,), MEASURED_AT, 12.5)


@pytest.fixture
def hardware() -> FakeHardware:
    return FakeHardware()


@pytest.fixture
def app(hardware: FakeHardware) -> FastAPI:
    app = FastAPI()
    app.include_router(router)
    app.dependency_overrides[get_hardware_service] = lambda: hardware
    app.dependency_overrides[get_engines] = lambda: engines_on_demand()
    return app


@pytest.fixture
def client(app: FastAPI) -> Iterator[TestClient]:
    with TestClient(app) as client:
        yield client


def fields(text: str) -> set[str]:
    return set(text.split())


def test_the_profile_has_the_contracts_fields(client: TestClient) -> None:
    profile = client.get("/api/hardware/profile").json()
    assert set(profile) == fields(
        "gpus cpu memory disk cuda platform python_version packages engine measured_at age_s expires_at warm_engines"
    )
    assert set(profile["gpus"][0]) == fields(
        "index uuid name memory_total_bytes memory_used_bytes memory_free_bytes compute_capability supports_bf16"
        " utilization_percent temperature_c power_w error"
    )
    assert set(profile["cpu"]) == fields(
        "model architecture physical_cores logical_cores max_frequency_mhz utilization_percent features"
    )
    assert set(profile["memory"]) == fields("total_bytes available_bytes used_bytes used_percent limited_by")
    assert set(profile["disk"]) == fields("path total_bytes free_bytes")
    assert set(profile["cuda"]) == fields("available driver_version cuda_version reason")
    assert (profile["measured_at"], profile["expires_at"], profile["age_s"]) == (
        "2026-01-01T12:00:00.000000Z",
        "2026-01-01T12:05:00.000000Z",
        1.5,
    )


def test_what_is_not_known_is_null_and_still_there(client: TestClient) -> None:
    gpus = client.get("/api/hardware/profile").json()["gpus"]
    assert gpus[1].pop("error") == "GPU is lost" and gpus[1].pop("index") == 1
    assert set(gpus[1].values()) == {None} and len(gpus[1]) == 10


@pytest.mark.parametrize(("query", "refresh"), [("", False), ("?refresh=true", True), ("?refresh=false", False)])
def test_a_refresh_is_asked_for(client: TestClient, hardware: FakeHardware, query: str, refresh: bool) -> None:
    assert client.get(f"/api/hardware/profile{query}").status_code == 200
    assert hardware.refreshes == [refresh]


def test_a_validation_that_fails_is_still_an_answer(client: TestClient, hardware: FakeHardware) -> None:
    response = client.get("/api/hardware/cuda/validate")
    assert response.status_code == 200
    assert response.json() == {
        "valid": False,
        "checks": [{"name": "driver", "status": "fail", "detail": "No driver.", "fix": "Install it."}],
        "checked_at": "2026-01-01T12:00:00.000000Z",
        "age_s": 12.5,
    }
    assert client.get("/api/hardware/cuda/validate", params={"refresh": "true"}).status_code == 200
    assert hardware.refreshes == [False, True]


def test_usage_is_one_live_reading(client: TestClient) -> None:
    readings = [client.get("/api/hardware/usage").json() for _ in range(2)]
    assert set(readings[0]) == {"gpus", "cpu", "memory", "disk", "warm_engines"}
    assert [reading["memory"]["used_bytes"] for reading in readings] == [1, 2]


@pytest.mark.parametrize("interval_s", ["0", "0.09", "60.1", "-1", "nan", "inf", "soon"])
def test_an_interval_out_of_range_is_refused_before_the_stream_starts(
    client: TestClient, hardware: FakeHardware, interval_s: str
) -> None:
    assert client.get("/api/hardware/stream", params={"interval_s": interval_s}).status_code == 422
    assert hardware.readings == 0


def test_response_schemas_have_no_defaults(app: FastAPI) -> None:
    schemas = app.openapi()["components"]["schemas"]
    for name in (
        "Profile",
        "Usage",
        "WarmEngine",
        "Gpu",
        "Cpu",
        "Memory",
        "Disk",
        "Cuda",
        "Engine",
        "CheckResult",
        "Validation",
    ):
        assert set(schemas[name]["required"]) == set(schemas[name]["properties"])


class Reader:
    """An ASGI client of the stream that goes away after `events` events."""

    def __init__(self, app: FastAPI, events: int) -> None:
        self._app, self._events = app, events
        self._sent, self._gone = False, asyncio.Event()
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = b""

    async def read(self) -> None:
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "GET",
            "path": "/api/hardware/stream",
            "raw_path": b"/api/hardware/stream",
            "query_string": b"interval_s=0.1",
            "root_path": "",
            "headers": [(b"host", b"127.0.0.1")],
            "scheme": "http",
            "server": ("127.0.0.1", 80),
            "client": ("127.0.0.1", 1),
        }
        await self._app(scope, self._receive, self._send)

    async def _receive(self) -> dict[str, Any]:
        if not self._sent:
            self._sent = True
            return {"type": "http.request", "body": b"", "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        self.body += message.get("body", b"")
        if len(self.events()) >= self._events:
            self._gone.set()

    def events(self) -> list[str]:
        return self.body.decode().split("\n\n")[:-1]


def test_the_stream_ends_when_its_reader_goes_away(app: FastAPI, hardware: FakeHardware) -> None:
    async def scenario() -> Reader:
        reader = Reader(app, events=2)
        await asyncio.wait_for(reader.read(), 30)
        return reader

    reader = asyncio.run(scenario())
    assert reader.status == 200 and reader.headers["content-type"].startswith("text/event-stream")
    first, second = reader.events()[:2]
    assert first.startswith("event: usage\ndata: {")
    readings = [json.loads(event.partition("data: ")[2]) for event in (first, second)]
    assert [reading["memory"]["used_bytes"] for reading in readings] == [1, 2]
    assert set(readings[0]) == {"gpus", "cpu", "memory", "disk", "warm_engines"}
    assert hardware.readings <= 3  # none after the reader has gone, but for the one under way


def test_a_slow_driver_does_not_hold_the_loop_up(app: FastAPI, hardware: FakeHardware) -> None:
    asked, answered = threading.Event(), threading.Event()

    def slow() -> None:
        asked.set()
        assert answered.wait(600)

    hardware.on_usage = slow

    async def scenario() -> None:
        stream = asyncio.create_task(Reader(app, events=1).read())
        assert await asyncio.to_thread(asked.wait, 30)
        answered.set()  # reached only if the reading leaves the loop free
        await asyncio.wait_for(stream, 30)

    asyncio.run(scenario())
    assert hardware.readings >= 1
