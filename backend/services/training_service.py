"""Training jobs: accepted, steered, and followed event by event."""

import uuid
from typing import Literal

from core.clock import Clock, SystemClock
from core.errors import TransitionNotPermitted
from core.settings import get_settings
from core.singleton import singleton
from domain.jobs.states import FINAL_STATES, JobState
from services.adapter_service import get_adapter_service
from services.dataset_service import get_dataset_service
from services.hardware.host_probe import get_host_probe
from services.hardware_service import get_machine
from services.peft_service import get_peft_service
from services.training.checkpoint_store import CheckpointStore
from services.training.dataset_analysis import get_dataset_analysis_service
from services.training.initial_adapters import get_initial_adapters
from services.training.job_intake import JobIntake, JobRequest, digest_of
from services.training.ledger import JobLedger
from services.training.queue import QueuePlace, TrainingQueue
from services.training.request_contexts import RequestContexts
from services.training.run_control import ENDINGS
from services.training.work import TrainingWork
from store.database import get_database
from store.records import JobRecord, to_text

Keep = Literal["nothing", "checkpoints", "adapter"]


class TrainingService:
    """Accepts jobs and steers them.

    Args:
        ledger: Where the jobs are recorded.
        queue: Runs them.
        intake: Makes a job of a request, or refuses it.
        checkpoints: Where engines leave the state of their runs.
        contexts: Keeps the Hub token of a request for the job's own download.
        clock: For the times of the record.
    """

    def __init__(
        self,
        ledger: JobLedger,
        queue: TrainingQueue,
        intake: JobIntake,
        checkpoints: CheckpointStore,
        contexts: RequestContexts,
        clock: Clock,
    ) -> None:
        self.ledger, self.checkpoints = ledger, checkpoints
        self._queue, self._intake, self._contexts, self._clock = queue, intake, contexts, clock

    def start(self) -> None:
        """Take up the jobs that a former server left unfinished, and start the workers."""
        self._queue.start()

    def close(self) -> None:
        """Stop working. Running jobs write a checkpoint and become `interrupted`."""
        self._queue.close()

    # Accepting

    def create(self, request: JobRequest) -> JobRecord:
        """Accept a job. The same request with the same idempotency key returns the same job again.

        The Hub token of the request also serves the job's own download. It stays in memory only, until the job ends.

        Raises:
            IdempotencyKeyReused: The key belongs to another request.
            StudioError: As JobIntake.record says.
        """
        earlier = self.ledger.earlier(request.idempotency_key, digest_of(request))
        if earlier is not None:
            return self._asked_for_again(earlier)
        source = self.ledger.get(request.resume_from.partition("/")[0]) if request.resume_from is not None else None
        job_id = f"job_{uuid.uuid4().hex[:12]}"
        record = self._intake.record(request, job_id, source, to_text(self._clock.now()))
        self._contexts.keep(job_id)  # before a worker can take it
        # The same request may have come meanwhile.
        stored = self.ledger.add(record)
        if stored.id == job_id:
            return stored
        self.checkpoints.delete(job_id)
        self._contexts.drop(job_id)
        return self._asked_for_again(stored)

    def _asked_for_again(self, record: JobRecord) -> JobRecord:
        if record.state not in FINAL_STATES:
            self._contexts.keep(record.id)
        return record

    # Reading

    def place_of(self, record: JobRecord) -> QueuePlace | None:
        """Return the place of a queued job; None for any other job."""
        return self._queue.place_of(record)

    def log_tail(self, job_id: str, lines: int) -> list[str]:
        """Return the last lines of the engine that trains or trained the job, as far as they are known."""
        record = self.ledger.get(job_id)
        run = self._queue.run_of(record)
        if run is not None:
            return run.log_tail()[-lines:]
        ended = record.error or record.result
        return ended.log_tail[-lines:] if ended is not None else []

    # Steering

    def cancel(self, job_id: str, keep: Keep = "nothing") -> JobRecord:
        """End a job. A job without an engine is cancelled at once, a running one at its engine's next check.

        Args:
            job_id: The job.
            keep: The part of its work to keep: nothing, its checkpoints with a new one, or the adapter as it is now.

        Raises:
            TransitionNotPermitted: It has ended already, or there is no adapter to keep.
        """
        record = self.ledger.get(job_id)
        if record.state in FINAL_STATES:
            raise TransitionNotPermitted(f"The job is {record.state.value}; it cannot be cancelled any more.")
        run = self._queue.run_of(record)
        if keep == "adapter" and (run is None or record.state is not JobState.RUNNING):
            raise TransitionNotPermitted(f"The job is {record.state.value}; only a running one has an adapter to keep.")
        if run is not None:
            self.ledger.request_cancel(job_id, keep)
            run.end(ENDINGS[keep])
            return self.ledger.get(job_id)
        if not self.ledger.move(record, JobState.CANCELLED, finished_at=to_text(self._clock.now())):
            return self.cancel(job_id, keep)  # it moved on in between: look again
        if keep == "nothing":
            self.checkpoints.delete(job_id)
        return self.ledger.get(job_id)

    def pause(self, job_id: str) -> JobRecord:
        """Stop a job so that it can go on later: a queued one at once, a running one with a checkpoint.

        Raises:
            TransitionNotPermitted: It is paused, or has ended.
        """
        record = self.ledger.get(job_id)
        run = self._queue.run_of(record)
        if run is not None:
            run.end("pause")
        elif record.state is not JobState.PAUSING and not self.ledger.move(record, JobState.PAUSED):
            return self.pause(job_id)
        return self.ledger.get(job_id)

    def write_checkpoint(self, job_id: str) -> JobRecord:
        """Ask for a checkpoint after the step under way; an event says when it is written.

        Raises:
            TransitionNotPermitted: The job is not training.
        """
        record = self.ledger.get(job_id)
        run = self._queue.run_of(record)
        if run is None or not run.write_checkpoint():
            raise TransitionNotPermitted(f"The job is {record.state.value}; only a running one has a state to write.")
        return record

    def resume(self, job_id: str) -> JobRecord:
        """Queue a paused or interrupted job now; it goes on from its newest checkpoint that verifies.

        Raises:
            TransitionNotPermitted: It is neither.
        """
        record = self.ledger.get(job_id)
        if record.state not in (JobState.PAUSED, JobState.INTERRUPTED):
            raise TransitionNotPermitted(f"The job is {record.state.value}; only a paused job can be resumed.")
        self._queue.queue_again(record, stalls=0, cancel_request=None)
        return self.ledger.get(job_id)

    def delete(self, job_id: str) -> None:
        """Forget a job that has ended, and its checkpoints. Its adapter stays.

        Raises:
            TransitionNotPermitted: It has not ended.
        """
        record = self.ledger.get(job_id)
        if record.state not in FINAL_STATES:
            raise TransitionNotPermitted(f"The job is {record.state.value}; cancel it first.")
        self.ledger.delete(job_id)
        self.checkpoints.delete(job_id)


@singleton
def get_training_service() -> TrainingService:
    """Return the process's training service."""
    settings, clock, contexts = get_settings(), SystemClock(), RequestContexts()
    datasets, peft, analyses = get_dataset_service(), get_peft_service(), get_dataset_analysis_service()
    checkpoints = CheckpointStore(settings.home / "checkpoints")
    ledger = JobLedger(get_database(), clock, contexts.drop)
    work = TrainingWork(
        peft,
        datasets,
        get_adapter_service(),
        analyses,
        checkpoints,
        settings.max_checkpoint_bytes,
        get_host_probe().oom_kills,
    )
    queue = TrainingQueue(ledger, work, checkpoints, contexts, clock, get_machine().training_devices)
    intake = JobIntake(datasets, peft, analyses, checkpoints, get_initial_adapters())
    return TrainingService(ledger, queue, intake, checkpoints, contexts, clock)
