"""Files of OpenAI's API. One for fine-tunes becomes a dataset, and every dataset is such a file."""

import threading
import uuid
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta

from core.clock import Clock, SystemClock
from core.errors import Conflict, DatasetInUse, DatasetNotFound, DatasetRejected, NotFound, StudioError
from core.logging import get_logger
from core.settings import get_settings
from core.singleton import singleton
from domain.jobs.states import FINAL_STATES
from domain.openai.files import FINE_TUNE, dataset_of_file, file_of_dataset
from services.dataset_service import DatasetService, Download, get_dataset_service
from services.datasets.read_settings import ReadSettings
from services.files.kept import IncomingFile, KeptFiles
from services.files.uploads import Upload, Uploads
from store.database import Database, get_database
from store.records import DatasetRecord, FileRecord, to_text
from store.repositories import Datasets, Files

_log = get_logger(__name__)
_READERS = 2  # files read at once; each has a process of its own
_MOST_LINES = 20
AS_IT_IS = ReadSettings(format=None, column_map={}, on_bad_rows="reject", encoding=None, text_rows=None)


class FileNotFound(NotFound):
    """There is no file of that id."""

    slug, title = "file-not-found", "File not found"


class FileInUse(Conflict):
    """A job that has not ended needs the file."""

    slug, title = "file-in-use", "File in use"


class FileService:
    """Keeps files, reads those for fine-tunes into datasets, and lets them expire.

    A file `file-x` is read into the dataset `ds_x`. From then on the dataset has its content.

    Args:
        kept: The content of the files that are no datasets.
        uploads: Files that come in parts.
        datasets: Reads rows and keeps them.
    """

    def __init__(
        self, database: Database, kept: KeptFiles, uploads: Uploads, datasets: DatasetService, clock: Clock
    ) -> None:
        self._database, self._kept, self._datasets, self._clock = database, kept, datasets, clock
        self.uploads = uploads
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="file-reader")
        self._reading: dict[str, Future[None]] = {}
        self._completing = threading.Lock()

    def start(self) -> None:
        """Delete what cut-off uploads left, and read the files that a former server did not come to read."""
        self._kept.remove_leftovers()
        self.uploads.remove_leftovers()
        self.uploads.remove_old()
        for record in self._stored():
            if record.status == "uploaded":
                self._read(record)

    def close(self) -> None:
        """Read no more files. Those that wait are read by the next server."""
        self._readers.shutdown(wait=False, cancel_futures=True)

    # Coming in

    def incoming(self, name: str, file_id: str | None = None) -> tuple[str, IncomingFile]:
        """Open a place for a file, and name it."""
        file_id = file_id or f"file-{uuid.uuid4().hex[:12]}"
        return file_id, self._kept.incoming(file_id, name)

    def add(self, file_id: str, incoming: IncomingFile, purpose: str, expires_after_s: int | None) -> FileRecord:
        """Store a file that has arrived. The reading of its rows begins.

        Args:
            expires_after_s: Seconds after which it is deleted; None to keep it.
        """
        now = self._clock.now()
        expires = to_text(now + timedelta(seconds=expires_after_s)) if expires_after_s is not None else None
        status = "uploaded" if purpose == FINE_TUNE else "processed"
        self._kept.keep(file_id)
        record = FileRecord(
            file_id, incoming.name, purpose, incoming.size_bytes, status, None, to_text(now), expires_at=expires
        )
        with self._database.begin() as connection:
            Files(connection).add(record)
        if status == "uploaded":
            self._read(record)
        return record

    def complete(self, upload_id: str, part_ids: list[str], md5: str | None) -> tuple[Upload, FileRecord]:
        """Make a file of an upload's parts. The same again returns the same file.

        Raises:
            UploadNotFound, UploadEnded: There is no such upload, or it was cancelled or is too old.
            UploadIncomplete: The parts are not the file that was announced.
            StorageFull: There is no room for the file.
        """
        with self._completing:  # one at a time: a client that asks twice gets the same file
            upload = self.uploads.get(upload_id)
            if upload.status == "completed":
                return upload, self.get(upload.file_id)
            upload = self.uploads.pending(upload_id)
            with self._database.begin() as connection:
                record = Files(connection).get(upload.file_id)
            if record is None:  # a server that was killed may have stored it
                record = self._assembled(upload, part_ids, md5)
            return self.uploads.end(upload, "completed"), record

    def _assembled(self, upload: Upload, part_ids: list[str], md5: str | None) -> FileRecord:
        _, incoming = self.incoming(upload.filename, upload.file_id)
        try:
            self.uploads.assemble(upload, part_ids, md5, incoming)
        except BaseException:
            incoming.abandon()
            raise
        return self.add(upload.file_id, incoming, upload.purpose, upload.expires_after_s)

    def reading(self, file_id: str) -> "Future[None] | None":
        """Return what is done once a file's rows are read; None for a file that is not being read."""
        return self._reading.get(file_id)

    def _read(self, record: FileRecord) -> None:
        future = self._reading[record.id] = self._readers.submit(self._read_rows, record)
        future.add_done_callback(lambda _: self._reading.pop(record.id, None))

    def _read_rows(self, record: FileRecord) -> None:
        dataset_id, path = dataset_of_file(record.id), self._kept.path(record.id)
        changes = {"status": "processed", "status_details": None}
        try:
            if not self._has_dataset(dataset_id):  # a server that was killed may have stored it
                with self._datasets.imports.running(record.filename, "receiving", record.bytes) as progress:
                    draft = self._datasets.draft(progress, dataset_id)
                    try:
                        draft.copy(path, record.filename)
                    except BaseException:
                        self._datasets.discard(draft)
                        raise
                    source = {"kind": "upload", "filename": record.filename}
                    self._datasets.finish(draft, record.filename, AS_IT_IS, source)
        except StudioError as error:
            changes = {"status": "error", "status_details": _why(error)}
        except Exception:  # noqa: BLE001 - the traceback goes to the log; the file must not stay `uploaded`
            _log.exception("file.not_read", file_id=record.id)
            changes = {
                "status": "error",
                "status_details": "The server failed while it read the file; its log says why.",
            }
        with self._database.begin() as connection:
            Files(connection).set(record.id, **changes)
        if changes["status"] == "processed":
            self._kept.delete(record.id)

    def _has_dataset(self, dataset_id: str) -> bool:
        with self._database.begin() as connection:
            return Datasets(connection).get(dataset_id) is not None

    # Reading

    def _stored(self) -> list[FileRecord]:
        with self._database.begin() as connection:
            return Files(connection).all()

    def all(self) -> list[FileRecord]:
        """Return every file, newest first; a dataset that came another way is one, too."""
        self._expire()
        stored, datasets = self._stored(), {file_of_dataset(record.id): record for record in self._datasets.all()}
        known = {record.id for record in stored}
        there = [record for record in stored if _is_there(record, record.id in datasets)]
        there += [self._as_file(dataset) for file_id, dataset in datasets.items() if file_id not in known]
        return sorted(there, key=lambda record: (record.created_at, record.id), reverse=True)

    def get(self, file_id: str) -> FileRecord:
        """Return one file.

        Raises:
            FileNotFound: There is none of that id.
        """
        self._expire()
        with self._database.begin() as connection:
            stored = Files(connection).get(file_id)
            dataset = Datasets(connection).get(dataset_of_file(file_id))
        if stored is not None and _is_there(stored, dataset is not None):
            return stored
        if stored is None and dataset is not None and file_of_dataset(dataset.id) == file_id:
            return self._as_file(dataset)
        raise FileNotFound(f"No file has the id {file_id}.")

    def _as_file(self, dataset: DatasetRecord) -> FileRecord:
        files = self._datasets.manifest(dataset.id).files
        name = files[0].name if len(files) == 1 else f"{dataset.name}.zip"
        file_id = file_of_dataset(dataset.id)
        return FileRecord(file_id, name, FINE_TUNE, dataset.bytes, "processed", None, dataset.created_at, None)

    def content(self, file_id: str) -> Download:
        """Return a file's bytes.

        Raises:
            FileNotFound: There is none of that id.
        """
        record = self.get(file_id)
        path = self._kept.path(file_id)
        if path.exists():
            return Download(record.filename, path)
        return self._datasets.download(dataset_of_file(file_id), "original")

    # Deleting

    def delete(self, file_id: str) -> None:
        """Delete a file. Its dataset stays while a job that has ended records it as what it was trained on.

        Raises:
            FileNotFound: There is none of that id.
            FileInUse: A job that has not ended needs it.
        """
        self._forget(self.get(file_id))

    def _forget(self, record: FileRecord) -> None:
        reading = self.reading(record.id)
        if reading is not None:
            reading.exception()
        dataset_id = dataset_of_file(record.id)
        with self._database.begin() as connection:
            unfinished = [
                job for job, state in Datasets(connection).jobs_using(dataset_id) if state not in FINAL_STATES
            ]
        if unfinished:
            raise FileInUse(f"The job {unfinished[0]} has not ended and needs the file; cancel it first.")
        try:
            self._datasets.delete(dataset_id)
            kept_for_a_job = False
        except DatasetNotFound:
            kept_for_a_job = False
        except DatasetInUse:
            kept_for_a_job = True
        with self._database.begin() as connection:
            Files(connection).delete(record.id)
            if kept_for_a_job:
                deleted = {"status": "deleted", "status_details": None, "expires_at": None}
                Files(connection).add(FileRecord(**{**vars(record), **deleted}))
        self._kept.delete(record.id)

    def _expire(self) -> None:
        """Delete the files whose time has come, but for those that a job still needs."""
        now = to_text(self._clock.now())
        for record in self._stored():
            if record.expires_at is not None and record.expires_at <= now:
                try:
                    self._forget(record)
                except FileInUse:
                    continue


def _is_there(record: FileRecord, has_dataset: bool) -> bool:
    """Tell whether a file is to be seen. One that was read is gone with its dataset, whoever deleted that."""
    read = record.purpose == FINE_TUNE and record.status == "processed"
    return record.status != "deleted" and (has_dataset or not read)


def _why(error: StudioError) -> str:
    """Say why a file's rows cannot be used, line by line."""
    lines = error.extras.get("errors", []) if isinstance(error, DatasetRejected) else []
    named = [f"line {item['line']}: {item['message']}" for item in lines[:_MOST_LINES] if "line" in item]
    return "\n".join([error.detail, *named])


@singleton
def get_file_service() -> FileService:
    """Return the process's file service."""
    settings, clock = get_settings(), SystemClock()
    kept = KeptFiles(settings.home / "files", settings.max_upload_bytes)
    uploads = Uploads(settings.home / "uploads", settings.max_upload_bytes, clock)
    return FileService(get_database(), kept, uploads, get_dataset_service(), clock)
