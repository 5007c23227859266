"""What an engine's death means, and how often a job is tried again."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import StudioError
from domain.jobs.failures import failure
from domain.jobs.progress import JobProgress
from domain.jobs.retries import MAX_STALLS, TRANSIENT, wait_s
from services.engines.process import EngineDied
from services.hardware.host_probe import HostProbe
from services.training.run import TrainingRun


def run_with(oom_kills: list[int]) -> TrainingRun:
    job: Any = SimpleNamespace(progress=JobProgress(), stalls=0)
    work: Any = SimpleNamespace(oom_kills=lambda: oom_kills.pop(0))
    none: Any = SimpleNamespace()
    return TrainingRun(job, "cpu", ledger=none, work=work, checkpoints=none, clock=none, closing=none, retry_after=none)


@pytest.mark.parametrize(
    ("death", "oom_kills", "error_class"),
    [
        ({"signal": 9}, [3, 3], "engine_killed"),
        ({"signal": 9}, [3, 4], "out_of_host_memory"),
        ({"signal": 11}, [3, 4], "engine_crash"),
        ({"exit_code": 1}, [0, 0], "engine_crash"),
        ({"signal": 9, "unresponsive": True}, [3, 4], "engine_unresponsive"),
    ],
)
def test_the_kernels_kill_for_memory_is_told_from_others(
    death: dict[str, Any], oom_kills: list[int], error_class: str
) -> None:
    run = run_with(oom_kills)
    assert run._death_class(EngineDied("it ended", **death)) == error_class


def test_want_of_memory_is_never_tried_again_blindly() -> None:
    assert not TRANSIENT & {"out_of_memory", "out_of_host_memory", "not_finite", "bad_data", "bad_setting", "disk_full"}
    details = failure("out_of_host_memory", StudioError("it ended"))
    assert "halve batch_size" in details.suggestions[0]


@given(st.integers(0, MAX_STALLS))
def test_waits_grow_and_are_bounded(stalls: int) -> None:
    assert wait_s(0) == 0 and wait_s(stalls) <= wait_s(stalls + 1) <= 60


def test_oom_kills_are_read_from_the_cgroup_or_else_from_the_machine(tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/vmstat").write_text("nr_free_pages 12\noom_kill 7\n")
    (tmp_path / "proc/self/cgroup").write_text("0::/studio\n")
    assert HostProbe(tmp_path).oom_kills() == 7
    (tmp_path / "sys/fs/cgroup/studio").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/studio/memory.events").write_text("low 0\nhigh 0\nmax 9\noom 2\noom_kill 2\n")
    assert HostProbe(tmp_path).oom_kills() == 2
