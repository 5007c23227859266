"""/api/adapters: what training made, and what was brought in."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request
from fastapi import Response as HttpResponse
from fastapi.responses import StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from api.adapter_schemas import AdapterDetails, AdapterList, ImportFields, ImportRequest, details_view, summary_view
from api.export_schemas import CreateExportRequest, ExportResponse, PushRequest
from api.exports import Exports, show
from api.hub_token import ASKS_THE_HUB, came_with_a_token
from api.upload_form import UploadMalformed, read_upload, validated
from api.waiting import may_ask_the_hub
from domain.exports import PushSettings
from domain.jobs.export_states import ExportKind
from services.adapter_service import AdapterService, get_adapter_service
from services.adapters.intake import AdapterIntake, get_adapter_intake
from services.served_model_service import ServedModelService, get_served_model_service
from store.records import AdapterRecord

router = APIRouter(prefix="/api/adapters", tags=["adapters"])
Adapters = Annotated[AdapterService, Depends(get_adapter_service)]
Models = Annotated[ServedModelService, Depends(get_served_model_service)]
Intake = Annotated[AdapterIntake, Depends(get_adapter_intake)]


def _body() -> dict[str, Any]:
    upload = ImportFields.model_json_schema()
    file = {"type": "string", "format": "binary", "description": "A zip as `download` gives it."}
    upload["properties"] = {"file": file, **upload["properties"]}
    schemas = {
        "application/json": {"schema": ImportRequest.model_json_schema()},
        "multipart/form-data": {"schema": {**upload, "required": ["file"]}},
    }
    return {"requestBody": {"required": True, "content": schemas}}


@router.post("", status_code=201, openapi_extra=_body(), dependencies=ASKS_THE_HUB)
async def add(request: Request, intake: Intake, adapters: Adapters, models: Models) -> AdapterDetails:
    """Bring an adapter in: a folder on this machine, a repository of the Hub, or a zip.

    It is checked as a copy before anything loads it: safetensors only, no code, LoRA and its kin.
    """
    if request.headers.get("content-type", "").startswith("multipart/"):
        record = await _receive(request, intake)
    else:
        record = await may_ask_the_hub(_bring, await request.body(), intake)
    return await run_in_threadpool(_details, adapters, models, record)


def _bring(body: bytes, intake: AdapterIntake) -> AdapterRecord:
    wanted = validated(ImportRequest, body)
    if wanted.hub_id is not None:
        return intake.from_hub(wanted.hub_id, wanted.revision, wanted.settings())
    return intake.from_folder(str(wanted.path), wanted.settings())


async def _receive(request: Request, intake: AdapterIntake) -> AdapterRecord:
    with intake.receiving() as place:
        try:
            fields = validated(ImportFields, await read_upload(request, place.receive))
        except ClientDisconnect as error:
            raise UploadMalformed("The client went away.") from error
        return await run_in_threadpool(intake.from_zip, place, fields.settings())


@router.get("")
def list_adapters(adapters: Adapters) -> AdapterList:
    """Every adapter, newest first."""
    return AdapterList(adapters=[summary_view(record) for record in adapters.all()])


@router.get("/{adapter_id}")
def get_adapter(adapter_id: str, adapters: Adapters, models: Models) -> AdapterDetails:
    """One adapter: its base, configuration, figures and files, and the command that serves it with vLLM."""
    return _details(adapters, models, adapters.get(adapter_id))


@router.get("/{adapter_id}/download", response_class=StreamingResponse)
def download(adapter_id: str, adapters: Adapters) -> StreamingResponse:
    """A zip that PEFT loads as it is: weights, adapter_config.json, tokenizer with its template, model card."""
    headers = {"Content-Disposition": f'attachment; filename="{adapters.get(adapter_id).id}.zip"'}
    return StreamingResponse(adapters.zipped(adapter_id), media_type="application/zip", headers=headers)


@router.post("/{adapter_id}/export", status_code=202, dependencies=ASKS_THE_HUB)
def export(adapter_id: str, body: CreateExportRequest, response: HttpResponse, exports: Exports) -> ExportResponse:
    """Make one model of the adapter and its base; `GET /api/exports/{id}` says how far it is."""
    record = exports.create(adapter_id, ExportKind(body.format), body.settings())
    response.headers["Location"] = f"/api/exports/{record.id}"
    return show(exports, record)


@router.post("/{adapter_id}/push", status_code=202, dependencies=ASKS_THE_HUB)
def push(adapter_id: str, body: PushRequest, response: HttpResponse, exports: Exports) -> ExportResponse:
    """Upload the adapter to a repository of the Hub, as one commit; `GET /api/exports/{id}` says how far it is."""
    whose: Literal["request", "server"] = "request" if came_with_a_token() else "server"
    settings = PushSettings(repo_id=body.repo_id, private=body.private, token=whose)
    record = exports.create(adapter_id, ExportKind.PUSH, settings)
    response.headers["Location"] = f"/api/exports/{record.id}"
    return show(exports, record)


@router.delete("/{adapter_id}", status_code=204)
def delete(adapter_id: str, adapters: Adapters) -> None:
    """Delete an adapter and its files. What was made of it stays."""
    adapters.delete(adapter_id)


def _details(adapters: AdapterService, models: ServedModelService, record: AdapterRecord) -> AdapterDetails:
    return details_view(record, adapters.files(record.id), adapters.card(record.id), models.vllm(record))
