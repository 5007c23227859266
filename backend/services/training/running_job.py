"""A job as its run sees it."""

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

from core.errors import JobNotFound
from domain.jobs.states import ACTIVE_STATES, JobState, may_change
from services.training.ledger import JobLedger
from store.patience import patiently
from store.records import AdapterRecord, JobRecord

T = TypeVar("T")


class RunEnded(Exception):
    """The run is over: the job's end is recorded, or the job is not the run's any more."""


class RunningJob:
    """Holds the newest record of a job that a run carries, and moves it.

    Args:
        ledger: Where the job is recorded.
        record: The job when it was taken.
        closing: Set once the server is told to stop.

    Attributes:
        lock: Held while the job moves. It may be taken again by the thread that holds it.
    """

    def __init__(self, ledger: JobLedger, record: JobRecord, closing: threading.Event) -> None:
        self._ledger, self._closing = ledger, closing
        self.record = record
        self.lock = threading.RLock()

    @property
    def id(self) -> str:
        """The job's id."""
        return self.record.id

    @property
    def state(self) -> JobState:
        """The job's state in the newest record."""
        return self.record.state

    def read(self) -> None:
        """Read the job again, from a database that may be away for a while."""
        self.record = self.patiently(lambda: self._ledger.get(self.id))

    def move(self, following: JobState, adapter: AdapterRecord | None = None, **columns: Any) -> None:
        """Change the job's state.

        Until the run has taken the job from the queue, others may move it. Afterwards only the run moves it. If the
        record is then not as expected, the database has made the run's last move and went away before it answered.

        Raises:
            TransitionNotPermitted: The table of transitions does not allow it.
            RunEnded: Somebody else has moved the job on, or deleted it.
        """
        with self.lock:
            while not self._ledger.move(self.record, following, adapter=adapter, **columns):
                try:
                    newest = self._ledger.get(self.id)
                except JobNotFound:
                    raise RunEnded from None
                if newest.state is following:
                    break
                if newest.state not in ACTIVE_STATES or not may_change(newest.state, following):
                    raise RunEnded
                self.record = replace(self.record, state=newest.state)
            self.record = replace(self.record, state=following)

    def finish(self, following: JobState, adapter: AdapterRecord | None = None, **columns: Any) -> None:
        """Change the job's state in a database that may be away for a while.

        Raises:
            ServerEnds: The server stops first. The record still says that the job runs, so the next start takes it up.
        """
        self.patiently(lambda: self.move(following, adapter, **columns))

    def patiently(self, use: Callable[[], T]) -> T:
        """Use the database; try until it answers, or the server ends.

        Raises:
            ServerEnds: The server stops first.
        """
        return patiently(use, self._closing)
