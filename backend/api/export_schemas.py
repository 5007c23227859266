"""Requests and responses of exports."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from api.job_error import JobError, error_view
from api.peft_schemas import ModelId, Request, Response
from domain.exports import ExportSettings, GgufSettings, MergedSettings
from domain.jobs.export_states import ExportKind, ExportState
from domain.models.gguf import GgufType
from services.exports.control import ExportProgress
from store.records import ExportRecord


class CreateExportRequest(Request):
    format: Literal["merged", "gguf"] = Field(
        description="merged: a normal model with the adapter in its weights; gguf: the same as one file for llama.cpp."
    )
    quantization: GgufType | None = Field(
        default=None, description="Of gguf alone, f16 if left out. A merged model has the type of the base's files."
    )

    @model_validator(mode="after")
    def _of_gguf_alone(self) -> Self:
        if self.format == "merged" and self.quantization is not None:
            raise ValueError("a merged model is written in the type of the base's own files: leave quantization out")
        return self

    def settings(self) -> ExportSettings:
        """Return what is kept with the export."""
        return GgufSettings(quantization=self.quantization or "f16") if self.format == "gguf" else MergedSettings()


class PushRequest(Request):
    repo_id: ModelId = Field(description="`owner/name` on the Hub; made if it is not there.")
    private: bool = Field(default=True, description="Whether others may see it. One that is there must be so already.")


class ExportProgressInfo(Response):
    stage: str
    fraction: float | None = Field(description="Of the stage, 0..1.")
    eta_s: float | None = Field(description="Until the end of the stage.")


class ExportFile(Response):
    name: str
    size_bytes: int


class ExportChange(Response):
    state: ExportState
    at: str


class ExportResponse(Response):
    id: str
    adapter_id: str
    kind: ExportKind = Field(description="The format, or push.")
    settings: dict[str, Any] = Field(description="As asked for.")
    state: ExportState
    progress: ExportProgressInfo | None = Field(description="While it runs.")
    attempts: int
    history: list[ExportChange]
    result: dict[str, Any] | None = Field(
        description="What was made and how: its type, its size, notes, and in `check` how it was compared."
    )
    files: list[ExportFile]
    path: str | None = Field(description="Its folder on the server's machine, once it is whole.")
    error: JobError | None
    created_at: str
    started_at: str | None
    finished_at: str | None


class ExportList(Response):
    exports: list[ExportResponse]


def export_view(
    record: ExportRecord, progress: ExportProgress | None, files: list[tuple[str, int]], path: str | None
) -> ExportResponse:
    """Show an export."""
    return ExportResponse(
        id=record.id,
        adapter_id=record.adapter_id,
        kind=record.kind,
        settings=record.settings.as_json(),
        state=record.state,
        progress=ExportProgressInfo.model_validate(progress) if progress is not None else None,
        attempts=record.attempts,
        history=[ExportChange.model_validate(change) for change in record.history],
        result=record.result.as_json() if record.result is not None else None,
        files=[ExportFile(name=name, size_bytes=size) for name, size in files],
        path=path,
        error=error_view(record.error),
        created_at=record.created_at,
        started_at=record.started_at,
        finished_at=record.finished_at,
    )
