"""Exports of adapters: accepted, queued, run one at a time in each lane, their folders kept and handed out."""

import contextvars
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol, TypeVar

from core.clock import Clock, SystemClock
from core.errors import (
    AdapterNotFound,
    DatabaseUnavailable,
    ExportNotFound,
    NotFound,
    StorageFull,
    StudioError,
    TransitionNotPermitted,
)
from core.logging import get_logger
from core.settings import get_settings
from core.singleton import singleton
from core.zip_stream import zip_files
from domain.jobs.export_states import FINAL_STATES, MAX_ATTEMPTS, ExportKind, ExportState, may_change
from domain.jobs.failures import failure
from services.adapter_service import AdapterService, get_adapter_service
from services.exports.control import ExportControl, ExportProgress, ExportStopped
from services.exports.model_export import ModelExport
from services.exports.push import HubPush
from services.hardware.host_probe import get_host_probe
from services.hub.http import get_hub_http
from services.model_registry_service import get_model_facts
from services.peft_service import get_peft_service
from store.database import Database, get_database
from store.records import AdapterRecord, ExportRecord, to_text
from store.repositories import Adapters, Exports

_log = get_logger(__name__)
T = TypeVar("T")
_SAVE_AGAIN_S = 1.0
_GRACE_S = 20.0  # for a tensor under way when the server is told to stop


class Work(Protocol):
    """What makes exports of some kinds."""

    def accept(self, kind: ExportKind, adapter: AdapterRecord, settings: Mapping[str, Any]) -> None:
        """Refuse at once what could never be made."""

    def run(self, record: ExportRecord, folder: Path, control: ExportControl) -> dict[str, Any]:
        """Make it, in a folder that it may fill; return what it made."""


class ExportFileNotFound(NotFound):
    """The export has no such file, or has not made it yet."""

    slug, title = "export-file-not-found", "Export file not found"


class _ServerEnds(Exception):
    """The server stops while the database cannot be used."""


class _Lane:
    """A thread that runs exports one after the other: what computes does not wait for what uploads."""

    def __init__(self, name: str, run: Callable[[str], None]) -> None:
        self._queue: SimpleQueue[tuple[contextvars.Context, str] | None] = SimpleQueue()
        self._run = run
        # A daemon: an upload to a host that hangs must not keep the process from ending.
        self.thread = threading.Thread(target=self._work, name=name, daemon=True)
        self.thread.start()

    def put(self, export_id: str) -> None:
        """Queue an export. The context carries the request's Hub token to the upload, and nowhere else."""
        self._queue.put((contextvars.copy_context(), export_id))

    def close(self) -> None:
        """End the thread after what it runs now."""
        self._queue.put(None)

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            context, export_id = item
            try:
                context.run(self._run, export_id)
            except Exception:  # noqa: BLE001 - the lane lives on, and the log says what happened
                _log.exception("export.lane_failed", export_id=export_id)


class ExportService:
    """Keeps the exports.

    Args:
        folder: One sub-folder an export that made files.
        works: Makes each kind; kinds with the same work wait for each other.
    """

    def __init__(
        self,
        database: Database,
        adapters: AdapterService,
        clock: Clock,
        folder: Path,
        works: Mapping[ExportKind, Work],
    ) -> None:
        self._database, self._adapters, self._clock, self._folder = database, adapters, clock, folder
        self._works = works
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._running: dict[str, ExportControl] = {}
        lanes = {work: _Lane(f"export-{kind.value}", self._run) for kind, work in works.items()}
        self._lanes = {kind: lanes[work] for kind, work in works.items()}
        folder.mkdir(parents=True, exist_ok=True)

    # Accepting

    def create(self, adapter_id: str, kind: ExportKind, settings: dict[str, Any]) -> ExportRecord:
        """Accept an export.

        Raises:
            AdapterNotFound: There is no such adapter.
            StudioError: As the work says of what it cannot make.
        """
        self._works[kind].accept(kind, self._adapters.get(adapter_id), settings)
        now = to_text(self._clock.now())
        record = ExportRecord(
            id=f"exp_{uuid.uuid4().hex[:12]}",
            sequence=0,
            adapter_id=adapter_id,
            kind=kind,
            settings=settings,
            state=ExportState.QUEUED,
            attempts=0,
            cancel_wish=False,
            history=[{"state": ExportState.QUEUED.value, "at": now}],
            result=None,
            error=None,
            created_at=now,
            started_at=None,
            finished_at=None,
        )
        with self._database.begin() as connection:
            if Adapters(connection).get(adapter_id) is None:
                raise AdapterNotFound(f"No adapter has the id {adapter_id}.")  # deleted in between
            record = replace(record, sequence=Exports(connection).next_sequence())
            Exports(connection).add(record)
        self._lanes[kind].put(record.id)
        return record

    # Reading

    def get(self, export_id: str) -> ExportRecord:
        """Return one export.

        Raises:
            ExportNotFound: There is none of that id.
        """
        with self._database.begin() as connection:
            record = Exports(connection).get(export_id)
        if record is None:
            raise ExportNotFound(f"No export has the id {export_id}.")
        return record

    def all(self, adapter_id: str | None = None) -> list[ExportRecord]:
        """Return exports, of one adapter or of all, newest first."""
        with self._database.begin() as connection:
            return Exports(connection).all(adapter_id)

    def progress_of(self, export_id: str) -> ExportProgress | None:
        """Return how far a running export is; None for any other."""
        control = self._running.get(export_id)
        return control.progress if control is not None else None

    def path_of(self, record: ExportRecord) -> Path | None:
        """Return the folder of what was made; None where nothing was, or not yet."""
        folder = self._folder / record.id
        return folder if record.state is ExportState.SUCCEEDED and folder.is_dir() else None

    def files(self, record: ExportRecord) -> list[tuple[str, int]]:
        """Return what was made as (name, bytes), by name."""
        folder = self.path_of(record)
        return [] if folder is None else [(path.name, path.stat().st_size) for path in sorted(folder.iterdir())]

    def file(self, export_id: str, name: str) -> Path:
        """Return one file of what was made.

        Raises:
            ExportNotFound, ExportFileNotFound: There is no such export, or no such file of it.
        """
        record = self.get(export_id)
        folder = self.path_of(record)
        names = [found for found, _ in self.files(record)]
        if folder is None or name not in names:
            raise ExportFileNotFound(f"The export is {record.state.value}; its files are {names}.")
        return folder / name

    def zipped(self, export_id: str) -> Iterator[bytes]:
        """Yield a zip of what was made, built as it is read.

        Raises:
            ExportNotFound, ExportFileNotFound: There is no such export, or it has made no files.
        """
        record = self.get(export_id)
        folder = self.path_of(record)
        if folder is None:
            raise ExportFileNotFound(f"The export is {record.state.value}; it has no files.")
        return zip_files([(path.name, path) for path in sorted(folder.iterdir())])

    # Steering

    def cancel(self, export_id: str) -> ExportRecord:
        """End an export: a queued one at once, a running one as soon as it looks up.

        Raises:
            TransitionNotPermitted: It has ended already.
        """
        record = self.get(export_id)
        if record.state in FINAL_STATES:
            raise TransitionNotPermitted(f"The export is {record.state.value}; it cannot be cancelled any more.")
        control = self._running.get(export_id)
        if control is not None:
            with self._database.begin() as connection:
                Exports(connection).wish_to_cancel(export_id)
            control.cancel()
        elif not self._move(record, ExportState.CANCELLED, finished_at=to_text(self._clock.now())):
            return self.cancel(export_id)  # it moved on in between: look again
        return self.get(export_id)

    def delete(self, export_id: str) -> None:
        """Forget an export that has ended, and delete what it made.

        Raises:
            TransitionNotPermitted: It has not ended.
        """
        record = self.get(export_id)
        if record.state not in FINAL_STATES:
            raise TransitionNotPermitted(f"The export is {record.state.value}; cancel it first.")
        with self._database.begin() as connection:
            Exports(connection).delete(export_id)
        shutil.rmtree(self._folder / export_id, ignore_errors=True)

    def _move(self, record: ExportRecord, following: ExportState, **columns: Any) -> bool:
        """Change an export's state if it is still as given; tell whether it was.

        Raises:
            TransitionNotPermitted: The table of transitions does not allow it.
        """
        if not may_change(record.state, following):
            raise TransitionNotPermitted(f"An export cannot go from {record.state.value} to {following.value}.")
        history = [*record.history, {"state": following.value, "at": to_text(self._clock.now())}]
        with self._database.begin() as connection:
            changed = Exports(connection).change_state(record, following, history=history, **columns)
        if changed:
            _log.info("export.state", export_id=record.id, state=following.value)
        return changed

    # Running

    def start(self) -> None:
        """Take up what a former server left unfinished."""
        for folder in self._folder.glob(".exp_*.tmp"):
            shutil.rmtree(folder)
        with self._database.begin() as connection:
            left = Exports(connection).all(states=frozenset({ExportState.RUNNING, ExportState.QUEUED}))
        for record in reversed(left):
            if record.cancel_wish:
                self._finish(record, ExportState.CANCELLED)
                continue
            if record.state is ExportState.RUNNING and record.attempts >= MAX_ATTEMPTS:
                ended = StudioError(f"The server ended {MAX_ATTEMPTS} times while the export ran.")
                self._finish(record, ExportState.FAILED, error=failure("server_ended", ended))
                continue
            if record.state is ExportState.RUNNING:
                self._move(record, ExportState.QUEUED)
            self._lanes[record.kind].put(record.id)

    def _run(self, export_id: str) -> None:
        with suppress(ExportNotFound, _ServerEnds):
            record = self._patiently(lambda: self.get(export_id))
            if self._closing.is_set() or record.state is not ExportState.QUEUED:
                return  # cancelled while it waited
            control = ExportControl(self._clock)
            self._running[export_id] = control
            try:
                started = record.started_at or to_text(self._clock.now())
                columns = {"attempts": record.attempts + 1, "started_at": started}
                self._patiently(lambda: self._move(record, ExportState.RUNNING, **columns))
                # Read, and not what the move said: a database that went away may have kept one it did not answer.
                begun = self._patiently(lambda: self.get(export_id))
                if begun.state is ExportState.RUNNING:
                    self._carry_out(begun, control)
            finally:
                del self._running[export_id]

    def _carry_out(self, record: ExportRecord, control: ExportControl) -> None:
        try:
            result = self._works[record.kind].run(record, self._folder / record.id, control)
        except ExportStopped:
            # The server's end is not the client's wish: the next start takes the export up again.
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
        """Record the end. What was made of an export that did not succeed goes.

        Raises:
            _ServerEnds: The database cannot be written: it says `running`, and the next start takes the export up.
        """
        if following in FINAL_STATES:
            columns["finished_at"] = to_text(self._clock.now())
        self._patiently(lambda: self._move(record, following, **columns))
        if following in (ExportState.FAILED, ExportState.CANCELLED):
            shutil.rmtree(self._folder / record.id, ignore_errors=True)

    def _patiently(self, use: Callable[[], T]) -> T:
        """Use the database; try until it answers.

        Raises:
            _ServerEnds: The server is told to stop first.
        """
        while True:
            try:
                return use()
            except (DatabaseUnavailable, StorageFull):
                if self._closing.wait(_SAVE_AGAIN_S):
                    raise _ServerEnds from None

    def close(self) -> None:
        """Stop working; a running export is queued again for the next start."""
        self._closing.set()
        for control in list(self._running.values()):
            control.stop()
        for lane in set(self._lanes.values()):
            lane.close()
        for lane in set(self._lanes.values()):
            lane.thread.join(timeout=_GRACE_S)


@singleton
def get_export_service() -> ExportService:
    """Return the process's export service."""
    adapters, clock = get_adapter_service(), SystemClock()
    model_export = ModelExport(get_peft_service(), adapters, get_model_facts(), get_host_probe().oom_kills)
    works: dict[ExportKind, Work] = {
        ExportKind.MERGED: model_export,
        ExportKind.GGUF: model_export,
        ExportKind.PUSH: HubPush(adapters, get_hub_http().endpoint),
    }
    return ExportService(get_database(), adapters, clock, get_settings().home / "exports", works)
