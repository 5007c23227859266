"""Memory under cgroup limits, read from a tree made here."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.host_probe import HostProbe

HOST = SimpleNamespace(total=32 * 2**30, available=20 * 2**30)
MIB = 2**20


def write(root: Path, files: dict[str, str]) -> HostProbe:
    for path, content in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(content)
    return HostProbe(root, lambda: HOST)


def v2(folder: str, limit: str, used: int, inactive: int = 0) -> dict[str, str]:
    base = f"sys/fs/cgroup/{folder}".rstrip("/")
    return {
        f"{base}/memory.max": limit + "\n",
        f"{base}/memory.current": f"{used}\n",
        f"{base}/memory.stat": f"anon {used}\ninactive_file {inactive}\n",
    }


def test_without_a_limit_the_hosts_memory_is_the_memory(tmp_path: Path) -> None:
    probe = write(tmp_path, {"proc/self/cgroup": "0::/\n"} | v2("", "max", 5))
    memory = probe.memory()
    assert (memory.total_bytes, memory.available_bytes, memory.limited_by) == (HOST.total, HOST.available, None)


def test_a_v2_limit_is_the_memory_and_file_cache_counts_as_free(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "0::/app\n"} | v2("app", str(1000 * MIB), 400 * MIB, inactive=100 * MIB)
    memory = write(tmp_path, files).memory()
    assert (memory.total_bytes, memory.available_bytes) == (1000 * MIB, 700 * MIB)
    assert (memory.limited_by, memory.used_percent) == ("cgroup", 30.0)


def test_the_tightest_of_the_cgroups_above_wins(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "0::/a/b\n"} | v2("a/b", "max", 10) | v2("a", str(500 * MIB), 450 * MIB)
    memory = write(tmp_path, files).memory()
    assert (memory.total_bytes, memory.available_bytes) == (500 * MIB, 50 * MIB)


def test_in_a_container_the_path_is_the_hosts_and_the_mount_is_ours(tmp_path: Path) -> None:
    files = {"proc/self/cgroup": "0::/docker/abc\n"} | v2("", str(64 * MIB), 0)
    assert write(tmp_path, files).memory().total_bytes == 64 * MIB


def test_a_v1_limit(tmp_path: Path) -> None:
    base = "sys/fs/cgroup/memory/box"
    files = {
        "proc/self/cgroup": "5:cpu:/x\n4:memory:/box\n",
        f"{base}/memory.limit_in_bytes": str(200 * MIB),
        f"{base}/memory.usage_in_bytes": str(150 * MIB),
        f"{base}/memory.stat": f"total_inactive_file {50 * MIB}\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "1",
    }
    memory = write(tmp_path, files).memory()
    assert (memory.total_bytes, memory.available_bytes) == (200 * MIB, 100 * MIB)


@given(st.integers(MIB, 2**40), st.integers(0, 2**40), st.integers(0, 2**40))
def test_available_is_never_more_than_there_is(
    tmp_path_factory: pytest.TempPathFactory, limit: int, used: int, inactive: int
) -> None:
    files = {"proc/self/cgroup": "0::/\n"} | v2("", str(limit), used, inactive)
    memory = write(tmp_path_factory.mktemp("root"), files).memory()
    assert 0 <= memory.available_bytes <= memory.total_bytes <= HOST.total
    assert memory.total_bytes == memory.available_bytes + memory.used_bytes


def test_this_machine_is_read(tmp_path: Path) -> None:
    probe = HostProbe()
    assert probe.cpu().logical_cores >= 1 and 0 <= probe.memory().used_percent <= 100
    assert probe.disk(tmp_path / "not" / "yet").total_bytes > 0
