"""/api/datasets: import, inspect, download and delete datasets."""

from collections.abc import Iterator
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from pydantic import BaseModel, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from api import dataset_schemas as schemas
from api.dataset_analysis_schemas import AnalysisProgress, AnalysisResponse, AnalyzeRequest, analysis_view
from api.dataset_schemas import dataset_view
from api.hub_token import ASKS_THE_HUB
from api.upload_form import read_upload
from api.waiting import may_ask_the_hub, until_done
from core.errors import Rejected
from services.dataset_service import DatasetService, Form, get_dataset_service, get_dataset_sources
from services.datasets.sources import DatasetSources
from services.training.dataset_analysis import AnalysisRequest, DatasetAnalysisService, get_dataset_analysis_service
from store.records import DatasetRecord

router = APIRouter(prefix="/api/datasets", tags=["datasets"])
M = TypeVar("M", bound=BaseModel)
Datasets = Annotated[DatasetService, Depends(get_dataset_service)]
Sources = Annotated[DatasetSources, Depends(get_dataset_sources)]
Analyses = Annotated[DatasetAnalysisService, Depends(get_dataset_analysis_service)]


class UploadAbandoned(Rejected):
    """The client disconnected during the upload, so nobody reads this answer."""

    slug, title = "upload-abandoned", "Upload abandoned"


def _form_schema() -> dict[str, Any]:
    schema = schemas.ReadFields.model_json_schema()
    file = {
        "type": "string",
        "format": "binary",
        "description": "JSONL, JSON, CSV, TSV, Excel, Parquet or text; gzip, zip.",
    }
    names = {"type": "string", "description": "JSON: the format's field → your column.", "default": "{}"}
    schema["properties"] = {"file": file, **schema["properties"], "column_map": names}
    return {**schema, "required": ["file"]}


_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {"schema": _form_schema()},
            "application/json": {
                "schema": {"oneOf": [model.model_json_schema() for model in (schemas.HubFields, schemas.FolderFields)]}
            },
        },
    }
}


@router.post("", status_code=201, openapi_extra=_BODY, dependencies=ASKS_THE_HUB)
async def add(request: Request, datasets: Datasets, sources: Sources) -> schemas.DatasetResponse:
    """Store a dataset: a file sent as a form, a dataset of the Hub, or files below `imports/`.

    Conversations, instructions, prompts with answers, preferences and text are recognised. A file is read while it
    arrives. It is stored whole or not at all. `GET /api/datasets/imports` shows the progress. If a download from the
    Hub broke off or was cancelled, the next request for the dataset continues it.
    """
    if request.headers.get("content-type", "").startswith("application/json"):
        record = await may_ask_the_hub(_bring, await request.json(), sources)
    else:
        record = await _receive(request, datasets)
    return dataset_view(record, datasets.manifest(record.id))


def _bring(body: Any, sources: DatasetSources) -> DatasetRecord:
    if isinstance(body, dict) and "path" in body:
        told = _checked(schemas.FolderFields, body)
        return sources.from_folder(told.path, told.config, told.split, told.name, told.settings())
    fields = _checked(schemas.HubFields, body)
    return sources.from_hub(fields.hub_id, fields.revision, fields.config, fields.split, fields.name, fields.settings())


async def _receive(request: Request, datasets: DatasetService) -> DatasetRecord:
    length = request.headers.get("content-length")
    with datasets.imports.running("upload", "receiving", int(length) if length else None) as progress:
        draft = await run_in_threadpool(datasets.draft, progress)
        try:
            fields = _checked(schemas.ReadFields, await read_upload(request, draft.receive))
        except ClientDisconnect as error:
            await run_in_threadpool(datasets.discard, draft)
            raise UploadAbandoned("The client went away.") from error
        except BaseException:
            await run_in_threadpool(datasets.discard, draft)
            raise
        progress.name = fields.name or draft.files[0].name
        source = {"kind": "upload", "filename": draft.files[0].name}
        return await run_in_threadpool(datasets.finish, draft, progress.name, fields.settings(), source)


def _checked(model: type[M], values: Any) -> M:
    try:
        return model.model_validate(values)
    except ValidationError as error:
        errors = error.errors(include_input=False, include_url=False, include_context=False)
        raise RequestValidationError([{**item, "loc": ("body", *item["loc"])} for item in errors]) from error


@router.get("")
def list_datasets(datasets: Datasets) -> schemas.DatasetList:
    """Every dataset, newest first."""
    records = datasets.all()
    return schemas.DatasetList(datasets=[dataset_view(record, datasets.manifest(record.id)) for record in records])


@router.get("/imports")
def imports(datasets: Datasets) -> schemas.ImportList:
    """Uploads and downloads under way, with their progress."""
    return schemas.ImportList(imports=[schemas.import_view(item) for item in datasets.imports.all()])


@router.post("/imports/{import_id}/cancel", status_code=202)
def cancel_import(import_id: str, datasets: Datasets) -> schemas.ImportResponse:
    """End an import at once. Only what was downloaded is kept: the next import continues with it."""
    return schemas.import_view(datasets.imports.cancel(import_id))


@router.get("/{dataset_id}")
def get_dataset(dataset_id: str, datasets: Datasets) -> schemas.DatasetResponse:
    """One dataset."""
    return dataset_view(datasets.get(dataset_id), datasets.manifest(dataset_id))


@router.get("/{dataset_id}/preview")
def preview(
    dataset_id: str,
    datasets: Datasets,
    offset: Annotated[int, Query(ge=0)] = 0,
    limit: Annotated[int, Query(ge=1, le=100)] = 10,
) -> schemas.DatasetPreview:
    """Some rows as they will be trained on."""
    rows = datasets.preview(dataset_id, offset, limit)
    return schemas.DatasetPreview(offset=offset, rows=[schemas.preview_row(row) for row in rows])


@router.post(
    "/{dataset_id}/analyze",
    response_model=AnalysisResponse,
    responses={202: {"model": AnalysisProgress, "description": "Not ready yet: ask again."}},
    dependencies=ASKS_THE_HUB,
)
async def analyze(dataset_id: str, body: AnalyzeRequest, datasets: Datasets, analyses: Analyses) -> object:
    """What a fine-tune of a model would learn: lengths, what is cut, what carries loss, steps, and an example.

    Every row is tokenized as in training. No weights are loaded. The answer is cached.
    """
    names = ("model_id", "revision", "algorithm", "use_case", "example_row")
    request = AnalysisRequest(
        dataset_id=dataset_id, overrides=body.settings(), **{name: getattr(body, name) for name in names}
    )
    running = await may_ask_the_hub(analyses.begin, request)
    await until_done(running.future, body.wait_s)
    if not running.future.done():
        return JSONResponse(AnalysisProgress(state="running", fraction=running.fraction).model_dump(), 202)
    analysis = await run_in_threadpool(analyses.finish, running)
    return analysis_view(analysis, datasets.manifest(dataset_id).duplicates)


@router.get("/{dataset_id}/download", response_class=FileResponse, response_model=None)
def download(
    dataset_id: str, datasets: Datasets, form: Annotated[Form, Query()] = "original"
) -> FileResponse | StreamingResponse:
    """The uploaded file (several as a zip), or the normal rows as JSONL, which can be uploaded again."""
    answer = datasets.download(dataset_id, form)
    if isinstance(answer.content, Iterator):
        headers = {"Content-Disposition": f'attachment; filename="{answer.filename}"'}
        return StreamingResponse(answer.content, media_type="application/zip", headers=headers)
    # Never a type that a browser would show, because the content is not trusted.
    kind = "application/jsonl" if form == "normalised" else "application/octet-stream"
    return FileResponse(answer.content, media_type=kind, filename=answer.filename)


@router.delete("/{dataset_id}", status_code=204)
def delete(dataset_id: str, datasets: Datasets) -> None:
    """Delete a dataset that no job refers to."""
    datasets.delete(dataset_id)
