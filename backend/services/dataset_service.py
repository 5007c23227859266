"""Datasets: read once at upload, stored as conversations, one a line."""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Literal

from core.clock import Clock, SystemClock
from core.errors import DatasetInUse, DatasetNotFound, DatasetRejected
from core.files import fsync_folder, storage_errors
from core.settings import get_settings
from core.singleton import singleton
from domain.dataset_formats import (
    FORMATS,
    DatasetFormat,
    Detection,
    RowRejected,
    detect,
    required_columns,
    to_messages,
)
from domain.job_states import FINAL_STATES
from services.database import get_database
from services.dataset_reader import SourceRow, read_rows
from store.database import Database
from store.records import DatasetRecord, to_text
from store.repositories import Datasets

_CHUNK_BYTES = 2**20
_MAX_REPORTED_ERRORS = 100
BadRows = Literal["reject", "skip"]


@dataclass(frozen=True)
class Upload:
    """A file as a client sends it.

    Attributes:
        format: How to read its rows, or None to recognise it by its columns.
        column_map: The format's field → the file's column, for columns under other names.
        on_bad_rows: Refuse the file, or keep the good rows.
    """

    file: BinaryIO
    filename: str
    name: str
    format: DatasetFormat | None
    column_map: Mapping[str, str]
    on_bad_rows: BadRows


@dataclass
class _Result:
    rows: int = 0
    format: str = ""
    columns: list[str] = field(default_factory=list)
    errors: list[dict[str, Any]] = field(default_factory=list)
    rejected: int = 0
    duplicates: int = 0
    seen: set[bytes] = field(default_factory=set)


class DatasetService:
    """Stores, lists, previews and deletes datasets.

    Args:
        folder: One sub-folder a dataset: `original`, the file as it came, and `rows.jsonl`.
        max_upload_bytes: Larger files are refused while they arrive.
    """

    def __init__(self, database: Database, folder: Path, clock: Clock, max_upload_bytes: int) -> None:
        self._database, self._folder, self._clock = database, folder, clock
        self._max_upload_bytes = max_upload_bytes
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, upload: Upload) -> DatasetRecord:
        """Read and store a file.

        Raises:
            DatasetRejected: It cannot be read, has no usable row, or has bad rows and `on_bad_rows` is reject.
            StorageFull: There is no room for it.
        """
        dataset_id = f"ds_{uuid.uuid4().hex[:12]}"
        temporary = self._folder / f"{dataset_id}.tmp"
        with storage_errors(temporary):
            temporary.mkdir()
            try:
                size, digest = self._receive(upload.file, temporary / "original")
                result = _normalise(upload, temporary)
                record = self._record(dataset_id, upload, result, size, digest)
                final = self._folder / dataset_id
                os.replace(temporary, final)
                fsync_folder(self._folder)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)
                raise
            try:
                with self._database.begin() as connection:
                    Datasets(connection).add(record)
            except BaseException:
                shutil.rmtree(final, ignore_errors=True)
                raise
        return record

    def _receive(self, source: BinaryIO, target: Path) -> tuple[int, str]:
        size, digest = 0, hashlib.sha256()
        with target.open("wb") as file:
            while chunk := source.read(_CHUNK_BYTES):
                size += len(chunk)
                if size > self._max_upload_bytes:
                    raise DatasetRejected(f"The file is larger than {self._max_upload_bytes} bytes.", errors=[])
                digest.update(chunk)
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        return size, digest.hexdigest()

    def _record(self, dataset_id: str, upload: Upload, result: _Result, size: int, digest: str) -> DatasetRecord:
        warnings = []
        if result.rejected:
            lines = ", ".join(f"line {error['line']}: {error['message']}" for error in result.errors[:10])
            more = f" and {result.rejected - 10} more" if result.rejected > 10 else ""
            warnings.append(f"{result.rejected} rows were left out: {lines}{more}")
        if result.duplicates:
            warnings.append(f"{result.duplicates} rows repeat an earlier row; they are kept")
        return DatasetRecord(
            id=dataset_id,
            name=upload.name or upload.filename,
            format=result.format,
            rows=result.rows,
            rejected_rows=result.rejected,
            bytes=size,
            sha256=digest,
            columns=result.columns,
            warnings=warnings,
            created_at=to_text(self._clock.now()),
        )

    def all(self) -> list[DatasetRecord]:
        """Return every dataset, newest first."""
        with self._database.begin() as connection:
            return Datasets(connection).all()

    def get(self, dataset_id: str) -> DatasetRecord:
        """Return one dataset.

        Raises:
            DatasetNotFound: There is none of that id.
        """
        with self._database.begin() as connection:
            record = Datasets(connection).get(dataset_id)
        if record is None:
            raise DatasetNotFound(f"No dataset has the id {dataset_id}.")
        return record

    def rows_path(self, dataset_id: str) -> Path:
        """Return the file of normalised conversations.

        Raises:
            DatasetNotFound: There is no such dataset.
        """
        return self._folder / self.get(dataset_id).id / "rows.jsonl"

    def preview(self, dataset_id: str, offset: int, limit: int) -> list[list[dict[str, str]]]:
        """Return some conversations as they will be trained on."""
        with self.rows_path(dataset_id).open(encoding="utf-8") as file:
            return [json.loads(line)["messages"] for line in islice(file, offset, offset + limit)]

    def delete(self, dataset_id: str) -> None:
        """Delete a dataset and its files.

        Raises:
            DatasetNotFound: There is none of that id.
            DatasetInUse: A job refers to it.
        """
        self.get(dataset_id)
        with self._database.begin() as connection:
            repository = Datasets(connection)
            uses = repository.jobs_using(dataset_id)
            if uses:
                unfinished = [job_id for job_id, state in uses if state not in FINAL_STATES]
                what = "has not ended" if unfinished else "records it as what it was trained on; delete the job first"
                job_id = (unfinished or [uses[0][0]])[0]
                raise DatasetInUse(f"The job {job_id} {what}.", jobs=[job for job, _ in uses])
            repository.delete(dataset_id)
        shutil.rmtree(self._folder / dataset_id)

    def remove_leftovers(self) -> None:
        """Delete what cut-off uploads left. Whole folders stay, even unknown ones: another database may know them."""
        for folder in self._folder.glob("ds_*.tmp"):
            shutil.rmtree(folder)


def _normalise(upload: Upload, folder: Path) -> _Result:
    """Write `rows.jsonl` from `original`; decide the format by the first good row."""
    result = _Result()
    detection: Detection | None = None
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for row in read_rows(folder / "original", upload.filename):
            if row.value is not None and detection is None:
                result.columns = [str(name) for name in row.value]
                detection = _detection(upload, result.columns)
                result.format = detection.format
            messages = _convert(row, detection, result)
            if messages is not None:
                line = json.dumps({"messages": messages}, ensure_ascii=False)
                file.write(line + "\n")
                result.rows += 1
                digest = hashlib.sha256(line.encode()).digest()[:16]
                result.duplicates += digest in result.seen
                result.seen.add(digest)
        file.flush()
        os.fsync(file.fileno())
    if result.rejected and (upload.on_bad_rows == "reject" or not result.rows):
        what = "on_bad_rows=skip keeps the others" if result.rows else "no row can be used"
        raise DatasetRejected(
            f"{result.rejected} rows cannot be used, the first on line {result.errors[0]['line']}: "
            f"{result.errors[0]['message']}; {what}.",
            errors=result.errors,
            rejected_rows=result.rejected,
            good_rows=result.rows,
        )
    if not result.rows:
        raise DatasetRejected("The file has no rows.", errors=[])
    return result


def _convert(row: SourceRow, detection: Detection | None, result: _Result) -> list[dict[str, str]] | None:
    error = row.error
    if row.value is not None and detection is not None:
        try:
            return to_messages(row.value, detection)
        except RowRejected as rejected:
            error = str(rejected)
    result.rejected += 1
    if len(result.errors) < _MAX_REPORTED_ERRORS:
        result.errors.append({"line": row.line, "message": error})
    return None


def _detection(upload: Upload, columns: list[str]) -> Detection:
    """Settle the format: as forced and mapped by the client, or recognised.

    Raises:
        DatasetRejected: It is not recognised, or a mapped column is not in the file.
    """
    absent = [column for column in upload.column_map.values() if column not in columns]
    if absent:
        raise DatasetRejected(f"column_map names {absent}, but the file's columns are {columns}.", errors=[])
    if upload.format is None and not upload.column_map:
        found = detect(columns)
        if found is None:
            raise DatasetRejected(
                f"The format is not recognised from the columns {columns}. Known are {list(FORMATS)}; "
                'map other columns with column_map, e.g. {"prompt": "question", "completion": "reply"}.',
                errors=[],
            )
        return found
    candidates = FORMATS if upload.format is None else (upload.format,)
    for format_ in candidates:
        fields = required_columns(format_)
        mapping = {name: upload.column_map.get(name, name) for name in fields}
        if all(column in columns for column in mapping.values()):
            return Detection(format_, {**upload.column_map, **mapping})
    if upload.format is not None and (found := detect(columns)) is not None and found.format == upload.format:
        return found
    raise DatasetRejected(f"The format {candidates} needs columns that are not in {columns}.", errors=[])


@singleton
def get_dataset_service() -> DatasetService:
    """Return the process's dataset service."""
    settings = get_settings()
    return DatasetService(get_database(), settings.home / "datasets", SystemClock(), settings.max_upload_bytes)
