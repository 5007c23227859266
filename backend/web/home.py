"""/: the machine, what is loaded, what runs and waits, and what needs a person."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, Request
from fastapi.responses import FileResponse, HTMLResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent
from markupsafe import Markup

from api.hardware import usage
from api.hardware_schemas import Usage
from api.peft_views import loaded_model_view
from api.training_schemas import JobResponse, job_view
from core.errors import DatasetNotFound
from domain.jobs.states import ACTIVE_STATES, FINAL_STATES, JobState
from services.engine_service import get_engines
from services.engines.warm import Engines
from services.hardware_service import HardwareService, get_hardware_service
from services.peft_service import PeftService, get_peft_service
from services.training_service import TrainingService, get_training_service
from web.pages import page, pages_router, render
from web.shown import size
from web.sparkline import sparkline

router = pages_router()
_LOOK_AGAIN_S = 1.0
_OPEN = frozenset(JobState) - FINAL_STATES
_ENDED = 8  # runs that are shown after their end
_FULL_DISK = 0.05  # of a disk: with less free, a person should look
_CURVE = 60  # newest steps of a small curve
_SAMPLE = Path(__file__).parents[2] / "quickstart" / "pip_the_parrot.jsonl"
# The quickstart's fine-tune (quickstart/run.py), as a person's first button.
_FIRST_JOB: dict[str, Any] = {
    "model_id": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "algorithm": "lora",
    "use_case": "chatbot",
    "name": "Pip the parrot",
    "overrides": {"epochs": 3.0, "learning_rate": 5e-4, "batch_size": 4, "max_seq_length": 256},
}


@dataclass(frozen=True)
class House:
    """The services that the page shows."""

    hardware: HardwareService
    engines: Engines
    peft: PeftService
    training: TrainingService


def _house(
    hardware: Annotated[HardwareService, Depends(get_hardware_service)],
    engines: Annotated[Engines, Depends(get_engines)],
    peft: Annotated[PeftService, Depends(get_peft_service)],
    training: Annotated[TrainingService, Depends(get_training_service)],
) -> House:
    return House(hardware, engines, peft, training)


Services = Annotated[House, Depends(_house)]


@router.get("/")
def home(request: Request, house: Services) -> HTMLResponse:
    """Show the page with everything as it is now."""
    return page(request, "home.html", parts=Look(house).parts())


@router.get("/home/stream", response_class=EventSourceResponse)
async def stream(house: Services) -> AsyncIterator[ServerSentEvent]:
    """Send each part of the page as HTML, at once and whenever it has changed."""
    look, shown = Look(house), dict[str, Markup]()
    while True:
        parts = await asyncio.to_thread(look.parts)
        for name, html in parts.items():
            if shown.get(name) != html:
                yield ServerSentEvent(raw_data=str(html), event=name)
        shown = parts
        await asyncio.sleep(_LOOK_AGAIN_S)


@router.get("/home/pip_the_parrot.jsonl", response_class=FileResponse)
def sample() -> FileResponse:
    """Send the rows of the quickstart.

    Raises:
        DatasetNotFound: The server was installed without them.
    """
    if not _SAMPLE.is_file():
        raise DatasetNotFound("This server was installed without the quickstart's rows.")
    return FileResponse(_SAMPLE, media_type="application/jsonl")


class Look:
    """Looks at the services again and again for one reader, and reads the ended jobs only after one has ended."""

    def __init__(self, house: House) -> None:
        self._house = house
        self._counts: dict[str, int] = {}
        self._ended: list[JobResponse] = []

    def parts(self) -> dict[str, Markup]:
        """Return the parts of the page as HTML, by their names."""
        house = self._house
        machine = usage(house.hardware, house.engines)
        records = house.training.ledger.all(_OPEN)
        jobs = [job_view(record, house.training.place_of(record)) for record in records]
        running = [(job, _curve(house, job.id)) for job in jobs if job.state in ACTIVE_STATES]
        waiting = [job for job in jobs if job.state in (JobState.QUEUED, JobState.INTERRUPTED)]
        waiting.sort(key=lambda job: job.queue.position if job.queue is not None else 0)
        ended = self._newest_ended()
        first = _FIRST_JOB if not records and not ended and _SAMPLE.is_file() else None
        values: dict[str, dict[str, Any]] = {
            "machine": {"machine": machine},
            "attention": {"needs": _needs([*jobs, *ended], machine)},
            "running": {"running": running, "first": first},
            "queue": {"waiting": waiting},
            "loaded": {"models": [loaded_model_view(model) for model in house.peft.models()]},
            "ended": {"ended": ended},
        }
        return {name: render(f"home_{name}.html", **given) for name, given in values.items()}

    def _newest_ended(self) -> list[JobResponse]:
        ledger = self._house.training.ledger
        counts = ledger.count_by_state()
        if counts != self._counts:
            self._counts, newest = counts, ledger.all(FINAL_STATES)[:_ENDED]
            self._ended = [job_view(record, None) for record in newest]
        return self._ended


def _curve(house: House, job_id: str) -> str:
    newest = house.training.ledger.newest_events(job_id, None, _CURVE, frozenset({"metrics"}))
    return sparkline([event.data["loss"] for event in reversed(newest)])


@dataclass(frozen=True)
class Need:
    """Something that waits for a person.

    Attributes:
        what: In a few words.
        why: What happened.
        advice: What to change, best first.
        job_id: The job that it is about.
        resumable: Whether that job can go on at once.
    """

    what: str
    why: str
    advice: list[str]
    job_id: str | None = None
    resumable: bool = False


def _needs(jobs: list[JobResponse], machine: Usage) -> list[Need]:
    needs = []
    disk = machine.disk
    if disk.free_bytes < _FULL_DISK * disk.total_bytes:
        left = f"{size(disk.free_bytes)} are left on the disk of {disk.path}."
        needs.append(Need("The disk is nearly full", left, ["Delete exports, runs or models that nobody needs."]))
    for gpu in machine.gpus:
        if gpu.error is not None:
            needs.append(Need(f"GPU {gpu.index} cannot be used", gpu.error, []))
    for job in jobs:
        if job.state not in (JobState.PAUSED, JobState.FAILED):
            continue
        paused = job.state is JobState.PAUSED
        why = job.error.message if job.error is not None else "It was asked to pause."
        advice = job.error.suggestions if job.error is not None else []
        needs.append(Need(f"{job.name} {'is paused' if paused else 'failed'}", why, advice, job.id, paused))
    return needs
