"""The queue of training jobs: its workers, the jobs that wait for another try, and each job's place."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from core.clock import Clock
from core.errors import StudioError
from core.logging import get_logger
from domain.jobs.failures import failure
from domain.jobs.retries import GIVEN_UP, MAX_STALLS
from domain.jobs.states import ACTIVE_STATES, JobState
from services.training.checkpoint_store import CheckpointStore
from services.training.ledger import JobLedger
from services.training.request_contexts import RequestContexts
from services.training.run import TrainingRun
from services.training.running_job import RunEnded
from services.training.work import TrainingWork
from store.patience import ServerEnds
from store.records import JobRecord, to_text

_log = get_logger(__name__)
_CHECKPOINT_GRACE_S = 30.0


@dataclass(frozen=True)
class QueuePlace:
    """A queued job's place, counted from 1, and its estimated start; None where the run before it has no estimate."""

    position: int
    estimated_start_at: datetime | None


class TrainingQueue:
    """Runs the queued jobs: one at a time on each device, in one order for all.

    A job for several devices waits until so many are free. No later job overtakes it: it would wait for ever.

    Args:
        ledger: Where the jobs are recorded.
        work: Trains a job.
        checkpoints: Where engines leave the state of their runs.
        contexts: The contexts of the requests that brought a Hub token.
        clock: For times and waits.
        devices: Returns the devices that jobs are trained on. It is called once, at the start.
    """

    def __init__(
        self,
        ledger: JobLedger,
        work: TrainingWork,
        checkpoints: CheckpointStore,
        contexts: RequestContexts,
        clock: Clock,
        devices: Callable[[], tuple[str, ...]],
    ) -> None:
        self._ledger, self._work, self._checkpoints, self._contexts = ledger, work, checkpoints, contexts
        self._clock, self._devices = clock, devices
        self._lock = threading.Lock()  # of the runs, together with whether there may be more
        self._closing = threading.Event()
        self._runs: dict[str, TrainingRun] = {}
        self._retry_at_s: dict[str, float] = {}
        self._workers: list[threading.Thread] = []
        self._every: tuple[str, ...] = ()
        self._free: set[str] = set()

    # What is running, and what waits

    def run_of(self, record: JobRecord) -> TrainingRun | None:
        """Return the run that carries a job, if there is one."""
        return self._runs.get(record.id) if record.state in ACTIVE_STATES else None

    def place_of(self, record: JobRecord) -> QueuePlace | None:
        """Return the place of a queued job; None for any other job.

        Only the first in the queue has an estimated start, from the run before it. The length of the others is not
        known before their data is tokenized.
        """
        if record.state is not JobState.QUEUED:
            return None
        ahead, running = self._ledger.around(record, ACTIVE_STATES)
        now = self._clock.now()
        etas = [eta for job in running if (eta := job.progress.eta_s) is not None]
        if ahead or len(etas) < len(running):
            return QueuePlace(1 + ahead, None)
        return QueuePlace(1, now + timedelta(seconds=max(etas, default=0.0)))

    def retry_after(self, job_id: str, seconds: float) -> None:
        """Queue an interrupted job again after a time."""
        self._retry_at_s[job_id] = self._clock.monotonic() + seconds

    def queue_again(self, record: JobRecord, **columns: Any) -> None:
        """Queue a paused or interrupted job now.

        Raises:
            TransitionNotPermitted: It is neither.
        """
        self._retry_at_s.pop(record.id, None)
        self._ledger.move(record, JobState.QUEUED, **columns)

    # Running

    def start(self) -> None:
        """Take up the jobs that a former server left unfinished, and start the workers."""
        self._checkpoints.remove_leftovers()
        for record in self._ledger.all(ACTIVE_STATES):
            self._take_up(record)
        self._every = self._devices()
        self._free = set(self._every)
        for device in self._every:
            worker = threading.Thread(target=self._work_on, args=(device,), name=f"training-{device}", daemon=True)
            self._workers.append(worker)
            worker.start()

    def _take_up(self, record: JobRecord) -> None:
        if record.cancel_request is not None:
            self._cancel_as_requested(record)
            return
        if record.state is JobState.PAUSING:
            self._ledger.move(record, JobState.PAUSED)
            return
        error = StudioError("The server ended while the job ran.")
        stalls = record.stalls + 1
        if stalls < MAX_STALLS:
            self._ledger.move(record, JobState.INTERRUPTED, error=failure("server_ended", error), stalls=stalls)
            return
        error.detail += GIVEN_UP
        details, now = failure("server_ended", error), to_text(self._clock.now())
        self._ledger.move(record, JobState.FAILED, error=details, stalls=stalls, finished_at=now)

    def _cancel_as_requested(self, record: JobRecord) -> None:
        """Cancel a job that was to be cancelled when its run ended with the server."""
        cancelled = self._ledger.move(record, JobState.CANCELLED, finished_at=to_text(self._clock.now()))
        if cancelled and record.cancel_request == "nothing":
            self._checkpoints.delete(record.id)

    def _work_on(self, device: str) -> None:
        while not self._closing.is_set():
            try:
                self._queue_interrupted()
                record = self._ledger.next_queued()
                busy = record is not None and self._run_on(record, device)
            except Exception:  # noqa: BLE001 - e.g. the disk is full: the log says so, and the next try may do better
                _log.exception("training.worker_failed")
                busy = False
            if not busy:
                with self._ledger.changed:
                    # Woken by every change; the time-out only covers a wake-up between the look and the wait.
                    self._ledger.changed.wait(timeout=1.0)

    def _queue_interrupted(self) -> None:
        """Queue the interrupted jobs whose wait is over."""
        now_s = self._clock.monotonic()
        for record in self._ledger.all(frozenset({JobState.INTERRUPTED})):
            if record.cancel_request is not None:
                self._cancel_as_requested(record)
            elif self._retry_at_s.get(record.id, now_s) <= now_s:
                self.queue_again(record)

    def _run_on(self, record: JobRecord, device: str) -> bool:
        """Run a queued job on a device, and on as many others as it takes; tell whether it was there to be run."""
        with self._lock:
            others = [other for other in self._every if other in self._free and other != device]
            # A machine may have lost a GPU since the job came. The run then says so.
            more = min(record.gpus, len(self._every)) - 1
            if device not in self._free or len(others) < more:
                return False
            claimed = (device, *others[:more])
            self._free -= set(claimed)
        try:
            return self._run(record, claimed)
        finally:
            with self._lock:
                self._free |= set(claimed)
            with self._ledger.changed:
                self._ledger.changed.notify_all()  # a job may have waited for them

    def _run(self, record: JobRecord, devices: tuple[str, ...]) -> bool:
        """Run a queued job; tell whether it was there to be run."""
        run = TrainingRun(
            record,
            devices,
            ledger=self._ledger,
            work=self._work,
            checkpoints=self._checkpoints,
            clock=self._clock,
            closing=self._closing,
            retry_after=self.retry_after,
        )
        with self._lock:
            # Another device's worker may take the same job. One of the two runs it; the other passes it by.
            if self._closing.is_set() or record.id in self._runs:
                return False
            self._runs[record.id] = run
        begun = False
        try:
            run.begin()
            begun = True
            self._contexts.of(record.id).run(run.execute)
        except (RunEnded, ServerEnds):
            pass
        except Exception:  # noqa: BLE001 - the worker lives on; the job says failed, the log why
            _log.exception("job.crashed", job_id=record.id)
            run.fail_unexpectedly()
        finally:
            with self._lock:
                del self._runs[record.id]
        return begun

    def close(self) -> None:
        """Stop working; running jobs write a checkpoint and become `interrupted`."""
        with self._lock:
            self._closing.set()
            runs = list(self._runs.values())
        with self._ledger.changed:
            self._ledger.changed.notify_all()
        for run in runs:
            run.end("server_ends")
        deadline_s = self._clock.monotonic() + _CHECKPOINT_GRACE_S
        for worker in self._workers:
            worker.join(timeout=max(0.0, deadline_s - self._clock.monotonic()))
