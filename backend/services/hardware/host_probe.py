"""CPU, memory and disk, as far as this process may use them. In a container, its limit counts as the memory."""

import math
import os
import platform
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil

from core.singleton import singleton

# CPU features that decide how fast matrix products are, as /proc/cpuinfo spells them (x86, then Arm).
_FEATURES = (
    *("avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_bf16", "amx_int8", "neon", "asimd", "asimdhp", "asimddp", "sve", "sve2", "i8mm", "bf16"),
)
_MODEL_FIELDS = ("model name", "Model", "Hardware", "cpu")  # of /proc/cpuinfo: x86, Arm boards, POWER
_UNLIMITED = 2**60  # cgroup v1 writes a huge page-rounded number for "no limit"
_LOAD_WINDOW_S = 0.1  # the kernel counts in ticks of 10 ms: a shorter window is mostly rounding


@dataclass(frozen=True)
class CpuReading:
    """The CPU; `logical_cores` are those this process may run on, by affinity and by cgroup quota."""

    model: str | None
    architecture: str
    physical_cores: int | None
    logical_cores: int
    max_frequency_mhz: float | None
    utilization_percent: float | None
    features: tuple[str, ...]


@dataclass(frozen=True)
class MemoryReading:
    """Memory in bytes; `limited_by` is `cgroup` where a container's limit is below the host's memory."""

    total_bytes: int
    available_bytes: int
    used_bytes: int
    used_percent: float
    limited_by: str | None


@dataclass(frozen=True)
class DiskReading:
    """The disk that holds a path."""

    path: str
    total_bytes: int
    free_bytes: int


class HostProbe:
    """Reads the host; may be called from any thread.

    Args:
        root: Where /proc and /sys are; tests give a folder of their own.
        system: psutil, or its double.
        monotonic: Seconds from an arbitrary start.
        sleep: Waits out the first reading's load window; later readings never wait.
    """

    def __init__(
        self,
        root: Path = Path("/"),
        system: Any = psutil,
        monotonic: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._root = root
        self._system = system
        self._load = _CpuLoad(system.cpu_times, monotonic, sleep)

    def cpu(self) -> CpuReading:
        """Return the CPU, with its load since the last reading."""
        info = self._cpuinfo
        flags = (info.get("flags") or info.get("Features") or "").split()
        named = next((info[field] for field in _MODEL_FIELDS if info.get(field)), None)
        return CpuReading(
            model=named or platform.processor() or None,
            architecture=platform.machine(),
            physical_cores=self._system.cpu_count(logical=False),
            logical_cores=self._usable_cores(),
            max_frequency_mhz=self._max_frequency_mhz(),
            utilization_percent=self._load.percent(),
            features=tuple(name for name in _FEATURES if name in flags),
        )

    def memory(self) -> MemoryReading:
        """Return the memory of the host, or of the tightest cgroup around this process."""
        host = self._system.virtual_memory()
        total, available = int(host.total), int(host.available)
        limits = list(self._memory_limits())
        limited = any(limit < total for limit, _ in limits)
        total = min([total, *(limit for limit, _ in limits)])
        available = min([available, total, *(max(0, limit - used) for limit, used in limits)])
        used = total - available
        percent = round(100 * used / total, 1) if total else 100.0
        return MemoryReading(total, available, used, percent, "cgroup" if limited else None)

    def oom_kills(self) -> int:
        """Count the processes that the kernel has killed for want of memory: in this cgroup, or on this machine.

        Source: memory.events of cgroup v2, oom_kill of /proc/vmstat (Linux 4.13).
        """
        for unified, folder in self._cgroup_folders("memory"):
            if unified and self._read(f"{folder}/memory.events"):
                return self._statistic(f"{folder}/memory.events", "oom_kill")
        return self._statistic("proc/vmstat", "oom_kill")

    def disk(self, path: Path) -> DiskReading:
        """Return the disk that holds a path, which need not exist yet."""
        existing = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
        usage = shutil.disk_usage(existing)
        return DiskReading(str(path), usage.total, usage.free)

    def _max_frequency_mhz(self) -> float | None:
        try:
            frequency = self._system.cpu_freq()
        except (OSError, NotImplementedError):
            return None  # psutil's answer where the kernel offers no frequency
        if frequency is None:
            return None
        # Virtual machines seldom know the highest; their present one hardly moves.
        return frequency.max or frequency.current or None

    def _usable_cores(self) -> int:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return min([cores, *(max(1, math.ceil(quota)) for quota in self._cpu_quotas())])

    def _cpu_quotas(self) -> Iterator[float]:
        """Yield the quota in cores of every cgroup around this process that has one."""
        for unified, folder in self._cgroup_folders("cpu"):
            if unified:
                quota, _, period = self._read(f"{folder}/cpu.max").strip().partition(" ")
            else:
                quota = self._read(f"{folder}/cpu.cfs_quota_us").strip()  # -1 for none
                period = self._read(f"{folder}/cpu.cfs_period_us").strip()
            if quota.isdecimal() and period.isdecimal() and int(period) > 0:
                yield int(quota) / int(period)

    def _memory_limits(self) -> Iterator[tuple[int, int]]:
        """Yield (limit, use that cannot be reclaimed) in bytes of every limited cgroup around this process."""
        for unified, folder in self._cgroup_folders("memory"):
            limit = self._number(f"{folder}/{'memory.max' if unified else 'memory.limit_in_bytes'}")
            if limit is None or limit >= _UNLIMITED:
                continue
            used = self._number(f"{folder}/{'memory.current' if unified else 'memory.usage_in_bytes'}") or 0
            # The kernel drops inactive file cache before it kills a process, so it does not count as used.
            field = "inactive_file" if unified else "total_inactive_file"
            yield limit, max(0, used - self._statistic(f"{folder}/memory.stat", field))

    def _cgroup_folders(self, controller: str) -> Iterator[tuple[bool, str]]:
        """Yield (is it cgroup v2, folder) from this process's own cgroup up to the root."""
        for line in self._read("proc/self/cgroup").splitlines():
            _, _, rest = line.partition(":")
            controllers, _, path = rest.partition(":")
            unified = controllers == ""
            if not unified and controller not in controllers.split(","):
                continue
            base = "sys/fs/cgroup" if unified else f"sys/fs/cgroup/{controller}"
            # In a container the path is often the host's, not visible here: its own mount's root then limits it.
            parts = [part for part in path.split("/") if part and part != ".."]
            for depth in range(len(parts), -1, -1):
                yield unified, "/".join([base, *parts[:depth]])

    def _number(self, path: str) -> int | None:
        text = self._read(path).strip()
        return int(text) if text.isdecimal() else None

    def _statistic(self, path: str, name: str) -> int:
        for line in self._read(path).splitlines():
            field, _, value = line.partition(" ")
            if field == name and value.strip().isdecimal():
                return int(value)
        return 0

    def _read(self, path: str) -> str:
        try:
            return (self._root / path).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""  # this system has no such file, so there is no such limit

    @cached_property
    def _cpuinfo(self) -> dict[str, str]:
        """The first value of every field; read once: it is long on a big machine and never changes."""
        fields: dict[str, str] = {}
        for line in self._read("proc/cpuinfo").splitlines():
            field, _, value = line.partition(":")
            fields.setdefault(field.strip(), value.strip())
        return fields


@singleton
def get_host_probe() -> HostProbe:
    """Return the process's probe of the host: one, so that all readers share the window of the CPU's load."""
    return HostProbe()


class _CpuLoad:
    """The machine's load between two readings.

    psutil.cpu_percent() keeps its last reading per thread, so each new thread of a pool gets 0.0. Here all threads
    share one reading.
    """

    def __init__(
        self, times: Callable[[], Any], monotonic: Callable[[], float], sleep: Callable[[float], None]
    ) -> None:
        self._times, self._monotonic, self._sleep = times, monotonic, sleep
        self._lock = threading.Lock()
        self._percent: float | None = None
        self._since_s, self._before = monotonic(), _busy_and_total(times())

    def percent(self) -> float | None:
        """Return 0..100 since the last reading; None if the kernel's counters do not move."""
        with self._lock:
            missing_s = _LOAD_WINDOW_S - (self._monotonic() - self._since_s)
            if missing_s > 0 and self._percent is not None:
                return self._percent
            if missing_s > 0:
                self._sleep(missing_s)
            now = _busy_and_total(self._times())
            busy, total = now[0] - self._before[0], now[1] - self._before[1]
            if total > 0:
                self._percent = round(min(100.0, max(0.0, 100 * busy / total)), 1)
            self._since_s, self._before = self._monotonic(), now
            return self._percent


def _busy_and_total(times: Any) -> tuple[float, float]:
    """Sum seconds of CPU time; Linux counts guests' time in user and nice already (proc(5))."""
    total = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
    return total - times.idle - getattr(times, "iowait", 0.0), total
