"""/v1/fine_tuning/jobs: the same jobs that /api/training/jobs shows, in OpenAI's form."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query, Request

from api.hub_token import ASKS_THE_HUB
from api.openai import schemas
from api.openai.paging import After, page_of
from api.waiting import may_ask_the_hub
from core.errors import Rejected
from domain.openai.fine_tunes import FineTuneWish, Hyperparameters, OwnOptions, job_of
from domain.peft.config import PARAMETER_NAMES
from services.fine_tuning_service import FineTuningService, get_fine_tuning_service

router = APIRouter(prefix="/fine_tuning/jobs", tags=["openai"])
FineTuning = Annotated[FineTuningService, Depends(get_fine_tuning_service)]
RetryCount = Annotated[int, Header(alias="x-stainless-retry-count", ge=0)]
_NO_GRADERS = (
    "method.type='reinforcement': there are no graders here; send method={'type': 'supervised'} with the answers that "
    "you would grade best, or {'type': 'dpo'} with pairs of a better and a worse one."
)


class MethodNotHere(Rejected):
    """The service has no such training method."""

    slug, title = "method-not-here", "Method not here"


class IntegrationNotHere(Rejected):
    """Nothing of a job is sent to other services."""

    slug, title = "integration-not-here", "Integration not here"


@router.post("", dependencies=ASKS_THE_HUB)
async def create(body: schemas.CreateJob, fine_tuning: FineTuning, retries: RetryCount = 0) -> schemas.JobAnswer:
    """Queue a fine-tune. The same request again within moments, as a client's retry sends it, is the same job."""
    wish = _wish(body)
    record = await may_ask_the_hub(fine_tuning.create, wish, tried_again=retries > 0)
    return _view(fine_tuning.body(record))


def _wish(body: schemas.CreateJob) -> FineTuneWish:
    method = body.method
    if method is not None and method.type == "reinforcement":
        raise MethodNotHere(_NO_GRADERS, errors=[{"location": ["method", "type"], "message": _NO_GRADERS}])
    if body.integrations:
        message = "integrations: nothing of a job is sent to other services; its metrics are in its events and results."
        raise IntegrationNotHere(message, errors=[{"location": ["integrations"], "message": message}])
    of_method = _of_method(method)
    if of_method is not None and body.hyperparameters is not None:
        message = "hyperparameters: the method has hyperparameters as well; send one of them."
        raise MethodNotHere(message, errors=[{"location": ["hyperparameters"], "message": message}])
    sent = of_method or body.hyperparameters or schemas.HyperparametersRequest()
    values = {name: value for name, value in sent.model_dump().items() if value != "auto"}
    return FineTuneWish(
        model=body.model,
        training_file=body.training_file,
        validation_file=body.validation_file,
        suffix=body.suffix,
        seed=body.seed,
        metadata=body.metadata,
        hyperparameters=Hyperparameters(**values),
        own=_own(body.peft),
        method=method.type if method is not None and method.type != "reinforcement" else None,
    )


def _of_method(method: schemas.MethodRequest | None) -> schemas.HyperparametersRequest | None:
    """Return the hyperparameters of the method that is named.

    Raises:
        MethodNotHere: There are hyperparameters of another method.
    """
    if method is None:
        return None
    settings = {"supervised": method.supervised, "dpo": method.dpo, "reinforcement": method.reinforcement}
    own = settings.pop(method.type)
    others = [name for name, value in settings.items() if value is not None]
    if others:
        message = f"method.{others[0]}: it has no effect with the type {method.type!r}."
        raise MethodNotHere(message, errors=[{"location": ["method", others[0]], "message": message}])
    return own.hyperparameters if isinstance(own, schemas.Supervised | schemas.Dpo) else None


def _own(options: schemas.PeftOptions | None) -> OwnOptions:
    if options is None:
        return OwnOptions()
    sent: dict[str, Any] = options.sent()
    overrides = {name: value for name, value in sent.items() if name in PARAMETER_NAMES}
    others = {name: value for name, value in sent.items() if name not in PARAMETER_NAMES}
    return OwnOptions(**others, overrides=overrides)


def _view(body: dict[str, Any]) -> schemas.JobAnswer:
    return schemas.JobAnswer.model_validate(body)


@router.get("")
def list_jobs(
    request: Request,
    fine_tuning: FineTuning,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    metadata: Annotated[str | None, Query(description="`null`: jobs without; `metadata[k]=v`: with a pair.")] = None,
) -> schemas.JobList:
    """Jobs, newest first, whichever way they came."""
    pairs = {
        name[len("metadata[") : -1]: value
        for name, value in request.query_params.multi_items()
        if name.startswith("metadata[") and name.endswith("]")
    }
    records = fine_tuning.all(pairs, without=metadata == "null")
    found = page_of(records, lambda record: record.id, job_of(after) if after is not None else None, limit)
    data = [_view(fine_tuning.body(record)) for record in found.data]
    return schemas.JobList(object="list", data=data, has_more=found.has_more)


@router.get("/{job_id}")
def get_job(job_id: str, fine_tuning: FineTuning) -> schemas.JobAnswer:
    """One job."""
    return _view(fine_tuning.body(fine_tuning.get(job_of(job_id))))


@router.post("/{job_id}/cancel")
def cancel(job_id: str, fine_tuning: FineTuning) -> schemas.JobAnswer:
    """End a job. Its checkpoints stay."""
    return _view(fine_tuning.body(fine_tuning.cancel(job_of(job_id))))


@router.post("/{job_id}/pause")
def pause(job_id: str, fine_tuning: FineTuning) -> schemas.JobAnswer:
    """Stop a job so that it can go on later. A running one writes a checkpoint first."""
    return _view(fine_tuning.body(fine_tuning.pause(job_of(job_id))))


@router.post("/{job_id}/resume")
def resume(job_id: str, fine_tuning: FineTuning) -> schemas.JobAnswer:
    """Let a paused job go on from its newest checkpoint."""
    return _view(fine_tuning.body(fine_tuning.resume(job_of(job_id))))


@router.get("/{job_id}/events")
def events(
    job_id: str, fine_tuning: FineTuning, after: After = None, limit: Annotated[int, Query(ge=1, le=1000)] = 20
) -> schemas.EventList:
    """What happened to a job, newest first; every step's loss is an event of the type `metrics`."""
    data, has_more = fine_tuning.events(job_of(job_id), after, limit)
    return schemas.EventList.model_validate({"object": "list", "data": data, "has_more": has_more})


@router.get("/{job_id}/checkpoints")
def checkpoints(
    job_id: str, fine_tuning: FineTuning, after: After = None, limit: Annotated[int, Query(ge=1, le=100)] = 10
) -> schemas.CheckpointList:
    """A job's checkpoints that can be used, newest first. Each is a model that can be chatted with."""
    found = page_of(fine_tuning.checkpoints(job_of(job_id)), lambda item: str(item["id"]), after, limit)
    first, last = (found.data[0]["id"], found.data[-1]["id"]) if found.data else (None, None)
    body = {"object": "list", "data": found.data, "first_id": first, "last_id": last, "has_more": found.has_more}
    return schemas.CheckpointList.model_validate(body)
