"""/api/training: jobs and what happens to them."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Header, Query, Response
from fastapi.routing import APIRoute
from fastapi.sse import EventSourceResponse, ServerSentEvent
from starlette.datastructures import QueryParams
from starlette.routing import Match
from starlette.types import Scope

from api import training_schemas as schemas
from api.dataset_schemas import preview_row
from api.hub_token import ASKS_THE_HUB
from api.training_schemas import checkpoint_view, job_view
from api.waiting import may_ask_the_hub
from domain.jobs.states import FINAL_STATES, JobState
from services.dataset_service import DatasetService, get_dataset_service
from services.training.job_intake import JobRequest
from services.training_service import TrainingService, get_training_service
from store.records import JobRecord

router = APIRouter(prefix="/api/training", tags=["training"])
Training = Annotated[TrainingService, Depends(get_training_service)]
After = Annotated[int, Query(ge=0, description="Only events with a higher sequence number.")]
LastEventId = Annotated[int | None, Header(ge=0)]
_PAGE = 500
_LOOK_AGAIN_S = 15.0  # a stream looks for events this often, even if nothing wakes it


def _json(schema: str) -> dict[str, Any]:
    return {"content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}}


# The framework does not document these parts of a streaming route: its JSON form, and its errors, which are JSON.
_OF_EVENTS: dict[int | str, dict[str, Any]] = {
    200: _json("JobEvents"),
    "default": _json("Problem") | {"description": "A problem document (RFC 9457)."},
}


@router.post("/jobs", status_code=202, dependencies=ASKS_THE_HUB)
async def create(body: schemas.CreateJobRequest, response: Response, training: Training) -> schemas.JobResponse:
    """Queue a fine-tune. With an idempotency key, the same request again returns the same job."""
    values = {name: getattr(body, name) for name in schemas.CreateJobRequest.model_fields}
    if body.initial_adapter_id is not None and "algorithm" not in body.model_fields_set:
        values["algorithm"] = None  # that of the adapter
    request = JobRequest(**values | {"overrides": body.overrides.sent()})
    job = await may_ask_the_hub(lambda: _view(training, training.create(request)))
    response.headers["Location"] = f"/api/training/jobs/{job.id}"
    return job


@router.get("/jobs")
def list_jobs(training: Training, state: Annotated[list[JobState] | None, Query()] = None) -> schemas.JobList:
    """Jobs, newest first, in all states or those named."""
    records = training.ledger.all(frozenset(state) if state else None)
    return schemas.JobList(jobs=[_view(training, record) for record in records])


@router.get("/jobs/{job_id}")
def get_job(job_id: str, training: Training) -> schemas.JobResponse:
    """One job, with its progress and, if it failed, why."""
    return _view(training, training.ledger.get(job_id))


class JsonEventsRoute(APIRoute):
    """Takes the requests for events as JSON. The stream's route, on the same path, takes the others."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        """Match a request for events whose query has `format=json`."""
        if scope["type"] == "http" and QueryParams(scope["query_string"]).get("format") != "json":
            return Match.NONE, {}
        return super().matches(scope)


def events_as_json(
    job_id: str, training: Training, after: After = 0, last_event_id: LastEventId = None
) -> schemas.JobEvents:
    """Return a page of a job's events."""
    training.ledger.get(job_id)
    page = training.ledger.events(job_id, _start(after, last_event_id), _PAGE)
    return schemas.JobEvents(events=[schemas.JobEvent.model_validate(event) for event in page])


# This route comes before the stream's, which takes the other requests and is the one in the OpenAPI document.
router.add_api_route("/jobs/{job_id}/events", events_as_json, route_class_override=JsonEventsRoute)


def job_that_is_there(job_id: str, training: Training) -> str:
    """Refuse an unknown job before the stream begins. Afterwards a problem document could not be sent."""
    return training.ledger.get(job_id).id


@router.get("/jobs/{job_id}/events", response_class=EventSourceResponse, responses=_OF_EVENTS)
async def events(
    job_id: Annotated[str, Depends(job_that_is_there)],
    training: Training,
    format: Annotated[Literal["sse", "json"], Query()] = "sse",  # it chose this route
    after: After = 0,
    last_event_id: LastEventId = None,
) -> AsyncIterator[ServerSentEvent]:
    """The job's events, as server-sent events (live, until it ends) or as JSON.

    Events: state, progress, started, built (a report of what the run was built of, read from the modules and the
    optimizer), metrics, evaluation, checkpoint. Each `id` is a sequence number without gaps. A client that reconnects
    with `Last-Event-ID` gets the events that it missed. Every step is there once, even if the run was interrupted. The
    stream of a paused or interrupted job stays open.
    """
    sent = _start(after, last_event_id)
    with training.ledger.broadcast.listening(job_id) as changed:
        while True:
            changed.clear()
            # The state is read before the events: a job in a final state has written its last event.
            ended = (await asyncio.to_thread(training.ledger.get, job_id)).state in FINAL_STATES
            page = await asyncio.to_thread(training.ledger.events, job_id, sent, _PAGE)
            for event in page:
                sent = event.sequence
                yield ServerSentEvent(
                    data=event.data | {"created_at": event.created_at}, event=event.kind, id=str(event.sequence)
                )
            if ended and len(page) < _PAGE:
                return
            if not page:
                with suppress(TimeoutError):
                    await asyncio.wait_for(changed.wait(), _LOOK_AGAIN_S)


def _start(after: int, last_event_id: int | None) -> int:
    return max(after, last_event_id or 0)


@router.get("/jobs/{job_id}/metrics")
def metrics(job_id: str, training: Training) -> schemas.JobMetricsList:
    """Every step's metrics, with the evaluation loss at the steps that were evaluated."""
    training.ledger.get(job_id)
    evaluations = {
        event.data["step"]: event.data["eval_loss"] for event in training.ledger.events(job_id, 0, 10**7, "evaluation")
    }
    return schemas.JobMetricsList(
        metrics=[
            schemas.MetricsRow.model_validate(event.data | {"eval_loss": evaluations.get(event.data["step"])})
            for event in training.ledger.events(job_id, 0, 10**7, "metrics")
        ],
        initial_eval_loss=evaluations.get(0),
    )


@router.get("/jobs/{job_id}/validation")
def validation(
    job_id: str,
    training: Training,
    datasets: Annotated[DatasetService, Depends(get_dataset_service)],
    offset: Annotated[int, Query(ge=0)] = 0,
    limit: Annotated[int, Query(ge=1, le=100)] = 10,
) -> schemas.ValidationRows:
    """Some rows that the job is evaluated on and learns nothing from: those held out, or its validation dataset's."""
    job = training.ledger.get(job_id)
    if job.validation_dataset_id is not None:
        dataset_id, total = job.validation_dataset_id, datasets.get(job.validation_dataset_id).rows
        rows = datasets.preview(dataset_id, offset, limit)
        positions = tuple(range(offset, offset + len(rows)))
    else:
        dataset_id, seed = job.dataset_id, job.config["seed"]
        positions, total, rows = datasets.validation_rows(dataset_id, job.validation_fraction, seed, offset, limit)
    shown = [
        schemas.ValidationRow(row=position, **dict(preview_row(row)))
        for position, row in zip(positions, rows, strict=True)
    ]
    return schemas.ValidationRows(dataset_id=dataset_id, total=total, offset=offset, rows=shown)


@router.get("/jobs/{job_id}/log")
def log(job_id: str, training: Training, tail: Annotated[int, Query(ge=1, le=1000)] = 100) -> schemas.JobLog:
    """The last lines of the engine's own output."""
    return schemas.JobLog(lines=training.log_tail(job_id, tail))


@router.get("/jobs/{job_id}/checkpoints")
def checkpoints(
    job_id: str,
    training: Training,
    verify: Annotated[bool, Query(description="Read every file and compare its sum.")] = False,
) -> schemas.CheckpointList:
    """The job's checkpoints, oldest first, with what is wrong with each."""
    training.ledger.get(job_id)
    checkpoints = training.checkpoints.all(job_id, check_sums=verify)
    return schemas.CheckpointList(checkpoints=[checkpoint_view(facts) for facts in checkpoints])


@router.post("/jobs/{job_id}/cancel", status_code=202)
def cancel(job_id: str, training: Training, body: schemas.CancelRequest | None = None) -> schemas.JobResponse:
    """End a job. A queued one ends at once, a running one within a forward pass. The base stays loaded."""
    return _view(training, training.cancel(job_id, body.keep if body is not None else "nothing"))


@router.post("/jobs/{job_id}/pause", status_code=202)
def pause(job_id: str, training: Training) -> schemas.JobResponse:
    """Stop a job so that it can continue later. A running one writes a checkpoint within a forward pass."""
    return _view(training, training.pause(job_id))


@router.post("/jobs/{job_id}/resume", status_code=202)
def resume(job_id: str, training: Training) -> schemas.JobResponse:
    """Queue a paused or interrupted job now. It continues from its newest checkpoint that verifies."""
    return _view(training, training.resume(job_id))


@router.post("/jobs/{job_id}/checkpoint", status_code=202)
def checkpoint(job_id: str, training: Training) -> schemas.JobResponse:
    """Write a checkpoint after the present step. The event `checkpoint` tells when it is written."""
    return _view(training, training.write_checkpoint(job_id))


@router.delete("/jobs/{job_id}", status_code=204)
def delete(job_id: str, training: Training) -> None:
    """Delete a job that has ended, with its checkpoints. Its adapter stays."""
    training.delete(job_id)


def _view(training: TrainingService, record: JobRecord) -> schemas.JobResponse:
    return job_view(record, training.place_of(record))
