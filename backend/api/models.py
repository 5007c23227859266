"""/api/models: what there is, here and on the Hub."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query
from pydantic import Field

from api.peft_schemas import Request, Response
from domain.algorithms import Algorithm
from domain.model_records import ModelDetails, ModelSummary, SearchQuery
from domain.model_shape import read_shape
from services.compatibility_service import CompatibilityService, Fit, get_compatibility_service
from services.model_registry_service import ModelRegistryService, SearchPage, get_model_registry_service
from store.records import to_text

router = APIRouter(prefix="/api/models", tags=["models"])
Registry = Annotated[ModelRegistryService, Depends(get_model_registry_service)]
Compatibility = Annotated[CompatibilityService, Depends(get_compatibility_service)]
Text = Annotated[str, Field(min_length=1, max_length=200)]


class SearchRequest(Request):
    query: Text | None = None
    task: Text | None = "text-generation"
    author: Text | None = None
    library: Text | None = None
    tags: list[Text] = Field(default=[], max_length=20)
    license: Text | None = None
    gated: bool | None = None
    min_parameters: int | None = Field(default=None, ge=0)
    max_parameters: int | None = Field(default=None, ge=0)
    sort: Literal["downloads", "likes", "trending", "created", "modified"] = "downloads"
    limit: int = Field(default=20, ge=1, le=100)
    cursor: Annotated[str, Field(max_length=2000)] | None = None
    algorithm: Annotated[Algorithm, Field(strict=False)] = Algorithm.QLORA
    only_fitting: bool = Field(default=False, description="Leave out models that do not fit or may not.")


class FitResponse(Response):
    verdict: Literal["fits", "tight", "does_not_fit", "unknown"]
    estimate_bytes: int | None


class SummaryResponse(Response):
    model_id: str
    author: str | None
    downloads: int | None
    likes: int | None
    task: str | None
    library: str | None
    tags: list[str]
    license: str | None
    gated: bool | Literal["auto", "manual"] | None
    parameters: int | None
    size_bytes: int | None = Field(description="Of the safetensors files.")
    architecture: str | None
    created_at: str | None
    modified_at: str | None
    local: bool = Field(description="Whether it is on this machine, or embedded.")
    fit: FitResponse | None


class SearchResponse(Response):
    models: list[SummaryResponse]
    next_cursor: str | None
    source: Literal["hub", "cache", "local"]
    fetched_at: str
    stale: bool


class LocalModelResponse(SummaryResponse):
    path: str | None = Field(description="Null for the embedded model until it is first used.")


class LocalModelList(Response):
    models: list[LocalModelResponse]


class FileResponse(Response):
    path: str
    size_bytes: int | None


class SafetensorsResponse(Response):
    parameters_by_dtype: dict[str, int]


class ConfigResponse(Response):
    model_type: str | None
    hidden_size: int | None
    layers: int | None
    heads: int | None
    kv_heads: int | None
    intermediate_size: int | None
    vocab_size: int | None
    max_position_embeddings: int | None
    tied_embeddings: bool | None
    experts: int | None


class DetailsResponse(SummaryResponse):
    sha: str | None
    revision: str | None
    files: list[FileResponse]
    safetensors: SafetensorsResponse | None
    config: ConfigResponse | None
    chat_template: bool | None
    base_model: str | None
    languages: list[str]
    requires_remote_code: bool | None
    fit: dict[Algorithm, FitResponse] | None  # type: ignore[assignment]


def _summary(model: ModelSummary, fit: Fit | None) -> SummaryResponse:
    return SummaryResponse.model_validate(model.__dict__ | {"fit": fit})


def _page(
    page: SearchPage, compatibility: CompatibilityService, algorithm: Algorithm, only_fitting: bool
) -> SearchResponse:
    judged = [(model, compatibility.quick_fit(model, algorithm)) for model in page.models]
    if only_fitting:
        judged = [(model, fit) for model, fit in judged if fit is not None and fit.verdict == "fits"]
    return SearchResponse(
        models=[_summary(model, fit) for model, fit in judged],
        next_cursor=page.next_cursor,
        source=page.source,
        fetched_at=to_text(page.fetched_at),
        stale=page.stale,
    )


@router.post("/search")
def search(body: SearchRequest, registry: Registry, compatibility: Compatibility) -> SearchResponse:
    """Search the Hub; when it cannot be reached and nothing is cached, the models on this machine."""
    values: dict[str, Any] = {name: getattr(body, name) for name in SearchQuery.__dataclass_fields__}
    page = registry.search(SearchQuery(**values | {"tags": tuple(body.tags)}))
    return _page(page, compatibility, body.algorithm, only_fitting=body.only_fitting)


@router.get("/popular/{task}")
def popular(
    task: str, registry: Registry, compatibility: Compatibility, limit: Annotated[int, Query(ge=1, le=100)] = 20
) -> SearchResponse:
    """The most downloaded models of a task."""
    return _page(registry.popular(task, limit), compatibility, Algorithm.QLORA, only_fitting=False)


@router.get("/local")
def local(registry: Registry, compatibility: Compatibility) -> LocalModelList:
    """What is on this machine: the embedded model, the model folders, the Hub cache."""
    return LocalModelList(
        models=[
            LocalModelResponse.model_validate(
                model.summary.__dict__
                | {
                    "fit": compatibility.quick_fit(model.summary, Algorithm.QLORA),
                    "path": str(model.path) if model.path is not None else None,
                }
            )
            for model in registry.local_models()
        ]
    )


@router.delete("/cache", status_code=204)
def clear_cache(registry: Registry) -> None:
    """Forget what the Hub said; the next answers are fetched anew."""
    registry.clear_cache()


@router.get("/{model_id:path}")
def details(
    model_id: str,
    registry: Registry,
    compatibility: Compatibility,
    revision: Annotated[str | None, Query(min_length=1, max_length=100)] = None,
) -> DetailsResponse:
    """One model: its files, config, and what each method needs on this machine."""
    found = registry.details(model_id, revision)
    return DetailsResponse.model_validate(
        found.summary.__dict__
        | {
            "sha": found.sha,
            "revision": found.revision,
            "files": [file.__dict__ for file in found.files],
            "safetensors": {"parameters_by_dtype": found.parameters_by_dtype} if found.parameters_by_dtype else None,
            "config": _config(found),
            "chat_template": found.chat_template,
            "base_model": found.base_model,
            "languages": list(found.languages),
            "requires_remote_code": found.requires_remote_code,
            "fit": compatibility.fits(found.config) if found.config is not None else None,
        }
    )


def _config(found: ModelDetails) -> dict[str, Any] | None:
    if found.config is None:
        return None
    config, shape = found.config, read_shape(found.config)
    return {
        "model_type": config.get("model_type"),
        "hidden_size": shape.hidden if shape else config.get("hidden_size"),
        "layers": shape.layers if shape else config.get("num_hidden_layers"),
        "heads": shape.heads if shape else config.get("num_attention_heads"),
        "kv_heads": shape.kv_heads if shape else config.get("num_key_value_heads"),
        "intermediate_size": shape.intermediate if shape else config.get("intermediate_size"),
        "vocab_size": shape.vocab if shape else config.get("vocab_size"),
        "max_position_embeddings": shape.max_positions if shape else config.get("max_position_embeddings"),
        "tied_embeddings": shape.tied_embeddings if shape else config.get("tie_word_embeddings"),
        "experts": config.get("num_local_experts") or config.get("num_experts") or config.get("n_routed_experts"),
    }
