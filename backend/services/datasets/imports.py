"""What is being brought in now: how far each upload, download and reading is."""

import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

from core.clock import Clock
from core.errors import Conflict, ImportNotFound

Stage = Literal["receiving", "downloading", "reading"]


class ImportCancelled(Conflict):
    """A client cancelled the import. Nothing of the dataset is kept."""

    slug, title = "import-cancelled", "Import cancelled"


@dataclass
class Import:
    """One dataset that is not there yet.

    Attributes:
        received_bytes: Of the files, as they come.
        total_bytes: What the sender says they have, or None.
        rows: Read so far.
        cancelled: Set once it is no longer wanted.
    """

    id: str
    name: str
    stage: Stage
    received_bytes: int
    total_bytes: int | None
    rows: int
    started_at: datetime
    cancelled: threading.Event = field(default_factory=threading.Event)

    def check(self) -> None:
        """Raise ImportCancelled once it is no longer wanted."""
        if self.cancelled.is_set():
            raise ImportCancelled(f"The import of {self.name} was cancelled.")


class Imports:
    """Keeps the list."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._running: dict[str, Import] = {}

    @contextmanager
    def running(self, name: str, stage: Stage, total_bytes: int | None) -> Iterator[Import]:
        """Have an import on the list while it runs."""
        item = Import(f"imp_{uuid.uuid4().hex[:12]}", name, stage, 0, total_bytes, 0, self._clock.now())
        with self._lock:
            self._running[item.id] = item
        try:
            yield item
        finally:
            with self._lock:
                del self._running[item.id]

    def all(self) -> list[Import]:
        """Return what is running, oldest first."""
        with self._lock:
            return list(self._running.values())

    def cancel(self, import_id: str) -> Import:
        """Say that an import is no longer wanted. It ends within a second or so, and leaves nothing.

        Raises:
            ImportNotFound: None of that id is running.
        """
        with self._lock:
            item = self._running.get(import_id)
        if item is None:
            raise ImportNotFound(f"No import of the id {import_id} is running.")
        item.cancelled.set()
        return item
