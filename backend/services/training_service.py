"""Training jobs: accepted, queued, run one at a time, followed event by event."""

import contextvars
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any, Literal

from core.broadcast import Broadcast
from core.clock import Clock, SystemClock
from core.errors import (
    Conflict,
    JobNotFound,
    StudioError,
    TransitionNotPermitted,
)
from core.logging import get_logger
from core.settings import get_settings
from core.singleton import singleton
from domain.jobs.failures import failure
from domain.jobs.retries import MAX_STALLS
from domain.jobs.states import ACTIVE_STATES, FINAL_STATES, JobState, may_change
from services.adapter_service import AdapterService, get_adapter_service
from services.dataset_service import DatasetService, get_dataset_service
from services.hardware.host_probe import get_host_probe
from services.hardware_service import get_machine
from services.hub.http import request_token
from services.peft_service import PeftService, get_peft_service
from services.training.checkpoint_store import CheckpointStore
from services.training.dataset_analysis import DatasetAnalysisService, get_dataset_analysis_service
from services.training.job_intake import JobIntake, JobRequest, digest_of
from services.training.run import ENDINGS, RunEnded, TrainingRun
from store.database import Database, get_database
from store.records import AdapterRecord, EventRecord, JobRecord, to_text
from store.repositories import Adapters, Jobs

_log = get_logger(__name__)
Keep = Literal["nothing", "checkpoints", "adapter"]
_CHECKPOINT_GRACE_S = 30.0
_MOST_SINCE = 100  # events of one kind between two of a run: one, if any


class IdempotencyKeyReused(Conflict):
    """The key was used before, with another request."""

    slug, title = "idempotency-key-reused", "Idempotency key reused"


@dataclass(frozen=True)
class QueuePlace:
    """A queued job's place, from 1, and when it may start; None where the run before it has no estimate yet."""

    position: int
    estimated_start_at: datetime | None


class TrainingService:
    """Keeps the queue and runs its jobs: one at a time on each device, in one order for all.

    Args:
        devices: Tells the devices that jobs are trained on, asked once at the start.
        checkpoints: Where engines leave the state of their runs.
        max_checkpoint_bytes: Most bytes of checkpoints a job keeps; None for no limit.
        oom_kills: Counts the processes that the kernel has killed for want of memory.
    """

    def __init__(
        self,
        database: Database,
        datasets: DatasetService,
        adapters: AdapterService,
        peft: PeftService,
        clock: Clock,
        devices: Callable[[], tuple[str, ...]],
        analyses: DatasetAnalysisService,
        checkpoints: CheckpointStore,
        max_checkpoint_bytes: int | None,
        oom_kills: Callable[[], int],
    ) -> None:
        self._database, self.datasets, self.adapters, self.peft = database, datasets, adapters, peft
        self._clock, self._devices, self.checkpoints = clock, devices, checkpoints
        self.analyses = analyses
        self._intake = JobIntake(datasets, peft, analyses, checkpoints)
        self.max_checkpoint_bytes, self.oom_kills = max_checkpoint_bytes, oom_kills
        self.broadcast = Broadcast()
        self._wake = threading.Condition()
        self.closing = threading.Event()
        self._retry_at_s: dict[str, float] = {}
        self._runs: dict[str, TrainingRun] = {}
        self._asked_in: dict[str, contextvars.Context] = {}  # of requests that brought a Hub token
        self._workers: list[threading.Thread] = []

    # Accepting

    def create(self, request: JobRequest) -> JobRecord:
        """Accept a job; the same request with the same idempotency key again returns the same job.

        The Hub token of the request is used for the job's own download too; it is in memory alone, until the job ends.

        Raises:
            IdempotencyKeyReused: The key belongs to another request.
            StudioError: As JobIntake.record says.
        """
        with self._database.begin() as connection:
            earlier = _earlier(Jobs(connection), request)
        if earlier is not None:
            self._keep_token(earlier)
            return earlier
        source = self.get(request.resume_from.partition("/")[0]) if request.resume_from is not None else None
        now = to_text(self._clock.now())
        record = self._intake.record(request, f"job_{uuid.uuid4().hex[:12]}", source, now)
        self._keep_token(record)  # before a worker can take it
        with self._database.begin() as connection:
            jobs = Jobs(connection)
            # Again, now that nobody else can write: the same request may have come meanwhile.
            earlier = _earlier(jobs, request)
            if earlier is None:
                record = replace(record, sequence=jobs.next_sequence())
                jobs.add(record)
                jobs.append_event(record.id, "state", {"state": JobState.QUEUED.value}, now)
        if earlier is not None:
            self.checkpoints.delete(record.id)
            self._asked_in.pop(record.id, None)
            self._keep_token(earlier)
            return earlier
        self._notify(record.id)
        return record

    def _keep_token(self, record: JobRecord) -> None:
        if request_token.get() is not None and record.state not in FINAL_STATES:
            self._asked_in[record.id] = contextvars.copy_context()

    # Reading

    def get(self, job_id: str) -> JobRecord:
        """Return one job.

        Raises:
            JobNotFound: There is none of that id.
        """
        with self._database.begin() as connection:
            record = Jobs(connection).get(job_id)
        if record is None:
            raise JobNotFound(f"No training job has the id {job_id}.")
        return record

    def all(self, states: frozenset[JobState] | None = None) -> list[JobRecord]:
        """Return jobs, newest first."""
        with self._database.begin() as connection:
            return Jobs(connection).all(states)

    def count_by_state(self) -> dict[str, int]:
        """Return how many jobs there are in each state, the empty ones included."""
        with self._database.begin() as connection:
            return {state.value: 0 for state in JobState} | Jobs(connection).count_by_state()

    def events(self, job_id: str, after: int, limit: int, kind: str | None = None) -> list[EventRecord]:
        """Return events with a sequence number above `after`, in order."""
        with self._database.begin() as connection:
            return Jobs(connection).events(job_id, after, limit, kind)

    def log_tail(self, job_id: str, lines: int) -> list[str]:
        """Return the last lines of the engine that trains or trained the job, as far as they are known."""
        record = self.get(job_id)
        run = self._run_of(record)
        if run is not None:
            return run.log_tail()[-lines:]
        kept: list[str] = (record.error or {}).get("log_tail", record.result.get("log_tail", []))
        return kept[-lines:]

    def place_of(self, record: JobRecord) -> QueuePlace | None:
        """Return where a queued job stands; None for any other.

        The start is estimated for the first in the queue alone, from the run before it: what the others will take is
        known once their data is tokenized, and not before.
        """
        if record.state is not JobState.QUEUED:
            return None
        with self._database.begin() as connection:
            position = 1 + Jobs(connection).queued_ahead_of(record)
            running = Jobs(connection).all(ACTIVE_STATES)
        now = self._clock.now()
        etas = [eta for job in running if (eta := job.progress.get("eta_s")) is not None]
        if position > 1 or len(etas) < len(running):
            return QueuePlace(position, None)
        return QueuePlace(position, now + timedelta(seconds=max(etas, default=0.0)))

    # Steering

    def cancel(self, job_id: str, keep: Keep = "nothing") -> JobRecord:
        """End a job. One that is in no engine is cancelled at once; a running one as soon as its engine sees it.

        Args:
            job_id: The job.
            keep: What to keep of its work: nothing, its checkpoints with a new one, or the adapter as it is now.

        Raises:
            TransitionNotPermitted: It has ended already, or there is no adapter to keep.
        """
        record = self.get(job_id)
        if record.state in FINAL_STATES:
            raise TransitionNotPermitted(f"The job is {record.state.value}; it cannot be cancelled any more.")
        run = self._run_of(record)
        if keep == "adapter" and (run is None or record.state is not JobState.RUNNING):
            raise TransitionNotPermitted(f"The job is {record.state.value}; only a running one has an adapter to keep.")
        if run is not None:
            with self._database.begin() as connection:
                Jobs(connection).set(job_id, cancel_wish=keep)
            run.end(ENDINGS[keep])
            return self.get(job_id)
        if not self.move(record, JobState.CANCELLED, finished_at=to_text(self._clock.now())):
            return self.cancel(job_id, keep)  # it moved on in between: look again
        if keep == "nothing":
            self.checkpoints.delete(job_id)
        return self.get(job_id)

    def pause(self, job_id: str) -> JobRecord:
        """Stop a job so that it can go on later: a queued one at once, a running one with a checkpoint.

        Raises:
            TransitionNotPermitted: It is paused, or has ended.
        """
        record = self.get(job_id)
        run = self._run_of(record)
        if run is not None:
            run.end("pause")
        elif record.state is not JobState.PAUSING and not self.move(record, JobState.PAUSED):
            return self.pause(job_id)
        return self.get(job_id)

    def write_checkpoint(self, job_id: str) -> JobRecord:
        """Ask for a checkpoint after the step under way; an event says when it is written.

        Raises:
            TransitionNotPermitted: The job is not training.
        """
        record = self.get(job_id)
        run = self._run_of(record)
        if run is None or not run.write_checkpoint():
            raise TransitionNotPermitted(f"The job is {record.state.value}; only a running one has a state to write.")
        return record

    def resume(self, job_id: str) -> JobRecord:
        """Queue a paused or interrupted job now; it goes on from its newest checkpoint that verifies.

        Raises:
            TransitionNotPermitted: It is neither.
        """
        record = self.get(job_id)
        if record.state not in (JobState.PAUSED, JobState.INTERRUPTED):
            raise TransitionNotPermitted(f"The job is {record.state.value}; only a paused job can be resumed.")
        self._queue_again(record, stalls=0, cancel_wish=None)
        return self.get(job_id)

    def _queue_again(self, record: JobRecord, **columns: Any) -> None:
        self._retry_at_s.pop(record.id, None)
        self.move(record, JobState.QUEUED, **columns)

    def _run_of(self, record: JobRecord) -> TrainingRun | None:
        return self._runs.get(record.id) if record.state in ACTIVE_STATES else None

    def delete(self, job_id: str) -> None:
        """Forget a job that has ended, and its checkpoints. Its adapter stays.

        Raises:
            TransitionNotPermitted: It has not ended.
        """
        record = self.get(job_id)
        if record.state not in FINAL_STATES:
            raise TransitionNotPermitted(f"The job is {record.state.value}; cancel it first.")
        with self._database.begin() as connection:
            Jobs(connection).delete(job_id)
        self.checkpoints.delete(job_id)

    # Changing, for the run

    def move(
        self, record: JobRecord, following: JobState, *, adapter: AdapterRecord | None = None, **columns: Any
    ) -> bool:
        """Change a job's state, write the event and record its adapter, in one transaction.

        Returns:
            Whether the job was still as given; if not, nothing was written.

        Raises:
            TransitionNotPermitted: The table of transitions does not allow it.
        """
        if not may_change(record.state, following):
            raise TransitionNotPermitted(f"A job cannot go from {record.state.value} to {following.value}.")
        now = to_text(self._clock.now())
        data: dict[str, Any] = {"state": following.value}
        data |= {name: columns[name] for name in ("error", "adapter_id") if columns.get(name) is not None}
        with self._database.begin() as connection:
            jobs = Jobs(connection)
            changed = jobs.change_state(record.id, record.state, following, **columns)
            if changed:
                jobs.append_event(record.id, "state", data, now)
            if changed and adapter is not None:
                Adapters(connection).add(adapter)
        if following in FINAL_STATES:
            self._asked_in.pop(record.id, None)
        if changed:
            _log.info("job.state", job_id=record.id, state=following.value)
            self._notify(record.id)
        return changed

    def newest_event(self, job_id: str) -> int:
        """Return the sequence number of a job's newest event."""
        with self._database.begin() as connection:
            return Jobs(connection).newest_event(job_id)

    def record_event(
        self, job_id: str, kind: str | None, data: dict[str, Any], progress: dict[str, Any], stalls: int, *, after: int
    ) -> int:
        """Write an event, or none if `kind` is None, and with it the job's progress.

        The same call again writes nothing twice: a database that went away may have kept the first.

        Args:
            after: The event that was the job's newest when the one before this was written.

        Returns:
            The `after` of the next call.
        """
        with self._database.begin() as connection:
            jobs = Jobs(connection)
            if kind is not None:
                there = (
                    found.sequence for found in jobs.events(job_id, after, _MOST_SINCE, kind) if found.data == data
                )
                sequence = next(there, None)
                after = sequence or jobs.append_event(job_id, kind, data, to_text(self._clock.now()))
            jobs.set(job_id, progress=progress, stalls=stalls)
        self._notify(job_id)
        return after

    def retry_after(self, job_id: str, seconds: float) -> None:
        """Have an interrupted job queued again after a while."""
        self._retry_at_s[job_id] = self._clock.monotonic() + seconds

    def _notify(self, job_id: str) -> None:
        self.broadcast.notify(job_id)
        with self._wake:
            self._wake.notify_all()

    # Running

    def start(self) -> None:
        """Take up what a former server left unfinished, and start working."""
        self.checkpoints.remove_leftovers()
        for record in self.all(ACTIVE_STATES):
            self._take_up(record)
        for device in self._devices():
            worker = threading.Thread(target=self._work, args=(device,), name=f"training-{device}", daemon=True)
            self._workers.append(worker)
            worker.start()

    def _take_up(self, record: JobRecord) -> None:
        if record.cancel_wish is not None:
            self._cancel_as_wished(record)
            return
        if record.state is JobState.PAUSING:
            self.move(record, JobState.PAUSED)
            return
        error = StudioError("The server ended while the job ran.")
        stalls = record.stalls + 1
        if stalls < MAX_STALLS:
            self.move(record, JobState.INTERRUPTED, error=failure("server_ended", error), stalls=stalls)
            return
        error.detail += f" This was the {MAX_STALLS}th time in a row without a checkpoint in between."
        finished = to_text(self._clock.now())
        self.move(record, JobState.FAILED, error=failure("server_ended", error), stalls=stalls, finished_at=finished)

    def _cancel_as_wished(self, record: JobRecord) -> None:
        """Cancel a job whose run ended before it could obey."""
        cancelled = self.move(record, JobState.CANCELLED, finished_at=to_text(self._clock.now()))
        if cancelled and record.cancel_wish == "nothing":
            self.checkpoints.delete(record.id)

    def _work(self, device: str) -> None:
        while not self.closing.is_set():
            try:
                self._queue_interrupted()
                busy = self._work_once(device)
            except Exception:  # noqa: BLE001 - e.g. the disk is full: the log says so, and the next try may do better
                _log.exception("training.worker_failed")
                busy = False
            if not busy:
                with self._wake:
                    # Woken by every change; the time-out only covers a wake-up between the look and the wait.
                    self._wake.wait(timeout=1.0)

    def _queue_interrupted(self) -> None:
        """Queue the interrupted jobs whose wait is over."""
        now_s = self._clock.monotonic()
        for record in self.all(frozenset({JobState.INTERRUPTED})):
            if record.cancel_wish is not None:
                self._cancel_as_wished(record)
            elif self._retry_at_s.get(record.id, now_s) <= now_s:
                self._queue_again(record)

    def _work_once(self, device: str) -> bool:
        """Run the next queued job, if there is one; tell whether there was."""
        with self._database.begin() as connection:
            record = Jobs(connection).next_queued()
        return record is not None and self._guarded(record, device)

    def _guarded(self, record: JobRecord, device: str) -> bool:
        """Run a job; tell whether it was there to be run."""
        run = TrainingRun(self, self._clock, record, device)
        with self._wake:
            # Another device's worker may have found the same job: one of the two moves it on, the other goes by.
            if self.closing.is_set() or record.id in self._runs:
                return False
            self._runs[record.id] = run
        begun = False
        try:
            run.begin()
            begun = True
            asked_in = self._asked_in.get(record.id) or contextvars.Context()
            asked_in.copy().run(run.execute)
        except RunEnded:
            pass
        except Exception:  # noqa: BLE001 - the worker lives on; the job says failed, the log why
            _log.exception("job.crashed", job_id=record.id)
            run.fail_unexpectedly()
        finally:
            with self._wake:
                del self._runs[record.id]
        return begun

    def close(self) -> None:
        """Stop working; running jobs write a checkpoint and become `interrupted`."""
        with self._wake:
            self.closing.set()
            runs = list(self._runs.values())
            self._wake.notify_all()
        for run in runs:
            run.end("server_ends")
        deadline_s = self._clock.monotonic() + _CHECKPOINT_GRACE_S
        for worker in self._workers:
            worker.join(timeout=max(0.0, deadline_s - self._clock.monotonic()))


def _earlier(jobs: Jobs, request: JobRequest) -> JobRecord | None:
    """Return the job of the same idempotency key.

    Raises:
        IdempotencyKeyReused: It was another request.
    """
    if request.idempotency_key is None:
        return None
    earlier = jobs.by_idempotency_key(request.idempotency_key)
    if earlier is not None and earlier.request_sha256 != digest_of(request):
        raise IdempotencyKeyReused(f"The idempotency key belongs to the job {earlier.id}.")
    return earlier


@singleton
def get_training_service() -> TrainingService:
    """Return the process's training service."""
    settings = get_settings()
    return TrainingService(
        get_database(),
        get_dataset_service(),
        get_adapter_service(),
        get_peft_service(),
        SystemClock(),
        get_machine().training_devices,
        get_dataset_analysis_service(),
        CheckpointStore(settings.home / "checkpoints"),
        settings.max_checkpoint_bytes,
        get_host_probe().oom_kills,
    )
