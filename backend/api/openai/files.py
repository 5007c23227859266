"""/v1/files: files for fine-tunes, which are datasets, and what jobs came to."""

from pathlib import Path
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import FileResponse, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from api.datasets import UploadAbandoned
from api.openai import schemas
from api.openai.paging import After, page_of
from api.openai.schemas import file_view
from api.upload_form import read_upload, validated
from api.waiting import until_done
from core.errors import Rejected
from domain.openai.files import NOT_HERE, Purpose
from services.file_service import FileService, get_file_service
from services.files.kept import IncomingFile
from services.fine_tuning_service import FineTuningService, get_fine_tuning_service

router = APIRouter(tags=["openai"])
Files = Annotated[FileService, Depends(get_file_service)]
FineTuning = Annotated[FineTuningService, Depends(get_fine_tuning_service)]
_READ_S = 5.0  # most files are read by then, and the answer says so
_PURPOSES = frozenset(Purpose.__args__)  # type: ignore[attr-defined]
_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"enum": sorted(_PURPOSES)},
                        "expires_after[anchor]": {"enum": ["created_at"]},
                        "expires_after[seconds]": {"type": "integer"},
                    },
                }
            }
        },
    }
}


class PurposeNotHere(Rejected):
    """Files of this purpose are of no use here."""

    slug, title = "purpose-not-here", "Purpose not here"


def check_purpose(purpose: str) -> str:
    """Return a purpose that files may have here.

    Raises:
        PurposeNotHere: It is none.
    """
    if purpose in _PURPOSES:
        return purpose
    why = NOT_HERE.get(purpose, "that is none of OpenAI's purposes that files are sent for")
    message = f"purpose={purpose!r:.60}: {why}. There are {', '.join(sorted(_PURPOSES))}."
    raise PurposeNotHere(message, errors=[{"location": ["purpose"], "message": message}])


@router.post("/files", openapi_extra=_FORM)
async def create(request: Request, files: Files) -> schemas.FileAnswer:
    """Store a file. One for fine-tunes is read into a dataset; `status` says whether its rows can be used."""
    incoming: list[tuple[str, IncomingFile]] = []

    def receive(name: str) -> IncomingFile:
        incoming.append(files.incoming(name))
        return incoming[0][1]

    try:
        form = validated(schemas.FileForm, await read_upload(request, receive))
        purpose = check_purpose(form.purpose)
    except ClientDisconnect as error:
        _abandon(incoming)
        raise UploadAbandoned("The client went away.") from error
    except BaseException:
        _abandon(incoming)
        raise
    record = await run_in_threadpool(files.add, *incoming[0], purpose, form.seconds)
    reading = files.reading(record.id)
    if reading is not None:
        await until_done(reading, _READ_S)
    return file_view(await run_in_threadpool(files.get, record.id))


def _abandon(incoming: list[tuple[str, IncomingFile]]) -> None:
    for _, file in incoming:
        file.abandon()


@router.get("/files")
def list_files(
    fine_tuning: FineTuning,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
    purpose: Annotated[str | None, Query(max_length=60)] = None,
) -> schemas.FileList:
    """Files by their time, those of one purpose if it is named. Every dataset is a file, and every result."""
    records = [record for record in fine_tuning.files() if purpose in (None, record.purpose)]
    found = page_of(records if order == "desc" else records[::-1], lambda record: record.id, after, limit)
    data = [file_view(record) for record in found.data]
    first, last = (data[0].id, data[-1].id) if data else (None, None)
    return schemas.FileList(object="list", data=data, first_id=first, last_id=last, has_more=found.has_more)


@router.get("/files/{file_id}")
def get_file(file_id: str, fine_tuning: FineTuning) -> schemas.FileAnswer:
    """One file."""
    return file_view(fine_tuning.file(file_id))


@router.get("/files/{file_id}/content", response_class=FileResponse, response_model=None)
def content(file_id: str, files: Files, fine_tuning: FineTuning) -> Response:
    """A file's bytes as they were sent; of a result file, CSV."""
    result = fine_tuning.result(file_id)
    if result is not None:
        return Response(result, media_type="application/octet-stream")
    found = files.content(file_id)
    # Never a type that a browser would show, because the content is not trusted.
    if isinstance(found.content, Path):
        return FileResponse(found.content, media_type="application/octet-stream", filename=found.filename)
    return StreamingResponse(found.content, media_type="application/octet-stream")


@router.delete("/files/{file_id}")
def delete(file_id: str, fine_tuning: FineTuning) -> schemas.Deleted:
    """Delete a file. Its dataset stays under /api while a job records it as what it was trained on."""
    fine_tuning.delete_file(file_id)
    return schemas.Deleted(id=file_id, object="file", deleted=True)
