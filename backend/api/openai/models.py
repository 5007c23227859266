"""/v1/models: the bases of this machine, and the models fine-tuned from them."""

from typing import Annotated

from fastapi import APIRouter, Depends

from api.openai import schemas
from services.served_model_service import ServedModel, ServedModelService, get_served_model_service

router = APIRouter(prefix="/models", tags=["openai"])
Models = Annotated[ServedModelService, Depends(get_served_model_service)]


@router.get("")
def list_models(models: Models) -> schemas.ModelList:
    """Every model that can be chatted with, but for the checkpoints, which their jobs list."""
    return schemas.ModelList(object="list", data=[_view(model) for model in models.all()])


@router.get("/{model:path}")
def get_model(model: str, models: Models) -> schemas.ModelAnswer:
    """One model; its name may hold a slash."""
    return _view(models.find(model))


@router.delete("/{model:path}")
def delete(model: str, models: Models) -> schemas.Deleted:
    """Delete a fine-tuned model, also under /api."""
    models.delete(model)
    return schemas.Deleted(id=model, object="model", deleted=True)


def _view(model: ServedModel) -> schemas.ModelAnswer:
    return schemas.ModelAnswer(id=model.name, object="model", created=model.created, owned_by=model.owned_by)
