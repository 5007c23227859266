"""/api/datasets: upload, look at, delete."""

import json
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Form, Query, UploadFile
from pydantic import Field

from api.peft_schemas import Response
from core.errors import Rejected
from domain.dataset_formats import DatasetFormat
from services.dataset_service import BadRows, DatasetService, Upload, get_dataset_service

router = APIRouter(prefix="/api/datasets", tags=["datasets"])
Datasets = Annotated[DatasetService, Depends(get_dataset_service)]


class ColumnMapRejected(Rejected):
    """The column map is not a JSON object of names."""

    slug, title = "column-map-rejected", "Column map rejected"


class DatasetResponse(Response):
    id: str
    name: str
    format: DatasetFormat
    rows: int = Field(description="Usable rows.")
    rejected_rows: int = Field(description="Rows left out; `warnings` names their lines.")
    bytes: int = Field(description="Size of the uploaded file.")
    sha256: str = Field(description="Of the uploaded file.")
    columns: list[str]
    warnings: list[str]
    created_at: str


class DatasetList(Response):
    datasets: list[DatasetResponse]


class Turn(Response):
    role: str
    content: str


class PreviewRow(Response):
    messages: list[Turn]


class DatasetPreview(Response):
    offset: int
    rows: list[PreviewRow]


@router.post("", status_code=201)
def upload(
    file: UploadFile,
    datasets: Datasets,
    name: Annotated[str, Form(max_length=200)] = "",
    format: Annotated[Literal["auto"] | DatasetFormat, Form()] = "auto",
    column_map: Annotated[str, Form(max_length=4096, description="JSON: the format's field → your column.")] = "{}",
    on_bad_rows: Annotated[BadRows, Form(description="Refuse a file with bad rows, or skip them.")] = "reject",
) -> DatasetResponse:
    """Store a JSONL, JSON, CSV or TSV file of conversations, instructions or prompt and completion pairs."""
    record = datasets.add(
        Upload(
            file=file.file,
            filename=file.filename or "upload",
            name=name,
            format=None if format == "auto" else format,
            column_map=_column_map(column_map),
            on_bad_rows=on_bad_rows,
        )
    )
    return DatasetResponse.model_validate(record)


def _column_map(text: str) -> dict[str, str]:
    try:
        value: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ColumnMapRejected(f"column_map is not JSON: {error}") from error
    if not isinstance(value, dict) or not all(isinstance(column, str) for column in value.values()):
        raise ColumnMapRejected("column_map must be a JSON object of column names")
    return value


@router.get("")
def list_datasets(datasets: Datasets) -> DatasetList:
    """Every dataset, newest first."""
    return DatasetList(datasets=[DatasetResponse.model_validate(record) for record in datasets.all()])


@router.get("/{dataset_id}")
def get_dataset(dataset_id: str, datasets: Datasets) -> DatasetResponse:
    """One dataset."""
    return DatasetResponse.model_validate(datasets.get(dataset_id))


@router.get("/{dataset_id}/preview")
def preview(
    dataset_id: str,
    datasets: Datasets,
    offset: Annotated[int, Query(ge=0)] = 0,
    limit: Annotated[int, Query(ge=1, le=100)] = 10,
) -> DatasetPreview:
    """Some rows as the conversations they will be trained as."""
    rows = datasets.preview(dataset_id, offset, limit)
    return DatasetPreview.model_validate({"offset": offset, "rows": [{"messages": row} for row in rows]})


@router.delete("/{dataset_id}", status_code=204)
def delete(dataset_id: str, datasets: Datasets) -> None:
    """Delete a dataset that no job refers to."""
    datasets.delete(dataset_id)
