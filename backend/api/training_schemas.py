"""Requests and responses of /api/training."""

from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from api.dataset_schemas import PreviewRow
from api.job_error import JobError, error_view
from api.peft_schemas import ModelId, Overrides, Request, Response, Revision
from domain.jobs.states import JobState
from domain.peft.algorithms import Algorithm, AlgorithmName
from domain.peft.config import PeftConfig, PeftOverrides, recorded
from domain.peft.use_cases import UseCaseId
from services.training.checkpoint_store import CheckpointFacts
from services.training.queue import QueuePlace
from store.records import JobRecord, to_text

Id = Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_-]+$")]

# Shown on terminals and kept in databases: no control characters.
Text = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]+$")]
ResumeFrom = Annotated[
    str, StringConstraints(min_length=1, max_length=100, pattern=r"^[A-Za-z0-9_-]{1,64}(/step-[0-9]{8})?$")
]


class CreateJobRequest(Request):
    model_id: ModelId | None = None
    loaded_model_id: Id | None = Field(default=None, description="Train on this loaded base; nothing is loaded again.")
    revision: Revision | None = None
    dataset_id: Id
    validation_dataset_id: Id | None = None
    validation_fraction: float = Field(default=0, ge=0, le=0.9, description="Hold out this part of the rows, 0..0.9.")
    use_case: Annotated[UseCaseId, Field(strict=False)] | None = None
    algorithm: AlgorithmName = Algorithm.LORA
    overrides: Overrides = Field(default_factory=PeftOverrides)
    name: Text | None = None
    priority: int = Field(default=0, ge=-100, le=100, description="Higher runs first.")
    resume_from: ResumeFrom | None = Field(
        default=None,
        description="Begin with a checkpoint of another job: `job_…` for its newest, or `job_…/step-…`. The same "
        "model, data and settings, except how long to train and when to evaluate, stop and write checkpoints.",
    )
    initial_adapter_id: Id | None = Field(
        default=None,
        description="Continue this adapter: begin with its weights, on its base. Its rank, scaling, layers and method "
        "are kept; a setting that contradicts them is refused. DPO and KTO compare with it as it is now. Without a "
        "model_id and an algorithm, those of the adapter are taken.",
    )
    idempotency_key: Text | None = None
    gpus: int = Field(
        default=1,
        ge=1,
        le=64,
        description="Train on this many GPUs of this machine at once: the passes of each step are dealt to them, and "
        "the effective batch stays. The job waits until so many are free. At most gradient_accumulation.",
    )
    force: bool = Field(default=False, description="Queue it even if it is estimated not to fit in memory.")


class CancelRequest(Request):
    keep: Literal["nothing", "checkpoints", "adapter"] = Field(
        default="nothing",
        description="What to keep of a running job's work: nothing, its checkpoints with a new one, or the adapter "
        "as it is now.",
    )


class JobEngine(Response):
    name: Literal["transformers", "unsloth"]
    reason: str = Field(description="Why this engine: what Unsloth lacks here, or that it was asked for.")
    computation: str | None = Field(description="Which layers the adapter trains through; null until it trains.")


class JobQueue(Response):
    position: int = Field(description="1 runs next.")
    estimated_start_at: str | None = Field(description="For the first in the queue, from the run before it.")


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
    best_eval_loss: float | None
    adapter_step: int | None = Field(description="The step whose weights were handed out.")


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
    gpus: int = Field(description="How many GPUs it takes at once.")
    priority: int
    progress: JobProgress
    metrics: JobMetrics
    attempts: int = Field(description="How often it was started.")
    resumed_from: str | None = Field(description="The checkpoint of another job that it began with.")
    initial_adapter_id: str | None = Field(description="The adapter that it continues.")
    engine: JobEngine | None = Field(description="What trains or trained it; null before it has a base.")
    queue: JobQueue | None = Field(description="Its place while it is queued.")
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


class PreferenceMetrics(Response):
    margin: float = Field(description="How far the better answers are ahead of the worse ones, in rewards.")
    accuracy: float = Field(description="The share of examples in which they are, 0..1.")
    answer_loss: float | None = Field(default=None, description="ORPO: the better answers' cross-entropy.")
    moved: float | None = Field(default=None, description="KTO: how far the model has moved from the base in general.")


class MetricsRow(Response):
    step: int
    total_steps: int
    epoch: float
    loss: float
    eval_loss: float | None
    learning_rate: float
    grad_norm: float | None
    token_accuracy: float | None = Field(
        default=None, description="The share of the step's trained tokens that the model found likeliest, 0..1."
    )
    preference: PreferenceMetrics | None = Field(default=None, description="Where preferences are learned.")
    tokens: int
    tokens_per_s: float
    memory_bytes: int
    elapsed_s: float


class JobMetricsList(Response):
    metrics: list[MetricsRow]
    initial_eval_loss: float | None


class CheckpointResponse(Response):
    id: str
    step: int
    size_bytes: int
    created_at: str
    problem: str | None = Field(description="Why it cannot be used; null if it can.")


class CheckpointList(Response):
    checkpoints: list[CheckpointResponse]


class JobLog(Response):
    lines: list[str]


class ValidationRow(PreviewRow):
    row: int = Field(description="Its position in the dataset, from 0.")


class ValidationRows(Response):
    dataset_id: str = Field(description="The dataset that the rows are of.")
    total: int = Field(description="Rows that the job is evaluated on.")
    offset: int
    rows: list[ValidationRow]


def job_view(record: JobRecord, place: QueuePlace | None) -> JobResponse:
    """Show a job, and its place in the queue. A field that the record has under the same name is shown as it is."""
    result, engine = record.result, record.progress.engine
    last = record.progress.last
    shown = {
        **{name: getattr(record, name) for name in JobResponse.model_fields if hasattr(record, name)},
        "config": recorded(record.config),
        "metrics": JobMetrics(
            last=last.as_json() if last is not None else None,
            initial_eval_loss=result.initial_eval_loss if result is not None else None,
            final_eval_loss=result.final_eval_loss if result is not None else None,
            best_eval_loss=result.best_eval_loss if result is not None else None,
            adapter_step=result.adapter_step if result is not None else None,
        ),
        "engine": engine,
        "queue": place and _queue_view(place),
        "error": error_view(record.error),
    }
    return JobResponse.model_validate(shown)


def _queue_view(place: QueuePlace) -> JobQueue:
    start = place.estimated_start_at
    return JobQueue(position=place.position, estimated_start_at=to_text(start) if start is not None else None)


def checkpoint_view(facts: CheckpointFacts) -> CheckpointResponse:
    """Show a checkpoint."""
    return CheckpointResponse(
        id=facts.id,
        step=facts.step,
        size_bytes=facts.size_bytes,
        created_at=to_text(datetime.fromtimestamp(facts.created_s, UTC)),
        problem=facts.problem,
    )
