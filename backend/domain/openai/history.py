"""What happened to a job, as OpenAI's API tells it: events, checkpoints, and the result file."""

import csv
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from domain.openai.fine_tunes import as_seconds, ftjob
from domain.openai.names import FineTunedName, id_in_name

# The kinds of events that are told. The others say how far the tokenizing is, and what a run is built of.
TOLD = frozenset({"state", "started", "metrics", "evaluation", "checkpoint"})
_EVENT = "ftevent-"
_STATES = {
    "queued": "Created fine-tuning job: {job}",
    "preparing": "Fine-tuning job is loading its base",
    "running": "Fine-tuning job started",
    "pausing": "Fine-tuning job is being paused",
    "paused": "Fine-tuning job paused",
    "interrupted": "Fine-tuning job was interrupted; it goes on by itself",
    "succeeded": "The job has successfully completed",
    "failed": "Fine-tuning job failed",
    "cancelled": "Fine-tuning job cancelled",
}
_LEVELS = {"failed": "error", "interrupted": "warn"}
RESULT_COLUMNS = ("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy")


@dataclass(frozen=True)
class JobEvent:
    """One event of a job, as it is stored."""

    job_id: str
    sequence: int
    kind: str
    data: Mapping[str, Any]
    created_at: str


def event_id(job_id: str, sequence: int) -> str:
    """Return an event's id."""
    return f"{_EVENT}{id_in_name(job_id)}-{sequence}"


def sequence_of(event: str, job_id: str) -> int | None:
    """Return the sequence number in the id of a job's event; None if it is none of that job's."""
    beginning = f"{_EVENT}{id_in_name(job_id)}-"
    number = event.removeprefix(beginning)
    return int(number) if event.startswith(beginning) and number.isdecimal() else None


def event_body(event: JobEvent) -> dict[str, Any]:
    """Show an event as a `fine_tuning.job.event`."""
    level, message, data = _told(event)
    return {
        "id": event_id(event.job_id, event.sequence),
        "object": "fine_tuning.job.event",
        "created_at": as_seconds(event.created_at),
        "level": level,
        "message": message,
        "type": "metrics" if event.kind in ("metrics", "evaluation") else "message",
        "data": data,
    }


def _told(event: JobEvent) -> tuple[str, str, dict[str, Any]]:
    data = event.data
    if event.kind == "metrics":
        told = {"step": data["step"], "total_steps": data["total_steps"], "train_loss": data["loss"]}
        told |= {"learning_rate": data["learning_rate"], **_measured(data, "train")}
        return "info", f"Step {data['step']}/{data['total_steps']}: training loss={data['loss']:.2f}", told
    if event.kind == "evaluation":
        told = {"step": data["step"], "valid_loss": data["eval_loss"]}
        told |= _measured(data, "valid")
        return "info", f"Step {data['step']}: validation loss={data['eval_loss']:.2f}", told
    if event.kind == "checkpoint":
        return "info", f"Checkpoint created at step {data['step']}", {"step": data["step"]}
    if event.kind == "started":
        words = f"Training {data['rows']} examples in {data['total_steps']} steps"
        return ("warn" if data["warnings"] else "info"), "; ".join([words, *data["warnings"]]), {}
    state, error = data["state"], data.get("error")
    message = _STATES[state].format(job=ftjob(event.job_id))
    if error is not None:
        message = f"{message}: {error['message']}"
    return _LEVELS.get(state, "info"), message, {}


def _measured(data: Mapping[str, Any], which: str) -> dict[str, Any]:
    """Return the accuracy of a step or an evaluation, and of preferences the margin, under OpenAI's names."""
    accuracy, preferences = _accuracy(data), data.get("preference")
    # OpenAI has "mean token" in the names of the validation's accuracy of tokens alone.
    name = f"{which}_accuracy" if which == "train" or preferences else f"{which}_mean_token_accuracy"
    measured = {} if accuracy is None else {name: accuracy}
    return measured | ({f"{which}_margin": preferences["margin"]} if preferences else {})


def _accuracy(data: Mapping[str, Any]) -> float | None:
    """Return the share of tokens that the model found likeliest, or of pairs in which the better answer is ahead."""
    figures = data.get("preference")
    return figures["accuracy"] if figures else data.get("token_accuracy")


@dataclass(frozen=True)
class StepFigures:
    """What is known of one step; None where nothing was measured.

    Attributes:
        train_accuracy: The share of tokens that the model found likeliest; where preferences are learned, of pairs in
            which the better answer is ahead.
        valid_accuracy: The same of the validation rows.
    """

    train_loss: float | None = None
    train_accuracy: float | None = None
    valid_loss: float | None = None
    valid_accuracy: float | None = None


def figures_by_step(metrics: Iterable[JobEvent], evaluations: Iterable[JobEvent]) -> dict[int, StepFigures]:
    """Return the figures of each step that was trained."""
    valid = {event.data["step"]: event.data for event in evaluations}
    return {
        event.data["step"]: StepFigures(
            event.data["loss"],
            _accuracy(event.data),
            valid.get(event.data["step"], {}).get("eval_loss"),
            _accuracy(valid.get(event.data["step"], {})),
        )
        for event in metrics
    }


def result_csv(figures: Mapping[int, StepFigures]) -> bytes:
    """Write a result file: a line for each step, an empty cell for what was not measured."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(RESULT_COLUMNS)
    for step, of_step in sorted(figures.items()):
        values = (of_step.train_loss, of_step.train_accuracy, of_step.valid_loss, of_step.valid_accuracy)
        rows.writerow([step, *("" if value is None else repr(value) for value in values)])
    return text.getvalue().encode()


@dataclass(frozen=True)
class CheckpointFacts:
    """A checkpoint of a job. `created_s` is in Unix seconds."""

    step: int
    created_s: float


def checkpoint_id(job_id: str, step: int) -> str:
    """Return a checkpoint's id."""
    return f"ftckpt_{id_in_name(job_id)}-{step}"


def checkpoint_body(
    job_id: str, name: FineTunedName, checkpoint: CheckpointFacts, figures: StepFigures
) -> dict[str, Any]:
    """Show a checkpoint as a `fine_tuning.job.checkpoint`."""
    metrics = {
        "step": checkpoint.step,
        "train_loss": figures.train_loss,
        "train_mean_token_accuracy": figures.train_accuracy,
        "valid_loss": figures.valid_loss,
        "valid_mean_token_accuracy": figures.valid_accuracy,
        # Every evaluation here goes over the whole validation file.
        "full_valid_loss": figures.valid_loss,
        "full_valid_mean_token_accuracy": figures.valid_accuracy,
    }
    return {
        "id": checkpoint_id(job_id, checkpoint.step),
        "object": "fine_tuning.job.checkpoint",
        "created_at": int(checkpoint.created_s),
        "fine_tuned_model_checkpoint": str(name.at(checkpoint.step)),
        "fine_tuning_job_id": ftjob(job_id),
        "metrics": metrics,
        "step_number": checkpoint.step,
    }
