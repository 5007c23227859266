"""CPU and memory under cgroup limits, read from a tree made here."""

import errno
import os
import threading
from collections import namedtuple
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.hardware.host_probe import HostProbe


class Memory(NamedTuple):
    """As psutil says it, in bytes."""

    total: int
    available: int


class Frequency(NamedTuple):
    """As psutil says it, in MHz."""

    current: float
    max: float | None


HOST = Memory(total=32 * 2**30, available=20 * 2**30)
MIB = 2**20


class FakeSystem:
    """psutil for a machine of two idle cores."""

    def __init__(self) -> None:
        self.host = HOST
        self.frequency: Frequency | Exception | None = Frequency(2000.0, 3500.0)
        self.times: dict[str, float] = {"user": 0.0, "idle": 0.0, "iowait": 0.0, "guest": 0.0}

    def virtual_memory(self) -> Memory:
        return self.host

    def cpu_count(self, logical: bool) -> int:
        return 4 if logical else 2

    def cpu_freq(self) -> Frequency | None:
        if isinstance(self.frequency, Exception):
            raise self.frequency
        return self.frequency

    def cpu_times(self) -> Any:
        return namedtuple("Times", self.times)(**self.times)


class Stopwatch:
    def __init__(self) -> None:
        self.seconds = 0.0
        self.slept: list[float] = []

    def monotonic(self) -> float:
        return self.seconds

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.seconds += seconds


def write(root: Path, files: dict[str, str], system: FakeSystem | None = None) -> HostProbe:
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(content)
    watch = Stopwatch()
    return HostProbe(root, system or FakeSystem(), watch.monotonic, watch.sleep)


def v2(folder: str, limit: str, used: int, inactive: int = 0) -> dict[str, str]:
    base = f"sys/fs/cgroup/{folder}".rstrip("/")
    return {
        f"{base}/memory.max": limit + "\n",
        f"{base}/memory.current": f"{used}\n",
        f"{base}/memory.stat": f"anon {used}\ninactive_file {inactive}\n",
    }


def v1(folder: str, limit: int, used: int, inactive: int = 0) -> dict[str, str]:
    base = f"sys/fs/cgroup/memory/{folder}".rstrip("/")
    return {
        f"{base}/memory.limit_in_bytes": f"{limit}\n",
        f"{base}/memory.usage_in_bytes": f"{used}\n",
        f"{base}/memory.stat": f"inactive_file 1\ntotal_inactive_file {inactive}\n",
    }


UNLIMITED_V1 = 9223372036854771712


def test_without_a_limit_the_hosts_memory_is_the_memory(tmp_path: Path) -> None:
    for files in ({"proc/self/cgroup": "0::/\n"} | v2("", "max", 5), {"proc/self/cgroup": "4:memory:/\n"}, {}):
        memory = write(tmp_path, files).memory()
        assert (memory.total_bytes, memory.available_bytes, memory.limited_by) == (
            HOST.total,
            HOST.available,
            None,
        )


def test_a_v2_limit_is_the_memory_and_file_cache_counts_as_free(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "0::/app\n"} | v2("app", str(1000 * MIB), 400 * MIB, inactive=100 * MIB)
    memory = write(tmp_path, files).memory()
    assert (memory.total_bytes, memory.available_bytes) == (1000 * MIB, 700 * MIB)
    assert (memory.limited_by, memory.used_percent) == ("cgroup", 30.0)


def test_the_tightest_of_the_cgroups_above_wins(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "0::/a/b\n"} | v2("a/b", "max", 10) | v2("a", str(500 * MIB), 450 * MIB)
    memory = write(tmp_path, files).memory()
    assert (memory.total_bytes, memory.available_bytes) == (500 * MIB, 50 * MIB)


def test_a_wider_cgroup_that_others_fill_leaves_less(tmp_path: Path) -> None:
    wide = v2("a", str(900 * MIB), 850 * MIB)
    files = {"proc/self/cgroup": "0::/a/b\n"} | v2("a/b", str(500 * MIB), 100 * MIB) | wide
    memory = write(tmp_path, files).memory()
    assert (memory.total_bytes, memory.available_bytes) == (500 * MIB, 50 * MIB)


@pytest.mark.parametrize("path", ["/docker/abc", "/../../other", "/with:colon"])
def test_in_a_container_the_path_is_the_hosts_and_the_mount_is_ours(tmp_path: Path, path: str) -> None:
    files = {"proc/self/cgroup": f"0::{path}\n"} | v2("", str(64 * MIB), 0)
    assert write(tmp_path, files).memory().total_bytes == 64 * MIB


def test_a_v1_limit(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "5:cpu:/x\n4:memory:/box\n"} | v1("", UNLIMITED_V1, 1)
    files |= v1("box", 200 * MIB, 150 * MIB, inactive=50 * MIB)
    memory = write(tmp_path, files).memory()
    assert (memory.total_bytes, memory.available_bytes) == (200 * MIB, 100 * MIB)


def test_a_host_with_both_versions_keeps_the_memory_controllers_limit(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "9:name=systemd:/\n4:memory,hugetlb:/box\n0::/\n"} | v1("box", 300 * MIB, 0)
    assert write(tmp_path, files).memory().total_bytes == 300 * MIB


def test_a_limit_above_the_hosts_memory_limits_nothing(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "0::/\n"} | v2("", str(2 * HOST.total), 0)
    memory = write(tmp_path, files).memory()
    assert (memory.total_bytes, memory.limited_by) == (HOST.total, None)


def test_a_limit_holds_even_if_its_use_cannot_be_read(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": f"{64 * MIB}\n"}
    assert write(tmp_path, files).memory().available_bytes == 64 * MIB


NUMBERS = st.integers(0, 2**40)


@given(st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS), min_size=1, max_size=3), st.booleans())
def test_available_is_never_more_than_there_is(
    tmp_path_factory: pytest.TempPathFactory, groups: list[tuple[int, int, int]], unified: bool
) -> None:
    parts = ["a", "b", "c"][: len(groups)]
    files = {"proc/self/cgroup": f"{'0:' if unified else '1:memory'}:/{'/'.join(parts)}\n"}
    for depth, (limit, used, inactive) in enumerate(groups, start=1):
        folder = "/".join(parts[:depth])
        files |= v2(folder, str(limit), used, inactive) if unified else v1(folder, limit, used, inactive)
    memory = write(tmp_path_factory.mktemp("root"), files).memory()
    assert 0 <= memory.available_bytes <= memory.total_bytes <= min(HOST.total, *(limit for limit, _, _ in groups))
    assert memory.available_bytes <= HOST.available
    assert memory.total_bytes == memory.available_bytes + memory.used_bytes
    assert 0 <= memory.used_percent <= 100


X86 = "processor\t: 0\nmodel name\t: AMD EPYC 9B14\nflags\t\t: fpu avx avx2 avx512f amx_bf16\n\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd sve bf16\nCPU part\t: 0xd4f\n\nModel\t\t: NVIDIA Grace\n"


@pytest.mark.parametrize(
    ("cpuinfo", "model", "features"),
    [
        (X86 + X86.replace("AMD", "Other"), "AMD EPYC 9B14", ("avx", "avx2", "avx512f", "amx_bf16")),
        (ARM, "NVIDIA Grace", ("asimd", "sve", "bf16")),
    ],
)
def test_the_cpu_is_named_with_what_it_can_do(
    tmp_path: Path, cpuinfo: str, model: str, features: tuple[str, ...]
) -> None:
    cpu = write(tmp_path, {"proc/cpuinfo": cpuinfo}).cpu()
    assert (cpu.model, cpu.features, cpu.physical_cores) == (model, features, 2)
    assert write(tmp_path / "elsewhere", {}).cpu().features == ()


@pytest.mark.parametrize(
    ("answered", "megahertz"),
    [
        (Frequency(2000.0, 3500.0), 3500.0),
        (Frequency(2000.0, 0.0), 2000.0),
        (Frequency(0.0, None), None),
        (None, None),
        (NotImplementedError("can't find current frequency file"), None),
        (OSError(errno.ENOENT, "no such file"), None),
    ],
)
def test_the_frequency_or_none(tmp_path: Path, answered: Frequency | Exception | None, megahertz: float | None) -> None:
    system = FakeSystem()
    system.frequency = answered
    assert write(tmp_path, {}, system).cpu().max_frequency_mhz == megahertz


QUOTAS = [
    ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "50000 100000\n"}, 1),
    ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "max 100000\n"}, 64),
    ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 2),
    (
        {
            "proc/self/cgroup": "3:cpuacct,cpu:/a\n",
            "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "300000\n",
            "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
        3,
    ),
]


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="affinity is Linux's")
@pytest.mark.parametrize(("files", "cores"), QUOTAS)
def test_a_quota_bounds_the_usable_cores(
    tmp_path: Path, files: dict[str, str], cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(64)))
    assert write(tmp_path, files).cpu().logical_cores == cores


def test_the_load_is_the_share_of_time_that_was_not_idle(tmp_path: Path) -> None:
    system, watch = FakeSystem(), Stopwatch()
    probe = HostProbe(tmp_path, system, watch.monotonic, watch.sleep)
    watch.seconds = 10
    system.times = {"user": 6.0, "idle": 12.0, "iowait": 2.0, "guest": 6.0}  # the guest's time is in user's too
    assert probe.cpu().utilization_percent == 30.0
    assert watch.slept == []


def test_the_first_load_waits_for_its_window_and_later_ones_never(tmp_path: Path) -> None:
    system, watch = FakeSystem(), Stopwatch()
    probe = HostProbe(tmp_path, system, watch.monotonic, watch.sleep)
    assert probe.cpu().utilization_percent is None  # the counters stood still
    system.times |= {"user": 1.0, "idle": 1.0}
    watch.seconds += 1
    assert probe.cpu().utilization_percent == 50.0
    system.times |= {"user": 5.0}
    assert probe.cpu().utilization_percent == 50.0  # too soon: the same reading
    assert watch.slept == [pytest.approx(0.1)]


def test_every_thread_is_told_the_same_load(tmp_path: Path) -> None:
    system, watch = FakeSystem(), Stopwatch()
    probe = HostProbe(tmp_path, system, watch.monotonic, watch.sleep)
    watch.seconds = 1
    system.times |= {"user": 3.0, "idle": 1.0}
    seen: list[float | None] = []
    for _ in range(3):
        thread = threading.Thread(target=lambda: seen.append(probe.cpu().utilization_percent))
        thread.start()
        thread.join()
    assert seen == [75.0, 75.0, 75.0]


@given(st.lists(st.tuples(*[st.floats(0, 100)] * 3), min_size=1, max_size=5))
def test_the_load_is_a_percentage_whatever_the_counters_do(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[float, float, float]]
) -> None:
    system, watch = FakeSystem(), Stopwatch()
    probe = HostProbe(tmp_path_factory.getbasetemp(), system, watch.monotonic, watch.sleep)
    for user, idle, iowait in steps:  # a container's counters can jump backwards when it is moved
        watch.seconds += 1
        system.times |= {"user": user, "idle": idle, "iowait": iowait}
        percent = probe.cpu().utilization_percent
        assert percent is None or 0 <= percent <= 100


def test_this_machine_is_read(tmp_path: Path) -> None:
    probe = HostProbe()
    assert probe.cpu().logical_cores >= 1 and 0 <= probe.memory().used_percent <= 100


def test_the_disk_of_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    disk = write(tmp_path, {}).disk(tmp_path / "not" / "yet")
    assert disk.path == str(tmp_path / "not" / "yet") and 0 < disk.free_bytes <= disk.total_bytes
    assert write(tmp_path, {}).disk(Path("relative/not/yet")).total_bytes > 0
