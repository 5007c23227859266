"""Datasets: read once when they come, stored as normal rows, one a line."""

import hashlib
import json
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from core.clock import Clock, SystemClock
from core.errors import DatasetInUse, DatasetNotFound, DatasetNotTrainable, DatasetRejected
from core.files import storage_errors
from core.settings import get_settings
from core.singleton import singleton
from core.zip_stream import zip_files
from domain.jobs.states import FINAL_STATES
from domain.peft.objectives import SPECS as OBJECTIVES
from domain.peft.objectives import Objective
from domain.protocol import AboutDataset
from services.datasets.draft import Draft
from services.datasets.files import DatasetFiles, Manifest
from services.datasets.held_out import held_out_rows, rows_at
from services.datasets.hub_files import HubDatasets
from services.datasets.imports import Import, Imports
from services.datasets.intake import IntakeRequest, IntakeResult
from services.datasets.read_settings import ReadSettings
from services.datasets.sources import DatasetSources
from services.datasets.worker import Reader, read_in_process
from services.hub.downloads import get_downloads
from store.database import Database, get_database
from store.records import DatasetRecord, to_text
from store.repositories import Datasets

Form = Literal["original", "normalised"]
_KINDS = {"preference": "preferences", "kto": "judged answers (KTO)"}


@dataclass(frozen=True)
class Download:
    """A dataset as a file: on the disk, or made as it is read."""

    filename: str
    content: Path | Iterator[bytes]


class DatasetService:
    """Stores, lists, previews, hands out and deletes datasets.

    Args:
        files: Where they are.
        imports: Where what is under way is shown.
        max_upload_bytes: Larger datasets are refused while they arrive.
        read: Reads files into normal rows.
    """

    def __init__(
        self,
        database: Database,
        files: DatasetFiles,
        imports: Imports,
        clock: Clock,
        max_upload_bytes: int,
        read: Reader = read_in_process,
    ) -> None:
        self._database, self._files, self.imports, self._clock = database, files, imports, clock
        self._max_upload_bytes, self._read = max_upload_bytes, read

    def draft(self, progress: Import, dataset_id: str | None = None) -> Draft:
        """Begin a dataset, under a new id if none is given. It must be finished or discarded."""
        dataset_id = dataset_id or f"ds_{uuid.uuid4().hex[:12]}"
        return Draft(dataset_id, self._files.new(dataset_id), progress, self._max_upload_bytes)

    def discard(self, draft: Draft) -> None:
        """Forget a draft and what came of it."""
        self._files.discard(draft.id)

    def finish(self, draft: Draft, name: str, settings: ReadSettings, source: Mapping[str, Any]) -> DatasetRecord:
        """Read a draft's files and store the dataset; on any error nothing is left of it.

        Raises:
            ImportCancelled: It is no longer wanted.
            DatasetRejected: They cannot be read, have no usable row, or have bad rows that are not to be skipped.
            StorageFull: There is no room for the rows.
        """
        try:
            with storage_errors(draft.folder):
                draft.progress.stage = "reading"
                result = self._read_rows(draft, settings)
                record = self._record(draft, name, result)
                manifest = _manifest(draft, settings, result, source)
                draft.progress.check()
                self._files.commit(draft.id, manifest)
        except BaseException:
            self.discard(draft)
            raise
        try:
            with self._database.begin() as connection:
                Datasets(connection).add(record)
        except BaseException:
            self._files.delete(draft.id)
            raise
        return record

    def _read_rows(self, draft: Draft, settings: ReadSettings) -> IntakeResult:
        if not draft.files:
            raise DatasetRejected("There is no file.", errors=[])
        request = IntakeRequest(
            files=[(str(draft.folder / file.path), file.name) for file in draft.files],
            folder=str(draft.folder),
            format=settings.format,
            column_map=dict(settings.column_map),
            skip_bad_rows=settings.on_bad_rows == "skip",
            encoding=settings.encoding,
            text_rows=settings.text_rows,
            max_bytes=self._max_upload_bytes,
        )

        def report(rows: int, _size: int) -> None:
            draft.progress.check()
            draft.progress.rows = rows

        return self._read(request, report)

    def _record(self, draft: Draft, name: str, result: IntakeResult) -> DatasetRecord:
        digests = [file.sha256 for file in draft.files]
        several = hashlib.sha256("".join(f"{digest}\n" for digest in digests).encode()).hexdigest()
        return DatasetRecord(
            id=draft.id,
            name=name,
            format=result.format,
            rows=result.rows,
            rejected_rows=result.rejected,
            bytes=sum(file.bytes for file in draft.files),
            sha256=digests[0] if len(digests) == 1 else several,
            columns=result.columns,
            warnings=result.warnings,
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

    def manifest(self, dataset_id: str) -> Manifest:
        """Return what else is known of a dataset."""
        return self._files.manifest(dataset_id)

    def describe(self, dataset_id: str) -> AboutDataset:
        """Return what tells a dataset from any other, and how its files were read."""
        record = self.get(dataset_id)
        return AboutDataset(
            name=record.name,
            format=record.format,
            rows=record.rows,
            sha256=record.sha256,
            settings=dict(self.manifest(dataset_id).settings),
        )

    def check_trainable(self, dataset_id: str, train_on: str, objective: Objective = "sft") -> DatasetRecord:
        """Return a dataset from which a fine-tune can learn.

        Raises:
            DatasetNotFound: There is none of that id.
            DatasetNotTrainable: The objective learns from rows of another kind, or no answer may be learned.
        """
        record = self.get(dataset_id)
        spec = OBJECTIVES[objective]
        if record.format not in spec.formats:
            fitting = [name for name, other in OBJECTIVES.items() if record.format in other.formats]
            raise DatasetNotTrainable(
                f"The dataset {dataset_id} holds {_KINDS.get(record.format, 'answers or text')}; "
                f"objective={objective!r} learns from {spec.learns_from}. Here it is {' or '.join(fitting)}.",
                format=record.format,
            )
        if record.format == "text" and train_on != "all":
            raise DatasetNotTrainable(f"The dataset {dataset_id} is plain text: it has no answers; use train_on=all.")
        answers = self.manifest(dataset_id).answers
        if answers is not None and answers[train_on == "last_assistant"] == 0 and train_on != "all":
            which = "last answer" if train_on == "last_assistant" else "answer"
            raise DatasetNotTrainable(f"Nothing would be learned from {dataset_id}: every {which} has weight 0.")
        return record

    def folder(self, dataset_id: str) -> Path:
        """Return a dataset's folder.

        Raises:
            DatasetNotFound: There is no such dataset.
        """
        return self._files.path(self.get(dataset_id).id)

    def rows_path(self, dataset_id: str) -> Path:
        """Return the file of normal rows.

        Raises:
            DatasetNotFound: There is no such dataset.
        """
        return self.folder(dataset_id) / "rows.jsonl"

    def preview(self, dataset_id: str, offset: int, limit: int) -> list[dict[str, Any]]:
        """Return some normal rows."""
        with self.rows_path(dataset_id).open(encoding="utf-8") as file:
            return [json.loads(line) for line in islice(file, offset, offset + limit)]

    def validation_rows(
        self, dataset_id: str, fraction: float, seed: int, offset: int, limit: int
    ) -> tuple[tuple[int, ...], int, list[dict[str, Any]]]:
        """Return some of the rows that a job with this fraction and seed holds out.

        Returns:
            The positions of those rows in the dataset, how many rows are held out in all, and the normal rows.

        Raises:
            DatasetNotFound: There is no such dataset.
        """
        path = self.rows_path(dataset_id)
        held = held_out_rows(path, fraction, seed) if fraction > 0 else ()
        positions = held[offset : offset + limit]
        return positions, len(held), rows_at(path, positions)

    def download(self, dataset_id: str, form: Form) -> Download:
        """Return a dataset as it was, several files as a zip, or its normal rows.

        Raises:
            DatasetNotFound: There is no such dataset.
        """
        folder = self.folder(dataset_id)
        if form == "normalised":
            return Download(f"{dataset_id}.jsonl", folder / "rows.jsonl")
        files = self.manifest(dataset_id).files
        if len(files) <= 1:  # the first version's datasets have a file where the folder is now
            return Download(files[0].name if files else dataset_id, folder / (files[0].path if files else "original"))
        return Download(f"{dataset_id}.zip", zip_files([(file.name, folder / file.path) for file in files]))

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
        self._files.delete(dataset_id)

    def remove_leftovers(self) -> None:
        """Delete what cut-off uploads left."""
        self._files.remove_leftovers()


def _manifest(draft: Draft, settings: ReadSettings, result: IntakeResult, source: Mapping[str, Any]) -> Manifest:
    return Manifest(
        files=tuple(draft.files),
        source=source,
        detected=tuple(result.detected),
        unused_columns=tuple(result.unused_columns),
        answers=result.answers,
        duplicates=result.duplicates,
        rows_sha256=result.rows_sha256,
        settings=asdict(settings) | {"column_map": dict(settings.column_map)},
    )


@singleton
def get_dataset_service() -> DatasetService:
    """Return the process's dataset service."""
    settings, clock = get_settings(), SystemClock()
    files = DatasetFiles(settings.home / "datasets")
    return DatasetService(get_database(), files, Imports(clock), clock, settings.max_upload_bytes)


@singleton
def get_dataset_sources() -> DatasetSources:
    """Return the process's sources of datasets."""
    settings = get_settings()
    hub = HubDatasets(get_downloads(), settings.max_upload_bytes)
    return DatasetSources(get_dataset_service(), hub, settings.home / "imports", settings.max_upload_bytes)
