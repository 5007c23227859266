"""/api/adapters: what training made."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends
from fastapi import Response as HttpResponse
from fastapi.responses import StreamingResponse
from pydantic import Field

from api.export_schemas import CreateExportRequest, ExportResponse
from api.exports import Exports, show
from api.peft_schemas import Response
from domain.algorithms import Algorithm
from domain.export_states import ExportKind
from domain.peft_config import PeftConfig
from services.adapter_service import AdapterService, get_adapter_service
from store.records import AdapterRecord

router = APIRouter(prefix="/api/adapters", tags=["adapters"])
Adapters = Annotated[AdapterService, Depends(get_adapter_service)]


class AdapterSummary(Response):
    id: str
    name: str
    base_model_id: str
    base_revision: str | None
    algorithm: Algorithm
    version: int = Field(description="Counts the adapters of the same name, from 1.")
    source: dict[str, Any] = Field(description="Where it is from; `kind` is training, folder, hub or upload.")
    job_id: str | None = Field(description="The job that trained it here.")
    dataset_sha256: str | None
    created_at: str


class AdapterFile(Response):
    name: str
    size_bytes: int


class AdapterDetails(AdapterSummary):
    config: PeftConfig | None = Field(description="The complete configuration it was trained with, where it is known.")
    metrics: dict[str, Any]
    path: str = Field(description="Its folder on the server's machine, as PEFT loads it.")
    files: list[AdapterFile]


class AdapterList(Response):
    adapters: list[AdapterSummary]


def _details(record: AdapterRecord, files: list[tuple[str, int]]) -> AdapterDetails:
    return AdapterDetails.model_validate(
        record.__dict__ | {"files": [{"name": name, "size_bytes": size} for name, size in files]}
    )


@router.get("")
def list_adapters(adapters: Adapters) -> AdapterList:
    """Every adapter, newest first."""
    return AdapterList(adapters=[AdapterSummary.model_validate(record.__dict__) for record in adapters.all()])


@router.get("/{adapter_id}")
def get_adapter(adapter_id: str, adapters: Adapters) -> AdapterDetails:
    """One adapter: its base, configuration, figures and files."""
    return _details(adapters.get(adapter_id), adapters.files(adapter_id))


@router.get("/{adapter_id}/download", response_class=StreamingResponse)
def download(adapter_id: str, adapters: Adapters) -> StreamingResponse:
    """A zip that PEFT loads as it is: weights, adapter_config.json, tokenizer with its template, model card."""
    headers = {"Content-Disposition": f'attachment; filename="{adapters.get(adapter_id).id}.zip"'}
    return StreamingResponse(adapters.zipped(adapter_id), media_type="application/zip", headers=headers)


@router.post("/{adapter_id}/export", status_code=202)
def export(adapter_id: str, body: CreateExportRequest, response: HttpResponse, exports: Exports) -> ExportResponse:
    """Make a normal model of the adapter and its base; `GET /api/exports/{id}` says how far it is."""
    record = exports.create(adapter_id, ExportKind(body.format), {})
    response.headers["Location"] = f"/api/exports/{record.id}"
    return show(exports, record)


@router.delete("/{adapter_id}", status_code=204)
def delete(adapter_id: str, adapters: Adapters) -> None:
    """Delete an adapter and its files."""
    adapters.delete(adapter_id)
