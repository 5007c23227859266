"""/models: what is on this machine, what the Hub has, what of it fits, and what is made of a model."""

import asyncio
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Query, Request
from fastapi.responses import HTMLResponse

from api.compatibility import CompatibilityResponse
from api.model_schemas import LocalModelsResponse, ModelDetailsResponse, SearchResponse
from api.peft_views import loaded_model_view
from api.waiting import may_ask_the_hub
from core.errors import StudioError
from domain.models.records import SearchQuery
from domain.peft.algorithms import Algorithm
from services.model_registry_service import ModelRegistryService, get_model_registry_service
from services.model_removal_service import ModelRemovalService, ModelUse, get_model_removal_service
from services.models.embedded import MODEL_ID
from services.peft_service import PeftService, get_peft_service
from services.training.compatibility import CompatibilityService, get_compatibility_service
from services.training_service import TrainingService, get_training_service
from web.pages import page, pages_router
from web.shown import size

router = pages_router()
Registry = Annotated[ModelRegistryService, Depends(get_model_registry_service)]
_NAMED = 10  # adapters that a question names before something is lost


@dataclass(frozen=True)
class House:
    """The services that a page of one model shows."""

    registry: ModelRegistryService
    compatibility: CompatibilityService
    peft: PeftService
    training: TrainingService
    removal: ModelRemovalService


def _house(
    registry: Registry,
    compatibility: Annotated[CompatibilityService, Depends(get_compatibility_service)],
    peft: Annotated[PeftService, Depends(get_peft_service)],
    training: Annotated[TrainingService, Depends(get_training_service)],
    removal: Annotated[ModelRemovalService, Depends(get_model_removal_service)],
) -> House:
    return House(registry, compatibility, peft, training, removal)


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
async def model(request: Request, model_id: str, house: Annotated[House, Depends(_house)]) -> HTMLResponse:
    """Show one model: whether it fits and what would, whether it is in memory, and what was made of it here.

    Raises:
        ModelNotFound, AccessDenied, HubUnavailable: As the Hub says, and the model is not here either.
    """
    shown = await may_ask_the_hub(_shown, house, model_id)
    return page(request, "model.html", **shown)


def _lost(model_id: str, use: ModelUse) -> str:
    """Say what a deletion takes with it."""
    text = f"The files of {model_id} are deleted from this machine: {size(use.size_bytes)}."
    if use.cached is not None:
        text += " They lie in the Hub's cache, which other programs use, too."
    if model_id == MODEL_ID and use.prepared is not None:
        text += " It is made again, from the package that carries it, when it is next needed."
    if use.adapters:
        names = ", ".join(f"“{record.name}”" for record in use.adapters[:_NAMED])
        names += " and more" if len(use.adapters) > _NAMED else ""
        text += f" Adapters stay; what uses one of them has the model brought here again: {names}."
    return text


def _shown(house: House, model_id: str) -> dict[str, Any]:
    found, local = house.registry.details(model_id, None), house.registry.resolve_local(model_id)
    use, fit, note = house.removal.use_of(model_id), None, None
    try:
        checked = house.compatibility.check(model_id, None, Algorithm.LORA, {}, "auto", None)
        fit = CompatibilityResponse.model_validate(checked)
    except StudioError as error:
        note = error.detail
    return {
        "model": ModelDetailsResponse.of(found),
        "folder": local.path if local is not None else None,
        "use": use,
        "lost": _lost(model_id, use) if use.is_deletable else "",
        "fit_now": fit,
        "note": note,
        "loaded": [loaded_model_view(each) for each in house.peft.models() if each.model_id == model_id],
        "runs": [job for job in house.training.ledger.all() if job.model_id == model_id],
    }


def _local(registry: ModelRegistryService) -> list[Any]:
    return LocalModelsResponse.of([(each, registry.fit_of_local(each)) for each in registry.local_models()]).models
