"""The words of the boundary are the words of the stream."""

from typing import get_args

import pytest
from pydantic import BaseModel

from domain import protocol
from domain.exports import RESULTS, SETTINGS
from domain.jobs.export_states import ExportKind
from domain.jobs.progress import StepFigures

# What clients read from a job's events; `state` is the server's own word.
STREAMED = {"progress", "started", "built", "metrics", "evaluation", "checkpoint"}


def test_a_training_run_speaks_in_the_words_of_the_jobs_events() -> None:
    kinds = {event.model_fields["kind"].default for event in get_args(protocol.RunEvent)}
    assert kinds == STREAMED | {"computing"}  # how it computes is kept in the job itself


def test_a_step_is_stored_without_the_words_of_the_pipe() -> None:
    step = protocol.StepMetrics(
        request_id="r", step=2, total_steps=4, epoch=0.5, loss=1.5, learning_rate=1e-4, grad_norm=None, step_s=0.1,
        step_tokens=7, tokens=14, tokens_per_s=70.0, memory_bytes=1, elapsed_s=0.2, eta_s=0.2,
    )  # fmt: skip
    assert set(step.data()) == set(StepFigures.model_fields)
    assert step.figures().as_json() == step.data()
    assert protocol.EVENTS.validate_json(protocol.encode(step)) == step


@pytest.mark.parametrize("command", get_args(protocol.AnyCommand), ids=lambda command: command.__name__)
def test_every_command_names_its_result(command: type[protocol.AnyCommand]) -> None:
    assert issubclass(command.result_type(), BaseModel)
    assert all(event in get_args(protocol.CommandEvent) for event in command.event_types())


def test_every_kind_of_export_has_settings_and_a_result() -> None:
    assert set(SETTINGS) == set(RESULTS) == set(ExportKind)
