"""A job that is refused has changed nothing."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from core.errors import CheckpointUnusable
from domain.configure import MachineFacts, configure
from domain.peft.algorithms import Algorithm
from services.hardware.devices import Device
from services.peft_service import ModelOnDevice
from services.training.job_intake import JobIntake, JobRequest

REQUEST = JobRequest(
    model_id="m", loaded_model_id=None, revision=None, dataset_id="ds", validation_dataset_id=None,
    validation_fraction=0.0, use_case=None, algorithm=Algorithm.LORA, overrides={}, name=None, priority=0,
    resume_from=None, idempotency_key=None, force=False,
)  # fmt: skip


def test_room_is_made_only_for_a_job_that_nothing_else_refuses() -> None:
    machine = MachineFacts(has_gpu=False, supports_bf16=False)
    admitted: list[str] = []
    copied: list[str] = []
    dataset = SimpleNamespace(id="ds", rows=5, format="messages")
    datasets: Any = SimpleNamespace(
        get=lambda _: dataset,
        check_trainable=lambda *_: dataset,
        manifest=lambda _: SimpleNamespace(duplicates=0),
    )
    peft: Any = SimpleNamespace(
        on_device=lambda model_id, revision, **_: ModelOnDevice(model_id, revision, None, Device("cpu", machine, None)),
        configure=lambda algorithm, _use_case, overrides, _where: configure(
            algorithm, use_case=None, overrides=overrides, machine=machine
        ),
        admit_run=lambda where, *_: admitted.append(where.model_id),
    )
    analyses: Any = SimpleNamespace(check_learnable=lambda *_: None, longest_row=lambda *_: None)
    checkpoints: Any = SimpleNamespace(
        about=lambda *_: ("step-5", {"step": 5}), copy=lambda source, *_: copied.append(source)
    )
    intake = JobIntake(datasets, peft, analyses, checkpoints)
    first = intake.record(REQUEST, "job_1", None, "now")
    assert admitted == ["m"] and not copied

    other = replace(REQUEST, resume_from="job_1", overrides={"rank": 3})
    with pytest.raises(CheckpointUnusable, match="rank was 16, not 3"):
        intake.record(other, "job_2", first, "now")
    assert admitted == ["m"] and not copied

    again = intake.record(replace(REQUEST, resume_from="job_1"), "job_3", first, "now")
    assert admitted == ["m", "m"] and copied == ["job_1"]
    assert again.resumed_from == "job_1/step-5" and again.progress == {"step": 5, "recorded_step": 5}
