"""Whether a fine-tune of a model fits this machine, in short: for lists and details."""

from typing import Any

from core.errors import SettingRejected
from domain.configure import configure
from domain.memory.verdict import judge_run
from domain.models.architectures.registry import read_shape
from domain.models.records import Fit, ModelSummary
from domain.peft.algorithms import Algorithm
from services.hardware.machine import Machine


def fit_of(machine: Machine, config: dict[str, Any] | None, _summary: ModelSummary, algorithm: str) -> Fit | None:
    """Judge an algorithm with its defaults against what is free now; what else a load is refused for is not seen here.

    Args:
        machine: Has the device that the fine-tune would run on.
        config: config.json, if it is at hand: nothing is fetched for a list.
        algorithm: Its id.

    Returns:
        The verdict, or None where the memory is not known, or no default goes with the model.
    """
    shape = read_shape(config) if config is not None else None
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
    except SettingRejected:  # e.g. it knows fewer tokens than a row may have: one odd model must not hide a list
        return None
    assessment = judge_run(shape, settings, device.available_bytes, on_gpu=device.on_gpu)
    if assessment.estimate is None:
        return None
    return Fit(assessment.verdict, assessment.estimate.total_bytes)
