"""/v1/uploads: large files in parts."""

from datetime import UTC, datetime
from typing import Annotated

from fastapi import APIRouter, Depends, Request
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from api.datasets import UploadAbandoned
from api.openai import schemas
from api.openai.files import check_purpose
from api.openai.schemas import file_view
from api.upload_form import read_upload, validated
from domain.openai.fine_tunes import as_seconds
from services.file_service import FileService, get_file_service
from services.files.uploads import Upload
from store.records import FileRecord

router = APIRouter(prefix="/uploads", tags=["openai"])
Files = Annotated[FileService, Depends(get_file_service)]
_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["data"],
                    "properties": {"data": {"type": "string", "format": "binary"}},
                }
            }
        },
    }
}


@router.post("")
def create(body: schemas.CreateUpload, files: Files) -> schemas.UploadAnswer:
    """Begin an upload. It takes parts for an hour, also after a restart of the server."""
    seconds = body.expires_after.seconds if body.expires_after is not None else None
    return upload_view(files.uploads.create(body.filename, body.bytes, check_purpose(body.purpose), seconds))


@router.post("/{upload_id}/parts", openapi_extra=_FORM)
async def add_part(upload_id: str, request: Request, files: Files) -> schemas.PartAnswer:
    """Store a part of at most 64 MiB. Parts may come in any order, several at once."""
    part_id, incoming = await run_in_threadpool(files.uploads.part, upload_id)
    try:
        validated(schemas.Request, await read_upload(request, lambda _name: incoming, "data"))
    except ClientDisconnect as error:
        incoming.abandon()
        raise UploadAbandoned("The client went away.") from error
    except BaseException:
        incoming.abandon()
        raise
    await run_in_threadpool(files.uploads.keep_part, upload_id, part_id)
    now = int(datetime.now(UTC).timestamp())
    return schemas.PartAnswer(id=part_id, object="upload.part", created_at=now, upload_id=upload_id)


@router.post("/{upload_id}/complete")
def complete(upload_id: str, body: schemas.CompleteUpload, files: Files) -> schemas.UploadAnswer:
    """Make a file of the parts, in the order given. The same again returns the same file."""
    return upload_view(*files.complete(upload_id, body.part_ids, body.md5))


@router.post("/{upload_id}/cancel")
def cancel(upload_id: str, files: Files) -> schemas.UploadAnswer:
    """End an upload; its parts are deleted."""
    return upload_view(files.uploads.end(files.uploads.pending(upload_id), "cancelled"))


def upload_view(upload: Upload, file: FileRecord | None = None) -> schemas.UploadAnswer:
    """Show an upload, with its file once it is complete."""
    return schemas.UploadAnswer(
        id=upload.id,
        object="upload",
        bytes=upload.bytes,
        created_at=as_seconds(upload.created_at),
        expires_at=as_seconds(upload.expires_at),
        filename=upload.filename,
        purpose=upload.purpose,
        status=upload.status,
        file=file_view(file) if file is not None else None,
    )
