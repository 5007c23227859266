"""Rows as frozen dataclasses: what the services hold instead of dictionaries."""

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from domain.exports import ExportChange, ExportResult, ExportSettings
from domain.jobs.export_states import ExportKind, ExportState
from domain.jobs.failures import Failure
from domain.jobs.figures import JobResult
from domain.jobs.load_options import LoadOptions
from domain.jobs.openai_request import OpenAIRequest
from domain.jobs.progress import JobProgress
from domain.jobs.states import JobState


def to_text(moment: datetime) -> str:
    """Write a time as RFC 3339 in UTC; text sorts as time does."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


@dataclass(frozen=True)
class DatasetRecord:
    """A stored dataset. `bytes` is the size of the file as uploaded."""

    id: str
    name: str
    format: str
    rows: int
    rejected_rows: int
    bytes: int
    sha256: str
    columns: list[str]
    warnings: list[str]
    created_at: str


@dataclass(frozen=True, kw_only=True)
class JobRecord:
    """A training job. The fields with a default are those that a new job has nothing for.

    Attributes:
        sequence: Its place among all jobs; given when it is stored.
        load_options: How the loaded model that it names was loaded, to load the same again; None without one.
        gpus: How many GPUs it takes at once; 1 on a machine without any.
        result: What it came to; None before it has trained anything to its end.
        attempts: How often it was started.
        stalls: Deaths of its engine or of the server since its last checkpoint.
        resumed_from: The checkpoint of another job that it began with, as `job/step-…`.
        initial_adapter_id: The adapter whose weights it begins with, if it continues one.
        cancel_request: What to keep of a running job that a client has cancelled; None if nobody has. It is stored
            so that it survives the end of the server.
        openai_request: What OpenAI's API shows of the request that made it; None where it came another way.
    """

    id: str
    sequence: int = 0
    name: str
    state: JobState = JobState.QUEUED
    priority: int
    idempotency_key: str | None
    request_sha256: str
    model_id: str
    revision: str | None
    loaded_model_id: str | None
    load_options: LoadOptions | None
    algorithm: str
    config: dict[str, Any]
    dataset_id: str
    validation_dataset_id: str | None
    validation_fraction: float
    gpus: int = 1
    progress: JobProgress = field(default_factory=JobProgress)
    result: JobResult | None = None
    attempts: int = 0
    stalls: int = 0
    resumed_from: str | None = None
    initial_adapter_id: str | None = None
    cancel_request: str | None = None
    adapter_id: str | None = None
    error: Failure | None = None
    openai_request: OpenAIRequest | None = None
    created_at: str
    started_at: str | None = None
    finished_at: str | None = None


@dataclass(frozen=True)
class EventRecord:
    """One thing that happened to a job. `data` is as clients read it, whichever version wrote it."""

    job_id: str
    sequence: int
    kind: str
    data: dict[str, Any]
    created_at: str


@dataclass(frozen=True)
class AdapterRecord:
    """An adapter, trained here or imported.

    Attributes:
        config: The complete configuration of its training; None where it came without.
        job_id: The job that trained it here.
        version: Counts the adapters of the same name, from 1; given when it is stored.
        source: Where it is from: `kind` is training, checkpoint, folder, hub or upload.
    """

    id: str
    name: str
    base_model_id: str
    base_revision: str | None
    algorithm: str
    config: dict[str, Any] | None
    job_id: str | None
    dataset_sha256: str | None
    metrics: dict[str, Any]
    path: str
    created_at: str
    version: int
    source: dict[str, Any]


@dataclass(frozen=True)
class FileRecord:
    """A file of OpenAI's API.

    Attributes:
        status: `uploaded` until its rows are read; then `processed` or `error`; `deleted` where its dataset must stay,
            since a job records it as what it was trained on.
        status_details: Why its rows cannot be used.
    """

    id: str
    filename: str
    purpose: str
    bytes: int
    status: str
    status_details: str | None
    created_at: str
    expires_at: str | None


@dataclass(frozen=True)
class ExportRecord:
    """A job that makes something of an adapter.

    Attributes:
        attempts: How often it was started.
        cancel_request: Whether a running one is to be cancelled; a server that dies in between finds it.
        history: Its states in order.
        result: What was made, once it has succeeded.
    """

    id: str
    sequence: int
    adapter_id: str
    kind: ExportKind
    settings: ExportSettings
    state: ExportState
    attempts: int
    cancel_request: bool
    history: list[ExportChange]
    result: ExportResult | None
    error: Failure | None
    created_at: str
    started_at: str | None
    finished_at: str | None
