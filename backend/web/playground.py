"""/playground: a base and what was made of it answer the same question side by side."""

from dataclasses import dataclass
from typing import Annotated, Literal

from fastapi import Depends, Query, Request
from fastapi.responses import HTMLResponse

from domain.openai.fine_tunes import name_of
from services.adapter_service import AdapterService, get_adapter_service
from services.dataset_service import DatasetService, get_dataset_service
from services.model_registry_service import ModelRegistryService, get_model_registry_service
from services.peft_service import PeftService, get_peft_service
from services.served_model_service import ServedModelService, get_served_model_service
from services.training.checkpoint_adapters import checkpoint_adapter_id
from services.training.fine_tune_facts import facts_of
from services.training_service import TrainingService, get_training_service
from store.records import AdapterRecord, DatasetRecord, JobRecord
from web.pages import page, pages_router

router = pages_router()
Ids = list[Annotated[str, Query(max_length=100)]]
MOST = 3  # adapters and checkpoints beside the base
_JOBS = 40  # newest runs of a base whose checkpoints are offered
_WITH_QUESTIONS = ("messages", "alpaca", "sharegpt", "prompt_completion", "preference", "kto")


@dataclass(frozen=True)
class Choice:
    """Something that can answer on a base.

    Attributes:
        key: Names it in the page's address.
        name: For people.
        about: What tells it from others of the name.
        adapter_id: Of an adapter, or of what a checkpoint becomes when it is first asked; None of the base.
        served: Its name under /v1. A checkpoint that is no adapter yet becomes one when it is asked by this name.
        there: Whether it is an adapter already, or the base.
        algorithm: How it was trained; None of the base.
        revision: Of its base.
    """

    kind: Literal["base", "adapter", "checkpoint"]
    key: str
    name: str
    about: str
    adapter_id: str | None
    served: str
    there: bool = True
    algorithm: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class House:
    """The services that the page shows."""

    registry: ModelRegistryService
    peft: PeftService
    adapters: AdapterService
    datasets: DatasetService
    training: TrainingService
    served: ServedModelService


def _house(
    registry: Annotated[ModelRegistryService, Depends(get_model_registry_service)],
    peft: Annotated[PeftService, Depends(get_peft_service)],
    adapters: Annotated[AdapterService, Depends(get_adapter_service)],
    datasets: Annotated[DatasetService, Depends(get_dataset_service)],
    training: Annotated[TrainingService, Depends(get_training_service)],
    served: Annotated[ServedModelService, Depends(get_served_model_service)],
) -> House:
    return House(registry, peft, adapters, datasets, training, served)


@router.get("/playground")
def playground(
    request: Request,
    house: Annotated[House, Depends(_house)],
    model: Annotated[str | None, Query(max_length=96)] = None,
    adapter: Annotated[Ids, Query(max_length=MOST)] = [],  # noqa: B006  FastAPI copies it
    checkpoint: Annotated[Ids, Query(max_length=MOST)] = [],  # noqa: B006
    dataset: Annotated[str | None, Query(max_length=64)] = None,
    row: Annotated[int, Query(ge=0)] = 0,
) -> HTMLResponse:
    """Show the page for a base, with what is to answer chosen already; `dataset` may be a run that holds rows out.

    Raises:
        AdapterNotFound: There is no adapter of that id.
        JobNotFound: There is no run of that checkpoint.
    """
    asked = [house.adapters.get(adapter_id) for adapter_id in adapter]
    models = _models(house)
    base = model or _base_of(house, asked, checkpoint) or next(iter(models), None)
    choices = _choices(house, base) if base is not None else []
    chosen = {"base", *adapter, *checkpoint}
    datasets = [record for record in house.datasets.all() if record.format in _WITH_QUESTIONS]
    return page(
        request,
        "playground.html",
        base=base,
        models=sorted({*models, *([base] if base else [])}, key=str.lower),
        choices=choices,
        chosen=[choice.key for choice in choices if {choice.key, choice.adapter_id} & chosen][: MOST + 1],
        elsewhere=[record.name for record in asked if record.base_model_id != base],
        datasets=datasets,
        held_out=_held_out(house, base, dataset, datasets),
        dataset=dataset,
        row=row,
        most=MOST,
    )


def _base_of(house: House, asked: list[AdapterRecord], checkpoints: list[str]) -> str | None:
    bases = [record.base_model_id for record in asked]
    bases += [house.training.ledger.get(each.partition("/")[0]).model_id for each in checkpoints]
    return next(iter(bases), None)


def _held_out(
    house: House, base: str | None, asked: str | None, datasets: list[DatasetRecord]
) -> list[tuple[JobRecord, str]]:
    """Return the newest runs of a base that hold rows out, and the one asked for, with the names of their datasets."""
    names = {record.id: record.name for record in datasets}
    jobs = [job for job in house.training.ledger.all() if job.validation_fraction > 0 and job.dataset_id in names]
    newest = [job for job in jobs if job.model_id == base][:_JOBS]
    newest += [job for job in jobs if job.id == asked and job not in newest]
    return [(job, names[job.dataset_id]) for job in newest]


def _models(house: House) -> list[str]:
    loaded = [model.model_id for model in house.peft.models()]
    return list(dict.fromkeys([*loaded, *(model.model_id for model in house.registry.local_models())]))


def _choices(house: House, base: str) -> list[Choice]:
    records = [record for record in house.adapters.all() if record.base_model_id == base]
    there = {record.id for record in records}
    found = [Choice("base", "base", base, "as it is, without an adapter", None, base)]
    names = {model.adapter_id: model.name for model in house.served.all() if model.adapter_id is not None}
    found += [_adapter(record, names[record.id]) for record in records if record.id in names]
    return found + [choice for choice in _checkpoints(house, base) if choice.adapter_id not in there]


def _adapter(record: AdapterRecord, served: str) -> Choice:
    about, trained = f"version {record.version} · {record.algorithm}", (True, record.algorithm, record.base_revision)
    if record.source["kind"] != "checkpoint":
        name = record.name if record.version == 1 else f"{record.name} (version {record.version})"
        return Choice("adapter", record.id, name, about, record.id, served, *trained)
    job_id, step = record.source["job_id"], record.source["step"]
    # The address that named the checkpoint stays good.
    return Choice(
        "checkpoint", f"{job_id}/step-{step:08d}", f"{record.name}, step {step}", about, record.id, served, *trained
    )


def _checkpoints(house: House, base: str) -> list[Choice]:
    jobs = [job for job in house.training.ledger.all() if job.model_id == base][:_JOBS]
    found = []
    for job in jobs:
        for facts in reversed(house.training.checkpoints.all(job.id, check_sums=False)):
            if facts.problem is None:
                name = f"{job.name}, step {facts.step}"
                served = str(name_of(facts_of(job)).at(facts.step))
                key, adapter_id = f"{job.id}/{facts.id}", checkpoint_adapter_id(job.id, facts.step)
                about = f"checkpoint · {job.algorithm}"
                found.append(
                    Choice("checkpoint", key, name, about, adapter_id, served, False, job.algorithm, job.revision)
                )
    return found
