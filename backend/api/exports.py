"""/api/exports: exports of adapters and their progress."""

from typing import Annotated

from fastapi import APIRouter, Depends, Query
from fastapi.responses import FileResponse, StreamingResponse

from api.export_schemas import ExportList, ExportResponse, export_view
from services.export_service import ExportService, get_export_service
from store.records import ExportRecord

router = APIRouter(prefix="/api/exports", tags=["exports"])
Exports = Annotated[ExportService, Depends(get_export_service)]


@router.get("")
def list_exports(exports: Exports, adapter_id: Annotated[str | None, Query(max_length=64)] = None) -> ExportList:
    """Exports of one adapter or of all, newest first."""
    return ExportList(exports=[show(exports, record) for record in exports.ledger.all(adapter_id)])


@router.get("/{export_id}")
def get_export(export_id: str, exports: Exports) -> ExportResponse:
    """One export: its state, its progress, what it made, or why it failed."""
    return show(exports, exports.ledger.get(export_id))


@router.get("/{export_id}/download", response_class=StreamingResponse)
def download(export_id: str, exports: Exports) -> StreamingResponse:
    """Everything that was made, as one zip."""
    content = exports.zipped(export_id)
    headers = {"Content-Disposition": f'attachment; filename="{exports.ledger.get(export_id).id}.zip"'}
    return StreamingResponse(content, media_type="application/zip", headers=headers)


@router.get("/{export_id}/files/{name:path}", response_class=FileResponse)
def download_file(export_id: str, name: str, exports: Exports) -> FileResponse:
    """One file of what was made. It accepts `Range`, so that a broken download can be continued."""
    path = exports.file(export_id, name)
    return FileResponse(path, media_type="application/octet-stream", filename=path.name)


@router.post("/{export_id}/cancel", status_code=202)
def cancel(export_id: str, exports: Exports) -> ExportResponse:
    """End an export. A queued one ends at once, a running one after the present tensor. Nothing of it is kept."""
    return show(exports, exports.cancel(export_id))


@router.delete("/{export_id}", status_code=204)
def delete(export_id: str, exports: Exports) -> None:
    """Delete an export that has ended, with what it made."""
    exports.delete(export_id)


def show(exports: ExportService, record: ExportRecord) -> ExportResponse:
    """Show an export as it is now."""
    path = exports.path_of(record)
    progress = exports.progress_of(record.id)
    return export_view(record, progress, exports.files(record), str(path) if path is not None else None)
