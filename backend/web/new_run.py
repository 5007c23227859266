"""/new: a fine-tune from the model to its start, with what every setting is and why, and whether it fits."""

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response

from api.compatibility import CompatibilityResponse
from api.configuring import configured
from api.dataset_analysis_schemas import AnalyzeRequest, analysis_view
from api.dataset_schemas import dataset_view
from api.model_schemas import LocalModelsResponse, SearchResponse
from api.peft_schemas import ConfigureRequest, ConfigureResponse
from api.peft_views import algorithm_view
from api.training_schemas import job_view
from api.waiting import may_ask_the_hub, until_done
from core.errors import StudioError
from domain.memory.estimate import Estimate
from domain.models.records import SearchQuery
from domain.openai.fine_tunes import training_file_of
from domain.peft.algorithms import SPECS, Algorithm
from domain.peft.use_cases import USE_CASES
from services.dataset_service import DatasetService, get_dataset_service
from services.model_registry_service import ModelRegistryService, get_model_registry_service
from services.peft_service import PeftService, get_peft_service
from services.training.compatibility import CompatibilityService, get_compatibility_service
from services.training.dataset_analysis import AnalysisRequest, DatasetAnalysisService, get_dataset_analysis_service
from services.training.initial_adapters import InitialAdapters, get_initial_adapters
from services.training_service import TrainingService, get_training_service
from web.pages import page, pages_router

router = pages_router()
# What is posted here is what is posted to the API, so what is refused is refused in the same words: problem documents.
posted = APIRouter(include_in_schema=False)
Datasets = Annotated[DatasetService, Depends(get_dataset_service)]
Peft = Annotated[PeftService, Depends(get_peft_service)]
Registry = Annotated[ModelRegistryService, Depends(get_model_registry_service)]
Training = Annotated[TrainingService, Depends(get_training_service)]
Initial = Annotated[InitialAdapters, Depends(get_initial_adapters)]
Compatibility = Annotated[CompatibilityService, Depends(get_compatibility_service)]
Analyses = Annotated[DatasetAnalysisService, Depends(get_dataset_analysis_service)]

_WAIT_S = 1.0  # for an analysis; the page asks again
_NEWEST = 50  # datasets that are offered
# Settings that people change most, in the order in which they are shown. The others follow on request.
_FIRST = (
    "learning_rate", "epochs", "max_steps", "batch_size", "gradient_accumulation", "max_seq_length", "rank", "alpha",
    "quantization", "eval_every_steps",
)  # fmt: skip
# Those on which memory depends, under the names of /api/models/compatibility.
_OF_MEMORY = (
    "rank", "target_modules", "target_experts", "max_seq_length", "batch_size", "gradient_checkpointing", "optimizer",
    "precision",
)  # fmt: skip
_PARTS = ("weights", "adapter", "gradients", "optimizer", "activations", "logits", "overhead")


@router.get("/new")
def new(
    request: Request,
    datasets: Datasets,
    peft: Peft,
    registry: Registry,
    training: Training,
    like: Annotated[str | None, Query(max_length=64)] = None,
    model_id: Annotated[str | None, Query(max_length=96)] = None,
    dataset_id: Annotated[str | None, Query(max_length=64)] = None,
) -> HTMLResponse:
    """Show the page, empty or with what an earlier run, a model or a dataset says."""
    start: dict[str, Any] = {"model_id": model_id, "dataset_id": dataset_id, "algorithm": "lora", "use_case": "chatbot"}
    if like is not None:
        job = job_view(training.ledger.get(like), None)
        names = ("model_id", "dataset_id", "algorithm", "validation_fraction", "initial_adapter_id")
        overrides = job.config.model_dump()
        if job.initial_adapter_id is not None:
            del overrides["init_weights"]  # it follows from the adapter
        start |= {name: getattr(job, name) for name in names} | {"use_case": "", "overrides": overrides}
    return page(
        request,
        "new.html",
        start=start,
        models=_local(registry, ""),
        note=None,
        q="",
        algorithms=[algorithm_view(SPECS[name], peft) for name in Algorithm],
        use_cases=list(USE_CASES.values()),
        **_offered(datasets, dataset_id or start["dataset_id"]),
    )


@router.get("/new/models")
async def models(
    request: Request,
    registry: Registry,
    q: Annotated[str, Query(max_length=200)] = "",
    algorithm: Algorithm = Algorithm.LORA,
    only_fitting: bool = False,
    chosen: Annotated[str, Query(alias="model_id", max_length=96)] = "",
) -> HTMLResponse:
    """Return the models whose names have some words in them: this machine's, then the Hub's."""
    here = await asyncio.to_thread(_local, registry, q)
    found, note = [], None
    if q.strip():
        query = SearchQuery(query=q.strip(), limit=20, algorithm=algorithm.value, only_fitting=only_fitting)
        try:
            answer = await may_ask_the_hub(lambda: SearchResponse.of(registry.search(query)))
        except StudioError as error:
            note = error.detail
        else:
            found = answer.models
            if answer.source == "local":
                note = "The Hub cannot be reached: these are the models of this machine."
            elif answer.stale:
                note = "The Hub cannot be reached: this is what it said before."
    if only_fitting:
        here = [model for model in here if model.fit is None or model.fit.verdict in ("fits", "tight")]
    known = {model.model_id for model in here}
    shown = [*here, *(model for model in found if model.model_id not in known)]
    return page(request, "new_models.html", models=shown, start={"model_id": chosen}, note=note, q=q)


@router.get("/new/datasets")
def offered_datasets(
    request: Request, datasets: Datasets, chosen: Annotated[str | None, Query(max_length=64)] = None
) -> HTMLResponse:
    """Return the datasets that can be chosen."""
    return page(request, "new_datasets.html", start={"dataset_id": chosen}, **_offered(datasets, chosen))


@posted.post("/new/settings")
async def settings(
    request: Request, body: ConfigureRequest, peft: Peft, compatibility: Compatibility, initial: Initial
) -> HTMLResponse:
    """Return every setting with its source and reason, and the estimate of memory."""
    shown, fit = await may_ask_the_hub(_settle, body, peft, compatibility, initial)
    parameters = {each.name: each for each in algorithm_view(SPECS[shown.algorithm], peft).parameters}
    others = sorted(name for name in shown.parameters if name not in _FIRST)
    return page(
        request,
        "new_settings.html",
        shown=shown,
        parameters=parameters,
        first=[name for name in _FIRST if name in shown.parameters],
        others=others,
        fit=fit,
        segments=_segments(fit),
    )


@posted.post("/new/analysis")
async def analysis(request: Request, body: AnalyzeRequest, datasets: Datasets, analyses: Analyses) -> Response:
    """Return what would be learned: lengths, what is cut, steps, an example; 202 while it is being computed."""
    names = ("dataset_id", "model_id", "revision", "algorithm", "use_case", "example_row")
    dataset_id = request.query_params.get("dataset_id", "")
    values = {name: getattr(body, name) for name in names[1:]}
    asked = AnalysisRequest(dataset_id=dataset_id, overrides=body.settings(), **values)
    running = await may_ask_the_hub(analyses.begin, asked)
    await until_done(running.future, _WAIT_S)
    if not running.future.done():
        return JSONResponse({"fraction": running.fraction}, 202)
    found = await asyncio.to_thread(analyses.finish, running)
    manifest = await asyncio.to_thread(datasets.manifest, dataset_id)
    view = analysis_view(found, manifest.duplicates)
    most = max((each.rows for each in view.histogram), default=1)
    return page(request, "new_analysis.html", found=view, most=most)


def _settle(
    body: ConfigureRequest, peft: PeftService, compatibility: CompatibilityService, initial: InitialAdapters
) -> tuple[ConfigureResponse, CompatibilityResponse | None]:
    shown = configured(body, peft, initial)
    if shown.model_id is None:
        return shown, None
    chosen = {name: getattr(shown.config, name) for name in _OF_MEMORY}
    found = compatibility.check(shown.model_id, body.revision, shown.algorithm, chosen, "auto", None)
    return shown, CompatibilityResponse.model_validate(found)


def _segments(fit: CompatibilityResponse | None) -> list[tuple[str, int, float, float]]:
    """Return the parts of an estimate: name, bytes, and where each begins and how wide it is, of 1000.

    The whole bar is the memory that there is, or the estimate where that is more.
    """
    if fit is None or fit.estimate is None:
        return []
    estimate: Estimate = fit.estimate
    whole = max(estimate.total_bytes, fit.available_bytes or 0, 1)
    segments, begin = [], 0.0
    for name in _PARTS:
        part: int = getattr(estimate, f"{name}_bytes")
        width = 1000 * part / whole
        segments.append((name, part, round(begin, 2), round(width, 2)))
        begin += width
    return segments


def _local(registry: ModelRegistryService, q: str) -> list[Any]:
    words = q.lower().split()
    rated = [(model, registry.fit_of_local(model)) for model in registry.local_models()]
    listed = LocalModelsResponse.of(rated).models
    return [model for model in listed if all(word in model.model_id.lower() for word in words)]


def _offered(datasets: DatasetService, chosen: str | None) -> dict[str, Any]:
    records = datasets.all()
    shown = records[:_NEWEST] + [record for record in records[_NEWEST:] if record.id == chosen]
    views = [dataset_view(record, datasets.manifest(record.id)) for record in shown]
    return {"datasets": views, "files": {view.id: training_file_of(view.id) for view in views}}
