"""/datasets: what can be learned from, row by row, and what depends on it."""

from typing import Annotated, Any, get_args

from fastapi import Depends, Query, Request
from fastapi.responses import HTMLResponse

from api.dataset_schemas import DatasetResponse, ImportResponse, dataset_view, import_view, preview_row
from domain.datasets.formats import DatasetFormat
from domain.jobs.states import FINAL_STATES
from services.dataset_service import DatasetService, get_dataset_service
from services.model_registry_service import ModelRegistryService, get_model_registry_service
from services.training_service import TrainingService, get_training_service
from store.records import JobRecord
from web.pages import page, pages_router

router = pages_router()
Datasets = Annotated[DatasetService, Depends(get_dataset_service)]
Training = Annotated[TrainingService, Depends(get_training_service)]
Registry = Annotated[ModelRegistryService, Depends(get_model_registry_service)]
_ROWS = 10  # a page of the preview
_NAMED = 10  # runs that a question names before something is lost


@router.get("/datasets")
def datasets(request: Request, datasets: Datasets, q: Annotated[str, Query(max_length=200)] = "") -> HTMLResponse:
    """List datasets, and imports under way."""
    words = q.lower().split()
    records = [record for record in datasets.all() if all(word in record.name.lower() for word in words)]
    views = [dataset_view(record, datasets.manifest(record.id)) for record in records]
    template = "datasets_table.html" if request.headers.get("hx-target") == "datasets" else "datasets.html"
    formats = get_args(DatasetFormat)
    return page(request, template, datasets=views, imports=_imports(datasets), q=q, formats=formats)


@router.get("/datasets/imports")
def imports(request: Request, datasets: Datasets) -> HTMLResponse:
    """Return the imports under way."""
    return page(request, "datasets_imports.html", imports=_imports(datasets))


@router.get("/datasets/{dataset_id}")
def dataset(
    request: Request,
    dataset_id: str,
    datasets: Datasets,
    training: Training,
    registry: Registry,
    offset: Annotated[int, Query(ge=0)] = 0,
) -> HTMLResponse:
    """Show one dataset: some of its rows, what was left out, and the runs that learn from it.

    Raises:
        DatasetNotFound: There is none of that id.
    """
    view = dataset_view(datasets.get(dataset_id), datasets.manifest(dataset_id))
    rows = [preview_row(row) for row in datasets.preview(dataset_id, offset, _ROWS)]
    shown: dict[str, Any] = {"dataset": view, "rows": rows, "offset": offset, "a_page": _ROWS}
    if request.headers.get("hx-target") == "rows":
        return page(request, "dataset_rows.html", **shown)
    runs = [job for job in training.ledger.all() if dataset_id in (job.dataset_id, job.validation_dataset_id)]
    return page(
        request,
        "dataset.html",
        **shown,
        runs=runs,
        models=[model.model_id for model in registry.local_models()],
        unfinished=[job for job in runs if job.state not in FINAL_STATES],
        dependents=[f"/api/training/jobs/{job.id}" for job in runs],
        lost=_lost(view, runs),
    )


def _lost(view: DatasetResponse, runs: list[JobRecord]) -> str:
    """Say what a deletion takes with it."""
    text = f"“{view.name}” and its {view.rows:,} rows are deleted for good."
    if not runs:
        return text
    text += " Adapters stay."
    names = ", ".join(f"“{job.name}”" for job in runs[:_NAMED]) + (" and more" if len(runs) > _NAMED else "")
    if len(runs) == 1:
        return f"{text} The run {names}, which learned from it, goes too, with its curves, log and checkpoints."
    return f"{text} The {len(runs)} runs that learned from it go too, with curves, logs and checkpoints: {names}."


def _imports(datasets: DatasetService) -> list[ImportResponse]:
    return [import_view(item) for item in datasets.imports.all()]
