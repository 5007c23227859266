"""/api/models: search the Hub, look at a model, list what is on this machine."""

from typing import Annotated

from fastapi import APIRouter, Depends, Query

from api.hub_token import ASKS_THE_HUB
from api.model_schemas import LocalModelsResponse, ModelDetailsResponse, SearchRequest, SearchResponse
from api.waiting import may_ask_the_hub
from services.model_registry_service import ModelRegistryService, get_model_registry_service
from services.model_removal_service import ModelRemovalService, get_model_removal_service

router = APIRouter(prefix="/api/models", tags=["models"])
Registry = Annotated[ModelRegistryService, Depends(get_model_registry_service)]


@router.post("/search", dependencies=ASKS_THE_HUB)
async def search(body: SearchRequest, registry: Registry) -> SearchResponse:
    """Search the Hub. The answer says whether it is from the Hub, from the cache, or lists this machine's models."""
    return await may_ask_the_hub(lambda: SearchResponse.of(registry.search(body.to_query())))


@router.get("/popular/{task}", dependencies=ASKS_THE_HUB)
async def popular(
    task: str,
    registry: Registry,
    limit: Annotated[int, Query(ge=1, le=100, description="Models.")] = 20,
) -> SearchResponse:
    """Return a task's most downloaded models. An unknown task is a 404 that lists the tasks."""
    return await may_ask_the_hub(lambda: SearchResponse.of(registry.popular(task, limit)))


@router.get("/local")
def local(registry: Registry) -> LocalModelsResponse:
    """Return the models on this machine: the model folders, the Hub's cache, the embedded model."""
    return LocalModelsResponse.of([(model, registry.fit_of_local(model)) for model in registry.local_models()])


@router.delete("/cache", status_code=204)
def clear_cache(registry: Registry) -> None:
    """Drop the cached answers of the Hub. Downloaded models stay."""
    registry.clear_cache()


# These routes are the last, because they take every path below the prefix. An id may hold one slash; more are refused.
@router.delete("/{model_id:path}", status_code=204)
def delete(
    model_id: str,
    removal: Annotated[ModelRemovalService, Depends(get_model_removal_service)],
    force: Annotated[bool, Query(description="Also a model that adapters have as their base.")] = False,
) -> None:
    """Delete a model's files from this machine: what came from the Hub, or was prepared here.

    A model that is loaded, or that a job or an export needs, is a 409 that names them. So is the base of adapters,
    unless forced: what uses them downloads it again. A folder of the operator's (PEFT_STUDIO_MODEL_DIRS) is a 403.
    """
    removal.delete(model_id, force=force)


@router.get("/{model_id:path}", dependencies=ASKS_THE_HUB)
async def details(
    model_id: str,
    registry: Registry,
    revision: Annotated[
        str | None, Query(min_length=1, max_length=100, description="Branch, tag or commit; `main` if absent.")
    ] = None,
) -> ModelDetailsResponse:
    """Return one model: files, dimensions, licence, and whether a fine-tune fits this machine."""
    return await may_ask_the_hub(lambda: ModelDetailsResponse.of(registry.details(model_id, revision)))
