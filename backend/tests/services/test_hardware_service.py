"""The profile's five minutes, the choice of engine, and a validation that always ends with an answer."""

import os
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.hardware.cuda_checks import CudaCheck, run_cuda_checks
from services.hardware.host_probe import HostProbe
from services.hardware.nvml_probe import GpuReading, NvmlProbe
from services.hardware_service import PACKAGES, HardwareService, installed_versions, select_engine
from tests.core.test_environment import SECRETS
from tests.services.hardware.test_host_probe import FakeSystem, Stopwatch
from tests.services.hardware.test_nvml_probe import FakeNvml, h100, lost, no_driver, t4


class Clock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def monotonic(self) -> float:
        return self.seconds

    def now(self) -> datetime:
        return datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=self.seconds)


Make = Callable[..., HardwareService]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    def service(nvml: Any, checks: Callable[[], list[CudaCheck]] = list, clock: Any = None) -> HardwareService:
        watch = Stopwatch()
        host = HostProbe(tmp_path, FakeSystem(), watch.monotonic, watch.sleep)
        return HardwareService(clock or Clock(), NvmlProbe(nvml), host, dict, tmp_path, checks)

    return service


def never() -> list[CudaCheck]:
    raise AssertionError("torch must not be asked without a GPU that answers")


def passing() -> list[CudaCheck]:
    return [CudaCheck("torch_build", "pass", "d", None), CudaCheck("memory_0", "warn", "d", "f")]


def test_the_profile_is_measured_every_five_minutes_or_when_asked(make: Make) -> None:
    clock, nvml = Clock(), FakeNvml()
    service = make(nvml, clock=clock)
    assert len(service.profile().value.gpus) == 3
    nvml.cards.pop()
    clock.seconds = 299.9
    held = service.profile()
    assert len(held.value.gpus) == 3 and held.age_s == 299.9
    assert held.expires_at - held.measured_at == timedelta(minutes=5)
    assert len(service.profile(refresh=True).value.gpus) == 2
    nvml.cards.pop()
    clock.seconds += 300
    assert len(service.profile().value.gpus) == 1
    assert service.profile().age_s == 0


def test_usage_is_never_cached(make: Make) -> None:
    nvml = FakeNvml()
    service = make(nvml)
    assert len(service.usage().gpus) == 3
    nvml.cards.pop()
    assert len(service.usage().gpus) == 2


@pytest.mark.parametrize(
    ("nvml", "available", "words"),
    [
        (FakeNvml(), True, None),
        (FakeNvml(lost()), False, "GPU 0: GPU is lost"),
        (no_driver(), False, "no NVIDIA driver"),
    ],
)
def test_cuda_is_available_where_a_gpu_answers(make: Make, nvml: Any, available: bool, words: str | None) -> None:
    cuda = make(nvml).profile().value.cuda
    assert cuda.available == available
    assert cuda.reason is None if words is None else words in (cuda.reason or "")


def test_a_driver_without_gpus_is_no_cuda(make: Make) -> None:
    nvml = FakeNvml()
    nvml.cards.clear()
    service = make(nvml, never)
    cuda = service.profile().value.cuda
    assert (cuda.available, cuda.driver_version, cuda.reason) == (False, "570.86.10", "the driver lists no GPU")
    validation = service.validate_cuda()
    assert not validation.valid and [check.name for check in validation.checks] == ["device"]
    assert validation.checks[0].fix


def read(*cards: dict[str, Any]) -> tuple[GpuReading, ...]:
    return NvmlProbe(FakeNvml(*cards)).gpus()


@pytest.mark.parametrize(
    ("cards", "unsloth", "engine", "words"),
    [
        ([h100(), t4(), lost()], "2026.10.7", "unsloth", "H100"),
        ([t4()], "1", "unsloth", "7.5"),
        ([h100() | {"CudaComputeCapability": (7, 0)}], "1", "unsloth", "7.0"),
        ([h100() | {"CudaComputeCapability": (6, 1)}], "1", "transformers", "6.1 is below"),
        ([h100() | {"CudaComputeCapability": (12, 1)}], "1", "unsloth", "12.1"),
        ([lost()], "1", "transformers", "no NVIDIA GPU answers"),
        ([h100()], None, "transformers", "not installed"),
    ],
)
def test_the_engine_follows_the_best_card_that_answers(
    cards: list[dict[str, Any]], unsloth: str | None, engine: str, words: str
) -> None:
    choice = select_engine(read(*cards), {"unsloth": unsloth})
    assert choice.name == engine and words in choice.reason


CAPABILITIES = st.one_of(st.none(), st.tuples(st.integers(3, 12), st.integers(0, 9)))


@given(st.lists(st.tuples(CAPABILITIES, st.booleans()), max_size=4), st.booleans())
def test_unsloth_is_chosen_exactly_where_it_can_run(
    cards: list[tuple[tuple[int, int] | None, bool]], installed: bool
) -> None:
    gpus = tuple(
        GpuReading(
            index,
            compute_capability=f"{capability[0]}.{capability[1]}" if capability else None,
            error=None if answers else "GPU is lost",
        )
        for index, (capability, answers) in enumerate(cards)
    )
    able = any(answers and capability is not None and capability >= (7, 0) for capability, answers in cards)
    choice = select_engine(gpus, {"unsloth": "1"} if installed else {})
    assert (choice.name == "unsloth") == (able and installed)
    assert choice.reason


def test_versions_come_from_metadata_and_absence_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    found = installed_versions()
    assert set(found) == set(PACKAGES) and found["torch"]
    monkeypatch.setattr("services.hardware_service.PACKAGES", ("no-such-package-here",))
    assert installed_versions() == {"no-such-package-here": None}


def test_validation_says_in_one_check_that_there_is_no_gpu(make: Make) -> None:
    found = make(no_driver(), never).validate_cuda()
    assert not found.valid and [(check.name, check.status) for check in found.checks] == [("driver", "fail")]
    assert "no NVIDIA driver" in found.checks[0].detail and found.checks[0].fix


def test_validation_is_as_good_as_its_worst_check(make: Make) -> None:
    assert make(FakeNvml(h100(), t4()), passing).validate_cuda().valid
    with_lost = make(FakeNvml(h100(), lost()), passing).validate_cuda()
    assert not with_lost.valid and "GPU 1: GPU is lost" in with_lost.checks[1].detail
    broken = lambda: [*passing(), CudaCheck("bf16_0", "fail", "d", "f")]  # noqa: E731
    assert not make(FakeNvml(h100()), broken).validate_cuda().valid


def test_torch_is_not_asked_about_gpus_that_are_all_lost(make: Make) -> None:
    found = make(FakeNvml(lost(), lost()), never).validate_cuda()
    assert [(check.name, check.status) for check in found.checks] == [("driver", "pass"), ("device", "fail")]


def test_a_validation_is_kept_with_its_age_until_it_is_asked_for_anew(make: Make) -> None:
    clock, runs = Clock(), []

    def checks() -> list[CudaCheck]:
        runs.append(1)
        return passing()

    service = make(FakeNvml(h100()), checks, clock)
    first = service.validate_cuda()
    clock.seconds = 3599
    kept = service.validate_cuda()
    assert (len(runs), kept.age_s, kept.checks) == (1, 3599, first.checks)
    assert kept.checked_at == first.checked_at
    assert service.validate_cuda(refresh=True).age_s == 0 and len(runs) == 2
    clock.seconds += 3600
    service.validate_cuda()
    assert len(runs) == 3


@pytest.mark.parametrize(
    "change", ["a GPU more", "a GPU is lost", "the driver", "a package", "nothing, but one failed"]
)
def test_a_validation_is_made_anew_once_something_is_not_as_it_was(
    make: Make, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    clock, nvml, runs = Clock(), FakeNvml(h100(), t4()), []
    versions = {"torch": "2.13.0"}
    monkeypatch.setattr("services.hardware_service.version", lambda name: versions.get(name, "1"))

    def checks() -> list[CudaCheck]:
        runs.append(1)
        return [CudaCheck("bf16_0", "fail" if change.startswith("nothing") else "pass", "d", "f")]

    service = make(nvml, checks, clock)
    service.validate_cuda()
    clock.seconds = 1
    if change == "a GPU more":
        nvml.cards.append(h100())
    elif change == "a GPU is lost":
        nvml.cards[1] = lost()
    elif change == "the driver":
        monkeypatch.setattr(nvml, "nvmlSystemGetDriverVersion", lambda: "999.1")
    elif change == "a package":
        versions["torch"] = "2.14.0"
    found = service.validate_cuda()
    assert len(runs) == 2 and found.age_s == 0
    assert found.valid == (change not in ("a GPU is lost", "nothing, but one failed"))


def test_those_who_ask_for_a_validation_at_once_share_its_process(make: Make) -> None:
    running, may_end, runs = threading.Event(), threading.Event(), []

    class Ticking(Clock):
        """Never the same twice, as the real one. The first run begins at 2; the five others ask from 3 to 7."""

        lock = threading.Lock()

        def monotonic(self) -> float:
            with self.lock:
                self.seconds += 1
                if self.seconds == 7:
                    may_end.set()
                return self.seconds

    def checks() -> list[CudaCheck]:
        runs.append(1)
        running.set()
        assert may_end.wait(600)
        return passing()

    service, answers = make(FakeNvml(h100()), checks, Ticking()), []
    threads = [threading.Thread(target=lambda: answers.append(service.validate_cuda(refresh=True))) for _ in range(6)]
    threads[0].start()
    assert running.wait(600)
    for thread in threads[1:]:
        thread.start()
    for thread in threads:
        thread.join(600)
    assert len(answers) == 6 and len(runs) == 2  # one that was under way, and one for all that came meanwhile


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "signal 11 (SIGSEGV), before their results"),
        ("import sys; sys.stderr.write('driver too old'); sys.exit(3)", "exit code 3, before their results. Last"),
        ("import sys; sys.stderr.write('driver too old'); sys.exit(3)", "driver too old"),
        ("pass", "exit code 0, before"),
        ("import os; os.write(int(os.environ['PEFT_STUDIO_RESULT_FD']), b'[{')", "before their results"),
    ],
)
def test_checks_that_crash_are_a_failed_check(code: str, words: str) -> None:
    (check,) = run_cuda_checks(("-c", code))
    assert check.status == "fail" and words in check.detail and check.fix


RESULT = """
import json, os, sys
print("[]", flush=True)
document = json.dumps([{"name": "n", "status": "pass", "detail": DETAIL, "fix": None}]) + chr(10)
with os.fdopen(int(os.environ["PEFT_STUDIO_RESULT_FD"]), "w") as results:
    results.write(document)
"""


def test_what_the_libraries_print_is_not_taken_for_the_result() -> None:
    (check,) = run_cuda_checks(("-c", RESULT.replace("DETAIL", "'as it is'")))
    assert (check.status, check.detail) == ("pass", "as it is")


def test_the_checks_are_given_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SECRETS:
        monkeypatch.setenv(name, "canary")
    (check,) = run_cuda_checks(("-c", RESULT.replace("DETAIL", "' '.join(os.environ.values())")))
    assert check.status == "pass" and "canary" not in check.detail


def test_a_result_longer_than_a_pipe_holds_arrives_whole() -> None:
    (check,) = run_cuda_checks(("-c", RESULT.replace("DETAIL", "'x' * 300_000")))
    assert len(check.detail) == 300_000


def test_a_crash_after_the_results_is_told_with_them() -> None:
    code = RESULT.replace("DETAIL", "'d'") + "os.abort()"
    kept, check = run_cuda_checks(("-c", code))
    assert kept.status == "pass"
    assert check.status == "fail" and "SIGABRT" in check.detail and "after their results" in check.detail


HANG = """
import os, sys, threading
os.write(os.open(FIFO, os.O_WRONLY), b"alive")
print("loading kernels", file=sys.stderr, flush=True)
os.fork()
threading.Event().wait()
"""


def test_checks_that_hang_are_killed_with_what_they_started(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    (check,) = run_cuda_checks(("-c", HANG.replace("FIFO", repr(str(fifo)))), limit_s=2)
    assert check.status == "fail" and check.detail.startswith("The checks did not end within 2 s")
    assert "loading kernels" in check.detail
    os.set_blocking(reader, True)
    with os.fdopen(reader, "rb") as pipe:
        assert pipe.read() == b"alive"  # and then its end, which comes when both processes are gone


def test_checks_that_cannot_be_started_are_a_failed_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/no/such/python")
    (check,) = run_cuda_checks()
    assert check.status == "fail" and "do not start" in check.detail
