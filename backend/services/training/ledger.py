"""The records of training jobs: their states, their events, their progress."""

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from core.broadcast import Broadcast
from core.clock import Clock
from core.errors import AdapterNotFound, Conflict, JobNotFound, TransitionNotPermitted
from core.logging import get_logger
from domain.jobs.progress import JobProgress
from domain.jobs.states import FINAL_STATES, JobState, may_change
from store.database import Database
from store.records import AdapterRecord, EventRecord, JobRecord, to_text
from store.repositories import Adapters, Jobs

_log = get_logger(__name__)
_MOST_SINCE = 100  # events of one kind between two of a run: one, if any


class IdempotencyKeyReused(Conflict):
    """The client used this idempotency key before, with another request."""

    slug, title = "idempotency-key-reused", "Idempotency key reused"


class JobLedger:
    """Reads and changes the records of jobs, each change in one transaction.

    Args:
        database: Holds it.
        clock: For the times of events.
        ended: Takes the id of each job that has come to a final state.

    Attributes:
        broadcast: Wakes the followers of a job that has changed.
        changed: Notified after every change of any job.
    """

    def __init__(self, database: Database, clock: Clock, ended: Callable[[str], None]) -> None:
        self._database, self._clock, self._ended = database, clock, ended
        self.broadcast = Broadcast()
        self.changed = threading.Condition()

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

    def next_queued(self) -> JobRecord | None:
        """Return the job to run next: highest priority, then first come."""
        with self._database.begin() as connection:
            return Jobs(connection).next_queued()

    def around(self, record: JobRecord, states: frozenset[JobState]) -> tuple[int, list[JobRecord]]:
        """Return how many queued jobs run before a queued one, and the jobs in some states, at one moment."""
        with self._database.begin() as connection:
            jobs = Jobs(connection)
            return jobs.queued_ahead_of(record), jobs.all(states)

    def earlier(self, idempotency_key: str | None, request_sha256: str) -> JobRecord | None:
        """Return the job of the same idempotency key, if there is one.

        Raises:
            IdempotencyKeyReused: It was another request.
        """
        with self._database.begin() as connection:
            return _earlier(Jobs(connection), idempotency_key, request_sha256)

    def newest_with_key(self, beginning: str) -> JobRecord | None:
        """Return the newest job whose idempotency key begins so, or None."""
        with self._database.begin() as connection:
            return Jobs(connection).newest_with_key(beginning)

    def newest_events(self, job_id: str, before: int | None, limit: int, kinds: frozenset[str]) -> list[EventRecord]:
        """Return events of some kinds before a sequence number, newest first."""
        with self._database.begin() as connection:
            return Jobs(connection).newest_events(job_id, before, limit, kinds)

    def events(self, job_id: str, after: int, limit: int, kind: str | None = None) -> list[EventRecord]:
        """Return events with a sequence number above `after`, in order."""
        with self._database.begin() as connection:
            return Jobs(connection).events(job_id, after, limit, kind)

    def figures(self, job_id: str, kind: str, names: tuple[str, ...]) -> list[list[float | None]]:
        """Return figures of a job's events of one kind: a list for each name, in order of the events.

        Args:
            job_id: The job.
            kind: The events' kind.
            names: Fields of the events' data; those of a field's own fields with a dot.
        """
        with self._database.begin() as connection:
            return Jobs(connection).figures(job_id, kind, names)

    def newest_event(self, job_id: str) -> int:
        """Return the sequence number of a job's newest event."""
        with self._database.begin() as connection:
            return Jobs(connection).newest_event(job_id)

    # Changing

    def add(self, record: JobRecord) -> JobRecord:
        """Store a new job as queued, with the next sequence number.

        Returns:
            The job; or the earlier one of the same idempotency key, in which case nothing was stored.

        Raises:
            IdempotencyKeyReused: The key belongs to another request.
            AdapterNotFound: The adapter that it continues is not there any more.
        """
        with self._database.begin() as connection:
            jobs = Jobs(connection)
            earlier = _earlier(jobs, record.idempotency_key, record.request_sha256)
            if earlier is not None:
                return earlier
            initial = record.initial_adapter_id
            if initial is not None and Adapters(connection).get(initial) is None:
                raise AdapterNotFound(f"The adapter {initial} was deleted meanwhile.")
            record = replace(record, sequence=jobs.next_sequence())
            jobs.add(record)
            jobs.append_event(record.id, "state", {"state": record.state.value}, record.created_at)
        self._notify(record.id)
        return record

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
            self._ended(record.id)
        if changed:
            _log.info("job.state", job_id=record.id, state=following.value)
            self._notify(record.id)
        return changed

    def request_cancel(self, job_id: str, keep: str) -> None:
        """Record that a running job is to be cancelled, and what to keep of its work."""
        with self._database.begin() as connection:
            Jobs(connection).set(job_id, cancel_request=keep)

    def record_event(
        self, job_id: str, kind: str | None, data: dict[str, Any], progress: JobProgress, stalls: int, *, after: int
    ) -> int:
        """Write the job's progress and an event, or the progress alone if `kind` is None.

        The call may be repeated after a database went away. What was written the first time is not written again.

        Args:
            after: The event that was the job's newest when the one before this was written.

        Returns:
            The `after` of the next call.
        """
        with self._database.begin() as connection:
            jobs = Jobs(connection)
            if kind is not None:
                there = (
                    event.sequence for event in jobs.events(job_id, after, _MOST_SINCE, kind) if event.data == data
                )
                sequence = next(there, None)
                after = sequence or jobs.append_event(job_id, kind, data, to_text(self._clock.now()))
            jobs.set(job_id, progress=progress, stalls=stalls)
        self._notify(job_id)
        return after

    def delete(self, job_id: str) -> None:
        """Forget a job and its events."""
        with self._database.begin() as connection:
            Jobs(connection).delete(job_id)

    def _notify(self, job_id: str) -> None:
        self.broadcast.notify(job_id)
        with self.changed:
            self.changed.notify_all()


def _earlier(jobs: Jobs, idempotency_key: str | None, request_sha256: str) -> JobRecord | None:
    earlier = jobs.by_idempotency_key(idempotency_key) if idempotency_key is not None else None
    if earlier is not None and earlier.request_sha256 != request_sha256:
        raise IdempotencyKeyReused(f"The idempotency key belongs to the job {earlier.id}.")
    return earlier
