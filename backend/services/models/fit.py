"""Whether a fine-tune of a model fits this machine, in short: for lists and details."""

from typing import Any

from core.errors import SettingRejected
from domain.configure import configure
from domain.memory.verdict import judge_run
from domain.models.records import Fit, ModelSummary
from domain.peft.algorithms import Algorithm
from services.hardware.machine import Machine
from services.models.shapes import Shapes, shape_config


def fit_of(
    machine: Machine, shapes: Shapes, config: dict[str, Any] | None, summary: ModelSummary, algorithm: str
) -> Fit | None:
    """Judge an algorithm's defaults by the memory that is free now. Other reasons to refuse a load are not considered.

    Args:
        machine: Has the device that the fine-tune would run on.
        shapes: Tells what models are made of. A list does not wait for one that has not been described yet.
        config: config.json if it is known. It is not downloaded for a list.
        algorithm: Its id.

    Returns:
        The verdict; None if the memory is not known, or if the defaults do not suit the model.
    """
    shape = shapes.known(shape_config(summary.model_id, config)) if config is not None else None
    if shape is None:
        return None
    device = machine.device("auto")
    try:
        settings = configure(
            Algorithm(algorithm),
            use_case=None,
            overrides={},
            machine=device.facts,
            shape=shape,
            available_bytes=device.available_bytes,
        ).config
    except SettingRejected:  # one odd model, say with a very short context, must not hide a list
        return None
    available, unsloth = device.available_bytes, device.facts.unsloth
    assessment = judge_run(shape, settings, available, on_gpu=device.on_gpu, unsloth=unsloth)
    if assessment.estimate is None:
        return None
    return Fit(assessment.verdict, assessment.estimate.total_bytes)
