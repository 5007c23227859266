"""Rows as frozen dataclasses: what the services hold instead of dictionaries."""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from domain.job_states import JobState


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


@dataclass(frozen=True)
class JobRecord:
    """A training job.

    Attributes:
        attempts: How often it was started.
        stalls: Deaths of its engine or of the server since its last checkpoint.
        resumed_from: The checkpoint of another job that it began with, as `job/step-…`.
        cancel_wish: What to keep, once a running job is to be cancelled; a server that dies in between finds it.
    """

    id: str
    sequence: int
    name: str
    state: JobState
    priority: int
    idempotency_key: str | None
    request_sha256: str
    model_id: str
    revision: str | None
    loaded_model_id: str | None
    algorithm: str
    config: dict[str, Any]
    dataset_id: str
    validation_dataset_id: str | None
    validation_fraction: float
    progress: dict[str, Any]
    result: dict[str, Any]
    attempts: int
    stalls: int
    resumed_from: str | None
    cancel_wish: str | None
    adapter_id: str | None
    error: dict[str, Any] | None
    created_at: str
    started_at: str | None
    finished_at: str | None


@dataclass(frozen=True)
class EventRecord:
    """One thing that happened to a job."""

    job_id: str
    sequence: int
    kind: str
    data: dict[str, Any]
    created_at: str


@dataclass(frozen=True)
class AdapterRecord:
    """A trained adapter."""

    id: str
    name: str
    base_model_id: str
    base_revision: str | None
    algorithm: str
    config: dict[str, Any]
    job_id: str
    dataset_sha256: str
    metrics: dict[str, Any]
    path: str
    created_at: str
