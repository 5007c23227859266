"""GPUs as NVML really answers: several, some queries unsupported, one lost, MIG, no driver."""

from typing import Any, NamedTuple

import pynvml
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.hardware.nvml_probe import GpuReading, NvmlProbe

GIB = 2**30
NOT_SUPPORTED = pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
NO_FUNCTION = pynvml.NVMLError(pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)
LOST = pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
READ_FIELDS = (
    *("uuid", "name", "memory_total_bytes", "memory_used_bytes", "memory_free_bytes", "compute_capability"),
    *("supports_bf16", "utilization_percent", "temperature_c", "power_w"),
)


def answer(value: Any) -> Any:
    if isinstance(value, Exception):
        raise value
    return value


class Memory(NamedTuple):
    """As pynvml says it, in bytes."""

    total: int
    used: int
    free: int


class Rates(NamedTuple):
    """As pynvml says it, in percent."""

    gpu: int
    memory: int


def memory(total_gib: int, used_gib: int) -> Memory:
    return Memory(total_gib * GIB, used_gib * GIB, (total_gib - used_gib) * GIB)


def h100() -> dict[str, Any]:
    return {
        "handle": None,
        "UUID": "GPU-0",
        "Name": "NVIDIA H100",
        "MemoryInfo": memory(80, 30),
        "CudaComputeCapability": (9, 0),
        "UtilizationRates": Rates(37, 5),
        "Temperature": 51,
        "PowerUsage": 312_500,
        "MigMode": [0, 0],
    }


def t4() -> dict[str, Any]:
    """A card without sensors, with the bytes that older drivers answer."""
    silent = dict.fromkeys(("UtilizationRates", "Temperature", "PowerUsage"), NOT_SUPPORTED)
    names = {"UUID": b"GPU-1", "Name": b"Tesla T4", "MemoryInfo": memory(16, 0), "CudaComputeCapability": (7, 5)}
    return h100() | silent | names | {"MigMode": NO_FUNCTION}


def lost() -> dict[str, Any]:
    return h100() | {"handle": LOST}


class FakeNvml:
    """pynvml with cards of our own; its errors and constants are the real ones."""

    def __init__(self, *cards: dict[str, Any]) -> None:
        self.cards: list[dict[str, Any]] = list(cards) or [h100(), t4(), lost()]
        self.init_error: Exception | None = None
        self.count_error: Exception | None = None
        self.cuda_v2: Any = 12080
        self.starts = 0

    def nvmlInit(self) -> None:
        self.starts += 1
        answer(self.init_error)

    def nvmlShutdown(self) -> None:
        answer(self.count_error)

    def nvmlSystemGetDriverVersion(self) -> bytes:
        return b"570.86.10"

    def nvmlSystemGetCudaDriverVersion_v2(self) -> Any:
        return answer(self.cuda_v2)

    def nvmlSystemGetCudaDriverVersion(self) -> int:
        return 10020

    def nvmlDeviceGetCount(self) -> int:
        answer(self.count_error)
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> dict[str, Any]:
        answer(self.cards[index]["handle"])
        return self.cards[index]

    def nvmlDeviceGetMaxMigDeviceCount(self, card: dict[str, Any]) -> int:
        return len(card["instances"])

    def nvmlDeviceGetMigDeviceHandleByIndex(self, card: dict[str, Any], index: int) -> Any:
        return answer(card["instances"][index])

    def __getattr__(self, name: str) -> Any:
        if name.startswith("nvmlDeviceGet"):
            return lambda card, *_: answer(card[name.removeprefix("nvmlDeviceGet")])
        return getattr(pynvml, name)


def no_driver() -> FakeNvml:
    nvml = FakeNvml()
    nvml.init_error = pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)
    return nvml


def read(*cards: dict[str, Any]) -> tuple[GpuReading, ...]:
    return NvmlProbe(FakeNvml(*cards)).gpus()


def test_a_whole_card_is_read_in_full() -> None:
    (gpu,) = read(h100())
    assert gpu == GpuReading(
        index=0,
        uuid="GPU-0",
        name="NVIDIA H100",
        memory_total_bytes=80 * GIB,
        memory_used_bytes=30 * GIB,
        memory_free_bytes=50 * GIB,
        compute_capability="9.0",
        supports_bf16=True,
        utilization_percent=37,
        temperature_c=51,
        power_w=312.5,
        error=None,
    )


def test_what_a_card_does_not_support_is_none_and_never_zero() -> None:
    (gpu,) = read(t4())
    assert (gpu.uuid, gpu.name, gpu.supports_bf16) == ("GPU-1", "Tesla T4", False)
    assert (gpu.utilization_percent, gpu.temperature_c, gpu.power_w, gpu.error) == (None, None, None, None)
    assert gpu.memory_used_bytes == 0  # this one is known


@pytest.mark.parametrize("answered", [NOT_SUPPORTED, Memory(0, 0, 0)])
def test_the_memory_of_a_gpu_that_shares_the_hosts_is_not_known(answered: Any) -> None:
    (gpu,) = read(h100() | {"MemoryInfo": answered})
    assert (gpu.memory_total_bytes, gpu.memory_used_bytes, gpu.memory_free_bytes) == (None, None, None)
    assert (gpu.name, gpu.error) == ("NVIDIA H100", None)


def test_a_card_that_hides_its_uuid_is_read_all_the_same() -> None:
    (gpu,) = read(h100() | {"UUID": pynvml.NVMLError(pynvml.NVML_ERROR_NO_PERMISSION)})
    assert (gpu.uuid, gpu.memory_total_bytes, gpu.error) == (None, 80 * GIB, None)


def test_a_lost_card_is_marked_and_the_others_answer() -> None:
    gpus = read(h100(), lost(), t4())
    assert [gpu.error for gpu in gpus] == [None, "GPU is lost", None]
    assert [gpu.index for gpu in gpus] == [0, 1, 2]
    assert gpus[1].memory_total_bytes is None


def test_a_card_that_is_lost_between_two_queries_is_marked() -> None:
    (gpu,) = read(h100() | {"MemoryInfo": LOST, "PowerUsage": LOST})
    assert (gpu.name, gpu.memory_total_bytes, gpu.error) == ("NVIDIA H100", None, "GPU is lost")


QUERIES = sorted(set(h100()) - {"handle", "MigMode"})


@given(st.dictionaries(st.sampled_from(QUERIES), st.sampled_from([NOT_SUPPORTED, NO_FUNCTION, LOST])))
def test_any_query_may_fail_and_costs_its_own_fields_only(failing: dict[str, Any]) -> None:
    (whole,), (gpu,) = read(h100()), read(h100() | failing)
    assert (gpu.error is not None) == (LOST in failing.values())
    fields = {
        "uuid": "UUID",
        "name": "Name",
        "utilization_percent": "UtilizationRates",
        "temperature_c": "Temperature",
    }
    fields |= {"power_w": "PowerUsage", "compute_capability": "CudaComputeCapability"}
    fields |= {"supports_bf16": "CudaComputeCapability"}
    for field in READ_FIELDS:
        failed = fields.get(field, "MemoryInfo") in failing
        assert getattr(gpu, field) == (None if failed else getattr(whole, field))


def test_with_mig_on_the_first_instance_is_what_a_process_gets() -> None:
    instance = {"UUID": "MIG-1", "Name": "NVIDIA H100 MIG 1g.10gb", "MemoryInfo": memory(10, 1)}
    not_made = pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
    card = h100() | {"MigMode": [1, 1], "instances": [not_made, instance], "UtilizationRates": NOT_SUPPORTED}
    (gpu,) = read(card)
    assert (gpu.uuid, gpu.name, gpu.memory_free_bytes) == ("MIG-1", "NVIDIA H100 MIG 1g.10gb", 9 * GIB)
    assert (gpu.compute_capability, gpu.temperature_c, gpu.utilization_percent) == ("9.0", 51, None)
    assert gpu.error is None


def test_with_mig_on_and_no_instance_the_gpu_cannot_be_used() -> None:
    (gpu,) = read(h100() | {"MigMode": [1, 1], "instances": []})
    assert gpu.memory_total_bytes is None and "no MIG instance" in (gpu.error or "")


def test_the_drivers_versions() -> None:
    facts = NvmlProbe(FakeNvml()).driver()
    assert (facts.available, facts.driver_version, facts.cuda_version) == (True, "570.86.10", "12.8")
    assert facts.reason is None and facts.fix is None


def test_an_old_driver_is_asked_for_its_cuda_version_the_old_way() -> None:
    nvml = FakeNvml()
    nvml.cuda_v2 = NO_FUNCTION
    assert NvmlProbe(nvml).driver().cuda_version == "10.2"


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, "no NVIDIA driver is installed"),
        (pynvml.NVML_ERROR_DRIVER_NOT_LOADED, "kernel module is not loaded"),
        (pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH, "different versions"),
        (pynvml.NVML_ERROR_NO_PERMISSION, "may not open"),
        (pynvml.NVML_ERROR_UNKNOWN, "Unknown Error"),
    ],
)
def test_without_a_driver_there_are_no_gpus_and_the_reason_is_kept(code: int, words: str) -> None:
    nvml = FakeNvml()
    nvml.init_error = pynvml.NVMLError(code)
    probe = NvmlProbe(nvml)
    assert probe.gpus() == ()
    facts = probe.driver()
    assert not facts.available and words in (facts.reason or "") and facts.fix


def test_a_driver_that_appears_later_is_found() -> None:
    nvml = no_driver()
    probe = NvmlProbe(nvml)
    assert probe.gpus() == ()
    nvml.init_error = None
    assert len(probe.gpus()) == 3 and probe.driver().available


def test_a_driver_that_goes_away_and_comes_back_is_found_again() -> None:
    nvml = FakeNvml()
    probe = NvmlProbe(nvml)
    assert len(probe.gpus()) == 3
    nvml.count_error = pynvml.NVMLError(pynvml.NVML_ERROR_UNKNOWN)
    assert probe.gpus() == ()
    assert not probe.driver().available and "Unknown Error" in (probe.driver().reason or "")
    nvml.count_error = None
    assert len(probe.gpus()) == 3 and probe.driver().available


def test_nvml_is_started_once() -> None:
    nvml = FakeNvml()
    probe = NvmlProbe(nvml)
    for _ in range(3):
        probe.gpus()
        probe.driver()
    assert nvml.starts == 1


def test_the_real_library_answers_or_says_why_not() -> None:
    probe = NvmlProbe()
    facts = probe.driver()
    assert facts.available == (facts.reason is None)
    assert facts.available or probe.gpus() == ()
