"""The imports under way: the progress of each upload, download and reading."""

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
    """One dataset that is being imported.

    Attributes:
        received_bytes: Bytes of the files that have arrived.
        total_bytes: Their size as the sender says, or None.
        rows: Read so far.
        cancelled: Set once a client has cancelled it.
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
        """Raise ImportCancelled if a client has cancelled it."""
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
        """Cancel an import. It ends within about a second, and leaves nothing.

        Raises:
            ImportNotFound: No import with that id is running.
        """
        with self._lock:
            item = self._running.get(import_id)
        if item is None:
            raise ImportNotFound(f"No import of the id {import_id} is running.")
        item.cancelled.set()
        return item
