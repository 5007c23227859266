"""The queue of exports. Each worker runs one at a time; unfinished ones are taken up after a restart."""

import contextvars
import shutil
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

from core.clock import Clock
from core.errors import ExportNotFound, StudioError
from core.logging import get_logger
from domain.exports import ExportResult, ExportSettings
from domain.jobs.export_states import FINAL_STATES, MAX_ATTEMPTS, ExportKind, ExportState
from domain.jobs.failures import failure
from services.exports.control import ExportControl, ExportStopped
from services.exports.ledger import ExportLedger
from store.patience import ServerEnds, patiently
from store.records import AdapterRecord, ExportRecord, to_text

_log = get_logger(__name__)
_GRACE_S = 20.0  # for a tensor under way when the server is told to stop


class Work(Protocol):
    """Makes exports of some kinds."""

    def accept(self, kind: ExportKind, adapter: AdapterRecord, settings: ExportSettings) -> None:
        """Refuse an export that could never be made."""

    def run(self, record: ExportRecord, folder: Path, control: ExportControl) -> ExportResult:
        """Make the export, in a folder if it has files; return a description of it."""


class _ExportWorker:
    """A thread that runs exports one after the other. Computing exports and uploads have a worker each."""

    def __init__(self, name: str, run: Callable[[str], None]) -> None:
        self._queue: SimpleQueue[tuple[contextvars.Context, str] | None] = SimpleQueue()
        self._run = run
        # A daemon thread: an upload to a host that hangs must not keep the process from ending.
        self.thread = threading.Thread(target=self._work, name=name, daemon=True)
        self.thread.start()

    def put(self, export_id: str) -> None:
        """Queue an export. Its context carries the request's Hub token to the upload, and nowhere else."""
        self._queue.put((contextvars.copy_context(), export_id))

    def close(self) -> None:
        """End the thread after what it runs now."""
        self._queue.put(None)

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            context, export_id = item
            try:
                context.run(self._run, export_id)
            except Exception:  # noqa: BLE001 - the worker goes on, and the log says what happened
                _log.exception("export.worker_failed", export_id=export_id)


class ExportQueue:
    """Runs exports.

    Args:
        ledger: Where the exports are recorded.
        works: Makes each kind of export. Kinds with the same work share a worker and wait for each other.
        folder: Has a sub-folder for each export that made files.
        clock: For the times of the record.
    """

    def __init__(self, ledger: ExportLedger, works: Mapping[ExportKind, Work], folder: Path, clock: Clock) -> None:
        self._ledger, self._works, self._folder, self._clock = ledger, works, folder, clock
        self._closing = threading.Event()
        self._running: dict[str, ExportControl] = {}
        workers = {work: _ExportWorker(f"export-{kind.value}", self._run) for kind, work in works.items()}
        self._workers = {kind: workers[work] for kind, work in works.items()}

    def put(self, record: ExportRecord) -> None:
        """Have a queued export run."""
        self._workers[record.kind].put(record.id)

    def control_of(self, export_id: str) -> ExportControl | None:
        """Return what steers a running export; None for any other."""
        return self._running.get(export_id)

    def start(self) -> None:
        """Take up the exports that a former server left unfinished."""
        for folder in self._folder.glob(".exp_*.tmp"):
            shutil.rmtree(folder)
        left = self._ledger.all(states=frozenset({ExportState.RUNNING, ExportState.QUEUED}))
        for record in reversed(left):
            if record.cancel_request:
                self._finish(record, ExportState.CANCELLED)
                continue
            if record.state is ExportState.RUNNING and record.attempts >= MAX_ATTEMPTS:
                ended = StudioError(f"The server ended {MAX_ATTEMPTS} times while the export ran.")
                self._finish(record, ExportState.FAILED, error=failure("server_ended", ended))
                continue
            if record.state is ExportState.RUNNING:
                self._ledger.move(record, ExportState.QUEUED)
            self.put(record)

    def _run(self, export_id: str) -> None:
        with suppress(ExportNotFound, ServerEnds):
            record = patiently(lambda: self._ledger.get(export_id), self._closing)
            if self._closing.is_set() or record.state is not ExportState.QUEUED:
                return  # cancelled while it waited
            control = ExportControl(self._clock)
            self._running[export_id] = control
            try:
                started = record.started_at or to_text(self._clock.now())
                columns = {"attempts": record.attempts + 1, "started_at": started}
                patiently(lambda: self._ledger.move(record, ExportState.RUNNING, **columns), self._closing)
                # The record is read, since a database that went away may have made a move without answering.
                begun = patiently(lambda: self._ledger.get(export_id), self._closing)
                if begun.state is ExportState.RUNNING:
                    self._carry_out(begun, control)
            finally:
                del self._running[export_id]

    def _carry_out(self, record: ExportRecord, control: ExportControl) -> None:
        try:
            result = self._works[record.kind].run(record, self._folder / record.id, control)
        except ExportStopped:
            # No client asked for this end, so the next start of the server takes the export up again.
            ends = self._closing.is_set() and not control.cancelled
            following = ExportState.QUEUED if ends else ExportState.CANCELLED
            self._finish(record, following)
        except StudioError as error:
            error_class = error.extras.get("error_class") or error.slug.replace("-", "_")
            self._finish(record, ExportState.FAILED, error=failure(error_class, error))
        except Exception:  # noqa: BLE001 - whatever it is, the export has failed; the log has the traceback
            _log.exception("export.crashed", export_id=record.id)
            crashed = StudioError("The server failed while it ran the export; its log says why.")
            self._finish(record, ExportState.FAILED, error=failure("server", crashed))
        else:
            self._finish(record, ExportState.SUCCEEDED, result=result)

    def _finish(self, record: ExportRecord, following: ExportState, **columns: Any) -> None:
        """Record the end. The files of an export that did not succeed are deleted.

        Raises:
            ServerEnds: The database cannot be written. It says `running`, so the next start takes the export up.
        """
        if following in FINAL_STATES:
            columns["finished_at"] = to_text(self._clock.now())
        patiently(lambda: self._ledger.move(record, following, **columns), self._closing)
        if following in (ExportState.FAILED, ExportState.CANCELLED):
            shutil.rmtree(self._folder / record.id, ignore_errors=True)

    def close(self) -> None:
        """Stop working. A running export is queued again for the next start."""
        self._closing.set()
        for control in list(self._running.values()):
            control.stop()
        for worker in set(self._workers.values()):
            worker.close()
        for worker in set(self._workers.values()):
            worker.thread.join(timeout=_GRACE_S)
