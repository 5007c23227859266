"""Requests and responses of /v1's files, uploads, fine-tunes and models, in OpenAI's form."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from api.peft_schemas import Revision
from api.training_schemas import Id, ResumeFrom, Text
from domain.openai.fine_tunes import as_seconds
from domain.peft.algorithms import AlgorithmName
from domain.peft.config import PeftOverrides
from domain.peft.use_cases import UseCaseId
from store.records import FileRecord

_HOUR_S = 3600
_MOST_S = 30 * 24 * _HOUR_S  # OpenAI's own bounds of expires_after
ModelName = Annotated[str, StringConstraints(min_length=1, max_length=300, pattern=r"^[^\x00-\x1f\x7f]+$")]
FileId = Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_-]+$")]


class Request(BaseModel):
    """Base of request bodies: unknown fields are refused, and `"12"` or `true` for a number."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Answer(BaseModel):
    """Base of answers."""

    model_config = ConfigDict(frozen=True)


class ErrorBody(Answer):
    message: str
    type: str
    param: str | None = Field(description="The field that it is about.")
    code: str | None = Field(description="The kind of error: the last part of its type under /api.")


class ErrorAnswer(Answer):
    error: ErrorBody


# Files


class ExpiresAfter(Request):
    anchor: Literal["created_at"]
    seconds: int = Field(ge=_HOUR_S, le=_MOST_S)


class FileForm(Request):
    """The fields of a form beside the file, by the names that a form gives them. All of them are texts there."""

    model_config = ConfigDict(strict=False)

    purpose: str
    anchor: Literal["created_at"] | None = Field(default=None, alias="expires_after[anchor]")
    seconds: int | None = Field(default=None, ge=_HOUR_S, le=_MOST_S, alias="expires_after[seconds]")


class FileAnswer(Answer):
    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: Literal["uploaded", "processed", "error"]
    expires_at: int | None
    status_details: str | None = Field(description="Why its rows cannot be used, line by line.")


class FileList(Answer):
    object: Literal["list"]
    data: list[FileAnswer]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Deleted(Answer):
    id: str
    object: Literal["file", "model"]
    deleted: bool


def file_view(record: FileRecord) -> FileAnswer:
    """Show a file."""
    expires = as_seconds(record.expires_at) if record.expires_at is not None else None
    names = ("id", "bytes", "filename", "purpose", "status", "status_details")
    values = {name: getattr(record, name) for name in names}
    return FileAnswer(object="file", created_at=as_seconds(record.created_at), expires_at=expires, **values)


# Uploads


class CreateUpload(Request):
    bytes: int = Field(ge=1)
    filename: Text
    mime_type: str = Field(min_length=1, max_length=200, description="Not used: the content tells what it is.")
    purpose: str
    expires_after: ExpiresAfter | None = None


class CompleteUpload(Request):
    part_ids: list[str] = Field(min_length=1, max_length=100_000)
    md5: str | None = None


class UploadAnswer(Answer):
    id: str
    object: Literal["upload"]
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str
    status: Literal["pending", "completed", "cancelled", "expired"]
    file: FileAnswer | None


class PartAnswer(Answer):
    id: str
    object: Literal["upload.part"]
    created_at: int
    upload_id: str


# Fine-tunes

Whole = Annotated[int, Field(strict=True)]
Auto = Literal["auto"]


class HyperparametersRequest(Request):
    n_epochs: Auto | Annotated[Whole, Field(ge=1, le=1000)] = "auto"
    batch_size: Auto | Annotated[Whole, Field(ge=1, le=1024)] = "auto"
    learning_rate_multiplier: Auto | Annotated[float, Field(gt=0, le=1000)] = "auto"


class DpoHyperparameters(HyperparametersRequest):
    beta: Auto | Annotated[float, Field(gt=0)] = "auto"


class Supervised(Request):
    hyperparameters: HyperparametersRequest = Field(default_factory=HyperparametersRequest)


class Dpo(Request):
    hyperparameters: DpoHyperparameters = Field(default_factory=DpoHyperparameters)


class MethodRequest(Request):
    type: Literal["supervised", "dpo", "reinforcement"]
    supervised: Supervised | None = None
    dpo: Dpo | None = None
    reinforcement: dict[str, Any] | None = None


class PeftOptions(PeftOverrides):
    """This service's own options: those of a job under /api, and every setting of the configuration beside them."""

    algorithm: AlgorithmName | None = None
    use_case: Annotated[UseCaseId, Field(strict=False)] | None = None
    revision: Revision | None = None
    loaded_model_id: Id | None = None
    validation_fraction: float = Field(default=0, ge=0, le=0.9)
    name: Text | None = None
    priority: int = Field(default=0, ge=-100, le=100)
    resume_from: ResumeFrom | None = None
    initial_adapter_id: Id | None = None
    gpus: int = Field(default=1, ge=1, le=64)
    force: bool = False


MetadataKey = Annotated[str, StringConstraints(min_length=1, max_length=64)]
MetadataValue = Annotated[str, StringConstraints(max_length=512)]


class CreateJob(Request):
    model: ModelName = Field(description="A base: an id of this machine or the Hub, or a name that stands for one.")
    training_file: FileId
    validation_file: FileId | None = None
    hyperparameters: HyperparametersRequest | None = Field(default=None, description="The older place; see `method`.")
    method: MethodRequest | None = None
    suffix: Annotated[str, StringConstraints(min_length=1, max_length=64, pattern=r"^[^\x00-\x1f\x7f]+$")] | None = None
    seed: Annotated[Whole, Field(ge=0, le=2**31 - 1)] | None = None
    metadata: Annotated[dict[MetadataKey, MetadataValue], Field(max_length=16)] | None = None
    integrations: list[dict[str, Any]] | None = None
    peft: PeftOptions | None = Field(default=None, description="This service's own options.")


class JobErrorAnswer(Answer):
    code: str
    message: str
    param: str | None


class JobAnswer(Answer):
    id: str
    object: Literal["fine_tuning.job"]
    created_at: int
    error: JobErrorAnswer | None
    fine_tuned_model: str | None
    finished_at: int | None
    hyperparameters: dict[str, Any]
    model: str
    organization_id: str
    result_files: list[str]
    seed: int
    status: Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]
    trained_tokens: int | None
    training_file: str
    validation_file: str | None
    estimated_finish: int | None
    integrations: list[dict[str, Any]]
    metadata: dict[str, str] | None
    method: dict[str, Any]


class JobList(Answer):
    object: Literal["list"]
    data: list[JobAnswer]
    has_more: bool


class EventAnswer(Answer):
    id: str
    object: Literal["fine_tuning.job.event"]
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any]


class EventList(Answer):
    object: Literal["list"]
    data: list[EventAnswer]
    has_more: bool


class CheckpointAnswer(Answer):
    id: str
    object: Literal["fine_tuning.job.checkpoint"]
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    metrics: dict[str, float | None]
    step_number: int


class CheckpointList(Answer):
    object: Literal["list"]
    data: list[CheckpointAnswer]
    first_id: str | None
    last_id: str | None
    has_more: bool


# Models


class ModelAnswer(Answer):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(Answer):
    object: Literal["list"]
    data: list[ModelAnswer]
