"""Reads and writes of each table, on a connection whose transaction the caller owns."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from pydantic import TypeAdapter
from sqlalchemy import Connection, Row, Table, delete, func, insert, select, update

from domain.exports import RESULTS, SETTINGS, ExportChange
from domain.jobs.export_states import ExportKind, ExportState
from domain.jobs.failures import Failure
from domain.jobs.states import JobState
from domain.jobs.stored import Stored
from store.records import AdapterRecord, DatasetRecord, EventRecord, ExportRecord, FileRecord, JobRecord
from store.tables import adapters, datasets, exports, files, job_events, jobs


def _written(value: Any) -> Any:
    """Write a typed value as the JSON that its column keeps; anything else is kept as it is."""
    if isinstance(value, Stored):
        return value.as_json()
    return [_written(item) for item in value] if isinstance(value, list) else value


def _columns(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _written(value) for name, value in values.items()}


def _values(record: JobRecord | ExportRecord) -> dict[str, Any]:
    return _columns({field.name: getattr(record, field.name) for field in fields(record)})


class Datasets:
    """Stored datasets."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def add(self, record: DatasetRecord) -> None:
        """Store a dataset."""
        self._connection.execute(insert(datasets).values(**asdict(record)))

    def get(self, dataset_id: str) -> DatasetRecord | None:
        """Return a dataset, or None."""
        row = self._connection.execute(select(datasets).where(datasets.c.id == dataset_id)).one_or_none()
        return None if row is None else DatasetRecord(**row._mapping)

    def all(self) -> list[DatasetRecord]:
        """Return every dataset, newest first."""
        rows = self._connection.execute(select(datasets).order_by(datasets.c.created_at.desc()))
        return [DatasetRecord(**row._mapping) for row in rows]

    def delete(self, dataset_id: str) -> None:
        """Delete a dataset."""
        self._connection.execute(delete(datasets).where(datasets.c.id == dataset_id))

    def jobs_using(self, dataset_id: str) -> list[tuple[str, JobState]]:
        """Return the jobs that refer to the dataset, with their states."""
        uses = (jobs.c.dataset_id == dataset_id) | (jobs.c.validation_dataset_id == dataset_id)
        return [
            (job_id, JobState(state))
            for job_id, state in self._connection.execute(select(jobs.c.id, jobs.c.state).where(uses))
        ]


def _values_by_key(row: Row[Any], table: Table) -> dict[str, Any]:
    """Return a row's values by the columns' names in Python. A row of SQLAlchemy knows those of the database only."""
    return {column.key: row._mapping[column] for column in table.c}


class Files:
    """Files of OpenAI's API, the deleted ones whose datasets are kept among them."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def add(self, record: FileRecord) -> None:
        """Store a file."""
        self._connection.execute(insert(files).values(**asdict(record)))

    def get(self, file_id: str) -> FileRecord | None:
        """Return a file, or None."""
        row = self._connection.execute(select(files).where(files.c.id == file_id)).one_or_none()
        return None if row is None else FileRecord(**row._mapping)

    def all(self) -> list[FileRecord]:
        """Return every file, newest first."""
        rows = self._connection.execute(select(files).order_by(files.c.created_at.desc(), files.c.id))
        return [FileRecord(**row._mapping) for row in rows]

    def set(self, file_id: str, **columns: Any) -> None:
        """Set columns of a file."""
        self._connection.execute(update(files).where(files.c.id == file_id).values(**columns))

    def delete(self, file_id: str) -> None:
        """Delete a file's record."""
        self._connection.execute(delete(files).where(files.c.id == file_id))


# Reads each column as the type of the record's field.
_JOB = TypeAdapter(JobRecord)
_NEVER_NULL = ("load_options", "result")  # columns of `jobs` that hold {} for None


def _job(row: Row[Any]) -> JobRecord:
    values = _values_by_key(row, jobs)
    return _JOB.validate_python(values | {name: values[name] or None for name in _NEVER_NULL})


class Jobs:
    """Training jobs and their events."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def next_sequence(self) -> int:
        """Return the number of the next job; jobs of one priority run in this order."""
        return int(self._connection.execute(select(func.coalesce(func.max(jobs.c.sequence), 0))).scalar_one()) + 1

    def add(self, record: JobRecord) -> None:
        """Store a job."""
        values = _values(record) | {"validation_fraction": repr(record.validation_fraction)}
        values |= {name: values[name] or {} for name in _NEVER_NULL}
        self._connection.execute(insert(jobs).values(**values))

    def get(self, job_id: str) -> JobRecord | None:
        """Return a job, or None."""
        row = self._connection.execute(select(jobs).where(jobs.c.id == job_id)).one_or_none()
        return None if row is None else _job(row)

    def by_idempotency_key(self, key: str) -> JobRecord | None:
        """Return the job that was submitted with a key, or None."""
        row = self._connection.execute(select(jobs).where(jobs.c.idempotency_key == key)).one_or_none()
        return None if row is None else _job(row)

    def newest_with_key(self, beginning: str) -> JobRecord | None:
        """Return the newest job whose idempotency key begins so, or None."""
        query = select(jobs).where(jobs.c.idempotency_key.startswith(beginning, autoescape=True))
        row = self._connection.execute(query.order_by(jobs.c.sequence.desc()).limit(1)).one_or_none()
        return None if row is None else _job(row)

    def all(self, states: frozenset[JobState] | None = None) -> list[JobRecord]:
        """Return the jobs in some states, newest first; every job if None."""
        query = select(jobs).order_by(jobs.c.sequence.desc())
        if states is not None:
            query = query.where(jobs.c.state.in_(sorted(states)))
        return [_job(row) for row in self._connection.execute(query)]

    def next_queued(self) -> JobRecord | None:
        """Return the job to run next: highest priority, then first come."""
        query = select(jobs).where(jobs.c.state == JobState.QUEUED).order_by(jobs.c.priority.desc(), jobs.c.sequence)
        row = self._connection.execute(query.limit(1)).one_or_none()
        return None if row is None else _job(row)

    def queued_ahead_of(self, record: JobRecord) -> int:
        """Count the queued jobs that run before a queued one."""
        ahead = (jobs.c.priority > record.priority) | (
            (jobs.c.priority == record.priority) & (jobs.c.sequence < record.sequence)
        )
        query = select(func.count()).select_from(jobs).where((jobs.c.state == JobState.QUEUED) & ahead)
        return int(self._connection.execute(query).scalar_one())

    def continuing(self, adapter_id: str, states: frozenset[JobState]) -> list[str]:
        """Return the ids of the jobs in some states that begin with an adapter's weights."""
        query = select(jobs.c.id).where((jobs.c.initial_adapter_id == adapter_id) & jobs.c.state.in_(sorted(states)))
        return [str(job_id) for (job_id,) in self._connection.execute(query)]

    def count_by_state(self) -> dict[str, int]:
        """Return how many jobs are in each state that any job is in."""
        query = select(jobs.c.state, func.count()).group_by(jobs.c.state)
        return {str(state): int(count) for state, count in self._connection.execute(query)}

    def change_state(self, job_id: str, current: JobState, following: JobState, **columns: Any) -> bool:
        """Change a job's state if it still is `current`; tell whether it was."""
        where = (jobs.c.id == job_id) & (jobs.c.state == current)
        result = self._connection.execute(update(jobs).where(where).values(state=following, **_columns(columns)))
        return result.rowcount == 1

    def set(self, job_id: str, **columns: Any) -> None:
        """Set columns of a job, whatever its state."""
        self._connection.execute(update(jobs).where(jobs.c.id == job_id).values(**_columns(columns)))

    def delete(self, job_id: str) -> None:
        """Delete a job and its events."""
        self._connection.execute(delete(job_events).where(job_events.c.job_id == job_id))
        self._connection.execute(delete(jobs).where(jobs.c.id == job_id))

    def append_event(self, job_id: str, kind: str, data: dict[str, Any], created_at: str) -> int:
        """Add an event and return its sequence number, from 1 for each job."""
        sequence = self.newest_event(job_id) + 1
        row = {"job_id": job_id, "sequence": sequence, "kind": kind, "data": _columns(data), "created_at": created_at}
        self._connection.execute(insert(job_events).values(**row))
        return sequence

    def newest_event(self, job_id: str) -> int:
        """Return the sequence number of a job's newest event, or 0."""
        newest = select(func.coalesce(func.max(job_events.c.sequence), 0)).where(job_events.c.job_id == job_id)
        return int(self._connection.execute(newest).scalar_one())

    def events(self, job_id: str, after: int, limit: int, kind: str | None = None) -> list[EventRecord]:
        """Return at most `limit` events after a sequence number, oldest first; of one kind if named."""
        query = select(job_events).where((job_events.c.job_id == job_id) & (job_events.c.sequence > after))
        if kind is not None:
            query = query.where(job_events.c.kind == kind)
        rows = self._connection.execute(query.order_by(job_events.c.sequence).limit(limit))
        return [EventRecord(**row._mapping) for row in rows]

    def figures(self, job_id: str, kind: str, names: tuple[str, ...]) -> list[list[float | None]]:
        """Return figures of a job's events of one kind, in order of the events.

        The database takes them out of the events: of 5,000 events that is a tenth of the time that reading them takes.

        Args:
            job_id: The job.
            kind: The events' kind.
            names: Fields of the events' data; those of a field's own fields with a dot.

        Returns:
            One list for each name, all of the same length; None where an event has no such field.
        """
        columns = [job_events.c.data[tuple(name.split("."))].as_float() for name in names]
        query = select(*columns).where((job_events.c.job_id == job_id) & (job_events.c.kind == kind))
        rows = self._connection.execute(query.order_by(job_events.c.sequence)).all()
        return [[row[place] for row in rows] for place in range(len(names))]

    def newest_events(self, job_id: str, before: int | None, limit: int, kinds: frozenset[str]) -> list[EventRecord]:
        """Return at most `limit` events of some kinds before a sequence number, newest first."""
        query = select(job_events).where((job_events.c.job_id == job_id) & job_events.c.kind.in_(sorted(kinds)))
        if before is not None:
            query = query.where(job_events.c.sequence < before)
        rows = self._connection.execute(query.order_by(job_events.c.sequence.desc()).limit(limit))
        return [EventRecord(**row._mapping) for row in rows]


class Adapters:
    """Adapters, trained here or imported."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def add(self, record: AdapterRecord) -> None:
        """Store an adapter as the next version of its name."""
        newest = select(func.coalesce(func.max(adapters.c.version), 0)).where(adapters.c.name == record.name)
        version = int(self._connection.execute(newest).scalar_one()) + 1
        self._connection.execute(insert(adapters).values(**asdict(record) | {"version": version}))

    def get(self, adapter_id: str) -> AdapterRecord | None:
        """Return an adapter, or None."""
        row = self._connection.execute(select(adapters).where(adapters.c.id == adapter_id)).one_or_none()
        return None if row is None else AdapterRecord(**row._mapping)

    def all(self) -> list[AdapterRecord]:
        """Return every adapter, newest first."""
        rows = self._connection.execute(select(adapters).order_by(adapters.c.created_at.desc()))
        return [AdapterRecord(**row._mapping) for row in rows]

    def delete(self, adapter_id: str) -> None:
        """Delete an adapter's record."""
        self._connection.execute(delete(adapters).where(adapters.c.id == adapter_id))


def _export(row: Row[Any]) -> ExportRecord:
    values = _values_by_key(row, exports)
    kind = values["kind"] = ExportKind(values["kind"])
    values["state"] = ExportState(values["state"])
    values["settings"] = SETTINGS[kind].model_validate(values["settings"])
    values["history"] = [ExportChange.model_validate(change) for change in values["history"]]
    values["result"] = RESULTS[kind].model_validate(values["result"]) if values["result"] is not None else None
    values["error"] = Failure.model_validate(values["error"]) if values["error"] is not None else None
    return ExportRecord(**values)


class Exports:
    """Exports of adapters."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def next_sequence(self) -> int:
        """Return the number of the next export; they run in this order."""
        return int(self._connection.execute(select(func.coalesce(func.max(exports.c.sequence), 0))).scalar_one()) + 1

    def add(self, record: ExportRecord) -> None:
        """Store an export."""
        self._connection.execute(insert(exports).values(**_values(record)))

    def get(self, export_id: str) -> ExportRecord | None:
        """Return an export, or None."""
        row = self._connection.execute(select(exports).where(exports.c.id == export_id)).one_or_none()
        return None if row is None else _export(row)

    def all(self, adapter_id: str | None = None, states: frozenset[ExportState] | None = None) -> list[ExportRecord]:
        """Return exports, newest first."""
        query = select(exports).order_by(exports.c.sequence.desc())
        if adapter_id is not None:
            query = query.where(exports.c.adapter_id == adapter_id)
        if states is not None:
            query = query.where(exports.c.state.in_(sorted(states)))
        return [_export(row) for row in self._connection.execute(query)]

    def change_state(self, record: ExportRecord, following: ExportState, **columns: Any) -> bool:
        """Change an export's state if it still is the record's; tell whether it was."""
        where = (exports.c.id == record.id) & (exports.c.state == record.state)
        result = self._connection.execute(update(exports).where(where).values(state=following, **_columns(columns)))
        return result.rowcount == 1

    def request_cancel(self, export_id: str) -> None:
        """Record that a client wants a running export cancelled."""
        self._connection.execute(update(exports).where(exports.c.id == export_id).values(cancel_request=True))

    def delete(self, export_id: str) -> None:
        """Delete an export's record."""
        self._connection.execute(delete(exports).where(exports.c.id == export_id))
