"""What a run reports: its events and its progress, kept until the database has them."""

from collections import deque
from collections.abc import Callable
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from core import telemetry
from core.errors import StorageFull, StudioError
from core.logging import get_logger
from domain import protocol
from domain.jobs.progress import JobProgress
from domain.jobs.states import JobState
from services.training.ledger import JobLedger
from services.training.running_job import RunningJob
from store.patience import AWAY

_log = get_logger(__name__)
# The most steps that wait for a database that is away. With more of them the run is paused.
_MOST_UNSAVED = 1000


class RunJournal:
    """Records the events of one run.

    Args:
        job: The job; it moves to `running` with the engine's first event.
        ledger: Where the events go.
        give_up: Called with the reason once events cannot be kept any longer.

    Attributes:
        progress: The job's progress as it is, recorded or not.
        stalls: Deaths of the engine or of the server since the last checkpoint.
    """

    def __init__(self, job: RunningJob, ledger: JobLedger, give_up: Callable[[StudioError], None]) -> None:
        self._job, self._ledger, self._give_up = job, ledger, give_up
        self._started = False
        self._unsaved: deque[tuple[str | None, dict[str, Any], JobProgress]] = deque()
        self._newest_event = 0
        self.progress = job.record.progress
        self.stalls = job.record.stalls

    def begin(self) -> None:
        """Read the job's progress and its newest event, from which the run goes on."""
        self._newest_event = self._job.patiently(lambda: self._ledger.newest_event(self._job.id))
        self.progress, self.stalls = self._job.record.progress, self._job.record.stalls

    def on_event(self, event: protocol.RunEvent) -> None:
        """Record an event. A step that is trained again after a crash is the same step, and is not recorded twice."""
        before = self.progress
        if isinstance(event, protocol.TrainingStarted):
            self._started = True
            self._save(event, before.started(event.resumed_from_step or 0, event.total_steps))
        elif isinstance(event, protocol.Computing):
            self._save(None, before.computed(event.how))
        elif isinstance(event, protocol.StepMetrics):
            algorithm = self._job.record.algorithm
            telemetry.step_seconds.labels(algorithm).observe(event.step_s)
            telemetry.tokens.labels(algorithm).inc(event.step_tokens)
            self._save(event if event.step > before.recorded_step else None, before.stepped(event.figures()))
        elif isinstance(event, protocol.Evaluated):
            self._save(event if event.step > before.evaluated_step else None, before.evaluated(event.step))
        elif isinstance(event, protocol.CheckpointWritten):
            if event.step > before.checkpoint_step:
                self.stalls = 0
            self._save(event, before.kept(event.step))
        else:
            self._save(event, before)

    def _save(self, event: protocol.RunEvent | None, progress: JobProgress) -> None:
        """Write an event and the progress. They wait for a database that is away; a full disk pauses the job."""
        self.progress = progress
        kind, data = (event.kind, event.data()) if event is not None else (None, {})
        self._unsaved.append((kind, data, progress))
        try:
            self._flush()
        except AWAY as error:
            _log.warning("job.event_waits", job_id=self._job.id, event_kind=kind, unsaved=len(self._unsaved))
            if isinstance(error, StorageFull) or len(self._unsaved) > _MOST_UNSAVED:
                self._give_up(error)

    def _flush(self) -> None:
        with self._job.lock:
            if self._started and self._job.state is JobState.PREPARING:  # it may be pausing already
                self._job.move(JobState.RUNNING)
        while self._unsaved:
            kind, data, progress = self._unsaved[0]
            try:
                self._newest_event = self._ledger.record_event(
                    self._job.id, kind, data, progress, self.stalls, after=self._newest_event
                )
            except SQLAlchemyError:  # no outage: the event can never be written, and must not hold up the others
                _log.exception("job.event_lost", job_id=self._job.id, event_kind=kind)
            self._unsaved.popleft()

    def flush(self) -> None:
        """Write what could not be written before.

        Raises:
            ServerEnds: The server stops before the database can be used.
        """
        self._job.patiently(self._flush)
