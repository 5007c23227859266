"""Requests and responses of /api/datasets."""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator

from api.peft_schemas import Response, Revision
from domain.datasets.formats import DatasetFormat
from domain.peft.objectives import Objective, objectives_of
from services.datasets.files import Manifest
from services.datasets.imports import Import
from services.datasets.read_settings import BadRows, ReadSettings
from services.datasets.reading.text_rows import TextRows
from store.records import DatasetRecord, to_text

Name = Annotated[str, StringConstraints(max_length=200, pattern=r"^[^\x00-\x1f\x7f]*$")]
Column = Annotated[str, StringConstraints(min_length=1, max_length=200)]


class ReadFields(BaseModel):
    """What a client may say about its files. In a form, `column_map` is JSON."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    name: Name = Field(default="", description="The file's name if left out.")
    format: Literal["auto"] | DatasetFormat = Field(default="auto", description="auto: recognised by the columns.")
    column_map: dict[Column, Column] = Field(
        default_factory=dict,
        description="The format's field → your column, or a path into one: `answers.0.text`.",
        max_length=20,
    )
    on_bad_rows: BadRows = Field(default="reject", description="Refuse files with bad rows, or skip those rows.")
    encoding: str = Field(default="auto", max_length=40, description="auto, or a name such as gb18030.")
    text_rows: Literal["auto"] | TextRows = Field(default="auto", description="What is a row of plain text.")

    @field_validator("column_map", mode="before")
    @classmethod
    def _from_json(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"column_map is not JSON: {error}") from error

    def settings(self) -> ReadSettings:
        """Return them as the service's type."""
        return ReadSettings(
            format=None if self.format == "auto" else self.format,
            column_map=self.column_map,
            on_bad_rows=self.on_bad_rows,
            encoding=None if self.encoding == "auto" else self.encoding,
            text_rows=None if self.text_rows == "auto" else self.text_rows,
        )


HubId = Annotated[
    str,
    StringConstraints(
        min_length=1, max_length=96, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?$"
    ),
]
PartName = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class HubFields(ReadFields):
    """A dataset of the Hub."""

    hub_id: HubId = Field(examples=["openai/gsm8k"])
    revision: Revision | None = None
    config: PartName | None = Field(default=None, description="The default one if left out.")
    split: PartName | None = Field(default=None, description="`train` if left out, or the only one.")


class FolderFields(ReadFields):
    """A file, or a folder of files, below `imports/` in the data directory."""

    path: str = Field(min_length=1, max_length=1000, description="Below `imports/` in the data directory.")
    config: PartName | None = None
    split: PartName | None = None


class DatasetResponse(Response):
    id: str
    name: str
    format: DatasetFormat
    trainable: bool = Field(description="Whether a fine-tune can learn from it.")
    objectives: list[Objective] = Field(description="What a fine-tune can learn from it; the usual one first.")
    rows: int = Field(description="Usable rows.")
    rejected_rows: int = Field(description="Rows left out; `warnings` names their lines.")
    duplicate_rows: int | None = Field(description="Rows that repeat an earlier one; they are kept.")
    bytes: int = Field(description="Size of the files as they came.")
    sha256: str = Field(description="Of the file as it came; of several, of the lines of their sums.")
    columns: list[str]
    unused_columns: list[str] = Field(description="Columns that were not read.")
    detected: list[str] = Field(description="What the files turned out to be, and by what.")
    source: dict[str, Any] = Field(description="Where it came from.")
    warnings: list[str]
    created_at: str


class DatasetList(Response):
    datasets: list[DatasetResponse]


class Turn(Response):
    role: str
    content: str
    reasoning_content: str | None
    tool_calls: list[dict[str, Any]] | None
    tool_call_id: str | None
    name: str | None
    weight: int | None = Field(description="0: not learned.")


class PreviewRow(Response):
    messages: list[Turn] | None = Field(description="Of a conversation.")
    text: str | None = Field(description="Of plain text.")
    prompt: list[Turn] | None = Field(description="Of a preference or a judged answer.")
    chosen: list[Turn] | None
    rejected: list[Turn] | None
    completion: list[Turn] | None
    label: bool | None
    tools: list[dict[str, Any]] | None


class DatasetPreview(Response):
    offset: int
    rows: list[PreviewRow]


class ImportResponse(Response):
    id: str
    name: str
    stage: Literal["receiving", "downloading", "reading"]
    received_bytes: int
    total_bytes: int | None
    fraction: float | None = Field(description="Of the bytes received, 0..1.")
    rows: int = Field(description="Read so far.")
    started_at: str


class ImportList(Response):
    imports: list[ImportResponse]


def dataset_view(record: DatasetRecord, manifest: Manifest) -> DatasetResponse:
    """Show a dataset."""
    return DatasetResponse.model_validate(
        record.__dict__
        | {
            "trainable": bool(objectives_of(record.format)),
            "objectives": objectives_of(record.format),
            "duplicate_rows": manifest.duplicates,
            "unused_columns": list(manifest.unused_columns),
            "detected": list(manifest.detected),
            "source": dict(manifest.source),
        }
    )


def preview_row(row: dict[str, Any]) -> PreviewRow:
    """Show a normal row."""
    turns = {
        name: [Turn.model_validate({**dict.fromkeys(Turn.model_fields), **turn}) for turn in row[name]]
        for name in ("messages", "prompt", "chosen", "rejected", "completion")
        if name in row
    }
    return PreviewRow.model_validate({**dict.fromkeys(PreviewRow.model_fields), **row, **turns})


def import_view(item: Import) -> ImportResponse:
    """Show an import."""
    fraction = min(1.0, item.received_bytes / item.total_bytes) if item.total_bytes else None
    return ImportResponse.model_validate(item.__dict__ | {"fraction": fraction, "started_at": to_text(item.started_at)})
