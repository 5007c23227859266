"""Exports of adapters: accepted, steered, their folders kept and handed out."""

import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

from core.clock import Clock, SystemClock
from core.errors import NotFound, TransitionNotPermitted
from core.files import plain_files
from core.settings import get_settings
from core.singleton import singleton
from core.zip_stream import zip_files
from domain.exports import ExportChange, ExportSettings
from domain.jobs.export_states import FINAL_STATES, ExportKind, ExportState
from services.adapter_service import AdapterService, get_adapter_service
from services.engine_service import get_engines
from services.exports.check import SET_ASIDE, ExportChecker
from services.exports.control import ExportProgress
from services.exports.ledger import ExportLedger
from services.exports.model_export import ModelExport
from services.exports.push import HubPush
from services.exports.queue import ExportQueue, Work
from services.hardware.host_probe import get_host_probe
from services.hub.http import get_hub_http
from services.hub.uploads import HubUploads
from services.model_registry_service import get_model_facts, get_model_files
from services.peft_service import get_peft_service
from store.database import get_database
from store.records import ExportRecord, to_text


class ExportFileNotFound(NotFound):
    """The export has no such file, or has not made it yet."""

    slug, title = "export-file-not-found", "Export file not found"


class ExportService:
    """Accepts exports, steers them, and hands out their files.

    Args:
        ledger: Where they are recorded.
        adapters: Has the adapters that are exported.
        works: Makes each kind. Kinds with the same work wait for each other.
        folder: Has a sub-folder for each export that made files.
        clock: For the times of the record.
    """

    def __init__(
        self,
        ledger: ExportLedger,
        adapters: AdapterService,
        works: Mapping[ExportKind, Work],
        folder: Path,
        clock: Clock,
    ) -> None:
        self.ledger, self._adapters, self._works, self._folder, self._clock = ledger, adapters, works, folder, clock
        self._queue = ExportQueue(ledger, works, folder, clock)
        folder.mkdir(parents=True, exist_ok=True)

    def start(self) -> None:
        """Take up the exports that a former server left unfinished."""
        self._queue.start()

    def close(self) -> None:
        """Stop working. A running export is queued again for the next start."""
        self._queue.close()

    # Accepting

    def create(self, adapter_id: str, kind: ExportKind, settings: ExportSettings) -> ExportRecord:
        """Accept an export.

        Raises:
            AdapterNotFound: There is no such adapter.
            StudioError: The work refuses the export; see its `accept`.
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
            cancel_request=False,
            history=[ExportChange(state=ExportState.QUEUED, at=now)],
            result=None,
            error=None,
            created_at=now,
            started_at=None,
            finished_at=None,
        )
        record = self.ledger.add(record)
        self._queue.put(record)
        return record

    # Reading

    def progress_of(self, export_id: str) -> ExportProgress | None:
        """Return how far a running export is; None for any other."""
        control = self._queue.control_of(export_id)
        return control.progress if control is not None else None

    def path_of(self, record: ExportRecord) -> Path | None:
        """Return the folder of the export's files; None if it has none, or none yet."""
        folder = self._folder / record.id
        return folder if record.state is ExportState.SUCCEEDED and folder.is_dir() else None

    def files(self, record: ExportRecord) -> list[tuple[str, int]]:
        """Return the export's files as (name, bytes), by name."""
        folder = self.path_of(record)
        return [] if folder is None else [(name, path.stat().st_size) for name, path in plain_files(folder)]

    def file(self, export_id: str, name: str) -> Path:
        """Return one file of the export.

        Raises:
            ExportNotFound, ExportFileNotFound: There is no such export, or no such file of it.
        """
        record = self.ledger.get(export_id)
        folder = self.path_of(record)
        names = [made for made, _ in self.files(record)]
        if folder is None or name not in names:
            raise ExportFileNotFound(f"The export is {record.state.value}; its files are {names}.")
        return folder / name

    def zipped(self, export_id: str) -> Iterator[bytes]:
        """Yield a zip of the export's files, built as it is read.

        Raises:
            ExportNotFound, ExportFileNotFound: There is no such export, or it has made no files.
        """
        record = self.ledger.get(export_id)
        folder = self.path_of(record)
        if folder is None:
            raise ExportFileNotFound(f"The export is {record.state.value}; it has no files.")
        return zip_files(plain_files(folder))

    # Steering

    def cancel(self, export_id: str) -> ExportRecord:
        """End an export: a queued one at once, a running one at its next check.

        Raises:
            TransitionNotPermitted: It has ended already.
        """
        record = self.ledger.get(export_id)
        if record.state in FINAL_STATES:
            raise TransitionNotPermitted(f"The export is {record.state.value}; it cannot be cancelled any more.")
        control = self._queue.control_of(export_id)
        if control is not None:
            self.ledger.request_cancel(export_id)
            control.cancel()
        elif not self.ledger.move(record, ExportState.CANCELLED, finished_at=to_text(self._clock.now())):
            return self.cancel(export_id)  # it moved on in between: look again
        return self.ledger.get(export_id)

    def delete(self, export_id: str) -> None:
        """Forget an export that has ended, and delete its files.

        Raises:
            TransitionNotPermitted: It has not ended.
        """
        record = self.ledger.get(export_id)
        if record.state not in FINAL_STATES:
            raise TransitionNotPermitted(f"The export is {record.state.value}; cancel it first.")
        self.ledger.delete(export_id)
        for name in (export_id, f"{export_id}{SET_ASIDE}"):
            shutil.rmtree(self._folder / name, ignore_errors=True)


@singleton
def get_export_service() -> ExportService:
    """Return the process's export service."""
    adapters, clock = get_adapter_service(), SystemClock()
    peft, oom_kills, settings = get_peft_service(), get_host_probe().oom_kills, get_settings()
    checker = ExportChecker(
        peft,
        get_model_files(),
        get_engines(),
        oom_kills,
        log_dir=settings.home / "logs",
        engine_silence_s=settings.engine_silence_s,
    )
    model_export = ModelExport(peft, adapters, get_model_facts(), checker, oom_kills)
    works: dict[ExportKind, Work] = {
        ExportKind.MERGED: model_export,
        ExportKind.GGUF: model_export,
        ExportKind.PUSH: HubPush(adapters, HubUploads(get_hub_http())),
    }
    ledger = ExportLedger(get_database(), clock)
    return ExportService(ledger, adapters, works, settings.home / "exports", clock)
