"""One job from the queue to its end: trained by an engine, its adapter recorded, a failure explained."""

import threading
from collections.abc import Callable
from datetime import datetime

from core import telemetry
from core.clock import Clock
from core.errors import StorageFull, StudioError
from domain import protocol
from domain.jobs.failures import failure
from domain.jobs.figures import JobResult
from domain.jobs.retries import GIVEN_UP, MAX_STALLS, TRANSIENT, wait_s
from domain.jobs.states import JobState
from services.engines.process import CommandFailed, EngineDied, death_class
from services.training.checkpoint_store import CheckpointStore
from services.training.ledger import JobLedger
from services.training.lineage import lineage_of
from services.training.run_control import ENDINGS, Ending, RunControl, RunStopped
from services.training.run_journal import RunJournal
from services.training.running_job import RunningJob
from services.training.work import Trained, TrainingWork
from store.records import AdapterRecord, JobRecord, to_text


class TrainingRun:
    """Carries one job through its states. `end` may come from any thread.

    Args:
        record: The job, queued.
        devices: Where it is trained: `cpu`, or the index of each of its GPUs.
        ledger: Where the job is recorded.
        work: Trains it.
        checkpoints: Where its engine leaves the state of the run.
        clock: For the times of the record.
        closing: Set once the server is told to stop.
        retry_after: Takes the job's id and the seconds after which it is to be tried again.
    """

    def __init__(
        self,
        record: JobRecord,
        devices: tuple[str, ...],
        *,
        ledger: JobLedger,
        work: TrainingWork,
        checkpoints: CheckpointStore,
        clock: Clock,
        closing: threading.Event,
        retry_after: Callable[[str, float], None],
    ) -> None:
        self._devices, self._work, self._checkpoints, self._clock = devices, work, checkpoints, clock
        self._retry_after = retry_after
        self._job = RunningJob(ledger, record, closing)
        self._control = RunControl(self._job.lock)
        self._journal = RunJournal(self._job, ledger, self._give_up)
        self._unsaved_because: StudioError | None = None
        self._oom_kills = work.oom_kills()
        self._trained = False

    def begin(self) -> None:
        """Take the job from the queue.

        Raises:
            RunEnded: It is not in the queue any more.
            ServerEnds: The server stops before the database can be used.
        """
        now, record = self._clock.now(), self._job.record
        started = record.started_at or to_text(now)
        # Patiently: a database that goes away here may have kept the change, and then no other run would take the job.
        self._job.finish(JobState.PREPARING, started_at=started, attempts=record.attempts + 1, error=None)
        self._job.read()  # another run of it may have ended since it was read
        self._journal.begin()
        if self._job.record.attempts == 1:
            waited = now - datetime.fromisoformat(self._job.record.created_at)
            telemetry.job_queue_seconds.observe(max(0.0, waited.total_seconds()))

    def execute(self) -> None:
        """Run the job that `begin` took to a final state, or to `paused` or `interrupted`.

        Raises:
            RunEnded: The job is not the run's any more.
            ServerEnds: The server stops before the database can be used.
        """
        try:
            cancel_request = self._job.record.cancel_request
            if cancel_request is not None:  # made during an earlier run, which ended first
                self.end(ENDINGS[cancel_request])
            self._control.check()
            trained = self._work.run(self._job, self._devices, self._control, self._journal, self._on_event)
            self._trained = True
            self._journal.flush()
            self._succeed(trained)
        except RunStopped:
            self._end_early()
        except CommandFailed as error:
            error_class = error.extras["error_class"]
            if error_class in ("cancelled", "paused"):
                self._end_early()
            else:
                self._fail(error_class, error)
        except EngineDied as error:
            if self._control.stopped:
                self._end_early()
            else:
                self._fail(self._death_class(error), error)
        except StorageFull as error:
            self._fail("disk_full", error)
        except StudioError as error:
            self._fail(error.slug.replace("-", "_"), error)

    def _on_event(self, event: protocol.RunEvent) -> None:
        if isinstance(event, protocol.StepMetrics):
            self._oom_kills = self._work.oom_kills()  # a kill before this step was another's
        self._journal.on_event(event)

    def _death_class(self, error: EngineDied) -> str:
        return death_class(error, out_of_memory=self._work.oom_kills() > self._oom_kills)

    # Ends

    def _succeed(self, trained: Trained) -> None:
        record, figures, now = self._job.record, trained.figures, to_text(self._clock.now())
        adapter = AdapterRecord(
            id=trained.adapter_id,
            name=record.name,
            base_model_id=trained.model.model_id,
            base_revision=trained.model.revision,
            algorithm=record.algorithm,
            config=record.config,
            job_id=record.id,
            dataset_sha256=trained.dataset_sha256,
            metrics=figures.as_json(),
            path=trained.path,
            created_at=now,
            version=0,  # given when it is stored
            source={"kind": "training", "job_id": record.id, **lineage_of(record)},
        )
        kept = JobResult(**dict(figures), log_tail=trained.log_tail)
        state = JobState.CANCELLED if figures.stopped_on_request else JobState.SUCCEEDED
        self._job.finish(state, adapter=adapter, adapter_id=adapter.id, result=kept, finished_at=now)

    def _fail(self, error_class: str, error: StudioError) -> None:
        """Record a failure. The job is tried again, waits for a person, or has failed."""
        self._journal.flush()
        hands_out = self._hands_out()
        if self._control.stopped and not hands_out and (error_class == "disk_full" or error_class in TRANSIENT):
            return self._end_early()  # the run was to end anyway
        telemetry.job_interruptions.labels(error_class).inc()
        details = failure(error_class, error)
        if error_class in ("out_of_memory", "out_of_host_memory"):
            suggestions = self._work.savings(self._job.record, self._devices[0]) or details.suggestions
            details = details.model_copy(update={"suggestions": suggestions})
        if error_class == "disk_full" or hands_out:
            progress = self._journal.progress.paused(hands_out=hands_out)
            return self._job.finish(JobState.PAUSED, error=details, progress=progress)
        stalls = self._journal.stalls + 1
        if error_class in TRANSIENT and stalls < MAX_STALLS:
            wait = max(wait_s(self._journal.stalls), error.extras.get("retry_after_s") or 0.0)
            self._retry_after(self._job.id, wait)  # first: the queue reads it as soon as the job is interrupted
            return self._job.finish(JobState.INTERRUPTED, error=details, stalls=stalls)
        if error_class in TRANSIENT:
            details = details.model_copy(update={"message": details.message + GIVEN_UP})
        if self._has_ended() or (error_class == "cannot_save" and self._journal.progress.step):
            return self._job.finish(JobState.PAUSED, error=details, stalls=0)
        self._job.finish(JobState.FAILED, error=details, stalls=stalls, finished_at=to_text(self._clock.now()))

    def _has_ended(self) -> bool:
        """Tell whether the last step is taken, so that only the adapter is left to hand out."""
        step, total = self._journal.progress.step, self._journal.progress.total_steps
        return self._trained or (total is not None and step >= total > 0)

    def _hands_out(self) -> bool:
        """Tell whether the run was to hand out the adapter as it is, and has trained one."""
        progress = self._journal.progress
        return progress.hands_out or (self._control.ending == "keep_adapter" and progress.step > 0)

    def fail_unexpectedly(self) -> None:
        """Record an error of the server itself. Its log has the traceback.

        Raises:
            RunEnded: The job is not the run's any more.
            ServerEnds: The server stops before the database can be used.
        """
        self._fail("server", StudioError("The server failed while it ran the job; its log says why."))

    def _end_early(self) -> None:
        """Record why the run was stopped."""
        self._journal.flush()
        if self._control.ending == "pause":
            self._job.finish(JobState.PAUSED)
        elif self._control.ending == "not_saved" and self._unsaved_because is not None:
            because = self._unsaved_because
            error_class = "disk_full" if isinstance(because, StorageFull) else "database_unavailable"
            self._job.finish(JobState.PAUSED, error=failure(error_class, because))
        elif self._control.ending == "server_ends":
            ended = StudioError("The server was stopped while the job ran; it goes on when the server starts.")
            self._job.finish(JobState.INTERRUPTED, error=failure("server_ended", ended))
        else:
            self._job.finish(JobState.CANCELLED, finished_at=to_text(self._clock.now()))
            if self._control.ending == "discard":
                self._checkpoints.delete(self._job.id)

    # Steering

    def end(self, ending: Ending) -> None:
        """Stop the run before its last step. A cancel overrules a pause; a pause overrules the end of the server.

        Raises:
            TransitionNotPermitted: A pause is wanted of a job that is neither preparing nor running.
        """
        with self._job.lock:
            if ending == "pause" and self._job.state is not JobState.PAUSING:
                self._job.move(JobState.PAUSING)
            self._control.set(ending)
        self._control.tell_engine()

    def _give_up(self, because: StudioError) -> None:
        self._unsaved_because = because
        self.end("not_saved")

    def write_checkpoint(self) -> bool:
        """Ask for a checkpoint after the step under way; False if nothing is training yet."""
        return self._job.state is JobState.RUNNING and self._control.write_checkpoint()

    def log_tail(self) -> list[str]:
        """Return the engine's last lines."""
        return self._control.log_tail()
