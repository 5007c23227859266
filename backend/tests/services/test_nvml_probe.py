"""GPUs as NVML really answers: several, some queries unsupported, one lost, no driver."""

from types import SimpleNamespace
from typing import Any

import pytest

from services.cuda_checks import CudaCheck, run_cuda_checks
from services.hardware_service import HardwareService, select_engine
from services.host_probe import HostProbe
from services.nvml_probe import NvmlProbe

GIB = 2**30


class NVMLError(Exception):
    """As pynvml's."""


def answer(value: Any) -> Any:
    if isinstance(value, Exception):
        raise value
    return value


class FakeNvml:
    """Three cards: a whole one, one without sensors on an old driver's bytes, one that fell off the bus."""

    NVMLError = NVMLError
    NVML_TEMPERATURE_GPU = 0

    def __init__(self) -> None:
        unsupported = NVMLError("Not Supported")
        self.cards: list[dict[str, Any]] = [
            {
                "uuid": "GPU-0",
                "name": "NVIDIA H100",
                "memory": SimpleNamespace(total=80 * GIB, used=30 * GIB, free=50 * GIB),
                "capability": (9, 0),
                "utilization": SimpleNamespace(gpu=37),
                "temperature": 51,
                "power": 312_500,
            },
            {
                "uuid": b"GPU-1",
                "name": b"Tesla T4",
                "memory": SimpleNamespace(total=16 * GIB, used=0, free=16 * GIB),
                "capability": (7, 5),
                "utilization": unsupported,
                "temperature": unsupported,
                "power": unsupported,
            },
            {"uuid": NVMLError("GPU is lost")},
        ]

    def nvmlInit(self) -> None: ...

    def nvmlSystemGetDriverVersion(self) -> bytes:
        return b"570.86.10"

    def nvmlSystemGetCudaDriverVersion_v2(self) -> int:
        return 12080

    def nvmlDeviceGetCount(self) -> int:
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> dict[str, Any]:
        return self.cards[index]

    def nvmlDeviceGetUUID(self, card: dict[str, Any]) -> Any:
        return answer(card["uuid"])

    def nvmlDeviceGetName(self, card: dict[str, Any]) -> Any:
        return answer(card["name"])

    def nvmlDeviceGetMemoryInfo(self, card: dict[str, Any]) -> Any:
        return answer(card["memory"])

    def nvmlDeviceGetCudaComputeCapability(self, card: dict[str, Any]) -> Any:
        return answer(card["capability"])

    def nvmlDeviceGetUtilizationRates(self, card: dict[str, Any]) -> Any:
        return answer(card["utilization"])

    def nvmlDeviceGetTemperature(self, card: dict[str, Any], _sensor: int) -> Any:
        return answer(card["temperature"])

    def nvmlDeviceGetPowerUsage(self, card: dict[str, Any]) -> Any:
        return answer(card["power"])


class NoDriver(FakeNvml):
    def nvmlInit(self) -> None:
        raise NVMLError("NVML Shared Library Not Found")


def test_a_whole_card_is_read_in_full() -> None:
    gpu = NvmlProbe(FakeNvml()).gpus()[0]
    assert (gpu.uuid, gpu.name, gpu.compute_capability, gpu.supports_bf16) == ("GPU-0", "NVIDIA H100", "9.0", True)
    assert (gpu.memory_total_bytes, gpu.memory_used_bytes, gpu.memory_free_bytes) == (80 * GIB, 30 * GIB, 50 * GIB)
    assert (gpu.utilization_percent, gpu.temperature_c, gpu.power_w, gpu.error) == (37, 51, 312.5, None)


def test_what_a_card_does_not_support_is_none_and_never_zero() -> None:
    gpu = NvmlProbe(FakeNvml()).gpus()[1]
    assert (gpu.uuid, gpu.name, gpu.supports_bf16) == ("GPU-1", "Tesla T4", False)
    assert (gpu.utilization_percent, gpu.temperature_c, gpu.power_w) == (None, None, None)
    assert gpu.memory_used_bytes == 0


def test_a_lost_card_is_marked_and_the_others_answer() -> None:
    gpus = NvmlProbe(FakeNvml()).gpus()
    assert [gpu.error for gpu in gpus] == [None, None, "GPU is lost"]
    assert gpus[2].memory_total_bytes is None


def test_versions_and_their_absence() -> None:
    facts = NvmlProbe(FakeNvml()).driver()
    assert (facts.available, facts.driver_version, facts.cuda_version) == (True, "570.86.10", "12.8")
    none = NvmlProbe(NoDriver())
    assert none.gpus() == ()
    assert not none.driver().available and "Not Found" in (none.driver().reason or "")


def test_a_driver_that_appears_later_is_found() -> None:
    nvml = NoDriver()
    probe = NvmlProbe(nvml)
    assert probe.gpus() == ()
    nvml.nvmlInit = lambda: None  # type: ignore[method-assign]
    assert len(probe.gpus()) == 3


@pytest.mark.parametrize(
    ("cards", "unsloth", "engine"),
    [
        ([0, 1, 2], "2026.10.7", "unsloth"),
        ([1], "1", "unsloth"),
        ([2], "1", "transformers"),
        ([0], None, "transformers"),
    ],
)
def test_the_engine_follows_the_best_card_that_answers(cards: list[int], unsloth: str | None, engine: str) -> None:
    gpus = NvmlProbe(FakeNvml()).gpus()
    choice = select_engine(tuple(gpus[index] for index in cards), {"unsloth": unsloth})
    assert choice.name == engine and choice.reason


class Clock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def monotonic(self) -> float:
        return self.seconds

    def now(self) -> Any:
        from datetime import UTC, datetime, timedelta

        return datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=self.seconds)


def _service(nvml: Any, tmp_path: Any, checks: Any = list, clock: Clock | None = None) -> HardwareService:
    return HardwareService(clock or Clock(), NvmlProbe(nvml), HostProbe(), dict, tmp_path, checks)


def test_the_profile_is_measured_every_five_minutes_or_when_asked(tmp_path: Any) -> None:
    clock, nvml = Clock(), FakeNvml()
    service = _service(nvml, tmp_path, clock=clock)
    assert len(service.profile().value.gpus) == 3
    nvml.cards.pop()
    clock.seconds = 299.9
    held = service.profile()
    assert len(held.value.gpus) == 3 and held.age_s == 299.9
    assert len(service.profile(refresh=True).value.gpus) == 2
    nvml.cards.pop()
    clock.seconds += 300
    assert len(service.profile().value.gpus) == 1
    assert service.profile().age_s == 0


def test_validation_says_in_one_check_that_there_is_no_gpu(tmp_path: Any) -> None:
    def never() -> list[CudaCheck]:
        raise AssertionError("torch must not be asked without a GPU")

    found = _service(NoDriver(), tmp_path, never).validate_cuda()
    assert not found.valid and [(check.name, check.status) for check in found.checks] == [("driver", "fail")]
    assert found.checks[0].fix


def test_validation_is_as_good_as_its_worst_check(tmp_path: Any) -> None:
    nvml = FakeNvml()
    passing = lambda: [CudaCheck("torch_build", "pass", "d", None), CudaCheck("memory_0", "warn", "d", "f")]  # noqa: E731
    assert not _service(nvml, tmp_path, passing).validate_cuda().valid  # a lost card
    nvml.cards.pop()
    assert _service(nvml, tmp_path, passing).validate_cuda().valid


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "signal 11"),
        ("import sys; sys.stderr.write('driver too old'); sys.exit(3)", "driver too old"),
        ("pass", "exit code 0"),
        ("import time; time.sleep(60)", "did not end within"),
    ],
)
def test_checks_that_crash_or_hang_are_a_failed_check(code: str, words: str) -> None:
    (check,) = run_cuda_checks(("-c", code), limit_s=2)
    assert check.status == "fail" and words in check.detail


def test_the_checks_themselves_run_here_and_name_the_cpu_build() -> None:
    checks = run_cuda_checks()
    assert checks[0].name == "torch_build"
    assert checks[0].status == "pass" or checks[0].fix
