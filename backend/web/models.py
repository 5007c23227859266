"""/models: what is on this machine, what the Hub has, and what of it fits."""

import asyncio
from typing import Annotated, Any

from fastapi import Depends, Query, Request
from fastapi.responses import HTMLResponse

from api.model_schemas import LocalModelsResponse, ModelDetailsResponse, SearchResponse
from api.waiting import may_ask_the_hub
from core.errors import StudioError
from domain.models.records import SearchQuery
from services.model_registry_service import ModelRegistryService, get_model_registry_service
from web.pages import page, pages_router

router = pages_router()
Registry = Annotated[ModelRegistryService, Depends(get_model_registry_service)]


@router.get("/models")
async def models(
    request: Request,
    registry: Registry,
    q: Annotated[str, Query(max_length=200)] = "",
    only_fitting: bool = False,
    cursor: Annotated[str | None, Query(max_length=2000)] = None,
) -> HTMLResponse:
    """List this machine's models, and what the Hub has under some words."""
    here = await asyncio.to_thread(_local, registry)
    found, note = None, None
    if q.strip():
        query = SearchQuery(query=q.strip(), only_fitting=only_fitting, cursor=cursor)
        try:
            found = await may_ask_the_hub(lambda: SearchResponse.of(registry.search(query)))
        except StudioError as error:
            note = error.detail
    template = "models_found.html" if request.headers.get("hx-target") == "found" else "models.html"
    return page(request, template, here=here, found=found, note=note, q=q, only_fitting=only_fitting)


@router.get("/models/{model_id:path}")
async def model(request: Request, model_id: str, registry: Registry) -> HTMLResponse:
    """Show one model: its files and dimensions, and which methods fit this machine."""
    found = await may_ask_the_hub(lambda: ModelDetailsResponse.of(registry.details(model_id, None)))
    return page(request, "model.html", model=found)


def _local(registry: ModelRegistryService) -> list[Any]:
    return LocalModelsResponse.of([(each, registry.fit_of_local(each)) for each in registry.local_models()]).models
