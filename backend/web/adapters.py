"""/adapters: what was trained or brought in, and what is made of it."""

from typing import Annotated, Any, get_args

from fastapi import Depends, Query, Request
from fastapi.responses import HTMLResponse

from api.adapter_schemas import details_view, summary_view
from api.exports import show
from domain.models.gguf import GgufType
from services.adapter_service import AdapterService, get_adapter_service
from services.export_service import ExportService, get_export_service
from services.served_model_service import ServedModelService, get_served_model_service
from web.pages import page, pages_router

router = pages_router()
Adapters = Annotated[AdapterService, Depends(get_adapter_service)]
Models = Annotated[ServedModelService, Depends(get_served_model_service)]
Exports = Annotated[ExportService, Depends(get_export_service)]


@router.get("/adapters")
def adapters(request: Request, adapters: Adapters, q: Annotated[str, Query(max_length=200)] = "") -> HTMLResponse:
    """List adapters, newest first."""
    words = q.lower().split()
    records = [
        record
        for record in adapters.all()
        if all(word in f"{record.name} {record.base_model_id}".lower() for word in words)
    ]
    template = "adapters_table.html" if request.headers.get("hx-target") == "adapters" else "adapters.html"
    return page(request, template, adapters=[summary_view(record) for record in records], q=q)


@router.get("/adapters/{adapter_id}")
def adapter(request: Request, adapter_id: str, adapters: Adapters, exports: Exports, models: Models) -> HTMLResponse:
    """Show one adapter, with its exports."""
    record = adapters.get(adapter_id)
    view = details_view(record, adapters.files(record.id), adapters.card(record.id), models.vllm(record))
    return page(
        request, "adapter.html", adapter=view, gguf_types=get_args(GgufType), exports=_exports(exports, adapter_id)
    )


@router.get("/adapters/{adapter_id}/exports")
def exports(request: Request, adapter_id: str, adapters: Adapters, exports: Exports) -> HTMLResponse:
    """Return what is being made, or was made, of an adapter."""
    adapters.get(adapter_id)
    return page(request, "adapter_exports.html", exports=_exports(exports, adapter_id))


def _exports(exports: ExportService, adapter_id: str) -> list[Any]:
    return [show(exports, record) for record in exports.ledger.all(adapter_id)]
