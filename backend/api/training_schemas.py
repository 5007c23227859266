"""Requests and responses of /api/training."""

from typing import Annotated, Any

from pydantic import Field, StringConstraints

from api.peft_schemas import ModelId, Overrides, Request, Response, Revision
from domain.algorithms import Algorithm
from domain.job_states import JobState
from domain.peft_config import PeftConfig, PeftOverrides
from domain.use_cases import UseCaseId
from store.records import JobRecord

Id = Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_-]+$")]


class CreateJobRequest(Request):
    model_id: ModelId | None = None
    loaded_model_id: Id | None = Field(default=None, description="Train on this loaded base; nothing is loaded again.")
    revision: Revision | None = None
    dataset_id: Id
    validation_dataset_id: Id | None = None
    validation_fraction: float = Field(default=0, ge=0, le=0.9, description="Hold out this part of the rows, 0..0.9.")
    use_case: Annotated[UseCaseId, Field(strict=False)] | None = None
    algorithm: Annotated[Algorithm, Field(strict=False)] = Algorithm.LORA
    overrides: Overrides = Field(default_factory=PeftOverrides)
    name: str | None = Field(default=None, min_length=1, max_length=200)
    priority: int = Field(default=0, ge=-100, le=100, description="Higher runs first.")
    idempotency_key: str | None = Field(default=None, min_length=1, max_length=200)


class JobProgress(Response):
    step: int
    total_steps: int | None
    epoch: float | None
    fraction: float
    eta_s: float | None
    tokens_per_s: float | None


class JobMetrics(Response):
    last: dict[str, Any] | None = Field(description="The newest step's metrics.")
    initial_eval_loss: float | None
    final_eval_loss: float | None


class JobError(Response):
    error_class: str = Field(serialization_alias="class", validation_alias="class")
    message: str
    exit_code: int | None
    signal: int | None
    log_tail: list[str]
    suggestions: list[str]


class JobResponse(Response):
    id: str
    name: str
    state: JobState
    model_id: str
    revision: str | None
    loaded_model_id: str | None
    algorithm: Algorithm
    config: PeftConfig
    dataset_id: str
    validation_dataset_id: str | None
    validation_fraction: float
    priority: int
    progress: JobProgress
    metrics: JobMetrics
    attempts: int
    adapter_id: str | None
    error: JobError | None
    created_at: str
    started_at: str | None
    finished_at: str | None


class JobList(Response):
    jobs: list[JobResponse]


class JobEvent(Response):
    sequence: int
    kind: str
    data: dict[str, Any]
    created_at: str


class JobEvents(Response):
    events: list[JobEvent]


class MetricsRow(Response):
    step: int
    total_steps: int
    epoch: float
    loss: float
    eval_loss: float | None
    learning_rate: float
    grad_norm: float
    tokens: int
    tokens_per_s: float
    memory_bytes: int
    elapsed_s: float


class JobMetricsList(Response):
    metrics: list[MetricsRow]
    initial_eval_loss: float | None


class JobLog(Response):
    lines: list[str]


def job_view(record: JobRecord) -> JobResponse:
    """Show a job."""
    progress, result = record.progress, record.result
    names = (
        "id",
        "name",
        "state",
        "model_id",
        "revision",
        "loaded_model_id",
        "dataset_id",
        "validation_dataset_id",
    )
    rest = ("validation_fraction", "priority", "attempts", "adapter_id", "created_at", "started_at", "finished_at")
    return JobResponse(
        **{name: getattr(record, name) for name in (*names, *rest)},
        algorithm=Algorithm(record.algorithm),
        config=PeftConfig.model_validate(record.config),
        progress=JobProgress(
            step=progress.get("step", 0),
            total_steps=progress.get("total_steps"),
            epoch=progress.get("epoch"),
            fraction=progress.get("fraction", 0.0),
            eta_s=progress.get("eta_s"),
            tokens_per_s=progress.get("tokens_per_s"),
        ),
        metrics=JobMetrics(
            last=progress.get("last"),
            initial_eval_loss=result.get("initial_eval_loss"),
            final_eval_loss=result.get("final_eval_loss"),
        ),
        error=None if record.error is None else JobError.model_validate(record.error),
    )
