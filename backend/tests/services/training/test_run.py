"""What an engine's death means, and how often a job is tried again."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.clock import SystemClock
from core.errors import StudioError
from domain import protocol
from domain.jobs.failures import failure
from domain.jobs.retries import MAX_STALLS, TRANSIENT, wait_s
from domain.jobs.states import JobState
from services.engines.process import EngineDied
from services.hardware.host_probe import HostProbe
from services.training.checkpoint_store import CheckpointStore
from services.training.ledger import JobLedger
from services.training.run import TrainingRun
from services.training.run_control import RunControl
from services.training.run_journal import RunJournal
from services.training.running_job import RunningJob
from services.training.work import Trained, TrainingWork
from store.database import Database
from store.records import JobRecord
from store.repositories import Datasets, Jobs
from tests.support.job_records import DATASET, job_record


class DyingEngine(TrainingWork):
    """Its engine dies as soon as it is to train."""

    def __init__(self, death: dict[str, Any], oom_kills: list[int]) -> None:
        none: Any = None  # what a run that ends so early does not come to
        super().__init__(none, none, none, none, none, None, lambda: oom_kills.pop(0))
        self._death = death

    def run(
        self,
        job: RunningJob,
        devices: tuple[str, ...],
        control: RunControl,
        journal: RunJournal,
        on_event: Callable[[protocol.RunEvent], None],
    ) -> Trained:
        raise EngineDied("it ended", **self._death)

    def savings(self, job: JobRecord, device: str) -> list[str]:
        return []


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
    tmp_path: Path, death: dict[str, Any], oom_kills: list[int], error_class: str
) -> None:
    database = Database(f"sqlite:///{tmp_path / 'studio.db'}")
    database.migrate()
    ledger = JobLedger(database, SystemClock(), lambda _: None)
    with database.begin() as connection:
        Datasets(connection).add(DATASET)
        Jobs(connection).add(job_record(1))
    run = TrainingRun(
        job_record(1), ("cpu",),
        ledger=ledger, work=DyingEngine(death, oom_kills), checkpoints=CheckpointStore(tmp_path / "checkpoints"),
        clock=SystemClock(), closing=threading.Event(), retry_after=lambda *_: None,
    )  # fmt: skip
    run.begin()
    run.execute()
    job = ledger.get("job_1")
    database.close()
    assert job.error is not None and job.error.error_class == error_class
    assert job.state is (JobState.FAILED if error_class == "out_of_host_memory" else JobState.INTERRUPTED)


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
