"""/runs: every run, one run live, and runs side by side."""

from typing import Annotated, Any

from fastapi import Depends, Query, Request
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse, Response

from api.training_schemas import JobResponse, checkpoint_view, job_view
from domain.jobs.states import JobState
from services.dataset_service import DatasetService, get_dataset_service
from services.training_service import TrainingService, get_training_service
from web.curves import METRICS, curves
from web.pages import page, pages_router

router = pages_router()
Training = Annotated[TrainingService, Depends(get_training_service)]
Datasets = Annotated[DatasetService, Depends(get_dataset_service)]
Ids = Annotated[list[str], Query(alias="id", max_length=20)]
_A_PAGE = 100
_EVENTS = 200  # newest events that a page shows
_KINDS = frozenset({"state", "started", "built", "evaluation", "checkpoint"})  # a run's story without its steps
_FIELDS = ("name", "model_id", "revision", "algorithm", "dataset_id", "validation_fraction", "gpus")


@router.get("/runs")
def runs(
    request: Request,
    training: Training,
    state: Annotated[JobState | None, Query()] = None,
    q: Annotated[str, Query(max_length=200)] = "",
    start: Annotated[int, Query(ge=0)] = 0,
) -> HTMLResponse:
    """List runs, newest first, in one state or all, whose name or model has some words in it."""
    records = training.ledger.all(frozenset({state}) if state is not None else None)
    words = q.lower().split()
    found = [record for record in records if all(word in f"{record.name} {record.model_id}".lower() for word in words)]
    shown = [job_view(record, training.place_of(record)) for record in found[start : start + _A_PAGE]]
    return page(
        request,
        "runs_table.html" if request.headers.get("hx-target") == "runs" else "runs.html",
        jobs=shown,
        total=len(found),
        start=start,
        a_page=_A_PAGE,
        q=q,
        state=state.value if state is not None else "",
        states=[each.value for each in JobState],
    )


@router.get("/runs/compare")
def compare(request: Request, training: Training, ids: Ids) -> Response:
    """Show up to 20 runs over one another, and what differs in their settings."""
    if len(ids) < 2:
        return RedirectResponse(f"/runs/{ids[0]}" if ids else "/runs")
    jobs = [job_view(training.ledger.get(job_id), None) for job_id in dict.fromkeys(ids)]
    return page(request, "compare.html", jobs=jobs, differences=differences(jobs), metrics=["eval_loss", *METRICS])


@router.get("/runs/compare/curves", response_class=JSONResponse)
def compared_curves(
    training: Training, ids: Ids, metric: Annotated[str, Query(pattern=r"^[a-z_.]{1,40}$")] = "loss"
) -> JSONResponse:
    """Return one metric of several runs, as columns."""
    asked = (metric,) if metric in METRICS else ()
    return JSONResponse({job_id: curves(training, job_id, asked) for job_id in dict.fromkeys(ids)})


def differences(jobs: list[JobResponse]) -> list[tuple[str, list[Any]]]:
    """Return what is not the same in all jobs: a name, and the value of each job."""
    rows = []
    dumped = [job.model_dump(mode="json") for job in jobs]
    for name in _FIELDS[1:]:
        rows.append((name, [job[name] for job in dumped]))
    for name in sorted({name for job in dumped for name in job["config"]}):
        rows.append((name, [job["config"].get(name) for job in dumped]))
    return [(name, values) for name, values in rows if any(value != values[0] for value in values)]


@router.get("/runs/{job_id}")
def run(request: Request, job_id: str, training: Training, datasets: Datasets) -> HTMLResponse:
    """Show one run."""
    sequence = training.ledger.newest_event(job_id)  # before what is shown: the stream sends what comes meanwhile
    job = job_view(training.ledger.get(job_id), training.place_of(training.ledger.get(job_id)))
    events = list(reversed(training.ledger.newest_events(job_id, None, _EVENTS, _KINDS)))
    return page(
        request,
        "run.html",
        job=job,
        sequence=sequence,
        events=events,
        dataset=datasets.get(job.dataset_id),
        checkpoints=_checkpoints(training, job_id),
    )


@router.get("/runs/{job_id}/head")
def head(request: Request, job_id: str, training: Training) -> HTMLResponse:
    """Return the part of a run's page that its state decides."""
    record = training.ledger.get(job_id)
    return page(request, "run_head.html", job=job_view(record, training.place_of(record)))


@router.get("/runs/{job_id}/checkpoints")
def checkpoints(request: Request, job_id: str, training: Training) -> HTMLResponse:
    """Return the table of a run's checkpoints."""
    training.ledger.get(job_id)
    return page(request, "run_checkpoints.html", checkpoints=_checkpoints(training, job_id), job_id=job_id)


@router.get("/runs/{job_id}/curves", response_class=JSONResponse)
def run_curves(job_id: str, training: Training) -> JSONResponse:
    """Return every point of a run."""
    return JSONResponse(curves(training, job_id))


def _checkpoints(training: TrainingService, job_id: str) -> list[Any]:
    return [checkpoint_view(facts) for facts in training.checkpoints.all(job_id, check_sums=False)]
