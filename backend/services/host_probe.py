"""CPU, memory and disk, as much of them as this process may use: a container's limit is the memory there is."""

import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

# CPU features that decide how fast matrix products are.
_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "sve", "bf16")
_UNLIMITED = 2**60  # cgroup v1 writes a huge page-rounded number for "no limit"


@dataclass(frozen=True)
class CpuReading:
    """The CPU; `logical_cores` are those this process may run on."""

    model: str | None
    architecture: str
    physical_cores: int | None
    logical_cores: int
    max_frequency_mhz: float | None
    utilization_percent: float
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
    """Reads the host.

    Args:
        root: Where /proc and /sys are; tests give a folder of their own.
        memory: psutil's reading of the host's memory, by default.
    """

    def __init__(self, root: Path = Path("/"), memory: Any = psutil.virtual_memory) -> None:
        self._root = root
        self._memory = memory
        psutil.cpu_percent(interval=None)  # the first call has nothing to compare with and returns 0

    def cpu(self) -> CpuReading:
        """Return the CPU, with its load since the last reading."""
        frequency = psutil.cpu_freq()
        return CpuReading(
            model=self._cpu_field("model name") or platform.processor() or None,
            architecture=platform.machine(),
            physical_cores=psutil.cpu_count(logical=False),
            logical_cores=_usable_cores(),
            max_frequency_mhz=(frequency.max or frequency.current) if frequency is not None else None,
            utilization_percent=psutil.cpu_percent(interval=None),
            features=tuple(name for name in _FEATURES if name in self._cpu_flags()),
        )

    def memory(self) -> MemoryReading:
        """Return the memory of the host, or of the tightest cgroup around this process."""
        host = self._memory()
        total, available, limited_by = int(host.total), int(host.available), None
        for limit, used in self._cgroup_limits():
            room = max(0, limit - used)
            if limit < total:
                total, limited_by = limit, "cgroup"
            if room < available:
                available = room
        available = min(available, total)
        used = total - available
        return MemoryReading(total, available, used, round(100 * used / total, 1), limited_by)

    def disk(self, path: Path) -> DiskReading:
        """Return the disk that holds a path, which need not exist yet."""
        existing = next(folder for folder in (path, *path.parents) if folder.exists())
        usage = shutil.disk_usage(existing)
        return DiskReading(str(path), usage.total, usage.free)

    def _cgroup_limits(self) -> list[tuple[int, int]]:
        """Return (limit, unreclaimable use) in bytes of every limited cgroup from ours to the root."""
        found = []
        for line in self._read("proc/self/cgroup").splitlines():
            _, _, rest = line.partition(":")
            controllers, _, path = rest.partition(":")
            if controllers == "":
                base, names = "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
            elif "memory" in controllers.split(","):
                base, names = (
                    "sys/fs/cgroup/memory",
                    (
                        "memory.limit_in_bytes",
                        "memory.usage_in_bytes",
                        "total_inactive_file",
                    ),
                )
            else:
                continue
            # In a container the path is often the host's, not visible here: its own mount's root then limits it.
            parts = [part for part in path.split("/") if part and part != ".."]
            for depth in range(len(parts), -1, -1):
                limit = self._limit("/".join([base, *parts[:depth]]), names)
                if limit is not None:
                    found.append(limit)
        return found

    def _limit(self, folder: str, names: tuple[str, str, str]) -> tuple[int, int] | None:
        limit, used = self._read(f"{folder}/{names[0]}").strip(), self._read(f"{folder}/{names[1]}").strip()
        if not limit.isdigit() or int(limit) >= _UNLIMITED or not used.isdigit():
            return None
        stat = dict(line.split()[:2] for line in self._read(f"{folder}/memory.stat").splitlines() if " " in line)
        reclaimable = int(stat.get(names[2], "0"))
        return int(limit), max(0, int(used) - reclaimable)

    def _read(self, path: str) -> str:
        try:
            return (self._root / path).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""  # not there on this system: there is no such limit

    def _cpu_field(self, name: str) -> str | None:
        for line in self._read("proc/cpuinfo").splitlines():
            field, _, value = line.partition(":")
            if field.strip() == name:
                return value.strip()
        return None

    def _cpu_flags(self) -> frozenset[str]:
        return frozenset((self._cpu_field("flags") or self._cpu_field("Features") or "").split())


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
