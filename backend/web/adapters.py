"""/adapters: what was trained or brought in, where it is from, how it is used, and what is made of it."""

from dataclasses import dataclass
from typing import Annotated, Any, get_args

from fastapi import Depends, Query, Request
from fastapi.responses import HTMLResponse

from api.adapter_schemas import details_view, summary_view
from api.export_schemas import ExportResponse
from api.exports import show
from core.errors import JobNotFound
from domain.models.gguf import GgufType
from services.adapter_service import AdapterService, get_adapter_service
from services.dataset_service import DatasetService, get_dataset_service
from services.export_service import ExportService, get_export_service
from services.served_model_service import ServedModelService, get_served_model_service
from services.training_service import TrainingService, get_training_service
from store.records import AdapterRecord, DatasetRecord, JobRecord
from web.pages import page, pages_router

router = pages_router()
Adapters = Annotated[AdapterService, Depends(get_adapter_service)]
Exports = Annotated[ExportService, Depends(get_export_service)]
_FIGURES = (
    "final_loss", "initial_eval_loss", "final_eval_loss", "best_eval_loss", "steps", "tokens", "trainable_parameters"
)  # fmt: skip


@dataclass(frozen=True)
class House:
    """The services that a page of one adapter shows."""

    adapters: AdapterService
    datasets: DatasetService
    exports: ExportService
    training: TrainingService
    served: ServedModelService


def _house(
    adapters: Adapters,
    datasets: Annotated[DatasetService, Depends(get_dataset_service)],
    exports: Exports,
    training: Annotated[TrainingService, Depends(get_training_service)],
    served: Annotated[ServedModelService, Depends(get_served_model_service)],
) -> House:
    return House(adapters, datasets, exports, training, served)


@router.get("/adapters")
def adapters(request: Request, adapters: Adapters, q: Annotated[str, Query(max_length=200)] = "") -> HTMLResponse:
    """List adapters, newest first, whose name or base has some words in it."""
    words = q.lower().split()
    found = [
        record
        for record in adapters.all()
        if all(word in f"{record.name} {record.base_model_id}".lower() for word in words)
    ]
    shown = [(summary_view(record), sum(size for _, size in adapters.files(record.id))) for record in found]
    template = "adapters_table.html" if request.headers.get("hx-target") == "adapters" else "adapters.html"
    return page(request, template, adapters=shown, q=q)


@router.get("/adapters/{adapter_id}")
def adapter(request: Request, adapter_id: str, house: Annotated[House, Depends(_house)]) -> HTMLResponse:
    """Show one adapter, where it is from, how it is used, and its exports.

    Raises:
        AdapterNotFound: There is none of that id.
    """
    record = house.adapters.get(adapter_id)
    files = house.adapters.files(record.id)
    view = details_view(record, files, house.adapters.card(record.id), house.served.vllm(record))
    exports = _exports(house.exports, adapter_id)
    return page(
        request,
        "adapter.html",
        adapter=view,
        size_bytes=sum(size for _, size in files),
        figures=[(name, view.metrics[name]) for name in _FIGURES if view.metrics.get(name) is not None],
        lineage=_lineage(house, record),
        served=_served_name(house, record),
        origin=str(request.base_url).rstrip("/"),
        gguf_types=get_args(GgufType),
        exports=exports,
        lost=_lost(record, exports),
    )


@router.get("/adapters/{adapter_id}/exports")
def exports(request: Request, adapter_id: str, adapters: Adapters, exports: Exports) -> HTMLResponse:
    """Return what is being made, or was made, of an adapter."""
    adapters.get(adapter_id)
    return page(request, "adapter_exports.html", exports=_exports(exports, adapter_id))


def _exports(exports: ExportService, adapter_id: str) -> list[ExportResponse]:
    return [show(exports, record) for record in exports.ledger.all(adapter_id)]


def _lost(record: AdapterRecord, exports: list[ExportResponse]) -> str:
    text = f"“{record.name}” and its files are deleted for good. It is taken off the models in memory."
    made = sum(bool(each.files) for each in exports)
    return f"{text} What was exported of it stays." if made else text


def _served_name(house: House, record: AdapterRecord) -> str | None:
    return next((model.name for model in house.served.all() if model.adapter_id == record.id), None)


def _lineage(house: House, record: AdapterRecord) -> dict[str, Any]:
    """Return what an adapter comes from, as far as it is still here."""
    job, earlier = _job(house, record.job_id), None
    if job is not None and job.resumed_from is not None:
        earlier = _job(house, job.resumed_from.partition("/")[0])
    return {
        "job": job,
        "earlier": earlier,
        "initial": _initial(house, record.source.get("initial_adapter_id")),
        "dataset": _dataset(house, record),
        "step": record.source.get("step"),
        "source": {name: value for name, value in record.source.items() if isinstance(value, str)},
    }


def _initial(house: House, adapter_id: str | None) -> dict[str, str | None] | None:
    """Return the adapter that another one continues: its name is None where it is no longer here."""
    if adapter_id is None:
        return None
    names = {record.id: record.name for record in house.adapters.all()}
    return {"id": adapter_id, "name": names.get(adapter_id)}


def _job(house: House, job_id: str | None) -> JobRecord | None:
    try:
        return house.training.ledger.get(job_id) if job_id is not None else None
    except JobNotFound:
        return None


def _dataset(house: House, record: AdapterRecord) -> DatasetRecord | None:
    return next((each for each in house.datasets.all() if each.sha256 == record.dataset_sha256), None)
